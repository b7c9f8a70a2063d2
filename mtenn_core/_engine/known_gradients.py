"""Autograd functions whose gradients are known before backward runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mtenn_core._engine.precision import at_least_float32
from mtenn_core._torch_internals import add_in_place
from mtenn_core.errors import DoubleBackwardError

WeightedSum = Callable[[Tensor, Sequence[Tensor]], Sequence[Tensor]]


def attach(
    predictions: Tensor,
    gradients: Sequence[Tensor],
    weighted_sum: WeightedSum,
    model_params: Sequence[Tensor],
) -> Tensor:
    """Return ``predictions`` with a backward that returns weighted sums of known gradients.

    Parameters
    ----------
    predictions : shape (n_poses,), or any that ``weighted_sum`` takes for the weights
    gradients : tensors to save for backward, in any layout that ``weighted_sum`` understands
    weighted_sum : ``weighted_sum(weights, gradients)`` returns one gradient per parameter
    model_params : the parameters, which receive the gradients
    """
    return _AttachGradients.apply(predictions, gradients, weighted_sum, *model_params)


class _AttachGradients(torch.autograd.Function):
    """A function whose backward returns the weighted sum of known gradients."""

    # This class has no setup_context, so forward takes ctx. With setup_context, torch (2.13) would
    # inspect the signature of forward in every call, which takes 50 µs.
    @staticmethod
    def forward(
        ctx: Any,
        predictions: Tensor,
        gradients: Sequence[Tensor],
        weighted_sum: WeightedSum,
        *model_params: Tensor,
    ) -> Tensor:
        ctx.weighted_sum = weighted_sum
        # Torch frees saved tensors after backward, and raises an error if one of them was changed
        # in place. It would do neither for an attribute of ctx.
        ctx.save_for_backward(*gradients)
        # Return a copy. If forward returned its input, the output would be a view of the input, and
        # a caller could change the input through it.
        return predictions.clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        return None, None, None, *ctx.weighted_sum(grad_output, ctx.saved_tensors)


def refuse_double_backward() -> None:
    """Raise a :class:`DoubleBackwardError` if backward runs under ``create_graph=True``.

    In backward, torch enables grad mode only for ``create_graph=True``. torch's decorator
    ``once_differentiable`` would raise later, and only if the incoming gradient has a graph. In
    ``loss = prediction + penalty``, the incoming gradient has no graph. Then a penalty on gradients
    would be ignored without an error.
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

    A pose with weight zero adds nothing, even if its gradient is infinite or NaN.

    Parameters
    ----------
    weights : shape (n_poses,)
    gradients : n_poses × n_params tensors; the n_params tensors of the first pose come first
    dtypes : the dtypes of the n_params results
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
        add_in_place(sums, of_pose, alpha=weight)
    return [total.to(dtype) for total, dtype in zip(sums, dtypes, strict=True)]
