"""Describe the class of a combination, as JSON data and as text."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from inspect import getattr_static
from textwrap import TextWrapper
from typing import TYPE_CHECKING, Any

from mtenn_core._cli.docstrings import docstring_of
from mtenn_core._process.printable import value_text

if TYPE_CHECKING:
    from mtenn_core._registry import PluginRecord
    from mtenn_core.combination import Combination

_WIDTH = 100
_COLUMN = 14
# The facts that a class declares.
_FACTS = (
    "pose_inputs",
    "pose_columns",
    "min_poses",
    "domain",
    "smooth",
    "stochastic",
    "properties",
)


def class_facts(record: PluginRecord, cls: type[Combination]) -> dict[str, Any]:
    """Return what a combination class says of itself as JSON data.

    Raises
    ------
    PluginSpecError : its ``examples`` are malformed
    """
    from mtenn_core._engine.declarations import constructor_signature
    from mtenn_core._registry.gate import class_examples

    docstring = docstring_of(cls)
    examples = class_examples(record, cls)
    return {
        "summary": docstring.summary,
        "text": docstring.text,
        "arguments": [
            _argument(parameter, docstring.parameters.get(parameter.name, ""))
            for parameter in constructor_signature(cls).parameters.values()
        ],
        **_declared_facts(record, cls, examples),
        "examples": [
            {name: value_text(value) for name, value in example.items()} for example in examples
        ],
    }


def _declared_facts(
    record: PluginRecord, cls: type[Combination], examples: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    from mtenn_core._engine.declarations import overrides
    from mtenn_core._registry.gate import make_example

    # A property has a value only in an instance. It depends on the arguments.
    varying = [name for name in _FACTS if isinstance(getattr_static(cls, name), property)]
    instance = make_example(record, cls, examples[0]) if varying else cls
    found = {name: getattr(instance if name in varying else cls, name) for name in _FACTS}
    inputs, columns = found["pose_inputs"], found["pose_columns"]
    return {
        "pose_inputs": [{"name": name, "kind": _kind(inputs, name)} for name in inputs],
        "pose_columns": list(columns) if isinstance(columns, tuple) else columns,
        "min_poses": found["min_poses"],
        "domain": [bound if math.isfinite(bound) else None for bound in found["domain"]],
        "smooth": found["smooth"],
        "stochastic": found["stochastic"],
        "closed_form": overrides(cls, "pose_weights"),
        "properties": sorted(found["properties"]),
        "of_first_example": varying,
    }


def class_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines that show these facts."""
    yield from _paragraphs(facts["summary"])
    if facts["text"]:
        yield ""
        yield from _paragraphs(facts["text"])
    if facts["arguments"]:
        yield "\narguments"
    for argument in facts["arguments"]:
        default = " (required)" if argument["required"] else ""
        if argument["default"] is not None:
            default = f" = {argument['default']}"
        yield f"  {argument['name']}{default}"
        yield from TextWrapper(_WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6).wrap(
            argument["description"]
        )
    yield ""
    for name, text in _declared(facts):
        yield f"{name:<{_COLUMN}}{text}"


def _declared(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield a name and a text for each declared fact that is not the usual one."""
    inputs = [
        each["name"] + (f" ({each['kind']})" if each["kind"] else "")
        for each in facts["pose_inputs"]
    ]
    if inputs:
        yield "pose inputs", ", ".join(inputs)
    columns = facts["pose_columns"]
    if columns is not None:
        yield "pose columns", ", ".join(columns) if isinstance(columns, list) else str(columns)
    if facts["min_poses"] > 1:
        yield "min poses", str(facts["min_poses"])
    low, high = facts["domain"]
    if (low, high) != (None, None):
        yield "domain", f"({'-inf' if low is None else low}, {'inf' if high is None else high})"
    if not facts["smooth"]:
        yield "smooth", "no: its value has kinks"
    if facts["stochastic"]:
        yield "stochastic", "yes: it draws random numbers"
    yield "derivative", "in closed form" if facts["closed_form"] else "by autograd"
    if facts["properties"]:
        yield "properties", ", ".join(facts["properties"])
    if facts["of_first_example"]:
        yield "note", f"{', '.join(facts['of_first_example'])}: as in the first example"
    for example in facts["examples"]:
        given = ", ".join(f"{name}={value}" for name, value in example.items())
        yield "example", given or "without arguments"


def _argument(parameter: inspect.Parameter, description: str) -> dict[str, Any]:
    empty, kind = inspect.Parameter.empty, parameter.kind
    default = None if parameter.default is empty else value_text(parameter.default)
    stars = "*" if kind is parameter.VAR_POSITIONAL else ""
    stars = "**" if kind is parameter.VAR_KEYWORD else stars
    return {
        "name": stars + parameter.name,
        "default": default,
        "required": default is None and not stars,
        "description": description,
    }


def _kind(pose_inputs: Any, name: str) -> str | None:
    return pose_inputs[name] if isinstance(pose_inputs, Mapping) else None


def _paragraphs(text: str) -> Iterator[str]:
    """Yield lines of a docstring, whose own line breaks may be part of a formula or a list."""
    yield from text.splitlines()
