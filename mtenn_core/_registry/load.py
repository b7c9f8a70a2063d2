"""Load a plugin: import it, call its hook through pluggy, and check the returned class."""

from __future__ import annotations

import importlib
import os
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pluggy

from mtenn_core import hookspecs
from mtenn_core._registry.messages import describe_error, describe_value, suggestion
from mtenn_core._registry.policy import Policy
from mtenn_core._registry.record import PluginRecord
from mtenn_core.errors import MtennError, PluginLoadError, PluginSpecError, PluginWarning

if TYPE_CHECKING:
    from mtenn_core._process.settings import Changes
    from mtenn_core.combination import Combination

_HOOK = hookspecs.mtenn_combination.__name__
# A plugin is not the cause of these errors. Any other error, also SystemExit, becomes a
# RegistryError about this plugin.
_NOT_THE_PLUGIN = (KeyboardInterrupt, MemoryError)


def load(record: PluginRecord, policy: Policy) -> type[Combination]:
    """Import a plugin and return the combination class that its hook returns.

    If the import changes settings of the process, they are restored, with a warning.

    Raises
    ------
    PluginIncompatibleError, PluginPinError : the policy does not allow the import
    PluginLoadError : the import raised an error or exited
    PluginSpecError : the hook is missing, raised an error, or did not return a combination class
    """
    from mtenn_core._process.settings import (
        replaced_functions,
        restoring_process_state,
        torch_functions,
    )
    from mtenn_core._process.torch_modes import without_modes

    policy.check(record)
    functions, filters = torch_functions(), list(warnings.filters)
    # A tensor that the import makes, such as a constant, outlives the caller's modes.
    with without_modes(process_wide=False), restoring_process_state() as changes:
        plugin = _import(record) if record.plugin is None else record.plugin
        combination = _call_hook(plugin, record)
    replaced = replaced_functions(functions)
    if changes.settings or changes.not_restored or replaced:
        with warnings.catch_warnings():
            warnings.filters = filters  # the user's filters; the plugin may have changed them
            _warn_of_changes(record, changes, replaced)
    return combination


def _import(record: PluginRecord) -> Any:
    module_name, attribute = record.parsed_target()
    module = None
    try:
        module = importlib.import_module(module_name)
        return reduce(getattr, attribute.split(".") if attribute else (), module)
    except _NOT_THE_PLUGIN:
        raise
    except BaseException as error:
        raise PluginLoadError(
            f"{record}: importing {record.target} failed with {describe_error(error)}"
            f"{_attribute_hint(error, module, attribute)} ({_place_of(error, record)})."
            f" {record.remedy}",
            record=record,
        ) from error


def _call_hook(plugin: Any, record: PluginRecord) -> type[Combination]:
    """Return the combination class that the hook of ``plugin`` returns."""
    # Each call has its own manager, so that it does not call plugins of other threads.
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    with blamed(record, f"its hook {_HOOK}"):
        manager.register(plugin)
        result = manager.hook.mtenn_combination()
        hooks = [caller.name for caller in manager.get_hookcallers(plugin) or ()]
        _check_hook(plugin, hooks, result, record)
    return result


@contextmanager
def blamed(record: PluginRecord, what: str) -> Iterator[None]:
    """Raise any error of a plugin's code, also SystemExit, as a PluginSpecError about the plugin.

    Errors that mtenn-core raises on purpose pass unchanged.
    """
    try:
        yield
    except (*_NOT_THE_PLUGIN, MtennError):
        raise
    except BaseException as error:
        raise PluginSpecError(
            f"{record}: {what} failed with {describe_error(error)}"
            f" ({_place_of(error, record)}). {record.remedy}",
            record=record,
        ) from error


def _check_hook(plugin: Any, hooks: Sequence[str], result: Any, record: PluginRecord) -> None:
    """Check that a plugin implements the hook and that the hook returned a combination class."""
    from mtenn_core.combination import Combination

    if _HOOK not in hooks:
        raise _spec_error(
            record,
            f"{record.target} must implement the hook {_HOOK}; found no such hook"
            f"{_hook_hint(plugin, hooks)}. Write a subclass of mtenn_core.Combination, or mark the"
            " function with mtenn_core.hookimpl",
        )
    if isinstance(plugin, Combination):
        raise _spec_error(
            record,
            f"{record.target} must be a class; found an instance, whose arguments would be lost."
            f" Name the class, {type(plugin).__name__}",
        )
    if not (isinstance(result, type) and issubclass(result, Combination)):
        raise _spec_error(
            record,
            f"its hook {_HOOK} must return a subclass of mtenn_core.Combination; found"
            f" {describe_value(result)}",
        )


def _spec_error(record: PluginRecord, message: str) -> PluginSpecError:
    return PluginSpecError(f"{record}{record.where}: {message}. {record.remedy}", record=record)


def _hook_hint(plugin: Any, hooks: Sequence[str]) -> str:
    """Return a part of a message: the function that the author probably meant as the hook."""
    if hooks:
        return f", but {', '.join(hooks)}"
    if callable(getattr(plugin, _HOOK, None)):
        return f", but a function {_HOOK} without marker or with the marker of another project"
    return ""


def _attribute_hint(error: BaseException, module: ModuleType | None, attribute: str) -> str:
    """Return a part of a message: the attribute that the author probably meant."""
    if isinstance(error, AttributeError) and module is not None and attribute:
        public = [name for name in vars(module) if not name.startswith("_")]
        question = suggestion(attribute, public)
        return f".{question}" if question else ""
    return ""


def _place_of(error: BaseException, record: PluginRecord) -> str:
    """Return where an error was raised. Skip Python's import system, pluggy and this package."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"in {error.filename}:{error.lineno}"
    ours, pluggys = os.path.dirname(__file__), os.path.dirname(pluggy.__file__)
    uninformative = (ours, importlib.__file__, "<frozen importlib", pluggys)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(uninformative):
            return f"raised in {frame.filename}:{frame.lineno}"
    return f"declared{record.where or ' here'}"


def _warn_of_changes(record: PluginRecord, changes: Changes, functions: list[str]) -> None:
    subject = str(record)
    if not changes.ran_alone:
        subject += ", or another plugin that was imported at the same time,"
    if changes.settings:
        warnings.warn(
            f"{subject} changed {', '.join(changes.settings)} while it was imported. The old values"
            " were restored. Tell its author",
            PluginWarning,
            stacklevel=2,
        )
    if changes.not_restored:
        warnings.warn(
            f"{subject} changed {', '.join(changes.not_restored)} while it was imported. This could"
            " not be undone. Tell its author",
            PluginWarning,
            stacklevel=2,
        )
    if functions:
        warnings.warn(
            f"{subject} replaced {', '.join(functions)} for the whole process while it was"
            " imported. This was not undone. Tell its author",
            PluginWarning,
            stacklevel=2,
        )
