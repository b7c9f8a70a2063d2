"""Autograd functions whose gradients are known before backward runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mtenn_core._engine.autograd_nodes import add_in_place
from mtenn_core._engine.precision import at_least_float32
from mtenn_core.errors import DoubleBackwardError

WeightedSum = Callable[[Tensor, Sequence[Tensor]], Sequence[Tensor]]


def attach(
    predictions: Tensor,
    gradients: Sequence[Tensor],
    weighted_sum: WeightedSum,
    model_params: Sequence[Tensor],
) -> Tensor:
    """Return ``predictions`` with a backward that weights known gradients.

    Parameters
    ----------
    predictions : shape (n_poses,)
    gradients : saved for backward, in any layout that ``weighted_sum`` understands
    weighted_sum : ``weighted_sum(weights, gradients)`` returns one gradient per parameter
    model_params : the parameters, which receive the gradients
    """
    return _AttachGradients.apply(predictions, gradients, weighted_sum, *model_params)


class _AttachGradients(torch.autograd.Function):
    """Predictions forward; backward, the weighted sum of their known gradients."""

    # forward takes ctx, and there is no setup_context: with one, torch (2.13) inspects the
    # signature of forward in every call, which takes 50 µs.
    @staticmethod
    def forward(
        ctx: Any,
        predictions: Tensor,
        gradients: Sequence[Tensor],
        weighted_sum: WeightedSum,
        *model_params: Tensor,
    ) -> Tensor:
        ctx.weighted_sum = weighted_sum
        # Saved, and not an attribute of ctx: torch frees saved tensors after backward, and raises
        # if somebody changed one in place.
        ctx.save_for_backward(*gradients)
        # A copy: an input that is returned as it is becomes a view, through which a caller could
        # change it.
        return predictions.clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        return None, None, None, *ctx.weighted_sum(grad_output, ctx.saved_tensors)


def refuse_double_backward() -> None:
    """Raise a :class:`DoubleBackwardError` if backward runs under ``create_graph=True``.

    torch enables grad mode in backward only for ``create_graph``. Its own ``once_differentiable``
    raises later, and only where the incoming gradient has a graph: in ``loss = prediction +
    penalty`` it has none, and the penalty on gradients would be dropped without an error.
    """
    if torch.is_grad_enabled():
        raise DoubleBackwardError(
            "create_graph=True asks for the gradient of a gradient. A gradient that comes from"
            " stored gradients or from pose_weights has no gradient of its own. Use"
            " MultiPoseModel(..., gradients='graph')."
        )


def sum_over_poses(
    weights: Tensor, gradients: Sequence[Tensor], dtypes: Sequence[torch.dtype]
) -> list[Tensor]:
    """Return Σ_i ``weights[i]`` · gradient i for each of ``len(dtypes)`` parameters.

    A pose with weight zero adds nothing, whatever its gradient.

    Parameters
    ----------
    weights : shape (n_poses,)
    gradients : n_poses × n_params tensors, those of the first pose first
    dtypes : of the n_params results
    """
    n_params = len(dtypes)
    if not n_params:
        return []
    sums = [
        torch.zeros(g.shape, dtype=at_least_float32(g.dtype), device=g.device)
        for g in gradients[:n_params]
    ]
    for pose, weight in enumerate(weights.tolist()):
        if weight == 0:  # 0 · inf would be NaN
            continue
        of_pose = list(gradients[pose * n_params : (pose + 1) * n_params])
        add_in_place(sums, of_pose, weight)
    return [total.to(dtype) for total, dtype in zip(sums, dtypes, strict=True)]
