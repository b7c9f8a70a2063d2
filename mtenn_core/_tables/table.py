"""Open a table of poses: its suffix tells the format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mtenn_core._tables.delimited import DelimitedTable
from mtenn_core._tables.parquet import ParquetTable
from mtenn_core._tables.rows import table_error
from mtenn_core._tables.sdf import SDFTable
from mtenn_core.errors import TableError

Table = DelimitedTable | ParquetTable | SDFTable
FORMATS: dict[str, Callable[[Path], Table]] = {
    ".csv": DelimitedTable,
    ".tsv": DelimitedTable,
    ".parquet": ParquetTable,
    ".sdf": SDFTable,
}


def open_table(path: Path) -> Table:
    """Return the table in a file.

    Raises
    ------
    TableError : there is no such file, its suffix is unknown, or a package is missing
    """
    check_suffix(path)
    if not path.exists():
        raise table_error(path, None, None, "there is no such file", "line")
    if not path.is_file():
        raise table_error(path, None, None, "the table must be a regular file", "line")
    try:
        import numpy  # noqa: F401 - polars needs it to hand over numbers
        import polars  # noqa: F401
    except ModuleNotFoundError as problem:
        raise TableError(
            f"tables need {problem.name}, which is not installed. Install it with"
            ' pip install "mtenn-core[tables]"'
        ) from problem
    return FORMATS[path.suffix.lower()](path)


def check_suffix(path: Path) -> None:
    """Raise an error if the suffix of a file tells no format."""
    if path.suffix.lower() not in FORMATS:
        known = ", ".join(FORMATS)
        message = f"the name of a table must end in one of {known}; found {path.suffix!r}"
        raise table_error(path, None, None, message, "line")
