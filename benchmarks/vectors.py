"""Two combinations of vectors, to measure the checks: DeepSets, and gated attention."""

import torch
from torch import Tensor, nn

from mtenn_core import Combination


class DeepSets(Combination):
    """A readout of the sum of an embedding of each pose (Zaheer et al. 2017, arXiv 1703.06114)."""

    pose_columns = 8
    properties = frozenset({"permutation_invariant"})

    def __init__(self, hidden: int = 16) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(8, hidden), nn.Tanh(), nn.Linear(hidden, hidden))
        self.readout = nn.Linear(hidden, 1)

    def combine(self, predictions: Tensor) -> Tensor:
        return self.readout(self.embed(predictions).sum(0))[0]


class GatedAttention(Combination):
    """Gated attention over embeddings (Ilse, Tomczak, Welling 2018, arXiv 1802.04712)."""

    pose_columns = 64
    properties = frozenset({"permutation_invariant", "replication_invariant", "bounded"})

    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.v, self.u = nn.Linear(64, hidden), nn.Linear(64, hidden)
        self.w = nn.Linear(hidden, 1)

    def combine(self, predictions: Tensor) -> Tensor:
        scores = self.w(torch.tanh(self.v(predictions)) * torch.sigmoid(self.u(predictions)))
        return (torch.softmax(scores, dim=0) * predictions).sum(0)
