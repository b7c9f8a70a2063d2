"""The results of checks: a record for each check, and a report for each combination."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from mtenn_core._process.html_table import html_table

SUITE_VERSION = "1.0"

Status = Literal["pass", "fail", "error", "inconclusive", "advice", "skip", "xfail", "xpass"]


@dataclass(frozen=True)
class Record:
    """The result of one check.

    Attributes
    ----------
    id, title, level : id, title and level of the check
    status : ``"pass"``;
        ``"fail"``: the combination breaks the rule, and ``reason`` contains both numbers;
        ``"error"``: the combination raised an error;
        ``"inconclusive"``: the numerical derivative is too uncertain to decide;
        ``"advice"``: the combination keeps the contract, but its users may meet a hazard, which
        ``reason`` describes. At the level ``"quality"``, this is a failure;
        ``"skip"``: the check does not apply;
        ``"xfail"``: the check failed, as expected;
        ``"xpass"``: the check passed, although a failure was expected
    reason : the reason for the status; empty for a pass
    cause : the likely mistake, if the wrong numbers show it; for advice, the code that removes the
        hazard; else empty
    metrics : numbers that the check measured
    seed : seed of the random numbers that the check used
    duration : in seconds
    repro : shell command that runs this check again
    is_advice : True for advice, also if it is a failure at the level ``"quality"``
    """

    id: str
    title: str
    level: str
    status: Status
    reason: str = ""
    cause: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    duration: float = 0.0
    repro: str = ""
    is_advice: bool = False

    @property
    def failed(self) -> bool:
        """True if the check failed, raised or was inconclusive, and no failure was expected."""
        return self.status in ("fail", "error", "inconclusive")

    def __str__(self) -> str:
        details = textwrap.indent("\n".join(self._details()), "    ")
        return "\n".join(filter(None, [f"{self.status:<12} {self.id}  {self.title}", details]))

    def _details(self) -> list[str]:
        """Return the reason, the likely cause and the command, as far as they are of interest."""
        lines = [self.reason] if self.reason else []
        if self.cause and (self.failed or self.status == "advice"):
            lines.append(f"{'to do' if self.is_advice else 'likely cause'}: {self.cause}")
        if self.failed:
            lines.append(f"again: {self.repro}")
        return lines


@dataclass(frozen=True)
class Report:
    """The results of all checks of one combination. Notebooks show it as a table.

    Attributes
    ----------
    name : name of the plugin in the registry, or of the class
    combination : the ``repr`` of the combination, which shows its arguments
    facts : the declared facts of the combination, by name
    level : level of the checks
    n_expected : number of checks to run
    records : a record for each check that has run
    curves : numbers to plot, at levels above ``"gate"``; see ``mtenn_core.testing._html.curves``
    suite_version : version of the list of checks
    """

    name: str
    combination: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    level: str = "full"
    n_expected: int = 0
    records: list[Record] = field(default_factory=list)
    curves: dict[str, Any] = field(default_factory=dict)
    suite_version: str = SUITE_VERSION

    @property
    def failures(self) -> list[Record]:
        """Checks that failed, raised or were inconclusive, without expected failures."""
        return [record for record in self.records if record.failed]

    @property
    def advice(self) -> list[Record]:
        """Checks that found a hazard although the combination keeps the contract."""
        return [record for record in self.records if record.status == "advice"]

    @property
    def passed(self) -> bool:
        """True if all checks ran and there are no :attr:`failures`."""
        return len(self.records) == self.n_expected and not self.failures

    def __str__(self) -> str:
        lines = [self._headline(), *map(str, self._notable())]
        if passed := self._passed_ids():
            lines.append(f"{'passed':<12} {passed}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows: list[tuple[str, str, str]] = [
            (record.status, record.id, "\n".join([record.title, *record._details()]))
            for record in self._notable()
        ]
        if passed := self._passed_ids():
            rows.append(("passed", "", passed))
        return html_table(self._headline(), ("status", "check", "") if rows else (), rows)

    def _headline(self) -> str:
        who = ", ".join(filter(None, [self.name, self.combination]))
        return f"{who}: {self.verdict}"

    def _notable(self) -> list[Record]:
        """Return the records to show one by one."""
        return [record for record in self.records if record.status not in ("pass", "skip")]

    def _passed_ids(self) -> str:
        """Return the ids of the checks that passed, or "" if there is no other check to show."""
        passed = [record.id for record in self.records if record.status == "pass"]
        return ", ".join(passed) if self._notable() else ""

    @property
    def verdict(self) -> str:
        """The outcome in a few words."""
        n_run, n_failed, n_advice = len(self.records), len(self.failures), len(self.advice)
        advice = f", {n_advice} with advice" if n_advice else ""
        if n_run < self.n_expected:
            return f"ran {n_run} of {self.n_expected} checks, {n_failed} failed{advice}"
        if n_failed:
            return f"failed {n_failed} of {self.n_expected} checks{advice}"
        counts = Counter(record.status for record in self.records)
        words: dict[Status, str] = {
            "skip": "not applicable",
            "xfail": "failed as expected",
            "xpass": "passed unexpectedly",
        }
        others = [f", {counts[each]} {words[each]}" for each in words if counts[each]]
        if n_advice:
            others.insert(0, f", {n_advice} of them with advice")
        n_passed = counts["pass"] + n_advice
        return f"passed {n_passed} of {self.n_expected} checks{''.join(others)}"

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON data, with None for infinite numbers and NaN."""
        plain: dict[str, Any] = _finite({"passed": self.passed, **asdict(self)})
        return plain

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Report:
        """Return the report from the output of :meth:`to_json`."""
        fields = {key: value for key, value in plain.items() if key != "passed"}
        return cls(**{**fields, "records": [Record(**record) for record in plain["records"]]})


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
