"""The weights softmax(s/τ) of the poses, with a temperature τ that may be learned."""

import math

import torch
from torch import Tensor

from mtenn_core import Combination

# In units of τ. A pose this far below the highest score has the weight 0: exp(-1000) is 0 in
# float64.
FAR = 1000.0
# The largest number divided by the largest τ. It is above FAR, because exp(ln τ) is rounded.
WIDE = 2000.0


def at_least_float32(predictions: Tensor) -> Tensor:
    """Return the predictions in float32, or unchanged if they are float64."""
    return predictions.to(torch.promote_types(predictions.dtype, torch.float32))


class SoftmaxCombination(Combination):
    """The base of combinations that weight pose i by softmax(s/τ)_i, with a score s_i.

    A ``temperature`` outside 6e-36 to 1.7e35 (in float64, 1.2e-305 to 9e304) counts as the nearer
    end of this range. The derivative with respect to ln τ is 0 there.

    Parameters
    ----------
    temperature : the temperature τ, in the unit of the scores. τ and 1/τ are positive and finite.
    learnable : train ln τ with the rest of the model; training starts at ``temperature``

    Raises
    ------
    ValueError : ``temperature`` or 1/``temperature`` is not positive and finite
    """

    def __init__(self, temperature: float, learnable: bool) -> None:
        super().__init__()
        if not (0 < temperature < math.inf and 1 / temperature < math.inf):
            raise ValueError(
                "temperature and 1/temperature must be positive and finite; found temperature ="
                f" {temperature}"
            )
        self.learnable = learnable
        if learnable:
            # It has one dimension because fully_shard does not accept parameters of shape ().
            self.log_temperature = torch.nn.Parameter(torch.tensor([math.log(temperature)]))
        else:
            self._temperature = float(temperature)

    @property
    def temperature(self) -> float | Tensor:
        """The temperature in the unit of the scores. If learnable, a tensor of shape ()."""
        return self.log_temperature.exp().squeeze(0) if self.learnable else self._temperature

    def _softmax(self, scores: Tensor) -> Tensor:
        """Return softmax(scores/τ), shape (n_poses,), in the dtype of the scores.

        A pose at -inf has the weight 0. If all poses are at -inf, or some are at +inf, these poses
        share the weight equally.
        """
        temperature = self._temperature_within_range(scores.dtype)
        largest = torch.finfo(scores.dtype).max
        # Infinite scores count as the largest numbers, because inf - inf is NaN.
        finite = scores.clamp(-largest, largest)
        # The softmax does not depend on this shift, so autograd need not differentiate the highest.
        below = finite - finite.detach().amax()
        # If scores/τ were infinite, the derivative with respect to ln τ would be 0 * inf.
        factors = (below.clamp(min=-FAR * temperature) / temperature).exp()
        return factors / factors.sum()

    def _temperature_within_range(self, dtype: torch.dtype) -> float | Tensor:
        """Return τ for arithmetic in ``dtype``. FAR * τ and FAR / τ do not overflow."""
        highest = torch.finfo(dtype).max / WIDE
        if not self.learnable:
            return min(max(self._temperature, 1 / highest), highest)
        # Clamp ln τ and not τ: the derivative of a clamped exp(1000) would be 0 * inf.
        bound = math.log(highest)
        return self.log_temperature.to(dtype).clamp(-bound, bound).exp().squeeze(0)
