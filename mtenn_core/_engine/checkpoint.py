"""Write the identity of the combination into a checkpoint, and compare it on loading."""

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

from mtenn_core._engine.declarations import constructor_arguments
from mtenn_core._engine.module_tensors import is_sharded
from mtenn_core._process.torch_modes import has_numbers, without_modes
from mtenn_core.combination import Combination
from mtenn_core.errors import CheckpointError, PluginWarning

_REMEDY = (
    ". Make the model with the checkpoint's combination. To load the checkpoint anyway, delete the"
    " key that ends in '_extra_state' from the state dict, and load it with strict=False."
)
# A length in bytes. Each text is filled up to a multiple of it.
_BLOCK = 1024


def identity(combination: Combination) -> dict[str, Any]:
    """Return the name, distribution, version, class and arguments of a combination."""
    # The registry knows the distribution. It is in a higher layer, so import it only here.
    from mtenn_core._registry import registry

    record = registry.record_of(type(combination))
    return {
        "name": record and record.name,
        "distribution": record and record.distribution,
        "version": record and record.version,
        "class": f"{type(combination).__module__}:{type(combination).__qualname__}",
        "arguments": _plain(constructor_arguments(combination, defaults=True), _held(combination)),
    }


@without_modes(process_wide=False)
def identity_tensor(combination: Combination) -> Tensor:
    """Return the identity of a combination as JSON in a tensor of bytes.

    It is a tensor because some formats of checkpoints (safetensors, distributed checkpoints) hold
    only tensors. Blanks fill it up to a round length, because torch.distributed.checkpoint reads
    the checkpoint's tensor into the model's tensor. Without blanks, the two tensors could have
    different lengths.
    """
    text = json.dumps(identity(combination), ensure_ascii=False).encode()
    n_bytes = _BLOCK * math.ceil(len(text) / _BLOCK)
    return torch.tensor(list(text.ljust(n_bytes)), dtype=torch.uint8)


@without_modes(process_wide=False)
def check(state: object, combination: Combination) -> None:
    """Compare the checkpoint's combination with the model's combination.

    A checkpoint without numbers (on the meta device) says nothing of its combination.

    Raises
    ------
    CheckpointError : the combination or its arguments differ

    Warns
    -----
    PluginWarning : only the version differs
    """
    if isinstance(state, Tensor) and not has_numbers(state):
        return
    then, now = _read(state), _read(identity_tensor(combination))
    same = ("name", "distribution") if then["name"] and now["name"] else ("class",)
    if any(then[key] != now[key] for key in same):
        raise CheckpointError(
            f"the checkpoint is of {_description(then)}, and this model has {_description(now)}"
            f"{_REMEDY}"
        )
    if then["arguments"] != now["arguments"]:
        raise CheckpointError(
            f"the checkpoint is of {_description(then)}, and this model has other arguments:"
            f" {_description(now)}{_REMEDY}"
        )
    if then["version"] != now["version"]:
        warnings.warn(
            f"the checkpoint is of {_description(then)}, and version {now['version']} is installed."
            " The predictions may differ.",
            PluginWarning,
            stacklevel=2,
        )


def _held(combination: Combination) -> set[int]:
    """Return the addresses of parameters and buffers. A checkpoint already has their values."""
    tensors = (*combination.parameters(), *combination.buffers())
    return {t.untyped_storage().data_ptr() for t in tensors if not is_sharded(t)}


def _plain(argument: Any, held: Container[int]) -> Any:
    """Convert an argument to types of JSON. Equal arguments give equal results in all processes."""
    if argument is None or isinstance(argument, str | int | float):
        return argument if argument == argument else "nan"  # a NaN is not equal to itself
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
    data = ctypes.string_at(values.data_ptr(), values.nbytes)  # Tensor.numpy() needs numpy
    return f"{kind}, SHA-256 {hashlib.sha256(data).hexdigest()}"


def _read(state: object) -> dict[str, Any]:
    try:
        then = json.loads(bytes(state.tolist()))  # type: ignore[attr-defined]
        {key: then[key] for key in ("name", "distribution", "version", "class", "arguments")}
    except Exception as error:
        raise CheckpointError(
            f"the checkpoint's record of its combination cannot be read ({error}){_REMEDY}"
        ) from error
    return then


def _description(identity: dict[str, Any]) -> str:
    """Return an identity in words, for messages."""
    arguments = ", ".join(f"{name}={value!r}" for name, value in identity["arguments"].items())
    name = repr(identity["name"] or identity["class"])
    if identity["distribution"]:
        name += f" ({identity['distribution']} {identity['version']})"
    return f"{name} with {arguments or 'no arguments'}"
