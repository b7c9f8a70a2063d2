"""Locks that a thread does not wait for indefinitely."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

# In seconds. A thread that holds a lock for longer hangs, or it waits for us: for example, for a
# module that this thread is importing. To do work twice is better than a deadlock.
TIMEOUT = 30.0


@contextmanager
def hold(lock: threading.RLock) -> Iterator[None]:
    """Hold ``lock``, or continue without it after ``TIMEOUT`` seconds."""
    is_held = lock.acquire(timeout=TIMEOUT)
    try:
        yield
    finally:
        if is_held:
            lock.release()
