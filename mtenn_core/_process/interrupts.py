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

    Python runs signal handlers only in the main thread, so other threads need no delay.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[tuple[Any, ...]] = []

    def delay(*arguments: Any) -> None:
        if received and callable(before):
            before(*arguments)
        received.append(arguments)

    before = signal.signal(signal.SIGINT, delay)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if len(received) == 1 and callable(before):
            before(*received[0])
