"""Read a table, combine its compounds with a progress bar, and print or write the results."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import click
from polars import DataFrame
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from mtenn_core._cli.combine_results import (
    results_frame,
    results_json,
    show_results,
    write_results,
    write_weights,
)
from mtenn_core._cli.output import echo, print_json, separate_stdout
from mtenn_core._engine.declarations import (
    check_argument_names,
    constructor_arguments,
    constructor_signature,
    listed_arguments,
)
from mtenn_core._registry import registry
from mtenn_core._registry.messages import describe_error
from mtenn_core._tables.combining import Chosen, Combined, CompoundError, check_choice, combined
from mtenn_core._tables.files import new_file
from mtenn_core._tables.grouping import Compounds, grouped
from mtenn_core._tables.rows import Rows, Wanted, table_error
from mtenn_core._tables.table import Table
from mtenn_core.combination import Combination
from mtenn_core.errors import MtennError, TableError
from mtenn_core.testing._target import parse_argument


class Outputs(NamedTuple):
    """The files and the form in which the command writes its results.

    Attributes
    ----------
    out, weights, plot : the files to write, or None
    digits : the number of significant digits of the results, or None for all
    as_json : True to print a JSON document
    """

    out: Path | None
    weights: Path | None
    plot: Path | None
    digits: int | None
    as_json: bool


def combine_table(
    table: Table,
    name: str,
    *,
    by: str,
    predictions: Sequence[str],
    arguments: Sequence[str],
    deviations: Sequence[str],
    inputs: Sequence[str],
    pose: str | None,
    outputs: Outputs,
) -> None:
    """Combine the poses of a table, and print or write the results. See the command's options."""
    chosen = Chosen(tuple(predictions), _parsed_inputs(inputs), tuple(deviations))
    numbers = tuple(dict.fromkeys((*predictions, *chosen.inputs.values(), *deviations)))
    if outputs.plot:
        _drawing()  # if a package is missing, raise the error before the work
    with separate_stdout() as stdout:
        combination = _created(name, _parsed_arguments(arguments))
        check_choice(combination, chosen)
        if outputs.weights:
            table.check_new_columns(_weight_columns(chosen.predictions))
        rows = table.read(Wanted(by, numbers, chosen.deviations, pose))
        compounds, rows = grouped(rows), rows.only_places()
        n_rows = sum(compounds.sizes)
        results = _combined(table, rows, combination, compounds, chosen, name, outputs)
        _check_results(results, chosen, outputs, name)
        frame = results_frame(compounds, results, outputs.digits)
        _write_files(table, compounds, results, frame, combination, chosen, outputs, name)
        if outputs.as_json:
            given = constructor_arguments(combination)
            print_json(results_json(table.path, name, given, n_rows, frame), stdout)
        elif outputs.out is None:
            show_results(frame, stdout)
        else:
            echo(f"wrote {outputs.out}: {len(frame)} compounds, {n_rows} poses", err=True)


def _created(name: str, arguments: dict[str, Any]) -> Combination:
    """Return the validated combination, for float64 and evaluation."""
    cls = registry.get(name, validate=False)
    try:
        check_argument_names(cls, arguments)
    except TypeError as problem:
        raise MtennError(str(problem)) from None
    try:
        combination = registry.create(name, **arguments)
    except MtennError:
        raise
    except Exception as problem:
        shown = listed_arguments(constructor_signature(cls).parameters)
        raise MtennError(
            f"{name} cannot be made with these arguments: {describe_error(problem)}. Its arguments"
            f" are: {shown}"
        ) from problem
    return combination.eval().double()


def _combined(
    table: Table,
    rows: Rows,
    combination: Combination,
    compounds: Compounds,
    chosen: Chosen,
    name: str,
    outputs: Outputs,
) -> Combined:
    """Combine all compounds. An error names the line of a pose, and its compound."""
    try:
        with _progress(sum(compounds.sizes), name, hidden=outputs.as_json) as on_poses:
            return combined(combination, compounds, chosen, on_poses)
    except CompoundError as problem:
        row = compounds.row(problem.pose)
        message = f"compound {compounds.name(problem.pose)!r}: {problem}"
        raise table_error(table.path, rows.place(row), None, message, rows.unit) from problem
    except MtennError:
        raise
    except Exception as problem:
        raise MtennError(f"{name} failed: {describe_error(problem)}") from problem


@contextmanager
def _progress(n_poses: int, name: str, *, hidden: bool) -> Iterator[Callable[[int], object]]:
    """Show a progress bar on a terminal. Yield a function that advances it by a number of poses."""
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    if hidden or not is_terminal:
        yield lambda n: None
        return
    columns = TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(name, total=n_poses)
        yield lambda n: bar.advance(task, n)


def _check_results(results: Combined, chosen: Chosen, outputs: Outputs, name: str) -> None:
    """Raise an error if an output needs what these results do not have."""
    if results.weights is None:
        for option, given in (
            ("--weights", outputs.weights),
            ("--error-column", chosen.deviations),
            ("--plot", outputs.plot),
        ):
            if given:
                raise TableError(
                    f"{option} needs one combined number per compound; {name} returns several"
                )
    if outputs.plot and results.weights is not None and results.weights.dim() > 1:
        raise TableError(f"--plot needs one number per pose; {name} takes several")


def _weight_columns(predictions: Sequence[str]) -> list[str]:
    """Return the names of the columns of pose weights."""
    if len(predictions) == 1:
        return ["weight"]
    return [f"weight_{column}" for column in predictions]


def _write_files(
    table: Table,
    compounds: Compounds,
    results: Combined,
    frame: DataFrame,
    combination: Combination,
    chosen: Chosen,
    outputs: Outputs,
    name: str,
) -> None:
    if outputs.weights and results.weights is not None:
        weights = compounds.in_table_order(results.weights)
        write_weights(outputs.weights, table, _weight_columns(chosen.predictions), weights)
    if outputs.plot:
        given = ", ".join(f"{k}={v!r}" for k, v in constructor_arguments(combination).items())
        with new_file(outputs.plot) as temporary:
            _drawing()(temporary, compounds, results, f"{name}({given}) of {table.path.name}")
    if outputs.out:
        write_results(outputs.out, frame)


def _drawing() -> Callable[..., None]:
    try:
        from mtenn_core._tables.picture import draw
    except ModuleNotFoundError as problem:
        raise TableError(
            f"--plot needs {problem.name}, which is not installed. Install it with"
            ' pip install "mtenn-core[html]"'
        ) from problem
    return draw


def _parsed_inputs(inputs: Sequence[str]) -> dict[str, str]:
    """Return the column of each pose input."""
    found: dict[str, str] = {}
    for text in inputs:
        name, _, column = text.partition("=")
        if name in found:
            raise _usage_error("--pose-input", f"found {name!r} twice")
        found[name] = column or name
    return found


def _parsed_arguments(arguments: Sequence[str]) -> dict[str, Any]:
    try:
        return dict(map(parse_argument, arguments))
    except ValueError as problem:
        raise _usage_error("--arg", str(problem)) from problem


def _usage_error(option: str, message: str) -> click.BadParameter:
    return click.BadParameter(message, click.get_current_context(), param_hint=f"'{option}'")
