"""Find, load, validate and hand out combination plugins.

Nothing here imports torch, and :mod:`importlib_metadata` is imported by the first scan alone.
"""

from mtenn_core._registry._policy import Policy
from mtenn_core._registry._record import PluginRecord, Problem
from mtenn_core._registry._registry import Registry, registry

__all__ = ["PluginRecord", "Policy", "Problem", "Registry", "registry"]
