"""A combination in the style of the field's guide: the baseline of the benchmarks.

A smooth maximum ln Σ exp(ŷ_i) with its own ``autograd.Function``, which has one output. The
function stacks, weights and sums the gradients of each parameter. The file imports only torch and
``Combination``, so that it represents code written before mtenn-core.
"""

import torch

from mtenn_core import Combination


class GuideCombination(Combination):
    """Smooth maximum, written at full depth."""

    def forward(self, pred_list, grad_dict, param_names, *model_params):
        """Pass everything to the autograd function."""
        return GuideFunction.apply(pred_list, grad_dict, param_names, *model_params)


class GuideFunction(torch.autograd.Function):
    """ln Σ exp(ŷ_i) and Σ_i exp(ŷ_i - Q) ∂ŷ_i/∂θ, with Q the value."""

    @staticmethod
    def forward(pred_list, grad_dict, param_names, *model_params):
        """Return the smooth maximum, shape ()."""
        return torch.logsumexp(torch.stack(pred_list).flatten(), dim=0).detach()

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Keep predictions, gradients and parameters."""
        pred_list, grad_dict, param_names, *model_params = inputs
        ctx.keys, gradients = Combination.split_grad_dict(grad_dict)
        ctx.param_names = param_names
        ctx.save_for_backward(torch.stack(pred_list).flatten(), *gradients, *model_params)

    @staticmethod
    def backward(ctx, grad_output):
        """Return the gradient of every parameter, in the order of their names."""
        predictions, *saved = ctx.saved_tensors
        grad_dict = Combination.join_grad_dict(ctx.keys, saved[: len(ctx.keys)])
        value = torch.logsumexp(predictions, dim=0)
        combined = {}
        for name, gradients in grad_dict.items():
            weighted = [
                gradient * (prediction - value).exp()
                for gradient, prediction in zip(gradients, predictions, strict=True)
            ]
            combined[name] = torch.stack(weighted, dim=-1).sum(dim=-1) * grad_output
        return None, None, None, *(combined[name] for name in ctx.param_names)
