"""Pose gradients: the ``grad_dict`` that holds them, its checks, and one differentiable vector.

The gradient of a combined prediction h(ŷ_1 … ŷ_M) is Σ_i w_i ∂ŷ_i/∂θ with w_i = ∂h/∂ŷ_i.
:func:`attach_gradients` takes the vectors ∂ŷ_i/∂θ and returns the predictions as one tensor. In
backward, this tensor receives the weights w_i from autograd and computes the sum. For this reason,
every loss on the predictions gets the right gradient.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from mtenn_core.errors import GradientError, PredictionError

GradDict = Mapping[str, Sequence[Tensor]]


def split_grad_dict(grad_dict: GradDict) -> tuple[list[str], list[Tensor]]:
    """Split a ``grad_dict`` into two lists of equal length.

    Parameters
    ----------
    grad_dict : for each parameter, its gradient for each of the n_poses poses, in their order

    Returns
    -------
    keys : ``keys[i]`` is the parameter of ``tensors[i]``; each key is repeated n_poses times
    tensors : the gradients

    Raises
    ------
    GradientError : a parameter has no gradients, or more or fewer gradients than another
    """
    n_poses = len(next(iter(grad_dict.values()), ()))
    for name, gradients in grad_dict.items():
        if not len(gradients):
            raise GradientError(
                f"parameter {name!r}: expected one gradient per pose; found none", parameter=name
            )
        if len(gradients) != n_poses:
            raise GradientError(
                f"parameter {name!r}: expected {n_poses} pose gradients, as many as"
                f" {next(iter(grad_dict))!r} has; found {len(gradients)}",
                parameter=name,
            )
    keys = [name for name, gradients in grad_dict.items() for _ in gradients]
    return keys, [gradient for gradients in grad_dict.values() for gradient in gradients]


def join_grad_dict(keys: Sequence[str], tensors: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """Join two lists into a ``grad_dict``. This is the inverse of :func:`split_grad_dict`.

    Raises
    ------
    GradientError : the lists differ in length, or one key is repeated more often than another
    """
    if len(keys) != len(tensors):
        raise GradientError(
            f"expected one key per gradient; found {len(keys)} keys and {len(tensors)} gradients"
        )
    grad_dict: dict[str, list[Tensor]] = {}
    for key, tensor in zip(keys, tensors, strict=True):
        grad_dict.setdefault(key, []).append(tensor)
    split_grad_dict(grad_dict)
    return grad_dict


def attach_gradients(
    pred_list: Sequence[Tensor],
    grad_dict: GradDict,
    param_names: Sequence[str],
    *model_params: Tensor,
) -> Tensor:
    """Return one differentiable vector of pose predictions whose gradients are already known.

    When backward reaches the result with gradient v, every parameter receives
    Σ_i v_i · ``grad_dict[name][i]``. Each stored gradient is read once. A swap of two names is
    detected only if the two parameters differ in shape.

    Parameters
    ----------
    pred_list : n_poses tensors, shape () or (1,)
    grad_dict : for each parameter, n_poses tensors of its shape; entry i is ∂ŷ_i/∂parameter
    param_names : the keys of ``grad_dict``, in the order of ``model_params``
    *model_params : the parameters, which receive the gradients

    Returns
    -------
    shape (n_poses,), dtype and device of the predictions

    Raises
    ------
    PredictionError : there is no pose, or a prediction is not one number. The message names the
        pose.
    GradientError : names, numbers, shapes, dtypes or devices disagree. The message names the
        parameter and the pose.
    DoubleBackwardError : in backward, under ``create_graph=True``
    """
    # The engine is in a higher layer, so import it only here.
    from mtenn_core._engine.known_gradients import attach, sum_over_poses

    predictions = stack_predictions(pred_list)
    check_gradients(len(pred_list), grad_dict, param_names, model_params)
    by_pose = [grad_dict[name][i] for i in range(len(pred_list)) for name in param_names]
    weighted_sum = partial(sum_over_poses, dtypes=[param.dtype for param in model_params])
    return attach(predictions, by_pose, weighted_sum, model_params)


def stack_predictions(pred_list: Sequence[Tensor]) -> Tensor:
    """Return tensors of shape () or (1,) as one detached vector, shape (n_poses,)."""
    if not len(pred_list):
        raise PredictionError("expected at least one pose; found none")
    for pose, prediction in enumerate(pred_list):
        if not isinstance(prediction, Tensor):
            raise PredictionError(
                f"pose {pose}: a prediction must be a tensor; found {prediction!r}", pose=pose
            )
        if prediction.shape not in ((), (1,)):
            raise PredictionError(
                f"pose {pose}: a prediction must be one number, shape () or (1,);"
                f" found shape {tuple(prediction.shape)}",
                pose=pose,
            )
        if prediction.dtype != pred_list[0].dtype:
            raise PredictionError(
                f"pose {pose}: the prediction must have {pred_list[0].dtype}, the dtype of pose 0;"
                f" found {prediction.dtype}",
                pose=pose,
            )
    return torch.stack([prediction.detach().reshape(()) for prediction in pred_list])


def check_gradients(
    n_poses: int, grad_dict: GradDict, param_names: Sequence[str], model_params: Sequence[Tensor]
) -> None:
    """Check that names, numbers, shapes, dtypes and devices of pose gradients agree.

    Raises
    ------
    GradientError : it describes the first disagreement: parameter, pose, and both values
    """
    if len(param_names) != len(model_params):
        raise GradientError(
            f"expected one name per parameter; found {len(param_names)} names"
            f" and {len(model_params)} parameters"
        )
    for name, count in Counter(param_names).items():
        if count > 1:
            raise GradientError(
                f"parameter {name!r} must be in param_names once; found {count} times",
                parameter=name,
            )
        if name not in grad_dict:
            raise GradientError(
                f"parameter {name!r} has no gradients: it is in param_names but not in grad_dict."
                f" The keys of grad_dict are {sorted(grad_dict)}.",
                parameter=name,
            )
    for name in grad_dict:
        if name not in param_names:
            raise GradientError(
                f"parameter {name!r} is in grad_dict but not in param_names."
                f" The names in param_names are {sorted(param_names)}.",
                parameter=name,
            )
    for name, param in zip(param_names, model_params, strict=True):
        if len(grad_dict[name]) != n_poses:
            raise GradientError(
                f"parameter {name!r}: expected {n_poses} pose gradients, one per prediction;"
                f" found {len(grad_dict[name])}",
                parameter=name,
            )
        expected = (param.shape, param.dtype, param.device)
        for pose, gradient in enumerate(grad_dict[name]):
            found = isinstance(gradient, Tensor)
            if not found or (gradient.shape, gradient.dtype, gradient.device) != expected:
                raise GradientError(
                    f"parameter {name!r}, pose {pose}: the gradient must match the parameter, which"
                    f" has {_describe(param)}; found {_describe(gradient)}",
                    parameter=name,
                    pose=pose,
                )


def _describe(tensor: object) -> str:
    if not isinstance(tensor, Tensor):
        return repr(tensor)
    return f"shape {tuple(tensor.shape)}, {tensor.dtype}, {tensor.device}"
