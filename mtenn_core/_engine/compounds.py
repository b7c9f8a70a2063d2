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
from mtenn_core._process.printable import error_text
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
    results = _from_batches(function, combination, predictions, inputs, sizes)
    if results is not None:
        values, batches = results
        return _in_call_order(torch.cat(values), batches.compounds)
    return torch.stack(_from_loop(function, combination, predictions, inputs, sizes))


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


def weights_of_compounds(
    combination: Combination, predictions: Tensor, inputs: PoseInputs, sizes: list[int]
) -> Tensor:
    """Return the pose weights of all compounds, shape (n_poses,), without a graph.

    Parameters
    ----------
    predictions, inputs, sizes : as for :func:`combine_compounds`
    """
    given = pose_weights, combination, predictions.detach(), inputs, sizes
    results = _from_batches(*given)
    if results is not None:
        weights, batches = results
        return _in_call_order(torch.cat([rows.flatten() for rows in weights]), batches.poses)
    return torch.cat(_from_loop(*given))


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
    if len(sizes) < SMALLEST_BATCH or _BATCHABLE.get(combination) is False:
        return None
    batches = batches_by_size(predictions, inputs, sizes)
    largest = max(batches.rows, key=lambda rows: len(rows[0]))
    if len(largest[0]) < SMALLEST_BATCH or not runs_in_batches(combination, *largest):
        return None
    try:
        return [function(combination, *rows) for rows in batches.rows], batches
    except torch.OutOfMemoryError:
        raise
    except Exception:  # control flow that depends on these numbers, or the author's error
        _BATCHABLE[combination] = False
        return None


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


def runs_in_batches(combination: Combination, predictions: Tensor, inputs: PoseInputs) -> bool:
    """Return whether a batch of compounds gives the numbers of a loop over them.

    At the first call, a copy of the combination runs on three compounds in both ways.

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
    try:
        same = not first_difference(combination, *rows)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # an error of the author shows in the loop, and names its compound
        same = False
    _BATCHABLE[combination] = same
    return same


class CannotBatchError(Exception):
    """A combination cannot run in batches. The message is the reason."""


def first_difference(combination: Combination, predictions: Tensor, inputs: PoseInputs) -> str:
    """Return what differs between a batch of compounds and a loop over them; "" if nothing does.

    Two numbers are equal if half of their digits are. A batch may add numbers in another order, but
    a wrong rule for vmap gives other numbers altogether.

    Parameters
    ----------
    predictions, inputs : shape (n_compounds, n_poses)

    Raises
    ------
    CannotBatchError : the combination is stochastic, or it changes attributes or buffers, or vmap
        does not support it, as with control flow that depends on numbers
    """
    if combination.stochastic:
        raise CannotBatchError("it is stochastic")
    if not overrides(type(combination), "combine"):
        raise CannotBatchError("it has no combine")
    try:
        # An operation without a rule for vmap warns in each call.
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            batch = _results_of_copy(_from_batch, combination, predictions, inputs)
    except (CannotBatchError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise CannotBatchError(f"torch.func.vmap cannot run it: {error_text(error)}") from error
    if warned:
        raise CannotBatchError(f"torch.func.vmap warns: {warned[0].message}")
    loop = _results_of_copy(_from_rows, combination, predictions, inputs)
    size = float(predictions.abs().amax())
    for what, expected in loop.items():
        # Weights have no unit. The other numbers have at least the roundoff of the predictions.
        if not _close(batch[what], expected, 0.0 if what in _WEIGHTS else size):
            return what
    return ""


_WEIGHTS = ("pose weights", "derivative of combine")


def _results_of_copy(
    run: Callable[..., Tensor], combination: Combination, predictions: Tensor, inputs: PoseInputs
) -> dict[str, Tensor]:
    """Return values and derivatives for some compounds, by their names.

    Parameters
    ----------
    run : :func:`_from_batch` or :func:`_from_rows`
    """
    combination = copy.deepcopy(combination)  # a tensor of vmap must not stay on the original
    attributes = PlainAttributes(combination.modules())
    buffers = dict(combination.named_buffers())
    state = _state(buffers)
    own = {name: param for name, param in combination.named_parameters() if param.requires_grad}
    results = {}
    with torch.inference_mode(False), torch.enable_grad():
        for closed_form, name_of_weights in zip((True, False), _WEIGHTS, strict=True):
            function = partial(combined_prediction, closed_form=closed_form)
            y = predictions.clone().requires_grad_()
            values = run(function, combination, y, inputs)
            # Not as grad_outputs: torch would import sympy to compare the shapes, half a second.
            loss = (torch.arange(1, len(values) + 1).to(values) * values).sum()
            gradients = torch.autograd.grad(loss, [y, *own.values()], allow_unused=True)
            results["value"] = values.detach()
            names = [name_of_weights, *(f"gradient of {name!r}" for name in own)]
            results |= {n: g for n, g in zip(names, gradients, strict=True) if g is not None}
    if attributes.move() or _state(dict(combination.named_buffers())) != state:
        raise CannotBatchError("a call changes its attributes or buffers")
    return results


def _from_batch(
    function: Function, combination: Combination, predictions: Tensor, inputs: PoseInputs
) -> Tensor:
    return function(combination, predictions, inputs)


def _from_rows(
    function: Function, combination: Combination, predictions: Tensor, inputs: PoseInputs
) -> Tensor:
    rows = zip(predictions, *inputs.values(), strict=True)
    return torch.stack(
        [function(combination, y, dict(zip(inputs, own, strict=True))) for y, *own in rows]
    )


def _state(buffers: Mapping[str, Tensor]) -> list[tuple[str, int, int]]:
    return list(zip(buffers, map(id, buffers.values()), versions_of(buffers.values()), strict=True))


def _close(found: Tensor, expected: Tensor, size: float) -> bool:
    largest = float(expected.abs().nan_to_num(0.0, 0.0, 0.0).amax())
    tolerance = torch.finfo(expected.dtype).eps ** 0.5 * (largest + size)
    return torch.allclose(found, expected, rtol=0, atol=tolerance, equal_nan=True)
