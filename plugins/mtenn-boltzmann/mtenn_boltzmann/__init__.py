"""Boltzmann-weighted mean of the pose predictions."""

import math

import torch
from torch import Tensor

from mtenn_core import Combination


class BoltzmannCombination(Combination):
    """Population-weighted mean, Σ_i p_i y_i with p = softmax(-y/kT).

    Parameters
    ----------
    kT : thermal energy in the unit of the predictions (0.593 kcal/mol at 298 K), positive and
        finite
    learnable : train ln kT with the rest of the model; training starts at ``kT``

    Raises
    ------
    ValueError : ``kT`` is not positive and finite
    """

    # The mean is not monotone. It falls if a prediction rises that is more than kT above the mean.
    properties = frozenset(
        {
            "permutation_invariant",
            "translation_equivariant",
            "bounded",
            "idempotent",
            "replication_invariant",
        }
    )
    examples = ({}, {"kT": 0.593, "learnable": True})

    def __init__(self, kT: float = 1.0, learnable: bool = False) -> None:
        super().__init__()
        if not (kT > 0 and math.isfinite(kT)):
            raise ValueError(f"kT must be positive and finite; found {kT}")
        self.learnable = learnable
        self._kT = float(kT)
        if learnable:
            # It has one dimension because fully_shard does not accept parameters of shape ().
            self.log_kT = torch.nn.Parameter(torch.tensor([math.log(kT)]))

    @property
    def kT(self) -> float | Tensor:
        """Thermal energy in the unit of the predictions. If learnable, a tensor of shape ()."""
        return self.log_kT.exp().squeeze(0) if self.learnable else self._kT

    def extra_repr(self) -> str:
        """Return the arguments with the current kT, for ``repr``."""
        kT = self._kT
        # After fully_shard, one process alone cannot read the parameter. Show the initial value.
        if self.learnable and not hasattr(self.log_kT, "device_mesh"):
            kT = self.log_kT.exp().item()
        return f"kT={kT:.6g}, learnable={self.learnable}"

    def combine(self, predictions: Tensor) -> Tensor:
        """Return the population-weighted mean of the predictions, shape (), in their unit."""
        lowest, above, populations = self._populations(predictions)
        return (lowest + (populations * above).sum()).to(predictions.dtype)

    def pose_weights(self, predictions: Tensor) -> Tensor:
        """Return the derivative of the Boltzmann mean with respect to each prediction.

        With p = softmax(-y/kT) and m = Σ p_i y_i: ∂m/∂y_i = p_i (1 + (m - y_i)/kT). The weights sum
        to 1. A pose that is more than kT above the mean has a negative weight. The README has the
        derivation.

        Parameters
        ----------
        predictions : shape (n_poses,), in the unit of ``kT``

        Returns
        -------
        shape (n_poses,), dimensionless, dtype and device of ``predictions``
        """
        _, above, populations = self._populations(predictions)
        mean = (populations * above).sum()
        return (populations * (1 + (mean - above) / self.kT)).to(predictions.dtype)

    def reference(self, predictions: Tensor) -> Tensor:
        """Return Σ_i p_i y_i with p = softmax(-y/kT), shape (), without the shift."""
        return (torch.softmax(-predictions / self.kT, dim=0) * predictions).sum()

    def _populations(self, predictions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the lowest y, each y minus the lowest, and p. All are float32 at least."""
        wide = predictions.to(torch.promote_types(predictions.dtype, torch.float32))
        # Subtract the lowest y first: without this shift, y/kT loses its last digits if |y| is
        # large. A shift of all y shifts the mean equally. So the derivative of the mean does not
        # depend on the shift, and autograd need not differentiate the lowest y.
        lowest = wide.amin().detach()
        above = wide - lowest
        return lowest, above, torch.softmax(-above / self.kT, dim=0)
