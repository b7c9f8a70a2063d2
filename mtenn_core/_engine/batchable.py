"""Compare a batch of compounds with a loop over them, to decide how a combination runs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mtenn_core._engine.autograd_nodes import (
    current_transform,
    forward_ad_level,
    version_of,
    versions_of,
)
from mtenn_core._engine.declarations import overrides
from mtenn_core._engine.evaluation import PoseInputs, combined_prediction
from mtenn_core._engine.plain_attributes import PlainAttributes
from mtenn_core._process.printable import error_text
from mtenn_core.combination import Combination

# For each combination, in training and in evaluation, whether it can run in batches.
_KNOWN: WeakKeyDictionary[Combination, dict[bool, bool]] = WeakKeyDictionary()


class CannotBatchError(Exception):
    """A combination cannot run in batches. The message is the reason."""


def runs_in_batches(combination: Combination, predictions: Tensor, inputs: PoseInputs) -> bool:
    """Return whether a batch of compounds gives the numbers of a loop over them.

    At the first call, a copy of the combination runs on three compounds in both ways.

    Parameters
    ----------
    predictions, inputs : shape (n_compounds, n_poses)
    """
    known = is_batchable(combination)
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
    note_batchable(combination, same)
    return same


def is_batchable(combination: Combination) -> bool | None:
    """Return whether a combination can run in batches; None if it is not known yet."""
    return _KNOWN.get(combination, {}).get(combination.training)


def note_batchable(combination: Combination, batchable: bool) -> None:
    """Note whether a combination can run in batches."""
    _KNOWN.setdefault(combination, {})[combination.training] = batchable


@contextmanager
def attributes_unchanged(combination: Combination) -> Iterator[None]:
    """Raise a CannotBatchError at the end of a block that has set attributes, and put them back.

    A combination may begin to set attributes after its first batch, for example for a log. A tensor
    that vmap has made cannot be used outside of the block.
    """
    before = [(module.__dict__, dict(module.__dict__)) for module in combination.modules()]
    try:
        yield
    finally:
        changed = [pair for pair in before if not _same_objects(*pair)]
        for attributes, old in changed:
            attributes.clear()
            attributes.update(old)
    if changed:
        raise CannotBatchError("a call changes its attributes")


def _same_objects(now: dict[str, Any], before: dict[str, Any]) -> bool:
    return now.keys() == before.keys() and all(now[name] is before[name] for name in before)


def first_difference(combination: Combination, predictions: Tensor, inputs: PoseInputs) -> str:
    """Return the name of the numbers that differ between a batch and a loop; "" if none do.

    Numbers count as equal if the first half of their digits is equal. A batch may add numbers in
    another order, but a wrong rule for vmap gives other numbers altogether.

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
    loop = _results_of_copy(from_rows, combination, predictions, inputs)
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
    run : :func:`_from_batch` or :func:`from_rows`
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
            given = y.clone()
            values = run(function, combination, given, inputs)
            if version_of(given):
                raise CannotBatchError("it changes the predictions in place")
            # Not as grad_outputs: torch would import sympy to compare the shapes, half a second.
            loss = (torch.arange(1, len(values) + 1, device=values.device) * values).sum()
            gradients = torch.autograd.grad(loss, [y, *own.values()], allow_unused=True)
            results["value"] = values.detach()
            names = [name_of_weights, *(f"gradient of {name!r}" for name in own)]
            results |= {n: g for n, g in zip(names, gradients, strict=True) if g is not None}
    if attributes.move() or _state(dict(combination.named_buffers())) != state:
        raise CannotBatchError("a call changes its attributes or buffers")
    return results


def _from_batch(
    function: Callable[..., Tensor],
    combination: Combination,
    predictions: Tensor,
    inputs: PoseInputs,
) -> Tensor:
    return function(combination, predictions, inputs)


def from_rows(
    function: Callable[..., Tensor],
    combination: Combination,
    predictions: Tensor,
    inputs: PoseInputs,
) -> Tensor:
    """Return the results of a function for some compounds, one after the other."""
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
