"""The check, and the exceptions with which it ends unless the combination passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from mtenn_core.testing._probe.subject import Subject
from mtenn_core.testing._report import Status

Level = Literal["gate", "full", "quality"]
LEVELS: tuple[Level, ...] = get_args(Level)
Metrics = dict[str, Any]


@dataclass(frozen=True)
class Check:
    """A rule that a combination must keep.

    Attributes
    ----------
    id : its place in the catalogue: A for ``forward``, bad input and side effects, B for the
        chain rule, C for derivatives, D for values
    title : what holds, as a sentence
    level : ``"gate"`` for the checks before the registry hands a combination out, ``"full"`` for
        the others, ``"quality"`` for what a careful author does beyond the contract
    run : returns what it measured, or raises ``Fail``, ``Skip`` or ``Inconclusive``
    """

    id: str
    title: str
    level: Level
    run: Callable[[Subject], Metrics]


def check(id: str, title: str, level: Level = "full") -> Callable[..., Check]:
    """Make a :class:`Check` of a function."""
    return lambda run: Check(id, title, level, run)


class Outcome(Exception):
    """Ends a check with another status than ``"pass"``.

    Attributes
    ----------
    status : of the record
    cause : the likely mistake, or ""
    metrics : the figures that the check measured
    """

    status: ClassVar[Status]

    def __init__(self, reason: str, *, cause: str = "", **metrics: Any) -> None:
        super().__init__(reason)
        self.cause = cause
        self.metrics = metrics


class Fail(Outcome):
    """The combination breaks the rule that was checked."""

    status = "fail"


class Skip(Outcome):
    """The check does not apply to the combination."""

    status = "skip"


class Inconclusive(Outcome):
    """The numerical derivative is too uncertain to decide."""

    status = "inconclusive"
