"""The command ``mtenn doctor``: find problems, and print them as a table."""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace

import click
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mtenn_core._cli.output import (
    cell,
    console,
    echo,
    errors_to_exit_code,
    json_option,
    print_json,
    separate_stdout,
)
from mtenn_core._cli.torch_import import torch_importable
from mtenn_core._process.child import ChildDiedError
from mtenn_core._registry import PluginRecord, Policy, Problem, Registry, registry
from mtenn_core._registry.isolated_imports import import_isolated
from mtenn_core._registry.metadata import unmet_requirements
from mtenn_core.errors import PluginWarning, RegistryError


@click.command()
@click.option("--no-import", is_flag=True, help="Find only problems that need no import.")
@click.option(
    "--time-limit",
    type=click.FloatRange(0, min_open=True),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="Limit for the import of one plugin.",
)
@json_option
@errors_to_exit_code
def command(no_import: bool, time_limit: float, as_json: bool) -> None:
    """Find problems with installed plugins, and print how to solve them.

    Imports the plugins of each distribution in a child process, and reports a crash as a problem.
    Exits with 1 if there is a problem.
    """
    sys.exit(not _examine(imports=not no_import, time_limit=time_limit, as_json=as_json))


def _examine(*, imports: bool, time_limit: float, as_json: bool) -> bool:
    """Print all problems; return True if there are none."""
    # strict=False, because a strict registry would raise an error instead of returning problems.
    lenient = Registry(registry.group, replace(registry.policy.resolved(), strict=False))
    with separate_stdout() as stdout, warnings.catch_warnings():
        warnings.simplefilter("ignore", PluginWarning)  # the problems contain these warnings
        records = lenient.records()
        problems = [*lenient.problems(), *_unmet(records)]
        if imports:
            with torch_importable(lenient):
                problems += _import_problems(records, lenient.policy.resolved(), time_limit)
        if as_json:
            documents = [problem.to_json() for problem in problems]
            print_json({"combinations": len(records), "problems": documents}, stdout)
        else:
            _print_table(console(stdout), problems)
            echo(_summary(len(records), len(problems), imports=imports), file=stdout)
    return not problems


def _unmet(records: list[PluginRecord]) -> Iterator[Problem]:
    """Yield a problem for each distribution whose declared dependencies are not met."""
    for record in {r.metadata: r for r in reversed(records) if r.metadata}.values():
        if unmet := unmet_requirements(record):
            found = ", ".join(f"{wanted} (found: {found})" for wanted, found in unmet.items())
            remedy = shlex.join(["pip", "install", *unmet])
            yield Problem("requirement", f"{record.origin} requires {found}. Run: {remedy}", record)


def _import_problems(
    records: list[PluginRecord], policy: Policy, time_limit: float
) -> Iterator[Problem]:
    if os.name != "posix":
        echo(
            f"no plugin was imported: an isolated import needs POSIX; found {sys.platform}",
            err=True,
        )
        return
    importable = [record for record in records if _may_be_imported(record, policy)]
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    try:
        for _, problems in track(
            import_isolated(importable, time_limit),
            "importing",
            total=len(importable),
            console=Console(stderr=True),
            transient=True,
            disable=not is_terminal,
        ):
            yield from problems
    except ChildDiedError as death:
        text = f"no plugin was imported, because the child process does not start: {death}"
        yield Problem("does not start", text)


def _may_be_imported(record: PluginRecord, policy: Policy) -> bool:
    try:
        policy.check(record)
    except RegistryError:  # the problems contain this error
        return False
    return True


def _print_table(console: Console, problems: list[Problem]) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 1, 0))
    table.add_column(style="bold red", no_wrap=True)
    table.add_column(overflow="fold")
    for problem in problems:
        table.add_row(problem.kind, cell(problem.message))
    if problems:
        console.print(table)


def _summary(n_combinations: int, n_problems: int, *, imports: bool) -> str:
    note = "" if imports else ", none of them imported"
    return f"combinations: {n_combinations}{note}; problems: {n_problems or 'none'}"
