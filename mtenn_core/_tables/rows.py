"""The rows of a table: which columns to read, what was read, and the check of each value.

A row that breaks a rule is an error. No row is left out.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from mtenn_core._process.printable import printable
from mtenn_core._registry.messages import suggestion
from mtenn_core.errors import TableError

if TYPE_CHECKING:
    from polars import DataFrame, Series

# Python objects of at most so many rows are in memory at a time.
CHUNK = 10_000


class Wanted(NamedTuple):
    """The columns to read. No other column needs memory.

    Attributes
    ----------
    name : the column with the name of the compound
    numbers : the columns with finite numbers
    deviations : those of ``numbers`` that hold standard deviations, which must not be negative
    pose : the column that tells the poses of a compound apart, or None
    """

    name: str
    numbers: tuple[str, ...]
    deviations: tuple[str, ...] = ()
    pose: str | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """The columns with text: names of compounds, and of poses."""
        if self.pose is None or self.pose == self.name:
            return (self.name,)
        return (self.name, self.pose)

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns, each once."""
        return tuple(dict.fromkeys((*self.texts, *self.numbers)))


class Rows(NamedTuple):
    """The checked rows of a table.

    Attributes
    ----------
    names : the compound of each row
    numbers : for each column, its numbers in float64
    poses : the pose of each row, or None
    places : the line of each row in the file, or None if row i is in line i + ``first``
    first : the line of the first row
    unit : the word for a place: "line" or "row"
    """

    names: Series
    numbers: dict[str, Series]
    poses: Series | None
    places: Series | None
    first: int = 1
    unit: str = "line"

    def only_places(self) -> Rows:
        """Return the rows without their values, so that these need no more memory."""
        return self._replace(names=self.names.clear(), numbers={}, poses=None)

    def place(self, row: int) -> int:
        """Return the line of a row."""
        return row + self.first if self.places is None else int(self.places[row])


# One row as text: its line in the file, and the values of Wanted.texts and of Wanted.numbers. It is
# flat, because the garbage collector looks at each tuple that holds another one again and again.
Record = tuple[Any, ...]


def column_of(frame: DataFrame, name: str) -> Series:
    """Return a column without its name. polars would take a name such as ^x$ for a pattern."""
    return frame[name].alias("")


def table_error(
    path: object, place: int | None, column: str | None, message: str, unit: str
) -> TableError:
    """Return an error that names the file, the line and the column."""
    where = [str(path)]
    if place is not None:
        where.append(f"{unit} {place}")
    if column is not None:
        where.append(f"column {column!r}")
    return TableError(
        printable(f"{', '.join(where)}: {message}"), path=str(path), place=place, column=column
    )


def missing_column(path: object, column: str, columns: Iterable[str], *, unit: str) -> TableError:
    """Return the error for a column that the table lacks."""
    known = list(columns)
    shown = ", ".join(map(repr, known[:30])) + (", …" if len(known) > 30 else "")
    return table_error(
        path,
        None,
        column,
        f"the table has no such column.{suggestion(column, known)} Its columns are"
        f" {shown or 'none'}",
        unit,
    )


def no_rows(path: object) -> TableError:
    """Return the error for a table without rows."""
    return table_error(path, None, None, "the table must have at least one row; found none", "line")


def checked_rows(path: object, records: Iterable[Record], wanted: Wanted) -> Rows:
    """Return the rows of a table whose values are text, each checked in turn.

    Raises
    ------
    TableError : a value breaks a rule. The message names file, line and column
    """
    import polars

    parts: list[polars.DataFrame] = []
    stream = iter(records)
    while chunk := list(islice(stream, CHUNK)):
        places, *values = zip(*chunk, strict=True)
        texts, numbers = values[: len(wanted.texts)], values[len(wanted.texts) :]
        columns: dict[str, Series] = {"place": polars.Series(places, dtype=polars.UInt32)}
        for i, own in enumerate(texts):
            columns[f"text {i}"] = polars.Series(own, dtype=polars.String)
        if (empty := _first_empty(columns["text 0"])) is not None:
            check_name(path, places[empty], wanted.name, texts[0][empty])
        for i, (column, own) in enumerate(zip(wanted.numbers, numbers, strict=True)):
            is_deviation = column in wanted.deviations
            columns[f"number {i}"] = _numbers(path, places, own, column, is_deviation)
        parts.append(polars.DataFrame(columns))
    if not parts:
        raise no_rows(path)
    frame = polars.concat(parts, rechunk=True)
    numbers_by_column = {c: frame[f"number {i}"] for i, c in enumerate(wanted.numbers)}
    rows = Rows(frame["text 0"], numbers_by_column, None, frame["place"])
    if wanted.pose is not None:
        rows = rows._replace(poses=frame[f"text {len(wanted.texts) - 1}"])
    check_poses(path, rows, wanted)
    return rows


def check_name(path: object, place: int, column: str, name: str | None, unit: str = "line") -> None:
    """Raise an error for an empty name of a compound."""
    if name is None or not name.strip():
        raise table_error(
            path,
            place,
            column,
            "the name of the compound must not be empty; found"
            f" {'nothing' if name is None else repr(name)}",
            unit,
        )


def _numbers(
    path: object, places: Sequence[int], texts: Sequence[str], column: str, is_deviation: bool
) -> Series:
    """Return the numbers of a column of text, each checked."""
    import polars

    found = polars.Series(texts, dtype=polars.String).cast(polars.Float64, strict=False)
    right = found.is_finite().fill_null(False)
    if right.all() and not (is_deviation and (found < 0).any()):
        return found
    numbers = array("d")
    for place, text in zip(places, texts, strict=True):
        number = parsed(text)
        if number is None:
            raise table_error(path, place, column, _found(text), "line")
        check_number(path, place, column, number, is_deviation)
        numbers.append(number)
    return polars.Series(numbers, dtype=polars.Float64)


def _found(text: str) -> str:
    if not text.strip():
        return "the value must be a number; found nothing. Fill it in, or leave the row out"
    hint = ""
    if parsed(text.replace(",", ".", 1)) is not None:
        hint = " Write a decimal point instead of the comma"
    return (
        f"the value must be a number; found {text!r}.{hint or ' Correct it, or leave the row out'}"
    )


def check_number(
    path: object,
    place: int,
    column: str,
    number: float | None,
    is_deviation: bool,
    unit: str = "line",
) -> None:
    """Raise an error for a missing number, for one that is not finite, or a negative deviation."""
    if number is None:
        raise table_error(path, place, column, _found(""), unit)
    if not math.isfinite(number):
        message = f"the value must be finite; found {number}. Correct it, or leave the row out"
        raise table_error(path, place, column, message, unit)
    if is_deviation and number < 0:
        message = f"a standard deviation must not be negative; found {number}"
        raise table_error(path, place, column, message, unit)


def parsed(text: str) -> float | None:
    """Return a decimal number in ASCII, as other programs read it, too; None for other text.

    ``float`` alone would accept "1_000", and the digits of all scripts.
    """
    if not text.isascii() or "_" in text:
        return None
    try:
        return float(text)
    except ValueError:
        return None


def check_poses(path: object, rows: Rows, wanted: Wanted) -> None:
    """Raise an error if two rows have the same compound and the same pose."""
    if rows.poses is None:
        return
    import polars

    frame = polars.DataFrame({"name": rows.names, "pose": rows.poses})
    again = ~frame.is_unique()
    if not again.any():
        return
    seen: dict[tuple[str, str], int] = {}
    places = again.arg_true().to_list()
    for row, key in zip(places, frame.filter(again).rows(), strict=True):
        if key in seen:
            raise table_error(
                path,
                rows.place(row),
                wanted.pose,
                f"compound {key[0]!r} must have each pose once; found pose {key[1]!r} again, which"
                f" is also in {rows.unit} {rows.place(seen[key])}. Leave one of the rows out",
                rows.unit,
            )
        seen[key] = row


def _first_empty(names: Series) -> int | None:
    """Return the row of the first name that is missing, empty or blank, or None."""
    for start in range(0, len(names), CHUNK):  # since it copies the names
        empty = (names[start : start + CHUNK].str.strip_chars() == "").fill_null(True)
        if empty.any():
            return start + int(empty.arg_true()[0])
    return None


def check_frame(path: object, rows: Rows, wanted: Wanted) -> None:
    """Check the rows of a table whose columns have types. A missing value is null."""
    if not len(rows.names):
        raise no_rows(path)
    wrong: list[tuple[int, int]] = []
    if (first := _first_empty(rows.names)) is not None:
        wrong.append((first, -1))
    for i, (column, numbers) in enumerate(rows.numbers.items()):
        bad = ~numbers.is_finite().fill_null(False)
        if column in wanted.deviations:
            bad = bad | (numbers < 0).fill_null(True)
        if (first := bad.arg_max()) is not None and bad[first]:
            wrong.append((first, i))
    if wrong:
        row, i = min(wrong)
        place = rows.place(row)
        if i < 0:
            check_name(path, place, wanted.name, rows.names[row], rows.unit)
        column = list(rows.numbers)[i]
        number = rows.numbers[column][row]
        check_number(path, place, column, number, column in wanted.deviations, rows.unit)
    check_poses(path, rows, wanted)
