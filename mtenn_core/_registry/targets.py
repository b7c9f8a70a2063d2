"""Import the class or function of a target, and make the combinations to check."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import reduce
from pathlib import Path
from types import ModuleType
from typing import Any

from mtenn_core._registry import Registry
from mtenn_core._registry.gate import class_examples, make_example
from mtenn_core._registry.messages import describe_error, describe_value
from mtenn_core.combination import Combination
from mtenn_core.errors import CombinationContractError, CombinationNotFoundError, TargetError
from mtenn_core.testing._examples import declared_examples
from mtenn_core.testing._target import Target, root_and_module


def make_combinations(
    target: Target, registry: Registry
) -> Iterator[tuple[str, Target, Combination]]:
    """Import the class or function of a target, and make an instance with each set of arguments.

    Yields
    ------
    the name of the combination in a report, the target for this instance, and the instance

    Raises
    ------
    TargetError : the module, file or attribute does not exist, or does not make a combination
    RegistryError : the name is unknown, or the plugin does not load
    """
    try:
        record = registry.info(target.path)
    except CombinationNotFoundError:
        if not _is_importable(target.path):
            raise
        yield from _make_imported(target)
        return
    combination = registry.get(target.path, validate=False)
    name = record.qualified_name
    if target.arguments:
        instance = _make(target.path, combination, target.arguments)
        yield str(record), Target(name, target.arguments), instance
        return
    for example in class_examples(record, combination):
        yield str(record), Target(name, example), make_example(record, combination, example)


def _is_importable(path: str) -> bool:
    """Return True if a path looks like a file or module: ``my_rules:x``, but not ``my-rules:x``."""
    where, colon, _ = path.rpartition(":")
    is_module = bool(colon) and all(map(str.isidentifier, where.split(".")))
    return is_module or where.endswith(".py") or path.endswith(".py")


def _make_imported(target: Target) -> Iterator[tuple[str, Target, Combination]]:
    path = target.path
    source = _import(path)
    try:
        examples = [target.arguments] if target.arguments else declared_examples(source)
    except CombinationContractError as error:
        raise TargetError(f"{path!r}: {error}") from error
    for arguments in examples:
        yield path, Target(path, arguments), _make(path, source, arguments)


def _make(path: str, source: Callable[..., Any], arguments: Mapping[str, Any]) -> Combination:
    try:
        combination = source(**arguments)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise TargetError(
            f"{path!r} cannot be called with {describe_value(dict(arguments))}:"
            f" {describe_error(error)}. Give arguments with --arg name=value"
        ) from error
    if not isinstance(combination, Combination):
        raise TargetError(
            f"{path!r} must be a subclass of mtenn_core.Combination, or a function that returns an"
            f" instance; it returned {describe_value(combination)}"
        )
    return combination


def _import(path: str) -> Any:
    where, _, attribute = path.rpartition(":")
    if not (where and attribute):
        raise TargetError(f"{path!r} must name a class or function. Add :Class to the path")
    try:
        module = _import_file(Path(where)) if where.endswith(".py") else _import_module(where)
        return reduce(getattr, attribute.split("."), module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise TargetError(
            f"cannot load {path!r}: {describe_error(error)}. Expected a name that `mtenn list`"
            " shows, package.module:Class, or folder/file.py:Class"
        ) from error


def _import_module(name: str, folder: str | None = None) -> ModuleType:
    """Import a module from ``folder``. The default is the working directory."""
    folder = folder or os.getcwd()
    if sys.path[:1] != [folder]:
        # The folder stays on the path, because a function may import another file when it runs.
        sys.path.insert(0, folder)
    return importlib.import_module(name)


def _import_file(file: Path) -> ModuleType:
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {str(file)!r}")
    folder, name = root_and_module(file.resolve())
    module = _import_module(name, folder)
    if module.__file__ is None or not file.samefile(module.__file__):
        raise ImportError(
            f"the name {name!r} belongs to {module.__file__ or 'a module without a file'}. Rename"
            " the file, or check it in another process"
        )
    return module
