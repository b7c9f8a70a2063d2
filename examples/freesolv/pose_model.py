"""The single-pose model: SchNet, a batch of conformers in, one ΔG each out."""

from __future__ import annotations

import torch
from conformers import CUTOFF, Batch
from torch import Tensor
from torch_geometric.nn.models import SchNet


class ConformerSchNet(torch.nn.Module):
    """Hydration ΔG of each conformer of a batch.

    Parameters
    ----------
    mean, std : of the measured ΔG that it will be trained on, in kcal/mol. SchNet works on
        standardised numbers; what comes out carries the unit, because kT needs it.
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
        """Predictions of shape (n_conformers,), in kcal/mol, in the dtype of the parameters."""
        edges = batch.edge_index, batch.edge_length.to(self.std.dtype)
        return self.mean + self.std * self.schnet(batch.z, edges, batch.owner).squeeze(-1)
