"""Smooth maximum and minimum of the pose predictions: a scaled log-sum-exp."""

import math

import torch
from torch import Tensor

from mtenn_core import Combination

# In units of 1/t. A pose this far from the extreme has the weight 0: exp(-1000) is 0 in float64.
FAR = 1000.0


class MaxCombination(Combination):
    """Smooth maximum, n/t · ln Σ_i exp(n t y_i) with n = 1, or minimum with n = -1.

    In the maximum, a pose at -inf has the weight 0. If all poses are at -inf, or some are at +inf,
    the value is this infinity, and these poses share the weight equally. The minimum is the mirror
    image: there a pose at +inf has the weight 0.

    The arithmetic is in float32 or float64. A ``pred_scale`` outside 3e-36 to 3e35 (in float64,
    6e-306 to 2e305) counts as the nearer end of this range.

    Parameters
    ----------
    negate_preds : True for the minimum (n = -1)
    pred_scale : the sharpness t. Its unit is one over the unit of the predictions. t and 1/t are
        positive and finite.
    normalize : subtract n/t · ln M. M equal predictions then give their own value (log-mean-exp).

    Raises
    ------
    ValueError : ``pred_scale`` or its inverse is not positive and finite
    """

    properties = frozenset({"permutation_invariant", "translation_equivariant", "monotone"})
    examples = (
        {},
        {"pred_scale": 10.0, "normalize": True},
        {"negate_preds": True, "pred_scale": 10.0, "normalize": True},
    )

    def __init__(
        self, negate_preds: bool = False, pred_scale: float = 1.0, normalize: bool = False
    ) -> None:
        super().__init__()
        if not (0 < pred_scale < math.inf and 1 / pred_scale < math.inf):
            raise ValueError(
                "pred_scale and 1/pred_scale must be positive and finite; found pred_scale ="
                f" {pred_scale}"
            )
        self.negate_preds = negate_preds
        self.pred_scale = pred_scale
        self.normalize = normalize

    def combine(self, predictions: Tensor) -> Tensor:
        """Return the smooth extreme of the predictions, shape (), in their unit."""
        extreme, exponents, scale = self._exponents(predictions)
        log = log_mean_exp(exponents) if self.normalize else torch.logsumexp(exponents, dim=0)
        return (extreme + log / scale).to(predictions.dtype)

    def pose_weights(self, predictions: Tensor) -> Tensor:
        """Return the derivative, ∂h/∂y_i = exp(n t y_i) / Σ_j exp(n t y_j) = softmax(n t y)_i.

        The weights sum to 1, and ``normalize`` does not change them. The README has the derivation.

        Parameters
        ----------
        predictions : shape (n_poses,)

        Returns
        -------
        shape (n_poses,), dimensionless, dtype and device of ``predictions``
        """
        _, exponents, _ = self._exponents(predictions)
        # torch.softmax loses three digits in float32 for 10 million poses.
        factors = exponents.exp()
        return (factors / factors.sum()).to(predictions.dtype)

    def reference(self, predictions: Tensor) -> Tensor:
        """Return n/t · ln Σ_i exp(n t y_i) without a shift. If normalized, subtract n/t · ln M."""
        n, t = (-1 if self.negate_preds else 1), self.pred_scale
        log_m = math.log(len(predictions)) if self.normalize else 0.0
        return n / t * (torch.logsumexp(n * t * predictions, dim=0) - log_m)

    def _exponents(self, predictions: Tensor) -> tuple[Tensor, Tensor, float]:
        """Return the extreme y_*, each n t (y_i - y_*), and n t. All are float32 at least."""
        wide = predictions.to(torch.promote_types(predictions.dtype, torch.float32))
        largest = torch.finfo(wide.dtype).max
        extreme = wide.amin() if self.negate_preds else wide.amax()
        # Subtract the extreme first: without this shift, n t y loses its last digits if |y| is
        # large. h does not depend on the shift, so autograd need not differentiate the extreme.
        # Infinite y count as the largest numbers, because inf - inf is NaN.
        difference = wide.clamp(-largest, largest) - extreme.detach().clamp(-largest, largest)
        # An infinite extreme is the exception. clamp has no derivative there. amax has one, and
        # shares it equally among ties.
        extreme = torch.where(extreme.isinf(), extreme, extreme.detach())
        scale = self._signed_scale(wide.dtype)
        return extreme, scale * difference, scale

    def _signed_scale(self, dtype: torch.dtype) -> float:
        """Return n t for arithmetic in ``dtype``. FAR * t and FAR / t do not overflow."""
        highest = torch.finfo(dtype).max / FAR
        scale = min(max(self.pred_scale, 1 / highest), highest)
        return -scale if self.negate_preds else scale


def log_mean_exp(exponents: Tensor) -> Tensor:
    """Return ln a with a = Σ_i exp(x_i) / M, shape (), where the highest x_i is 0.

    The relative error is a few eps. The mean of exp(x_i) is right to a few eps a, which is enough
    for a < 1/2, where |ln a| > 0.69. The mean of exp(x_i) - 1 is right to a few eps (1 - a), which
    is enough for a ≥ 1/2. The rounding of x_i adds eps Σ_i p_i |x_i|, with p = softmax(x). That is
    at most eps |ln a|, because ln a = Σ_i p_i x_i - (ln M - entropy of p), and no entropy is above
    ln M.
    """
    below_one = exponents.expm1().mean()
    # The clamp acts where the result is not used. The mean may round to -1, where log1p has an
    # infinite derivative. Times the zero that torch.where sends back, that would be NaN.
    near_one = below_one.clamp(min=-0.5).log1p()
    return torch.where(below_one < -0.5, exponents.exp().mean().log(), near_one)


class MinCombination(MaxCombination):
    """Smooth minimum, -1/t · ln Σ_i exp(-t y_i).

    It is :class:`MaxCombination` with ``negate_preds``. With ``pred_scale`` 1/kT and ``normalize``,
    it is the free-energy average of the poses.

    Parameters
    ----------
    pred_scale, normalize : see :class:`MaxCombination`
    """

    examples = ({}, {"pred_scale": 1000.0}, {"pred_scale": 10.0, "normalize": True})

    def __init__(self, pred_scale: float = 1.0, normalize: bool = False) -> None:
        super().__init__(negate_preds=True, pred_scale=pred_scale, normalize=normalize)

    def reference(self, predictions: Tensor) -> Tensor:
        """Return -1/t · ln Σ_i exp(-t y_i) without a shift. If normalized, add 1/t · ln M."""
        # This formula does not use the base class: if the sign were wrong there, the base class's
        # reference would agree with the wrong value.
        t = self.pred_scale
        log_m = math.log(len(predictions)) if self.normalize else 0.0
        return (log_m - torch.logsumexp(-t * predictions, dim=0)) / t
