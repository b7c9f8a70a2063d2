"""Mean of the pose predictions."""

import torch
from torch import Tensor

from mtenn_core import Combination


class MeanCombination(Combination):
    """The mean, Σ_i y_i / M. Every pose has the same weight."""

    properties = frozenset(
        {
            "permutation_invariant",
            "translation_equivariant",
            "bounded",
            "monotone",
            "idempotent",
            "replication_invariant",
        }
    )

    def combine(self, predictions: Tensor) -> Tensor:
        """Return the mean of the predictions, shape (), in their unit."""
        mean = predictions.mean()
        # The sum of large predictions overflows, though their mean does not. Dividing first avoids
        # this, but rounds every term. torch.export would take len(predictions) for a constant.
        n_poses = predictions.shape[0]
        return torch.where(mean.isfinite(), mean, (predictions / n_poses).sum())

    def pose_weights(self, predictions: Tensor) -> Tensor:
        """Return the derivative of the mean, ∂m/∂y_i = 1/M.

        Parameters
        ----------
        predictions : shape (n_poses,)

        Returns
        -------
        shape (n_poses,), dimensionless, dtype and device of ``predictions``
        """
        return torch.full_like(predictions, 1 / len(predictions))

    def reference(self, predictions: Tensor) -> Tensor:
        """Return the sum divided by the number of poses, shape ()."""
        return predictions.sum() / len(predictions)
