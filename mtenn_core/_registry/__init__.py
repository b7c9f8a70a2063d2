"""Find, load and validate combination plugins.

An import of this package does not import torch. Only a scan imports :mod:`importlib_metadata`.
"""

from mtenn_core._registry.lookup import Registry, registry
from mtenn_core._registry.policy import Policy
from mtenn_core._registry.record import PluginRecord, Problem

__all__ = ["PluginRecord", "Policy", "Problem", "Registry", "registry"]
