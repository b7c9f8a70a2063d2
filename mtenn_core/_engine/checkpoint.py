"""Write the identity of the combination into a checkpoint, and compare it on loading."""

from __future__ import annotations

import json
import math
import warnings
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mtenn_core._engine.declarations import constructor_arguments
from mtenn_core._engine.descriptions import Describer, shortened
from mtenn_core._engine.module_tensors import unsharded_class
from mtenn_core._process.torch_modes import has_numbers, without_modes
from mtenn_core.combination import Combination
from mtenn_core.errors import CheckpointError, PluginWarning

if TYPE_CHECKING:
    from mtenn_core._registry import PluginRecord

_REMEDY = (
    ". Make the model with the checkpoint's combination. To load the checkpoint anyway, delete the"
    " key that ends in '_extra_state' from the state dict, and load it with strict=False."
)
_FIELDS = ("name", "distribution", "version", "class", "arguments", "start_values", "attributes")
Tasks = int | Sequence[str] | None
# A number of bytes. Each text is filled up to a multiple of it.
_BLOCK = 1024
# Descriptions of attributes are only compared. Those of arguments are also shown in messages.
_MAX_ATTRIBUTE_LENGTH = 64


def identity(combination: Combination) -> dict[str, Any]:
    """Return the name, distribution, version, class, arguments and attributes of a combination.

    This raises no error, because a training run must be able to save its result. ``start_values``
    is True if an argument is itself a parameter or buffer of the combination.
    """
    record, cls = _record(combination), unsharded_class(type(combination))
    describer = Describer(combination)
    arguments = {
        name: shortened(describer.describe(value))
        for name, value in constructor_arguments(combination, defaults=True).items()
    }
    start_values = describer.found_state
    attributes = describer.attributes(combination)
    return {
        "name": record and record.name,
        "distribution": record and record.distribution,
        "version": record and record.version,
        "class": f"{cls.__module__}:{cls.__qualname__}",
        "arguments": arguments,
        "start_values": start_values,
        "attributes": {
            name: shortened(data, _MAX_ATTRIBUTE_LENGTH) for name, data in attributes.items()
        },
    }


@without_modes(process_wide=False)
def identity_tensor(combinations: Sequence[Combination], tasks: Tasks = None) -> Tensor:
    """Return the identities of combinations as JSON in a tensor: one byte in each entry.

    The JSON is one object for one combination, and a list of objects for several. The first object
    has the names of the tasks, if they have names.

    It is a tensor because some formats of checkpoints (safetensors, distributed checkpoints) hold
    only tensors. The dtype is int32, so that the sum of several checkpoints does not overflow and
    their average is again the identity. A checksum notices an average of different identities.

    Blanks fill the text up to a round length, because torch.distributed.checkpoint reads the
    checkpoint's tensor into the model's tensor. Without blanks, the two tensors could have
    different lengths.
    """
    identities = list(map(identity, combinations))
    if names := _names(tasks):
        identities[0]["tasks"] = names
    text = json.dumps(identities[0] if len(identities) == 1 else identities).encode()
    text += b"\n" + _checksum(text)
    n_bytes = _BLOCK * math.ceil(len(text) / _BLOCK)
    # The device is given, because the default device may have no memory ("meta").
    return torch.tensor(list(text.ljust(n_bytes)), dtype=torch.int32, device="cpu")


@without_modes(process_wide=False)
def check(state: object, combinations: Sequence[Combination], tasks: Tasks = None) -> None:
    """Compare the checkpoint's combinations with those of the model.

    A checkpoint without numbers (on the meta device) says nothing of its combination.

    Different arguments are accepted if the attributes are equal, besides parameters and buffers.
    Then the arguments are only start values, and the checkpoint has the values that were learned.

    Raises
    ------
    CheckpointError : a combination, its arguments, the number of combinations, or the names of the
        tasks differ

    Warns
    -----
    PluginWarning : only the version differs
    """
    if isinstance(state, Tensor) and not has_numbers(state):
        return
    before = _read(state)
    if len(before) != len(combinations):
        raise CheckpointError(
            f"the checkpoint has {len(before)} combination(s), and this model has"
            f" {len(combinations)}: one for all tasks, or one for each{_REMEDY}"
        )
    names, names_before = _names(tasks), before[0].get("tasks")
    if names and names_before and names != names_before:
        raise CheckpointError(
            f"the checkpoint is of the tasks {names_before}, in this order, and this model has the"
            f" tasks {names}. Name the tasks in the order of the checkpoint."
        )
    for then, combination in zip(before, combinations, strict=True):
        _check_one(then, json.loads(json.dumps(identity(combination))))


def _names(tasks: Tasks) -> list[str] | None:
    """Return the names of tasks; None if they have none."""
    return list(tasks) if isinstance(tasks, list | tuple) else None


def _check_one(then: dict[str, Any], now: dict[str, Any]) -> None:
    """Compare one identity of the checkpoint with that of the model."""
    if not _same_combination(then, now):
        raise CheckpointError(
            f"the checkpoint is of {_description(then)}, and this model has {_description(now)}"
            f"{_REMEDY}"
        )
    _check_arguments(then, now)
    if None not in (then["version"], now["version"]) and then["version"] != now["version"]:
        warnings.warn(
            f"the checkpoint is of {_description(then)}, and version {now['version']} is installed."
            " The predictions may differ.",
            PluginWarning,
            stacklevel=3,
        )


def _record(combination: Combination) -> PluginRecord | None:
    """Return the plugin that a combination belongs to, or None if the registry cannot tell."""
    # The registry knows the distribution. It is in a higher layer, so import it only here.
    from mtenn_core._registry import registry

    try:
        return registry.record_of(unsharded_class(type(combination)))
    except Exception:  # for example, a malformed setting or damaged metadata
        return None


def _same_combination(then: dict[str, Any], now: dict[str, Any]) -> bool:
    """Return whether two identities have the same class, apart from its arguments."""
    distributions = {then["distribution"], now["distribution"]} - {None}
    if then["class"] == now["class"]:
        return len(distributions) < 2
    # Another version of a plugin may have its class in another module.
    return (
        then["name"] == now["name"]
        and then["distribution"] == now["distribution"] is not None
        and then["version"] != now["version"]
    )


def _check_arguments(then: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise a CheckpointError if the arguments differ in more than start values."""
    equal = then["arguments"] == now["arguments"]
    if equal and not (then["start_values"] or now["start_values"]):
        return
    ours, theirs = then["attributes"], now["attributes"]
    differing = [
        name
        for name in sorted(ours.keys() | theirs.keys())
        if (name in ours, ours.get(name)) != (name in theirs, theirs.get(name))
    ]
    if not differing:
        return
    found = f"this model has other arguments: {_description(now)}"
    if equal:
        found = f"this model has another value of the attribute {', '.join(map(repr, differing))}"
    raise CheckpointError(f"the checkpoint is of {_description(then)}, and {found}{_REMEDY}")


def _checksum(text: bytes) -> bytes:
    return f"{zlib.crc32(text):08x}".encode()


def _read(state: object) -> list[dict[str, Any]]:
    """Return the identities in a checkpoint. Its entries may have been rounded or averaged."""
    try:
        numbers = state.cpu().tolist()  # type: ignore[attr-defined]
        text, _, checksum = bytes(map(round, numbers)).rstrip().rpartition(b"\n")
        if checksum != _checksum(text):
            raise ValueError("its checksum is wrong")
        found = json.loads(text)
        identities: list[dict[str, Any]] = found if isinstance(found, list) else [found]
        missing = [field for field in _FIELDS for each in identities if field not in each]
        if missing:
            raise ValueError(f"it has no {', '.join(missing)}")
    except Exception as error:
        raise CheckpointError(
            f"the checkpoint's record of its combination cannot be read ({error}). If you have"
            " calculated with state dicts, for example averaged them, take this entry from one of"
            f" them{_REMEDY}"
        ) from error
    return identities


def _description(identity: dict[str, Any]) -> str:
    """Return an identity in words, for messages."""
    arguments = ", ".join(f"{name}={value!r}" for name, value in identity["arguments"].items())
    name = repr(identity["name"] or identity["class"])
    if identity["distribution"]:
        name += f" ({identity['distribution']} {identity['version']})"
    elif identity["name"]:
        name += f" (class {identity['class']})"
    return f"{name} with {arguments or 'no arguments'}"
