"""Locks with a limited waiting time, which a forked process can use.

A forked process has only the thread that called ``fork``. If another thread held a lock, nobody
would ever release it there, and what the lock guards might be half done. So ``fork`` first waits
for these locks.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakSet

# A time in seconds. If a thread holds a lock for longer, it hangs, or it waits for this thread (for
# example, because this thread is importing a module). To avoid a deadlock, this thread then
# continues without the lock, and the work is done twice.
TIMEOUT = 30.0

_all: WeakSet[Lock] = WeakSet()
_all_lock = threading.Lock()  # guards the set, and is held during a fork
_n_made = 0
_held_by_fork: list[Lock] = []


class Lock:
    """A reentrant lock that is free in a forked process, unless the forking thread holds it."""

    def __init__(self) -> None:
        global _n_made
        self._lock = threading.RLock()
        self._owner: int | None = None
        self._depth = 0
        with _all_lock:
            _n_made += 1
            self._number = _n_made
            _all.add(self)

    def acquire(self, timeout: float = -1) -> bool:
        """Wait for the lock for at most ``timeout`` seconds; return True if it is now held."""
        if not self._lock.acquire(timeout=timeout):
            return False
        self._owner = threading.get_ident()
        self._depth += 1
        return True

    def release(self) -> None:
        """Release the lock once."""
        self._depth -= 1
        if self._depth == 0:
            self._owner = None
        self._lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    @property
    def is_mine(self) -> bool:
        """True if this thread holds the lock."""
        return self._owner == threading.get_ident()

    def free(self) -> None:
        """Forget the thread that holds the lock. Only for a process without that thread."""
        self._lock = threading.RLock()
        self._owner, self._depth = None, 0


@contextmanager
def hold(lock: Lock) -> Iterator[None]:
    """Hold ``lock``, or continue without it after ``TIMEOUT`` seconds."""
    is_held = lock.acquire(timeout=TIMEOUT)
    try:
        yield
    finally:
        if is_held:
            lock.release()


def _before_fork() -> None:
    """Wait until no other thread holds a lock, and hold all locks during the fork."""
    _all_lock.acquire()
    locks = sorted(_all, key=lambda lock: lock._number)
    # A plugin that forks while it is imported already holds a lock. Another thread may wait for it.
    patience = 0.0 if any(lock.is_mine for lock in locks) else TIMEOUT
    until = time.monotonic() + patience
    for lock in locks:
        if lock.acquire(timeout=max(0.0, until - time.monotonic())):
            _held_by_fork.append(lock)


def _after_fork() -> None:
    while _held_by_fork:
        _held_by_fork.pop().release()
    _all_lock.release()


def _after_fork_in_child() -> None:
    held = {lock._number for lock in _held_by_fork}
    for lock in _all:
        if lock._number not in held:
            lock.free()
    _after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(
        before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child
    )
