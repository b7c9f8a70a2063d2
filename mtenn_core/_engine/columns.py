"""The columns of pose predictions: how many numbers the pose model returns for each pose."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple, SupportsIndex

from torch import Tensor

from mtenn_core.errors import GradientError, PredictionError
from mtenn_core.gradients import GradDict

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


def columns_of(declared: SupportsIndex | str | Sequence[str]) -> Columns:
    """Return the columns that a number, names or ``"any"`` declare.

    Parameters
    ----------
    declared : ``Combination.pose_columns``, or the option ``tasks`` of a model
    """
    if isinstance(declared, str):
        return Columns(None)
    if isinstance(declared, SupportsIndex):
        return Columns(operator.index(declared))
    return Columns(len(declared), (*declared,))


def are_columns(declared: object) -> bool:
    """Return whether a value is a number of columns above 0, or a sequence of different names."""
    if isinstance(declared, Sequence) and not isinstance(declared, str):
        are_names = all(isinstance(name, str) for name in declared)
        return bool(declared) and are_names and len({*declared}) == len(declared)
    if isinstance(declared, bool) or not isinstance(declared, SupportsIndex):
        return False
    return operator.index(declared) > 0


def check_same_columns(predictions: Sequence[Tensor]) -> None:
    """Raise a PredictionError if two runs of the pose model differ in the number of columns.

    Parameters
    ----------
    predictions : the predictions of each run, in the order of the poses
    """
    first_pose = 0
    for of_run in predictions:
        if of_run.shape[1:] != predictions[0].shape[1:]:
            raise other_columns(first_pose, of_run.shape[1], predictions[0].shape[1])
        first_pose += len(of_run)


def other_columns(pose: int, found: int, expected: int) -> PredictionError:
    """Return the error for a pose with another number of columns than pose 0."""
    return PredictionError(
        f"pose {pose}: the pose model must return the same number of columns for all poses. It"
        f" returned {expected} for pose 0; found {found}",
        pose=pose,
    )


def split_columns(
    pred_list: Sequence[Tensor], grad_dict: GradDict, declared: int | str | Sequence[str]
) -> tuple[int, list[Tensor], dict[str, list[Tensor]]]:
    """Return the number of columns, and each number of each pose with its own gradients.

    Parameters
    ----------
    pred_list : for each pose, its prediction, shape (n_columns,)
    grad_dict : for each parameter and pose, a gradient, shape (n_columns, …)
    declared : ``Combination.pose_columns``

    Raises
    ------
    PredictionError, GradientError : a tensor has another shape. The message names the pose.
    """
    columns = columns_of(declared)
    number = columns.number
    if number is None and pred_list and isinstance(pred_list[0], Tensor):
        number = len(pred_list[0]) if pred_list[0].dim() else 0
    for pose, of_pose in enumerate(pred_list):
        if not isinstance(of_pose, Tensor) or of_pose.shape != (number,) or not number:
            raise PredictionError(
                f"pose {pose}: a prediction must have {number or 'some'} numbers, shape"
                f" ({number or 'n'},); found {_shape_or_type(of_pose)}",
                pose=pose,
            )
    for name, gradients in grad_dict.items():
        if len(gradients) != len(pred_list):
            raise GradientError(
                f"parameter {name!r}: expected {len(pred_list)} pose gradients, one per pose; found"
                f" {len(gradients)}",
                parameter=name,
            )
        for pose, gradient in enumerate(gradients):
            if not isinstance(gradient, Tensor) or gradient.shape[:1] != (number,):
                raise GradientError(
                    f"parameter {name!r}, pose {pose}: the gradient must have one row for each of"
                    f" the {number} numbers of the pose; found {_shape_or_type(gradient)}",
                    parameter=name,
                    pose=pose,
                )
    numbers = [each for of_pose in pred_list for each in of_pose]
    split = {name: [g for of_pose in rows for g in of_pose] for name, rows in grad_dict.items()}
    return number or 1, numbers, split


def named_column(columns: Columns | None, column: int) -> str:
    """Return a column in words, for messages; nothing if each pose has one number."""
    if columns is None:
        return ""
    return f", column {column}" + (f" ({columns.names[column]!r})" if columns.names else "")


def named_type(found: object) -> str:
    """Return the type of a wrong result, and what to do if it is a pair of torch.min or topk."""
    name = type(found).__name__
    if isinstance(found, tuple) and hasattr(found, "values") and hasattr(found, "indices"):
        return f"the pair (values, indices) of torch.{name}. Take .values of it"
    return name


def _shape_or_type(found: object) -> str:
    return str(tuple(found.shape)) if isinstance(found, Tensor) else named_type(found)
