"""Smooth maximum and minimum of the pose predictions, by a scaled log-sum-exp."""

import math

import torch
from torch import Tensor

from mtenn_core import Combination


class MaxCombination(Combination):
    """Smooth maximum, n/t · ln Σ_i exp(n t y_i) with n = 1, or minimum with n = -1.

    Parameters
    ----------
    negate_preds : take the minimum
    pred_scale : t, sharpness, in one over the unit of the predictions; positive and finite
    normalize : subtract n/t · ln M, so that M equal poses give their own value (log-mean-exp)

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
            # Where t y is small, logsumexp minus ln M would cancel most digits.
            log = exponents.expm1().mean().log1p()
        else:
            log = torch.logsumexp(exponents, dim=0)
        return (extreme + log / self._signed_scale).to(predictions.dtype)

    def pose_weights(self, predictions: Tensor) -> Tensor:
        """Return the derivative, ∂h/∂y_i = exp(n t y_i) / Σ_j exp(n t y_j) = softmax(n t y)_i.

        Derived in the README. The weights sum to 1; ``normalize`` does not change them.

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
        """Return n/t · ln Σ_i exp(n t y_i), minus n/t · ln M if normalized, without the shift."""
        n, t = (-1 if self.negate_preds else 1), self.pred_scale
        log_m = math.log(len(predictions)) if self.normalize else 0.0
        return n / t * (torch.logsumexp(n * t * predictions, dim=0) - log_m)

    @property
    def _signed_scale(self) -> float:
        return -self.pred_scale if self.negate_preds else self.pred_scale

    def _exponents(self, predictions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the extreme y_*, and n t (y_i - y_*), all at most 0; in float32 at least."""
        wide = predictions.to(torch.promote_types(predictions.dtype, torch.float32))
        # Shift by the extreme first: without it, n t y loses its last digits where |y| is large. h
        # does not depend on the shift, so autograd need not differentiate it.
        extreme = (wide.amin() if self.negate_preds else wide.amax()).detach()
        return extreme, self._signed_scale * (wide - extreme)


class MinCombination(MaxCombination):
    """Smooth minimum, -1/t · ln Σ_i exp(-t y_i): :class:`MaxCombination` with ``negate_preds``.

    With ``pred_scale`` 1/kT and ``normalize`` it is the free-energy average of the poses.

    Parameters
    ----------
    pred_scale, normalize : see :class:`MaxCombination`
    """

    examples = ({}, {"pred_scale": 1000.0}, {"pred_scale": 10.0, "normalize": True})

    def __init__(self, pred_scale: float = 1.0, normalize: bool = False) -> None:
        super().__init__(negate_preds=True, pred_scale=pred_scale, normalize=normalize)

    def reference(self, predictions: Tensor) -> Tensor:
        """Return -1/t · ln Σ_i exp(-t y_i), plus 1/t · ln M if normalized, without the shift."""
        # Independent of the base class, whose reference would also agree with a maximum.
        t = self.pred_scale
        log_m = math.log(len(predictions)) if self.normalize else 0.0
        return (log_m - torch.logsumexp(-t * predictions, dim=0)) / t
