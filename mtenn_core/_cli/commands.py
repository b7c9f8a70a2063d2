"""What ``mtenn`` can be told."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from mtenn_core import __version__
from mtenn_core._cli.output import Commands, console, errors_to_exit_code, print_json
from mtenn_core._registry import PluginRecord, registry
from mtenn_core.errors import MtennError, PluginPinError

# Typed here, since importing them takes torch along; a test holds them to the real ones.
LEVELS = ("gate", "full", "quality")

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts to read.")


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="mtenn-core", message="mtenn-core %(version)s")
def main() -> None:
    """Combinations of pose predictions: list them, look one up, check its gradient."""


@main.command("list")
@click.option("--all", "everything", is_flag=True, help="Also what is disabled or shadowed.")
@click.option("--pins", is_flag=True, help="Print lines for a pins file (MTENN_PINS) instead.")
@as_json
@errors_to_exit_code
def list_(everything: bool, pins: bool, as_json: bool) -> None:
    """List the installed combinations. Imports none of them."""
    if pins:
        if everything or as_json:
            raise click.UsageError("--pins goes with no other option")
        sys.exit(not _print_pins())
    records = registry.records(everything=everything)
    if as_json:
        print_json([record.to_json() for record in records])
    elif records:
        _print_table(records, with_status=everything)
    else:
        click.echo(_nothing_to_list())
    if problems := registry.problems():
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        click.echo(f"{count}: see `mtenn doctor`", err=True)


def _print_table(records: Sequence[PluginRecord], *, with_status: bool) -> None:
    from rich.table import Table

    table = Table(header_style="bold", box=None)
    for title in ("name", "distribution", "version", "class", *("status",) * with_status):
        table.add_column(title, overflow="fold")  # a name that is cut off cannot be copied
    for record in records:
        status = ": ".join(filter(None, [record.status, record.reason]))
        facts = record.name, record.distribution, record.version, record.target
        table.add_row(*facts, *(status,) * with_status)
    console().print(table)


def _print_pins() -> bool:
    """Print a line for each distribution, and return whether all can be pinned."""
    from mtenn_core._registry.pins import pin

    complete = True
    for record in {record.owner: record for record in registry.records()}.values():
        try:
            click.echo(pin(record))
        except PluginPinError as error:
            complete = False
            click.echo(f"error: {error}", err=True)
    return complete


@main.command()
@click.argument("name")
@as_json
@errors_to_exit_code
def info(name: str, as_json: bool) -> None:
    """Show what is known of the combination NAME. Does not import it."""
    from mtenn_core._registry.pins import pin

    record = registry.info(name)
    plain = record.to_json()
    try:
        plain["pin"] = pin(record)
    except PluginPinError as error:  # editable, say
        plain["pin"], plain["no_pin"] = None, str(error)
    about = [p for p in registry.problems() if p.record and p.record.metadata == record.metadata]
    plain["problems"] = [problem.message for problem in about]
    if as_json:
        print_json(plain)
        return
    for key, value in plain.items():
        if value:  # on one line, to be copied
            shown = "; ".join(value) if isinstance(value, list) else value
            click.echo(f"{key:<13} {shown}")


@main.command()
@click.option("--no-import", is_flag=True, help="Only what shows without importing the plugins.")
@click.option(
    "--time-limit",
    type=click.FloatRange(0, min_open=True),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="For the import of one plugin.",
)
@as_json
@errors_to_exit_code
def doctor(no_import: bool, time_limit: float, as_json: bool) -> None:
    """Look for what is wrong with installed plugins, and say what to do.

    Imports them, each distribution's in a process of its own, where a crash is a result, too. Exits
    with 1 if there is a problem.
    """
    from mtenn_core._cli.doctor import examine

    sys.exit(not examine(imports=not no_import, time_limit=time_limit, as_json=as_json))


@main.command()
@click.argument("targets", nargs=-1, metavar="[TARGET]...")
@click.option("--all", "everything", is_flag=True, help="Check every installed combination.")
@click.option(
    "--arg",
    "arguments",
    multiple=True,
    metavar="NAME=VALUE",
    help="Argument for the combination, instead of its examples; repeat for more.",
)
@click.option(
    "--level",
    type=click.Choice(LEVELS),
    default="full",
    show_default=True,
    help="gate: what the registry checks; full: the contract; quality: beyond it.",
)
@click.option("--only", multiple=True, metavar="ID", help="Run this check alone; repeat for more.")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    show_default=True,
    help="Seed of the numbers to probe with.",
)
@click.option(
    "--isolated", is_flag=True, help="In a child process, for a plugin that crashes or hangs."
)
@click.option(
    "--time-limit",
    type=click.FloatRange(0, min_open=True),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="With --isolated: for one target; one check may take half of it.",
)
@click.option(
    "--memory-limit",
    type=click.IntRange(1),
    default=4096,
    show_default=True,
    metavar="MIB",
    help="With --isolated: beyond what torch takes by itself.",
)
@as_json
@click.option(
    "--html",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    metavar="FILE",
    help="Write a page with plots, too.",
)
@errors_to_exit_code
def check(
    targets: tuple[str, ...],
    everything: bool,
    arguments: tuple[str, ...],
    as_json: bool,
    html: Path | None,
    **options: Any,
) -> None:
    """Check that combinations are what they say, and their gradients right.

    \b
    TARGET is one of
      boltzmann             a name that `mtenn list` shows
      package.module:Class  what can be imported from here
      folder/file.py:Class  a file
    and instead of a class, a function that makes an instance.

    Exits with 0 if every check has passed, with 1 if not, and with 2 if it cannot understand.
    """  # noqa: D301 - click wants the backspace itself
    _check_usage(targets, everything, arguments, html)
    # Before torch is imported: what is installed may keep torch from starting.
    if not len(registry) and everything:
        raise MtennError(_nothing_installed())
    from mtenn_core._cli.check import check_targets

    names = _qualified_names() if everything else targets
    sys.exit(not check_targets(names, arguments, as_json=as_json, html=html, **options))


def _check_usage(
    targets: tuple[str, ...],
    everything: bool,
    arguments: tuple[str, ...],
    html: Path | None,
) -> None:
    if bool(targets) == everything:
        found = "both" if everything else "neither"
        raise click.UsageError(
            "expected a combination (a name that `mtenn list` shows, package.module:Class or"
            f" folder/file.py:Class) or --all; found {found}"
        )
    if arguments and (everything or len(targets) > 1):
        raise click.UsageError("--arg is for one combination: give one name alone")
    ctx = click.get_current_context()
    for name in ("time_limit", "memory_limit"):
        given = ctx.get_parameter_source(name) is not ParameterSource.DEFAULT
        if given and not ctx.params["isolated"]:
            raise click.UsageError(f"--{name.replace('_', '-')} needs --isolated")
    if html and not os.access(html.parent, os.W_OK):
        raise click.BadParameter(
            f"cannot write into the folder {str(html.parent)!r}; does it exist?",
            param_hint="'--html'",
        )


def _qualified_names() -> list[str]:
    return [record.qualified_name for record in registry.records()]


def _nothing_to_list() -> str:
    statuses = [record.status for record in registry.records(everything=True)]
    if n_disabled := statuses.count("disabled"):
        return f"no combination may be used; disabled: {n_disabled}, see `mtenn list --all`"
    return _nothing_installed()


def _nothing_installed() -> str:
    return (
        f"no combination is installed: no distribution has an entry point of the group"
        f" {registry.group!r}; install a plugin with pip"
    )


@main.command()
@click.argument("name")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Where to write it, instead of ./mtenn-NAME; new or empty.",
)
@as_json
@errors_to_exit_code
def new(name: str, output: Path | None, as_json: bool) -> None:
    """Write a package with a combination NAME, to begin from. It passes its tests as it is."""
    from mtenn_core._cli.new import new_plugin

    new_plugin(name, output, as_json=as_json)
