"""Process-wide settings, random states and functions of torch that a plugin must not change."""

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

from mtenn_core._process.locks import Lock


class _Setting(NamedTuple):
    get: Callable[[], Any]
    set: Callable[[Any], object]
    default: Any = None  # torch's own default of a process-wide setting


def _set_default_device(device: torch.device) -> None:
    # Set None instead of "cpu", because "cpu" makes every later call of torch slower.
    torch.set_default_device(None if device.type == "cpu" else device)


def _numpy_state() -> Any:
    numpy = sys.modules.get("numpy")
    # The state is pickled, because == raises for a tuple with arrays.
    return None if numpy is None else pickle.dumps(numpy.random.get_state())


def _set_numpy_state(state: Any) -> None:
    if state is not None:
        sys.modules["numpy"].random.set_state(pickle.loads(state))


def _anomaly_mode() -> tuple[bool, bool]:
    enabled = torch.is_anomaly_enabled()
    return enabled, torch.is_anomaly_check_nan_enabled() if enabled else True


# These are not in the settings, because a stochastic combination may advance a random state.
RANDOM_STATES = {
    "torch's random state": _Setting(torch.get_rng_state, torch.set_rng_state),
    "the random state of `random`": _Setting(random.getstate, random.setstate),
    "numpy's random state": _Setting(_numpy_state, _set_numpy_state),
}
THREAD_SETTINGS = {
    "the grad mode": _Setting(torch.is_grad_enabled, torch.set_grad_enabled),
    "torch's default device": _Setting(torch.get_default_device, _set_default_device),
    "torch's number of threads": _Setting(torch.get_num_threads, torch.set_num_threads),
}
PROCESS_SETTINGS = {
    "torch's default dtype": _Setting(
        torch.get_default_dtype, torch.set_default_dtype, torch.float32
    ),
    "torch's float32 precision": _Setting(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"
    ),
    "torch's deterministic mode": _Setting(
        torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode, 0
    ),
    "autograd's anomaly mode": _Setting(
        _anomaly_mode, lambda mode: torch.set_anomaly_enabled(*mode), (False, True)
    ),
}
SETTINGS = THREAD_SETTINGS | PROCESS_SETTINGS
# Hooks that run for every module of the process; FlopCounterMode has some. These private dicts were
# seen in torch 2.13. Without them: such hooks would also run in the gate.
_MODULE_HOOKS: list[dict[Any, Any]] = [
    hooks
    for name, hooks in vars(torch.nn.modules.module).items()
    if name.startswith("_global_") and isinstance(hooks, dict)
]
# A plugin may replace functions in these namespaces while it is imported.
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

_lock = Lock()
# State of the overlapping `default_settings` blocks: the caller's values of settings that differ.
_n_with_defaults = 0
_replaced: dict[str, Any] = {}
_removed_hooks: list[dict[Any, Any]] = []
# State of the overlapping `restoring_process_state` blocks.
_n_running = 0
_n_started = 0
_before: dict[str, Any] = {}


@dataclass
class Changes:
    """Changes that a block has made to process-wide settings.

    Attributes
    ----------
    settings : names of the settings that changed and were restored
    ran_alone : True if no other block ran at the same time in any thread
    """

    settings: list[str] = field(default_factory=list)
    ran_alone: bool = True


def process_state() -> dict[str, Any]:
    """Return all settings and random states. The keys are names for messages."""
    return _values(SETTINGS | RANDOM_STATES)


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return the names of the values that differ."""
    return [name for name in before if not _same(before[name], after[name])]


@contextmanager
def preserved_process_state() -> Iterator[None]:
    """Restore all settings and random states when the block ends."""
    before = process_state()
    try:
        yield
    finally:
        _restore(SETTINGS | RANDOM_STATES, before)


def differs_from_defaults() -> bool:
    """Return True if :func:`default_settings` would change a setting or remove a hook."""
    return any(_MODULE_HOOKS) or any(
        setting.get() != setting.default for setting in PROCESS_SETTINGS.values()
    )


@contextmanager
def default_settings() -> Iterator[None]:
    """Use torch's own defaults of the process-wide settings until the block ends.

    Hooks of all modules are removed until then. Blocks may overlap, in several threads. The first
    block that starts saves the settings, and the last block that ends restores them.
    """
    global _n_with_defaults, _replaced, _removed_hooks
    with _lock:
        if _n_with_defaults == 0:
            _removed_hooks = [dict(hooks) for hooks in _MODULE_HOOKS]
            for hooks in _MODULE_HOOKS:
                hooks.clear()
            _replaced = {
                name: setting.get()
                for name, setting in PROCESS_SETTINGS.items()
                if setting.get() != setting.default
            }
            _restore(PROCESS_SETTINGS, _values(PROCESS_SETTINGS) | _defaults_in_use())
        _n_with_defaults += 1
    try:
        yield
    finally:
        with _lock:
            _n_with_defaults -= 1
            if _n_with_defaults == 0:
                for name, value in _replaced.items():
                    PROCESS_SETTINGS[name].set(value)
                _replaced = {}
                for hooks, removed in zip(_MODULE_HOOKS, _removed_hooks, strict=True):
                    hooks.update(removed)


def _defaults_in_use() -> dict[str, Any]:
    """Return the settings that `default_settings` has replaced, with torch's own defaults."""
    return {name: PROCESS_SETTINGS[name].default for name in _replaced}


@contextmanager
def restoring_process_state() -> Iterator[Changes]:
    """Restore settings when the block ends, and record the changed ones.

    Blocks may overlap, because threads import plugins at the same time. The first block that starts
    saves the process-wide settings, and the last block that ends restores them. Random states are
    restored but not recorded, because the constructor of a layer draws random numbers. If other
    threads run, they may have drawn numbers, too. Then only torch's random state is restored, and
    only if the block has set a new seed.

    Yields
    ------
    the changes, which are complete when the block has ended
    """
    global _before, _n_started, _n_running
    changes, seed = Changes(), torch.initial_seed()
    thread_before = _values(THREAD_SETTINGS)
    with _lock:
        changes.ran_alone = _n_running == 0
        if changes.ran_alone:
            _before = _values(PROCESS_SETTINGS | RANDOM_STATES) | _replaced
        _n_running += 1
        _n_started += 1
        n_started = _n_started
    try:
        yield changes
    finally:
        changes.settings += _restore(THREAD_SETTINGS, thread_before)
        with _lock:
            changes.ran_alone &= n_started == _n_started
            _n_running -= 1
            if _n_running == 0:
                expected = _before | _defaults_in_use()
                changes.settings += _restore(PROCESS_SETTINGS, expected)
                _restore(_random_states_to_restore(seed), _before)


def _random_states_to_restore(seed: int) -> dict[str, _Setting]:
    if threading.active_count() == 1:
        return RANDOM_STATES
    reseeded = torch.initial_seed() != seed
    return {"torch's random state": RANDOM_STATES["torch's random state"]} if reseeded else {}


def torch_functions() -> dict[str, dict[str, Any]]:
    """Return the functions of common torch namespaces, as input of :func:`replaced_functions`."""
    return {name: dict(vars(namespace)) for name, namespace in NAMESPACES.items()}


def replaced_functions(before: dict[str, dict[str, Any]]) -> list[str]:
    """Return the names of public functions that code outside of torch has replaced."""
    now = torch_functions()
    return [
        f"{namespace}.{name}"
        for namespace, functions in before.items()
        for name, function in functions.items()
        if now[namespace].get(name) is not function
        and (name == "__call__" or not name.startswith("_"))
        and not _belongs_to_torch(now[namespace].get(name), name)
    ]


def _belongs_to_torch(function: Any, name: str) -> bool:
    """Return True for torch's own function of this name, or for torch's own wrapper of it.

    An import of torch's compiler wraps some functions.
    """
    # Use the file of the code, because a wrapper has the __module__ of the wrapped function.
    code = getattr(function, "__code__", None)
    if name == "Storage":
        return True  # an alias that changes with the default dtype
    if code is None or getattr(function, "__name__", None) != name:
        return False
    return bool(code.co_filename.startswith(torch.__path__[0]))


def _values(settings: dict[str, _Setting]) -> dict[str, Any]:
    return {name: setting.get() for name, setting in settings.items()}


def _restore(settings: dict[str, _Setting], before: dict[str, Any]) -> list[str]:
    """Restore settings and return the names of those that had changed."""
    now = _values(settings)
    names = [name for name in now if not _same(before[name], now[name])]
    for name in names:
        settings[name].set(before[name])
    return names


def _same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)
