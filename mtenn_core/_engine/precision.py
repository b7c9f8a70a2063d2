"""Precision of the arithmetic: float32 at least, and outside of autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return ``dtype``, or float32 in place of half precision, which has no digits to spare."""
    return torch.promote_types(dtype, torch.float32)


def no_autocast(device_type: str) -> AbstractContextManager[object]:
    """Return a context without autocast; it costs nothing where autocast is off."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
