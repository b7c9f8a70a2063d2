"""A check of the conformance suite, its level and its place in the catalogue."""

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
    """A rule that a combination must keep.

    Attributes
    ----------
    id : its place in the catalogue: A for ``forward``, bad input, side effects and double
        backward, B for the chain rule, C for derivatives, D for values
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
