"""Poses that run together: one run of the pose model, and the check of its output."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

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
    shared : the second argument of the pose model, if the model has a shared part
    """

    pose_model: torch.nn.Module
    poses: Any
    first_pose: int
    n_poses: int
    collate: Collate | None
    shared: tuple[Any, ...] = ()

    def run(self) -> Tensor:
        """Return the predictions, shape (n_poses,), in float32 at least.

        Raises
        ------
        PredictionError : the output is not one floating-point number per pose
        """
        try:
            poses = self.poses if self.collate is None else self.collate(self.poses)
            predictions = self.pose_model(poses, *self.shared)
        except Exception as error:
            error.add_note(f"raised by the pose model on {self.named()}")
            raise
        self._check(predictions)
        predictions = predictions.to(at_least_float32(predictions.dtype))
        shape = (self.n_poses,)
        # reshape would add a node to the graph even if the shape is already right.
        return predictions if predictions.shape == shape else predictions.reshape(shape)

    def _check(self, predictions: object) -> None:
        """Raise unless the pose model's output is one floating-point number per pose."""
        n_poses = self.n_poses
        rule = "one number" if n_poses == 1 else f"{n_poses} numbers, one per pose,"
        if not isinstance(predictions, Tensor):
            raise PredictionError(
                f"{self.named()}: the pose model must return {rule} in a tensor;"
                f" found {type(predictions).__name__}",
                pose=self.first_pose,
            )
        shapes = ((n_poses,), (n_poses, 1))
        fits = predictions.numel() == 1 if n_poses == 1 else predictions.shape in shapes
        if not (fits and predictions.is_floating_point()):
            raise PredictionError(
                f"{self.named()}: the pose model must return {rule} in floating point;"
                f" found shape {tuple(predictions.shape)}, {predictions.dtype}",
                pose=self.first_pose,
            )

    def named(self) -> str:
        """Return the poses in words, for messages."""
        first, last = self.first_pose, self.first_pose + self.n_poses - 1
        return f"pose {first}" if first == last else f"poses {first} to {last}"
