"""Locks with a limited waiting time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

# A time in seconds. If a thread holds a lock for longer, it hangs, or it waits for this thread (for
# example, because this thread is importing a module). To avoid a deadlock, this thread then
# continues without the lock, and the work is done twice.
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
