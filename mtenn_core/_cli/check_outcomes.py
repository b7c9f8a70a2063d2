"""Run the checks of ``mtenn check`` on each target, and collect the outcomes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from mtenn_core._cli.check_report import Outcome, show, show_summary
from mtenn_core._cli.output import console, error_text, print_json, separate_stdout
from mtenn_core._process.printable import printable
from mtenn_core._registry.isolated_checks import TITLES, check_target
from mtenn_core.errors import MtennError
from mtenn_core.testing import CHECKS, Record, Report
from mtenn_core.testing._catalogue import chosen_checks
from mtenn_core.testing._checks.check import Level
from mtenn_core.testing._runner import described
from mtenn_core.testing._target import Target, parse_argument


@dataclass(frozen=True)
class Checks:
    """The checks to run on every target.

    Attributes
    ----------
    level : level of the checks
    ids : ids of the checks, in the order in which they run
    is_whole_level : True if these are all checks of the level
    seed : seed of the random numbers that the checks use
    isolated : True to run the checks in a child process with the two limits
    time_limit : time limit in seconds
    memory_limit : memory limit in MiB
    """

    level: Level
    ids: Sequence[str]
    is_whole_level: bool
    seed: int
    isolated: bool
    time_limit: float
    memory_limit: int

    def run(
        self, target: Target, on_record: Callable[[Record], object]
    ) -> Iterator[tuple[str, Report]]:
        """Run the checks. Yield the text of each set of arguments, with its report."""
        options: dict[str, Any] = {
            "level": self.level,
            "seed": self.seed,
            "only": None if self.is_whole_level else self.ids,
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
    """Check all targets and print the results; return True if every check passed."""
    targets = [Target(path, _parsed(arguments)) for path in paths]
    checks = Checks(level, _ids(level, only), is_whole_level=not only, **options)
    if html:
        _page([])  # if a package for the page is missing, raise the error before the checks run
    outcomes: list[Outcome] = []
    with separate_stdout() as stdout:
        show_one = _show_nothing if as_json else partial(show, console(stdout))
        try:
            for target in targets:
                _check_and_show(target, checks, outcomes, show_one)
        finally:  # also after Ctrl-C, so that the complete results are kept
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
    """Append an outcome for each set of arguments. Show these outcomes when all checks have run."""
    n_before = len(outcomes)
    records: list[Record] = []  # records of the report that is not complete
    try:
        with _progress(target, checks, records) as on_record:
            for arguments, report in checks.run(target, on_record):
                outcomes.append(Outcome(target.path, report, arguments))
                records.clear()
    except KeyboardInterrupt:
        outcomes.append(Outcome(target.path, _partial_report(target, checks, records)))
        raise
    except BaseException as error:  # also SystemExit, so that the other targets are checked
        outcomes.append(_error_outcome(target, checks, error))
    finally:
        for outcome in outcomes[n_before:]:
            show_one(outcome)


@contextmanager
def _progress(
    target: Target, checks: Checks, records: list[Record]
) -> Iterator[Callable[[Record], None]]:
    """Show a progress bar on a terminal; yield a function that adds a record to ``records``."""
    description = TextColumn("{task.description}", markup=False)
    columns = description, BarColumn(), MofNCompleteColumn()
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task("", total=len(checks.ids))

    def update() -> None:
        running = (*checks.ids, "")[min(len(records), len(checks.ids))]
        description = printable(f"{target.path} {running}")
        bar.update(task, completed=len(records), description=description)

    def on_record(record: Record) -> None:
        records.append(record)
        update()

    # With disable=True, rich 13 prints an empty line.
    with bar if is_terminal else nullcontext():
        update()
        yield on_record


def _error_outcome(target: Target, checks: Checks, error: BaseException) -> Outcome:
    message = error_text(error)
    if not isinstance(error, MtennError):
        message = f"{target.path}: {described(error)}"
    record = Record(
        id="import",
        title=TITLES["import"],
        level=checks.level,
        status="error",
        reason=message,
        seed=checks.seed,
        repro=target.command(),
    )
    return Outcome(target.path, _partial_report(target, checks, [record]), error=error)


def _partial_report(target: Target, checks: Checks, records: Sequence[Record]) -> Report:
    """Return a report in which some checks are missing."""
    n_expected = len(checks.ids)
    return Report(target.path, level=checks.level, n_expected=n_expected, records=list(records))


def _show_nothing(outcome: Outcome) -> None:
    pass


def _page(outcomes: Sequence[Outcome]) -> str:
    from mtenn_core.testing._html.page import render

    return render([outcome.report for outcome in outcomes])


def _ids(level: Level, only: Sequence[str]) -> list[str]:
    """Return the ids of the checks to run.

    These are the ids in ``only``, in upper or lower case. If ``only`` is empty, they are the ids of
    the level.
    """
    if not only:
        return [check.id for check in chosen_checks(level)]
    known = [check.id for check in CHECKS]
    wanted = {id.upper() for id in only}
    unknown = wanted.difference(id.upper() for id in known)
    if unknown:
        raise _usage_error(
            "--only",
            f"no check has the id {', '.join(sorted(unknown))}; known ids: {', '.join(known)}",
        )
    return [id for id in known if id.upper() in wanted]


def _parsed(arguments: Sequence[str]) -> dict[str, Any]:
    try:
        return dict(map(parse_argument, arguments))
    except ValueError as error:
        raise _usage_error("--arg", str(error)) from error


def _usage_error(option: str, message: str) -> click.BadParameter:
    return click.BadParameter(message, click.get_current_context(), param_hint=f"'{option}'")
