"""Find, load and validate combination plugins.

Nothing here imports torch at module level. Only a scan imports :mod:`importlib_metadata`.
"""

from mtenn_core._registry.lookup import Registry, registry
from mtenn_core._registry.policy import Policy
from mtenn_core._registry.record import PluginRecord, Problem

__all__ = ["PluginRecord", "Policy", "Problem", "Registry", "registry"]
