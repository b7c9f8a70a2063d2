"""What a checkpoint says of the combination that it was made with."""

from __future__ import annotations

import json
import math
import re
import warnings
from typing import Any

import torch
from torch import Tensor

from mtenn_core._registry import registry
from mtenn_core.combination import Combination, constructor_arguments
from mtenn_core.errors import CheckpointError, PluginWarning

REMEDY = (
    "; make the model with what the checkpoint was made with, or, to load it anyway, delete the key"
    " that ends in '_extra_state' from the state dict and load with strict=False"
)

BLOCK = 1024


def identity(combination: Combination) -> dict[str, Any]:
    """Return what a combination is: name, distribution, version, class and arguments."""
    record = registry.record_of(type(combination))
    return {
        "name": record and record.name,
        "distribution": record and record.distribution,
        "version": record and record.version,
        "class": f"{type(combination).__module__}:{type(combination).__qualname__}",
        "arguments": constructor_arguments(combination, defaults=True),
    }


def written(combination: Combination) -> Tensor:
    """Return its identity as JSON in a tensor of bytes.

    As a tensor, since some formats of checkpoints (safetensors, distributed ones) hold no others.
    Blanks fill it up to a round length: torch.distributed.checkpoint reads into the tensor of the
    model that it loads into, whose version, say, may take another number of bytes.
    """
    text = json.dumps(identity(combination), default=_as_text, ensure_ascii=False).encode()
    n_bytes = BLOCK * math.ceil(len(text) / BLOCK)
    return torch.tensor(list(text.ljust(n_bytes)), dtype=torch.uint8)


def check(state: object, combination: Combination) -> None:
    """Compare a checkpoint's combination with the one that it is loaded into.

    Raises
    ------
    CheckpointError : it is another one, or has other arguments

    Warns
    -----
    PluginWarning : it is another version of the same
    """
    then, now = _read(state), _read(written(combination))
    same = ("name", "distribution") if then["name"] and now["name"] else ("class",)
    if any(then[key] != now[key] for key in same):
        raise CheckpointError(
            f"the checkpoint is of {_shown(then)}, and this model has {_shown(now)}{REMEDY}"
        )
    if then["arguments"] != now["arguments"]:
        raise CheckpointError(
            f"the checkpoint is of {_shown(then)}, and this model has other arguments,"
            f" {_shown(now)}{REMEDY}"
        )
    if then["version"] != now["version"]:
        warnings.warn(
            f"the checkpoint is of {_shown(then)}, and {now['version']} is installed: what it"
            " predicts may differ",
            PluginWarning,
            stacklevel=2,
        )


def _as_text(argument: Any) -> Any:
    """Return what an argument is called in every process: without an address, sets in order."""
    if isinstance(argument, set | frozenset):
        return sorted(map(str, map(_as_text, argument)))
    if hasattr(argument, "__qualname__"):
        return f"{argument.__module__}:{argument.__qualname__}"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(argument))


def _read(state: object) -> dict[str, Any]:
    try:
        then = json.loads(bytes(state.tolist()))  # type: ignore[attr-defined]
        {key: then[key] for key in ("name", "distribution", "version", "class", "arguments")}
    except Exception as error:
        raise CheckpointError(
            f"what the checkpoint says of its combination cannot be read ({error}){REMEDY}"
        ) from error
    return then


def _shown(identity: dict[str, Any]) -> str:
    arguments = ", ".join(f"{name}={value!r}" for name, value in identity["arguments"].items())
    name = identity["name"] or identity["class"]
    version = f" ({identity['distribution']} {identity['version']})" * bool(
        identity["distribution"]
    )
    return f"{name!r}{version} with {arguments or 'no arguments'}"
