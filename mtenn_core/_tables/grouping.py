"""Group the rows of a table by compound."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

from mtenn_core._tables.rows import Rows

if TYPE_CHECKING:
    from polars import Series
    from torch import Tensor


class Compounds(NamedTuple):
    """The poses of a table, one compound after the other, in the order of first appearance.

    Attributes
    ----------
    names : the name of each compound
    sizes : the number of poses of each compound
    numbers : for each column, the numbers of the poses in float64, shape (n_poses,)
    rows : the row of each pose in the table, or None if the table has this order
    """

    names: Series
    sizes: list[int]
    numbers: dict[str, Tensor]
    rows: Tensor | None

    def row(self, pose: int) -> int:
        """Return the row of a pose."""
        return pose if self.rows is None else int(self.rows[pose])

    def name(self, pose: int) -> str:
        """Return the name of the compound of a pose."""
        ends = itertools.accumulate(self.sizes)
        return str(next(name for name, end in zip(self.names, ends, strict=True) if pose < end))

    def in_table_order(self, numbers: Tensor) -> Tensor:
        """Return numbers of the poses, shape (n_poses, …), in the order of the table's rows."""
        if self.rows is None:
            return numbers
        import torch

        ordered = torch.empty_like(numbers)
        ordered[self.rows] = numbers
        return ordered


def grouped(rows: Rows) -> Compounds:
    """Return the compounds of a table. Rows of one compound need not be adjacent."""
    import polars

    # Many short runs would need time and memory, and they usually are no compounds.
    if rows.names.rle_id()[-1] < len(rows.names) / 2:
        runs = rows.names.rle()
        names, lengths = runs.struct.field("value"), runs.struct.field("len")
        if names.n_unique() == len(names):
            numbers = {column: _tensor(series) for column, series in rows.numbers.items()}
            return Compounds(names, lengths.to_list(), numbers, None)
    columns = [series.alias(f"number {i}") for i, series in enumerate(rows.numbers.values())]
    frame = polars.DataFrame([rows.names.alias("name"), *columns]).with_row_index("row")
    lists = frame.group_by("name", maintain_order=True).agg(polars.all())
    numbers = {
        column: _tensor(lists[f"number {i}"].explode()) for i, column in enumerate(rows.numbers)
    }
    row = _tensor(lists["row"].explode().cast(polars.Int64))
    return Compounds(lists["name"], lists["row"].list.len().to_list(), numbers, row)


def _tensor(series: Series) -> Tensor:
    """Return a column as a tensor with memory of its own, since a combination may write to it."""
    import torch

    return torch.from_numpy(series.to_numpy(writable=True))
