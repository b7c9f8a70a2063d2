"""The results of ``mtenn combine`` as a table, a file or a JSON document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import click
import polars
from torch import Tensor

from mtenn_core._cli.output import cell, console
from mtenn_core._tables.combining import Combined
from mtenn_core._tables.files import new_file
from mtenn_core._tables.grouping import Compounds
from mtenn_core._tables.parquet import ParquetTable
from mtenn_core._tables.table import Table

# A terminal shows so many compounds.
MAX_SHOWN = 50


def results_frame(compounds: Compounds, results: Combined, digits: int | None) -> polars.DataFrame:
    """Return the results with a row for each compound, in the order of the table."""
    columns = [compounds.names.alias("compound")]
    if results.predictions.dim() == 1:
        columns.append(polars.Series("prediction", results.predictions.numpy()))
    else:
        columns += [
            polars.Series(f"prediction_{number}", values.numpy())
            for number, values in enumerate(results.predictions.T, start=1)
        ]
    if results.errors is not None:
        columns.append(polars.Series("error", results.errors.numpy()))
    if results.effective is not None:
        # NaN, which JSON lacks, is the effective number of poses if all weights are 0.
        effective = polars.Series("effective_poses", results.effective.numpy())
        columns.append(effective.fill_nan(None))
    columns.append(polars.Series("poses", compounds.sizes, dtype=polars.Int64))
    frame = polars.DataFrame(columns)
    if digits is None:
        return frame
    return frame.with_columns(polars.col(polars.Float64).round_sig_figs(digits))


def write_results(path: Path, frame: polars.DataFrame) -> None:
    """Write the results in the format of the suffix."""
    with new_file(path) as temporary:
        if path.suffix.lower() == ".parquet":
            frame.write_parquet(temporary)
        else:
            frame.write_csv(temporary, separator="\t" if path.suffix.lower() == ".tsv" else ",")


def write_weights(path: Path, table: Table, columns: Sequence[str], weights: Tensor) -> None:
    """Write the rows of the table with the pose weights, shape (n_rows,) or (n_rows, n)."""
    values = weights.reshape(len(weights), -1)
    with new_file(path) as temporary:
        if isinstance(table, ParquetTable):
            table.write(temporary, columns, values)
            return
        with temporary.open("w", encoding="utf-8", newline="") as file:
            table.write(file, columns, values)


def show_results(frame: polars.DataFrame, stdout: TextIO) -> None:
    """Print a table on a terminal, and CSV into a file or pipe."""
    if not stdout.isatty():
        click.echo(frame.write_csv(), file=stdout, nl=False)
        return
    from rich.table import Table as RichTable

    table = RichTable(header_style="bold", box=None)
    for i, name in enumerate(frame.columns):
        table.add_column(name, overflow="fold", justify="right" if i else "left")
    for row in frame.head(MAX_SHOWN).iter_rows():
        table.add_row(*(cell(f"{v:.6g}" if isinstance(v, float) else v) for v in row))
    console(stdout).print(table)
    if len(frame) > MAX_SHOWN:
        click.echo(f"… and {len(frame) - MAX_SHOWN} more. --out FILE writes all", file=stdout)


def results_json(
    path: Path, name: str, arguments: Mapping[str, Any], n_rows: int, frame: polars.DataFrame
) -> dict[str, Any]:
    """Return the results as JSON data."""
    several = [column for column in frame.columns if column.startswith("prediction_")]
    compounds = []
    for row in frame.iter_rows(named=True):
        if several:
            row["prediction"] = [row.pop(column) for column in several]
        compounds.append(row)
    return {
        "table": str(path),
        "combination": name,
        "arguments": {key: repr(value) for key, value in arguments.items()},
        "rows": n_rows,
        "compounds": compounds,
    }
