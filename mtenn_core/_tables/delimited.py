"""CSV and TSV files.

:func:`_careful_rows` defines what a file means: Python's csv module splits it, and each value is
checked. If a file is plain (no quotes, no blank lines, equal numbers of fields), polars gives the
same rows many times faster. If polars finds anything odd, the careful way decides.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import IO, TYPE_CHECKING, Any

from mtenn_core._tables.rows import (
    Record,
    Rows,
    Wanted,
    check_frame,
    checked_rows,
    column_of,
    missing_column,
    no_rows,
    table_error,
)
from mtenn_core.errors import TableError

if TYPE_CHECKING:
    from torch import Tensor

DELIMITERS = {".csv": ",", ".tsv": "\t"}
BLOCK = 2**20  # bytes


class DelimitedTable:
    """A CSV or TSV file with a header.

    Parameters
    ----------
    path : its suffix tells the delimiter
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.delimiter = DELIMITERS[path.suffix.lower()]

    def read(self, wanted: Wanted) -> Rows:
        """Return the wanted columns.

        Raises
        ------
        TableError : a column is missing, or a row breaks a rule
        """
        self._places(wanted.columns)
        rows = self._fast_rows(wanted) if self._is_plain() else None
        if rows is None:
            rows = checked_rows(self.path, self._records(wanted), wanted)
        return rows

    def check_new_columns(self, columns: Sequence[str]) -> None:
        """Raise an error if the table already has one of these columns."""
        header = self._header()
        for column in columns:
            if column in header:
                raise table_error(
                    self.path,
                    1,
                    column,
                    "the weights need a column of this name, which the table has. Rename it",
                    "line",
                )

    def write(self, file: IO[str], columns: Sequence[str], values: Tensor) -> None:
        """Write all columns of the table and further ones. Fields of the table stay as they are.

        Parameters
        ----------
        columns : the names of the further columns
        values : their numbers, shape (n_rows, n_columns)
        """
        # csv quotes a field with a carriage return only if the end of a line has one.
        lines_to_file = SimpleNamespace(write=lambda line: file.write(line[:-2] + "\n"))
        writer = csv.writer(lines_to_file, delimiter=self.delimiter, lineterminator="\r\n")
        with self._lines() as lines:
            _, header = next(lines)
            writer.writerow([*header, *columns])
            for block in values.split(100_000):
                for own, (_, fields) in zip(block.tolist(), lines, strict=False):
                    writer.writerow([*fields, *own])

    def _header(self) -> list[str]:
        with self._lines() as lines:
            for _, fields in lines:
                return fields
        raise no_rows(self.path)

    def _places(self, columns: Sequence[str]) -> list[int]:
        """Return the places of columns in the header."""
        header = self._header()
        for column in columns:
            if column not in header:
                raise missing_column(self.path, column, header, unit="line")
            if header.count(column) > 1:
                raise table_error(
                    self.path,
                    1,
                    column,
                    "the name of a column that is used must be unique; found"
                    f" {header.count(column)} columns of this name. Rename the others",
                    "line",
                )
        return [header.index(column) for column in columns]

    @contextmanager
    def _lines(self) -> Iterator[Iterator[tuple[int, list[str]]]]:
        """Open the file, and yield its rows with their lines: the header, and all that follow."""
        with self.path.open(encoding="utf-8-sig", newline="") as file:
            yield self._split(file)

    def _split(self, file: IO[str]) -> Iterator[tuple[int, list[str]]]:
        reader = csv.reader(file, delimiter=self.delimiter, strict=True)
        n_fields, line = 0, 1
        while True:
            try:
                fields = next(reader)
            except StopIteration:
                return
            except UnicodeDecodeError:
                raise not_utf8(self.path) from None
            except csv.Error as problem:
                message = f"the line cannot be split into fields: {problem}. Look at its quotes"
                raise table_error(self.path, line, None, message, "line") from None
            if fields:
                n_fields = n_fields or len(fields)
                if len(fields) != n_fields:
                    raise self._ragged(line, len(fields), n_fields)
                yield line, fields
            line = reader.line_num + 1

    def _ragged(self, line: int, found: int, n_fields: int) -> TableError:
        message = f"each line must have {n_fields} fields, like the first one; found {found}"
        return table_error(self.path, line, None, message, "line")

    def _records(self, wanted: Wanted) -> Iterator[Record]:
        places = self._places((*wanted.texts, *wanted.numbers))
        with self._lines() as lines:
            next(lines)
            for line, fields in lines:
                yield (line, *[fields[i] for i in places])

    def _is_plain(self) -> bool:
        """Return True if each line is a row with the same number of fields, without quotes."""
        if self.path.stat().st_size == 0:
            return False
        n_fields = len(self._header())
        with self.path.open("rb") as file:
            return n_fields > 1 and _is_periodic(file, self.delimiter.encode(), n_fields)

    def _fast_rows(self, wanted: Wanted) -> Rows | None:
        """Return the rows from polars. None if something is wrong: the careful way says what."""
        import polars

        types: dict[str, Any] = dict.fromkeys(wanted.numbers, polars.Float64)
        if types.keys() & {*wanted.texts}:
            return None  # a column cannot have two types
        scan = polars.scan_csv(
            self.path,
            separator=self.delimiter,
            quote_char=None,
            glob=False,
            infer_schema=False,
            schema_overrides=types,
        )
        try:
            # By place: before 2.0, polars takes a name such as ^x$ for a pattern.
            frame = scan.select(polars.nth(self._places(wanted.columns))).collect()
        except polars.exceptions.PolarsError:
            return None
        poses = None if wanted.pose is None else column_of(frame, wanted.pose)
        numbers = {each: column_of(frame, each) for each in wanted.numbers}
        rows = Rows(column_of(frame, wanted.name), numbers, poses, None, first=2)
        if rows.poses is not None and rows.poses.null_count():
            return None
        try:
            check_frame(self.path, rows, wanted)
        except TableError as problem:
            # A repeated pose has been found here with its line. The rest may be a blank line.
            if problem.column is not None and problem.column == wanted.pose:
                raise
            return None
        return rows


def _is_periodic(file: IO[bytes], delimiter: bytes, n_fields: int) -> bool:
    """Return True if each line has ``n_fields`` fields, and if there are no quotes.

    polars does not say so itself: it fills short lines, and it may read only the beginning of long
    ones. So this function looks only at delimiters and ends of lines: each end must follow
    ``n_fields - 1`` delimiters.
    """
    period = delimiter * (n_fields - 1) + b"\n"
    others = bytes(byte for byte in range(256) if byte not in period)
    rest, last = b"", b""
    while block := file.read(BLOCK):
        if b'"' in block or not _only_before_ends(last + block):
            return False
        # Ten times as fast as a mask in numpy.
        found = rest + block.translate(None, delete=others)
        n_lines, n_rest = divmod(len(found), n_fields)
        if found != period * n_lines + period[:n_rest]:
            return False
        rest, last = found[len(found) - n_rest :], block[-1:]
    # The last line may lack its end. The last byte may be a return without a newline.
    return len(rest) == (0 if last == b"\n" else n_fields - 1) and last != b"\r"


def _only_before_ends(block: bytes) -> bool:
    """Return True if each return stands before a newline, or at the end of the block."""
    if b"\r" not in block:  # it is faster than to count
        return True
    return block.removesuffix(b"\r").count(b"\r") == block.count(b"\r\n")


def not_utf8(path: Path) -> TableError:
    """Return the error for a text file in another encoding. It names the line."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as problem:
                found = f"byte {problem.object[problem.start]:#04x}"
                message = f"the file must be text in UTF-8; found {found}. Save it as UTF-8"
                return table_error(path, number, None, message, "line")
    return table_error(path, None, None, "the file must be text in UTF-8", "line")
