"""Attention and gated attention over the features of poses."""

from __future__ import annotations

import torch
from torch import Tensor

from mtenn_core import Combination


class AttentionCombination(Combination):
    """The logit of a weighted mean of features, c + uᵀ Σ_i a_i h_i, with learned weights.

    a = softmax(w tanh(V h_i)), as in Ilse, Tomczak and Welling (2018), arXiv 1802.04712.

    Parameters
    ----------
    n_features : the number of features of a pose
    n_hidden : the number of hidden units that compute a weight
    """

    examples = ({"n_features": 3, "n_hidden": 2},)

    def __init__(self, n_features: int, n_hidden: int) -> None:
        super().__init__()
        self.pose_columns = n_features
        self.hidden = torch.nn.Linear(n_features, n_hidden)
        self.score = torch.nn.Linear(n_hidden, 1)
        self.readout = torch.nn.Linear(n_features, 1)

    def combine(self, predictions: Tensor) -> Tensor:
        """Return the logit, shape (), of features of shape (n_poses, n_features)."""
        weights = torch.softmax(self.score(self.gate(predictions)), dim=0)
        return self.readout((weights * predictions).sum(dim=0)).squeeze(-1)

    def gate(self, features: Tensor) -> Tensor:
        """Return the hidden units, shape (n_poses, n_hidden)."""
        return torch.tanh(self.hidden(features))


class GatedAttentionCombination(AttentionCombination):
    """Attention whose hidden units are multiplied by sigmoid(U h_i)."""

    def __init__(self, n_features: int, n_hidden: int) -> None:
        super().__init__(n_features, n_hidden)
        self.opening = torch.nn.Linear(n_features, n_hidden)

    def gate(self, features: Tensor) -> Tensor:
        """Return the hidden units, shape (n_poses, n_hidden)."""
        return torch.tanh(self.hidden(features)) * torch.sigmoid(self.opening(features))
