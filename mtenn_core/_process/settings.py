"""What belongs to the whole process, and what a plugin must leave as it is."""

from __future__ import annotations

import pickle
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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
OF_THE_THREAD = {
    "the grad mode": _Setting(torch.is_grad_enabled, torch.set_grad_enabled),
    "torch's default device": _Setting(torch.get_default_device, _set_default_device),
    "torch's number of threads": _Setting(torch.get_num_threads, torch.set_num_threads),
}
OF_THE_PROCESS = {
    "torch's default dtype": _Setting(torch.get_default_dtype, torch.set_default_dtype),
    "torch's float32 precision": _Setting(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
    ),
    "torch's deterministic mode": _Setting(
        torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode
    ),
    "autograd's anomaly mode": _Setting(
        torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly
    ),
}
SETTINGS = OF_THE_THREAD | OF_THE_PROCESS
# Where a plugin that is imported may replace what everybody calls.
NAMESPACES = {
    "torch": torch,
    "torch.Tensor": torch.Tensor,
    "torch.autograd": torch.autograd,
    "torch.linalg": torch.linalg,
    "torch.nn": torch.nn,
    "torch.nn.Module": torch.nn.Module,
    "torch.nn.functional": torch.nn.functional,
    "torch.special": torch.special,
}

_lock = threading.Lock()
_n_inside = 0
_n_begun = 0
_before: dict[str, Any] = {}


@dataclass
class Traces:
    """What a block has left behind.

    Attributes
    ----------
    settings : which had changed, and were put back
    alone : whether no other block ran at the same time, in this thread or another
    """

    settings: list[str] = field(default_factory=list)
    alone: bool = True


def process_state() -> dict[str, Any]:
    """Return settings and random states by what they are called in a message."""
    return _state(SETTINGS | RANDOM_STATES)


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
        _put_back(SETTINGS | RANDOM_STATES, before)


@contextmanager
def undone_process_state() -> Iterator[Traces]:
    """Put everything back at the end, and tell which settings had changed.

    Blocks may overlap, as imports in threads do: what belongs to the whole process is noted by the
    first that begins, and put back by the last that ends. Random states are put back without a
    word, since to make a layer draws from them; but where there are other threads, which may have
    drawn as well, that of torch alone, and only if there is a new seed.

    Yields
    ------
    filled at the end
    """
    global _before, _n_begun, _n_inside
    found, seed = Traces(), torch.initial_seed()
    of_the_thread = _state(OF_THE_THREAD)
    with _lock:
        found.alone = _n_inside == 0
        if found.alone:
            _before = _state(OF_THE_PROCESS | RANDOM_STATES)
        _n_inside += 1
        _n_begun += 1
        n_begun = _n_begun
    try:
        yield found
    finally:
        found.settings += _put_back(OF_THE_THREAD, of_the_thread)
        with _lock:
            found.alone &= n_begun == _n_begun
            _n_inside -= 1
            if _n_inside == 0:
                found.settings += _put_back(OF_THE_PROCESS, _before)
                _put_back(_random_states_to_put_back(seed), _before)


def _random_states_to_put_back(seed: int) -> dict[str, _Setting]:
    if threading.active_count() == 1:
        return RANDOM_STATES
    reseeded = torch.initial_seed() != seed
    return {"torch's random state": RANDOM_STATES["torch's random state"]} if reseeded else {}


def torch_functions() -> dict[str, dict[str, Any]]:
    """Return what is in torch and most used, by namespace, to see later whether it was replaced."""
    return {name: dict(vars(namespace)) for name, namespace in NAMESPACES.items()}


def replaced(before: dict[str, dict[str, Any]]) -> list[str]:
    """Return the names of public functions that somebody has replaced, other than torch itself."""
    now = torch_functions()
    return [
        f"{namespace}.{name}"
        for namespace, functions in before.items()
        for name, function in functions.items()
        if now[namespace].get(name) is not function
        and (name == "__call__" or not name.startswith("_"))
        and not _is_torchs(now[namespace].get(name), name)
    ]


def _is_torchs(function: Any, name: str) -> bool:
    """Whether it is torch's own, by this name: it wraps some anew when its compiler is imported."""
    # Of a wrapper, the module is that of what it wraps, and the code its own.
    code = getattr(function, "__code__", None)
    if name == "Storage":
        return True  # an alias, which follows the default dtype
    if code is None or getattr(function, "__name__", None) != name:
        return False
    return bool(code.co_filename.startswith(torch.__path__[0]))


def _state(settings: dict[str, _Setting]) -> dict[str, Any]:
    return {name: each.get() for name, each in settings.items()}


def _put_back(settings: dict[str, _Setting], before: dict[str, Any]) -> list[str]:
    now = _state(settings)
    found = [name for name in now if not _same(before[name], now[name])]
    for name in found:
        settings[name].set(before[name])
    return found


def _same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)
