"""Print the results of ``mtenn check`` as tables and text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mtenn_core._cli.output import cell, echo, error_to_json
from mtenn_core.combination import Combination
from mtenn_core.testing import Report

STYLES = {
    "pass": "green",
    "fail": "bold red",
    "error": "bold red",
    "inconclusive": "yellow",
    "advice": "cyan",
}


@dataclass(frozen=True)
class Outcome:
    """The result of the checks for a target with one set of arguments.

    Attributes
    ----------
    target : path of the target
    report : the report. After an error, its only record describes the error
    arguments : arguments of the combination as text
    error : the error that stopped the checks, or None
    """

    target: str
    report: Report
    arguments: str = ""
    error: BaseException | None = None

    @property
    def verdict(self) -> Text:
        """The result in a few words, in color."""
        text = self.report.verdict if self.error is None else f"error: {type(self.error).__name__}"
        return cell(text, "green" if self.report.passed else "bold red")

    def to_json(self) -> dict[str, Any]:
        """Return the report or the error as JSON data."""
        if self.error is None:
            return self.report.to_json()
        return {"passed": False, "name": self.target, "error": error_to_json(self.error)}


def show(console: Console, outcome: Outcome) -> None:
    """Print the results of all checks, or the error."""
    report = outcome.report
    if outcome.error is not None:
        echo(f"error: {report.records[0].reason}", err=True)
        return
    name = ", ".join(filter(None, [report.name, report.combination]))
    console.print(cell(f"{name}: ") + outcome.verdict)
    if declared := list(_declared_facts(report.facts)):
        console.print(cell(f" declares: {', '.join(declared)}"))
    if report.records:
        console.print(_table(report))
    # Below the table, because a column would break their lines.
    for record in [*report.failures, *report.advice]:
        console.print()
        console.print(cell(record), soft_wrap=True)
    console.print()


def _table(report: Report) -> Table:
    table = Table(header_style="bold", box=None)
    for title in ("check", "", ""):
        table.add_column(title, overflow="fold")
    table.add_column("ms", justify="right")
    for record in report.records:
        status = cell(record.status, STYLES.get(record.status, "dim"))
        title = record.title
        if record.reason and not (record.failed or record.status == "advice"):
            title += f"\n{record.reason}"
        table.add_row(record.id, status, cell(title), f"{1e3 * record.duration:.0f}")
    return table


def show_summary(console: Console, outcomes: Sequence[Outcome]) -> None:
    """Print a line for each outcome."""
    table = Table(header_style="bold", box=None)
    for title in ("name", "arguments", "verdict"):
        table.add_column(title, overflow="fold")
    for outcome in outcomes:
        table.add_row(cell(outcome.target), cell(outcome.arguments), outcome.verdict)
    console.print(table)


def _declared_facts(facts: dict[str, Any]) -> Iterator[str]:
    """Yield the facts that differ from the defaults of Combination."""
    for fact, value in facts.items():
        default = getattr(Combination, fact, None)
        if isinstance(default, tuple | frozenset):
            default = list(default)
            value = value if isinstance(value, dict) else list(value)
        if value != default:
            yield f"{fact}={_fact_text(value)}"


def _fact_text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_fact_text, value))})"
    if isinstance(value, dict):
        return f"({', '.join(f'{name}: {kind}' for name, kind in value.items())})"
    return f"{value:g}" if isinstance(value, float) else str(value)
