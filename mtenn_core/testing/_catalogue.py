"""The catalogue: one list of checks for all fronts, in the order in which they run.

The gradient of a combined prediction is go · Σ_i w_i g_i, with go the gradient of the loss, w_i the
pose weights and g_i the gradients of the poses. So w is read off backward, with unit vectors for
g_i, and compared with finite differences of the value (C); that backward is this sum for any
go and g_i is linear algebra, which is checked to roundoff (B). Neither sees a wrong value (D),
arguments and results of the wrong form (A1 to A3, A11 to A13), or side effects (A4 to A10).
"""

from __future__ import annotations

from collections.abc import Collection

from mtenn_core.testing._checks import (
    arguments,
    bad_input,
    chain_rule,
    copies,
    derivatives,
    extremes_and_nan,
    forward,
    precision,
    repeated_calls,
    side_effects,
    values,
)
from mtenn_core.testing._checks.check import LEVELS, Check, Level

CHECKS: tuple[Check, ...] = (
    forward.output,
    forward.raw_return,
    chain_rule.chain_rule,
    forward.order_of_names,
    derivatives.pose_weights,
    derivatives.own_parameters,
    values.reference,
    values.properties,
    extremes_and_nan.extremes,
    precision.low_precision,
    arguments.arguments,
    derivatives.end_to_end,
    chain_rule.layout_of_gradients,
    chain_rule.many_poses,
    side_effects.purity,
    repeated_calls.repeatable,
    repeated_calls.isolated,
    repeated_calls.modes,
    side_effects.memory,
    copies.copies,
    derivatives.double_backward,
    bad_input.bad_input,
    forward.value_of_predictions,
    forward.device,
    bad_input.errors_that_name,
    side_effects.freed_by_backward,
    copies.shows_arguments,
    arguments.refused_arguments,
)


def chosen_checks(level: Level, only: Collection[str] | None = None) -> list[Check]:
    """Return the checks of a level and those below, or those with the ids ``only``.

    Raises
    ------
    ValueError : there is no such level, or no check of such an id
    """
    if level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(LEVELS)}; found {level!r}")
    if only is not None:
        ids = known_ids(only)
        return [check for check in CHECKS if check.id in ids]
    up_to = LEVELS.index(level)
    return [check for check in CHECKS if LEVELS.index(check.level) <= up_to]


def known_ids(ids: Collection[str]) -> Collection[str]:
    """Return ``ids``, or raise a ValueError if one is that of no check."""
    known = [check.id for check in CHECKS]
    unknown = [ids] if isinstance(ids, str) else [id for id in ids if id not in known]
    if unknown:
        raise ValueError(f"no check is called {', '.join(unknown)}; known: {', '.join(known)}")
    return ids
