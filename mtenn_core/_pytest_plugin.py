"""What pytest knows of the conformance suite: how its failures look, and what a run has found.

Loaded into every run of pytest where mtenn-core is installed (entry point ``pytest11``), so it
imports neither torch nor the suite.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from mtenn_core.testing import Report

# How the summary calls the outcomes, in this order.
WORDS = {
    "pass": "passed",
    "fail": "failed",
    "error": "raised",
    "inconclusive": "inconclusive",
    "xpass": "passed unexpectedly",
    "xfail": "failed as expected",
    "skip": "skipped",
}

# What the running test has found: who was checked, whether by all tests of the class, the report.
_noted: list[tuple[str, bool, dict[str, Any]]] = []


_Failed: Any = pytest.fail.Exception  # pytest shows its message alone, without a traceback


class ConformanceFailure(_Failed, AssertionError):
    """A check does not hold.

    Parameters
    ----------
    message : the report
    short : one line, for the summary; the first of ``message`` unless given
    """

    def __init__(self, message: str, short: str = "") -> None:
        _Failed.__init__(self, message, pytrace=False)
        self.short = short or message.partition("\n")[0]


def note(report: Report, who: str, *, whole_class: bool) -> None:
    """Keep what the running test has found, for the summary and for ``--conformance-json``.

    Parameters
    ----------
    who : the same for every check of a combination, and different for each combination
    whole_class : whether the checks of one combination are the tests of a class; otherwise they are
        the parameters of one test
    """
    _noted.append((who, whole_class, report.to_json()))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("mtenn", "conformance of combinations").addoption(
        "--conformance-json",
        metavar="FILE",
        type=Path,
        help="write what the conformance tests of this run have found to FILE",
    )


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--conformance-json")
    if path is not None:
        path = config.invocation_params.dir / path
        if path.is_dir() or not path.parent.is_dir():
            raise pytest.UsageError(
                "--conformance-json: expected a file in a folder that exists; found"
                f" {str(path)!r}; create the folder, or name another file"
            )
    # A worker of pytest-xdist sends its reports to the controller, which has them all.
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(ConformanceRun(path), "mtenn-conformance-run")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    test_report = yield
    if call.when == "call" and _noted:
        # An attribute of its own, which a report takes along from a worker to the controller.
        vars(test_report)["conformance"] = [
            (f"{_scope(item, whole_class)} {who}", found) for who, whole_class, found in _noted
        ]
        _noted.clear()
    if call.excinfo and isinstance(call.excinfo.value, ConformanceFailure):
        crash = getattr(test_report.longrepr, "reprcrash", None)
        if crash is not None:  # what the summary and a JUnit file say of it
            crash.message = call.excinfo.value.short
    return test_report


def _scope(item: pytest.Item, whole_class: bool) -> str:
    where = item.parent.nodeid if item.parent else ""
    return where if whole_class else f"{where}::{getattr(item, 'originalname', item.name)}"


class ConformanceRun:
    """Puts the checks of each combination together, from all tests of a run.

    Parameters
    ----------
    path : of the JSON file to write, if any
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        # By combination, its report as JSON; in that, the records by the id of the check.
        self._found: dict[str, dict[str, Any]] = {}
        self._failed: list[tuple[str, pytest.TestReport]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for combination, found in getattr(report, "conformance", ()):
            so_far = self._found.setdefault(combination, {**found, "records": {}})
            so_far["records"] |= {record["id"]: record for record in found["records"]}
            if report.failed:
                self._failed.append((combination, report))

    def pytest_sessionfinish(self) -> None:
        # Before the terminal shows the failures: by now it is known what has passed.
        for combination, report in self._failed:
            report.sections.append(("conformance", self._beside(combination, report)))
        if self._path is not None:
            self._path.write_text(json.dumps(self._document(), indent=2, allow_nan=False) + "\n")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._found:
            terminalreporter.write_line(self._summary(), red=bool(self._failed))

    def _beside(self, combination: str, report: pytest.TestReport) -> str:
        records = self._found[combination]["records"].values()
        passed = [record["id"] for record in records if record["status"] == "pass"]
        lines = [f"passed: {', '.join(passed)}"] if passed else []
        return "\n".join([*lines, f"again: pytest {shlex.quote(report.nodeid)}"])

    def _summary(self) -> str:
        records = [r for found in self._found.values() for r in found["records"].values()]
        n_expected = sum(found["n_expected"] for found in self._found.values())
        ran = f"{len(records)} of " if len(records) < n_expected else ""
        counts = Counter(record["status"] for record in records)
        outcomes = [f"{counts[status]} {word}" for status, word in WORDS.items() if counts[status]]
        return (
            f"conformance: {_plural(len(self._found), 'combination')},"
            f" {ran}{_plural(n_expected, 'check')}: {', '.join(outcomes)}"
        )

    def _document(self) -> dict[str, Any]:
        if not self._found:
            return {"suite_version": None, "reports": []}
        from mtenn_core.testing import CHECKS, SUITE_VERSION, Report

        order = [check.id for check in CHECKS]
        reports = []
        for found in self._found.values():
            records = sorted(found["records"].values(), key=lambda r: order.index(r["id"]))
            reports.append(Report.from_json({**found, "records": records}).to_json())
        return {"suite_version": SUITE_VERSION, "reports": reports}


def _plural(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
