"""The arguments of ``forward``, and the gradients of its result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtenn_core.testing._probe.poses import Poses


@dataclass(frozen=True)
class Step:
    """The arguments of ``forward`` in one training step.

    Attributes
    ----------
    poses : the predictions and the pose inputs
    gradients : the gradients of all predictions for each parameter, each of shape
        (n_poses, *shape of the parameter). With columns, the first dimension is n_poses · n_columns
    params : the parameters, in the order of ``param_names``
    """

    poses: Poses
    gradients: Mapping[str, Tensor]
    params: Mapping[str, Tensor]

    def to(self, dtype: torch.dtype) -> Step:
        """Return the step in another dtype."""
        return Step(
            self.poses.map(lambda numbers: numbers.to(dtype)),
            {name: gradients.to(dtype) for name, gradients in self.gradients.items()},
            {n: param.detach().to(dtype).requires_grad_() for n, param in self.params.items()},
        )

    def pred_list(self) -> list[Tensor]:
        """Return a copy of each prediction, as an argument of ``forward``."""
        return [prediction.clone() for prediction in self.poses.predictions]

    def grad_dict(self) -> dict[str, list[Tensor]]:
        """Return a copy of each gradient, as an argument of ``forward``."""
        return {
            name: [gradient.clone() for gradient in self.by_pose(gradients)]
            for name, gradients in self.gradients.items()
        }

    def by_pose(self, gradients: Tensor) -> Tensor:
        """Return a view of gradients with one entry for each pose, as ``grad_dict`` has it."""
        return gradients.unflatten(0, self.poses.predictions.shape)


def gradients_of(value: Tensor, params: Mapping[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Return the gradient of a value with respect to each parameter; zeros if there is none."""
    wanted = {name: param for name, param in params.items() if param.requires_grad}
    found = torch.autograd.grad(value, list(wanted.values()), materialize_grads=True, **options)
    return dict(zip(wanted, found, strict=True))


def default_shapes(n_poses: int) -> dict[str, tuple[int, ...]]:
    """Return shapes of parameters. With them, a sum over a wrong axis also has the right shape."""
    return {
        "w1": (n_poses,),
        "w10": (n_poses, n_poses),
        "w2": (n_poses, n_poses),
        "scalar": (),
        "one": (1,),
        "column": (n_poses, 1),
        "rows": (2, n_poses),
        "layer.bias": (2,),
    }
