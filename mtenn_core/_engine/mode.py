"""The options of a multi-pose model, and the interface of all gradient modes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from mtenn_core._engine.columns import Columns
from mtenn_core._engine.declarations import overrides
from mtenn_core._engine.evaluation import PoseGradients
from mtenn_core.combination import Combination

if TYPE_CHECKING:
    from mtenn_core._engine.call import Call
    from mtenn_core._engine.cost import ModeCost, StepTotals

Collate = Callable[[list[Any]], Any]
GradientMode = Literal["graph", "stored", "recomputed"]


class Options(NamedTuple):
    """The options of a :class:`~mtenn_core.MultiPoseModel` at the time of one call.

    Attributes
    ----------
    combinations : one combination, or one for each task
    tasks : the number or the names of the tasks
    columns : the columns of the pose model's output; None if it has one number per pose
    """

    pose_model: torch.nn.Module
    combinations: tuple[Combination, ...]
    gradients: str
    collate: Collate | None
    chunk_size: int | None
    skip_below: float | None
    check_finite: bool
    shared: torch.nn.Module | None
    tasks: int | Sequence[str] | None
    columns: Columns | None


def check_has_combine(options: Options) -> None:
    """Raise a ValueError if a combination defines only ``forward``."""
    for combination in map(type, options.combinations):
        if not overrides(combination, "combine"):
            raise ValueError(
                f"{combination.__name__} defines only forward, which works on stored gradients. Use"
                f" gradients='stored' instead of {options.gradients!r}, or define"
                " combine(predictions), too."
            )


class Mode(ABC):
    """A way to take the gradients of poses. It has no state. All models use the same object.

    Attributes
    ----------
    name : the value of the option ``gradients``
    needs_combine : False if the mode also works with a combination that defines only ``forward``
    takes_batches : False if the mode needs the poses one by one
    most_columns : the largest number of predictions per pose; None if there is no limit
    uses_closed_form : False if autograd takes the derivative of ``combine``, even if the
        combination has ``pose_weights``
    """

    name: ClassVar[GradientMode]
    needs_combine: ClassVar[bool] = True
    takes_batches: ClassVar[bool] = True
    most_columns: ClassVar[int | None] = None
    uses_closed_form: ClassVar[bool] = True

    @abstractmethod
    def check_options(self, options: Options) -> None:
        """Raise a ValueError if an option does not work with this mode."""

    @abstractmethod
    def check_group(self, options: Options) -> None:
        """Raise a ValueError if a group of processes cannot share the poses of a compound."""

    @abstractmethod
    def chunk_size(self, options: Options) -> int | None:
        """Return the number of poses that run together, or None for all poses of a call."""

    @abstractmethod
    def predict(self, options: Options, call: Call) -> tuple[Tensor, list[PoseGradients] | None]:
        """Return the pose predictions, and their gradients if the combination needs them.

        Returns
        -------
        predictions : shape (n_poses,) or (n_poses, n_columns), differentiable, in float32 at least
        gradients : the gradients of each compound if a combination overrides ``forward``, else
            None. With tasks, the compounds of the first task come first.
        """

    @abstractmethod
    def cost(self, totals: StepTotals) -> ModeCost:
        """Return the cost of one training step."""
