"""Finds what is wrong with installed plugins, and shows it: what ``mtenn doctor`` does."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace

import click
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mtenn_core._cli.output import console, own_stdout, print_json
from mtenn_core._process.child import ChildDiedError
from mtenn_core._registry import PluginRecord, Policy, Problem, Registry, registry
from mtenn_core._registry.isolated_imports import import_apart
from mtenn_core.errors import PluginWarning, RegistryError


def examine(*, imports: bool, time_limit: float, as_json: bool) -> bool:
    """Print all problems and return whether there is none."""
    # A strict one would stop at the first look.
    lenient = Registry(registry.group, replace(registry.policy.resolved(), strict=False))
    with own_stdout() as stdout, warnings.catch_warnings():
        warnings.simplefilter("ignore", PluginWarning)  # they are among the problems
        records = lenient.records()
        problems = lenient.problems()
        if imports:
            problems += _import_problems(lenient, records, time_limit)
        if as_json:
            found = [problem.to_json() for problem in problems]
            print_json({"combinations": len(records), "problems": found}, stdout)
        else:
            _show(console(stdout), problems)
            click.echo(_summary(len(records), len(problems), imports=imports), file=stdout)
    return not problems


def _import_problems(
    known: Registry, records: list[PluginRecord], time_limit: float
) -> Iterator[Problem]:
    if os.name != "posix":
        click.echo(f"nothing was imported: {sys.platform} cannot do it in isolation", err=True)
        return
    policy = known.policy.resolved()
    fit = [record for record in records if _may_be_imported(record, policy)]
    visible = sys.stderr is not None and sys.stderr.isatty()
    try:
        for _, problems in track(
            import_apart(fit, time_limit),
            "importing",
            total=len(fit),
            console=Console(stderr=True),
            transient=True,
            disable=not visible,
        ):
            yield from problems
    except ChildDiedError as death:
        text = f"the process that is to import plugins does not start, so none was tried: {death}"
        yield Problem("does not start", text)


def _may_be_imported(record: PluginRecord, policy: Policy) -> bool:
    try:
        policy.check(record)
    except RegistryError:  # which is a problem already
        return False
    return True


def _show(console: Console, problems: list[Problem]) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 1, 0))
    table.add_column(style="bold red", no_wrap=True)
    table.add_column(overflow="fold")
    for problem in problems:
        table.add_row(problem.kind, problem.message)
    if problems:
        console.print(table)


def _summary(n_combinations: int, n_problems: int, *, imports: bool) -> str:
    how = "" if imports else ", none of them imported"
    return f"combinations: {n_combinations}{how}; problems: {n_problems or 'none'}"
