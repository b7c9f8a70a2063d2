"""The pose model: SchNet predicts one ΔG for each conformer of a batch."""

from __future__ import annotations

import torch
from conformers import CUTOFF, Batch
from torch import Tensor
from torch_geometric.nn.models import SchNet


class ConformerSchNet(torch.nn.Module):
    """Hydration ΔG of each conformer of a batch.

    Parameters
    ----------
    mean, std : mean and standard deviation of the training ΔG, in kcal/mol. SchNet works on
        standardised numbers. The predictions are in kcal/mol, because kT needs the unit.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.schnet = SchNet(
            hidden_channels=32,
            num_filters=32,
            num_interactions=3,
            # One Gaussian every 0.5 Å. Of narrower ones (the default is 50), the tails are denormal
            # numbers, which are slow: with 25, a training step took 2.7 times as long.
            num_gaussians=13,
            cutoff=CUTOFF,
            # SchNet's own graph needs a compiled package, so the edges come in place of positions.
            interaction_graph=lambda edges, owner: edges,
            readout="mean",
        )
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def forward(self, batch: Batch) -> Tensor:
        """Return predictions, shape (n_conformers,), in kcal/mol and the parameters' dtype."""
        edges = batch.edge_index, batch.edge_length.to(self.std.dtype)
        return self.mean + self.std * self.schnet(batch.z, edges, batch.owner).squeeze(-1)
