"""Compare two runs of the same poses by samples of the tensors that they save for backward.

In ``"recomputed"``, a graph of the first run gets its saved tensors from the second run. The
gradient is right only if both runs save the same tensors in the same order. Equal predictions do
not show this: a sum over atoms is the same in any order, and a last layer of zeros predicts zero
for any input.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mtenn_core._engine.precision import at_least_float32

Kind = tuple[torch.dtype, torch.device]

# An accelerator may add up in another order in each run. In half precision, this changes the
# rounding of a few numbers. Another input changes more of them.
FEW = 0.1


class Fingerprint(NamedTuple):
    """The fingerprint of a run.

    Attributes
    ----------
    predictions : the result, shape (n_poses,), detached
    n_saved : the number of tensors that the run saves for backward
    samples : numbers from these tensors, one after the other, for each dtype and device
    lengths : how many of the numbers come from each tensor
    """

    predictions: Tensor
    n_saved: int
    samples: Mapping[Kind, Tensor]
    lengths: Mapping[Kind, Sequence[int]]


def difference(first: Fingerprint, second: Fingerprint) -> tuple[int, str] | None:
    """Return how two runs differ: the index of a pose, and a sentence. None if they do not."""
    numbers = [*first.samples.values(), second.predictions]
    dtypes = [found.dtype for found in numbers if found.is_floating_point()]
    coarsest = max(torch.finfo(dtype).eps for dtype in dtypes)
    room = _room(coarsest)
    same = torch.isclose(second.predictions, first.predictions, room, room, equal_nan=True)
    if not same.all():
        pose = int((~same).int().argmax())
        one, other = second.predictions[pose].item(), first.predictions[pose].item()
        return pose, f"It predicted {one!r} instead of {other!r}."
    if second.n_saved != first.n_saved:
        return 0, f"It saved {second.n_saved} tensors instead of {first.n_saved}."
    if not _agree(first, second, coarsest):
        return 0, "It predicted the same, but its gradient would be another."
    return None


def _agree(first: Fingerprint, second: Fingerprint, coarsest: float) -> bool:
    """Return whether the samples of two runs are equal, except for rounding."""
    if first.lengths != second.lengths:
        return False
    changed = sum(
        _n_changed(samples, second.samples[kind], first.lengths[kind], coarsest)
        for kind, samples in first.samples.items()
    )
    # Only in half precision does another order of addition change a number by so much.
    in_half = coarsest > torch.finfo(torch.float32).eps
    return changed <= (FEW * sum(map(len, first.samples.values())) if in_half else 0)


def _n_changed(first: Tensor, second: Tensor, lengths: Sequence[int], coarsest: float) -> float:
    """Return how many samples of one kind differ; infinity if any differs too much.

    Parameters
    ----------
    lengths : the number of samples of each tensor
    coarsest : the precision of the coarsest dtype in the run
    """
    if torch.equal(first, second):
        return 0
    if first.is_complex():
        first, second = torch.view_as_real(first).flatten(), torch.view_as_real(second).flatten()
        lengths = [2 * length for length in lengths]
    if not first.is_floating_point():
        return math.inf
    wide = at_least_float32(first.dtype)
    first, second = first.to(wide), second.to(wide)
    # Rounding is relative to the largest sample of a tensor, because a sum of large numbers may be
    # small.
    sizes = first.abs().nan_to_num(posinf=0.0).split(list(lengths))
    size = torch.cat([of_tensor.amax().expand(len(of_tensor)) for of_tensor in sizes])
    same = (first == second) | (first.isnan() & second.isnan())
    differences = torch.where(same, 0.0, (first - second).abs())
    if not (differences <= _room(coarsest) * size).all():
        return math.inf
    return int((differences > _room(torch.finfo(wide).eps) * size).sum())


def _room(eps: float) -> float:
    """Return the allowed relative difference. It has room for the rounding of many operations."""
    return eps ** (2 / 3)
