"""Find the likely cause of wrong pose weights, if each pose has several numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mtenn_core._engine.columns import Columns, named_column
from mtenn_core.testing._probe.likely_causes import Point

Rule = Callable[[Tensor], Tensor]


def cause_in_columns(points: Sequence[Point], columns: Columns, scales: Mapping[str, float]) -> str:
    """Return the likely mistake behind wrong pose weights of shape (n_poses, n_columns), or "".

    Parameters
    ----------
    points : all probes with known weights, as vectors of n_poses · n_columns entries
    scales : numbers of the combination, by name
    """
    wrong = [point for point in points if point.wrong]
    if not wrong:
        return ""
    informative = [point for point in wrong if len(point.poses) > 1] or wrong
    known = _of_the_whole(scales) | _of_the_axes()
    for cause, rule in known.items():
        if all(point.fits(rule(_matrix(point, point.expected)).flatten()) for point in informative):
            return cause
    return _constant_factor(informative) or _of_entries(informative, columns)


def _matrix(point: Point, weights: Tensor) -> Tensor:
    return weights.view(point.predictions.shape)


def _of_the_whole(scales: Mapping[str, float]) -> dict[str, Rule]:
    known: dict[str, Rule] = {
        "the sign: every weight has the opposite sign": lambda w: -w,
        "the weights are all zero: are the predictions detached?": lambda w: 0 * w,
        "1/n_poses is missing": lambda w: len(w) * w,
        "the weights are divided by n_poses once too often": lambda w: w / len(w),
        "the weights are divided by n_columns once too often": lambda w: w / w.shape[1],
        "1/n_columns is missing": lambda w: w.shape[1] * w,
    }
    for name, scale in scales.items():
        known[f"the factor {name} is missing, or there is a division by it too much"] = (
            lambda w, scale=scale: w / scale  # type: ignore[misc]
        )
        known[f"there is a factor {name} too much, or a division by it is missing"] = (
            lambda w, scale=scale: scale * w  # type: ignore[misc]
        )
    return known


def _of_the_axes() -> dict[str, Rule]:
    return {
        "the weights are in reverse order of the poses": lambda w: w.flip(0),
        "the weights are shifted by one pose (roll)": lambda w: w.roll(1, 0),
        "the weights are shifted back by one pose (roll)": lambda w: w.roll(-1, 0),
        "the columns of the weights are in reverse order": lambda w: w.flip(1),
        "the columns of the weights are shifted (roll)": lambda w: w.roll(1, 1),
        "the columns of the weights are shifted back (roll)": lambda w: w.roll(-1, 1),
        "the weights are transposed: poses and columns are swapped (view or reshape does not"
        " transpose)": lambda w: w.T.reshape(w.shape),
        "the weights are transposed: poses and columns are swapped, the other way": lambda w: (
            w.flatten().view(w.shape[::-1]).T.contiguous()
        ),
        "every pose has the mean of the weights: a mean over the poses too much": lambda w: w.mean(
            0, keepdim=True
        ).expand_as(w),
        "every column has the mean of the weights: a mean over the columns too much": lambda w: (
            w.mean(1, keepdim=True).expand_as(w)
        ),
        "the weights of all poses are summed": lambda w: w.sum(0, keepdim=True).expand_as(w),
        "the weights of all columns are summed": lambda w: w.sum(1, keepdim=True).expand_as(w),
    }


def _constant_factor(points: Sequence[Point]) -> str:
    found = float(sum(point.found @ point.expected for point in points))
    expected = float(sum(point.expected @ point.expected for point in points))
    if not expected or not all(point.fits(found / expected * point.expected) for point in points):
        return ""
    return f"a constant factor: every weight is {found / expected:.6g} times the correct one"


def _of_entries(points: Sequence[Point], columns: Columns) -> str:
    """Return the cause if only some columns or some poses are wrong, or the sums tell it."""
    errors = [_matrix(point, (point.found - point.expected).abs()) for point in points]
    off = [error > point.tolerance for error, point in zip(errors, points, strict=True)]
    n_columns = points[0].predictions.shape[1]
    wrong = [j for j in range(n_columns) if any(bool(each[:, j].any()) for each in off)]
    if len(wrong) < n_columns:
        names = ", ".join(named_column(columns, j).removeprefix(", column ") for j in wrong)
        which = f"only the weights of column {names} are wrong"
        zero = all(
            (_matrix(p, p.found)[:, j].abs() <= p.tolerance).all() for p in points for j in wrong
        )
        return f"{which}: they are zero (is the column detached?)" if zero else which
    if all(len(point.poses) == len(points[0].poses) for point in points):
        poses = {i for each in off for i in each.any(1).nonzero().flatten().tolist()}
        if len(poses) < len(points[0].poses):
            return f"only the weights of pose {', '.join(map(str, sorted(poses)))} are wrong"
    if all(_sums_agree(point, 0) for point in points):
        return (
            "the sums over the poses are right, but single weights are wrong: is a sum or a softmax"
            " over the wrong axis, or are the poses in another order?"
        )
    if all(_sums_agree(point, 1) for point in points):
        return (
            "the sums over the columns are right, but single weights are wrong: is a sum or a"
            " softmax over the wrong axis, or are the columns in another order?"
        )
    if all(_is_share(point) for point in points):
        return (
            "the weights of each pose sum to 1 over the columns: is there a softmax over the"
            " columns (dim=1) instead of the poses (dim=0)?"
        )
    return ""


def _sums_agree(point: Point, dim: int) -> bool:
    error = _matrix(point, point.found - point.expected)
    return bool((error.sum(dim).abs() <= error.shape[dim] * point.tolerance).all())


def _is_share(point: Point) -> bool:
    sums = _matrix(point, point.found).sum(1)
    return bool(torch.allclose(sums, torch.ones_like(sums), rtol=0, atol=1e-6))
