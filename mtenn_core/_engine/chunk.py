"""Poses that run together: one run of the pose model, and the check of its output."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtenn_core._engine.columns import Columns
from mtenn_core._engine.mode import Collate
from mtenn_core._engine.precision import at_least_float32
from mtenn_core.errors import PredictionError


class Chunk(NamedTuple):
    """Poses that go through the pose model in one run.

    Attributes
    ----------
    pose_model : maps ``poses`` to one number per pose
    poses : one pose, or one batch; with ``collate``, a list of poses
    first_pose, n_poses : index of the first pose in the call, and number of poses
    collate : makes a batch from the list; None if ``poses`` is ready for the pose model
    columns : the columns of the output; None if it has one number per pose
    shared : the second argument of the pose model, if the model has a shared part
    """

    pose_model: torch.nn.Module
    poses: Any
    first_pose: int
    n_poses: int
    collate: Collate | None
    columns: Columns | None = None
    shared: tuple[Any, ...] = ()

    def run(self) -> Tensor:
        """Return the predictions, shape (n_poses,) or (n_poses, n_columns), in float32 at least.

        Raises
        ------
        PredictionError : the output does not have the right number of floating-point numbers
        """
        try:
            poses = self.poses if self.collate is None else self.collate(self.poses)
            predictions = self.pose_model(poses, *self.shared)
        except Exception as error:
            error.add_note(f"raised by the pose model on {self.named()}")
            raise
        return self._checked(predictions)

    def _checked(self, output: object) -> Tensor:
        """Return the pose model's output as predictions. Raise an error if it does not fit."""
        if isinstance(output, Tensor) and output.is_floating_point():
            shape = _shape_of_predictions(output.shape, self.n_poses, self.columns)
            if shape is not None:
                output = output.to(at_least_float32(output.dtype))
                # reshape would add a node to the graph even if the shape is already right.
                return output if output.shape == shape else output.reshape(shape)
        found = type(output).__name__
        kind = "in a tensor"
        if isinstance(output, Tensor):
            found, kind = f"shape {tuple(output.shape)}, {output.dtype}", "in floating point"
        raise PredictionError(
            f"{self.named()}: the pose model must return {_rule_for(self.n_poses, self.columns)}"
            f" {kind}; found {found}",
            pose=self.first_pose,
        )

    def named(self) -> str:
        """Return the poses in words, for messages."""
        first, last = self.first_pose, self.first_pose + self.n_poses - 1
        return f"pose {first}" if first == last else f"poses {first} to {last}"


def _shape_of_predictions(
    found: torch.Size, n_poses: int, columns: Columns | None
) -> torch.Size | tuple[int, ...] | None:
    """Return the shape of the predictions for an output of a pose model; None if it does not fit.

    Parameters
    ----------
    found : the shape of the output. For one pose, it may lack the first dimension.
    columns : None if the pose model returns one number per pose
    """
    if columns is None:
        shape = (n_poses,)
        return shape if found in (shape, (n_poses, 1)) or found.numel() == n_poses == 1 else None
    if len(found) == n_poses == 1:
        found = torch.Size((1, *found))
    fits = len(found) == 2 and found[0] == n_poses and 0 < found[1] == (columns.number or found[1])
    return found if fits else None


def _rule_for(n_poses: int, columns: Columns | None) -> str:
    """Return in words what a pose model must return for some poses, for messages."""
    if columns is None:
        return "one number" if n_poses == 1 else f"{n_poses} numbers, one per pose,"
    number = "n" if columns.number is None else columns.number
    names = f" ({', '.join(columns.names)})" if columns.names else ""
    shape = f"({number},)" if n_poses == 1 else f"({n_poses}, {number})"
    how_many = "one number" if number == 1 else f"{columns.number or 'some'} numbers"
    return f"{how_many} per pose{names}, shape {shape},"
