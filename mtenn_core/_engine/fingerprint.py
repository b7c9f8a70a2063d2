"""Compare two runs of the same poses by checksums of the tensors that they save for backward.

In ``"recomputed"``, a graph of the first run gets its saved tensors from the second run. The
gradient is right only if both runs save the same tensors in the same order. Equal predictions do
not show this: a sum over atoms is the same in any order, and a last layer of zeros predicts zero
for any input.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from mtenn_core._engine.precision import no_autocast
from mtenn_core._torch_internals import base_of

# A checksum multiplies a tensor's numbers by fixed factors of both signs. The factors repeat after
# this many numbers, so that they need little memory; another factor belongs to each repetition.
_REPEAT = 1024
# These numbers replace NaN, infinity and minus infinity, which would hide all other numbers.
_NOT_FINITE = 0.1, 0.2, 0.3


class Checksum(NamedTuple):
    """A sum of the numbers of a tensor, times factors that depend on the place.

    Attributes
    ----------
    dtype : the dtype in which the sum was computed
    value : a number; on an accelerator, which would have to wait for the number, shape ()
    """

    dtype: torch.dtype
    value: float | Tensor


# The checksum of a tensor, or the place of a parameter or of its view.
Mark = Checksum | tuple[object, ...] | None


class Fingerprint(NamedTuple):
    """The fingerprint of a run.

    Attributes
    ----------
    predictions : the result, shape (n_poses,) or (n_poses, n_columns), detached
    n_saved : the number of tensors that the run saves for backward
    marks : for each of these tensors, a value that depends on its numbers and their order; None if
        the tensors are not compared
    """

    predictions: Tensor
    n_saved: int
    marks: Sequence[Mark] | None


def marks_of(saved: Iterable[Tensor], parameters: Mapping[int, int]) -> list[Mark]:
    """Return a mark for each tensor that a run saves for backward.

    Parameters
    ----------
    parameters : the index of each parameter of the pose model, by its id
    """
    saved = list(saved)
    # In autocast, a checksum would be in half precision.
    with torch.no_grad(), ExitStack() as stack:
        for device_type in {tensor.device.type for tensor in saved}:
            stack.enter_context(no_autocast(device_type))
        return [_mark(tensor, parameters) for tensor in saved]


def _mark(tensor: Tensor, parameters: Mapping[int, int]) -> Mark:
    """Return the checksum of a tensor; for a parameter or its view, the place; else None."""
    base = tensor if isinstance(tensor, torch.nn.Parameter) else base_of(tensor)
    if isinstance(base, torch.nn.Parameter):
        # torch counts changes of parameters, and fully_shard frees their memory after a run.
        place = tensor.shape, tensor.stride(), tensor.storage_offset()
        return (parameters[id(base)], *place) if id(base) in parameters else None
    # Not all subclasses have numbers in memory (DTensor). uint8 is the working memory of cuDNN and
    # oneDNN. Without dropout, fused attention on a GPU saves integers of shape () that it does not
    # initialize.
    if (
        type(tensor) is not Tensor
        or tensor.layout is not torch.strided
        or tensor.dtype is torch.uint8
        or not (tensor.is_cpu or tensor.dim() > 0)
    ):
        return None
    return _checksum(tensor)


def _checksum(tensor: Tensor) -> Checksum:
    """Return the checksum of a tensor with numbers in memory."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    # An expanded dimension has no numbers of its own, and a copy of it could be huge.
    own = [(n, step) for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step]
    tensor = tensor.as_strided([n for n, _ in own], [step for _, step in own])
    if tensor.dim() > 2 and not tensor.is_cpu:
        tensor = tensor[..., :1]  # fused attention on a GPU pads the last dimension
    flat = tensor.reshape(-1)
    if not flat.is_floating_point():
        exact = torch.float32 if flat.device.type == "mps" else torch.float64  # MPS has no float64
        return _as_checksum(_weighted(flat.to(exact)))
    # torch does not promote float8.
    flat = flat.to(torch.float32 if flat.dtype.itemsize < 4 else flat.dtype)
    checksum = _as_checksum(_weighted(flat))
    if isinstance(checksum.value, float) and math.isfinite(checksum.value):
        return checksum
    # The sum of the largest numbers would overflow, and inf - inf is NaN in both runs.
    limit = torch.finfo(flat.dtype).max ** 0.75
    return _as_checksum(_weighted(flat.nan_to_num(*_NOT_FINITE).clamp(-limit, limit)))


def _as_checksum(value: Tensor) -> Checksum:
    """Return a sum as a checksum. On a CPU, the tensor is freed."""
    # A tensor of one number takes 0.5 kB, and the run of a pose has one for each saved tensor.
    return Checksum(value.dtype, value.item() if value.is_cpu else value)


def _weighted(numbers: Tensor) -> Tensor:
    """Return the sum of numbers, shape (n,), times the factors of their places; shape ()."""
    n_rows = len(numbers) // _REPEAT
    whole, rest = numbers[: n_rows * _REPEAT].view(n_rows, _REPEAT), numbers[n_rows * _REPEAT :]
    factors, of_rows = _factors(max(_REPEAT, n_rows), numbers.dtype, numbers.device)
    return (whole @ factors[:_REPEAT]) @ of_rows[:n_rows] + rest @ factors[: len(rest)]


@lru_cache(maxsize=8)
def _factors(n: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return two lists of ``n`` factors between -1 and 1."""
    # The device is given, because the caller's default device may have no numbers ("meta").
    angles = torch.arange(1, n + 1, dtype=torch.float64, device="cpu")
    # The golden angle, and another number that is no fraction of it, so that no factors repeat.
    return (2.399963 * angles).cos().to(device, dtype), angles.cos().to(device, dtype)


def difference(
    first: Fingerprint,
    predictions: Tensor,
    saved: Sequence[Tensor],
    parameters: Mapping[int, int],
) -> tuple[int | None, str] | None:
    """Return how a second run differs: the index of a pose, if known, and a sentence; or None.

    Parameters
    ----------
    first : the fingerprint of the first run
    predictions, saved : the result of the second run, and the tensors that it saves
    parameters : see :func:`marks_of`
    """
    same_predictions = torch.equal(predictions, first.predictions)
    if same_predictions and len(saved) == first.n_saved and first.marks is None:
        return None
    eps = _precision(predictions, saved)
    if not same_predictions:
        room = _room(eps, predictions)
        same = torch.isclose(predictions, first.predictions, room, room, equal_nan=True)
        if not same.all():
            place = (~same).nonzero()[0].tolist()
            one, other = predictions[*place].item(), first.predictions[*place].item()
            where = f" in column {place[1]}" if len(place) > 1 else ""
            return place[0], f"It predicted {one!r} instead of {other!r}{where}."
    if len(saved) != first.n_saved:
        return None, f"It saved {len(saved)} tensors instead of {first.n_saved}."
    if first.marks is not None:
        marks = zip(first.marks, marks_of(saved, parameters), saved, strict=True)
        if not all(_agree(one, other, tensor, eps) for one, other, tensor in marks):
            return None, "It predicted the same, but its gradient would be another."
    return None


def _precision(predictions: Tensor, saved: Iterable[Tensor]) -> float:
    """Return the precision to which a run repeats itself."""
    dtypes = {predictions.dtype}
    # A CPU adds up in the same order in each run, so that numbers in half precision are the same.
    if not predictions.is_cpu:
        dtypes |= {t.dtype for t in saved if t.is_floating_point() or t.is_complex()}
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def _room(eps: float, predictions: Tensor) -> float:
    """Return the allowed difference of two runs, relative to the size of the numbers."""
    # On a CPU, few operations round in another way, such as LAPACK at another address. An
    # accelerator may add up in another order in each run, and the exponent leaves room for many
    # such operations.
    return 200 * eps if predictions.is_cpu else eps ** (2 / 3)


def _agree(first: Mark, second: Mark, tensor: Tensor, eps: float) -> bool:
    """Return whether the marks of two runs are equal, except for rounding.

    Parameters
    ----------
    tensor : the tensor of the second run
    eps : the result of :func:`_precision`
    """
    if not (isinstance(first, Checksum) and isinstance(second, Checksum)):
        return type(first) is type(second) and first == second
    # The types differ if only one of the runs was on a CPU.
    if first.dtype != second.dtype or type(first.value) is not type(second.value):
        return False
    difference = abs(first.value - second.value)
    if not difference:
        return True
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return False
    # In half precision, another order of addition changes the rounding of a few numbers. Another
    # input changes most of them.
    in_half = eps > torch.finfo(torch.float32).eps
    room = eps / 8 if in_half else _room(eps, tensor)
    is_wide = tensor.is_complex() or tensor.dtype.itemsize >= 4
    numbers = tensor.detach().to(tensor.dtype if is_wide else first.dtype)
    size = torch.linalg.vector_norm(numbers.nan_to_num(*_NOT_FINITE))
    return bool(difference <= room * size)
