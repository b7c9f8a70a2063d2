"""Runs the checks of ``mtenn check``, and shows what they found."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from mtenn_core._cli.check_report import Outcome, show, show_summary
from mtenn_core._cli.output import console, error_text, own_stdout, print_json
from mtenn_core._registry.isolated_checks import TITLES, check_target
from mtenn_core._registry.targets import Target, parse_argument
from mtenn_core.errors import MtennError
from mtenn_core.testing import CHECKS, Record, Report
from mtenn_core.testing._catalogue import chosen_checks
from mtenn_core.testing._checks.check import Level
from mtenn_core.testing._runner import described


@dataclass(frozen=True)
class Checks:
    """Which checks to run on every target, and where.

    Attributes
    ----------
    ids : of the checks, in the order in which they run
    are_all : whether those are all of the level
    isolated : whether to run them in a child process, with the limits
    """

    level: Level
    ids: Sequence[str]
    are_all: bool
    seed: int
    isolated: bool
    time_limit: float
    memory_limit: int

    def reports(self, target: Target, on_record: Callable[[Record], object]) -> Iterator[Report]:
        """Yield the report of each set of arguments when its checks have run."""
        options: dict[str, Any] = {
            "level": self.level,
            "seed": self.seed,
            "only": None if self.are_all else self.ids,
            "on_record": on_record,
        }
        if self.isolated:
            options |= {"time_limit": self.time_limit, "memory_limit": self.memory_limit}
        return check_target(target, isolated=self.isolated, **options)


def check_targets(
    paths: Sequence[str],
    arguments: Sequence[str],
    *,
    level: Level,
    only: Sequence[str],
    as_json: bool,
    html: Path | None,
    **options: Any,
) -> bool:
    """Check all targets, show what was found, and return whether everything has passed."""
    targets = [Target(path, _parsed(arguments)) for path in paths]
    checks = Checks(level, _ids(level, only), are_all=not only, **options)
    if html:
        _page([])  # fails where the page with the reports would, but before they are made
    outcomes: list[Outcome] = []
    with own_stdout() as stdout:
        show_one = _show_nothing if as_json else partial(show, console(stdout))
        try:
            for target in targets:
                _check_and_show(target, checks, outcomes, show_one)
        finally:  # on Ctrl-C, too: what was finished counts
            if html:
                html.write_text(_page(outcomes), encoding="utf-8")
            if as_json:
                print_json([outcome.to_json() for outcome in outcomes], stdout)
            elif len(outcomes) > 1:
                show_summary(console(stdout), outcomes)
    return all(outcome.report.passed for outcome in outcomes)


def _check_and_show(
    target: Target,
    checks: Checks,
    outcomes: list[Outcome],
    show_one: Callable[[Outcome], None],
) -> None:
    """Append an outcome for each set of arguments, and show them when all are there."""
    n_before = len(outcomes)
    begun: list[Record] = []
    try:
        with _progress(target, checks, begun) as on_record:
            for report in checks.reports(target, on_record):
                outcomes.append(Outcome(target.path, report))
                begun.clear()
    except Exception as error:
        outcomes.append(_outcome_of_error(target, checks, error))
    except KeyboardInterrupt:
        outcomes.append(Outcome(target.path, _report(target, checks, begun)))
        raise
    finally:
        for outcome in outcomes[n_before:]:
            show_one(outcome)


@contextmanager
def _progress(
    target: Target, checks: Checks, begun: list[Record]
) -> Iterator[Callable[[Record], None]]:
    """Show a bar on a terminal; yield what appends a record to ``begun`` and moves the bar."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    visible = sys.stderr is not None and sys.stderr.isatty()
    bar = Progress(*columns, console=Console(stderr=True), transient=True, disable=not visible)
    task = bar.add_task("", total=len(checks.ids))

    def move() -> None:
        running = (*checks.ids, "")[min(len(begun), len(checks.ids))]
        bar.update(task, completed=len(begun), description=f"{target.path} {running}")

    def on_record(record: Record) -> None:
        begun.append(record)
        move()

    with bar:
        move()
        yield on_record


def _outcome_of_error(target: Target, checks: Checks, error: Exception) -> Outcome:
    message = error_text(error)
    if not isinstance(error, MtennError):
        message = f"{target.path}: {described(error)}"
    record = Record(
        id="import",
        title=TITLES["import"],
        level=checks.level,
        status="error",
        reason=message,
        cause="",
        metrics={},
        seed=checks.seed,
        duration=0.0,
        repro=target.command(),
    )
    return Outcome(target.path, _report(target, checks, [record]), error)


def _report(target: Target, checks: Checks, records: Sequence[Record]) -> Report:
    """Return a report that ended before its time."""
    return Report(target.path, "", {}, checks.level, len(checks.ids), list(records))


def _show_nothing(outcome: Outcome) -> None:
    pass


def _page(outcomes: Sequence[Outcome]) -> str:
    from mtenn_core.testing._html.page import render

    return render([outcome.report for outcome in outcomes])


def _ids(level: Level, only: Sequence[str]) -> list[str]:
    """Return the ids of the checks to run: ``only`` these, whatever their case, or the level's."""
    if not only:
        return [check.id for check in chosen_checks(level)]
    known = [check.id for check in CHECKS]
    wanted = {id.upper() for id in only}
    unknown = wanted.difference(id.upper() for id in known)
    if unknown:
        raise _usage(
            "--only", f"no check is called {', '.join(sorted(unknown))}; known: {', '.join(known)}"
        )
    return [id for id in known if id.upper() in wanted]


def _parsed(arguments: Sequence[str]) -> dict[str, Any]:
    try:
        return dict(map(parse_argument, arguments))
    except ValueError as error:
        raise _usage("--arg", str(error)) from error


def _usage(option: str, message: str) -> click.BadParameter:
    return click.BadParameter(message, click.get_current_context(), param_hint=f"'{option}'")
