"""Combinations to test the conformance suite with: a bank of wrong ones and a zoo of right ones."""

from mtenn_core import Combination

from .right import RIGHT, Right
from .wrong import WRONG, Wrong

__all__ = ["RIGHT", "WRONG", "Right", "Wrong", "make_right", "make_wrong"]


def make_wrong(name: str, t: float) -> Combination:
    """Make the wrong combination of this name: what a line for the shell can call."""
    return next(wrong for wrong in WRONG if wrong.name == name).make(t)


def make_right(name: str) -> Combination:
    """Make the right combination of this name."""
    return next(right for right in RIGHT if right.name == name).make()
