"""The poses of one compound: predictions and pose inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mtenn_core._engine.evaluation import PoseInputs


@dataclass(frozen=True)
class Poses:
    """The numbers of one compound's poses, which a combination gets.

    Attributes
    ----------
    predictions : shape (n_poses,), or (n_poses, n_columns) if the combination declares columns
    inputs : the pose inputs by name, each of shape (n_poses,)
    column_names : the names of the columns, if they have names
    """

    predictions: Tensor
    inputs: PoseInputs = field(default_factory=dict)
    column_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.predictions)

    def __getitem__(self, which: list[int]) -> Poses:
        """Return the poses with these indices, in this order."""
        return self.map(lambda numbers: numbers[which])

    def __str__(self) -> str:
        return ", ".join(f"{name} [{listed(numbers)}]" for name, numbers in self.named().items())

    def named(self) -> dict[str, Tensor]:
        """Return predictions and pose inputs by name."""
        return {"predictions": self.predictions, **self.inputs}

    def map(self, function: Callable[[Tensor], Tensor]) -> Poses:
        """Apply a function to the predictions and to each of the inputs."""
        inputs = {name: function(numbers) for name, numbers in self.inputs.items()}
        return Poses(function(self.predictions), inputs, self.column_names)

    def at(self, predictions: Tensor) -> Poses:
        """Return the same poses with other predictions."""
        return Poses(predictions, self.inputs, self.column_names)

    def tied(self) -> Poses:
        """Return the same poses, but all have the prediction of the first pose."""
        return self.at(self.predictions[:1].expand_as(self.predictions).clone())

    def with_input(self, name: str, numbers: Tensor) -> Poses:
        """Return the same poses with other numbers for one of the inputs."""
        return self.with_inputs({name: numbers})

    def with_inputs(self, numbers: PoseInputs) -> Poses:
        """Return the same poses with other numbers for some of the inputs."""
        return Poses(self.predictions, {**self.inputs, **numbers}, self.column_names)

    def fixed(self, function: Callable[[Poses], Tensor]) -> Callable[[Tensor], Tensor]:
        """Return ``function`` as a function of predictions, with the pose inputs of these poses."""
        return lambda predictions: function(self.at(predictions))

    def copied_inputs(self) -> dict[str, Tensor]:
        """Return a copy of each input, as arguments of a combination."""
        return {name: numbers.clone() for name, numbers in self.inputs.items()}

    def row(self) -> Tensor:
        """Return all numbers in one tensor, which starts with the predictions."""
        return torch.cat([numbers.flatten() for numbers in self.named().values()])


def listed(numbers: Tensor) -> str:
    """Return the first eight numbers as text. Of a matrix, return its first four rows."""
    if numbers.dim() > 1:
        rows = ", ".join(f"[{listed(row)}]" for row in numbers[:4])
        return rows + (", …" if len(numbers) > 4 else "")
    more = ", …" if len(numbers) > 8 else ""
    return ", ".join(f"{number:.9g}" for number in numbers.tolist()[:8]) + more
