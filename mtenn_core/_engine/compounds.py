"""Combine the poses of many compounds: those with equal numbers of poses in one batch."""

from __future__ import annotations

import copy
import math
import warnings
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mtenn_core._engine.autograd_nodes import current_transform, forward_ad_level, versions_of
from mtenn_core._engine.declarations import overrides
from mtenn_core._engine.evaluation import (
    PoseGradients,
    PoseInputs,
    combined_prediction,
    full_depth_prediction,
    pose_weights,
)
from mtenn_core._engine.plain_attributes import PlainAttributes
from mtenn_core.combination import Combination

# Below this number of compounds, a loop takes as long as one call of torch.func.vmap.
SMALLEST_BATCH = 3

# For each combination, whether vmap gives the numbers of a loop. Found out at the first batch.
_BATCHABLE: WeakKeyDictionary[Combination, bool] = WeakKeyDictionary()

Rows = tuple[Tensor, PoseInputs]
Function = Callable[[Combination, Tensor, PoseInputs], Tensor]


class Batches(NamedTuple):
    """The numbers of all poses, in one batch for each number of poses.

    Attributes
    ----------
    rows : for each batch, predictions and pose inputs, shape (n_compounds, n_poses)
    compounds, poses : for each compound and each pose in the batches, its place in the call. None
        if the batches have the order of the call
    """

    rows: Sequence[Rows]
    compounds: Tensor | None
    poses: Tensor | None


def combine_compounds(
    combination: Combination,
    predictions: Tensor,
    inputs: PoseInputs,
    sizes: list[int],
    *,
    closed_form: bool,
) -> Tensor:
    """Return the combined prediction of each compound, shape (n_compounds,).

    Parameters
    ----------
    predictions, inputs : the numbers of all poses, shape (n_poses,)
    sizes : the number of poses of each compound
    closed_form : see :func:`~mtenn_core._engine.evaluation.combined_prediction`
    """
    function = partial(combined_prediction, closed_form=closed_form)
    batches = batches_by_size(predictions, inputs, sizes)
    values = torch.cat([_batch_or_loop(function, combination, *rows) for rows in batches.rows])
    return _in_call_order(values, batches.compounds)


def combine_full_depth(
    combination: Combination,
    predictions: Tensor,
    inputs: PoseInputs,
    sizes: list[int],
    gradients: Sequence[PoseGradients],
) -> Tensor:
    """Return the combined prediction of each compound with a ``forward`` of its own.

    Parameters
    ----------
    gradients : the gradients of each compound
    """
    columns = zip(*(numbers.split(sizes) for numbers in inputs.values()), strict=True)
    of_compounds = columns if inputs else [()] * len(sizes)
    values = [
        full_depth_prediction(
            combination,
            list(own),
            of_compound.grad_dict(),
            list(of_compound.params),
            *of_compound.params.values(),
            **dict(zip(inputs, own_inputs, strict=True)),
        )
        for own, own_inputs, of_compound in zip(
            predictions.detach().split(sizes), of_compounds, gradients, strict=True
        )
    ]
    return torch.stack(values)


def weights_of_compounds(
    combination: Combination, predictions: Tensor, inputs: PoseInputs, sizes: list[int]
) -> Tensor:
    """Return the pose weights of all compounds, shape (n_poses,), without a graph.

    Parameters
    ----------
    predictions, inputs, sizes : as for :func:`combine_compounds`
    """
    batches = batches_by_size(predictions.detach(), inputs, sizes)
    with torch.no_grad():
        parts = [_batch_or_loop(pose_weights, combination, *rows) for rows in batches.rows]
        return _in_call_order(torch.cat([part.flatten() for part in parts]), batches.poses)


def batches_by_size(predictions: Tensor, inputs: PoseInputs, sizes: list[int]) -> Batches:
    """Return all poses, in one batch of compounds for each number of poses.

    Parameters
    ----------
    predictions, inputs, sizes : as for :func:`combine_compounds`
    """
    n_compounds, n_poses = len(sizes), sizes[0]
    if sizes.count(n_poses) == n_compounds:
        shape = n_compounds, n_poses
        own_inputs = {name: numbers.view(shape) for name, numbers in inputs.items()}
        return Batches([(predictions.view(shape), own_inputs)], None, None)
    in_call = torch.frombuffer(array("q", sizes), dtype=torch.int64)  # faster than torch.tensor
    in_order, order = in_call.sort(stable=True)
    starts = (in_call.cumsum(0) - in_call)[order]
    sizes_of_batches, counts = in_order.unique_consecutive(return_counts=True)
    shapes = list(zip(counts.tolist(), sizes_of_batches.tolist(), strict=True))
    first = 0
    poses_of_batches = []
    for n_compounds, n_poses in shapes:
        firsts = starts[first : first + n_compounds]
        poses_of_batches.append((firsts[:, None] + torch.arange(n_poses)).flatten())
        first += n_compounds
    poses = torch.cat(poses_of_batches).to(predictions.device)
    columns = [_split(numbers, poses, shapes) for numbers in (predictions, *inputs.values())]
    rows = [
        (own, dict(zip(inputs, of_inputs, strict=True)))
        for own, *of_inputs in zip(*columns, strict=True)
    ]
    return Batches(rows, order, poses)


def _split(numbers: Tensor, poses: Tensor, shapes: list[tuple[int, int]]) -> Iterator[Tensor]:
    parts = numbers.index_select(0, poses).split([math.prod(shape) for shape in shapes])
    return (part.view(shape) for part, shape in zip(parts, shapes, strict=True))


def _in_call_order(numbers: Tensor, places: Tensor | None) -> Tensor:
    """Return numbers of batches in the order of the call, where entry i has the place places[i]."""
    if places is None:
        return numbers
    inverse = torch.empty_like(places).scatter_(0, places, torch.arange(len(places)).to(places))
    return numbers.index_select(0, inverse.to(numbers.device))


def _batch_or_loop(
    function: Function, combination: Combination, predictions: Tensor, inputs: PoseInputs
) -> Tensor:
    """Return the results of a function for the compounds of a batch, one row for each.

    The function runs on the whole batch if the combination can do so, else on each row.

    Parameters
    ----------
    predictions, inputs : shape (n_compounds, n_poses)
    """
    if len(predictions) >= SMALLEST_BATCH and runs_in_batches(combination, predictions, inputs):
        try:
            return function(combination, predictions, inputs)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # for example, control flow that depends on these numbers
            rows = _loop(function, combination, predictions, inputs)  # or the author's error
            _BATCHABLE[combination] = False
            return rows
    return _loop(function, combination, predictions, inputs)


def _loop(
    function: Function, combination: Combination, predictions: Tensor, inputs: PoseInputs
) -> Tensor:
    columns = zip(*inputs.values(), strict=True) if inputs else [()] * len(predictions)
    return torch.stack(
        [
            function(combination, row, dict(zip(inputs, of_row, strict=True)))
            for row, of_row in zip(predictions, columns, strict=True)
        ]
    )


def runs_in_batches(combination: Combination, predictions: Tensor, inputs: PoseInputs) -> bool:
    """Return whether a batch of compounds gives the numbers of a loop over them.

    At the first call, a copy of the combination runs on three compounds in both ways. A class
    cannot run in batches if it is stochastic, if it writes attributes or buffers, or if vmap does
    not support it, as with control flow that depends on numbers.

    Parameters
    ----------
    predictions, inputs : shape (n_compounds, n_poses)
    """
    known = _BATCHABLE.get(combination)
    if known is not None:
        return known
    if current_transform() is not None or forward_ad_level() >= 0 or predictions.is_meta:
        return False  # not now: the numbers cannot be compared
    some = [0, -1, 0]  # if a call changes the next one, the third differs from the first
    with torch.inference_mode(False), torch.no_grad():
        rows = predictions.detach()[some], {name: n.detach()[some] for name, n in inputs.items()}
    _BATCHABLE[combination] = _agree_with_loop(combination, *rows)
    return _BATCHABLE[combination]


def _agree_with_loop(combination: Combination, predictions: Tensor, inputs: PoseInputs) -> bool:
    """Return whether values and derivatives from a batch are those of a loop."""
    if combination.stochastic or not overrides(type(combination), "combine"):
        return False
    try:
        with warnings.catch_warnings():
            # An operation without a batching rule warns in each call.
            warnings.simplefilter("error")
            batch = _on_a_copy(combination, predictions, inputs, by_row=False)
        loop = _on_a_copy(combination, predictions, inputs, by_row=True)
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return False
    size = float(predictions.abs().amax())
    return all(map(partial(_close, size=0.0), batch.weights, loop.weights)) and all(
        map(partial(_close, size=size), batch.others, loop.others)
    )


class _Results(NamedTuple):
    """Results for a few compounds.

    Attributes
    ----------
    weights : the pose weights, from ``pose_weights`` and from autograd
    others : values, and gradients of the combination's own parameters
    """

    weights: list[Tensor]
    others: list[Tensor]


def _on_a_copy(
    combination: Combination, predictions: Tensor, inputs: PoseInputs, *, by_row: bool
) -> _Results:
    """Return the results of a copy of a combination, row by row or from one batch.

    Raises
    ------
    RuntimeError : the combination changed an attribute or a buffer
    """
    combination = copy.deepcopy(combination)  # a tensor of vmap must not stay on the original
    attributes = PlainAttributes(combination.modules())
    buffers = dict(combination.named_buffers())
    state = _state(buffers)
    results = _Results([], [])
    own = [param for param in combination.parameters() if param.requires_grad]
    with torch.inference_mode(False), torch.enable_grad():
        for closed_form in (True, False):
            function = partial(combined_prediction, closed_form=closed_form)
            run = partial(_loop, function) if by_row else function
            y = predictions.clone().requires_grad_()
            values = run(combination, y, inputs)
            go = torch.arange(1, len(values) + 1).to(values)
            weights, *gradients = torch.autograd.grad(values, [y, *own], go, allow_unused=True)
            results.weights.append(weights)
            results.others.extend([values, *(g for g in gradients if g is not None)])
    if attributes.move() or _state(dict(combination.named_buffers())) != state:
        raise RuntimeError("the combination has a state")
    return results


def _state(buffers: Mapping[str, Tensor]) -> list[tuple[str, int, int]]:
    return list(zip(buffers, map(id, buffers.values()), versions_of(buffers.values()), strict=True))


def _close(batch: Tensor, loop: Tensor, size: float) -> bool:
    """Return whether two results agree to half of their digits.

    A batch may add numbers in another order. A wrong rule for vmap gives other numbers altogether.

    Parameters
    ----------
    size : the size of the numbers that were added
    """
    largest = float(loop.abs().nan_to_num(0.0, 0.0, 0.0).amax())
    tolerance = torch.finfo(loop.dtype).eps ** 0.5 * (largest + size)
    return torch.allclose(batch, loop, rtol=0, atol=tolerance, equal_nan=True)
