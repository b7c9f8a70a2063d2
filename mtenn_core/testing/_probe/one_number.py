"""Combinations with a vector as their value, as combinations whose value is one number.

The number is the sum of the entries, each times ±1 or ±1/2. Every check of a number is then also a
check of the vector, because no entry has a factor of 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mtenn_core._engine.declarations import overrides
from mtenn_core.combination import Combination


def factors(n_results: int, seed: int) -> list[float]:
    """Return one factor for each entry of a vector: ±1 or ±1/2, at random."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.tensor([-1.0, -0.5, 0.5, 1.0])
    return numbers[torch.randint(4, (n_results,), generator=generator)].tolist()


def use_one_number(combination: Combination, by: list[float]) -> None:
    """Change a combination, so that its value is one number: its old value times the factors.

    ``pose_weights`` is then that of the base class, because the core does not use the closed form
    of a vector.
    """
    cls = type(combination)
    methods: dict[str, Any] = {"combine": _times(cls.combine, by)}
    if overrides(cls, "reference"):
        methods["reference"] = _times(cls.reference, by)
    if overrides(cls, "pose_weights"):
        methods["pose_weights"] = Combination.pose_weights
    named = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    combination.__class__ = type(cls.__name__, (cls,), methods | named | {"_as_written": cls})


def _times(method: Callable[..., Tensor], by: list[float]) -> Callable[..., Tensor]:
    @functools.wraps(method)
    def one_number(self: Combination, *args: Any, **kwargs: Any) -> Tensor:
        return times(method(self, *args, **kwargs), by)

    return one_number


def times(value: Tensor, by: list[float]) -> Tensor:
    """Return the sum of the entries of a vector, each times its factor."""
    if not isinstance(value, Tensor) or value.shape != (len(by),):
        return value  # a wrong shape, which the core or A2 reports
    return (value * torch.tensor(by, dtype=value.dtype, device=value.device)).sum()


@contextmanager
def as_written(combination: Combination) -> Iterator[None]:
    """Undo :func:`use_one_number` within a ``with`` block."""
    one_number = type(combination)
    combination.__class__ = getattr(one_number, "_as_written", one_number)
    try:
        yield
    finally:
        combination.__class__ = one_number
