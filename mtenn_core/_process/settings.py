"""Process-wide settings, random states and functions of torch that a plugin must not change."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from mtenn_core._process.locks import Lock
from mtenn_core._process.setting_table import (
    PROCESS_SETTINGS,
    RANDOM_STATES,
    SETTINGS,
    THREAD_SETTINGS,
    Setting,
)
from mtenn_core._process.torch_state import paused_modes
from mtenn_core._torch_internals import n_dispatch_modes, n_function_modes

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

_ALL = SETTINGS | RANDOM_STATES
# These settings are read first. The others are read without these modes.
_MODES = ("torch's modes for functions", "torch's modes for operations")

_lock = Lock()
# State of the overlapping `default_settings` blocks: the caller's values of settings that differ.
_with_defaults: list[int] = []  # the thread of each block
_replaced: dict[str, Any] = {}
# State of the overlapping `restoring_process_state` blocks.
_running: list[int] = []  # the thread of each block
_n_started = 0
_before: dict[str, Any] = {}


@dataclass
class Changes:
    """Changes that a block has made to process-wide settings.

    Attributes
    ----------
    settings : names of the settings that changed and were restored
    not_restored : names of the settings that changed and could not be restored
    ran_alone : True if no other block ran at the same time in any thread
    """

    settings: list[str] = field(default_factory=list)
    not_restored: list[str] = field(default_factory=list)
    ran_alone: bool = True


def process_state() -> dict[str, Any]:
    """Return all settings and random states. The keys are names for messages."""
    return _values(_ALL)


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
        _restore(_ALL, before)


def differs_from_defaults() -> bool:
    """Return True if :func:`default_settings` would change a setting."""
    return bool(_other_than_defaults(PROCESS_SETTINGS))


def thread_differs_from_defaults() -> bool:
    """Return True if :func:`default_thread_settings` would change a setting."""
    return bool(_other_than_defaults(THREAD_SETTINGS))


def _other_than_defaults(settings: dict[str, Setting]) -> dict[str, Any]:
    """Return the settings that have a default and another value."""
    values = {n: each.get() for n, each in settings.items() if each.default is not None}
    return {n: v for n, v in values.items() if v is not None and v != settings[n].default}


@contextmanager
def default_thread_settings() -> Iterator[None]:
    """Use the defaults of this thread's settings until the block ends."""
    before = _other_than_defaults(THREAD_SETTINGS)
    for name in before:
        THREAD_SETTINGS[name].set(THREAD_SETTINGS[name].default)
    try:
        yield
    finally:
        for name, value in before.items():
            THREAD_SETTINGS[name].set(value)


@contextmanager
def default_settings() -> Iterator[None]:
    """Use the defaults of the process-wide settings until the block ends.

    Hooks of all modules are removed until then. Blocks may overlap, in several threads. The first
    block that starts saves the settings, and the last block that ends restores them.
    """
    global _replaced
    thread = threading.get_ident()
    with _lock:
        if not _with_defaults:
            _replaced = _other_than_defaults(PROCESS_SETTINGS)
            for name in _replaced:
                PROCESS_SETTINGS[name].set(PROCESS_SETTINGS[name].default)
        _with_defaults.append(thread)
    try:
        yield
    finally:
        with _lock:
            _with_defaults.remove(thread)
            _put_back_replaced()


def _put_back_replaced() -> None:
    """Put back the caller's settings, unless a block is running."""
    global _replaced
    if not _with_defaults:
        for name, value in _replaced.items():
            PROCESS_SETTINGS[name].set(value)
        _replaced = {}


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
    global _before, _n_started
    changes, seed, thread = Changes(), torch.initial_seed(), threading.get_ident()
    thread_before = _values(THREAD_SETTINGS)
    with _lock:
        changes.ran_alone = not _running
        if changes.ran_alone:
            _before = _values(PROCESS_SETTINGS | RANDOM_STATES) | _replaced
        _running.append(thread)
        _n_started += 1
        n_started = _n_started
    try:
        yield changes
    finally:
        _restore(THREAD_SETTINGS, thread_before, changes)
        with _lock:
            changes.ran_alone &= n_started == _n_started
            _running.remove(thread)
            if not _running:
                expected = _before | _defaults_in_use()
                _restore(PROCESS_SETTINGS, expected, changes)
                _restore(_random_states_to_restore(seed), _before)


def _end_blocks_of_other_threads() -> None:
    """End the blocks of other threads, which do not exist in a forked process."""
    me = threading.get_ident()
    others_ran = any(thread != me for thread in _running)
    _with_defaults[:] = [thread for thread in _with_defaults if thread == me]
    _running[:] = [thread for thread in _running if thread == me]
    if others_ran and not _running:
        _restore(PROCESS_SETTINGS, _before | _defaults_in_use())
    _put_back_replaced()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_end_blocks_of_other_threads)


def _random_states_to_restore(seed: int) -> dict[str, Setting]:
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


def _values(settings: dict[str, Setting]) -> dict[str, Any]:
    if not (n_function_modes() or n_dispatch_modes()):
        return {name: setting.get() for name, setting in settings.items()}
    values = {name: settings[name].get() for name in _MODES if name in settings}
    with paused_modes():
        rest = {n: setting.get() for n, setting in settings.items() if n not in values}
    return values | rest


def _restore(
    settings: dict[str, Setting], before: dict[str, Any], changes: Changes | None = None
) -> None:
    """Restore settings, and record the names of those that had changed."""
    now = _values(settings)
    names = [name for name in now if not _same(before[name], now[name])]
    for name in names:
        # For example, the number of interop threads can be set only once.
        with suppress(Exception):
            settings[name].set(before[name])
    if changes is not None:
        now = _values({name: settings[name] for name in names})
        restored = [name for name in names if _same(before[name], now[name])]
        changes.settings += restored
        changes.not_restored += [name for name in names if name not in restored]


def _same(before: Any, after: Any) -> bool:
    if before is None:
        return True  # unknown
    if isinstance(before, torch.Tensor):
        return torch.equal(before, after)
    return bool(before == after)
