"""Targets of ``mtenn check``: a combination and its arguments as text for the shell."""

from __future__ import annotations

import ast
import os
import shlex
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial, reduce
from pathlib import Path
from typing import Any

from mtenn_core._engine.declarations import constructor_arguments
from mtenn_core._process.printable import value_text
from mtenn_core.combination import Combination


@dataclass(frozen=True)
class Target:
    """A combination and its arguments, for the command line.

    Attributes
    ----------
    path : a name in the registry, ``"package.module:Class"`` or ``"folder/file.py:Class"``. A
        function that makes an instance may stand in the place of the class
    arguments : arguments of the class; if empty, the class is tested with its ``examples``
    """

    path: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def command(self, *options: str) -> str:
        """Return the shell command that checks this target."""
        words = ["mtenn", "check", self.path]
        for text in self.argument_texts():
            words += ["--arg", text]
        return shlex.join([*words, *options])

    def argument_texts(self) -> list[str]:
        """Return each argument as text for :func:`parse_argument`: ``name=value``."""
        return [f"{name}={_value_text(value)}" for name, value in self.arguments.items()]


def target_of(source: Any, path: str | None = None) -> Target | None:
    """Return the target for a combination, class or function, or None if text cannot express it.

    Parameters
    ----------
    path : the path of the target, if it is known
    """
    if isinstance(source, Combination):
        arguments, source = constructor_arguments(source), type(source)
    else:
        arguments = {}
        while isinstance(source, partial):
            if source.args:  # their names are unknown
                return None
            arguments, source = source.keywords | arguments, source.func
    path = path or _path_of(source)
    if path is None or not all(map(_has_text, arguments.values())):
        return None
    return Target(path, arguments)


def parse_argument(text: str) -> tuple[str, Any]:
    """Return the name and the value in ``name=value``.

    A value that is not a Python literal or a float is a string.

    Raises
    ------
    ValueError : the name or the ``=`` is missing
    """
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise ValueError(f"expected name=value, for example pred_scale=10; found {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError):
        return name, float(value) if value in ("inf", "-inf", "nan") else value


def root_and_module(file: Path) -> tuple[str, str]:
    """Return the folder from which a file can be imported, and the name of its module there."""
    parts = [] if file.name == "__init__.py" else [file.stem]
    folder = file.parent
    while (folder / "__init__.py").exists():
        parts.insert(0, folder.name)
        folder = folder.parent
    return str(folder), ".".join(parts)


def _value_text(value: Any) -> str:
    if isinstance(value, str) and parse_argument(f"x={value}")[1] == value:
        return value
    return value_text(value)


def _has_text(value: Any) -> bool:
    """Return True if the command line can express ``value``."""
    try:
        return bool(parse_argument(f"x={_value_text(value)}")[1] == value)
    except KeyboardInterrupt:
        raise
    except BaseException:  # its repr or its comparison may raise
        return False


def _path_of(source: Any) -> str | None:
    """Return ``module:name`` or ``file.py:name``, or None if a new process cannot import it."""
    name, module = getattr(source, "__qualname__", "<"), sys.modules.get(source.__module__)
    file = getattr(module, "__file__", None)
    if "<" in name or file is None or _attribute(module, name) is not source:
        return None
    root, module_name = root_and_module(Path(file).resolve())
    if root in map(os.path.realpath, sysconfig.get_paths().values()):
        return f"{module_name}:{name}"
    return f"{os.path.relpath(file)}:{name}"


def _attribute(module: Any, name: str) -> Any:
    return reduce(lambda parent, part: getattr(parent, part, None), name.split("."), module)
