"""Read a class's docstring in the style of numpydoc, as plain text."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple

_UNDERLINE = re.compile(r"-{3,}\s*")
_ROLE = re.compile(r":[\w:]+:`~?([^`]*)`")
_NAMES = re.compile(r"(?P<names>\*{0,2}\w+(?:, \*{0,2}\w+)*)(?:\s*:\s*(?P<slot>.*))?")
# In numpydoc, a type may stand where this project writes the meaning.
_TYPE = re.compile(
    r"(float|int|bool|str|None|list|tuple|dict|Tensor|torch\.\w+|callable)\b.*|\{.*|.*\boptional\b.*"
)


class Docstring(NamedTuple):
    """The parts of a docstring.

    Attributes
    ----------
    summary : its first paragraph, in one line
    text : the other paragraphs before the first section
    parameters : the description of each parameter, in one line
    """

    summary: str
    text: str
    parameters: dict[str, str]


def docstring_of(cls: type) -> Docstring:
    """Return the docstring of a class.

    A parameter without a description, or with one that begins with "see", has the description of
    the first base class that has another.
    """
    from mtenn_core.combination import Combination

    lines, _ = _sections(cls)
    paragraphs = "\n".join(lines).strip().split("\n\n")
    described: dict[str, str] = {}
    for base in itertools.takewhile(lambda base: base is not Combination, cls.__mro__):
        _, sections = _sections(base)
        for name, text in _parameters(sections.get("Parameters", [])):
            if text and described.get(name, "see ").startswith("see "):
                described[name] = text
    summary, *rest = [_plain(paragraph) for paragraph in paragraphs]
    return Docstring(_one_line(summary), "\n\n".join(rest), described)


def _sections(cls: type) -> tuple[list[str], dict[str, list[str]]]:
    """Return the lines before the first section, and the lines of each section."""
    lines = inspect.cleandoc(cls.__doc__ or "").splitlines()
    starts = [i for i in range(1, len(lines)) if _UNDERLINE.fullmatch(lines[i])]
    if not starts:
        return lines, {}
    ends = [*[start - 1 for start in starts[1:]], len(lines)]
    sections = {
        lines[start - 1].strip(): lines[start + 1 : end]
        for start, end in zip(starts, ends, strict=True)
    }
    return lines[: starts[0] - 1], sections


def _parameters(lines: list[str]) -> Iterator[tuple[str, str]]:
    """Yield the name and the description of each parameter in a section."""
    entries: list[list[str]] = []
    for line in lines:
        if line.strip() and not line[0].isspace():
            entries.append([line])
        elif entries:
            entries[-1].append(line)
    for first, *rest in entries:
        if match := _NAMES.fullmatch(first.strip()):
            slot = match["slot"] or ""
            text = rest if rest and _TYPE.fullmatch(slot) else [slot, *rest]
            for name in match["names"].split(", "):
                yield name.lstrip("*"), _one_line(_plain("\n".join(text)))


def _plain(text: str) -> str:
    """Return text without the marks of reStructuredText."""
    return _ROLE.sub(r"\1", text).replace("``", "").strip()


def _one_line(text: str) -> str:
    return " ".join(text.split())
