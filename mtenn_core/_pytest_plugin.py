"""The plugin for pytest. It formats failed conformance checks and adds lines to the summary.

If mtenn-core is installed, every run of pytest loads this module (entry point ``pytest11``). For
this reason, the module imports neither torch nor the conformance suite.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from mtenn_core.testing import Record, Report

# The word for each status in the summary, in this order.
WORDS = {
    "pass": "passed",
    "advice": "with advice",
    "fail": "failed",
    "error": "raised",
    "inconclusive": "inconclusive",
    "xpass": "passed unexpectedly",
    "xfail": "failed as expected",
    "skip": "skipped",
}

# Results of the running test: name of the combination, whole_class, and data without torch objects.
_results: list[tuple[str, bool, dict[str, Any]]] = []


_Failed: Any = pytest.fail.Exception  # pytest shows its message without a traceback


class ConformanceFailure(_Failed, AssertionError):
    """A failed conformance check.

    Parameters
    ----------
    message : the report
    short : one line for the summary; by default, the first line of ``message``
    """

    def __init__(self, message: str, short: str = "") -> None:
        _Failed.__init__(self, message, pytrace=False)
        self.short = short or message.partition("\n")[0]


def add_result(report: Report, name: str, *, whole_class: bool) -> None:
    """Keep the result of the running test for the summary.

    Parameters
    ----------
    name : the combination's name, unique within the test class or test function
    whole_class : True if each check is a test of a class, False if each check is a parameter of one
        test function
    """
    statuses = {record.id: record.status for record in report.records}
    advice = {record.id: _advice(record) for record in report.advice}
    result = {"n_expected": report.n_expected, "statuses": statuses, "advice": advice}
    _results.append((name, whole_class, result))


def _advice(record: Record) -> str:
    """Return the hazard in one line, and the code that removes it in another."""
    hazard = record.reason.partition("\n")[0].rstrip(":")
    return f"{hazard}\n    to do: {record.cause}" if record.cause else hazard


def pytest_configure(config: pytest.Config) -> None:
    # The workers of pytest-xdist send their test reports to the controller. Only the controller
    # makes the summary.
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(ConformanceSummary(), "mtenn-conformance-summary")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    test_report = yield
    if call.when == "call" and _results:
        # pytest-xdist sends attributes of a test report from a worker to the controller.
        vars(test_report)["conformance"] = [
            (f"{_scope(item, whole_class)} {name}", result)
            for name, whole_class, result in _results
        ]
        _results.clear()
    if call.excinfo and isinstance(call.excinfo.value, ConformanceFailure):
        crash = getattr(test_report.longrepr, "reprcrash", None)
        if crash is not None:  # the text in the summary and in a JUnit file
            crash.message = call.excinfo.value.short
    return test_report


def _scope(item: pytest.Item, whole_class: bool) -> str:
    parent = item.parent.nodeid if item.parent else ""
    return parent if whole_class else f"{parent}::{getattr(item, 'originalname', item.name)}"


class ConformanceSummary:
    """A pytest plugin that collects the results of all tests, and prints a line about them.

    Below it, each advice names the combination, the check, the hazard and the code to change.
    """

    def __init__(self) -> None:
        self._statuses: dict[str, dict[str, str]] = {}  # by combination and id of the check
        self._n_expected: dict[str, int] = {}
        self._advice: dict[tuple[str, str], str] = {}  # by combination and id of the check
        self._failed: list[tuple[str, pytest.TestReport]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for combination, result in getattr(report, "conformance", ()):
            self._statuses.setdefault(combination, {}).update(result["statuses"])
            self._n_expected[combination] = result["n_expected"]
            self._advice |= {(combination, id): text for id, text in result["advice"].items()}
            if report.failed:
                self._failed.append((combination, report))

    def pytest_sessionfinish(self) -> None:
        # All results are known here, and the terminal shows the failures after this hook.
        for combination, report in self._failed:
            report.sections.append(("conformance", self._context(combination, report)))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._statuses:
            terminalreporter.write_line(self._summary(), red=bool(self._failed))
        for (combination, id), text in self._advice.items():
            terminalreporter.write_line(f"advice: {combination}, {id}: {text}")

    def _context(self, combination: str, report: pytest.TestReport) -> str:
        """Return a text with the passed checks and the command that repeats the failed test."""
        statuses = self._statuses[combination]
        passed = [id for id, status in statuses.items() if status in ("pass", "advice")]
        lines = [f"passed: {', '.join(passed)}"] if passed else []
        return "\n".join([*lines, f"again: pytest {shlex.quote(report.nodeid)}"])

    def _summary(self) -> str:
        counts = Counter(
            status for statuses in self._statuses.values() for status in statuses.values()
        )
        n_expected, n_run = sum(self._n_expected.values()), counts.total()
        part = f"{n_run} of " if n_run < n_expected else ""
        outcomes = [f"{counts[status]} {word}" for status, word in WORDS.items() if counts[status]]
        return (
            f"conformance: {_plural(len(self._statuses), 'combination')},"
            f" {part}{_plural(n_expected, 'check')}: {', '.join(outcomes)}"
        )


def _plural(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
