"""Smooth maximum and minimum of the pose predictions: a scaled log-sum-exp."""

import math

import torch
from torch import Tensor

from mtenn_core import Combination


class MaxCombination(Combination):
    """Smooth maximum, n/t · ln Σ_i exp(n t y_i) with n = 1, or minimum with n = -1.

    Parameters
    ----------
    negate_preds : True for the minimum (n = -1)
    pred_scale : the sharpness t, positive and finite. Its unit is one over the unit of the
        predictions.
    normalize : subtract n/t · ln M. M equal predictions then give their own value (log-mean-exp).

    Raises
    ------
    ValueError : ``pred_scale`` is not positive and finite
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
        if not (pred_scale > 0 and math.isfinite(pred_scale)):
            raise ValueError(f"pred_scale must be positive and finite; found {pred_scale}")
        self.negate_preds = negate_preds
        self.pred_scale = pred_scale
        self.normalize = normalize

    def combine(self, predictions: Tensor) -> Tensor:
        """Return the smooth extreme of the predictions, shape (), in their unit."""
        extreme, exponents = self._exponents(predictions)
        if self.normalize:
            # If t y is small, logsumexp minus ln M would lose most digits by cancellation.
            log = exponents.expm1().mean().log1p()
        else:
            log = torch.logsumexp(exponents, dim=0)
        return (extreme + log / self._signed_scale).to(predictions.dtype)

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
        _, exponents = self._exponents(predictions)
        return torch.softmax(exponents, dim=0).to(predictions.dtype)

    def reference(self, predictions: Tensor) -> Tensor:
        """Return n/t · ln Σ_i exp(n t y_i) without a shift. If normalized, subtract n/t · ln M."""
        n, t = (-1 if self.negate_preds else 1), self.pred_scale
        log_m = math.log(len(predictions)) if self.normalize else 0.0
        return n / t * (torch.logsumexp(n * t * predictions, dim=0) - log_m)

    @property
    def _signed_scale(self) -> float:
        return -self.pred_scale if self.negate_preds else self.pred_scale

    def _exponents(self, predictions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the extreme y_*, and n t (y_i - y_*), which is at most 0, in float32 at least."""
        wide = predictions.to(torch.promote_types(predictions.dtype, torch.float32))
        # Subtract the extreme first: without this shift, n t y loses its last digits if |y| is
        # large. h does not depend on the shift, so autograd need not differentiate the extreme.
        extreme = (wide.amin() if self.negate_preds else wide.amax()).detach()
        return extreme, self._signed_scale * (wide - extreme)


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
