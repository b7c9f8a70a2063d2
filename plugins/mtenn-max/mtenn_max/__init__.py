"""Smooth maximum and minimum of the pose predictions: a scaled log-sum-exp."""

import math
import re
from typing import Any

import torch
from torch import Tensor

from mtenn_core import Combination

# In units of 1/t. A pose this far from the extreme has the weight 0: exp(-1000) is 0 in float64.
FAR = 1000.0
# The highest exponent minus their mean, up to which a learned scale uses the formula about the mean
NEAR = 4.0
# Below this size, exp(x) - 1 - x is a series. Eight terms after the first are enough for float64.
SMALL = 1 / 16


class MaxCombination(Combination):
    """Smooth maximum, n/t · ln Σ_i exp(n t y_i) with n = 1, or minimum with n = -1.

    In the maximum, a pose at -inf has the weight 0. If all poses are at -inf, or some are at +inf,
    the value is this infinity, and these poses share the weight equally. The minimum is the mirror
    image: there a pose at +inf has the weight 0.

    The arithmetic is in float32 or float64. A ``pred_scale`` outside 3e-36 to 3e35 (in float64,
    6e-306 to 2e305) counts as the nearer end of this range, and the derivative with respect to
    ln t is 0 there.

    Parameters
    ----------
    negate_preds : True for the minimum (n = -1)
    pred_scale : the sharpness t. Its unit is one over the unit of the predictions. t and 1/t are
        positive and finite.
    normalize : subtract n/t · ln M. M equal predictions then give their own value (log-mean-exp).
    learnable : train ln t with the rest of the model; training starts at ``pred_scale``

    Raises
    ------
    ValueError : ``pred_scale`` or its inverse is not positive and finite, or another argument is
        not True or False
    """

    properties = frozenset({"permutation_invariant", "translation_equivariant", "monotone"})
    examples = (
        {},
        {"pred_scale": 10.0, "normalize": True},
        {"negate_preds": True, "pred_scale": 10.0, "normalize": True},
        {"pred_scale": 0.5, "learnable": True},
    )

    def __init__(
        self,
        negate_preds: bool = False,
        pred_scale: float = 1.0,
        normalize: bool = False,
        learnable: bool = False,
    ) -> None:
        super().__init__()
        scale = _positive("pred_scale", pred_scale)
        self.negate_preds = _flag("negate_preds", negate_preds)
        self.normalize = _flag("normalize", normalize)
        self.learnable = _flag("learnable", learnable)
        if learnable:
            # It has one dimension because fully_shard does not accept parameters of shape ().
            self.log_pred_scale = torch.nn.Parameter(torch.tensor([math.log(scale)]))
        else:
            self._pred_scale = scale

    @property
    def pred_scale(self) -> float | Tensor:
        """The sharpness t. If learnable, a tensor of shape ()."""
        return self.log_pred_scale.exp().squeeze(0) if self.learnable else self._pred_scale

    def extra_repr(self) -> str:
        """Return the arguments with the current pred_scale, for ``repr``."""
        arguments = super().extra_repr()
        # After fully_shard, one process alone cannot read the parameter. Show the initial value.
        if not self.learnable or hasattr(self.log_pred_scale, "device_mesh"):
            return arguments
        now = f"pred_scale={self.log_pred_scale.exp().item():.6g}"
        return re.sub("pred_scale=[^,]*", now, arguments)

    def combine(self, predictions: Tensor) -> Tensor:
        """Return the smooth extreme of the predictions, shape (), in their unit."""
        extreme, exponents, scale, growth = self._exponents(predictions)
        if not self.normalize:
            log = torch.logsumexp(growth * exponents, dim=0) / growth
        elif isinstance(growth, Tensor):
            log = scaled_log_mean_exp(exponents, growth)
        else:
            log = log_mean_exp(exponents)
        # h does not depend on the shift by the extreme, so autograd need not differentiate it. An
        # infinite extreme is the exception. There, nan_to_num has the derivative 0, but amax shares
        # the derivative 1 equally among ties.
        value = torch.where(extreme.isinf(), extreme, extreme.detach() + log / scale)
        return value.to(predictions.dtype)

    def pose_weights(self, predictions: Tensor) -> Tensor:
        """Return the derivative, ∂h/∂y_i = exp(n t y_i) / Σ_j exp(n t y_j) = softmax(n t y)_i.

        The weights sum to 1, and ``normalize`` does not change them. The README of the plugin has
        the derivation.

        Parameters
        ----------
        predictions : shape (n_poses,)

        Returns
        -------
        shape (n_poses,), dimensionless, dtype and device of ``predictions``
        """
        _, exponents, _, growth = self._exponents(predictions)
        # torch.softmax loses three digits in float32 for 10 million poses.
        factors = (growth * exponents).exp()
        return (factors / factors.sum()).to(predictions.dtype)

    def reference(self, predictions: Tensor) -> Tensor:
        """Return n/t · ln Σ_i exp(n t y_i) without a shift. If normalized, subtract n/t · ln M."""
        n, t = (-1 if self.negate_preds else 1), self.pred_scale
        log_m = math.log(len(predictions)) if self.normalize else 0.0
        return n / t * (torch.logsumexp(n * t * predictions, dim=0) - log_m)

    def _exponents(
        self, predictions: Tensor
    ) -> tuple[Tensor, Tensor, float | Tensor, float | Tensor]:
        """Return the extreme y_*, each n t (y_i - y_*), n t, and the growth of t.

        The growth is 1. If t is learned, the growth is t over its present value. Only the growth
        depends on the parameter for autograd. Its derivatives are in units of 1/t. They do not
        overflow for any t. All are float32 at least. An exponent below -1000 is returned as -1000.
        """
        wide = predictions.to(torch.promote_types(predictions.dtype, torch.float32))
        extreme = wide.amin() if self.negate_preds else wide.amax()
        # Subtract the extreme first: without this shift, n t y loses its last digits if |y| is
        # large. Infinite y count as the largest numbers, because inf - inf is NaN.
        difference = wide.nan_to_num(nan=math.nan) - extreme.detach().nan_to_num(nan=math.nan)
        scale, growth = self._scale_and_growth(wide.dtype)
        # Times the derivative 0, an infinite exponent would be NaN in the derivative of the growth.
        return extreme, (scale * difference).clamp(min=-FAR), scale, growth

    def _scale_and_growth(self, dtype: torch.dtype) -> tuple[float | Tensor, float | Tensor]:
        """Return n t for arithmetic in ``dtype``, and the growth. FAR / t does not overflow."""
        highest = torch.finfo(dtype).max / FAR
        n = -1.0 if self.negate_preds else 1.0
        if not self.learnable:
            return n * min(max(self._pred_scale, 1 / highest), highest), 1.0
        # Clamp ln t and not t: the derivative of a clamped exp(1000) would be 0 * inf.
        bound = math.log(highest)
        log_scale = self.log_pred_scale.to(dtype).clamp(-bound, bound).squeeze(0)
        now = log_scale.detach()
        return n * now.exp(), (log_scale - now).exp()


def scaled_log_mean_exp(exponents: Tensor, growth: Tensor) -> Tensor:
    """Return 1/u · ln a with a = Σ_i exp(u x_i) / M and the growth u = 1, shape ().

    The derivative with respect to ln u is Σ_i p_i x_i - ln a. For small x, both terms are close to
    the mean of x, and autograd of :func:`log_mean_exp` would give the rounding error of this mean.
    About the mean c of x, with z = x - c and ψ(z) = exp(z) - 1 - z, the value is
    c + 1/u · ln(1 + mean ψ(u z)), and the derivative is the variance of x minus half of it.

    Where the highest z is above 4, the derivative is large enough for :func:`log_mean_exp`.
    """
    center = exponents.mean()
    beyond = exponents - center
    # Where the result is not used, exp could overflow.
    near = beyond.masked_fill(beyond > NEAR, 0)
    logs = exp_beyond_line(growth * near).mean().log1p()
    about_extreme = log_mean_exp(growth * exponents) / growth
    return torch.where(beyond.amax() <= NEAR, center + logs / growth, about_extreme)


def exp_beyond_line(x: Tensor) -> Tensor:
    """Return exp(x) - 1 - x. The relative error, also of the derivative, is a few eps for small x.

    The series is x²/2 (1 + x/3 (1 + x/4 (1 + …))).
    """
    small = x.masked_fill(x.abs() >= SMALL, 0)
    series = torch.ones_like(x)
    for k in range(10, 2, -1):
        series = 1 + small / k * series
    return torch.where(x.abs() < SMALL, small.square() / 2 * series, x.expm1() - x)


def log_mean_exp(exponents: Tensor) -> Tensor:
    """Return ln a with a = Σ_i exp(x_i) / M, shape (), where the highest x_i is 0.

    The relative error is a few eps. The mean of exp(x_i) is right to a few eps a, which is enough
    for a < 1/2, where |ln a| > 0.69. The mean of exp(x_i) - 1 is right to a few eps (1 - a), which
    is enough for a ≥ 1/2. The rounding of x_i adds eps Σ_i p_i |x_i|, with p = softmax(x). That is
    at most eps |ln a|, because ln a = Σ_i p_i x_i - (ln M - entropy of p), and no entropy is above
    ln M.
    """
    below_one = exponents.expm1().mean()
    # Where the result is not used, the mean may round to -1. There, the derivative of log1p is
    # infinite, and infinity times the zero that torch.where sends back is NaN.
    far = below_one < -0.5
    near_one = below_one.masked_fill(far, 0).log1p()
    return torch.where(far, exponents.exp().mean().log(), near_one)


class MinCombination(MaxCombination):
    """Smooth minimum, -1/t · ln Σ_i exp(-t y_i).

    It is :class:`MaxCombination` with ``negate_preds``. With ``pred_scale`` 1/kT and ``normalize``,
    it is the free-energy average of the poses.

    Parameters
    ----------
    pred_scale, normalize, learnable : see :class:`MaxCombination`
    """

    examples = (
        {},
        {"pred_scale": 1000.0},
        {"pred_scale": 10.0, "normalize": True},
        {"pred_scale": 2.0, "normalize": True, "learnable": True},
    )

    def __init__(
        self, pred_scale: float = 1.0, normalize: bool = False, learnable: bool = False
    ) -> None:
        super().__init__(
            negate_preds=True, pred_scale=pred_scale, normalize=normalize, learnable=learnable
        )

    def reference(self, predictions: Tensor) -> Tensor:
        """Return -1/t · ln Σ_i exp(-t y_i) without a shift. If normalized, add 1/t · ln M."""
        # This formula does not use the base class: if the sign were wrong there, the base class's
        # reference would agree with the wrong value.
        t = self.pred_scale
        log_m = math.log(len(predictions)) if self.normalize else 0.0
        return (log_m - torch.logsumexp(-t * predictions, dim=0)) / t


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
