"""From a record to a class: import the plugin, ask it through pluggy, check what it says."""

from __future__ import annotations

import importlib
import re
from functools import reduce
from typing import TYPE_CHECKING, Any

import pluggy
from packaging.specifiers import SpecifierSet

from mtenn_core import __version__, hookspecs
from mtenn_core._registry._scan import PluginRecord
from mtenn_core.errors import PluginIncompatibleError, PluginLoadError, PluginSpecError

if TYPE_CHECKING:
    from mtenn_core.combination import Combination

_HOOK = hookspecs.mtenn_combination.__name__
_TARGET = re.compile(r"([\w.]+)\s*:\s*([\w.]+)|([\w.]+)")


def plugin_manager() -> pluggy.PluginManager:
    """Return a plugin manager that knows the hook and no plugin yet."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    return manager


def import_plugin(record: PluginRecord) -> Any:
    """Import what a record's target names.

    Raises
    ------
    PluginIncompatibleError : before the import, if it asks for another version of mtenn-core
    PluginLoadError : the import raised or exited
    """
    _check_compatible(record)
    match = _TARGET.fullmatch(record.target.strip())
    if match is None:
        raise PluginLoadError(
            f"{record}: its entry point must read 'module:attribute'; found {record.target!r};"
            f" {_remedy(record)}",
            record=record,
        )
    module, attribute, bare_module = match.groups()
    try:
        imported = importlib.import_module(module or bare_module)
        return reduce(getattr, attribute.split(".") if attribute else (), imported)
    except (Exception, SystemExit) as error:
        raise PluginLoadError(
            f"{record}: importing {record.target} from {record.location} failed with"
            f" {type(error).__name__}: {error}; {_remedy(record)}",
            record=record,
        ) from error


def combination_class(
    manager: pluggy.PluginManager, plugin: Any, record: PluginRecord
) -> type[Combination]:
    """Register ``plugin`` and return the combination class that its hook returns.

    Raises
    ------
    PluginSpecError : the plugin has no such hook, the hook raised, or returned something else
    """
    from mtenn_core.combination import Combination

    if not manager.is_registered(plugin):
        # With its identity, since pluggy allows a name once, and temporary() replaces by name.
        manager.register(plugin, name=f"{record.qualified_name} at {id(plugin):#x}")
    callers = manager.get_hookcallers(plugin) or []
    if _HOOK not in [caller.name for caller in callers]:
        manager.unregister(plugin)
        raise PluginSpecError(
            f"{record}: {record.target} does not implement the hook {_HOOK}; let it be a subclass"
            " of mtenn_core.Combination, or mark the function with mtenn_core.hookimpl",
            record=record,
        )
    others = [other for other in manager.get_plugins() if other is not plugin]
    try:
        found = manager.subset_hook_caller(_HOOK, others)()
    except (Exception, SystemExit) as error:
        raise PluginSpecError(
            f"{record}: its hook {_HOOK} failed with {type(error).__name__}: {error};"
            f" {_remedy(record)}",
            record=record,
        ) from error
    if not (isinstance(found, type) and issubclass(found, Combination)):
        raise PluginSpecError(
            f"{record}: its hook {_HOOK} must return a subclass of mtenn_core.Combination;"
            f" found {found!r}",
            record=record,
        )
    return found


def _check_compatible(record: PluginRecord) -> None:
    if not SpecifierSet(record.requires_core).contains(__version__, prereleases=True):
        raise PluginIncompatibleError(
            f"{record} requires mtenn-core{record.requires_core}; found mtenn-core {__version__};"
            f" update one of them: pip install --upgrade {record.distribution} mtenn-core",
            record=record,
        )


def _remedy(record: PluginRecord) -> str:
    if record.distribution is None:
        return "register another class"
    return f"repair it, or remove it with: pip uninstall {record.distribution}"
