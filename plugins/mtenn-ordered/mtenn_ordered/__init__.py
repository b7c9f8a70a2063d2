"""Top-k mean, trimmed mean, median and quantile: means of predictions at chosen ranks."""

import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtenn_core import Combination


class _Ranks(NamedTuple):
    """Neighbouring ranks in ascending order, from ``start`` to ``stop`` - 1. The lowest rank is 0.

    Attributes
    ----------
    start, stop : the first rank, and the rank behind the last
    weight : the weight that the poses at these ranks share equally
    """

    start: int
    stop: int
    weight: float = 1.0


class TopKMeanCombination(Combination):
    """Mean of the k lowest predictions, or of the k highest.

    If there are no more than k poses, it is the mean of all. If poses are tied for the last place,
    they share its weight equally. An infinite pose has no weight unless it is among the k.

    Parameters
    ----------
    k : the number of poses; at least 1
    largest : take the k highest predictions, for example of pIC50

    Raises
    ------
    ValueError : ``k`` is no whole number, or below 1, or ``largest`` is not True or False
    """

    smooth = False
    properties = frozenset(
        {"permutation_invariant", "translation_equivariant", "monotone", "bounded", "idempotent"}
    )
    examples = ({}, {"k": 1}, {"k": 2, "largest": True})

    def __init__(self, k: int = 3, largest: bool = False) -> None:
        super().__init__()
        self.k = _whole_number("k", k)
        self.largest = _flag("largest", largest)

    def combine(self, predictions: Tensor) -> Tensor:
        """Return the mean of the k lowest or highest predictions, shape (), in their unit."""
        return _mean_at(self._ranks(len(predictions)), predictions)

    def pose_weights(self, predictions: Tensor) -> Tensor:
        """Return the derivative: 1/k for the k poses, and 0 for the others.

        T poses that are tied for the last r of the k places have r/(k T) each.

        Parameters
        ----------
        predictions : shape (n_poses,)

        Returns
        -------
        shape (n_poses,), dimensionless, dtype and device of ``predictions``
        """
        return _weights_at(self._ranks(len(predictions)), predictions)

    def reference(self, predictions: Tensor) -> Tensor:
        """Return the mean of what ``torch.topk`` gives."""
        k = min(self.k, len(predictions))
        return torch.topk(predictions, k, largest=self.largest).values.mean()

    def _ranks(self, n_poses: int) -> list[_Ranks]:
        k = min(self.k, n_poses)
        return [_Ranks(n_poses - k, n_poses) if self.largest else _Ranks(0, k)]


class TrimmedMeanCombination(Combination):
    """Mean of the predictions without the lowest and the highest ones.

    Of M poses, the ``int(proportion * M)`` lowest and as many of the highest have no weight, as in
    ``scipy.stats.trim_mean``. At least one pose is left. If poses are tied at a cut, they share the
    weight of those that are left equally. An infinite pose has no weight if it is cut off.

    Parameters
    ----------
    proportion : the part of the poses to cut off at each end; at least 0, and below 0.5

    Raises
    ------
    ValueError : ``proportion`` is outside this range
    """

    smooth = False
    properties = frozenset(
        {"permutation_invariant", "translation_equivariant", "monotone", "bounded", "idempotent"}
    )
    examples = ({}, {"proportion": 0.4})

    def __init__(self, proportion: float = 0.25) -> None:
        super().__init__()
        self.proportion = _number(proportion)
        if not 0 <= self.proportion < 0.5:
            raise ValueError(
                f"proportion must be at least 0 and below 0.5; found proportion = {proportion!r}"
            )

    def combine(self, predictions: Tensor) -> Tensor:
        """Return the mean of the predictions that are not cut off, shape (), in their unit."""
        return _mean_at(self._ranks(len(predictions)), predictions)

    def pose_weights(self, predictions: Tensor) -> Tensor:
        """Return the derivative: 1/K for the K poses that are left, and 0 for the others.

        T poses that are tied at a cut, of which r are left, have r/(K T) each.

        Parameters
        ----------
        predictions : shape (n_poses,)

        Returns
        -------
        shape (n_poses,), dimensionless, dtype and device of ``predictions``
        """
        return _weights_at(self._ranks(len(predictions)), predictions)

    def reference(self, predictions: Tensor) -> Tensor:
        """Return the mean of the middle of the sorted predictions."""
        cut = math.floor(self.proportion * len(predictions))
        middle = len(predictions) - 2 * cut
        return predictions.sort().values.narrow(0, cut, middle).mean()

    def _ranks(self, n_poses: int) -> list[_Ranks]:
        # The product is below n_poses / 2, also in floating point, so at least one pose is left.
        cut = int(self.proportion * n_poses)
        return [_Ranks(cut, n_poses - cut)]


class MedianCombination(Combination):
    """Median of the predictions. For an even number of poses, the mean of the two middle ones.

    ``torch.median`` returns the lower of the two instead. If poses are tied for the middle, they
    share the weight equally. An infinite pose has no weight unless it is in the middle.
    """

    smooth = False
    properties = frozenset(
        {
            "permutation_invariant",
            "translation_equivariant",
            "monotone",
            "bounded",
            "idempotent",
            "replication_invariant",
        }
    )

    def combine(self, predictions: Tensor) -> Tensor:
        """Return the median of the predictions, shape (), in their unit."""
        return _mean_at(self._ranks(len(predictions)), predictions)

    def pose_weights(self, predictions: Tensor) -> Tensor:
        """Return the derivative: 1 for the pose in the middle, or 1/2 for each of two.

        T poses that are tied for r of the two places have r/(2 T) each, and for a single place 1/T.

        Parameters
        ----------
        predictions : shape (n_poses,)

        Returns
        -------
        shape (n_poses,), dimensionless, dtype and device of ``predictions``
        """
        return _weights_at(self._ranks(len(predictions)), predictions)

    def reference(self, predictions: Tensor) -> Tensor:
        """Return the mean of the medians from below and from above."""
        return (predictions.median() - (-predictions).median()) / 2

    def _ranks(self, n_poses: int) -> list[_Ranks]:
        return [_Ranks((n_poses - 1) // 2, n_poses // 2 + 1)]


class QuantileCombination(Combination):
    """Quantile of the predictions, with linear interpolation between two ranks.

    Rank 0 is the lowest prediction. The quantile is at the rank q (M - 1), as in ``torch.quantile``
    and by default in ``numpy.quantile``. If poses are tied for a rank, they share its weight
    equally. An infinite pose has no weight unless it is at one of the ranks.

    Parameters
    ----------
    q : from 0, the minimum, to 1, the maximum

    Raises
    ------
    ValueError : ``q`` is outside this range
    """

    smooth = False
    properties = frozenset(
        {"permutation_invariant", "translation_equivariant", "monotone", "bounded", "idempotent"}
    )
    examples = ({}, {"q": 0.9})

    def __init__(self, q: float = 0.25) -> None:
        super().__init__()
        self.q = _number(q)
        if not 0 <= self.q <= 1:
            raise ValueError(f"q must be between 0 and 1; found q = {q!r}")

    def combine(self, predictions: Tensor) -> Tensor:
        """Return the quantile of the predictions, shape (), in their unit."""
        return _mean_at(self._ranks(len(predictions)), predictions)

    def pose_weights(self, predictions: Tensor) -> Tensor:
        """Return the derivative: 1 - f and f for the two poses next to the rank, 0 for the others.

        f is the fraction of the rank q (M - 1). T poses that are tied for a rank have the T-th part
        of its weight each.

        Parameters
        ----------
        predictions : shape (n_poses,)

        Returns
        -------
        shape (n_poses,), dimensionless, dtype and device of ``predictions``
        """
        return _weights_at(self._ranks(len(predictions)), predictions)

    def reference(self, predictions: Tensor) -> Tensor:
        """Return what ``torch.quantile`` gives."""
        return torch.quantile(predictions, self.q)

    def _ranks(self, n_poses: int) -> list[_Ranks]:
        rank = self.q * (n_poses - 1)
        # Without this, 0.57 * 100 = 56.99999999999999 would give rank 56 a weight of 7e-15, which
        # is enough to make the value infinite.
        if math.isclose(rank, round(rank), rel_tol=1e-15):
            rank = round(rank)
        below = math.floor(rank)
        fraction = rank - below
        if fraction == 0:
            return [_Ranks(below, below + 1)]
        return [_Ranks(below, below + 1, 1 - fraction), _Ranks(below + 1, below + 2, fraction)]


def _mean_at(ranks: Sequence[_Ranks], predictions: Tensor) -> Tensor:
    """Return the weighted mean of the predictions at some ranks.

    Autograd gives the derivative of :func:`_weights_at`, also at ties. The derivative of
    ``torch.sort`` would go to only one of the tied poses.

    Parameters
    ----------
    ranks : their weights add up to 1
    predictions : shape (n_poses,)

    Returns
    -------
    shape (), dtype and device of ``predictions``
    """
    wide = predictions.to(torch.promote_types(predictions.dtype, torch.float32))
    weights = _weights_at(ranks, wide.detach())
    # Of a pose without weight, 0 * inf would be NaN.
    mean = (weights * torch.where(weights == 0, 0.0, wide)).sum()
    # The weights of three tied poses are 1/3 each, and three thirds of y may not be y. The sorted
    # predictions give the value without this rounding. The difference is not finite if a pose with
    # weight is infinite, or if a sum overflows. Then the mean needs no correction.
    correction = _mean_of_sorted(ranks, wide.detach().sort().values) - mean.detach()
    correction = torch.where(correction.isfinite(), correction, 0.0)
    return (mean + correction).to(predictions.dtype)


def _weights_at(ranks: Sequence[_Ranks], predictions: Tensor) -> Tensor:
    """Return the derivative of :func:`_mean_at`, shape (n_poses,). Tied poses have equal weights.

    If a prediction is NaN, all weights are NaN.

    Parameters
    ----------
    ranks, predictions : as for :func:`_mean_at`
    """
    wide = predictions.to(torch.promote_types(predictions.dtype, torch.float32))
    in_order = wide.sort().values
    weights = sum(part.weight * _shares(wide, in_order[part.start : part.stop]) for part in ranks)
    weights = torch.where(wide.isnan().any(), torch.nan, weights)
    return weights.to(predictions.dtype)


def _mean_of_sorted(ranks: Sequence[_Ranks], in_order: Tensor) -> Tensor:
    """Return the weighted mean from sorted predictions. Equal predictions give their own value."""
    lowest = in_order[ranks[0].start]
    above = in_order - lowest
    return lowest + sum(part.weight * above[part.start : part.stop].mean() for part in ranks)


def _shares(predictions: Tensor, kept: Tensor) -> Tensor:
    """Return each pose's part of the mean of some sorted predictions, shape (n_poses,).

    Only predictions equal to the lowest or the highest that is kept can be tied with others that
    are not kept.
    """
    lowest, highest = kept[0], kept[-1]
    between = (lowest < predictions) & (predictions < highest)
    at_highest = torch.where(lowest < highest, _shares_of_tied(predictions, kept, highest), 0.0)
    return (between + _shares_of_tied(predictions, kept, lowest) + at_highest) / len(kept)


def _shares_of_tied(predictions: Tensor, kept: Tensor, value: Tensor) -> Tensor:
    """Return the number of places that poses tied at ``value`` have, divided among them equally."""
    tied = (predictions == value).to(predictions.dtype)
    return tied * (kept == value).sum() / tied.sum()


def _whole_number(name: str, value: Any) -> int:
    """Return an argument as an int. Raise a ValueError if it is not a whole number above 0."""
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{name} must be a whole number of at least 1; found {name} = {value!r}")
    return number


def _flag(name: str, value: Any) -> bool:
    """Return an argument. Raise a ValueError if it is not True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False; found {name} = {value!r}")
    return value


def _number(value: Any) -> float:
    """Return an argument as a float. Return NaN, which is in no range, if it is not a number."""
    if isinstance(value, bool | str):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # torch's are RuntimeErrors
        return math.nan
