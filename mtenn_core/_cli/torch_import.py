"""Import torch although the metadata of an installed distribution would stop it.

``import torch`` reads the entry points of all distributions to find device backends
(``torch._import_device_backends``, torch 2.5 and later), and raises at a malformed
``entry_points.txt``. The command ``mtenn`` then imports torch without looking for backends. Any
other program gets torch's error.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from mtenn_core._registry import Registry
from mtenn_core._registry.lookup import current_scan
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
    stops_torch = () if before == "0" else current_scan(registry).stops_torch
    if not stops_torch:
        yield
        return
    warnings.warn(
        f"{stops_torch[0]} has an entry_points.txt with a line that is not 'name = value' in UTF-8,"
        f" at which import torch fails; mtenn imports torch with {VARIABLE}=0, which leaves out the"
        " device backends of other packages; repair or uninstall that distribution",
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
