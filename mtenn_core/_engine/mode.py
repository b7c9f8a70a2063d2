"""The options of a multi-pose model, and what every gradient mode does with them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from mtenn_core._engine.evaluation import PoseInputs
from mtenn_core.combination import Combination

if TYPE_CHECKING:
    from mtenn_core._engine.call import Call
    from mtenn_core._engine.cost import ModeCost, StepTotals
    from mtenn_core._engine.stored import StoredGradients

Collate = Callable[[list[Any]], Any]


class Options(NamedTuple):
    """The options of a :class:`~mtenn_core.MultiPoseModel`, as they are in one call."""

    pose_model: torch.nn.Module
    combination: Combination
    gradients: str
    collate: Collate | None
    chunk_size: int | None
    skip_below: float | None
    check_finite: bool


class Mode(ABC):
    """A way to take the gradients of poses. It has no state, and serves all models.

    Attributes
    ----------
    name : the value of the option ``gradients``
    needs_combine : False if it also works with a combination that defines only ``forward``
    takes_batches : False if it must have the poses one by one
    """

    name: ClassVar[str]
    needs_combine: ClassVar[bool] = True
    takes_batches: ClassVar[bool] = True

    @abstractmethod
    def check_options(self, options: Options) -> None:
        """Raise a ValueError for options that exclude this mode."""

    @abstractmethod
    def check_group(self, options: Options) -> None:
        """Raise a ValueError if a group of processes cannot share the poses of a compound."""

    @abstractmethod
    def chunk_size(self, options: Options, n_poses: int) -> int:
        """Return how many of ``n_poses`` poses run together."""

    @abstractmethod
    def predict(self, options: Options, call: Call) -> tuple[Tensor, StoredGradients | None]:
        """Return the differentiable predictions, shape (n_poses,), and gradients that are kept."""

    @abstractmethod
    def combine(
        self,
        combination: Combination,
        predictions: Tensor,
        inputs: PoseInputs,
        gradients: StoredGradients | None,
        first_pose: int,
    ) -> Tensor:
        """Return the combined prediction of one compound, shape ().

        Parameters
        ----------
        predictions, inputs : of the compound's poses, shape (n_poses,)
        gradients : from :meth:`predict`
        first_pose : index of the compound's first pose in the call
        """

    @abstractmethod
    def cost(self, totals: StepTotals) -> ModeCost:
        """Return the cost of one training step."""
