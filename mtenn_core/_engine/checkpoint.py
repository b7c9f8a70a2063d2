"""What a checkpoint says of the combination that it was made with."""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import re
import warnings
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor

from mtenn_core._engine.module_tensors import is_sharded
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
        "arguments": _plain(constructor_arguments(combination, defaults=True), _held(combination)),
    }


def written(combination: Combination) -> Tensor:
    """Return its identity as JSON in a tensor of bytes.

    As a tensor, since some formats of checkpoints (safetensors, distributed ones) hold no others.
    Blanks fill it up to a round length: torch.distributed.checkpoint reads into the tensor of the
    model that it loads into, whose version, say, may take another number of bytes.
    """
    text = json.dumps(identity(combination), ensure_ascii=False).encode()
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


def _held(combination: Combination) -> set[int]:
    """Return where the parameters and buffers are, whose values a checkpoint has anyway."""
    tensors = (*combination.parameters(), *combination.buffers())
    return {t.untyped_storage().data_ptr() for t in tensors if not is_sharded(t)}


def _plain(argument: Any, held: Container[int]) -> Any:
    """Return an argument as JSON has it: the same in every process, and for equal values."""
    if argument is None or isinstance(argument, str | int | float):
        return argument if argument == argument else "nan"  # which is equal to itself
    if isinstance(argument, Mapping):
        return {str(key): _plain(value, held) for key, value in argument.items()}
    if isinstance(argument, list | tuple):
        return [_plain(value, held) for value in argument]
    if isinstance(argument, set | frozenset):
        return sorted(str(_plain(value, held)) for value in argument)
    if isinstance(argument, Tensor):
        return _tensor_as_text(argument, held)
    if hasattr(argument, "__qualname__"):
        return f"{argument.__module__}:{argument.__qualname__}"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(argument))


def _tensor_as_text(tensor: Tensor, held: Container[int]) -> str:
    kind = f"{tensor.dtype}, shape {tuple(tensor.shape)}"
    if tensor.layout is not torch.strided or tensor.untyped_storage().data_ptr() in held:
        return kind
    values = tensor.detach().cpu().contiguous()
    if values.numel() <= 16:
        return f"{kind}, {values.tolist()}"
    data = ctypes.string_at(values.data_ptr(), values.nbytes)  # works without numpy
    return f"{kind}, SHA-256 {hashlib.sha256(data).hexdigest()}"


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
