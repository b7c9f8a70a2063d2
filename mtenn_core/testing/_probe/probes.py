"""Random numbers for the checks: predictions, pose inputs, finite-difference steps, gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor

from mtenn_core._engine.columns import Columns, columns_of
from mtenn_core._engine.declarations import declared_kinds
from mtenn_core.combination import Combination
from mtenn_core.testing._probe.labels import Labels, random_labels, random_positive
from mtenn_core.testing._probe.poses import Poses
from mtenn_core.testing._probe.training_step import Step, default_shapes

# Predictions and steps are multiples of 2**-33 and below 2**14, so that y ± h is exact in float64.
GRID = 2.0**33
LARGEST_STEP = 2.0**-3
# For ``pose_columns = "any"``. Equal numbers of poses and columns would hide a transposed matrix.
N_COLUMNS = 2
# If a domain is wider than this, probes stay away from only one of its ends.
WIDE = 1e3


class Probes:
    """Random arguments that are valid for a combination.

    Parameters
    ----------
    combination : declares ``min_poses``, ``domain``, ``smooth`` and ``pose_inputs``
    seed : seed of the random numbers
    find_labels : returns the pose inputs that are labels; the others are random numbers of their
        declared kind. It is called when pose inputs are needed for the first time
    n_columns : the number of columns, if the combination takes any number

    Attributes
    ----------
    columns : the columns of the predictions; None if each pose has one number
    """

    def __init__(
        self,
        combination: Combination,
        seed: int,
        find_labels: Callable[[], Labels] = dict,
        n_columns: int = N_COLUMNS,
    ) -> None:
        self.combination, self.n_columns = combination, n_columns
        declared = combination.pose_columns
        columns = None if declared is None else columns_of(declared)
        self.columns = columns and Columns(columns.number or n_columns, columns.names)
        self.labels = cache(find_labels)
        self._generator = torch.Generator().manual_seed(seed)

    def n_poses(self, n_poses: int) -> int:
        """Return the larger of ``n_poses`` and the combination's ``min_poses``."""
        return max(n_poses, self.combination.min_poses)

    def randn(self, *shape: int) -> Tensor:
        """Return normally distributed random numbers in float64."""
        return torch.randn(shape, dtype=torch.float64, generator=self._generator)

    def permutation(self, n: int) -> list[int]:
        """Return the numbers 0 … n - 1 in random order."""
        return torch.randperm(n, generator=self._generator).tolist()

    def poses(self, n_poses: int, base: float = 0.0, spread: float = 1.0) -> Poses:
        """Return poses with random :meth:`predictions`, and with pose inputs of the same spread.

        If the combination is sharp, pose inputs with a large spread would make all weights 0 or 1.
        Labels are small integers, and positive inputs stay above 0.

        Parameters
        ----------
        n_poses : number of poses; at least ``min_poses`` are returned
        base, spread : see :meth:`predictions`
        """
        n_poses = self.n_poses(n_poses)
        predictions = self.predictions(n_poses, base, spread)
        names = self.combination.pose_inputs
        inputs = {name: self._input(name, n_poses, spread) for name in names}
        return Poses(predictions, inputs, self.columns.names if self.columns else ())

    def _input(self, name: str, n_poses: int, spread: float) -> Tensor:
        if name in (labels := self.labels()):
            return random_labels(labels[name], n_poses, self._generator)
        if self.is_positive(name):
            return (spread or 1.0) * random_positive(n_poses, self._generator)
        return (spread or 1.0) * self.randn(n_poses)

    def is_positive(self, name: str) -> bool:
        """Return True if a pose input is declared as positive."""
        return declared_kinds(self.combination).get(name) == "positive"

    def real_inputs(self) -> list[str]:
        """Return the names of the pose inputs that are no labels, and so have a derivative."""
        labels = self.labels() if self.combination.pose_inputs else {}
        return [name for name in self.combination.pose_inputs if name not in labels]

    def predictions(self, n_poses: int, base: float = 0.0, spread: float = 1.0) -> Tensor:
        """Return predictions within ``spread`` of ``base``, moved into the declared domain.

        Returns
        -------
        shape (n_poses,), or (n_poses, n_columns), float64. They keep a distance if the combination
        is not ``smooth``
        """
        shape = self.shape(n_poses)
        unit = torch.rand(shape, dtype=torch.float64, generator=self._generator)
        if not self.combination.smooth:
            ranks = torch.tensor(self.permutation(unit.numel())).view(shape)
            unit = (ranks + 0.25 + 0.5 * unit) / unit.numel()
        low, high = self.combination.domain
        if high - low <= WIDE:
            base, spread = (low + high) / 2, min(spread, 1.0) * 0.4 * (high - low)
        elif base - 1.5 * spread <= low:
            base = low + abs(base) + 1.5 * spread
        elif base + 1.5 * spread >= high:
            base = high - abs(base) - 1.5 * spread
        return torch.round((base + spread * (2 * unit - 1)) * GRID) / GRID

    def shape(self, n_poses: int) -> tuple[int, ...]:
        """Return the shape of the predictions of so many poses."""
        return (n_poses, self.columns.number or 1) if self.columns else (n_poses,)

    def first_step(self, predictions: Tensor) -> float:
        """Return a power of two as the largest step of finite differences.

        The step leaves predictions in the domain, and does not change the order of the poses.
        """
        low, high = self.combination.domain
        room = min(float((predictions - low).min()), float((high - predictions).min())) / 2
        if not self.combination.smooth and predictions.numel() > 1:
            room = min(room, float(predictions.flatten().sort().values.diff().min()) / 8)
        return _step_within(room)

    def first_step_of_input(self, name: str, numbers: Tensor) -> float:
        """Return the largest step of a pose input. Positive numbers stay above 0."""
        return _step_within(float(numbers.min()) / 2 if self.is_positive(name) else 1.0)

    def step(
        self,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        n_poses: int = 3,
        spread: float = 1.0,
    ) -> Step:
        """Return random arguments for ``forward``.

        Parameters
        ----------
        shapes : shape of each parameter by name; :func:`default_shapes` by default
        spread : spread of the predictions. If the combination is sharp, a large spread makes the
            weights 0 or 1
        """
        n_poses = self.n_poses(n_poses)
        shapes = shapes or default_shapes(n_poses)
        n_numbers = math.prod(self.shape(n_poses))
        gradients = {name: self.randn(n_numbers, *shape) for name, shape in shapes.items()}
        for i, gradient in enumerate(gradients.values()):
            gradient *= (1, 1e-3, 1e2)[i % 3]  # some sizes do not show a clamp or threshold
        params = {name: self.randn(*shape).requires_grad_() for name, shape in shapes.items()}
        return Step(self.poses(n_poses, 0.0, spread), gradients, params)


def _step_within(room: float) -> float:
    return min(LARGEST_STEP, 2.0 ** math.floor(math.log2(room)) if room < 1 else 1.0)
