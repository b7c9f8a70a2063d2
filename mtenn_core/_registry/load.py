"""From a record to a class: import the plugin, ask it through pluggy, check what it says."""

from __future__ import annotations

import importlib
import os
import traceback
import warnings
from collections.abc import Sequence
from functools import reduce
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pluggy

from mtenn_core import hookspecs
from mtenn_core._registry.policy import Policy, closest
from mtenn_core._registry.record import PluginRecord, shown, told
from mtenn_core.errors import PluginLoadError, PluginSpecError, PluginWarning

if TYPE_CHECKING:
    from mtenn_core._process.settings import Traces
    from mtenn_core.combination import Combination

_HOOK = hookspecs.mtenn_combination.__name__
# What is not the plugin's doing. Whatever else it raises, sys.exit() included, breaks it alone.
_NOT_ITS_DOING = (KeyboardInterrupt, MemoryError)


def load(record: PluginRecord, policy: Policy) -> type[Combination]:
    """Import a plugin and return the combination class that its hook returns.

    Settings of the process that it changes are put back, with a warning.

    Raises
    ------
    PluginIncompatibleError, PluginPinError : before the import
    PluginLoadError : the import raised or exited
    PluginSpecError : it has no such hook, the hook raised, or returned something else
    """
    from mtenn_core._process.settings import replaced, torch_functions, undone_process_state

    policy.check(record)
    functions, filters = torch_functions(), list(warnings.filters)
    with undone_process_state() as found:
        plugin = _import(record) if record.plugin is None else record.plugin
        combination = _ask(plugin, record)
    patched = replaced(functions)
    if found.settings or patched:
        with warnings.catch_warnings():
            warnings.filters = filters  # those of the user: the plugin may have set others
            _warn_of_traces(record, found, patched)
    return combination


def _import(record: PluginRecord) -> Any:
    module, attribute = record.parsed_target()
    imported = None
    try:
        imported = importlib.import_module(module)
        return reduce(getattr, attribute.split(".") if attribute else (), imported)
    except _NOT_ITS_DOING:
        raise
    except BaseException as error:
        raise PluginLoadError(
            f"{record}: importing {record.target} failed with {told(error)}"
            f"{_hint(error, imported, attribute)} ({_where(error, record)}); {record.remedy}",
            record=record,
        ) from error


def _ask(plugin: Any, record: PluginRecord) -> type[Combination]:
    """Return what the hook of ``plugin`` returns, if it is a combination class."""
    from mtenn_core.combination import Combination

    # One manager for each: a call then meets no other plugin, whatever another thread registers.
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    try:
        manager.register(plugin)
        found = manager.hook.mtenn_combination()
    except _NOT_ITS_DOING:
        raise
    except BaseException as error:
        raise PluginSpecError(
            f"{record}: its hook {_HOOK} failed with {told(error)}"
            f" ({_where(error, record)}); {record.remedy}",
            record=record,
        ) from error
    callers = [caller.name for caller in manager.get_hookcallers(plugin) or ()]
    if _HOOK not in callers:
        raise _spec_error(
            record,
            f"{record.target} does not implement the hook {_HOOK}{_almost(plugin, callers)}; let"
            " it be a subclass of mtenn_core.Combination, or mark the function with"
            " mtenn_core.hookimpl",
        )
    if isinstance(plugin, Combination):
        raise _spec_error(
            record,
            f"{record.target} is an instance, whose arguments would be lost; name the class,"
            f" {type(plugin).__name__}",
        )
    if not (isinstance(found, type) and issubclass(found, Combination)):
        raise _spec_error(
            record,
            f"its hook {_HOOK} must return a subclass of mtenn_core.Combination; found"
            f" {shown(found)}",
        )
    return found


def _spec_error(record: PluginRecord, message: str) -> PluginSpecError:
    return PluginSpecError(f"{record}{record.where}: {message}; {record.remedy}", record=record)


def _almost(plugin: Any, callers: Sequence[str]) -> str:
    """Return what the author may have meant to be the hook."""
    if callers:
        return f"; it implements {', '.join(callers)}"
    if callable(getattr(plugin, _HOOK, None)):
        return f"; it has a function {_HOOK}, which no marker or one of another project marks"
    return ""


def _hint(error: BaseException, module: ModuleType | None, attribute: str | None) -> str:
    """Return more of what was not found."""
    if isinstance(error, AttributeError) and module is not None and attribute:
        public = [name for name in vars(module) if not name.startswith("_")]
        return f".{question}" if (question := closest(attribute, public)) else ""
    return ""


def _where(error: BaseException, record: PluginRecord) -> str:
    """Return which file and line raised; those of the import system and ours tell nothing."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"in {error.filename}:{error.lineno}"
    ours, pluggys = os.path.dirname(__file__), os.path.dirname(pluggy.__file__)
    nothing = (ours, importlib.__file__, "<frozen importlib", pluggys)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(nothing):
            return f"raised in {frame.filename}:{frame.lineno}"
    return f"declared{record.where or ' here'}"


def _warn_of_traces(record: PluginRecord, found: Traces, functions: list[str]) -> None:
    who = f"{record}, or another that was imported at the same time," * (not found.alone)
    if found.settings:
        warnings.warn(
            f"{who or record} changed {', '.join(found.settings)} while it was imported; that was"
            " put back: tell its author",
            PluginWarning,
            stacklevel=2,
        )
    if functions:
        warnings.warn(
            f"{who or record} replaced {', '.join(functions)} while it was imported, for the whole"
            " process; that stays: tell its author",
            PluginWarning,
            stacklevel=2,
        )
