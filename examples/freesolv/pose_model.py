"""The single-pose model: SchNet, one conformer in, one ΔG out."""

from __future__ import annotations

import torch
from conformers import CUTOFF, Batch
from torch import Tensor
from torch_geometric.nn.models import SchNet


def given_edges(edges: tuple[Tensor, Tensor], index: Tensor) -> tuple[Tensor, Tensor]:
    """SchNet's ``interaction_graph``: the edges come in the place of the positions."""
    return edges


class ConformerSchNet(torch.nn.Module):
    """ΔG of each conformer of a batch, in kcal/mol.

    Parameters
    ----------
    mean, std : of the measured ΔG of the training set, in kcal/mol; the network sees neither scale
        nor offset, yet its predictions carry the unit, as a temperature in kcal/mol needs
    """

    def __init__(self, mean: float, std: float, **kw) -> None:
        super().__init__()
        # SchNet looks at positions only to find edges, which by default takes a compiled package.
        k = dict(hidden_channels=32,
            num_filters=32,
            num_interactions=3,
            num_gaussians=25,
            cutoff=CUTOFF,
            interaction_graph=given_edges)
        k.update(kw)
        self.schnet = SchNet(**k)
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def forward(self, batch: Batch) -> Tensor:
        """Predictions of shape (n_conformers,), in kcal/mol, in the dtype of the parameters."""
        edges = batch.edge_index, batch.edge_length.to(self.std)
        return self.mean + self.std * self.schnet(batch.z, edges, batch.index).squeeze(-1)
