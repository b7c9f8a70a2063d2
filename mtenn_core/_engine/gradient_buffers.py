"""Memory for the gradients of all predictions: one matrix per device and dtype, one row each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mtenn_core._engine.autograd_nodes import is_batched
from mtenn_core._engine.precision import at_least_float32, no_autocast
from mtenn_core._torch_internals import graph_is_retained

Params = Mapping[str, Tensor]
# The parameters of one matrix, in the order of the columns.
Layout = Mapping[str, tuple[torch.Size, torch.dtype]]
Key = tuple[torch.device, torch.dtype]
Spare = dict[Key, torch.UntypedStorage]

# Memory that no graph needs any more, kept for the next call. Fresh memory would take five times as
# long to fill, because the operating system provides each page at the first write.
_SPARE: WeakKeyDictionary[torch.nn.Module, Spare] = WeakKeyDictionary()


def forget_memory(pose_model: torch.nn.Module) -> None:
    """Free the memory that is kept for the next call of a pose model."""
    _SPARE.pop(pose_model, None)


class GradientBuffer(NamedTuple):
    """The gradients of all poses, for the parameters of one device and dtype.

    Attributes
    ----------
    layout : name, shape and dtype of each parameter, in the order of the columns
    matrix : shape (n_rows, n_columns). Each prediction has one row, and each parameter one column
        per entry.
    """

    layout: Layout
    matrix: Tensor


Memory = tuple[Spare, list[GradientBuffer]]


def allocate(
    pose_model: torch.nn.Module, params: Params, n_poses: int, n_predictions: int
) -> Memory:
    """Return memory for the next call of a pose model, and uninitialized buffers for this call.

    The buffers use the memory of earlier calls first.

    Parameters
    ----------
    n_predictions : the number of predictions per pose; each has its own gradient
    """
    spare = _SPARE.setdefault(pose_model, {})
    n_rows = n_poses * n_predictions
    # With one matrix per device and dtype, a sum over poses is a product of a vector and a matrix.
    layouts: dict[Key, dict[str, tuple[torch.Size, torch.dtype]]] = {}
    for name, param in params.items():
        key = param.device, at_least_float32(param.dtype)
        layouts.setdefault(key, {})[name] = (param.shape, param.dtype)
    return spare, [
        GradientBuffer(layout, _matrix(spare, key, n_rows, layout))
        for key, layout in layouts.items()
    ]


def _matrix(spare: Spare, key: Key, n_rows: int, layout: Layout) -> Tensor:
    device, dtype = key
    n_columns = sum(shape.numel() for shape, _ in layout.values())
    fresh = torch.empty(0, dtype=dtype, device=device)
    storage = spare.pop(key, None)
    if storage is None or storage.nbytes() < n_rows * n_columns * dtype.itemsize:
        return fresh.resize_(n_rows, n_columns)
    return fresh.set_(storage, 0, (n_rows, n_columns), (n_columns, 1))


def split_columns(rows: Tensor, layout: Layout) -> dict[str, Tensor]:
    """Split the columns by parameter: shape (..., n_columns) gives {name: (..., *shape)}."""
    parts = rows.split([shape.numel() for shape, _ in layout.values()], dim=-1)
    return {
        name: part.view((*rows.shape[:-1], *shape)).to(dtype)
        for (name, (shape, dtype)), part in zip(layout.items(), parts, strict=True)
    }


def weighted_sum(
    weights: Tensor,
    matrices: Sequence[Tensor],
    *,
    layouts: Sequence[Layout],
    names: Sequence[str],
    spare: Spare,
) -> list[Tensor]:
    """Return the weighted sum of the rows of all matrices, as one gradient per parameter.

    Parameters
    ----------
    weights : shape (n_rows,), or the shape of the predictions whose gradients are the rows
    matrices, layouts : the matrix and the layout of each buffer
    names : the names of the parameters; the gradients are returned in this order
    spare : receives the memory of the matrices after backward has used them
    """
    sums: dict[str, Tensor] = {}
    if weights.dim() > 1:
        weights = weights.reshape(-1)
    for matrix, layout in zip(matrices, layouts, strict=True):
        sums |= split_columns(_product(weights.to(matrix.device, matrix.dtype), matrix), layout)
        # Keep memory only on a CPU, because the allocator of an accelerator itself keeps memory.
        # With retain_graph, keep none, because another backward may read the matrix.
        if matrix.device.type == "cpu" and not graph_is_retained():
            spare[matrix.device, matrix.dtype] = matrix.untyped_storage()
    return [sums[name] for name in names]


def _product(weights: Tensor, matrix: Tensor) -> Tensor:
    """Return Σ_i w_i row_i over rows with nonzero weight, because 0 · inf would be NaN."""
    with no_autocast(weights.device.type):
        if is_batched(weights):  # its values cannot be read
            return weights @ matrix
        with_weight = weights != 0
        n_with_weight = int(with_weight.sum())
        # To copy a row and read the copy takes three times as long as to read the row.
        if 3 * n_with_weight > len(weights):
            product = weights @ matrix
            if n_with_weight == len(weights) or product.isfinite().all():
                return product
        return weights[with_weight] @ matrix[with_weight]
