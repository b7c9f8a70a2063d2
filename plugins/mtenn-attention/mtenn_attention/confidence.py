"""The mean of the pose affinities, weighted by the confidences in the poses."""

import torch
from torch import Tensor

from mtenn_attention.softmax import SoftmaxCombination, at_least_float32


class ConfidenceWeightedCombination(SoftmaxCombination):
    """Mean of the affinities weighted by confidences, Σ_i p_i y_i with p = softmax(c/τ).

    The pose model predicts two numbers for each pose: its affinity y_i and its confidence c_i, in
    this order. arXiv 2311.12814 weights pose affinities by pose confidences in this way.

    A pose with the confidence -inf, or so far below the highest that c/τ overflows, has the weight
    0, whatever its affinity is. The others are combined as if it were absent. If all confidences
    are -inf, or some are +inf, these poses share the weight equally.

    Parameters
    ----------
    temperature : the temperature τ, in the unit of the confidences. τ and 1/τ are positive and
        finite.
    learnable : train ln τ with the rest of the model; training starts at ``temperature``

    Raises
    ------
    ValueError : ``temperature`` or 1/``temperature`` is not positive and finite
    """

    pose_columns = ("affinity", "confidence")
    properties = frozenset({"permutation_invariant", "replication_invariant"})
    examples = ({}, {"temperature": 0.5, "learnable": True})

    def __init__(self, temperature: float = 1.0, learnable: bool = False) -> None:
        super().__init__(temperature, learnable)

    def combine(self, predictions: Tensor) -> Tensor:
        """Return the weighted mean of the affinities, shape (), in their unit.

        Parameters
        ----------
        predictions : affinity and confidence of each pose, shape (n_poses, 2)
        """
        weights, differences, centre = self._weights_and_differences(predictions)
        return (centre + (weights * differences).sum()).to(predictions.dtype)

    def pose_weights(self, predictions: Tensor) -> Tensor:
        """Return the derivative of the weighted mean with respect to each affinity and confidence.

        With p = softmax(c/τ) and h = Σ p_i y_i: ∂h/∂y_i = p_i and ∂h/∂c_i = p_i (y_i - h)/τ. The
        first sum to 1 and the second to 0. The README has the derivation.

        Parameters
        ----------
        predictions : affinity and confidence of each pose, shape (n_poses, 2)

        Returns
        -------
        shape, dtype and device of ``predictions``
        """
        weights, differences, _ = self._weights_and_differences(predictions)
        mean = (weights * differences).sum()
        temperature = self._temperature_within_range(weights.dtype)
        of_confidences = weights * (differences - mean) / temperature
        return torch.stack([weights, of_confidences], dim=1).to(predictions.dtype)

    def reference(self, predictions: Tensor) -> Tensor:
        """Return Σ_i p_i y_i with p = softmax(c/τ), shape (), without a shift."""
        affinities, confidences = predictions.unbind(1)
        return (torch.softmax(confidences / self.temperature, dim=0) * affinities).sum()

    def _weights_and_differences(self, predictions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return p, each y minus a centre, and the centre. All are float32 at least.

        The difference is 0 for a pose with p = 0, so that p y is not 0 * inf.
        """
        affinities, confidences = at_least_float32(predictions).unbind(1)
        weights = self._softmax(confidences)
        absent = (weights == 0) & ~affinities.isnan()
        # Without the shift, y_i - h would lose its last digits if |y| is large. The mean of y minus
        # a constant is the mean minus the constant, so autograd need not differentiate the centre.
        centre = (weights * affinities.masked_fill(absent, 0)).sum().detach()
        centre = torch.where(centre.isfinite(), centre, 0)
        differences = (affinities - centre).masked_fill(absent, 0)
        return weights, differences, centre
