"""The floating-point arithmetic of this thread: rounding, and denormal numbers.

A register of the processor sets both. A library that was compiled with ``-ffast-math`` changes the
register when it is loaded. No function of Python reads it, so operations with known results show
its state.
"""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from typing import Any

import torch

_DENORMAL = sys.float_info.min / 4
_SMALLEST_NORMAL = sys.float_info.min
_TINY = 1e-30
_TO_NEAREST = (True, True, True)
_FE_TONEAREST = 0  # on x86, ARM, RISC-V and POWER


def flushes_denormals() -> tuple[bool, bool]:
    """Return whether denormal operands, and denormal results, are replaced by zero."""
    return not _DENORMAL > 0, not _SMALLEST_NORMAL * 0.5 > 0


def set_flushes_denormals(value: tuple[bool, bool]) -> None:
    """Set both with ``torch.set_flush_denormal``, which some processors do not support."""
    torch.set_flush_denormal(any(value))


def rounding() -> tuple[bool, bool, bool]:
    """Return for each probe whether it rounds to the nearest number. They show the direction."""
    return 1.0 + _TINY == 1.0, 1.0 - _TINY == 1.0, -1.0 - _TINY == -1.0


def set_rounding(value: Any) -> None:
    """Round to the nearest number again. Another direction cannot be restored."""
    if value == _TO_NEAREST:
        with suppress(AttributeError, TypeError, OSError):  # no such function on Windows
            ctypes.CDLL(None).fesetround(_FE_TONEAREST)
