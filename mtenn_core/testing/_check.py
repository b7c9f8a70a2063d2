"""What a check is, and how it says anything but yes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from mtenn_core.testing._report import Status
from mtenn_core.testing._subject import Subject

Level = Literal["gate"]
Metrics = dict[str, Any]


@dataclass(frozen=True)
class Check:
    """One thing that must hold of a combination.

    Attributes
    ----------
    id : its place in the catalogue: A for the form, B for the chain rule, C for derivatives
    title : what holds, as a sentence
    level : ``"gate"`` for the checks before the registry hands a combination out
    run : returns what it measured, or raises a :class:`Verdict`
    """

    id: str
    title: str
    level: Level
    run: Callable[[Subject], Metrics]


class Verdict(Exception):
    """Ends a check with another status than ``"pass"``."""

    def __init__(self, status: Status, reason: str, **metrics: Any) -> None:
        super().__init__(reason)
        self.status = status
        self.metrics = metrics
