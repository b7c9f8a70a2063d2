"""The arguments that a combination is validated with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mtenn_core._registry.record import PluginRecord, shown, told
from mtenn_core.errors import PluginSpecError

if TYPE_CHECKING:
    from mtenn_core.combination import Combination


def declared_examples(
    record: PluginRecord, combination: type[Combination]
) -> Sequence[dict[str, Any]]:
    """Return the arguments to validate with; none would be no validation."""
    examples = combination.examples
    listed = isinstance(examples, list | tuple) and all(isinstance(e, dict) for e in examples)
    if not (listed and examples):
        raise PluginSpecError(
            f"{record}{record.where}: {combination.__name__}.examples must be a tuple of dicts, at"
            f" least one: examples = ({{'name': value}},); found {shown(examples)}",
            record=record,
        )
    return examples


def validation_key(record: PluginRecord, combination: type, args: Any, kwargs: Any) -> Any:
    """Return what a validation is remembered by, or None where an argument may change."""
    arguments = [(None, arg) for arg in args] + sorted(kwargs.items())
    if not all(isinstance(value, int | float | str | None) for _, value in arguments):
        return None
    # With the types, since True == 1 == 1.0.
    return combination, record.version, tuple((n, type(v), v) for n, v in arguments)


def build_example(
    record: PluginRecord, combination: type[Combination], kwargs: dict[str, Any]
) -> Combination:
    """Return an instance for the gate, and leave the random state alone."""
    import torch

    try:
        with torch.random.fork_rng(devices=[]):
            return combination(**kwargs)
    except (Exception, SystemExit) as error:
        raise PluginSpecError(
            f"{record}{record.where}: {combination.__name__} cannot be built with"
            f" {shown(kwargs)}, one of its `examples` ({told(error)}); declare arguments that work:"
            " examples = ({'name': value},)",
            record=record,
        ) from error
