"""How ``mtenn check`` shows what was found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mtenn_core._cli.output import error_to_json
from mtenn_core.combination import Combination
from mtenn_core.testing import Report

STYLES = {"pass": "green", "fail": "bold red", "error": "bold red", "inconclusive": "yellow"}


@dataclass(frozen=True)
class Outcome:
    """What came of a target with one set of arguments; of an error, a report that tells it."""

    target: str
    report: Report
    error: Exception | None = None

    @property
    def verdict(self) -> Text:
        """A few words, in colour."""
        text = self.report.verdict if self.error is None else f"error: {type(self.error).__name__}"
        return Text(text, "green" if self.report.passed else "bold red")

    def to_json(self) -> dict[str, Any]:
        """Return the report, or the error, as JSON knows it."""
        if self.error is None:
            return self.report.to_json()
        return {"passed": False, "name": self.target, "error": error_to_json(self.error)}


def show(console: Console, outcome: Outcome) -> None:
    """Print what every check found, or the error."""
    report = outcome.report
    if outcome.error is not None:
        click.echo(f"error: {report.records[0].reason}", err=True)
        return
    who = ", ".join(filter(None, [report.name, report.combination]))
    console.print(Text(f"{who}: ") + outcome.verdict)
    if declared := list(_declared(report.facts)):
        console.print(Text(f" declares: {', '.join(declared)}"))
    if report.records:
        console.print(_table(report))
    for record in report.failures:  # below, where no column breaks their lines
        console.print()
        console.print(Text(str(record)), soft_wrap=True)
    console.print()


def _table(report: Report) -> Table:
    table = Table(header_style="bold", box=None)
    for title in ("check", "", ""):
        table.add_column(title, overflow="fold")
    table.add_column("ms", justify="right")
    for record in report.records:
        status = Text(record.status, STYLES.get(record.status, "dim"))
        why = f"\n{record.reason}" if record.reason and not record.failed else ""
        table.add_row(record.id, status, Text(record.title + why), f"{1e3 * record.duration:.0f}")
    return table


def show_summary(console: Console, outcomes: Sequence[Outcome]) -> None:
    """Print a line for each outcome."""
    table = Table(header_style="bold", box=None)
    for title in ("name", "arguments", "verdict"):
        table.add_column(title, overflow="fold")
    for outcome in outcomes:
        table.add_row(outcome.target, Text(_arguments(outcome.report)), outcome.verdict)
    console.print(table)


def _arguments(report: Report) -> str:
    """Return what is between the brackets of its ``repr``, on one line."""
    _, bracket, inside = report.combination.partition("(")
    return " ".join((inside.removesuffix(")") if bracket else report.combination).split())


def _declared(facts: dict[str, Any]) -> Iterator[str]:
    """Yield those facts that are not what every combination is until it declares another."""
    for fact, value in facts.items():
        default = getattr(Combination, fact, None)
        if isinstance(default, tuple | frozenset):
            default, value = list(default), list(value)
        if value != default:
            yield f"{fact}={_plain(value)}"


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_plain, value))})"
    return f"{value:g}" if isinstance(value, float) else str(value)
