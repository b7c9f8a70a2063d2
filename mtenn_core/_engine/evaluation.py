"""Values and pose weights of combinations, computed and checked."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from mtenn_core._engine.declarations import overrides
from mtenn_core._engine.known_gradients import attach_weights
from mtenn_core._engine.precision import at_least_float32, no_autocast
from mtenn_core.combination import Combination
from mtenn_core.errors import CombinationContractError, PredictionError

PoseInputs = Mapping[str, Tensor]
NO_INPUTS: PoseInputs = MappingProxyType({})


def combined_prediction(
    combination: Combination,
    predictions: Tensor,
    pose_inputs: PoseInputs = NO_INPUTS,
    *,
    closed_form: bool = True,
) -> Tensor:
    """Return the combined prediction of a differentiable vector of pose predictions.

    The value comes from ``combine``, in float32 at least. Its derivative comes from
    ``pose_weights`` if that is overridden.

    Parameters
    ----------
    predictions : shape (n_poses,)
    pose_inputs : for each name in ``combination.pose_inputs``, shape (n_poses,)
    closed_form : False leaves the derivative to autograd

    Returns
    -------
    shape (), dtype and device of ``predictions``

    Raises
    ------
    PredictionError : fewer poses than ``min_poses``
    CombinationContractError : ``combine`` or ``pose_weights`` returned another shape
    """
    check_n_poses(combination, len(predictions))
    wide = predictions.to(at_least_float32(predictions.dtype))
    pose_inputs = {name: numbers.to(wide.dtype) for name, numbers in pose_inputs.items()}
    overridden = overrides(type(combination), "pose_weights")
    # Two calls of a stochastic combination draw different numbers for the value and its weights.
    closed_form &= overridden and not combination.stochastic
    with no_autocast(predictions.device.type):  # which would compute in half precision
        if closed_form and wide.requires_grad and torch.is_grad_enabled():
            value = _with_closed_form(combination, wide, pose_inputs)
        else:
            value = _checked_scalar(combination, combination.combine(wide, **pose_inputs))
    return value.to(predictions.dtype)


def _with_closed_form(
    combination: Combination, predictions: Tensor, pose_inputs: PoseInputs
) -> Tensor:
    """Return the value with ``pose_weights`` as its derivative."""
    # Detached: the value then has only the graph of the combination's own parameters, and the
    # predictions get their gradient once, from the weights.
    detached = predictions.detach()
    value = _checked_scalar(combination, combination.combine(detached, **pose_inputs))
    # Computed in forward, and not a view: an optimizer may have changed the combination's
    # parameters by backward.
    with torch.no_grad():
        weights = combination.pose_weights(detached, **pose_inputs)
    if not isinstance(weights, Tensor) or weights.shape != detached.shape:
        raise CombinationContractError(
            f"{type(combination).__name__}.pose_weights must return one weight per pose, shape"
            f" {tuple(detached.shape)}; found {_shape_or_type(weights)}"
        )
    return attach_weights(value, predictions, weights.clone())


def full_depth_prediction(combination: Combination, *args: Any, **pose_inputs: Any) -> Tensor:
    """Return the result of a combination's ``forward``, shape ().

    Parameters
    ----------
    *args : ``pred_list, grad_dict, param_names, *model_params``
    """
    pred_list, *_ = args
    with no_autocast(pred_list[0].device.type):
        return _checked_scalar(combination, first_of_pair(combination(*args, **pose_inputs)))


def first_of_pair(value: Any) -> Any:
    """Return the first of the pair (combined, pose predictions) that mtenn's combinations return.

    The second is not needed: a :class:`~mtenn_core.MultiPoseModel` has its own.
    """
    return value[0] if isinstance(value, tuple) and len(value) == 2 else value


def derived_weights(
    combination: Combination, predictions: Tensor, pose_inputs: PoseInputs = NO_INPUTS
) -> Tensor:
    """Return the pose weights of a combination without a closed form, shape (n_poses,)."""
    if overrides(type(combination), "combine"):
        return autograd_weights(combination, predictions, pose_inputs)
    return backward_weights(combination, predictions, pose_inputs)


def autograd_weights(
    combination: Combination, predictions: Tensor, pose_inputs: PoseInputs = NO_INPUTS
) -> Tensor:
    """Return the pose weights that autograd derives from ``combine``, shape (n_poses,)."""
    with torch.inference_mode(False), torch.enable_grad():
        y = predictions.detach().clone().requires_grad_()
        value = combined_prediction(combination, y, pose_inputs, closed_form=False)
        (weights,) = torch.autograd.grad(value, y)
    return weights


def backward_weights(
    combination: Combination, predictions: Tensor, pose_inputs: PoseInputs = NO_INPUTS
) -> Tensor:
    """Return the pose weights that the backward of ``forward`` uses, shape (n_poses,).

    With the gradients of the poses set to the unit vectors e_1 … e_M, the gradient of the combined
    prediction is the vector of the weights.
    """
    with torch.inference_mode(False), torch.enable_grad():
        pred_list = list(predictions.detach().clone())
        probe = torch.zeros_like(predictions, requires_grad=True)
        unit_vectors = list(torch.eye(len(probe), dtype=probe.dtype, device=probe.device))
        value = full_depth_prediction(
            combination, pred_list, {"probe": unit_vectors}, ["probe"], probe, **pose_inputs
        )
        (weights,) = torch.autograd.grad(value, probe)
    return weights


def check_n_poses(combination: Combination, n_poses: int, compound: int | None = None) -> None:
    """Raise a :class:`~mtenn_core.errors.PredictionError` for fewer poses than ``min_poses``."""
    fewest = max(1, combination.min_poses)
    if n_poses < fewest:
        who = "" if compound is None else f"compound {compound}: "
        raise PredictionError(
            f"{who}{type(combination).__name__} needs at least {fewest} pose(s); found {n_poses}",
            compound=compound,
        )


def _checked_scalar(combination: Combination, value: Tensor) -> Tensor:
    """Return the ``value`` of a combination if it is a tensor of shape (), else raise."""
    if not isinstance(value, Tensor) or value.shape != ():
        raise CombinationContractError(
            f"{type(combination).__name__} must return a scalar tensor, shape ();"
            f" found {_shape_or_type(value)}"
        )
    return value


def _shape_or_type(found: object) -> str:
    return f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
