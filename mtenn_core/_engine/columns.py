"""The columns of pose predictions: how many numbers the pose model returns for each pose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

ANY = "any"


class Columns(NamedTuple):
    """The columns of pose predictions of shape (n_poses, n_columns).

    Attributes
    ----------
    number : the number of columns; None if any number is right
    names : the names of the columns; empty if they have none
    """

    number: int | None
    names: tuple[str, ...] = ()


def columns_of(declared: int | str | Sequence[str]) -> Columns:
    """Return the columns that a number, names or ``"any"`` declare.

    Parameters
    ----------
    declared : ``Combination.pose_columns``, or the option ``tasks`` of a model
    """
    if isinstance(declared, str):
        return Columns(None)
    return Columns(declared) if isinstance(declared, int) else Columns(len(declared), (*declared,))


def are_columns(declared: object) -> bool:
    """Return whether a value is a number of columns above 0, or a tuple of different names."""
    if isinstance(declared, int):
        return declared > 0 and not isinstance(declared, bool)
    names = declared if isinstance(declared, list | tuple) else ()
    return bool(names) and all(isinstance(n, str) for n in names) and len({*names}) == len(names)


def named_column(columns: Columns | None, column: int) -> str:
    """Return a column in words, for messages; nothing if each pose has one number."""
    if columns is None:
        return ""
    return f", column {column}" + (f" ({columns.names[column]!r})" if columns.names else "")
