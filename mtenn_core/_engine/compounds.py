"""Combine the poses of many compounds: those with equal numbers of poses in one batch."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mtenn_core._engine.batch_probe import from_rows
from mtenn_core._engine.batchable import Rows, attributes_unchanged, batchability
from mtenn_core._engine.declarations import overrides
from mtenn_core._engine.evaluation import (
    PoseGradients,
    PoseInputs,
    combined_prediction,
    full_depth_prediction,
    pose_weights,
)
from mtenn_core.combination import Combination
from mtenn_core.errors import CombinationContractError

# A loop over fewer compounds takes as long as a batch.
SMALLEST_BATCH = 3
# A batch has at most so many pairs of poses, counted in each column.
LARGEST_BATCH = 2**24

Function = Callable[[Combination, Tensor, PoseInputs], Tensor]


class Batches(NamedTuple):
    """The numbers of all poses, in one batch for each number of poses.

    Attributes
    ----------
    rows : for each batch, predictions and pose inputs, shape (n_compounds, n_poses); predictions
        with columns have these as one more dimension
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
    """Return the combined prediction of each compound, shape (n_compounds,) or (n_compounds, n).

    Parameters
    ----------
    predictions, inputs : the numbers of all poses, shape (n_poses,). Predictions have shape
        (n_poses, n_columns) if the combination declares columns.
    sizes : the number of poses of each compound
    closed_form : see :func:`~mtenn_core._engine.evaluation.combined_prediction`
    """
    function = partial(combined_prediction, closed_form=closed_form)
    results = _from_batches(function, combination, predictions, inputs, sizes)
    if results is not None:
        values, batches = results
        _check_same([own[0] for own in values], combination)
        return _in_call_order(torch.cat(values), batches.compounds)
    values = _from_loop(function, combination, predictions, inputs, sizes)
    _check_same(values, combination)
    return torch.stack(values)


def _check_same(values: Sequence[Tensor], combination: Combination) -> None:
    """Raise an error if the values of two compounds have different shapes."""
    shapes = {tuple(value.shape): None for value in values}
    if len(shapes) > 1:
        raise CombinationContractError(
            f"{type(combination).__name__} must return the same shape for every compound; found"
            f" {' and '.join(map(str, shapes))}"
        )


def combine_tasks(
    combinations: Sequence[Combination],
    predictions: Tensor,
    inputs: PoseInputs,
    sizes: list[int],
    gradients: Sequence[PoseGradients] | None,
    *,
    closed_form: bool,
) -> Tensor:
    """Return the combined prediction of each compound for each task, shape (n_compounds, n_tasks).

    Parameters
    ----------
    combinations : one combination for all tasks, or one for each
    predictions : shape (n_poses, n_tasks)
    inputs, sizes : as for :func:`combine_compounds`
    gradients : the gradients of each compound if a combination overrides ``forward``; those of the
        first task come first
    """
    values: list[Tensor] = []
    for combination, own, own_inputs, own_sizes in _by_task(
        combinations, predictions, inputs, sizes
    ):
        given = combination, own, own_inputs, own_sizes
        if gradients is not None and overrides(type(combination), "forward"):
            first = len(sizes) * len(values)
            own_gradients = gradients[first : first + len(own_sizes)]
            values.append(combine_full_depth(*given, own_gradients))
        else:
            values.append(combine_compounds(*given, closed_form=closed_form))
    return torch.cat(values).view(-1, len(sizes)).T.contiguous()


def _by_task(
    combinations: Sequence[Combination], predictions: Tensor, inputs: PoseInputs, sizes: list[int]
) -> Iterator[tuple[Combination, Tensor, PoseInputs, list[int]]]:
    """Yield each combination with the numbers of its tasks. A task's compounds are compounds."""
    n_tasks = predictions.shape[1]
    if len(combinations) == 1:
        repeated = {name: numbers.repeat(n_tasks) for name, numbers in inputs.items()}
        yield combinations[0], predictions.T.flatten(), repeated, sizes * n_tasks
        return
    # contiguous makes a copy, which a combination may not change unnoticed, either
    columns = predictions.T.contiguous().unbind()
    for combination, own in zip(combinations, columns, strict=True):
        yield combination, own, {name: inputs[name] for name in combination.pose_inputs}, sizes


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
    values = [
        full_depth_prediction(
            combination,
            list(own),
            of_compound.grad_dict(),
            list(of_compound.params),
            *of_compound.params.values(),
            **own_inputs,
        )
        for (own, own_inputs), of_compound in zip(
            _by_compound(predictions.detach(), inputs, sizes), gradients, strict=True
        )
    ]
    return torch.stack(values)


def combine_without_gradients(
    combination: Combination, predictions: Tensor, inputs: PoseInputs, sizes: list[int]
) -> Tensor:
    """Return the combined prediction of each compound, for known numbers at any depth.

    Parameters
    ----------
    predictions, inputs, sizes : as for :func:`combine_compounds`
    """
    if overrides(type(combination), "combine"):
        return combine_compounds(combination, predictions, inputs, sizes, closed_form=True)
    # It defines only forward, which gets no parameters here.
    no_gradients = [PoseGradients({}, dict)] * len(sizes)
    return combine_full_depth(combination, predictions, inputs, sizes, no_gradients)


def weights_of_compounds(
    combination: Combination, predictions: Tensor, inputs: PoseInputs, sizes: list[int]
) -> Tensor:
    """Return the pose weights of all compounds, in the shape of ``predictions``, without a graph.

    Parameters
    ----------
    predictions, inputs, sizes : as for :func:`combine_compounds`
    """
    given = pose_weights, combination, predictions.detach(), inputs, sizes
    results = _from_batches(*given)
    if results is not None:
        weights, batches = results
        return _in_call_order(torch.cat([rows.flatten(0, 1) for rows in weights]), batches.poses)
    return torch.cat(_from_loop(*given))


def weights_of_tasks(
    combinations: Sequence[Combination], predictions: Tensor, inputs: PoseInputs, sizes: list[int]
) -> Tensor:
    """Return the pose weights of all compounds for each task, shape (n_poses, n_tasks).

    Parameters
    ----------
    combinations, predictions, inputs, sizes : as for :func:`combine_tasks`
    """
    weights = [
        weights_of_compounds(*given)
        for given in _by_task(combinations, predictions.detach(), inputs, sizes)
    ]
    return torch.cat(weights).view(-1, len(predictions)).T.contiguous()


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
        return Batches([(predictions.view(shape + predictions.shape[1:]), own_inputs)], None, None)
    in_call = torch.frombuffer(array("q", sizes), dtype=torch.int64)  # faster than torch.tensor
    in_order, order = in_call.sort(stable=True)
    starts = (in_call.cumsum(0) - in_call)[order]
    sizes_of_batches, counts = in_order.unique_consecutive(return_counts=True)
    shapes = list(zip(counts.tolist(), sizes_of_batches.tolist(), strict=True))
    first = 0
    poses_of_batches = []
    for n_compounds, n_poses in shapes:
        firsts = starts[first : first + n_compounds]
        poses_of_batches.append((firsts[:, None] + torch.arange(n_poses, device="cpu")).flatten())
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
    columns = numbers.shape[1:]
    return (part.view(shape + columns) for part, shape in zip(parts, shapes, strict=True))


def _in_call_order(numbers: Tensor, places: Tensor | None) -> Tensor:
    """Return numbers in the order of the call. There, entry i has the place ``places[i]``."""
    if places is None:
        return numbers
    inverse = torch.empty_like(places).scatter_(
        0, places, torch.arange(len(places), device=places.device)
    )
    return numbers.index_select(0, inverse.to(numbers.device))


def _from_batches(
    function: Function,
    combination: Combination,
    predictions: Tensor,
    inputs: PoseInputs,
    sizes: list[int],
) -> tuple[list[Tensor], Batches] | None:
    """Return the results of a function for each batch of compounds, and the batches.

    Return None if a loop over the compounds is as fast, or if the combination cannot take batches.
    """
    if len(sizes) < SMALLEST_BATCH:
        return None
    known = batchability(combination)
    verdict = known.verdict(combination, inputs)
    if verdict is False:
        return None
    batches = batches_by_size(predictions, inputs, sizes)
    if max(len(rows) for rows, _ in batches.rows) < SMALLEST_BATCH:
        return None
    # The last batch has the most poses, which show the most.
    if verdict is None and not known.find_out(combination, batches.rows[-1]):
        return None
    try:
        for rows in batches.rows:
            known.warm_up(combination, rows)
        with attributes_unchanged(combination):
            return [_of_batch(function, combination, *rows) for rows in batches.rows], batches
    except torch.OutOfMemoryError:  # a loop needs less
        return None
    except CombinationContractError:  # a loop would raise it, too
        raise
    except Exception:  # control flow that depends on these numbers, or the author's error
        known.note(combination, verdict=False)
        return None


def _of_batch(
    function: Function, combination: Combination, predictions: Tensor, inputs: PoseInputs
) -> Tensor:
    """Return the results of a function for the compounds of a batch, in the fastest way."""
    if len(predictions) < SMALLEST_BATCH:
        return from_rows(function, combination, predictions, inputs)
    # A combination may compare all poses with one another, in each column.
    n_pairs = predictions.shape[1] ** 2 * predictions.shape[2:].numel()
    most = max(SMALLEST_BATCH, LARGEST_BATCH // n_pairs)
    if len(predictions) <= most:
        return function(combination, predictions, inputs)
    columns = zip(
        *(numbers.split(most) for numbers in (predictions, *inputs.values())), strict=True
    )
    return torch.cat(
        [function(combination, y, dict(zip(inputs, own, strict=True))) for y, *own in columns]
    )


def _from_loop(
    function: Function,
    combination: Combination,
    predictions: Tensor,
    inputs: PoseInputs,
    sizes: list[int],
) -> list[Tensor]:
    """Return the result of a function for each compound."""
    return [function(combination, *own) for own in _by_compound(predictions, inputs, sizes)]


def _by_compound(
    predictions: Tensor, inputs: PoseInputs, sizes: list[int]
) -> Iterator[tuple[Tensor, PoseInputs]]:
    """Return a pair for each compound: its predictions and its pose inputs."""
    if not inputs:
        return zip(predictions.split(sizes), [{} for _ in sizes], strict=True)
    columns = zip(*(numbers.split(sizes) for numbers in inputs.values()), strict=True)
    own = [dict(zip(inputs, parts, strict=True)) for parts in columns]
    return zip(predictions.split(sizes), own, strict=True)
