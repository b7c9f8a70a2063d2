"""The results of a run of checks."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

SUITE_VERSION = "1.0"

Status = Literal["pass", "fail", "error", "inconclusive", "skip", "xfail", "xpass"]


@dataclass(frozen=True)
class Record:
    """The result of one check.

    Attributes
    ----------
    id, title, level : of the check
    status : ``"pass"``; ``"fail"``, with both numbers in ``reason``; ``"error"``, the combination
        raised; ``"inconclusive"``, the numerical derivative was too uncertain to tell; ``"skip"``,
        the check does not apply; ``"xfail"`` and ``"xpass"``, a failure was expected and came or
        did not come
    reason : why the status is what it is; empty for a pass
    cause : the likely mistake, where the numbers give it away
    metrics : the figures that the check measured
    seed : of the random numbers that it probed with
    duration : in seconds
    repro : a line for the shell that runs this check again
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

    @property
    def failed(self) -> bool:
        """Whether the check did not hold, and was expected to."""
        return self.status in ("fail", "error", "inconclusive")

    def __str__(self) -> str:
        lines = [f"{self.status:<12} {self.id}  {self.title}"]
        lines += [textwrap.indent(self.reason, "    ")] if self.reason else []
        if self.failed:
            lines += [f"    likely cause: {self.cause}"] if self.cause else []
            lines += [f"    again: {self.repro}"]
        return "\n".join(lines)


@dataclass(frozen=True)
class Report:
    """The results of all checks of one combination.

    Attributes
    ----------
    name : who was checked, as the registry calls it, or the class
    combination : its ``repr``, which shows its arguments
    facts : what the combination declares of itself, which narrows the checks
    level : of the checks that ran
    n_expected : how many checks there were to run
    records : one for each that ran
    curves : numbers to plot, from the levels above ``"gate"`` (``mtenn_core.testing._html.curves``)
    suite_version : of the catalogue
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
        """The checks that failed, raised or stayed inconclusive, expected ones aside."""
        return [record for record in self.records if record.failed]

    @property
    def passed(self) -> bool:
        """Whether every check ran and none failed, raised or stayed inconclusive."""
        return len(self.records) == self.n_expected and not self.failures

    def __str__(self) -> str:
        who = ", ".join(filter(None, [self.name, self.combination]))
        lines = [f"{who}: {self.verdict}"]
        shown = [record for record in self.records if record.status not in ("pass", "skip")]
        lines += [str(record) for record in shown]
        ran = [record.id for record in self.records if record.status == "pass"]
        if shown and ran:
            lines.append(f"{'passed':<12} {', '.join(ran)}")
        return "\n".join(lines)

    @property
    def verdict(self) -> str:
        """The outcome in a few words."""
        n_run, n_failed = len(self.records), len(self.failures)
        if n_run < self.n_expected:
            return f"ran {n_run} of {self.n_expected} checks, {n_failed} failed"
        if n_failed:
            return f"failed {n_failed} of {self.n_expected} checks"
        counts = Counter(record.status for record in self.records)
        words: dict[Status, str] = {
            "skip": "not applicable",
            "xfail": "failed as expected",
            "xpass": "passed unexpectedly",
        }
        others = [f", {counts[each]} {words[each]}" for each in words if counts[each]]
        return f"passed {counts['pass']} of {self.n_expected} checks{''.join(others)}"

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON, with null for infinite numbers and NaN."""
        plain: dict[str, Any] = _finite({"passed": self.passed, **asdict(self)})
        return plain

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Report:
        """Return the report that :meth:`to_json` made ``plain`` of."""
        fields = {key: value for key, value in plain.items() if key != "passed"}
        return cls(**{**fields, "records": [Record(**record) for record in plain["records"]]})


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
