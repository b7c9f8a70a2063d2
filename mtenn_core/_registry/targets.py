"""What ``mtenn check`` is given, from the text to the combination and back."""

from __future__ import annotations

import ast
import importlib
import os
import shlex
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial, reduce
from pathlib import Path
from types import ModuleType
from typing import Any

from mtenn_core._engine.declarations import constructor_arguments
from mtenn_core._registry import Registry, registry
from mtenn_core._registry.arguments import build_example, declared_examples
from mtenn_core.combination import Combination
from mtenn_core.errors import CombinationNotFoundError, TargetError


@dataclass(frozen=True)
class Target:
    """A combination as the command line names it.

    Attributes
    ----------
    path : a name of the registry, ``"package.module:Class"`` or ``"folder/file.py:Class"``;
        instead of a class, a function that makes an instance
    arguments : for the class; none are its ``examples``
    """

    path: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def command(self, *options: str) -> str:
        """Return the line for the shell that checks it."""
        words = ["mtenn", "check", self.path]
        for text in self.argument_texts():
            words += ["--arg", text]
        return shlex.join([*words, *options])

    def argument_texts(self) -> list[str]:
        """Return each argument as ``name=value``, which :func:`parse_argument` reads."""
        return [f"{name}={_as_text(value)}" for name, value in self.arguments.items()]

    def combinations(self, known: Registry = registry) -> Iterator[tuple[str, Target, Combination]]:
        """Import what ``path`` names, and make an instance with each set of arguments.

        Yields
        ------
        who it is, for a report; what it alone is called; the instance

        Raises
        ------
        TargetError : there is no such module, file or attribute, or it makes no combination
        RegistryError : a name that is not known, or a plugin that does not load
        """
        try:
            record = known.info(self.path)
        except CombinationNotFoundError:
            if not self._may_be_imported():
                raise
            yield from self._imported()
            return
        combination = known.get(self.path, validate=False)
        name = record.qualified_name
        if self.arguments:
            made = self._made(combination, self.arguments)
            yield str(record), Target(name, self.arguments), made
            return
        for example in declared_examples(record, combination):
            yield str(record), Target(name, example), build_example(record, combination, example)

    def _may_be_imported(self) -> bool:
        """Whether it can be a file or a module: ``my_rules:x`` can, ``my-rules:x`` cannot."""
        where, colon, _ = self.path.rpartition(":")
        is_module = bool(colon) and all(map(str.isidentifier, where.split(".")))
        return is_module or where.endswith(".py") or self.path.endswith(".py")

    def _imported(self) -> Iterator[tuple[str, Target, Combination]]:
        make = _import(self.path)
        examples: Any = getattr(make, "examples", ({},))
        if self.arguments:
            examples = [dict(self.arguments)]
        listed = isinstance(examples, list | tuple) and all(isinstance(e, dict) for e in examples)
        if not (listed and examples):
            raise TargetError(
                f"{self.path!r}: its `examples` must be a tuple of dicts, at least one; found"
                f" {examples!r}"
            )
        for arguments in examples:
            yield self.path, Target(self.path, arguments), self._made(make, arguments)

    def _made(self, make: Callable[..., Any], arguments: Mapping[str, Any]) -> Combination:
        try:
            made = make(**arguments)
        except (Exception, SystemExit) as error:
            raise TargetError(
                f"{self.path!r} cannot be called with {dict(arguments)}: {type(error).__name__}:"
                f" {error}; give it arguments with --arg name=value"
            ) from error
        if not isinstance(made, Combination):
            raise TargetError(
                f"{self.path!r} must be a subclass of mtenn_core.Combination, or a function that"
                f" returns an instance; it gave {made!r}"
            )
        return made


def target_of(source: Any, path: str | None = None) -> Target | None:
    """Return how to name a combination, a class or a function, or None if a shell cannot.

    Parameters
    ----------
    path : what to call it, where that is known
    """
    if isinstance(source, Combination):
        arguments, source = constructor_arguments(source), type(source)
    else:
        arguments = {}
        while isinstance(source, partial):
            if source.args:  # whose names are not known
                return None
            arguments, source = source.keywords | arguments, source.func
    path = path or _path_of(source)
    if path is None or not all(map(_has_text, arguments.values())):
        return None
    return Target(path, arguments)


def parse_argument(text: str) -> tuple[str, Any]:
    """Return name and value of ``name=value``; a value that is no Python literal is a string.

    Raises
    ------
    ValueError : there is no name or no ``=``
    """
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise ValueError(f"expected name=value, pred_scale=10 say; found {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError):
        return name, float(value) if value in ("inf", "-inf", "nan") else value


def _as_text(value: Any) -> str:
    if isinstance(value, str) and parse_argument(f"x={value}")[1] == value:
        return value
    return repr(value)


def _has_text(value: Any) -> bool:
    """Whether the command line can say ``value``."""
    try:
        return bool(parse_argument(f"x={_as_text(value)}")[1] == value)
    except Exception:  # what its repr or its comparison raises
        return False


def _import(path: str) -> Any:
    where, _, attribute = path.rpartition(":")
    if not (where and attribute):
        raise TargetError(f"{path!r} names no class or function in it: add :Class")
    try:
        module = _import_file(Path(where)) if where.endswith(".py") else _import_module(where)
        return reduce(getattr, attribute.split("."), module)
    except (Exception, SystemExit) as error:
        raise TargetError(
            f"cannot load {path!r}: {type(error).__name__}: {error}; expected a name that `mtenn"
            " list` shows, package.module:Class, or folder/file.py:Class"
        ) from error


def _import_module(name: str, folder: str | None = None) -> ModuleType:
    """Import from ``folder`` first; without it from where the shell is, as ``python -m`` does."""
    folder = folder or os.getcwd()
    if sys.path[:1] != [folder]:
        sys.path.insert(0, folder)  # and stays: a function may import another file when called
    return importlib.import_module(name)


def _import_file(file: Path) -> ModuleType:
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {str(file)!r}")
    folder, name = _root_and_module(file.resolve())
    module = _import_module(name, folder)
    found = module.__file__
    if found is None or not file.samefile(found):
        raise ImportError(
            f"the name {name!r} belongs to {found or 'a module without a file'}: rename the file,"
            " or check it in a process of its own"
        )
    return module


def _path_of(source: Any) -> str | None:
    """Return ``module:name`` or ``file.py:name`` for what a fresh process can import, else None."""
    name, module = getattr(source, "__qualname__", "<"), sys.modules.get(source.__module__)
    file = getattr(module, "__file__", None)
    if "<" in name or file is None or not _is(source, module, name):
        return None
    root, dotted = _root_and_module(Path(file).resolve())
    if root in map(os.path.realpath, sysconfig.get_paths().values()):
        return f"{dotted}:{name}"
    return f"{os.path.relpath(file)}:{name}"


def _is(source: Any, module: Any, name: str) -> bool:
    return reduce(lambda found, part: getattr(found, part, None), name.split("."), module) is source


def _root_and_module(file: Path) -> tuple[str, str]:
    """Return the folder to import a file from, and its module name there."""
    parts = [] if file.name == "__init__.py" else [file.stem]
    folder = file.parent
    while (folder / "__init__.py").exists():
        parts.insert(0, folder.name)
        folder = folder.parent
    return str(folder), ".".join(parts)
