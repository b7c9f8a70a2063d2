"""A combination under test: where it is probed, and what is read off it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from mtenn_core.combination import (
    Combination,
    autograd_weights,
    backward_weights,
    overrides,
)

# Predictions and steps are multiples of 2**-33 and below 2**14, so that y ± h is exact in float64.
GRID = 2.0**33
LARGEST_STEP = 2.0**-3


class Subject:
    """A float64 copy of a combination, which forgets every call.

    Attributes
    ----------
    combination : the copy
    full_depth : whether it has a ``forward`` of its own
    two_derivatives : whether ``gradients="graph"``, which takes the derivative of ``combine`` by
        autograd, has another one than ``"stored"``
    """

    def __init__(self, combination: Combination, seed: int) -> None:
        self.combination = combination
        self.full_depth = overrides(type(combination), "forward")
        own_derivative = self.full_depth or overrides(type(combination), "pose_weights")
        self.two_derivatives = own_derivative and overrides(type(combination), "combine")
        self._seed = seed
        self._generator = torch.Generator().manual_seed(seed)
        self._buffers = {name: b.clone() for name, b in combination.named_buffers()}

    def n_poses(self, n_poses: int) -> int:
        """Return ``n_poses``, or the fewest that the combination takes."""
        return max(n_poses, self.combination.min_poses)

    def randn(self, *shape: int) -> Tensor:
        """Return normal random numbers, float64."""
        return torch.randn(shape, dtype=torch.float64, generator=self._generator)

    def permutation(self, n: int) -> list[int]:
        """Return 0 … n - 1 in random order."""
        return torch.randperm(n, generator=self._generator).tolist()

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
        if math.isfinite(low) and math.isfinite(high):
            base, spread = (low + high) / 2, min(spread, 1.0) * 0.4 * (high - low)
        elif math.isfinite(low):
            base = low + abs(base) + 1.5 * spread
        elif math.isfinite(high):
            base = high - abs(base) - 1.5 * spread
        return torch.round((base + spread * (2 * unit - 1)) * GRID) / GRID

    def first_step(self, predictions: Tensor) -> float:
        """Return a step, a power of two, that keeps to the domain and to the order of the poses."""
        low, high = self.combination.domain
        room = min(float((predictions - low).min()), float((high - predictions).min())) / 2
        if not self.combination.smooth and len(predictions) > 1:
            room = min(room, float(predictions.sort().values.diff().min()) / 8)
        return min(LARGEST_STEP, 2.0 ** math.floor(math.log2(room)) if room < 1 else 1.0)

    def values(self, points: Tensor) -> Tensor:
        """Return the value at each of many points: shape (batch, n_poses) to (batch,)."""
        if not (self.full_depth or self.combination.stochastic or self._buffers):
            try:
                with torch.no_grad():
                    return torch.func.vmap(self.combination.combine)(points.clone())
            except Exception:  # control flow that depends on the data, say: one by one, then
                pass
        return torch.stack([self.value(point) for point in points])

    def value(self, predictions: Tensor) -> Tensor:
        """Return the combined prediction, shape (), without a graph."""
        with self._forgetting(), torch.no_grad():
            if not self.full_depth:
                return self.combination.combine(predictions.clone())
            zeros = [torch.zeros(1, dtype=predictions.dtype) for _ in predictions]
            param = torch.zeros(1, dtype=predictions.dtype, requires_grad=True)
            return self.combination(list(predictions.clone()), {"probe": zeros}, ["probe"], param)

    def weights(self, predictions: Tensor) -> Tensor:
        """Return the pose weights that training would use, shape (n_poses,), read off backward."""
        with self._forgetting():
            return backward_weights(self.combination, predictions)

    def autograd_weights(self, predictions: Tensor) -> Tensor:
        """Return the pose weights that autograd derives from ``combine``, shape (n_poses,)."""
        with self._forgetting():
            return autograd_weights(self.combination, predictions)

    def call(
        self,
        pred_list: Sequence[Tensor],
        grad_dict: Mapping[str, Tensor],
        params: dict[str, Tensor],
    ) -> Tensor:
        """Call ``forward`` as a training step does.

        Parameters
        ----------
        grad_dict : gradients by parameter, shape (n_poses, *shape of the parameter)
        params : the parameters; their order is that of ``param_names``
        """
        lists = {name: list(gradients.clone()) for name, gradients in grad_dict.items()}
        with self._forgetting():
            return self.combination(list(pred_list), lists, list(params), *params.values())

    def values_of_parameter(self, name: str, predictions: Tensor, settings: Tensor) -> Tensor:
        """Return the value for each setting of an own parameter: (batch, size) to (batch,)."""
        param = self.combination.get_parameter(name)
        before, values = param.detach().clone(), []
        with torch.no_grad():
            for setting in settings:
                param.copy_(setting.view_as(param))
                values.append(self.value(predictions))
            param.copy_(before)
        return torch.stack(values)

    def gradient_of_parameter(self, name: str, predictions: Tensor) -> Tensor:
        """Return the gradient of an own parameter that training would use, flat."""
        param = self.combination.get_parameter(name)
        value = self.call(list(predictions), {}, {})
        gradient = None
        if value.requires_grad:
            (gradient,) = torch.autograd.grad(value, param, allow_unused=True)
        return (torch.zeros_like(param) if gradient is None else gradient).reshape(-1)

    @contextmanager
    def _forgetting(self) -> Iterator[None]:
        """Replay the random state and put buffers back, so that no call sees another."""
        if self.combination.stochastic:
            torch.manual_seed(self._seed)
        try:
            yield
        finally:
            for name, buffer in self.combination.named_buffers():
                buffer.copy_(self._buffers[name])
