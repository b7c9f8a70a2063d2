"""Make the combinations of a checkpoint again: find the class, read the arguments, load values."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mtenn_core._registry.messages import describe_error
from mtenn_core._registry.record import PluginRecord
from mtenn_core.errors import CheckpointError, CombinationNotFoundError, MtennError

if TYPE_CHECKING:
    from mtenn_core._registry.lookup import Registry
    from mtenn_core.combination import Combination

Make = Callable[
    [PluginRecord, "type[Combination]", Sequence[Any], Mapping[str, Any]], "Combination"
]


def make_again(
    registry: Registry,
    make: Make,
    identity: Mapping[str, Any],
    state: Mapping[str, Any],
    classes: Sequence[type[Combination]],
) -> Combination:
    """Return one combination of a checkpoint, with its parameters and buffers.

    Parameters
    ----------
    make : makes an instance with positional and keyword arguments, and validates it
    identity : what :func:`mtenn_core._engine.checkpoint.identity` has returned
    state : the state dict of the combination
    classes : classes that no plugin has

    Raises
    ------
    errors of :meth:`~mtenn_core.Registry.from_checkpoint`
    """
    from mtenn_core._engine.checkpoint import check_one, description
    from mtenn_core._engine.declarations import call_arguments

    record, cls = _given(identity, classes) or _installed(registry, identity)
    if record.plugin is cls and record.distribution is None:
        # A class of a script has another module if the script is run and not imported.
        identity = {**identity, "class": record.target}
    values = _arguments(identity, cls, state)
    try:
        combination = make(record, cls, *call_arguments(cls, values))
    except MtennError:
        raise
    except Exception as error:
        advice = "Make the combination yourself."
        if record.version != identity["version"]:
            advice = _version_to_install(identity)
        raise CheckpointError(
            f"the checkpoint is of {description(identity)}, and {record} cannot be made with these"
            f" arguments: {describe_error(error)}. {advice}"
        ) from error
    _load(combination, state, description(identity))
    check_one(identity, combination)
    return combination


def _given(
    identity: Mapping[str, Any], classes: Sequence[type[Combination]]
) -> tuple[PluginRecord, type[Combination]] | None:
    """Return the class with the identity's name, of those that the caller has given."""
    module, _, name = identity["class"].partition(":")
    named = [cls for cls in classes if cls.__qualname__ == name]
    same_module = [cls for cls in named if cls.__module__ == module]
    for cls in same_module or named:
        target = f"{cls.__module__}:{cls.__qualname__}"
        return PluginRecord(identity["name"] or cls.__name__, target, plugin=cls), cls
    return None


def _installed(
    registry: Registry, identity: Mapping[str, Any]
) -> tuple[PluginRecord, type[Combination]]:
    """Return the plugin of an identity, and its class."""
    from mtenn_core._engine.checkpoint import description, same_combination

    name, distribution = identity["name"], identity["distribution"]
    if name is None:
        # The process that saved it could not ask its registry, or the class was no plugin.
        targets = {record.target: record for record in registry.records()}
        if (found := targets.get(identity["class"])) is None:
            raise _no_plugin(identity)
        name, distribution = found.name, found.distribution
    try:
        record = registry.info(f"{distribution}:{name}" if distribution else name)
    except CombinationNotFoundError as error:
        if distribution is None:
            raise _no_plugin(identity) from error
        others = f" Another distribution offers {name!r}." if name in registry else ""
        raise CombinationNotFoundError(
            f"the checkpoint is of {description(identity)}, which is not installed.{others}"
            f" {_version_to_install(identity)}"
        ) from error
    cls = registry.get(record.qualified_name, validate=False)
    now = {**record.to_json(), "class": f"{cls.__module__}:{cls.__qualname__}"}
    if not same_combination(identity, now):
        raise CheckpointError(
            f"the checkpoint is of {description(identity)} (class {identity['class']}), and"
            f" {record} has another class: {now['class']}. {_version_to_install(identity)}"
        )
    return record, cls


def _no_plugin(identity: Mapping[str, Any]) -> CheckpointError:
    module, _, name = identity["class"].partition(":")
    return CheckpointError(
        f"the checkpoint is of the class {name} of the module {module}, which is no installed"
        f" plugin. Import the class, and pass it: registry.from_checkpoint(…, classes=[{name}])"
    )


def _version_to_install(identity: Mapping[str, Any]) -> str:
    distribution, version = identity["distribution"], identity["version"]
    if distribution is None:
        return "Make the combination yourself."
    return "Install it: pip install " + (f"{distribution}=={version}" if version else distribution)


def _arguments(
    identity: Mapping[str, Any], cls: type[Combination], state: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the values of the constructor arguments, without unreadable ones that are defaults."""
    from mtenn_core._engine.checkpoint import description

    values = {}
    for name, described in identity["arguments"].items():
        if is_exact(identity, name):
            try:
                values[name] = argument_value(identity, name, state)
            except ValueError as error:
                raise CheckpointError(
                    f"the checkpoint is of {description(identity)}; its argument {name!r}"
                    f" cannot be read: {error}. Make the combination yourself."
                ) from error
        elif not _is_default(cls, name, described):
            raise CheckpointError(
                f"the checkpoint is of {description(identity)}. A checkpoint cannot hold the"
                f" value of its argument {name!r}, only this description. Make the combination"
                " yourself with the same arguments, and give it to MultiPoseModel. load_state_dict"
                " then compares the arguments with the descriptions."
            )
    return values


def is_exact(identity: Mapping[str, Any], name: str) -> bool:
    """Return True if an identity has the exact value of an argument."""
    if "inexact" in identity:
        return name not in identity["inexact"]
    # An earlier version of mtenn-core wrote only descriptions. Text may describe something else.
    return isinstance(identity["arguments"][name], bool | int | float | None)


def argument_value(identity: Mapping[str, Any], name: str, state: Mapping[str, Any]) -> Any:
    """Return the exact value of an argument.

    Raises
    ------
    ValueError : it cannot be read, for example because numpy is not installed
    """
    from mtenn_core._engine.exact_values import decode

    return decode(identity.get("exact", {}).get(name, identity["arguments"][name]), state)


def _is_default(cls: type[Combination], name: str, described: Any) -> bool:
    """Return True if the default value of an argument has the same description."""
    import torch

    from mtenn_core._engine.declarations import constructor_signature
    from mtenn_core._engine.descriptions import Describer, shortened

    parameter = constructor_signature(cls).parameters.get(name)
    if parameter is None or parameter.default is parameter.empty:
        return False
    default = shortened(Describer(torch.nn.Module()).describe(parameter.default))
    return bool(json.loads(json.dumps(default)) == described)


def _load(combination: Combination, state: Mapping[str, Any], description: str) -> None:
    """Load parameters and buffers into a combination, in the dtypes of the checkpoint."""
    try:
        for name, tensor in combination.state_dict(keep_vars=True).items():
            if name in state and tensor.dtype != state[name].dtype:
                # A model in float64 would lose digits. Through .data, tied parameters stay tied.
                tensor.data = tensor.data.to(state[name].dtype)
        combination.load_state_dict(dict(state))
    except Exception as error:
        raise CheckpointError(
            f"the checkpoint is of {description}, and its parameters do not fit this combination:"
            f" {' '.join(describe_error(error).split())}"
        ) from error
