"""The command ``mtenn combine``: parse its arguments, and combine the poses of a table."""

from __future__ import annotations

from pathlib import Path

import click

from mtenn_core._cli.completion import complete_name
from mtenn_core._cli.output import errors_to_exit_code, json_option
from mtenn_core._cli.torch_import import torch_importable
from mtenn_core._registry import registry
from mtenn_core._tables.files import check_writable
from mtenn_core._tables.rows import table_error
from mtenn_core._tables.table import open_table
from mtenn_core.errors import TableError

RESULT_SUFFIXES = (".csv", ".tsv", ".parquet")
PICTURE_SUFFIXES = (".png", ".svg", ".pdf")

file_type = click.Path(path_type=Path)


@click.command()
@click.argument("table", type=file_type)
@click.argument("name", shell_complete=complete_name)
@click.option(
    "--by", required=True, metavar="COLUMN", help="The column with the names of the compounds."
)
@click.option(
    "--column",
    "predictions",
    multiple=True,
    required=True,
    metavar="COLUMN",
    help="The column with the predictions to combine. Repeat it if NAME takes several per pose.",
)
@click.option(
    "--arg",
    "arguments",
    multiple=True,
    metavar="NAME=VALUE",
    help="An argument of the combination. Can be repeated.",
)
@click.option(
    "--error-column",
    "deviations",
    multiple=True,
    metavar="COLUMN",
    help="The column with the standard deviations of the predictions, which are independent.",
)
@click.option(
    "--pose-input",
    "inputs",
    multiple=True,
    metavar="INPUT[=COLUMN]",
    help="A pose input of the combination, and its column if this has another name.",
)
@click.option(
    "--pose",
    metavar="COLUMN",
    help="The column that tells the poses of a compound apart. Two equal ones are an error.",
)
@click.option(
    "--out", type=file_type, metavar="FILE", help="Write the results to a .csv, .tsv or .parquet."
)
@click.option(
    "--weights",
    type=file_type,
    metavar="FILE",
    help="Write the rows of TABLE with a further column weight, in the format of TABLE.",
)
@click.option(
    "--plot",
    type=file_type,
    metavar="FILE",
    help="Draw the values, their errors and the pose weights: a .png, .svg or .pdf.",
)
@click.option(
    "--digits",
    type=click.IntRange(1),
    metavar="N",
    help="Round the results to N significant digits. The weights keep all digits.",
)
@click.option("--force", is_flag=True, help="Replace files that exist.")
@json_option
@errors_to_exit_code
def command(
    table: Path,
    name: str,
    by: str,
    predictions: tuple[str, ...],
    arguments: tuple[str, ...],
    deviations: tuple[str, ...],
    inputs: tuple[str, ...],
    pose: str | None,
    out: Path | None,
    weights: Path | None,
    plot: Path | None,
    digits: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Combine the poses of each compound in TABLE with the combination NAME.

    TABLE is a .csv, .tsv, .parquet or .sdf file with a row for each pose. The tags of an SDF file
    are its columns, and _Name is the title line. Rows of one compound need not be adjacent.

    The result has a row for each compound: its combined prediction, the error of it (to first
    order, with --error-column), the effective number of poses, and the number of poses.
    """
    try:
        _check_outputs(table, out, weights, plot, force)
        opened = open_table(table)
        registry.info(name)  # before the slow import of torch, because the name may be wrong
        with torch_importable(registry):
            from mtenn_core._cli.combine_run import Outputs, combine_table

            combine_table(
                opened,
                name,
                by=by,
                predictions=predictions,
                arguments=arguments,
                deviations=deviations,
                inputs=inputs,
                pose=pose,
                outputs=Outputs(out, weights, plot, digits, as_json),
            )
    except BrokenPipeError:
        raise
    except OSError as problem:
        raise TableError(str(problem)) from problem


def _check_outputs(
    table: Path, out: Path | None, weights: Path | None, plot: Path | None, force: bool
) -> None:
    """Raise an error, before any work, if a file cannot be written."""
    rules = (
        ("--out", out, RESULT_SUFFIXES),
        ("--weights", weights, (table.suffix.lower(),)),
        ("--plot", plot, PICTURE_SUFFIXES),
    )
    given = [path.resolve() for _, path, _ in rules if path is not None]
    for option, path, suffixes in rules:
        if path is None:
            continue
        if path.suffix.lower() not in suffixes:
            message = f"the file of {option} must end in {' or '.join(suffixes)}"
            raise table_error(path, None, None, message, "line")
        if given.count(path.resolve()) > 1:
            raise table_error(path, None, None, "two outputs need two files", "line")
        check_writable(path, table, replace=force)
