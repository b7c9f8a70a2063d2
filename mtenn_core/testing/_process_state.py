"""What belongs to the whole process, and which a combination must leave as it is."""

from __future__ import annotations

import pickle
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch


class _Setting(NamedTuple):
    get: Callable[[], Any]
    set: Callable[[Any], object]


def _set_default_device(device: torch.device) -> None:
    # "cpu" by name costs every later call of torch a detour, None does not.
    torch.set_default_device(None if device.type == "cpu" else device)


def _numpy_state() -> Any:
    numpy = sys.modules.get("numpy")
    # Pickled, since two of its tuples cannot be compared: they hold arrays.
    return None if numpy is None else pickle.dumps(numpy.random.get_state())


def _set_numpy_state(state: Any) -> None:
    if state is not None:
        sys.modules["numpy"].random.set_state(pickle.loads(state))


# Seeds apart: a stochastic combination moves the random state on, and may.
RANDOM_STATES = {
    "torch's random state": _Setting(torch.get_rng_state, torch.set_rng_state),
    "the random state of `random`": _Setting(random.getstate, random.setstate),
    "numpy's random state": _Setting(_numpy_state, _set_numpy_state),
}
SETTINGS = {
    "the grad mode": _Setting(torch.is_grad_enabled, torch.set_grad_enabled),
    "torch's default dtype": _Setting(torch.get_default_dtype, torch.set_default_dtype),
    "torch's default device": _Setting(torch.get_default_device, _set_default_device),
    "torch's number of threads": _Setting(torch.get_num_threads, torch.set_num_threads),
    "torch's deterministic mode": _Setting(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms
    ),
    "autograd's anomaly mode": _Setting(
        torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly
    ),
}


def process_state() -> dict[str, Any]:
    """Return settings and random states by what they are called in a message."""
    return {name: each.get() for name, each in (SETTINGS | RANDOM_STATES).items()}


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return the names of what differs."""
    return [name for name in before if not _same(before[name], after[name])]


@contextmanager
def preserved_process_state() -> Iterator[None]:
    """Put everything back at the end, whatever has changed it."""
    before = process_state()
    try:
        yield
    finally:
        for name in changed(before, process_state()):
            (SETTINGS | RANDOM_STATES)[name].set(before[name])


def _same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)
