"""D5: constructor arguments, pose inputs and columns."""

from __future__ import annotations

import enum
import inspect
import itertools
import math
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import torch

from mtenn_core._engine.columns import ANY, named_column
from mtenn_core._engine.declarations import (
    constructor_arguments,
    constructor_signature,
    declared_kinds,
)
from mtenn_core.combination import Combination
from mtenn_core.testing._checks.check import check
from mtenn_core.testing._checks.derivatives import compare_weights
from mtenn_core.testing._checks.numbers_of_columns import MORE_COLUMNS
from mtenn_core.testing._outcomes import Fail, Metrics, Skip
from mtenn_core.testing._probe.comparison import judge
from mtenn_core.testing._probe.poses import Poses
from mtenn_core.testing._probe.subject import Subject

# Each row is (poses, base, spread). An argument, pose input or column that has an effect changes
# the result at one of these rows.
EFFECTS = (
    (3, 0.0, 1.0),
    (3, 0.0, 0.05),
    (5, -8.0, 3.0),
    (9, 0.0, 30.0),
    (64, 0.0, 1.0),
    (3, 1e3, 10.0),
)


@check("D5", "every argument has an effect and a correct derivative")
def arguments(subject: Subject) -> Metrics:
    """Check the effect of each argument, pose input and column, and derivatives at each value."""
    tried: dict[str, bool] = {}
    n_columns = _check_columns(subject)
    for name, other in alternatives(subject):
        with_other = Subject(other, subject.seed, thorough=True)
        effect = _differs(subject, with_other)
        tried[name] = tried.get(name, False) or effect
        if effect:
            _check_derivative(with_other, subject)
            _check_columns(with_other, f", at other arguments ({with_other.original!r})")
    inputs = subject.combination.pose_inputs
    unused = [f"argument {name!r}" for name, effect in tried.items() if not effect]
    unused += [f"pose input {name!r}" for name in inputs if not _input_shows(subject, name)]
    if unused:
        raise Fail(
            f"{unused[0]} must change the value or the weights; found no change at any probe",
            cause="it is ignored, or overwritten by a constant" + _or_a_label(subject),
        )
    if not (tried or inputs or n_columns):
        raise Skip("it has no arguments for which the check can guess other values")
    return {"arguments": sorted([*tried, *inputs])}


def _check_columns(subject: Subject, where: str = "") -> int:
    """Check that each column of the predictions has an effect, and return their number.

    Zero stands for predictions of one number, or if no column has an effect. A parameter that
    starts at zero may hide a column, so the check also tries other parameters.
    """
    if subject.probes.columns is None:
        return 0
    if subject.combination.pose_columns == ANY:
        # A rule may ignore columns after those of the usual probes.
        subject = _again(subject, MORE_COLUMNS)
    n_columns = subject.probes.shape(1)[-1]
    hidden = [j for j in range(n_columns) if not _column_shows(subject, j)]
    if len(hidden) == n_columns:
        return 0
    if hidden and any(True for _ in subject.combination.parameters()):
        moved = _again(subject, n_columns)
        with torch.no_grad():
            for param in moved.combination.parameters():
                param.add_(0.1 * moved.probes.randn(*param.shape))
        hidden = [j for j in hidden if not _column_shows(moved, j)]
    if hidden:
        which = named_column(subject.probes.columns, hidden[0]).removeprefix(", ")
        raise Fail(
            f"{which} must change the value or the weights; found no change at any probe{where}",
            cause="the column is ignored: is the number of columns a constant in the code, or does"
            " a slice leave it out?",
        )
    return n_columns


def _again(subject: Subject, n_columns: int) -> Subject:
    return Subject(subject.original, subject.seed, thorough=True, n_columns=n_columns)


def _column_shows(subject: Subject, column: int) -> bool:
    """Return True if other numbers in a column change the value or the weights."""
    for n, base, spread in EFFECTS:
        poses, other = (subject.probes.poses(n, base, spread) for _ in range(2))
        changed = poses.at(poses.predictions.clone())
        changed.predictions[:, column] = other.predictions[:, column]
        if not _same_results(subject, poses, changed):
            return True
    return False


def _same_results(subject: Subject, poses: Poses, changed: Poses) -> bool:
    """Return True if the value and the weights do not differ between two sets of poses."""
    return all(torch.equal(f(poses), f(changed)) for f in (subject.value, subject.weights))


def _or_a_label(subject: Subject) -> str:
    """Return a hint if a pose input may be a label that the probes do not recognize, else ""."""
    if not subject.probes.real_inputs() or declared_kinds(subject.combination):
        return ""
    return ". If it counts only within groups of poses, declare the groups' pose input: 'label'"


def _input_shows(subject: Subject, name: str) -> bool:
    """Return True if other numbers for a pose input change the value or the weights."""
    for n, base, spread in EFFECTS:
        poses, other = (subject.probes.poses(n, base, spread) for _ in range(2))
        if not _same_results(subject, poses, poses.with_input(name, other.inputs[name])):
            return True
    return False


@check("D5q", "invalid numbers are refused as arguments", "quality")
def refused_arguments(subject: Subject) -> Metrics:
    """Pass NaN, and then 0, for each number. Fail if the value is then infinite or NaN."""
    given = constructor_arguments(subject.original, defaults=True)
    numbers = [name for name, value in given.items() if type(value) in (int, float)]
    if not numbers:
        raise Skip("it has no numbers as arguments")
    for name, bad in itertools.product(numbers, (math.nan, 0.0)):
        try:
            made = Subject(type(subject.original)(**{**given, name: bad}), subject.seed)
            value = made.value(made.probes.poses(3))
        except Exception:
            continue
        if not value.isfinite():
            raise Fail(
                f"{name}={bad} must be refused; found that it is accepted, and the value is"
                f" {value.item()}",
                cause="raise a ValueError in __init__ that names the argument and its valid values",
            )
    return {}


def _check_derivative(subject: Subject, before: Subject) -> None:
    """Check the weights of a combination after calls of ``before``, an instance that differs."""
    points = [
        subject.probes.poses(n, base, spread)
        for n, base, spread in ((3, 0.0, 1.0), (3, 0.0, 0.1), (3, 0.0, 1e-3), (5, 7.0, 0.01))
    ]
    for poses in points:
        if before.takes(poses):
            before.weights(poses)
    comparisons, cause = compare_weights(subject, points)
    if any(comparison.wrong for comparison in comparisons):
        where = f"at other arguments ({subject.original!r})"
        judge(comparisons, f"{where}: {cause}" if cause else f"it is wrong only {where}")


def alternatives(subject: Subject) -> Iterator[tuple[str, Combination]]:
    """Yield combinations that differ from the one under test in one argument.

    Their arguments are the ``examples`` of the class, and other values for each number, flag and
    choice. Arguments are left out if the class refuses them, or if they make the value infinite or
    NaN.
    """
    cls = type(subject.original)
    given = constructor_arguments(subject.original, defaults=True)
    try:
        parameters = constructor_signature(cls).parameters
    except (TypeError, ValueError):
        return
    for name, value in given.items():
        if name in parameters and parameters[name].kind is not inspect.Parameter.VAR_POSITIONAL:
            for other in _other_values(value, parameters[name].annotation):
                yield from _valid_instance(subject, name, cls, {**given, name: other})
    for example in cls.examples if isinstance(cls.examples, list | tuple) else ():
        for name in example:
            if not _same_argument(given.get(name), example[name]):
                yield from _valid_instance(subject, name, cls, {**given, **example})


def _same_argument(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except Exception:  # == of arrays raises
        return one is other


def _valid_instance(
    subject: Subject, name: str, cls: type[Combination], arguments: dict[str, Any]
) -> Iterator[tuple[str, Combination]]:
    try:
        made = cls(**arguments)
        probe = Subject(made, subject.seed)
        value = probe.value(probe.probes.poses(3))
        weights = probe.weights(probe.probes.poses(3))
    except Exception:  # the class may refuse the guessed value
        return
    if value.isfinite() and weights.isfinite().all():
        yield name, made


def _other_values(value: Any, annotation: Any) -> list[Any]:
    """Return some other values for an argument."""
    others: list[Any] = []
    if isinstance(value, bool):
        others = [not value]
    elif isinstance(value, enum.Enum):
        others = list(type(value))
    elif isinstance(value, int):
        others = [value + 1, value + 3, value - 1, 10 * value, 1, 2]
    elif isinstance(value, float):
        others = [2.5 * value, 0.3 * value, value + 0.4, 30 * value, 1.0 + value, 0.1, 1.0]
    elif get_origin(annotation) is Literal:
        others = list(get_args(annotation))
    return [other for other in others if other != value]


def _differs(subject: Subject, other: Subject) -> bool:
    """Return True if two combinations differ in value, weights, parameters or facts."""
    ours, theirs = subject.combination, other.combination
    if [(n, p.requires_grad) for n, p in ours.named_parameters()] != [
        (n, p.requires_grad) for n, p in theirs.named_parameters()
    ] or ours.state_dict().keys() != theirs.state_dict().keys():
        return True
    facts = ("min_poses", "domain", "smooth", "stochastic", "pose_inputs", "pose_columns")
    if any(getattr(ours, fact) != getattr(theirs, fact) for fact in facts):
        return True
    for n, base, spread in EFFECTS:
        poses = subject.probes.poses(
            max(subject.probes.n_poses(n), other.probes.n_poses(n)), base, spread
        )
        try:
            same = torch.equal(subject.value(poses), other.value(poses)) and torch.equal(
                subject.weights(poses), other.weights(poses)
            )
        except Exception:
            return True
        if not same:
            return True
    return not _same_after_calls(subject, other)


def _same_after_calls(subject: Subject, other: Subject) -> bool:
    """Return True if two combinations have the same buffers after the same calls."""
    one, two = subject.copy(torch.float64), other.copy(torch.float64)
    for _ in range(2):
        step = subject.probes.step(n_poses=max(subject.probes.n_poses(3), other.probes.n_poses(3)))
        subject.call(step, combination=one)
        subject.call(step, combination=two)
    buffers = zip(one.buffers(), two.buffers(), strict=True)
    return all(torch.equal(ours, theirs) for ours, theirs in buffers)
