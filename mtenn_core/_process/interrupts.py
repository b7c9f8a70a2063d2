"""Delay Ctrl-C until the end of a block that must not stop halfway."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def delayed_interrupts() -> Iterator[None]:
    """Delay the first Ctrl-C until the end of the block. A second one interrupts at once.

    Python runs signal handlers only in the main thread, so other threads need no delay. A handler
    that Python did not install cannot be put back, so it stays.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is None:
        yield
        return
    n_received = 0

    def delay(*_: Any) -> None:
        nonlocal n_received
        n_received += 1
        if n_received == 2:
            signal.signal(signal.SIGINT, before)
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, delay)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if n_received == 1:
            signal.raise_signal(signal.SIGINT)
