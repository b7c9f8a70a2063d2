"""D3: extreme predictions, ties and NaN."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from mtenn_core.testing._checks.check import check
from mtenn_core.testing._outcomes import Fail, Metrics
from mtenn_core.testing._probe.poses import Poses, listed
from mtenn_core.testing._probe.subject import Subject


@check("D3", "extreme predictions give finite numbers, and NaN gives NaN")
def extremes(subject: Subject) -> Metrics:
    """Check that predictions near 1e4 and ties give finite numbers, and that NaN gives NaN."""
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
                cause=_infinite_cause(what, value),
            )
    poses = subject.probes.poses(n)
    for turn in range(n):  # so that the best pose has each index once
        _check_nan(subject, poses.map(partial(torch.roll, shifts=turn)))
    return {}


def _infinite_cause(what: str, value: Tensor) -> str:
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
    for pose in range(len(poses)):
        broken = poses.at(poses.predictions.clone())
        broken.predictions[pose] = math.nan
        values.append((pose, broken, subject.value(broken)))
    # If the value does not depend on a pose, NaN in this pose cannot change it.
    counts = subject.weights(poses) != 0
    unseen = [each for each in values if not each[2].isnan() and counts[each[0]]]
    # A selection of the best k poses may treat NaN as the worst prediction, at every index.
    selects = not (subject.combination.smooth or any(value.isnan() for *_, value in values))
    for pose, broken, value in unseen:
        if selects and _selects_around_nan(subject, broken, value):
            continue
        raise Fail(
            f"pose {pose} of {len(poses)} is NaN: expected the value NaN; found {value.item():g}",
            cause="NaN is replaced or skipped (nan_to_num, nansum, a comparison), which hides a"
            " broken pose: if you intend this, declare properties = {'ignores_nan'}",
        )


def _selects_around_nan(subject: Subject, broken: Poses, value: Tensor) -> bool:
    """Return True if the value stays the same with the lowest or highest number instead of NaN."""
    low, high = subject.combination.domain
    ends = (low + 1e-3 if low > -1e4 else -1e4, high - 1e-3 if high < 1e4 else 1e4)
    instead = [broken.at(broken.predictions.nan_to_num(end)) for end in ends]
    return any(torch.equal(value, subject.value(poses)) for poses in instead)
