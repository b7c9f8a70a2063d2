"""Boltzmann-weighted mean of the pose predictions."""

import math
from typing import Any

import torch
from torch import Tensor

from mtenn_core import Combination

# In units of kT. A pose this far above the lowest has the population 0: exp(-1000) is 0 in float64.
FAR = 1000.0
# The largest number divided by the largest kT. It is above FAR, because exp(ln kT) is rounded.
WIDE = 2000.0


class BoltzmannCombination(Combination):
    """Population-weighted mean, Σ_i p_i y_i with p = softmax(-y/kT).

    A pose at +inf, or so far above the others that -y/kT overflows, has the population 0 and the
    weight 0. The others are combined as if it were absent. If all poses are at +inf, or some are at
    -inf, the value is this infinity, and these poses share the weight equally.

    The arithmetic is in float32 or float64. A ``kT`` outside 6e-36 to 1.7e35 (in float64, 1.2e-305
    to 9e304) counts as the nearer end of this range. The value there is the minimum or the mean,
    and the derivative with respect to ln kT is 0.

    Parameters
    ----------
    kT : thermal energy in the unit of the predictions (0.593 kcal/mol at 298 K). kT and 1/kT are
        positive and finite.
    learnable : train ln kT with the rest of the model; training starts at ``kT``

    Raises
    ------
    ValueError : ``kT`` or 1/kT is not positive and finite, or ``learnable`` is not True or False
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
        number = _positive("kT", kT)
        self.learnable = _flag("learnable", learnable)
        if learnable:
            # It has one dimension because fully_shard does not accept parameters of shape ().
            self.log_kT = torch.nn.Parameter(torch.tensor([math.log(number)]))
        else:
            self._kT = number

    @property
    def kT(self) -> float | Tensor:
        """Thermal energy in the unit of the predictions. If learnable, a tensor of shape ()."""
        return self.log_kT.exp().squeeze(0) if self.learnable else self._kT

    def extra_repr(self) -> str:
        """Return the arguments with the current kT, for ``repr``."""
        # After fully_shard, one process alone cannot read the parameter. Show the initial value.
        if self.learnable and hasattr(self.log_kT, "device_mesh"):
            return super().extra_repr()
        kT = self.kT.item() if isinstance(self.kT, Tensor) else self.kT
        return f"kT={kT:.6g}, learnable={self.learnable}"

    def combine(self, predictions: Tensor) -> Tensor:
        """Return the population-weighted mean of the predictions, shape (), in their unit."""
        lowest, above, populations, _ = self._populations(predictions)
        return (lowest + (populations * above).sum()).to(predictions.dtype)

    def pose_weights(self, predictions: Tensor) -> Tensor:
        """Return the derivative of the Boltzmann mean with respect to each prediction.

        With p = softmax(-y/kT) and m = Σ p_i y_i: ∂m/∂y_i = p_i (1 + (m - y_i)/kT). The weights sum
        to 1. A pose that is more than kT above the mean has a negative weight. The README of
        the plugin has the derivation.

        Parameters
        ----------
        predictions : shape (n_poses,), in the unit of ``kT``

        Returns
        -------
        shape (n_poses,), dimensionless, dtype and device of ``predictions``
        """
        _, above, populations, kT = self._populations(predictions)
        mean = (populations * above).sum()
        return (populations * (1 + (mean - above) / kT)).to(predictions.dtype)

    def reference(self, predictions: Tensor) -> Tensor:
        """Return Σ_i p_i y_i with p = softmax(-y/kT), shape (), without the shift."""
        return (torch.softmax(-predictions / self.kT, dim=0) * predictions).sum()

    def _populations(self, predictions: Tensor) -> tuple[Tensor, Tensor, Tensor, float | Tensor]:
        """Return the lowest y, each y minus the lowest, p, and kT. All are float32 at least.

        A y that is more than 1000 kT above the lowest is returned as 1000 kT. There p is 0.
        """
        wide = predictions.to(torch.promote_types(predictions.dtype, torch.float32))
        kT = self._kT_within_range(wide.dtype)
        lowest = wide.amin()
        # Subtract the lowest y first: without this shift, y/kT loses its last digits if |y| is
        # large. A shift of all y shifts the mean equally. So the derivative of the mean does not
        # depend on the shift, and autograd need not differentiate the lowest y.
        # Infinite y count as the largest numbers, because inf - inf is NaN.
        above = wide.nan_to_num(nan=math.nan) - lowest.detach().nan_to_num(nan=math.nan)
        # If y or y/kT were infinite, p y would be 0 * inf, which is NaN.
        above = above.clamp(max=FAR * kT)
        # An infinite lowest y is the exception. There, nan_to_num has the derivative 0, but
        # amin shares the derivative 1 equally among ties.
        lowest = torch.where(lowest.isinf(), lowest, lowest.detach())
        # torch.softmax loses three digits in float32 for 10 million poses.
        factors = (-above / kT).exp()
        return lowest, above, factors / factors.sum(), kT

    def _kT_within_range(self, dtype: torch.dtype) -> float | Tensor:
        """Return kT for arithmetic in ``dtype``. FAR * kT and FAR / kT do not overflow."""
        highest = torch.finfo(dtype).max / WIDE
        if not self.learnable:
            return min(max(self._kT, 1 / highest), highest)
        # Clamp ln kT and not kT: the derivative of a clamped exp(1000) would be 0 * inf.
        bound = math.log(highest)
        return self.log_kT.to(dtype).clamp(-bound, bound).exp().squeeze(0)


def _positive(name: str, value: Any) -> float:
    """Return an argument as a float. Raise a ValueError if it, or 1 over it, is not positive."""
    number = _number(value)
    if not (0 < number < math.inf and 1 / number < math.inf):
        raise ValueError(
            f"{name} and 1/{name} must be positive and finite; found {name} = {value!r}"
        )
    return number


def _flag(name: str, value: Any) -> bool:
    """Return an argument. Raise a ValueError if it is not True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False; found {name} = {value!r}")
    return value


def _number(value: Any) -> float:
    """Return an argument as a float. Return NaN, which is in no range, if it is not a number."""
    if isinstance(value, bool | str):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # torch's are RuntimeErrors
        return math.nan
