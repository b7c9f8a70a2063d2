"""The command ``mtenn list``: print the table of combinations, or the lines of a pins file."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from mtenn_core._cli.output import (
    cell,
    console,
    echo,
    errors_to_exit_code,
    json_option,
    print_json,
)
from mtenn_core._registry import PluginRecord, registry
from mtenn_core._registry.lookup import current_snapshot
from mtenn_core.errors import PluginPinError


@click.command()
@click.option("--all", "everything", is_flag=True, help="Include disabled and shadowed plugins.")
@click.option("--pins", is_flag=True, help="Print the lines of a pins file (MTENN_PINS) instead.")
@json_option
@errors_to_exit_code
def command(everything: bool, pins: bool, as_json: bool) -> None:
    """List the installed combinations, without importing them."""
    if pins:
        if everything or as_json:
            raise click.UsageError("--pins cannot be combined with other options")
        sys.exit(not _print_pins())
    records = registry.records(everything=everything)
    if as_json:
        print_json([record.to_json() for record in records])
    elif records:
        _print_table(records, with_status=everything)
    else:
        echo(_no_records())
    if problems := registry.problems():
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        echo(f"{count}: see `mtenn doctor`", err=True)


def nothing_installed() -> str:
    """Return the message for an environment without plugins."""
    return (
        f"no combination is installed: no distribution has an entry point in the group"
        f" {registry.group!r}. Install a plugin with pip"
    )


def _print_table(records: Sequence[PluginRecord], *, with_status: bool) -> None:
    from rich.table import Table

    titles = ["name", "distribution", "version", "class"]
    if with_status:
        titles.append("status")
    table = Table(header_style="bold", box=None)
    for title in titles:
        table.add_column(title, overflow="fold")  # a name that is cut off cannot be copied
    for record in records:
        cells = [record.name, record.distribution, record.version, record.target]
        if with_status:
            cells.append(": ".join(filter(None, [record.status, record.reason])))
        table.add_row(*map(cell, cells))
    console().print(table)


def _print_pins() -> bool:
    """Print a line for each distribution; return True if all of them can be pinned.

    A strict policy also requires that there are no other problems. The present pins do not matter:
    in ``mtenn list --pins > pins.txt``, the shell has already emptied the file of ``MTENN_PINS``.
    """
    from mtenn_core._registry.pins import pin

    snapshot = current_snapshot(registry)
    problems = snapshot.without_pins().problems() if snapshot.policy.strict else ()
    errors = [problem.message for problem in problems]
    records = snapshot.available_records()
    for record in {record.owner: record for record in records}.values():
        try:
            echo(pin(record))
        except PluginPinError as error:
            errors.append(str(error))
    for message in errors:
        echo(f"error: {message}", err=True)
    return not errors


def _no_records() -> str:
    statuses = [record.status for record in registry.records(everything=True)]
    if n_disabled := statuses.count("disabled"):
        return f"no combination may be used; {n_disabled} disabled. See `mtenn list --all`"
    return nothing_installed()
