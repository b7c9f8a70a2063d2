"""A check of the conformance suite: its id, title, level and function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from mtenn_core.testing._outcomes import Metrics
from mtenn_core.testing._probe.subject import Subject

Level = Literal["gate", "full", "quality"]
LEVELS: tuple[Level, ...] = get_args(Level)


@dataclass(frozen=True)
class Check:
    """A rule for combinations, and the function that tests it.

    Attributes
    ----------
    id : a letter for the group, and a number. A: ``forward``, bad input, side effects and double
        backward. B: the chain rule. C: derivatives. D: values
    title : the rule as a sentence
    level : ``"gate"`` if the registry runs the check before it returns a combination, ``"full"``
        for the other checks of the contract, ``"quality"`` for checks that go beyond the contract
    run : returns measured numbers, or raises ``Fail``, ``Advice``, ``Skip`` or ``Inconclusive``
    """

    id: str
    title: str
    level: Level
    run: Callable[[Subject], Metrics]


def check(id: str, title: str, level: Level = "full") -> Callable[..., Check]:
    """Return a decorator that turns a function into a :class:`Check`."""
    return lambda run: Check(id, title, level, run)
