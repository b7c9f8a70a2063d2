"""An adapter that makes a combination usable in mtenn's ``GroupedModel``."""

from __future__ import annotations

from collections.abc import Sequence

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

    def forward(
        self,
        pred_list: Sequence[Tensor],
        grad_dict: GradDict,
        param_names: Sequence[str],
        *model_params: Tensor,
    ) -> tuple[Tensor, Tensor]:
        predictions = attach_gradients(pred_list, grad_dict, param_names, *model_params)
        if overrides(type(self.combination), "forward"):
            args = (pred_list, grad_dict, param_names, *model_params)
            return full_depth_prediction(self.combination, *args), predictions
        return combined_prediction(self.combination, predictions), predictions
