"""What a run of checks found."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["pass", "fail", "error", "inconclusive", "skip"]


@dataclass(frozen=True)
class Record:
    """What one check found.

    Attributes
    ----------
    id, title, level : of the check
    status : ``"pass"``; ``"fail"``, with both numbers in ``reason``; ``"error"``, the combination
        raised; ``"inconclusive"``, the numerical derivative was too uncertain to tell; ``"skip"``,
        the check does not apply
    reason : why the status is what it is; empty for a pass
    metrics : the figures that the check measured
    seed : of the random numbers that it probed with
    duration : in seconds
    """

    id: str
    title: str
    level: str
    status: Status
    reason: str
    metrics: dict[str, Any]
    seed: int
    duration: float

    def __str__(self) -> str:
        lines = [f"{self.status:<12} {self.id}  {self.title}"]
        return "\n".join(lines + [f"    {line}" for line in self.reason.splitlines()])


@dataclass(frozen=True)
class Report:
    """What all checks found about one combination.

    Attributes
    ----------
    name : who was checked, as the registry calls it, or the class
    combination : its ``repr``, which shows its arguments
    facts : what the combination declares of itself, which narrows the checks
    n_expected : how many checks there were to run
    records : one for each that ran
    """

    name: str
    combination: str
    facts: dict[str, Any]
    n_expected: int
    records: list[Record] = field(default_factory=list)

    @property
    def failures(self) -> list[Record]:
        """The checks that did not pass, skipped ones aside."""
        return [record for record in self.records if record.status not in ("pass", "skip")]

    @property
    def passed(self) -> bool:
        """Whether every check ran and none failed, raised or stayed inconclusive."""
        return len(self.records) == self.n_expected and not self.failures

    def __str__(self) -> str:
        verdict = "passed" if self.passed else f"failed {len(self.failures)}"
        head = f"{self.name}, {self.combination}: {verdict} of {self.n_expected} checks"
        if self.passed:
            head = f"{self.name}, {self.combination}: passed all {self.n_expected} checks"
        ran = [record.id for record in self.records if record.status == "pass"]
        lines = [head, *(str(record) for record in self.failures)]
        if self.failures and ran:
            lines.append(f"passed       {', '.join(ran)}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON knows it, with null for what is infinite or no number."""
        plain: dict[str, Any] = _finite({"passed": self.passed, **asdict(self)})
        return plain


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
