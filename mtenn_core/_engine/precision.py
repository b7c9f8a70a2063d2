"""Precision of the arithmetic: float32 at least, and outside of autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch

# Returns a dtype, or float32 in place of half precision, which has no digits to spare.
at_least_float32 = partial(torch.promote_types, torch.float32)


def no_autocast(device_type: str) -> AbstractContextManager[object]:
    """Return a context without autocast; it costs nothing where autocast is off."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
