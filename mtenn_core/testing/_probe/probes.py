"""Numbers to probe a combination with: poses, steps and training steps."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mtenn_core.combination import Combination
from mtenn_core.testing._probe.poses import Poses
from mtenn_core.testing._probe.training_step import Step, default_shapes

# Predictions and steps are multiples of 2**-33 and below 2**14, so that y ± h is exact in float64.
GRID = 2.0**33
LARGEST_STEP = 2.0**-3
# A wider domain is probed as if it had no end on the other side.
WIDE = 1e3


class Probes:
    """Random numbers within the declared facts of a combination.

    Parameters
    ----------
    combination : its ``min_poses``, ``domain``, ``smooth`` and ``pose_inputs`` count
    seed : of the random numbers
    """

    def __init__(self, combination: Combination, seed: int) -> None:
        self.combination = combination
        self._generator = torch.Generator().manual_seed(seed)

    def n_poses(self, n_poses: int) -> int:
        """Return ``n_poses``, or the fewest that the combination takes."""
        return max(n_poses, self.combination.min_poses)

    def randn(self, *shape: int) -> Tensor:
        """Return normal random numbers, float64."""
        return torch.randn(shape, dtype=torch.float64, generator=self._generator)

    def permutation(self, n: int) -> list[int]:
        """Return 0 … n - 1 in random order."""
        return torch.randperm(n, generator=self._generator).tolist()

    def poses(self, n_poses: int, base: float = 0.0, spread: float = 1.0) -> Poses:
        """Return poses to probe with: :meth:`predictions`, and pose inputs of the same spread.

        At a sharp scale, inputs that are far apart would make all weights 0 or 1.

        Parameters
        ----------
        n_poses : raised to the fewest that the combination takes
        base, spread : see :meth:`predictions`
        """
        n_poses = self.n_poses(n_poses)
        predictions = self.predictions(n_poses, base, spread)
        names = self.combination.pose_inputs
        return Poses(predictions, {name: (spread or 1.0) * self.randn(n_poses) for name in names})

    def predictions(self, n_poses: int, base: float = 0.0, spread: float = 1.0) -> Tensor:
        """Return probe predictions within ``spread`` of ``base``, moved into the declared domain.

        Returns
        -------
        shape (n_poses,), float64; none near another if the combination is not ``smooth``
        """
        unit = torch.rand(n_poses, dtype=torch.float64, generator=self._generator)
        if not self.combination.smooth:
            unit = (torch.tensor(self.permutation(n_poses)) + 0.25 + 0.5 * unit) / n_poses
        low, high = self.combination.domain
        if high - low <= WIDE:
            base, spread = (low + high) / 2, min(spread, 1.0) * 0.4 * (high - low)
        elif base - 1.5 * spread <= low:
            base = low + abs(base) + 1.5 * spread
        elif base + 1.5 * spread >= high:
            base = high - abs(base) - 1.5 * spread
        return torch.round((base + spread * (2 * unit - 1)) * GRID) / GRID

    def first_step(self, predictions: Tensor) -> float:
        """Return a step, a power of two, that keeps to the domain and to the order of the poses."""
        low, high = self.combination.domain
        room = min(float((predictions - low).min()), float((high - predictions).min())) / 2
        if not self.combination.smooth and len(predictions) > 1:
            room = min(room, float(predictions.sort().values.diff().min()) / 8)
        return min(LARGEST_STEP, 2.0 ** math.floor(math.log2(room)) if room < 1 else 1.0)

    def step(
        self,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        n_poses: int = 3,
        spread: float = 1.0,
    ) -> Step:
        """Return random arguments for ``forward``.

        Parameters
        ----------
        shapes : of the parameters, by name; the default is :func:`default_shapes`
        spread : of the predictions; at a sharp scale, weights are 0 or 1 unless it is small
        """
        n_poses = self.n_poses(n_poses)
        shapes = shapes or default_shapes(n_poses)
        gradients = {name: self.randn(n_poses, *shape) for name, shape in shapes.items()}
        for i, gradient in enumerate(gradients.values()):
            gradient *= (1, 1e-3, 1e2)[i % 3]  # a clamp or a threshold shows at some sizes alone
        params = {name: self.randn(*shape).requires_grad_() for name, shape in shapes.items()}
        return Step(self.poses(n_poses, 0.0, spread), gradients, params)
