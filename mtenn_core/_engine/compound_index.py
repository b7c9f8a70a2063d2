"""The compound of each pose of a call, for sums over its poses and for errors that name it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mtenn_core.errors import PredictionError


class CompoundIndex(NamedTuple):
    """The compound of each pose of a call.

    Attributes
    ----------
    sizes : the number of poses of each compound
    several : False if the call has neither ``sizes`` nor ``ptr``. Its result has the shape ()
    of_pose : the compound of each pose, shape (n_poses,)
    """

    sizes: list[int]
    several: bool
    of_pose: Tensor

    def sum(self, numbers: Tensor) -> Tensor:
        """Return the sum over each compound's poses, shape (n_compounds,)."""
        return numbers.new_zeros(len(self.sizes)).index_add(0, self.of_pose, numbers)

    def largest(self, numbers: Tensor) -> Tensor:
        """Return the largest of each compound's numbers, shape (n_compounds,)."""
        start = numbers.new_zeros(len(self.sizes))
        return start.scatter_reduce(0, self.of_pose, numbers, "amax", include_self=False)

    def shaped(self, numbers: Tensor) -> Tensor:
        """Return numbers of compounds in the shape of the call's result."""
        return numbers if self.several else numbers.reshape(())

    def check(self, what: str, numbers: Tensor, wrong: Tensor, rule: str = "finite") -> None:
        """Raise an error that names the first pose whose number is wrong, if there is one.

        Parameters
        ----------
        numbers, wrong : shape (n_poses,)
        """
        if wrong.any():
            pose = int(wrong.nonzero()[0])
            raise self.error(pose, f"{what} must be {rule}; found {numbers[pose].item()}")

    def error(self, pose: int, message: str) -> PredictionError:
        """Return an error that names a pose."""
        compound = int(self.of_pose[pose])
        within = pose - sum(self.sizes[:compound])
        where = f" (pose {within} of compound {compound})" if self.several else ""
        return PredictionError(f"pose {pose}{where}: {message}", pose=pose, compound=compound)


def compound_of_pose(sizes: list[int]) -> Tensor:
    """Return the compound of each pose, shape (n_poses,), on the CPU."""
    # The default device may be another one.
    repeats = torch.tensor(sizes, device="cpu")
    return torch.repeat_interleave(repeats, output_size=sum(sizes))
