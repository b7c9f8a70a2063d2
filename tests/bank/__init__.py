"""Combinations to test the conformance suite with: a bank of wrong ones and a zoo of right ones."""

from mtenn_core import Combination

from . import right, wrong
from .right import Right
from .right_vectors import RIGHT_VECTORS
from .wrong import Wrong
from .wrong_vectors import WRONG_VECTORS

__all__ = [
    "RIGHT",
    "RIGHT_VECTORS",
    "WRONG",
    "WRONG_VECTORS",
    "Right",
    "Wrong",
    "make_right",
    "make_wrong",
]

RIGHT: tuple[Right, ...] = (*right.RIGHT, *RIGHT_VECTORS)
WRONG: tuple[Wrong, ...] = (*wrong.WRONG, *WRONG_VECTORS)


def make_wrong(name: str, t: float) -> Combination:
    """Make the wrong combination of this name: what a line for the shell can call."""
    return next(wrong for wrong in WRONG if wrong.name == name).make(t)


def make_right(name: str) -> Combination:
    """Make the right combination of this name."""
    return next(right for right in RIGHT if right.name == name).make()
