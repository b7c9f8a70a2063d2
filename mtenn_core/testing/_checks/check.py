"""What a check is, and how it says anything but yes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from mtenn_core.testing._probe.subject import Subject
from mtenn_core.testing._report import Status

Level = Literal["gate", "full", "quality"]
LEVELS: tuple[Level, ...] = get_args(Level)
Metrics = dict[str, Any]


@dataclass(frozen=True)
class Check:
    """One thing that must hold of a combination.

    Attributes
    ----------
    id : its place in the catalogue: A for the form and the conduct, B for the chain rule, C for
        derivatives, D for values
    title : what holds, as a sentence
    level : ``"gate"`` for the checks before the registry hands a combination out, ``"full"`` for
        the others, ``"quality"`` for what a careful author does beyond the contract
    run : returns what it measured, or raises a ``Verdict``
    """

    id: str
    title: str
    level: Level
    run: Callable[[Subject], Metrics]


def check(id: str, title: str, level: Level = "full") -> Callable[..., Check]:
    """Make a :class:`Check` of a function."""
    return lambda run: Check(id, title, level, run)


class Verdict(Exception):
    """Ends a check with another status than ``"pass"``.

    Attributes
    ----------
    status : of the record
    cause : what most likely went wrong, where that can be told
    metrics : the figures that the check measured
    """

    def __init__(self, status: Status, reason: str, *, cause: str = "", **metrics: Any) -> None:
        super().__init__(reason)
        self.status = status
        self.cause = cause
        self.metrics = metrics
