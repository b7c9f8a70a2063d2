"""Find, load, validate and hand out combination plugins.

Nothing here imports torch, and :mod:`importlib_metadata` is imported by the first scan alone.
"""

from mtenn_core._registry.lookup import Registry, registry
from mtenn_core._registry.policy import Policy
from mtenn_core._registry.record import PluginRecord, Problem

__all__ = ["PluginRecord", "Policy", "Problem", "Registry", "registry"]
