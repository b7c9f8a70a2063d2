"""D3: extreme predictions, ties, NaN and infinities."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from mtenn_core._engine.columns import named_column
from mtenn_core.testing._checks.check import check
from mtenn_core.testing._outcomes import Fail, Metrics
from mtenn_core.testing._probe.kinks import KINK, at_kink
from mtenn_core.testing._probe.poses import Poses, listed
from mtenn_core.testing._probe.subject import Subject

# An infinite prediction is compared with these. A combination may overflow for some of them.
LARGE = (1e4, 1e8, 1e30, 1e100, 1e300)


@check("D3", "extreme predictions give finite numbers, and NaN gives NaN")
def extremes(subject: Subject) -> Metrics:
    """Check that predictions near 1e4 and ties give finite numbers, and that NaN gives NaN.

    An infinite prediction must not disappear either: a finite value must be the limit for a
    prediction that grows.
    """
    n = subject.probes.n_poses(3)
    cases = {
        "predictions near 1e4": subject.probes.poses(n, 1e4, 1.0),
        "predictions near -1e4": subject.probes.poses(n, -1e4, 1.0),
        "predictions from -1e4 to 1e4": subject.probes.poses(n, 0.0, 1e4),
    }
    if subject.combination.smooth:
        poses = subject.probes.poses(n)
        cases["equal predictions"] = poses.tied()
        cases["the same pose twice"] = poses[[0, *range(n - 1)]]
    for what, poses in cases.items():
        value, weights = subject.value(poses), subject.weights(poses)
        if not (value.isfinite() and weights.isfinite().all()):
            raise Fail(
                f"{what}, {poses}: expected finite numbers; found the value {value.item():g}"
                f" and the weights [{listed(weights)}]",
                cause=_infinite_cause(subject, what, poses, value),
            )
    poses = subject.probes.poses(n)
    for turn in range(n):  # so that the best pose has each index once
        _check_nan(subject, poses.map(partial(torch.roll, shifts=turn)))
    _check_infinity(subject)
    return {}


def _infinite_cause(subject: Subject, what: str, poses: Poses, value: Tensor) -> str:
    usual = poses.at(subject.probes.predictions(len(poses)))
    if poses.inputs and not subject.value(usual).isfinite():
        return (
            "the value is not finite for these pose inputs, whatever the predictions are: is there"
            " a division by a sum of weights that is 0, or a logarithm of a number below 0?"
        )
    if "1e4" in what:
        return (
            "exp() of a large number, or its logarithm: shift by the extreme first, as"
            " torch.logsumexp and torch.softmax do, or declare the `domain`"
        )
    if value.isfinite():
        return "the derivative at ties is 0/0 or a square root at 0: declare smooth = False"
    return "a division by the spread of the predictions, which is 0 for ties"


def _check_nan(subject: Subject, poses: Poses) -> None:
    """Check that a prediction of NaN makes the value NaN.

    A combination that selects poses may also leave out NaN, as it leaves out the worst pose.
    """
    if "ignores_nan" in subject.combination.properties:
        return
    values = []
    for entry in _entries(poses):
        broken = _with_prediction(poses, entry, math.nan)
        values.append((entry, broken, subject.value(broken)))
    # If the value does not depend on a pose, NaN in this pose cannot change it.
    counts = subject.weights(poses).flatten() != 0
    unseen = [each for each in values if not each[2].isnan() and counts[each[0]]]
    # A selection of the best k poses may treat NaN as the worst prediction, at every index.
    selects = not any(value.isnan() for *_, value in values)
    smooth = subject.combination.smooth
    for entry, broken, value in unseen:
        around = selects and _selects_around_nan(subject, broken, value)
        if around and not smooth:
            continue
        raise Fail(
            f"{_place(subject, poses, entry)} is NaN: expected the value NaN; found"
            f" {value.item():g}",
            cause=KINK if around and at_kink(subject, poses.tied()) else _HIDDEN_NAN,
        )


_HIDDEN_NAN = (
    "NaN is replaced or skipped (nan_to_num, nansum, a comparison), which hides a broken pose: if"
    " you intend this, declare properties = {'ignores_nan'}"
)


def _selects_around_nan(subject: Subject, broken: Poses, value: Tensor) -> bool:
    """Return True if the value stays the same with the lowest or highest number instead of NaN."""
    low, high = subject.combination.domain
    ends = (low + 1e-3 if low > -1e4 else -1e4, high - 1e-3 if high < 1e4 else 1e4)
    instead = [broken.at(broken.predictions.nan_to_num(end)) for end in ends]
    return any(torch.equal(value, subject.value(poses)) for poses in instead)


def _check_infinity(subject: Subject) -> None:
    """Check that finite results for an infinite prediction are limits for large predictions."""
    domain = subject.combination.domain
    poses = subject.probes.poses(4)
    for sign, end in zip((-1.0, 1.0), domain, strict=True):
        if math.isfinite(end):
            continue
        for pose in _entries(poses):
            broken = _with_prediction(poses, pose, sign * math.inf)
            place = _place(subject, poses, pose)
            try:
                value, weights = subject.value(broken), subject.weights(broken)
            except Exception:  # an error hides nothing
                continue
            limits = _limits(subject, poses, pose, sign)
            if not value.isfinite() or not limits:
                continue
            of_value = [ours for _, ours in limits if _close(value, ours[0])]
            if not of_value:
                raise Fail(
                    f"{place} is {sign * math.inf}: expected the limit, an"
                    f" infinity or NaN; found the finite value {value.item():.9g}, but"
                    f" {limits[-1][1][0].item():.9g} for {sign * limits[-1][0]:g}",
                    cause="infinities are replaced or skipped (nan_to_num, isfinite, a mask), which"
                    " hides a broken pose",
                )
            if weights.isfinite().all() and not any(_close(weights, w) for _, w in of_value):
                raise Fail(
                    f"{place} is {sign * math.inf}: expected the weights"
                    f" [{listed(of_value[-1][1])}] or NaN, as for large numbers; found"
                    f" [{listed(weights)}]",
                    cause="the weights treat an infinite prediction in another way than the value",
                )


def _limits(
    subject: Subject, poses: Poses, pose: int, sign: float
) -> list[tuple[float, tuple[Tensor, Tensor]]]:
    """Return large predictions of one pose, each with value and weights, if they are no NaN.

    Parameters
    ----------
    pose : the index in the flattened predictions
    """
    found = []
    for size in LARGE:
        large = _with_prediction(poses, pose, sign * size)
        value, weights = subject.value(large), subject.weights(large)
        if not value.isnan():
            found.append((size, (value, weights)))
    return found


def _with_prediction(poses: Poses, pose: int, prediction: float) -> Poses:
    changed = poses.at(poses.predictions.clone())
    changed.predictions.view(-1)[pose] = prediction
    return changed


# Of many columns, only a few are tried, because each takes some values.
MOST_ENTRIES = 48


def _entries(poses: Poses) -> list[int]:
    """Return the indices of the predictions, or those of some predictions of each pose."""
    n_entries = poses.predictions.numel()
    step = -(-n_entries // MOST_ENTRIES)  # rounded up
    # Odd, so that the columns are not the same for each pose.
    return [*range(0, n_entries, step + (step > 1 and step % 2 == 0))]


def _place(subject: Subject, poses: Poses, entry: int) -> str:
    pose, column = divmod(entry, poses.predictions[0].numel())
    return f"pose {pose} of {len(poses)}{named_column(subject.probes.columns, column)}"


def _close(found: Tensor, expected: Tensor) -> bool:
    # A power law reaches its limit slowly: 1/y is 1e-8 for the second of the large numbers.
    return torch.allclose(found, expected, rtol=1e-6, atol=1e-9)
