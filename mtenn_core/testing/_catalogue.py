"""The list of all checks, in the order in which they run.

The gradient of a combined prediction is go · Σ_i w_i g_i. Here go is the gradient of the loss, w_i
are the pose weights, and g_i are the gradients of the poses. An id shows the group of a check:

- A1 to A3, A11 to A14: the form of arguments and results. A4 to A10: side effects.
- B: backward computes this sum for any go and g_i. The sum is linear algebra, so the tolerance is
  roundoff.
- C: the weights w_i are the derivative of the value. Backward returns w_i if the g_i are unit
  vectors; the check compares them with finite differences of the value.
- D: the value is correct. The other groups do not notice a wrong value.
"""

from __future__ import annotations

from collections.abc import Collection

from mtenn_core.testing._checks import (
    arguments,
    bad_input,
    batches,
    chain_rule,
    copies,
    derivatives,
    extremes_and_nan,
    forward,
    input_derivatives,
    many_poses,
    modes,
    own_parameters,
    precision,
    repeated_calls,
    second_derivatives,
    side_effects,
    values,
    whole_model,
)
from mtenn_core.testing._checks.check import LEVELS, Check, Level

CHECKS: tuple[Check, ...] = (
    forward.output,
    forward.raw_return,
    chain_rule.chain_rule,
    forward.order_of_names,
    derivatives.pose_weights,
    own_parameters.own_parameters,
    input_derivatives.input_derivatives,
    values.reference,
    values.properties,
    extremes_and_nan.extremes,
    precision.low_precision,
    arguments.arguments,
    whole_model.end_to_end,
    chain_rule.layout_of_gradients,
    many_poses.many_poses,
    side_effects.purity,
    repeated_calls.repeatable,
    repeated_calls.isolated,
    modes.modes,
    side_effects.memory,
    copies.copies,
    second_derivatives.double_backward,
    bad_input.bad_input,
    forward.value_of_predictions,
    forward.device,
    batches.batches,
    bad_input.errors_that_name,
    side_effects.freed_by_backward,
    copies.shows_arguments,
    arguments.refused_arguments,
)


def chosen_checks(level: Level, only: Collection[str] | None = None) -> list[Check]:
    """Return the checks of a level and of lower levels, or only the checks with the ids ``only``.

    Raises
    ------
    ValueError : the level or an id is unknown
    """
    if level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(LEVELS)}; found {level!r}")
    if only is not None:
        ids = known_ids(only)
        return [check for check in CHECKS if check.id in ids]
    up_to = LEVELS.index(level)
    return [check for check in CHECKS if LEVELS.index(check.level) <= up_to]


def known_ids(ids: Collection[str]) -> Collection[str]:
    """Return ``ids``. Raise a ValueError if no check has one of these ids."""
    known = [check.id for check in CHECKS]
    unknown = [ids] if isinstance(ids, str) else [id for id in ids if id not in known]
    if unknown:
        raise ValueError(f"no check has the id {', '.join(unknown)}; known ids: {', '.join(known)}")
    return ids
