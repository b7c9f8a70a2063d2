"""Parquet files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mtenn_core._tables.rows import (
    Rows,
    Wanted,
    check_frame,
    column_of,
    missing_column,
    table_error,
)
from mtenn_core.errors import TableError

if TYPE_CHECKING:
    from polars import DataFrame, DataType, LazyFrame
    from torch import Tensor


class ParquetTable:
    """A Parquet file, whose columns have types. Errors count its rows from 1."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, wanted: Wanted) -> Rows:
        """Return the wanted columns, as :meth:`DelimitedTable.read` does."""
        import polars

        schema = self._schema()
        for column in wanted.columns:
            if column not in schema:
                raise missing_column(self.path, column, schema, unit="row")
        for column in wanted.numbers:
            if not schema[column].is_numeric():
                raise self._wrong_type(column, "numbers", schema[column])
        for column in wanted.texts:
            if schema[column].is_nested() or schema[column] == polars.Binary:
                raise self._wrong_type(column, "text or numbers", schema[column])
        # By place: before 2.0, polars takes a name such as ^x$ for a pattern.
        places = [list(schema).index(column) for column in wanted.columns]
        frame = self._collect(self._scan().select(polars.nth(places)))
        poses = None if wanted.pose is None else column_of(frame, wanted.pose).cast(polars.String)
        numbers = {each: column_of(frame, each).cast(polars.Float64) for each in wanted.numbers}
        names = column_of(frame, wanted.name).cast(polars.String)
        rows = Rows(names, numbers, poses, None, first=1, unit="row")
        check_frame(self.path, rows, wanted)
        return rows

    def check_new_columns(self, columns: Sequence[str]) -> None:
        """Raise an error if the table already has one of these columns."""
        for column in columns:
            if column in self._schema():
                message = "the weights need a column of this name, which the table has. Rename it"
                raise table_error(self.path, None, column, message, "row")

    def write(self, path: Path, columns: Sequence[str], values: Tensor) -> None:
        """Write all columns of the table and further ones, a part of the file at a time."""
        import polars

        further = polars.DataFrame(
            {name: numbers.numpy() for name, numbers in zip(columns, values.T, strict=True)}
        )
        both = polars.concat([self._scan(), further.lazy()], how="horizontal")
        try:
            both.sink_parquet(path)
        except polars.exceptions.PolarsError as problem:
            raise self._unreadable(problem) from None

    def _scan(self) -> LazyFrame:
        import polars

        return polars.scan_parquet(self.path, glob=False)

    def _schema(self) -> dict[str, DataType]:
        import polars

        try:
            return dict(self._scan().collect_schema())
        except polars.exceptions.PolarsError as problem:
            raise self._unreadable(problem) from None

    def _collect(self, scan: LazyFrame) -> DataFrame:
        import polars

        try:
            return scan.collect()
        except polars.exceptions.PolarsError as problem:
            raise self._unreadable(problem) from None

    def _unreadable(self, problem: Exception) -> TableError:
        first, *_ = str(problem).splitlines()
        return table_error(
            self.path, None, None, f"the file is no readable Parquet file: {first}", "row"
        )

    def _wrong_type(self, column: str, wanted: str, found: DataType) -> TableError:
        message = f"the column must hold {wanted}; its type is {found}"
        return table_error(self.path, None, column, message, "row")
