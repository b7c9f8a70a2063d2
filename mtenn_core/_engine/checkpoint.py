"""Write the identity of the combination into a checkpoint, and compare it on loading."""

from __future__ import annotations

import json
import math
import warnings
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mtenn_core._engine.declarations import constructor_arguments
from mtenn_core._engine.descriptions import Describer, shortened
from mtenn_core._engine.exact_values import Encoder, NotExactError
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

    ``arguments`` and ``attributes`` are descriptions, which are compared. ``exact`` has the
    arguments that their descriptions do not give exactly (see ``exact_values``), and ``inexact``
    the names of those that cannot be written. Both are only for making the combination again.
    """
    record, cls = _record(combination), unsharded_class(type(combination))
    describer = Describer(combination)
    values = constructor_arguments(combination, defaults=True)
    arguments = {name: shortened(describer.describe(value)) for name, value in values.items()}
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
        **_exact(combination, values, arguments),
    }


def _exact(
    combination: Combination, values: Mapping[str, Any], arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """Return ``exact`` and ``inexact`` of an identity."""
    encoder = Encoder(combination)
    exact, inexact = {}, []
    for name, value in values.items():
        try:
            data = encoder.encode(value)
        except NotExactError:
            inexact.append(name)
            continue
        if json.dumps(data) != json.dumps(arguments[name]):
            exact[name] = data
    return {"exact": exact, "inexact": inexact}


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
    before = read_identities(state)
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
        check_one(then, combination)


def _names(tasks: Tasks) -> list[str] | None:
    """Return the names of tasks; None if they have none."""
    return list(tasks) if isinstance(tasks, Sequence) else None


def check_one(then: Mapping[str, Any], combination: Combination) -> None:
    """Compare one identity of the checkpoint with a combination, as :func:`check` does."""
    now = json.loads(json.dumps(identity(combination)))
    if not same_combination(then, now):
        raise CheckpointError(
            f"the checkpoint is of {description(then)}, and this model has {description(now)}"
            f"{_REMEDY}"
        )
    _check_arguments(then, now)
    if None not in (then["version"], now["version"]) and then["version"] != now["version"]:
        warnings.warn(
            f"the checkpoint is of {description(then)}, and version {now['version']} is installed."
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


def same_combination(then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return whether two identities have the same class, apart from its arguments."""
    distributions = {then["distribution"], now["distribution"]} - {None}
    if then["class"] == now["class"]:
        return len(distributions) < 2
    if not distributions and _in_script(then["class"], now["class"]):
        return True
    # Another version of a plugin may have its class in another module.
    return (
        then["name"] == now["name"]
        and then["distribution"] == now["distribution"] is not None
        and then["version"] != now["version"]
    )


def _in_script(one: str, other: str) -> bool:
    """Return whether two classes can be the same one, of a script that was run and imported."""
    module, _, name = one.partition(":")
    other_module, _, other_name = other.partition(":")
    return name == other_name and "__main__" in (module, other_module)


def _check_arguments(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
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
    found = f"this model has other arguments: {description(now)}"
    if equal:
        found = f"this model has another value of the attribute {', '.join(map(repr, differing))}"
    raise CheckpointError(f"the checkpoint is of {description(then)}, and {found}{_REMEDY}")


def _checksum(text: bytes) -> bytes:
    return f"{zlib.crc32(text):08x}".encode()


def read_identities(state: object) -> list[dict[str, Any]]:
    """Return the identities in a checkpoint. Its entries may have been rounded or averaged.

    Raises
    ------
    CheckpointError : it is not what :func:`identity_tensor` has written
    """
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


def description(identity: Mapping[str, Any]) -> str:
    """Return an identity in words, for messages."""
    arguments = ", ".join(f"{name}={value!r}" for name, value in identity["arguments"].items())
    name = repr(identity["name"] or identity["class"])
    if identity["distribution"]:
        name += f" ({identity['distribution']} {identity['version']})"
    elif identity["name"]:
        name += f" (class {identity['class']})"
    return f"{name} with {arguments or 'no arguments'}"
