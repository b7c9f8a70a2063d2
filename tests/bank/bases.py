"""Right combinations whose parts can be replaced, one for each depth.

All of them are the smooth maximum (1/t) ln Σ_i exp(t ŷ_i), whose pose weights are softmax(t ŷ).
The mistakes derive from them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mtenn_core import Combination
from mtenn_core._engine.known_gradients import refuse_double_backward
from mtenn_core._engine.precision import at_least_float32
from mtenn_core.gradients import check_gradients, stack_predictions


def widened(tensor: Tensor) -> Tensor:
    """Half precision as float32, everything else as it is."""
    return tensor.to(at_least_float32(tensor.dtype))


def smooth_max(y: Tensor, t: float | Tensor) -> Tensor:
    # Shift by the extreme first: t*y alone loses its last digits where |y| is large.
    extreme = widened(y).amax().detach()
    return (extreme + torch.logsumexp(t * (widened(y) - extreme), dim=0) / t).to(y.dtype)


def soft_weights(y: Tensor, t: float | Tensor) -> Tensor:
    """Return the derivative of :func:`smooth_max`; its shift cancels."""
    return torch.softmax(t * (widened(y) - widened(y).amax()), dim=0).to(y.dtype)


def boltzmann_mean(y: Tensor, t: float | Tensor) -> Tensor:
    """Return Σ p_i y_i with p = softmax(-t y)."""
    lowest = y.amin().detach()
    return lowest + (torch.softmax(-t * (y - lowest), dim=0) * (y - lowest)).sum()


def boltzmann_weights(y: Tensor, t: float | Tensor) -> Tensor:
    """Return the derivative of :func:`boltzmann_mean`, p_i (1 + t (m - y_i))."""
    above = y - y.amin()
    populations = torch.softmax(-t * above, dim=0)
    return populations * (1 + t * ((populations * above).sum() - above))


def positive(name: str, value: float) -> float:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be positive and finite; found {value}")
    return value


class Scaled(Combination):
    """Has a scale t."""

    examples = ({}, {"t": 3.0})

    def __init__(self, t=1.0):
        super().__init__()
        self.t = positive("t", t)


class Plain(Scaled):
    """Depth 1: the value, and the rest by autograd."""

    def combine(self, predictions):
        return smooth_max(predictions, self.t)


class ClosedForm(Plain):
    """Depth 2: the value and its derivative."""

    def pose_weights(self, predictions):
        return soft_weights(predictions, self.t)


class FullDepth(Scaled):
    """Depth 3: an autograd function of its own, which asks the combination for each step."""

    def forward(self, pred_list, grad_dict, param_names, *model_params):
        self.inspect(pred_list, grad_dict, param_names, model_params)
        return self.apply_function(pred_list, grad_dict, param_names, *model_params)

    def apply_function(self, pred_list, grad_dict, param_names, *model_params):
        return Function.apply(self, self.own(), pred_list, grad_dict, param_names, *model_params)

    def inspect(self, pred_list, grad_dict, param_names, model_params):
        """Raise an error that names what is missing or does not fit."""
        check_gradients(len(stack_predictions(pred_list)), grad_dict, param_names, model_params)

    def own(self):
        """Return the parameter of the combination itself, if it has one."""
        return None

    def stacked(self, pred_list):
        """Return the predictions, shape (n_poses,), in their own dtype."""
        return torch.stack([prediction.detach().reshape(()) for prediction in pred_list])

    def widened(self, y):
        return widened(y)

    def output(self, pred_list, grad_dict, model_params):
        y = self.stacked(pred_list)
        return self.value(self.widened(y)).to(y.dtype)

    def value(self, y):
        return smooth_max(y, self.t)

    def weights(self, y):
        return soft_weights(y, self.t)

    def keep(self, ctx, pred_list, grad_dict, param_names, model_params):
        """Keep what backward needs: tensors are saved, so that they die with the graph."""
        ctx.keys, gradients = self.split_grad_dict(grad_dict)
        ctx.param_names = list(param_names)
        ctx.save_for_backward(self.stacked(pred_list), self.own(), *gradients)

    def backward(self, ctx, go):
        """Return the gradients of the combination's own parameter and of the model's."""
        refuse_double_backward()
        y, _, *gradients = ctx.saved_tensors
        weights = self.weights(self.widened(y))
        sums = {
            name: self.weighted_sum(go, weights, of_poses)
            for name, of_poses in self.join_grad_dict(ctx.keys, gradients).items()
        }
        return self.own_gradient(go, self.widened(y)), *self.in_order(ctx.param_names, sums)

    def own_gradient(self, go, y):
        return None

    def weighted_sum(self, go, weights, gradients):
        """Return go Σ_i w_i g_i for the gradients of one parameter, in their shape and dtype."""
        stacked = widened(torch.stack(list(gradients)))
        stacked = stacked.to(torch.promote_types(stacked.dtype, weights.dtype))
        go_weights = (go.to(stacked.dtype) * weights).to(stacked.dtype)
        return torch.tensordot(go_weights, stacked, 1).to(gradients[0].dtype)

    def in_order(self, param_names, sums):
        return [sums[name] for name in param_names]


class Function(torch.autograd.Function):
    """Hands every step to the combination."""

    @staticmethod
    def forward(combination, own, pred_list, grad_dict, param_names, *model_params):
        return combination.output(pred_list, grad_dict, model_params)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.combination, _, pred_list, grad_dict, param_names, *model_params = inputs
        ctx.combination.keep(ctx, pred_list, grad_dict, param_names, model_params)

    @staticmethod
    def backward(ctx, grad_output):
        own, *of_model = ctx.combination.backward(ctx, grad_output)
        return None, own, None, None, None, *of_model


class LearnableFullDepth(FullDepth):
    """Depth 3 with a parameter of its own, ln t."""

    def __init__(self, t=1.0):
        super().__init__(t)
        self.log_t = torch.nn.Parameter(torch.tensor(math.log(t)))

    def own(self):
        return self.log_t

    def value(self, y):
        return smooth_max(y, self.log_t.detach().exp())

    def weights(self, y):
        return soft_weights(y, self.log_t.detach().exp())

    def own_gradient(self, go, y):
        """Return go ∂h/∂(ln t) = go (Σ w_i y_i - h), both sides less the extreme."""
        below = y - y.amax()
        return (go * ((self.weights(y) * below).sum() - self.value(below))).to(self.log_t.dtype)
