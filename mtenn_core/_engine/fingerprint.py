"""Compare two runs of the same poses by samples of the tensors that they save for backward.

In ``"recomputed"``, a graph of the first run gets its saved tensors from the second run. The
gradient is right only if both runs save the same tensors in the same order. Equal predictions do
not show this: a sum over atoms is the same in any order, and a last layer of zeros predicts zero
for any input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mtenn_core._engine.precision import at_least_float32

# An accelerator may add up in another order in each run. In half precision, this changes the
# rounding of a few numbers. Another input changes more of them.
FEW = 0.1


class Fingerprint(NamedTuple):
    """The fingerprint of a run.

    Attributes
    ----------
    predictions : the result, shape (n_poses,), detached
    n_saved : the number of tensors that the run saves for backward
    samples : numbers from these tensors, one after the other
    """

    predictions: Tensor
    n_saved: int
    samples: Tensor


def joined(samples: Sequence[Tensor]) -> Tensor:
    """Return the samples of all tensors, one after the other. Other dtypes become the widest."""
    if not samples:
        return torch.empty(0)
    try:
        return torch.cat(list(samples))
    except RuntimeError:  # on several devices
        return torch.cat([sample.cpu() for sample in samples])


def difference(
    first: Fingerprint, predictions: Tensor, n_saved: int, samples: Sequence[Tensor]
) -> tuple[int, str] | None:
    """Return how a second run differs: the index of a pose, and a sentence. None if it does not.

    Parameters
    ----------
    first : the fingerprint of the first run
    predictions, n_saved, samples : the result of the second run, the number of saved tensors, and
        the samples of each
    """
    same_number = n_saved == first.n_saved
    if same_number and torch.equal(predictions, first.predictions):
        second = joined(samples)
        if torch.equal(second, first.samples):
            return None
    floats = [s.dtype for s in (*samples, predictions) if s.is_floating_point() or s.is_complex()]
    coarsest = max(torch.finfo(dtype).eps for dtype in floats)
    room = _room(coarsest)
    same = torch.isclose(predictions, first.predictions, room, room, equal_nan=True)
    if not same.all():
        pose = int((~same).int().argmax())
        one, other = predictions[pose].item(), first.predictions[pose].item()
        return pose, f"It predicted {one!r} instead of {other!r}."
    if not same_number:
        return 0, f"It saved {n_saved} tensors instead of {first.n_saved}."
    if not _agree(first.samples, samples, coarsest):
        return 0, "It predicted the same, but its gradient would be another."
    return None


def _agree(first: Tensor, second: Sequence[Tensor], coarsest: float) -> bool:
    """Return whether the samples of two runs are equal, except for rounding.

    Parameters
    ----------
    first : the samples of the first run, one after the other
    second : the samples of the second run, for each tensor
    coarsest : the precision of the coarsest dtype in the run
    """
    lengths = list(map(len, second))
    if sum(lengths) != len(first):
        return False
    pairs = zip(first.split(lengths), second, strict=True)
    changed = sum(_n_changed(one, other.to(first.device), coarsest) for one, other in pairs)
    # Only in half precision does another order of addition change a number by so much.
    in_half = coarsest > torch.finfo(torch.float32).eps
    return changed <= (FEW * len(first) if in_half else 0)


def _n_changed(first: Tensor, second: Tensor, coarsest: float) -> float:
    """Return how many samples of a tensor differ; infinity if any differs too much."""
    exact = not (second.is_floating_point() or second.is_complex())
    wide = at_least_float32(second.dtype)
    second = second.to(first.dtype)
    if torch.equal(first, second):
        return 0
    if exact:
        return math.inf
    # Rounding is relative to the largest sample, because a sum of large numbers may be small.
    size = first.abs().nan_to_num(posinf=0.0).amax()
    same = (first == second) | (first.isnan() & second.isnan())
    differences = torch.where(same, 0.0, (first - second).abs())
    if not (differences <= _room(coarsest) * size).all():
        return math.inf
    return int((differences > _room(torch.finfo(wide).eps) * size).sum())


def _room(eps: float) -> float:
    """Return the allowed relative difference. It has room for the rounding of many operations."""
    return eps ** (2 / 3)
