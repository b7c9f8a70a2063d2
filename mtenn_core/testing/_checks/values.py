"""D, the values: what derivatives cannot tell, since a wrong value has a derivative, too."""

from __future__ import annotations

import enum
import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args, get_origin

import torch
from torch import Tensor

from mtenn_core.combination import (
    Combination,
    constructor_arguments,
    constructor_signature,
    overrides,
)
from mtenn_core.testing._checks.check import Fail, Metrics, Skip, check
from mtenn_core.testing._checks.derivatives import compare_weights
from mtenn_core.testing._probe.comparison import FLOAT32, compare, judge, ratio
from mtenn_core.testing._probe.finite_differences import Estimate, resolution
from mtenn_core.testing._probe.poses import Poses, listed
from mtenn_core.testing._probe.subject import Step, Subject, gradients_of

# Two statements of one value round differently, the more so where one is scaled up.
VALUE_DIGITS = 1e-10
# (poses, base, spread); of many poses, some have nearly the same prediction
LOW_PRECISION_PROBES = (
    (4, 0.0, 1.0),
    (4, -8.0, 2.0),
    (30, -8.0, 1.0),
    (4, -80.0, 4.0),
    (4, -300.0, 4.0),
)
SPREADS = ((0.0, 1.0), (0.0, 0.01), (-8.0, 2.0), (7.0, 1.5), (100.0, 10.0))
# (poses, base, spread): where an argument or a pose input that does anything shows
EFFECTS = (
    (3, 0.0, 1.0),
    (3, 0.0, 0.05),
    (5, -8.0, 3.0),
    (9, 0.0, 30.0),
    (64, 0.0, 1.0),
    (3, 1e3, 10.0),
)

Statement = Callable[[Poses], Tensor]


@check("D1", "the value is that of its reference")
def reference(subject: Subject) -> Metrics:
    """The declared reference, and ``combine`` beside a ``forward``: the values and derivatives."""
    combination = subject.combination
    statements: dict[str, Statement] = {}
    if overrides(type(combination), "reference"):
        statements["reference"] = lambda p: combination.reference(p.predictions, **p.handed())
    if subject.full_depth and overrides(type(combination), "combine"):
        statements["combine"] = lambda p: combination.combine(p.predictions, **p.handed())
    if not statements:
        raise Skip("it declares no reference")
    worst = 0.0
    for n in (1, 2, 3, 4, 9):
        for base, spread in SPREADS:
            poses = subject.poses(subject.n_poses(n), base, spread)
            for what, statement in statements.items():
                worst = max(worst, _hold_to(subject, what, statement, poses))
    return {"largest error in tolerances": worst}


def _hold_to(subject: Subject, what: str, statement: Statement, poses: Poses) -> float:
    with subject.forgetting(), torch.enable_grad():
        leaf = poses.predictions.clone().requires_grad_()
        expected = statement(poses.at(leaf))
        found = subject.value(poses)
        off = _off(subject, found, expected.detach(), poses, statement)
        if off > 1:
            raise Fail(
                f"{poses}\n"
                f"    your value         {found.item():.12g}\n"
                f"    {what:<18} {expected.item():.12g}",
                cause=_value_cause(found, expected.detach(), poses.predictions),
            )
        if not expected.requires_grad:
            return off
        (gradient,) = torch.autograd.grad(expected, leaf, materialize_grads=True)
    if gradient.isfinite().all():
        # Its own rounding is that of the value it was compared with.
        exact = Estimate(gradient, 1e-9 * gradient.abs().amax().expand(len(poses)))
        axes = torch.eye(len(poses), dtype=gradient.dtype)
        weights_at = poses.fixed(subject.weights)
        comparisons = compare(weights_at, exact, axes, poses.predictions, "pose", poses.inputs)
        comparisons = [replace(each, against=f"that of {what}") for each in comparisons]
        judge(comparisons, f"the weights are not those of the {what}")
    return off


def _off(
    subject: Subject,
    found: Tensor,
    expected: Tensor,
    poses: Poses,
    statement: Statement | None = None,
) -> float:
    """Return the difference of two values in tolerances; 0 if both are no number."""
    if found.isnan() and expected.isnan():
        return 0.0
    y, value_at = poses.predictions, poses.fixed(subject.value)
    size = max(float(y.abs().amax()), abs(float(expected)))
    tolerance = VALUE_DIGITS * size
    difference = abs(float(found) - float(expected))
    if not difference <= tolerance:  # it may compute in less than float64
        eps = resolution(torch.stack([value_at(y + k) for k in (0.0, 0.125, 0.25)]))
        tolerance = max(VALUE_DIGITS, 64 * len(y) * eps) * size
    if not difference <= tolerance:  # what cancels inside of either shows around y
        each = [value_at, *([poses.fixed(statement)] if statement else [])]
        tolerance += 8 * sum(_scatter(function, y) for function in each)
    return ratio(difference, tolerance)


def _scatter(function: Callable[[Tensor], Tensor], y: Tensor) -> float:
    """Return how far from a straight line a value is where ``y`` hardly moves: its roundoff."""
    near = torch.stack([function(y * (1 + k * 2.0**-33)).detach() for k in range(9)])
    return float(near.diff().diff().abs().amax().nan_to_num(0.0))


def _value_cause(found: Tensor, expected: Tensor, y: Tensor) -> str:
    n, difference = len(y), float(found - expected)
    known = {
        "the sign": float(-2 * expected),
        "ln(n_poses) too much (sum where there should be a mean)": math.log(n),
        "ln(n_poses) too little (mean where there should be a sum)": -math.log(n),
        "n_poses times too large": float((n - 1) * expected),
        "divided by n_poses": float((1 / n - 1) * expected),
    }
    for cause, offset in known.items():
        if offset and math.isclose(difference, offset, rel_tol=1e-6):
            return cause
    for word, extreme in (("highest", y.amax()), ("lowest", y.amin()), ("mean", y.mean())):
        if math.isclose(float(found), float(extreme), rel_tol=1e-9):
            return f"the value is the {word} prediction"
    return "the value itself: its derivative may well be that of the wrong value"


# What a combination may claim in `properties`, and what is wrong if it does not hold.
Property = Callable[[Subject, Poses], tuple[Tensor, Tensor]]


def _permuted(subject: Subject, poses: Poses) -> tuple[Tensor, Tensor]:
    return subject.value(poses[subject.permutation(len(poses))]), subject.value(poses)


def _translated(subject: Subject, poses: Poses) -> tuple[Tensor, Tensor]:
    y = poses.predictions
    by = min(2.0, subject.first_step(y)) if subject.bounded else 2.5
    return subject.value(poses.at(y + by)), subject.value(poses) + by


def _within(subject: Subject, poses: Poses) -> tuple[Tensor, Tensor]:
    value = subject.value(poses)
    return value, value.clamp(poses.predictions.amin(), poses.predictions.amax())


def _increasing(subject: Subject, poses: Poses) -> tuple[Tensor, Tensor]:
    weights = subject.weights(poses)
    return weights.amin(), weights.amin().clamp(min=0)


def _of_equal_poses(subject: Subject, poses: Poses) -> tuple[Tensor, Tensor]:
    return subject.value(poses.tied()), poses.predictions[0]


def _replicated(subject: Subject, poses: Poses) -> tuple[Tensor, Tensor]:
    return subject.value(poses[2 * [*range(len(poses))]]), subject.value(poses)


def _without_nan(subject: Subject, poses: Poses) -> tuple[Tensor, Tensor]:
    more = poses[[*range(len(poses)), 0]]
    more.predictions[-1] = math.nan
    return subject.value(more), subject.value(poses)


PROPERTIES: dict[str, tuple[Property, str]] = {
    "permutation_invariant": (_permuted, "the order of the poses changes the value"),
    "translation_equivariant": (
        _translated,
        "h(y + c) = h(y) + c does not hold: do the weights sum to 1?",
    ),
    "bounded": (_within, "the value leaves the range of the predictions"),
    "monotone": (_increasing, "a weight is negative: a prediction that rises lowers the value"),
    "idempotent": (_of_equal_poses, "equal poses do not give their own value: normalisation?"),
    "replication_invariant": (
        _replicated,
        "every pose twice gives another value: sum where there should be a mean?",
    ),
    "ignores_nan": (_without_nan, "a pose that is NaN is not as if it were not there"),
}


@check("D2", "the declared properties hold")
def properties(subject: Subject) -> Metrics:
    """Each name in ``properties``, for several numbers, sizes and spreads of predictions."""
    declared = sorted(subject.combination.properties)
    unknown = [name for name in declared if name not in PROPERTIES]
    if unknown:
        raise Fail(
            f"unknown properties {unknown}; those that can be tested: {', '.join(PROPERTIES)}",
        )
    if not declared:
        raise Skip("it declares no properties")
    worst = 0.0
    for name in declared:
        sides, cause = PROPERTIES[name]
        for n in (2, 3, 7, 20):
            for base, spread in SPREADS:
                poses = subject.poses(subject.n_poses(n), base, spread)
                worst = max(worst, _hold_property(subject, name, sides, cause, poses))
    return {"largest error in tolerances": worst}


def _hold_property(subject: Subject, name: str, sides: Property, cause: str, poses: Poses) -> float:
    pair = sides(subject, poses)
    off = _off(subject, pair[0], pair[1], poses)
    if off > 1:
        raise Fail(
            f"{name}: {poses}\n"
            f"    found              {pair[0].item():.12g}\n"
            f"    expected           {pair[1].item():.12g}",
            cause=cause,
        )
    return off


@check("D3", "extreme predictions are survived")
def extremes(subject: Subject) -> Metrics:
    """Finite at 1e4 and for ties; NaN for NaN."""
    n = subject.n_poses(3)
    cases = {
        "predictions near 1e4": subject.poses(n, 1e4, 1.0),
        "predictions near -1e4": subject.poses(n, -1e4, 1.0),
        "predictions from -1e4 to 1e4": subject.poses(n, 0.0, 1e4),
    }
    if subject.combination.smooth:
        poses = subject.poses(n)
        cases["equal predictions"] = poses.tied()
        cases["the same pose twice"] = poses[[0, *range(n - 1)]]
    for what, poses in cases.items():
        value, weights = subject.value(poses), subject.weights(poses)
        if not (value.isfinite() and weights.isfinite().all()):
            raise Fail(
                f"{what}, {poses}: expected finite numbers; found the value {value.item():g}"
                f" and the weights [{listed(weights)}]",
                cause=_infinite_cause(what, value),
            )
    poses = subject.poses(n)
    for turn in range(n):  # so that the best pose stands in each place
        _nan_shows(subject, poses.map(partial(torch.roll, shifts=turn)))
    return {}


def _infinite_cause(what: str, value: Tensor) -> str:
    if "1e4" in what:
        return (
            "exp() of a large number, or its logarithm: shift by the extreme first, as"
            " torch.logsumexp and torch.softmax do; or declare the `domain`"
        )
    if value.isfinite():
        return "the derivative at ties is 0/0 or a square root at 0: declare smooth = False"
    return "a division by the spread of the predictions, which is 0 for ties"


def _nan_shows(subject: Subject, poses: Poses) -> None:
    """NaN among the predictions must be NaN in the value, or else selected away as any other."""
    if "ignores_nan" in subject.combination.properties:
        return
    values = []
    for pose in range(len(poses)):
        broken = poses.at(poses.predictions.clone())
        broken.predictions[pose] = math.nan
        values.append((pose, broken, subject.value(broken)))
    # Where the value does not depend on a pose, NaN cannot show.
    counts = subject.weights(poses) != 0
    unseen = [each for each in values if not each[2].isnan() and counts[each[0]]]
    # The best k may leave a pose out, as long as NaN is the worst in whatever place it stands.
    selects = not (subject.combination.smooth or any(value.isnan() for *_, value in values))
    for pose, broken, value in unseen:
        if selects and _passed_over(subject, broken, value):
            continue
        raise Fail(
            f"pose {pose} of {len(poses)} is NaN: expected the value NaN; found {value.item():g}",
            cause="NaN is replaced or skipped (nan_to_num, nansum, a comparison): a broken pose"
            " would go unseen; where that is meant, declare properties = {'ignores_nan'}",
        )


def _passed_over(subject: Subject, broken: Poses, value: Tensor) -> bool:
    """Whether the value is that with the lowest or the highest number in the place of NaN."""
    low, high = subject.combination.domain
    ends = (low + 1e-3 if low > -1e4 else -1e4, high - 1e-3 if high < 1e4 else 1e4)
    instead = [broken.at(broken.predictions.nan_to_num(end)) for end in ends]
    return any(torch.equal(value, subject.value(poses)) for poses in instead)


@check("D4", "low precision keeps its dtype, and float32 inside")
def low_precision(subject: Subject) -> Metrics:
    """float32, bfloat16 and float16, against float64 on the same rounded predictions."""
    worst = 0.0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for n, base, spread in LOW_PRECISION_PROBES:
            if base < -256 and dtype != torch.float16:
                continue  # where float16 overflows in a square
            poses = _in_domain(subject, subject.poses(subject.n_poses(n), base, spread), dtype)
            # Rounding makes ties, at which a value with kinks has several derivatives.
            if subject.combination.smooth or len(poses.predictions.unique()) == len(poses):
                step = subject.step(n_poses=len(poses))
                worst = max(worst, _hold_precision(subject, step, poses))
        if dtype == torch.float32 or not subject.combination.smooth:
            continue
        # Many small terms of one sign: a sum in half precision stops growing.
        step = subject.step({"w": (4,)}, 1000)
        step.gradients["w"].abs_()
        poses = _in_domain(subject, subject.poses(len(step.poses), -9.0, 0.0), dtype)
        worst = max(worst, _hold_precision(subject, step, poses))
    return {"largest error in tolerances": worst}


def _in_domain(subject: Subject, poses: Poses, dtype: torch.dtype) -> Poses:
    """Return poses in another dtype, without predictions that rounding moves out of the domain."""
    low, high = subject.combination.domain
    poses = poses.map(lambda numbers: numbers.to(dtype))
    y = poses.predictions
    inside = (y > low) & (y < high) & y.isfinite()
    return poses.at(torch.where(inside, y, subject.predictions(1).to(dtype)))


def _hold_precision(subject: Subject, step: Step, poses: Poses) -> float:
    dtype = poses.predictions.dtype
    narrow = replace(step.to(dtype), poses=poses)
    wide = narrow.to(torch.float64)
    value = subject.call(narrow, combination=subject.copy(), **_views(narrow))
    if value.dtype != dtype:
        raise Fail(
            f"predictions in {dtype}: expected the value in that dtype; found {value.dtype}",
            cause="cast the result back: value.to(predictions.dtype)",
        )
    if subject.combination.stochastic:  # the random numbers are others in another dtype
        return 0.0
    off = _hold_value(subject, value, wide.poses)
    # A derivative of float32 arithmetic is as exact as its size elsewhere: tanh' is 1 - tanh².
    usual = float(subject.weights(subject.poses(subject.n_poses(4))).abs().amax())
    expected = subject.gradients(wide, **_views(wide))
    weights = subject.weights(wide.poses)
    digits = 2048 if dtype == torch.float32 else 16
    slack = digits * torch.finfo(dtype).eps * weights.abs() + 8 * FLOAT32 * usual
    limits = torch.finfo(dtype)
    moved = None
    for name, gradient in gradients_of(value, narrow.params).items():
        sizes = wide.gradients[name].abs()
        tolerance = limits.tiny + torch.tensordot(slack, sizes, dims=1)
        error = (gradient.double() - expected[name]).abs()
        most = weights.abs().clamp(min=usual)
        beyond = torch.tensordot(most, sizes + 1, dims=1) > limits.max / 2
        allowed = beyond | ~expected[name].isfinite()
        if not ((error <= tolerance) | allowed).all():  # it may be stiff here
            if moved is None:
                moved = 8 * _moved(subject.weights, wide.poses, weights)
            tolerance = limits.tiny + torch.tensordot(slack + moved, sizes, dims=1)
        if not ((error <= tolerance) | allowed).all():
            at = int((error - tolerance).nan_to_num(math.inf).argmax())
            raise Fail(
                f"{poses} in {dtype}, parameter {name!r}, entry {at}\n"
                f"    your backward      {gradient.flatten()[at].item():.8g}\n"
                f"    in float64         {expected[name].flatten()[at].item():.8g}"
                f" ± {tolerance.flatten()[at].item():.1e}",
                cause=_LOW_PRECISION,
            )
    return off


def _views(step: Step) -> dict[str, Any]:
    """Return predictions and gradients as views of one buffer each, which is quick for many."""
    gradients = {name: list(each.clone()) for name, each in step.gradients.items()}
    return {"pred_list": list(step.poses.predictions.clone()), "grad_dict": gradients}


def _hold_value(subject: Subject, value: Tensor, poses: Poses) -> float:
    """Return the error of a value in low precision, in tolerances."""
    expected = subject.value(poses)
    size = max(float(poses.predictions.abs().amax()), abs(float(expected)))
    moved = float(_moved(subject.value, poses, expected))
    limits = torch.finfo(value.dtype)
    if abs(float(expected)) > limits.max / 2:
        return 0.0
    # Half precision is rounded once, at the end; float32 may be rounded at each step.
    digits = 256 if value.dtype == torch.float32 else 4
    tolerance = digits * limits.eps * size + 8 * moved
    off = ratio(abs(float(value) - float(expected)), tolerance)
    if not off <= 1:
        raise Fail(
            f"{poses} in {value.dtype}\n"
            f"    your value         {value.item():.8g}\n"
            f"    in float64         {expected.item():.8g} ± {tolerance:.1e}",
            cause=_LOW_PRECISION,
        )
    return off


def _moved(function: Callable[[Poses], Tensor], poses: Poses, at: Tensor) -> Tensor:
    """Return how much a result changes where its numbers move by a last digit of float32."""

    def nearby(numbers: Tensor, sign: int) -> Tensor:
        by = sign * torch.finfo(torch.float32).eps * numbers.abs()
        odd = torch.arange(len(numbers)) % 2 == 1
        return numbers + torch.where(odd, by, -by)

    near = [poses.map(partial(nearby, sign=sign)) for sign in (-1, 1)]
    return torch.stack([(function(each) - at).abs() for each in near]).amax(0)


_LOW_PRECISION = (
    "the arithmetic is in the dtype of the predictions: compute in float32 at least, and shift by"
    " the extreme before scaling (t·y alone loses the digits, and overflows float16)"
)


@check("D5", "every argument does something, and right")
def arguments(subject: Subject) -> Metrics:
    """Each argument and pose input changes the output; the derivative is right off defaults."""
    tried: dict[str, bool] = {}
    for name, other in alternatives(subject):
        with_other = Subject(other, subject.seed, thorough=True)
        effect = _differs(subject, with_other)
        tried[name] = tried.get(name, False) or effect
        if effect:
            _hold_derivative(with_other, subject)
    inputs = subject.combination.pose_inputs
    unused = [f"argument {name!r}" for name, effect in tried.items() if not effect]
    unused += [f"pose input {name!r}" for name in inputs if not _input_shows(subject, name)]
    if unused:
        raise Fail(
            f"{unused[0]} changes neither value nor weights at any probe",
            cause="it is ignored, or overwritten by a constant",
        )
    if not (tried or inputs):
        raise Skip("it takes no arguments of which others can be guessed")
    return {"arguments": sorted([*tried, *inputs])}


def _input_shows(subject: Subject, name: str) -> bool:
    """Whether other numbers for a pose input change the value, or the weights."""
    for n, base, spread in EFFECTS:
        poses, other = (subject.poses(subject.n_poses(n), base, spread) for _ in range(2))
        changed = poses.with_input(name, other.inputs[name])
        if not all(torch.equal(f(poses), f(changed)) for f in (subject.value, subject.weights)):
            return True
    return False


@check("D5q", "arguments that are no number are refused", "quality")
def refused_arguments(subject: Subject) -> Metrics:
    """NaN for each number, and 0 where the value is then none."""
    given = constructor_arguments(subject.original, defaults=True)
    numbers = [name for name, value in given.items() if type(value) in (int, float)]
    if not numbers:
        raise Skip("it takes no numbers")
    for name, bad in itertools.product(numbers, (math.nan, 0.0)):
        try:
            made = Subject(type(subject.original)(**{**given, name: bad}), subject.seed)
            value = made.value(made.poses(made.n_poses(3)))
        except Exception:
            continue
        if not value.isfinite():
            raise Fail(
                f"{name}={bad} is accepted, and the value is {value.item()}",
                cause="raise a ValueError in __init__ that names the argument and what it may be",
            )
    return {}


def _hold_derivative(subject: Subject, before: Subject) -> None:
    """Hold a combination to its derivative where another instance was called before it."""
    points = [
        subject.poses(subject.n_poses(n), base, spread)
        for n, base, spread in ((3, 0.0, 1.0), (3, 0.0, 0.1), (3, 0.0, 1e-3), (5, 7.0, 0.01))
    ]
    for poses in points:
        if before.takes(poses):
            before.weights(poses)
    comparisons, cause = compare_weights(subject, points)
    if any(comparison.wrong for comparison in comparisons):
        where = f"at other arguments ({subject.original!r})"
        judge(comparisons, f"{where}: {cause}" if cause else f"it shows {where} alone")


def alternatives(subject: Subject) -> Iterator[tuple[str, Combination]]:
    """Yield combinations that differ from the one under test in one argument.

    The ``examples`` of the class, and others for each number, flag and choice; those that the class
    refuses are left out, and so are those whose value is no number.
    """
    cls = type(subject.original)
    given = constructor_arguments(subject.original, defaults=True)
    try:
        parameters = constructor_signature(cls).parameters
    except (TypeError, ValueError):
        return
    for name, value in given.items():
        if name in parameters and parameters[name].kind is not inspect.Parameter.VAR_POSITIONAL:
            for other in _others(value, parameters[name].annotation):
                yield from _made(subject, name, cls, {**given, name: other})
    for example in cls.examples if isinstance(cls.examples, list | tuple) else ():
        for name in example:
            if not _equal(given.get(name), example[name]):
                yield from _made(subject, name, cls, {**given, **example})


def _equal(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except Exception:  # arrays
        return one is other


def _made(
    subject: Subject, name: str, cls: type[Combination], arguments: dict[str, Any]
) -> Iterator[tuple[str, Combination]]:
    try:
        made = cls(**arguments)
        probe = Subject(made, subject.seed)
        value = probe.value(probe.poses(probe.n_poses(3)))
        weights = probe.weights(probe.poses(probe.n_poses(3)))
    except Exception:  # a guess need not be allowed
        return
    if value.isfinite() and weights.isfinite().all():
        yield name, made


def _others(value: Any, annotation: Any) -> list[Any]:
    """Return other values for an argument."""
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
    """Whether an argument shows, in value, weights, parameters or facts."""
    ours, theirs = subject.combination, other.combination
    if [(n, p.requires_grad) for n, p in ours.named_parameters()] != [
        (n, p.requires_grad) for n, p in theirs.named_parameters()
    ] or ours.state_dict().keys() != theirs.state_dict().keys():
        return True
    facts = ("min_poses", "domain", "smooth", "stochastic", "pose_inputs")
    if any(getattr(ours, fact) != getattr(theirs, fact) for fact in facts):
        return True
    for n, base, spread in EFFECTS:
        poses = subject.poses(max(subject.n_poses(n), other.n_poses(n)), base, spread)
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
    """Whether two combinations are left with the same buffers by the same calls."""
    one, two = subject.copy(torch.float64), other.copy(torch.float64)
    for _ in range(2):
        step = subject.step(n_poses=max(subject.n_poses(3), other.n_poses(3)))
        subject.call(step, combination=one)
        subject.call(step, combination=two)
    buffers = zip(one.buffers(), two.buffers(), strict=True)
    return all(torch.equal(ours, theirs) for ours, theirs in buffers)
