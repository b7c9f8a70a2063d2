"""Find, load, validate and hand out combination plugins.

Nothing here imports torch, and :mod:`importlib_metadata` is imported by the first scan alone.
"""

from mtenn_core._registry._registry import Registry, registry
from mtenn_core._registry._scan import PluginRecord

__all__ = ["PluginRecord", "Registry", "registry"]
