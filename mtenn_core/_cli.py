"""The command ``mtenn``: what is installed, and whether its gradients are right."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

from mtenn_core import __version__
from mtenn_core._registry import PluginRecord, registry
from mtenn_core.errors import MtennError

if TYPE_CHECKING:
    from rich.console import Console

    from mtenn_core.testing import Report

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts to read.")


def _errors_to_exit_code(command: Callable[..., None]) -> Callable[..., None]:
    """Print an error of mtenn-core, as JSON where that was asked for, and exit with 1."""

    @wraps(command)
    def wrapped(as_json: bool, **kwargs: Any) -> None:
        try:
            command(as_json=as_json, **kwargs)
        except MtennError as error:
            if as_json:
                _print_json({"error": {"type": type(error).__name__, "message": str(error)}})
            else:
                click.echo(f"error: {error}", err=True)
            sys.exit(1)

    return wrapped


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="mtenn-core", message="mtenn-core %(version)s")
def main() -> None:
    """Combinations of pose predictions: list them, look one up, check its gradient."""


@main.command("list")
@as_json
@_errors_to_exit_code
def list_(as_json: bool) -> None:
    """List the installed combinations. Imports none of them."""
    records = registry.records()
    if as_json:
        _print_json([_plain(record) for record in records])
        return
    if not records:
        click.echo(
            "no combination is installed: no distribution has an entry point of the group"
            f" {registry.group!r}; install a plugin with pip"
        )
        return
    from rich.table import Table

    table = Table(header_style="bold", box=None)
    for title in ("name", "distribution", "version", "class"):
        table.add_column(title, overflow="fold")  # a name that is cut off cannot be copied
    for record in records:
        table.add_row(record.name, record.distribution, record.version, record.target)
    _console().print(table)


@main.command()
@click.argument("name")
@as_json
@_errors_to_exit_code
def info(name: str, as_json: bool) -> None:
    """Show what is known of the combination NAME. Does not import it."""
    record = registry.info(name)
    if as_json:
        _print_json(_plain(record))
        return
    from rich.table import Table

    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for key, value in _plain(record).items():
        table.add_row(key.replace("_", " "), str(value))
    _console().print(table)


@main.command()
@click.argument("name")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    show_default=True,
    help="Seed of the numbers to probe with.",
)
@as_json
@_errors_to_exit_code
def check(name: str, seed: int, as_json: bool) -> None:
    """Check that the gradient of the combination NAME is the derivative of its value.

    Exits with 0 if it is and with 1 if it is not.
    """
    with redirect_stdout(sys.stderr):  # whatever a plugin prints: standard output is the report
        reports = registry.check(name, seed=seed)
    if as_json:
        _print_json([report.to_json() for report in reports])
    else:
        for report in reports:
            _print_report(report)
    sys.exit(not all(report.passed for report in reports))


def _print_report(report: Report) -> None:
    from rich.table import Table
    from rich.text import Text

    styles = {"pass": "green", "fail": "bold red", "error": "bold red", "inconclusive": "yellow"}
    table = Table("check", "", "", "ms", header_style="bold", box=None)
    table.columns[3].justify = "right"
    for record in report.records:
        status = Text(record.status, styles.get(record.status, "dim"))
        why = Text(record.title + (f"\n{record.reason}" if record.reason else ""))
        table.add_row(record.id, status, why, f"{1e3 * record.duration:.0f}")
    verdict = Text("passed", "green") if report.passed else Text("failed", "bold red")
    console = _console()
    console.print(Text(f"{report.name}, {report.combination}: ") + verdict)
    console.print(table)


def _plain(record: PluginRecord) -> dict[str, Any]:
    plain = asdict(record)
    del plain["plugin"]
    return plain


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, allow_nan=False))


def _console() -> Console:
    from rich.console import Console

    # Names and paths are not markup, and numbers in them need no colour.
    return Console(highlight=False, markup=False, soft_wrap=not sys.stdout.isatty())
