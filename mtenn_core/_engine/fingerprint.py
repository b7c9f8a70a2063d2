"""Compare two runs of the same poses by samples of the tensors that they save for backward.

In ``"recomputed"``, a graph of the first run gets its saved tensors from the second run. The
gradient is right only if both runs save the same tensors in the same order. Equal predictions do
not show this: a sum over atoms is the same in any order, and a last layer of zeros predicts zero
for any input.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mtenn_core._engine.autograd_nodes import base_of
from mtenn_core._engine.precision import at_least_float32

# An accelerator may add up in another order in each run. In half precision, this changes the
# rounding of a few numbers. Another input changes more of them.
FEW = 0.1


# Numbers per tensor. Few are enough: if an input differs, most numbers of the next layers differ.
N_SAMPLES = 8


class Fingerprint(NamedTuple):
    """The fingerprint of a run.

    Attributes
    ----------
    predictions : the result, shape (n_poses,), detached
    n_saved : the number of tensors that the run saves for backward
    samples : numbers from these tensors, one after the other; None if they are not compared
    """

    predictions: Tensor
    n_saved: int
    samples: Tensor | None


def samples_of(saved: Iterable[Tensor]) -> list[Tensor]:
    """Return views of some numbers of each tensor, shape (n,)."""
    samples = []
    with torch.no_grad():
        for tensor in filter(_is_sampled, saved):
            size, stride = tensor.numel(), 1
            if tensor.dim() > 2:
                # Only the first numbers of the last dimension: fused attention on a GPU pads it.
                stride = tensor.shape[-1]
                size //= stride or 1
            if not tensor.is_contiguous():
                size, stride = max(zip(tensor.shape, tensor.stride(), strict=True))
            if size > N_SAMPLES:
                stride *= (size - 1) // (N_SAMPLES - 1)
                size = N_SAMPLES
            samples.append(tensor.as_strided((size,), (stride,)))
    return samples


def _is_sampled(tensor: Tensor) -> bool:
    """Return whether the numbers of a saved tensor must be the same in two runs."""
    # Leave out parameters and their views: torch counts their changes, and fully_shard frees their
    # memory. Leave out subclasses: not all have numbers in memory (DTensor). uint8 is the working
    # memory of cuDNN and oneDNN. Without dropout, fused attention on a GPU saves integers of shape
    # () that it does not initialize.
    return (
        type(tensor) is Tensor
        and tensor.layout is torch.strided
        and tensor.dtype is not torch.uint8
        and (tensor.is_cpu or tensor.dim() > 0)
        and not isinstance(base_of(tensor), torch.nn.Parameter)
    )


def joined(samples: Sequence[Tensor]) -> Tensor:
    """Return the samples of all tensors, one after the other. Other dtypes become the widest."""
    if not samples:
        return torch.empty(0)
    try:
        return torch.cat(list(samples))
    except RuntimeError:  # on several devices
        return torch.cat([sample.cpu() for sample in samples])


def difference(
    first: Fingerprint, predictions: Tensor, saved: Sequence[Tensor]
) -> tuple[int, str] | None:
    """Return how a second run differs: the index of a pose, and a sentence. None if it does not.

    Parameters
    ----------
    first : the fingerprint of the first run
    predictions, saved : the result of the second run, and the tensors that it saves
    """
    samples = samples_of(saved) if first.samples is not None else []
    if (
        len(saved) == first.n_saved
        and torch.equal(predictions, first.predictions)
        and (first.samples is None or torch.equal(joined(samples), first.samples))
    ):
        return None
    coarsest = _coarsest(predictions, saved)
    room = _room(coarsest)
    same = torch.isclose(predictions, first.predictions, room, room, equal_nan=True)
    if not same.all():
        pose = int((~same).int().argmax())
        one, other = predictions[pose].item(), first.predictions[pose].item()
        return pose, f"It predicted {one!r} instead of {other!r}."
    if len(saved) != first.n_saved:
        return 0, f"It saved {len(saved)} tensors instead of {first.n_saved}."
    if first.samples is not None and not _agree(first.samples, samples, coarsest):
        return 0, "It predicted the same, but its gradient would be another."
    return None


def _coarsest(predictions: Tensor, saved: Iterable[Tensor]) -> float:
    """Return the precision to which a run repeats itself."""
    dtypes = {predictions.dtype}
    # A CPU adds up in the same order in each run, so that numbers in half precision are the same.
    if not predictions.is_cpu:
        dtypes |= {t.dtype for t in saved if t.is_floating_point() or t.is_complex()}
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def _agree(first: Tensor, second: Sequence[Tensor], coarsest: float) -> bool:
    """Return whether the samples of two runs are equal, except for rounding.

    Parameters
    ----------
    first : the samples of the first run, one after the other
    second : the samples of the second run, for each tensor
    coarsest : the result of :func:`_coarsest`
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
