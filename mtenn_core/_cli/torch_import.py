"""Import torch although a malformed ``entry_points.txt`` is installed.

``import torch`` reads the entry points of all distributions to find device backends
(``torch._import_device_backends``, torch 2.5 and later). At a malformed ``entry_points.txt``, torch
raises an error, and at a pipe it waits forever. In these cases, the command ``mtenn`` imports torch
without device backends. Other programs get torch's error.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from mtenn_core._registry import Registry
from mtenn_core._registry.lookup import current_snapshot
from mtenn_core.errors import PluginWarning

VARIABLE = "TORCH_DEVICE_BACKEND_AUTOLOAD"


@contextmanager
def torch_importable(registry: Registry) -> Iterator[None]:
    """Let this process and its children import torch until the context ends.

    Parameters
    ----------
    registry : its scan tells which distributions would stop torch
    """
    before = os.environ.get(VARIABLE)
    stops_torch = () if before == "0" else current_snapshot(registry).scan.stops_torch
    if not stops_torch:
        yield
        return
    warnings.warn(
        f"{stops_torch[0]}: each line of entry_points.txt must be 'name = value' in UTF-8, in a"
        " regular file; import torch fails at this one. mtenn imports torch without the device"
        f" backends of other packages ({VARIABLE}=0). Repair or uninstall that distribution",
        PluginWarning,
        stacklevel=3,
    )
    os.environ[VARIABLE] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before
