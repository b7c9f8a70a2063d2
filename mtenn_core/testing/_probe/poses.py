"""The poses of one compound: predictions, and further numbers for each pose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mtenn_core._engine.evaluation import PoseInputs


@dataclass(frozen=True)
class Poses:
    """The poses of a compound as a combination sees them.

    Attributes
    ----------
    predictions : shape (n_poses,)
    inputs : what the combination's ``pose_inputs`` name, each of shape (n_poses,)
    """

    predictions: Tensor
    inputs: PoseInputs = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.predictions)

    def __getitem__(self, which: list[int]) -> Poses:
        """Return some of the poses, in that order, each with its own inputs."""
        return self.map(lambda numbers: numbers[which])

    def __str__(self) -> str:
        return ", ".join(f"{name} [{listed(numbers)}]" for name, numbers in self.named().items())

    def named(self) -> dict[str, Tensor]:
        """Return predictions and pose inputs by name."""
        return {"predictions": self.predictions, **self.inputs}

    def map(self, function: Callable[[Tensor], Tensor]) -> Poses:
        """Apply a function to the predictions, and to each of the inputs."""
        inputs = {name: function(numbers) for name, numbers in self.inputs.items()}
        return Poses(function(self.predictions), inputs)

    def at(self, predictions: Tensor) -> Poses:
        """Return the same poses with other predictions."""
        return Poses(predictions, self.inputs)

    def tied(self) -> Poses:
        """Return the same poses, all with the prediction of the first."""
        return self.at(self.predictions[:1].expand(len(self)).clone())

    def with_input(self, name: str, numbers: Tensor) -> Poses:
        """Return the same poses with something else for one of the inputs."""
        return Poses(self.predictions, {**self.inputs, name: numbers})

    def fixed(self, function: Callable[[Poses], Tensor]) -> Callable[[Tensor], Tensor]:
        """Return a function of poses as one of the predictions alone: the inputs are these."""
        return lambda predictions: function(self.at(predictions))

    def copied_inputs(self) -> dict[str, Tensor]:
        """Return the inputs as a combination takes them, each a tensor of its own."""
        return {name: numbers.clone() for name, numbers in self.inputs.items()}

    def row(self) -> Tensor:
        """Return all numbers in a row, the predictions first."""
        return torch.cat(list(self.named().values()))


def listed(numbers: Tensor) -> str:
    """Return numbers as text, the first eight."""
    more = ", …" if len(numbers) > 8 else ""
    return ", ".join(f"{number:.9g}" for number in numbers.tolist()[:8]) + more
