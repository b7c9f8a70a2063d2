"""An adapter that makes a combination usable in mtenn's ``GroupedModel``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mtenn_core._engine.declarations import overrides
from mtenn_core._engine.evaluation import combined_prediction, full_depth_prediction
from mtenn_core.combination import Combination
from mtenn_core.gradients import GradDict, attach_gradients


class MtennCombination(torch.nn.Module):
    """A module that returns the pair (combined prediction, pose predictions)."""

    def __init__(self, combination: Combination) -> None:
        super().__init__()
        self.combination = combination

    def named_modules(
        self,
        memo: set[torch.nn.Module] | None = None,
        prefix: str = "",
        remove_duplicate: bool = True,
    ) -> Iterator[tuple[str, torch.nn.Module]]:
        """Yield this module, and the modules in it that have no parameters.

        ``GroupedModel`` reads the gradient of every entry of its ``named_parameters()``, also of
        frozen ones, which have none. torch looks for these entries in ``named_modules()``. It finds
        the modules to move and to save in another way.
        """
        for name, module in super().named_modules(memo, prefix, remove_duplicate):
            if next(module.parameters(recurse=False), None) is None:
                yield name, module

    def forward(
        self,
        pred_list: Sequence[Tensor],
        grad_dict: GradDict,
        param_names: Sequence[str],
        *model_params: Tensor,
    ) -> tuple[Tensor, Tensor]:
        pred_list = [_as_scalar(prediction) for prediction in pred_list]
        if not grad_dict:
            # No prediction required grad: at inference, or because everything is frozen.
            param_names, model_params = (), ()
        predictions = attach_gradients(pred_list, grad_dict, param_names, *model_params)
        if overrides(type(self.combination), "forward"):
            args = (pred_list, grad_dict, param_names, *model_params)
            return full_depth_prediction(self.combination, *args), predictions
        return combined_prediction(self.combination, predictions), predictions


def _as_scalar(prediction: Tensor) -> Tensor:
    """Return a tensor with one number in shape (). Predictions of mtenn's SchNet have (1, 1)."""
    return prediction.reshape(()) if prediction.numel() == 1 else prediction
