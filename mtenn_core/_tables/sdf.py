"""SDF files: the data items ("tags") of molecules.

Tags are text behind each molecule, as the CTfile format describes it, and need no chemistry to
read. A molecule that a toolkit would refuse is a row like others, and errors know the line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

from mtenn_core._registry.messages import suggestion
from mtenn_core._tables.delimited import not_utf8
from mtenn_core._tables.rows import (
    Record,
    Rows,
    Wanted,
    checked_rows,
    no_rows,
    table_error,
)
from mtenn_core.errors import TableError

if TYPE_CHECKING:
    from torch import Tensor

TITLE = "_Name"  # as in RDKit
END = "$$$$"
TAG = re.compile(r">.*<([^<>]*)>")


class Molecule(NamedTuple):
    """One molecule of the file.

    Attributes
    ----------
    line : its first line
    tags : the values by name, with the line of each; the title line is ``_Name``
    text : all of its lines
    """

    line: int
    tags: dict[str, tuple[int, str]]
    text: list[str]


class SDFTable:
    """An SDF file. Each molecule is a row, and its tags are columns.

    Parameters
    ----------
    path : the file
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, wanted: Wanted) -> Rows:
        """Return the wanted tags, as :meth:`DelimitedTable.read` does."""
        try:
            return checked_rows(self.path, self._records(wanted), wanted)
        except TableError as problem:
            raise self._at_own_line(problem, wanted) from None

    def _at_own_line(self, problem: TableError, wanted: Wanted) -> TableError:
        """Return the error with the line of its column. A record has that of its first number."""
        if problem.place is None or problem.column is None:
            return problem
        for molecule in self._molecules():
            tags = molecule.tags
            is_here = tags.get(wanted.numbers[0], (None,))[0] == problem.place
            if is_here and problem.column in tags:
                line = tags[problem.column][0]
                text = str(problem).replace(f"line {problem.place}", f"line {line}", 1)
                return TableError(text, path=problem.path, place=line, column=problem.column)
        return problem

    def check_new_columns(self, columns: Sequence[str]) -> None:
        """Raise an error if the first molecule already has one of these tags."""
        first = next(self._molecules())
        for column in columns:
            self._check_new(first, column)

    def write(self, file: IO[str], columns: Sequence[str], values: Tensor) -> None:
        """Write all molecules with further tags. All else stays as it is."""
        for molecule, own in zip(self._molecules(), _rows(values), strict=True):
            text = molecule.text[:-1] if molecule.text[-1].startswith(END) else molecule.text
            file.writelines(f"{line}\n" for line in text)
            if text[-1] and len(molecule.tags) > 1:  # a tag ends with a blank line
                file.write("\n")
            for name, number in zip(columns, own, strict=True):
                self._check_new(molecule, name)
                file.write(f">  <{name}>\n{number!r}\n\n")
            file.write(f"{END}\n")

    def _check_new(self, molecule: Molecule, tag: str) -> None:
        if tag in molecule.tags:
            message = "the weights need a tag of this name, which the file has. Rename it"
            raise table_error(self.path, molecule.tags[tag][0], tag, message, "line")

    def _records(self, wanted: Wanted) -> Iterator[Record]:
        for molecule in self._molecules():
            values = [self._value(molecule, tag) for tag in (*wanted.texts, *wanted.numbers)]
            yield (molecule.tags[wanted.numbers[0]][0], *values)

    def _value(self, molecule: Molecule, tag: str) -> str:
        if tag in molecule.tags:
            return molecule.tags[tag][1]
        if molecule.line == 1:
            known = [each for each in molecule.tags if each != TITLE]
            message = (
                f"the first molecule has no tag <{tag}>.{suggestion(tag, known)} Its tags are"
                f" {', '.join(known) or 'none'}"
            )
            raise table_error(self.path, None, tag, message, "line")
        message = (
            f"each molecule must have the tag <{tag}>; the one that begins here lacks it. Add the"
            " tag, or leave the molecule out"
        )
        raise table_error(self.path, molecule.line, tag, message, "line")

    def _molecules(self) -> Iterator[Molecule]:
        with self.path.open(encoding="utf-8-sig") as file:
            text: list[str] = []
            first = number = 1
            try:
                for number, line in enumerate(file, start=1):
                    text.append(line.rstrip("\n"))
                    if line.startswith(END):
                        if line.strip() != END:
                            message = f"the line {END} ends a molecule; found text behind it"
                            raise table_error(self.path, number, None, message, "line")
                        yield self._molecule(first, text)
                        text, first = [], number + 1
            except UnicodeDecodeError:
                raise not_utf8(self.path) from None
        if any(line.strip() for line in text):
            yield self._molecule(first, text)
        elif first == 1:
            raise no_rows(self.path)

    def _molecule(self, first: int, text: list[str]) -> Molecule:
        tags = {TITLE: (first, text[0])}
        if text[0].startswith(END):
            raise self._not_a_molecule(first)
        lines = iter(enumerate(text, start=first))
        for number, line in lines:
            match = TAG.match(line) if line.startswith(">") and number > first + 3 else None
            if match is None:
                continue
            value = []
            for _, part in lines:
                if not part.strip() or part.startswith(END):
                    break
                value.append(part)
            if match[1] in tags:
                message = "a molecule must have each tag once; found it again"
                raise table_error(self.path, number, match[1], message, "line")
            tags[match[1]] = number + 1, "\n".join(value)
        return Molecule(first, tags, text)

    def _not_a_molecule(self, line: int) -> TableError:
        message = f"expected a molecule; found {END}, the end of one"
        return table_error(self.path, line, None, message, "line")


def _rows(values: Tensor) -> Iterator[list[float]]:
    for block in values.split(100_000):
        yield from block.tolist()
