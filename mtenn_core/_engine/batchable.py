"""Whether a combination can run in batches of compounds: what is known, and until when."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mtenn_core._engine.batch_probe import CannotBatchError, check_can_batch, from_rows
from mtenn_core._engine.evaluation import NO_INPUTS, PoseInputs, combined_prediction
from mtenn_core._torch_internals import (
    buffers_of,
    current_transform,
    forward_ad_level,
    parameters_of,
)
from mtenn_core.combination import Combination

Rows = tuple[Tensor, PoseInputs]

# A combination that counts its calls would be compared again in each of them.
MOST_REFUSALS = 3
_CONTAINERS = (list, dict, set, deque, tuple)


class Batchability:
    """Whether one combination can run in batches.

    This holds until an attribute of the combination changes, and after three refusals for good. The
    first batch compares copies of the combination, which takes about 10 ms.

    Parameters
    ----------
    combination : the combination, which this object does not keep alive
    """

    def __init__(self, combination: Combination) -> None:
        self._combination = weakref.ref(combination)
        self._key: Any = None
        self._verdict: bool | None = None
        self._n_refusals = 0
        self._learned: frozenset[str] = frozenset()
        self._warm: set[tuple[torch.Size, torch.dtype, torch.device]] = set()

    def belongs_to(self, combination: Combination) -> bool:
        """Return whether this object is that of a combination, by identity."""
        return self._combination() is combination

    def verdict(self, combination: Combination, inputs: PoseInputs = NO_INPUTS) -> bool | None:
        """Return whether the combination can run in batches; None if it must be found out."""
        if self._n_refusals >= MOST_REFUSALS:
            return False
        if self._verdict and not _learned(inputs) <= self._learned:
            return None
        return self._verdict if self._key == _attributes(combination) else None

    def note(self, combination: Combination, verdict: bool) -> None:
        """Note whether the combination can run in batches."""
        self._key, self._verdict = _attributes(combination), verdict
        self._n_refusals += not verdict

    def find_out(self, combination: Combination, rows: Rows) -> bool:
        """Compare a batch with a loop, and return whether they agree.

        Parameters
        ----------
        rows : predictions and pose inputs of some compounds, shape (n_compounds, n_poses, …)
        """
        predictions, inputs = rows
        if current_transform() is not None or forward_ad_level() >= 0 or predictions.is_meta:
            return False  # not now: the numbers cannot be compared
        with torch.inference_mode(False), torch.no_grad():
            some = _some(predictions)
            own_inputs = {
                name: _some(numbers).requires_grad_(numbers.requires_grad)
                for name, numbers in inputs.items()
            }
        if not some.isfinite().any():
            return False  # nothing to compare
        try:
            check_can_batch(combination, some, own_inputs)
        except CannotBatchError:
            self.note(combination, verdict=False)
            return False
        except Exception:  # an error of the author, which the loop raises again
            return False
        self.note(combination, verdict=True)
        self._learned = _learned(inputs)
        return True

    def warm_up(self, combination: Combination, rows: Rows) -> None:
        """Run one compound alone if its number of poses is new.

        The combination may keep tensors in a cache by number of poses. They must not be those that
        vmap makes, which no later call can use.
        """
        predictions, inputs = rows
        key = predictions.shape[1:], predictions.dtype, predictions.device
        if key not in self._warm:
            with torch.no_grad():
                from_rows(combined_prediction, combination, predictions[:1], _first(inputs))
            self._warm.add(key)


def _some(rows: Tensor) -> Tensor:
    """Return three rows. If a row has one pose, make rows of four, because one shows too little."""
    if rows.shape[1] > 1:
        return rows.detach()[[0, len(rows) // 2, -1]]
    places = torch.arange(12, device=rows.device) % len(rows)
    return rows.detach()[places, 0].unflatten(0, (3, 4))


def _learned(inputs: PoseInputs) -> frozenset[str]:
    """Return the names of the inputs that require a gradient."""
    return frozenset(name for name, numbers in inputs.items() if numbers.requires_grad)


def _first(inputs: PoseInputs) -> dict[str, Tensor]:
    return {name: numbers[:1] for name, numbers in inputs.items()}


# By id, because a combination may define __eq__.
_KNOWN: dict[int, Batchability] = {}


def batchability(combination: Combination) -> Batchability:
    """Return the object that knows whether a combination can run in batches."""
    known = _KNOWN.get(id(combination))
    if known is None or not known.belongs_to(combination):
        known = _KNOWN[id(combination)] = Batchability(combination)
        weakref.finalize(combination, _KNOWN.pop, id(combination), None).atexit = False
    return known


def _attributes(combination: Combination) -> list[Any]:
    """Return what shows that an attribute of the combination or its parts has changed."""
    return [
        (name, _sign(value))
        for module in combination.modules()
        for name, value in module.__dict__.items()
    ]


def _sign(value: Any) -> Any:
    if isinstance(value, float):  # a temperature may change with each step, but not to zero
        return value > 0, value < 0
    if value is None or isinstance(value, bool | int | str):
        return value
    return (id(value), len(value)) if isinstance(value, _CONTAINERS) else id(value)


@contextmanager
def attributes_unchanged(combination: Combination) -> Iterator[None]:
    """Raise a CannotBatchError at the end of a block that has set attributes, and put them back.

    Outside of the block, nobody can use a tensor that vmap has made.
    """
    before = [(held, dict(held)) for module in combination.modules() for held in _held_by(module)]
    try:
        yield
    finally:
        changed = [_put_back(held, old) for held, old in before]
    if any(changed):
        raise CannotBatchError("a call changes its attributes, parameters or buffers")


def _held_by(module: torch.nn.Module) -> Sequence[dict[str, Any]]:
    return module.__dict__, parameters_of(module), buffers_of(module)


def _put_back(held: dict[str, Any], old: dict[str, Any]) -> bool:
    """Put changed attributes back. Return whether there were any."""
    # Another thread may call train() or eval() at any time.
    names = [n for n in {**held, **old} if n != "training" and held.get(n) is not old.get(n)]
    for name in names:
        held.pop(name, None)
        if name in old:
            held[name] = old[name]
    return bool(names)
