"""Precision of the arithmetic: float32 at least, and without autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch

# Half precision has too few digits, so it becomes float32. float64 stays float64.
at_least_float32 = partial(torch.promote_types, torch.float32)


def no_autocast(device_type: str) -> AbstractContextManager[object]:
    """Return a context without autocast. If autocast is already off, the context does nothing."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
