"""Find the likely cause of a failure.

Each known mistake predicts certain wrong numbers. The likely cause is the first mistake that
predicts the numbers at all wrong points. If no mistake does, there is no likely cause.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mtenn_core.testing._probe.poses import Poses
from mtenn_core.testing._probe.training_step import Step

NOT_FINITE = (
    "a weight is not finite: does an exponential overflow (shift by the extreme first, as"
    " torch.softmax does), is it 0/0 or 0 · ln 0 where a weight underflows, or are there too few"
    " poses (declare min_poses)?"
)


@dataclass(frozen=True)
class Point:
    """The weights of one set of poses.

    Attributes
    ----------
    poses : the poses
    found, expected : weights from backward and from finite differences, both of shape (n_poses,).
        With columns, there are n_poses · n_columns of them
    tolerance : the largest error of a correct weight
    wrong : True if a weight is wrong
    """

    poses: Poses
    found: Tensor
    expected: Tensor
    tolerance: float
    wrong: bool

    @property
    def predictions(self) -> Tensor:
        return self.poses.predictions

    def fits(self, weights: Tensor | float) -> bool:
        """Return True if ``weights`` equal the weights that were found."""
        weights = torch.as_tensor(weights, dtype=self.found.dtype)
        slack = self.tolerance + 1e-5 * weights.abs().amax()
        return bool(((self.found - weights).abs() <= slack).all())

    def expects(self, weights: Tensor) -> bool:
        """Return True if ``weights`` equal the weights that were expected."""
        slack = self.tolerance + 1e-5 * self.expected.abs().amax()
        return bool(((weights - self.expected).abs() <= slack).all())

    @property
    def has_several_poses(self) -> bool:
        """True if there is more than one pose."""
        return len(self.found) > 1


def cause_in_weights(
    points: Sequence[Point], weights_at: Callable[[Poses], Tensor], scales: Mapping[str, float]
) -> str:
    """Return the likely mistake behind wrong pose weights, or "".

    Parameters
    ----------
    points : all probes with known weights, also those with correct weights
    weights_at : returns the combination's weights for any poses
    scales : numbers of the combination, by name. The author may have left out one of them as a
        factor, or used it twice
    """
    wrong = [point for point in points if point.wrong]
    if not wrong:
        return ""
    informative = [point for point in wrong if point.has_several_poses] or wrong
    what = (
        _first_fit(informative, _whole(scales))
        or _constant_factor(wrong, scales)
        or _elsewhere(informative, weights_at, scales)
        or _of_inputs(informative, weights_at)
        or _narrow(informative, weights_at)
        or _first_fit(informative, _distorted())
        or _structure(informative)
        or _of_another_point(wrong, points)
    )
    # Correct weights of a single pose, or of a tie, prove nothing.
    telling = [p for p in points if p.wrong or (p.has_several_poses and _spread(p))]
    where = _where(telling, "" if what else _BEYOND)
    return "; ".join(filter(None, [what, where])) or _sum(informative)


def _first_fit(points: Sequence[Point], known: Mapping[str, Callable[[Point], Tensor]]) -> str:
    for cause, weights in known.items():
        if all(point.fits(weights(point)) for point in points):
            return cause
    return ""


def _whole(scales: Mapping[str, float]) -> dict[str, Callable[[Point], Tensor]]:
    """Return mistakes that change all weights together."""
    known: dict[str, Callable[[Point], Tensor]] = {
        "the sign: every weight has the opposite sign": lambda p: -p.expected,
        "the weights are all zero: are the predictions detached?": lambda p: 0 * p.expected,
        "1/n_poses is missing": lambda p: len(p.expected) * p.expected,
        "the weights are divided by n_poses once too often": lambda p: p.expected / len(p.expected),
        "the weights use n_poses - 1, but the value uses n_poses": lambda p: (
            p.expected * len(p.expected) / max(len(p.expected) - 1, 1)
        ),
        "the weights are in reverse order of the poses": lambda p: p.expected.flip(0),
        "the weights are shifted by one pose (roll)": lambda p: p.expected.roll(1),
        "the weights are shifted back by one pose (roll)": lambda p: p.expected.roll(-1),
        "the weights are in the order of the sorted predictions: undo the sorting": lambda p: (
            p.expected[p.predictions.argsort()]
        ),
        "the weights are in the order of the predictions sorted from the highest: undo the"
        " sorting": lambda p: p.expected[p.predictions.argsort(descending=True)],
        "one-hot weights: those of a hard maximum": lambda p: _one_hot(p, p.predictions.argmax()),
        "one-hot weights: those of a hard minimum": lambda p: _one_hot(p, p.predictions.argmin()),
        "uniform weights: those of a mean": lambda p: torch.full_like(
            p.expected, 1 / len(p.expected)
        ),
        "uniform weights of 1: those of a sum": lambda p: torch.ones_like(p.expected),
    }
    for name, scale in scales.items():
        missing = f"the factor {name} is missing, or there is a division by it too much"
        known[missing] = partial(_times, 1 / scale)
        known[f"there is a factor {name} too much, or a division by it is missing"] = partial(
            _times, scale
        )
    return known


def _times(factor: float, point: Point) -> Tensor:
    return factor * point.expected


def _rounded(decimals: int, point: Point) -> Tensor:
    return torch.round(point.expected, decimals=decimals)


def _one_hot(point: Point, at: Tensor) -> Tensor:
    weights = torch.zeros_like(point.expected)
    weights[at] = 1
    return weights


def _constant_factor(points: Sequence[Point], scales: Mapping[str, float]) -> str:
    norms = [(point.found @ point.expected, point.expected @ point.expected) for point in points]
    found, expected = (float(sum(column)) for column in zip(*norms, strict=True))
    factor = found / expected if expected else math.nan
    if not all(point.fits(factor * point.expected) for point in points):
        return ""
    if factor < 0:
        return f"the sign and a constant factor: every weight is {factor:.6g} times the correct one"
    return f"a constant factor: every weight is {factor:.6g} times the correct one"


def _elsewhere(
    points: Sequence[Point], weights_at: Callable[[Poses], Tensor], scales: Mapping[str, float]
) -> str:
    """Return the likely cause if the weights are right for scaled predictions, or ""."""
    factors = {"-1": -1.0, "2": 2.0, "1/2": 0.5}
    for name, scale in scales.items():
        factors |= {name: scale, f"1/{name}": 1 / scale}
    for name, factor in factors.items():
        try:
            moved = [weights_at(p.poses.at(factor * p.predictions)) for p in points]
        except Exception:  # the predictions may be invalid
            continue
        matches = all(p.expects(w) for p, w in zip(points, moved, strict=True))
        if matches and name == "-1":
            return "the sign inside the exponential: the weights are right at -predictions"
        if matches:
            return (
                "the scale (temperature) of the weights differs from that of the value: the weights"
                f" are right at {name} · predictions"
            )
    return ""


def _of_inputs(points: Sequence[Point], weights_at: Callable[[Poses], Tensor]) -> str:
    """Return the likely mistake in the use of a pose input, or ""."""
    for name in points[0].poses.inputs:
        for how, change in _IN_AN_INPUT.items():
            others = [p.poses.with_input(name, change(p.poses.inputs[name])) for p in points]
            try:
                weights = [weights_at(poses) for poses in others]
            except Exception:  # a label may be no index any more
                continue
            if all(p.expects(w) for p, w in zip(points, weights, strict=True)):
                return f"the weights are right with {name!r} {how}"
            if all(p.fits(w) for p, w in zip(points, weights, strict=True)):
                return f"the weights do not depend on {name!r}, but the value does"
    return ""


def _narrow(points: Sequence[Point], weights_at: Callable[[Poses], Tensor]) -> str:
    """Return the likely cause if the weights lose digits of the predictions, or ""."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if all(_sees_only(dtype, point, weights_at) for point in points):
            return f"the predictions are cast to {dtype}: compute in their own dtype"
    return ""


def _sees_only(dtype: torch.dtype, point: Point, weights_at: Callable[[Poses], Tensor]) -> bool:
    """Return True if rounding to ``dtype`` changes no bit of the weights, but larger steps do."""
    y = point.predictions
    rounded = y.to(dtype).to(y.dtype)
    steps = 4 * torch.arange(1, len(y) + 1)  # of different sizes: a common shift changes little
    further = rounded + steps * torch.finfo(dtype).eps * y.abs()
    try:
        same, other = (weights_at(point.poses.at(moved)) for moved in (rounded, further))
    except Exception:  # the predictions may be invalid
        return False
    return torch.equal(same, point.found) and not torch.equal(other, point.found)


_IN_AN_INPUT: dict[str, Callable[[Tensor], Tensor]] = {
    "in reverse order": lambda numbers: numbers.flip(0),
    "shifted by one pose": lambda numbers: numbers.roll(1),
    "shifted back by one pose": lambda numbers: numbers.roll(-1),
    "of the opposite sign": lambda numbers: -numbers,
}


def _distorted() -> dict[str, Callable[[Point], Tensor]]:
    """Return mistakes that change each weight independently."""
    return {
        "the weights are replaced by their absolute values": lambda p: p.expected.abs(),
        "negative weights are set to zero (clamp, relu)": lambda p: p.expected.clamp(min=0),
        "weights are clamped to 0 … 1": lambda p: p.expected.clamp(0, 1),
        "the weights are squared": lambda p: p.expected.square(),
        "the weights are replaced by their square roots": lambda p: p.expected.abs().sqrt(),
        "the weights are normalised to a sum of 1, but the derivative has another sum": lambda p: (
            p.expected / p.expected.sum()
        ),
        "the weights are 1 - weight": lambda p: 1 - p.expected,
        "the weights are weight · (1 - weight): is a derivative applied twice?": lambda p: (
            p.expected * (1 - p.expected)
        ),
        "the weights are multiplied by the predictions": lambda p: p.expected * p.predictions,
        **{f"the weights are rounded to {n} decimals": partial(_rounded, n) for n in range(1, 7)},
    }


def _structure(points: Sequence[Point]) -> str:
    """Return the likely mistake from the pattern of the errors at all points, or ""."""
    several = [point for point in points if _shows_a_softmax(point)]
    if all((p.expected.abs() <= p.tolerance).all() for p in points):
        return "the value does not depend on the predictions here (clamped, saturated, detached)"
    if several and all(_is_softmax(p, p.found) and _is_softmax(p, p.expected) for p in several):
        ratios = torch.tensor([_slope(p, p.expected) / _slope(p, p.found) for p in several])
        scale = (
            f": the factor {ratios[0]:.4g} in the exponent is missing"
            if (ratios - ratios[0]).abs().amax() <= 1e-3 * ratios[0].abs()
            else ""
        )
        return f"the temperature of the weights differs from that of the value{scale}"
    if several and all(_is_softmax(p, p.found) for p in several):
        return (
            "the weights are only a softmax of the predictions, and a term is missing: the"
            " derivative of the populations (product rule), or that of a detached scale"
        )
    if all(p.fits(_projected(p)) for p in points):
        return "normalisation: the weights have the right proportions, but a wrong sum"
    if all(((d := p.found - p.expected) - d.mean()).abs().amax() <= p.tolerance for p in points):
        return "normalisation: all weights have the same error, so a term is missing or too much"
    at = [p.found[(p.found - p.expected).abs() > p.tolerance] for p in points]
    limits = torch.cat(at)
    if len(limits) > 1 and limits[0] and torch.allclose(limits, limits[:1].expand_as(limits)):
        return f"the weights are clamped at {limits[0]:.6g}"
    zeros = [(p.found == 0) & (p.expected.abs() > p.tolerance) for p in points]
    if all(zero.any() for zero in zeros):
        left_out = {int(i) for zero in zeros for i in zero.nonzero()}
        which = f"pose {left_out.pop()}" if len(left_out) == 1 else "some poses"
        return f"the weight of {which} is zero: masked, dropped or detached?"
    off = {tuple(((p.found - p.expected).abs() > p.tolerance).tolist()) for p in points}
    if len(off) == 1 and not all(only := next(iter(off))):
        wrong = ", ".join(str(i) for i, one in enumerate(only) if one)
        return f"only the weight of pose {wrong} is wrong, for all predictions"
    return ""


def _of_another_point(wrong: Sequence[Point], points: Sequence[Point]) -> str:
    for point in wrong:
        others = (p.expected for p in points if p is not point and len(p.found) == len(point.found))
        if not any(point.fits(expected) for expected in others):
            return ""
    return "the weights are those of other predictions: is there a cache, or state of a call?"


def _sum(points: Sequence[Point]) -> str:
    if all((p.found - p.expected).sum().abs() <= len(p.found) * p.tolerance for p in points):
        return "the sum of the weights is right, but single weights are wrong"
    return ""


def _projected(point: Point) -> Tensor:
    norm = point.expected @ point.expected
    return point.expected * (point.found @ point.expected) / norm if norm else point.expected


# Smaller weights are not compared with a softmax: finite differences have no digits left for them.
_LARGE = 1e-3


def _shows_a_softmax(point: Point) -> bool:
    """Return True if enough weights are large to tell a softmax from other weights."""
    return all(int((w.abs() > _LARGE).sum()) > 2 for w in (point.found, point.expected))


def _is_softmax(point: Point, weights: Tensor) -> bool:
    """Return True if the weights sum to 1 and their logarithms are linear in the predictions."""
    if (weights < -point.tolerance).any() or abs(weights.sum() - 1) > 1e-6:
        return False
    x, y = _logarithms(point, weights)
    slope = _slope(point, weights)
    return bool((y - slope * x).abs().amax() <= 1e-4 * (1 + y.abs().amax()) and abs(slope) > 1e-3)


def _slope(point: Point, weights: Tensor) -> float:
    """Return the slope of the logarithms of large weights over the predictions, or 0."""
    x, y = _logarithms(point, weights)
    variance = float(x @ x)
    return float(x @ y) / variance if variance else 0.0


def _logarithms(point: Point, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the predictions and the logarithms of large weights, both with a mean of zero."""
    large = weights > _LARGE
    x, y = point.predictions[large], weights[large].log()
    return x - x.mean(), y - y.mean()


_BEYOND = ": is there a cast to float32, or an exponential without a shift by the extreme?"


def _where(points: Sequence[Point], beyond: str) -> str:
    """Return a property that all wrong points have and no right point has, or "".

    Parameters
    ----------
    beyond : is added if only large predictions are wrong
    """
    right, wrong = [p for p in points if not p.wrong], [p for p in points if p.wrong]
    if not right:
        return ""
    if all(map(_underflows, wrong)) and not any(map(_underflows, right)):
        return "wrong only where a weight underflows to 0"
    for words, value in (
        ("n_poses", lambda p: float(len(p.predictions))),
        ("the largest |prediction|", lambda p: float(p.predictions.abs().amax())),
        ("the spread of the predictions", _spread),
        ("the highest prediction", lambda p: float(p.predictions.amax())),
        ("the lowest prediction", lambda p: float(p.predictions.amin())),
    ):
        ours, theirs = [value(p) for p in wrong], [value(p) for p in right]
        if min(ours) > max(theirs):
            hint = beyond if "|" in words and min(ours) > 1e3 else ""
            return f"wrong only where {words} is above {max(theirs):.3g}{hint}"
        if max(ours) < min(theirs):
            return f"wrong only where {words} is below {min(theirs):.3g}"
    ns, others = {len(p.predictions) for p in wrong}, {len(p.predictions) for p in right}
    if not ns & others:
        return f"wrong only for {_listed(ns)} poses, right for {_listed(others)}"
    if all(_ascending(p) for p in right) and not any(_ascending(p) for p in wrong):
        return "right only where the predictions ascend: does the code assume that they are sorted?"
    return ""


def _underflows(point: Point) -> bool:
    return bool((point.found.abs() < torch.finfo(point.found.dtype).tiny).any())


def _spread(point: Point) -> float:
    return float(point.predictions.amax() - point.predictions.amin())


def _ascending(point: Point) -> bool:
    return bool((point.predictions.diff() >= 0).all())


def _listed(numbers: set[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))


def cause_in_chain_rule(step: Step, name: str, go: float, found: Tensor, weights: Tensor) -> str:
    """Return the likely mistake behind a gradient that is not go · Σ_i w_i g_i, or "".

    Parameters
    ----------
    name : name of the parameter
    go : gradient of the loss
    found : gradient of the parameter
    weights : shape (n_poses,), from backward with a loss gradient of 1
    """
    if not found.isfinite().all():
        return "the gradient is not finite: is there a division by a number that can be zero?"
    expected = go * torch.tensordot(weights, step.gradients[name], dims=1)
    if _close(found, expected):
        return "seven digits are right: is a part computed in float32?"
    for cause, candidate in _candidates(step, name, go, weights):
        if _close(found, candidate):
            return cause
    return ""


def _close(found: Tensor, candidate: Tensor) -> bool:
    return found.shape == candidate.shape and torch.allclose(found, candidate, rtol=1e-6, atol=0)


def _candidates(step: Step, name: str, go: float, w: Tensor) -> Iterator[tuple[str, Tensor]]:
    gradients = step.gradients[name]
    total = torch.tensordot(w, gradients, dims=1)
    changed = "grad_output is changed"
    yield "grad_output is ignored: multiply the gradients by it", total
    yield f"{changed}: its absolute value is used", abs(go) * total
    yield f"{changed}: its square is used", go * go * total
    if abs(go) > 1:
        yield (
            f"{changed}: it is clamped to ±1, or only its sign is used",
            math.copysign(1, go) * total,
        )
    yield f"{changed}: only its sign is used", math.copysign(1, go) * total
    yield f"{changed}: it is clamped", min(max(go, -1.0), 1.0) * total
    yield f"{changed}: it has the opposite sign", -go * total
    for limit in (10.0, 100.0):
        yield f"{changed}: it is clamped", min(max(go, -limit), limit) * total
    yield f"{changed}: negative numbers are set to zero", max(go, 0.0) * total
    for other, theirs in step.gradients.items():
        if other != name:
            yield (
                (
                    f"it is the gradient of {other!r}: use the order of param_names, and compare"
                    " whole names"
                ),
                go * torch.tensordot(w, theirs, dims=1),
            )
    if total.dim() == 2:
        yield "the gradient is transposed", go * total.T
    yield "the sum over poses has no weights", go * gradients.sum(0)
    yield "the gradient is a mean over poses, without weights", go * gradients.mean(0)
    yield (
        "the gradients of the poses are in reverse order",
        go * torch.tensordot(w.flip(0), gradients, 1),
    )
    size = float(total.norm())
    yield "the combined gradient is clipped to norm 1", go * total / max(1.0, abs(go) * size)
    yield f"{changed}: it is added instead of multiplied", go + total
    for limit in (0.1, 0.5, 1.0):
        clipped = torch.tensordot(w, gradients.clamp(-limit, limit), dims=1)
        yield "the gradients of the poses are clipped", go * clipped
        yield "the gradient is clipped", (go * total).clamp(-limit, limit)
    norms = gradients.flatten(1).norm(dim=1) if gradients.dim() > 1 else gradients.abs()
    shrunk = w / norms.clamp(min=1)
    yield (
        "the gradients of the poses are clipped to norm 1",
        go * torch.tensordot(shrunk, gradients, 1),
    )
    yield (
        "the absolute values of the gradients are used",
        go * torch.tensordot(w, gradients.abs(), dims=1),
    )
    yield "the gradient is zero for this parameter", 0 * total
    for i, (weight, gradient) in enumerate(zip(w, gradients, strict=True)):
        yield (
            f"pose {i} is left out of the sum (zip, slice or mask)",
            go * (total - weight * gradient),
        )
        yield f"only pose {i} is used", go * weight * gradient
    for i, j in itertools.permutations(range(min(len(w), 4)), 2):
        swapped = w.clone()
        swapped[i] = w[j]
        yield f"pose {i} has the weight of pose {j}", go * torch.tensordot(swapped, gradients, 1)
    yield "the gradient is divided by n_poses once too often", go * total / len(w)
    yield "the gradient is n_poses times too large", go * total * len(w)
