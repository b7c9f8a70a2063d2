"""The likely cause of a failure.

Each known mistake predicts certain wrong numbers. The first mistake whose numbers fit at every
wrong point is named. If none fits, there is no likely cause.
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
    "a weight is not finite: an exponential overflows (shift by the extreme first, as torch.softmax"
    " does), 0/0, or too few poses (declare min_poses)"
)


@dataclass(frozen=True)
class Point:
    """The weights of some poses.

    Attributes
    ----------
    poses : what they were probed with
    found, expected : shape (n_poses,); ``expected`` by finite differences
    tolerance : within which a weight is right
    wrong : whether one is not
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
        """Whether the weights found are these instead."""
        weights = torch.as_tensor(weights, dtype=self.found.dtype)
        slack = self.tolerance + 1e-5 * weights.abs().amax()
        return bool(((self.found - weights).abs() <= slack).all())

    def expects(self, weights: Tensor) -> bool:
        """Whether these weights would be right."""
        slack = self.tolerance + 1e-5 * self.expected.abs().amax()
        return bool(((weights - self.expected).abs() <= slack).all())

    @property
    def has_several_poses(self) -> bool:
        """Whether the weights can differ between poses."""
        return len(self.found) > 1


def cause_in_weights(
    points: Sequence[Point], weights_at: Callable[[Poses], Tensor], scales: Mapping[str, float]
) -> str:
    """Return the likely mistake behind wrong pose weights, or "".

    Parameters
    ----------
    points : probes at which every weight is known, right ones too
    weights_at : the combination's weights of any poses
    scales : numbers that may have been forgotten or doubled, by name
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
        or _first_fit(informative, _distorted())
        or _structure(informative)
        or _of_another_point(wrong, points)
    )
    # Where one pose, or a tie, says nothing, it says nothing of what is right either.
    where = _where([p for p in points if p.wrong or (p.has_several_poses and _spread(p))])
    return "; ".join(filter(None, [what, where])) or _sum(informative)


def _first_fit(points: Sequence[Point], known: Mapping[str, Callable[[Point], Tensor]]) -> str:
    for cause, weights in known.items():
        if all(point.fits(weights(point)) for point in points):
            return cause
    return ""


def _whole(scales: Mapping[str, float]) -> dict[str, Callable[[Point], Tensor]]:
    """Return mistakes in the weights as a whole."""
    known: dict[str, Callable[[Point], Tensor]] = {
        "the sign: every weight has the opposite one": lambda p: -p.expected,
        "the weights are all zero: are the predictions detached?": lambda p: 0 * p.expected,
        "1/n_poses is missing": lambda p: len(p.expected) * p.expected,
        "a division by n_poses too much": lambda p: p.expected / len(p.expected),
        "n_poses - 1 where the value has n_poses": lambda p: (
            p.expected * len(p.expected) / max(len(p.expected) - 1, 1)
        ),
        "the weights are in reverse order of the poses": lambda p: p.expected.flip(0),
        "the weights are shifted by one pose (roll)": lambda p: p.expected.roll(1),
        "the weights are shifted back by one pose (roll)": lambda p: p.expected.roll(-1),
        "the weights are those of the sorted predictions: put them back in order": lambda p: (
            p.expected[p.predictions.argsort()]
        ),
        "the weights are those of the predictions sorted from the highest: put them back in"
        " order": lambda p: p.expected[p.predictions.argsort(descending=True)],
        "one-hot weights: those of a hard maximum": lambda p: _one_hot(p, p.predictions.argmax()),
        "one-hot weights: those of a hard minimum": lambda p: _one_hot(p, p.predictions.argmin()),
        "uniform weights: those of a mean": lambda p: torch.full_like(
            p.expected, 1 / len(p.expected)
        ),
        "uniform weights of 1: those of a sum": lambda p: torch.ones_like(p.expected),
    }
    for name, scale in scales.items():
        missing = f"the factor {name} is missing, or a division by it too much"
        known[missing] = partial(_times, 1 / scale)
        known[f"a factor {name} too much, or the division by it is missing"] = partial(
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
        return f"the sign, and a constant factor: every weight is {factor:.6g} times what it should"
    return f"a constant factor: every weight is {factor:.6g} times what it should be"


def _elsewhere(
    points: Sequence[Point], weights_at: Callable[[Poses], Tensor], scales: Mapping[str, float]
) -> str:
    """Return whether the weights are right at other predictions."""
    factors = {"-1": -1.0, "2": 2.0, "1/2": 0.5}
    for name, scale in scales.items():
        factors |= {name: scale, f"1/{name}": 1 / scale}
    for name, factor in factors.items():
        try:
            moved = [weights_at(p.poses.at(factor * p.predictions)) for p in points]
        except Exception:  # outside of what it can combine
            continue
        matches = all(p.expects(w) for p, w in zip(points, moved, strict=True))
        if matches and name == "-1":
            return "the sign inside the exponential: the weights are right at -predictions"
        if matches:
            return (
                f"another scale (temperature) in the weights than in the value: they are right at"
                f" {name} · predictions"
            )
    return ""


def _of_inputs(points: Sequence[Point], weights_at: Callable[[Poses], Tensor]) -> str:
    """Return what the weights make of a pose input instead."""
    for name in points[0].poses.inputs:
        for how, change in _IN_AN_INPUT.items():
            others = [p.poses.with_input(name, change(p.poses.inputs[name])) for p in points]
            weights = [weights_at(poses) for poses in others]
            if all(p.expects(w) for p, w in zip(points, weights, strict=True)):
                return f"the weights are right with {name!r} {how}"
            if all(p.fits(w) for p, w in zip(points, weights, strict=True)):
                return f"the weights do not depend on {name!r}, and the value does"
    return ""


_IN_AN_INPUT: dict[str, Callable[[Tensor], Tensor]] = {
    "in reverse order": lambda numbers: numbers.flip(0),
    "shifted by one pose": lambda numbers: numbers.roll(1),
    "shifted back by one pose": lambda numbers: numbers.roll(-1),
    "of the opposite sign": lambda numbers: -numbers,
}


def _distorted() -> dict[str, Callable[[Point], Tensor]]:
    """Return mistakes in each weight by itself."""
    return {
        "the absolute value of each weight": lambda p: p.expected.abs(),
        "negative weights are set to zero (clamp, relu)": lambda p: p.expected.clamp(min=0),
        "weights are clamped to 0 … 1": lambda p: p.expected.clamp(0, 1),
        "the weights are squared": lambda p: p.expected.square(),
        "the square root of each weight": lambda p: p.expected.abs().sqrt(),
        "the weights are normalised to a sum of 1, and the derivative's sum is another": lambda p: (
            p.expected / p.expected.sum()
        ),
        "1 - weight": lambda p: 1 - p.expected,
        "weight · (1 - weight): a derivative too much": lambda p: p.expected * (1 - p.expected),
        "the weight times the prediction": lambda p: p.expected * p.predictions,
        **{f"the weights are rounded to {n} decimals": partial(_rounded, n) for n in range(1, 7)},
    }


def _structure(points: Sequence[Point]) -> str:
    """Return what the difference of the two has in common over the points."""
    several = [point for point in points if len(point.found) > 2]
    if all((p.expected.abs() <= p.tolerance).all() for p in points):
        return "the value does not depend on the predictions here (clamped, saturated, detached)"
    if several and all(_is_softmax(p, p.found) and _is_softmax(p, p.expected) for p in several):
        return "another temperature in the weights than in the value"
    if several and all(_is_softmax(p, p.found) for p in several):
        return (
            "the weights are a softmax of the predictions alone: the term from the derivative of"
            " the populations is missing (product rule)"
        )
    if all(p.fits(_projected(p)) for p in points):
        return "normalisation: the weights have the right proportions and a wrong sum"
    if all(((d := p.found - p.expected) - d.mean()).abs().amax() <= p.tolerance for p in points):
        return "a term that is the same for all poses is missing or too much (normalisation)"
    at = [p.found[(p.found - p.expected).abs() > p.tolerance] for p in points]
    limits = torch.cat(at)
    if len(limits) > 1 and limits[0] and torch.allclose(limits, limits[:1].expand_as(limits)):
        return f"weights are clamped at {limits[0]:.6g}"
    zeros = [(p.found == 0) & (p.expected.abs() > p.tolerance) for p in points]
    if all(zero.any() for zero in zeros):
        left_out = {int(i) for zero in zeros for i in zero.nonzero()}
        which = f"pose {left_out.pop()}" if len(left_out) == 1 else "some poses"
        return f"{which} left out: the weight is zero (masked, dropped or detached)"
    off = {tuple(((p.found - p.expected).abs() > p.tolerance).tolist()) for p in points}
    if len(off) == 1 and not all(only := next(iter(off))):
        wrong = ", ".join(str(i) for i, one in enumerate(only) if one)
        return f"always the weight of pose {wrong}, whatever its prediction"
    return ""


def _of_another_point(wrong: Sequence[Point], points: Sequence[Point]) -> str:
    for point in wrong:
        others = (p.expected for p in points if p is not point and len(p.found) == len(point.found))
        if not any(point.fits(expected) for expected in others):
            return ""
    return "the weights are those of other predictions: a cache, or state of an earlier call"


def _sum(points: Sequence[Point]) -> str:
    if all((p.found - p.expected).sum().abs() <= len(p.found) * p.tolerance for p in points):
        return "the weights have the right sum, and are wrong one by one"
    return ""


def _projected(point: Point) -> Tensor:
    norm = point.expected @ point.expected
    return point.expected * (point.found @ point.expected) / norm if norm else point.expected


def _is_softmax(point: Point, weights: Tensor) -> bool:
    """Whether the logarithms of weights are linear in the predictions, with a sum of 1."""
    if (weights <= 0).any() or abs(weights.sum() - 1) > 1e-6:
        return False
    x = point.predictions - point.predictions.mean()
    y = weights.log() - weights.log().mean()
    variance = x @ x
    if not variance:
        return False
    slope = (x @ y) / variance
    return bool((y - slope * x).abs().amax() <= 1e-4 * (1 + y.abs().amax()) and slope.abs() > 1e-3)


def _where(points: Sequence[Point]) -> str:
    """Return what the points where it is wrong have in common, against those where it is right."""
    right, wrong = [p for p in points if not p.wrong], [p for p in points if p.wrong]
    if not right:
        return ""
    for words, value in (
        ("n_poses", lambda p: float(len(p.predictions))),
        ("the largest |prediction|", lambda p: float(p.predictions.abs().amax())),
        ("the spread of the predictions", _spread),
        ("the highest prediction", lambda p: float(p.predictions.amax())),
        ("the lowest prediction", lambda p: float(p.predictions.amin())),
    ):
        ours, theirs = [value(p) for p in wrong], [value(p) for p in right]
        if min(ours) > max(theirs):
            hint = ": shift by the extreme first" if "|" in words and min(ours) > 1e3 else ""
            return f"wrong only where {words} is above {max(theirs):.3g}{hint}"
        if max(ours) < min(theirs):
            return f"wrong only where {words} is below {min(theirs):.3g}"
    ns, others = {len(p.predictions) for p in wrong}, {len(p.predictions) for p in right}
    if not ns & others:
        return f"wrong only for {_listed(ns)} poses, right for {_listed(others)}"
    if all(_ascending(p) for p in right) and not any(_ascending(p) for p in wrong):
        return "right only where the predictions ascend: does it take them to be sorted?"
    return ""


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
    name : of the parameter
    go : gradient of the loss
    found : its gradient
    weights : shape (n_poses,), read off backward for a loss gradient of 1
    """
    if not found.isfinite().all():
        return "the gradient is not finite: is it divided by something that can be zero?"
    expected = go * torch.tensordot(weights, step.gradients[name], dims=1)
    if _close(found, expected):
        return "right to seven digits: computed in float32 on the way"
    for cause, candidate in _candidates(step, name, go, weights):
        if _close(found, candidate):
            return cause
    return ""


def _close(found: Tensor, candidate: Tensor) -> bool:
    return found.shape == candidate.shape and torch.allclose(found, candidate, rtol=1e-6, atol=0)


def _candidates(step: Step, name: str, go: float, w: Tensor) -> Iterator[tuple[str, Tensor]]:
    gradients = step.gradients[name]
    total = torch.tensordot(w, gradients, dims=1)
    changed = "grad_output is not used as it comes"
    yield "grad_output is ignored: multiply it in", total
    yield f"{changed}: its absolute value", abs(go) * total
    yield f"{changed}: its square", go * go * total
    if abs(go) > 1:
        yield f"{changed}: clamped to ±1, or its sign alone", math.copysign(1, go) * total
    yield f"{changed}: its sign alone", math.copysign(1, go) * total
    yield f"{changed}: clamped", min(max(go, -1.0), 1.0) * total
    yield f"{changed}: its opposite sign", -go * total
    for limit in (10.0, 100.0):
        yield f"{changed}: clamped", min(max(go, -limit), limit) * total
    yield f"{changed}: negative ones are set to zero", max(go, 0.0) * total
    for other, theirs in step.gradients.items():
        if other != name:
            yield (
                (
                    f"it is the gradient of {other!r}: the order must be that of param_names, and"
                    " names must be compared as a whole"
                ),
                go * torch.tensordot(w, theirs, dims=1),
            )
    if total.dim() == 2:
        yield "the gradient is transposed", go * total.T
    yield "the sum is not weighted", go * gradients.sum(0)
    yield "a mean over poses that is not weighted", go * gradients.mean(0)
    yield (
        "the gradients of the poses are in reverse order",
        go * torch.tensordot(w.flip(0), gradients, 1),
    )
    size = float(total.norm())
    yield "the combined gradient is clipped to norm 1", go * total / max(1.0, abs(go) * size)
    yield f"{changed}: it is added", go + total
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
    yield "the absolute value of the gradients", go * torch.tensordot(w, gradients.abs(), dims=1)
    yield "the gradient is zero for this parameter", 0 * total
    for i, (weight, gradient) in enumerate(zip(w, gradients, strict=True)):
        yield (
            f"pose {i} is left out of the sum (zip, slice or mask)",
            go * (total - weight * gradient),
        )
        yield f"pose {i} alone is used", go * weight * gradient
    for i, j in itertools.permutations(range(min(len(w), 4)), 2):
        swapped = w.clone()
        swapped[i] = w[j]
        yield f"pose {i} has the weight of pose {j}", go * torch.tensordot(swapped, gradients, 1)
    yield "1/n_poses too much", go * total / len(w)
    yield "n_poses times too large", go * total * len(w)
