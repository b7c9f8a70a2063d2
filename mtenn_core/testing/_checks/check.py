"""A check, and the exceptions that end it if the combination does not pass."""

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
    """A rule for combinations, and the function that tests it.

    Attributes
    ----------
    id : a letter for the group, and a number. A: ``forward``, bad input and side effects. B: the
        chain rule. C: derivatives. D: values
    title : the rule as a sentence
    level : ``"gate"`` if the registry runs the check before it returns a combination, ``"full"``
        for the other checks of the contract, ``"quality"`` for checks that go beyond the contract
    run : returns measured numbers, or raises ``Fail``, ``Skip`` or ``Inconclusive``
    """

    id: str
    title: str
    level: Level
    run: Callable[[Subject], Metrics]


def check(id: str, title: str, level: Level = "full") -> Callable[..., Check]:
    """Return a decorator that turns a function into a :class:`Check`."""
    return lambda run: Check(id, title, level, run)


class Outcome(Exception):
    """The exception that ends a check whose status is not ``"pass"``.

    Attributes
    ----------
    status : status of the record
    cause : the likely mistake, or ""
    metrics : numbers that the check measured
    """

    status: ClassVar[Status]

    def __init__(self, reason: str, *, cause: str = "", **metrics: Any) -> None:
        super().__init__(reason)
        self.cause = cause
        self.metrics = metrics


class Fail(Outcome):
    """The combination breaks the rule of the check."""

    status = "fail"


class Skip(Outcome):
    """The check does not apply to the combination."""

    status = "skip"


class Inconclusive(Outcome):
    """The numerical derivative is too uncertain to decide."""

    status = "inconclusive"
