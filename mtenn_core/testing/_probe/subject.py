"""A combination under test: compute its values, weights and gradients."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mtenn_core._engine.declarations import overrides
from mtenn_core._engine.evaluation import (
    autograd_weights,
    backward_weights,
    combined_prediction,
    first_of_pair,
)
from mtenn_core.combination import Combination
from mtenn_core.testing._probe.forward_only import ForwardOnly
from mtenn_core.testing._probe.poses import Poses
from mtenn_core.testing._probe.probes import Probes
from mtenn_core.testing._probe.training_step import Step, gradients_of


class Subject:
    """A float64 copy of a combination. Its state is restored after every call.

    The copy is in float64, because finite differences with float32 parameters would be wrong and
    would have too small error bars.

    Attributes
    ----------
    combination : the copy
    original : the combination
    thorough : True to use more probes than the gate
    copied : False to use the combination itself, which must be in float64
    seed : seed of the random numbers
    probes : random arguments for the copy
    bounded : True if the declared domain has an end
    full_depth : True if the class overrides ``forward``
    two_derivatives : True if ``gradients="graph"`` and ``"stored"`` use different derivatives: the
        first is the derivative of ``combine`` by autograd
    """

    def __init__(
        self, combination: Combination, seed: int, *, thorough: bool = False, copied: bool = True
    ) -> None:
        self.original = combination
        self.combination = combination = self.copy(torch.float64) if copied else combination
        self.thorough = thorough
        self.bounded = any(math.isfinite(end) for end in combination.domain)
        self.full_depth = overrides(type(combination), "forward")
        own_derivative = self.full_depth or overrides(type(combination), "pose_weights")
        self.two_derivatives = own_derivative and overrides(type(combination), "combine")
        self.seed = seed
        self.probes = Probes(combination, seed)
        self._buffers = {name: b.clone() for name, b in combination.named_buffers()}

    def copy(self, dtype: torch.dtype | None = None) -> Combination:
        """Return another copy on the CPU. ``dtype`` is that of its parameters and buffers."""
        return copy.deepcopy(self.original).to("cpu", dtype)

    def takes(self, poses: Poses) -> bool:
        """Return True if the combination can combine these poses of another combination."""
        names = self.combination.pose_inputs
        return len(poses) >= self.combination.min_poses and [*poses.inputs] == [*names]

    def values(self, rows: Tensor) -> Tensor:
        """Return the values of many sets of poses.

        Parameters
        ----------
        rows : shape (batch, n_numbers), each row from :meth:`Poses.row`

        Returns
        -------
        shape (batch,)
        """
        if not (self.combination.stochastic or self._buffers):
            try:
                # Use a copy, because a tensor that forward keeps on self belongs to vmap and cannot
                # be used later.
                combination = copy.deepcopy(self.combination) if self.full_depth else None
                with torch.no_grad(), ForwardOnly():
                    batched = torch.func.vmap(partial(self._value, combination))(rows.clone())
            except Exception:  # for example, because control flow depends on numbers
                pass
            else:
                first_and_last = (self.value(self._poses_of(rows[i])) for i in (0, -1))
                if not self.full_depth or _agree(batched[[0, -1]], first_and_last, rows):
                    return batched
        return torch.stack([self.value(self._poses_of(row)) for row in rows])

    def _value(self, combination: Combination | None, row: Tensor) -> Tensor:
        combination = combination or self.combination
        poses = self._poses_of(row)
        if not self.full_depth:
            return combination.combine(poses.predictions, **poses.inputs)
        zeros = [torch.zeros(1, dtype=row.dtype) for _ in poses.predictions]
        param = torch.zeros(1, dtype=row.dtype, requires_grad=True)
        step = list(poses.predictions), {"probe": zeros}, ["probe"], param
        return first_of_pair(combination(*step, **poses.inputs))

    def _poses_of(self, row: Tensor) -> Poses:
        names = self.combination.pose_inputs
        if not names:
            return Poses(row)
        predictions, *inputs = row.chunk(1 + len(names))
        return Poses(predictions, dict(zip(names, inputs, strict=True)))

    def value(self, poses: Poses) -> Tensor:
        """Return the combined prediction, shape (), without a graph."""
        row = poses.row()  # a copy
        with self.restored_state(), torch.no_grad():
            return self._value(None, row)

    def weights(self, poses: Poses) -> Tensor:
        """Return the pose weights that backward uses in training, shape (n_poses,)."""
        with self.restored_state():
            if self.full_depth:
                return backward_weights(self.combination, poses.predictions, poses.copied_inputs())
            # This avoids attach_gradients, which would need M² numbers. B1 checks that it uses the
            # same weights.
            with torch.inference_mode(False), torch.enable_grad():
                y = poses.predictions.detach().clone().requires_grad_()
                value = combined_prediction(self.combination, y, poses.copied_inputs())
                (weights,) = torch.autograd.grad(value, y)
                return weights

    def autograd_weights(self, poses: Poses) -> Tensor:
        """Return the pose weights that autograd derives from ``combine``, shape (n_poses,)."""
        with self.restored_state():
            return autograd_weights(self.combination, poses.predictions, poses.copied_inputs())

    def call(
        self,
        step: Step,
        *,
        pred_list: list[Tensor] | None = None,
        grad_dict: Mapping[str, list[Tensor]] | None = None,
        param_names: list[str] | None = None,
        pose_inputs: Mapping[str, Tensor] | None = None,
        combination: Combination | None = None,
    ) -> Tensor:
        """Call ``forward`` with the arguments in ``step``, unless other arguments are given."""
        pred_list = step.pred_list() if pred_list is None else pred_list
        grad_dict = step.grad_dict() if grad_dict is None else grad_dict
        param_names = list(step.params) if param_names is None else param_names
        pose_inputs = step.poses.copied_inputs() if pose_inputs is None else pose_inputs
        with self.restored_state():
            forward = combination or self.combination
            args = (pred_list, grad_dict, param_names, *step.params.values())
            return first_of_pair(forward(*args, **pose_inputs))

    def gradients(self, step: Step, **instead: Any) -> dict[str, Tensor]:
        """Return the gradient of the combined prediction with respect to each parameter."""
        return gradients_of(self.call(step, **instead), step.params)

    def values_of_parameter(self, name: str, poses: Poses, settings: Tensor) -> Tensor:
        """Return the combination's value for each value of one of its own parameters.

        Parameters
        ----------
        settings : shape (batch, n_entries)

        Returns
        -------
        shape (batch,)
        """
        module, _, own = name.rpartition(".")
        parameters = self.combination.get_submodule(module)._parameters
        param = self.combination.get_parameter(name)

        def value(setting: Tensor) -> Tensor:
            parameters[own] = setting.view_as(param)  # type: ignore[assignment]
            return self._value(None, poses.row())

        def one_by_one(settings: Tensor) -> Tensor:
            before, values = param.detach().clone(), []
            with torch.no_grad():
                for setting in settings:
                    param.copy_(setting.view_as(param))
                    values.append(self.value(poses))
                param.copy_(before)
            return torch.stack(values)

        if not (self.full_depth or self.combination.stochastic or self._buffers):
            try:
                with torch.no_grad():
                    batched = torch.func.vmap(value)(settings.clone())
            except Exception:
                batched = None
            finally:
                parameters[own] = param
            if batched is not None:
                first_and_last = one_by_one(settings[[0, -1]])
                if _agree(batched[[0, -1]], first_and_last, poses.predictions):
                    return batched
        return one_by_one(settings)

    def gradient_of_parameter(self, name: str, poses: Poses) -> Tensor:
        """Return the flattened gradient of one of its own parameters, as training uses it."""
        param = self.combination.get_parameter(name)
        value = self.call(Step(poses, {}, {}))
        gradient = None
        if value.requires_grad:
            go = -3.7  # gradient of the loss; 1 would not show a backward that ignores it
            (gradient,) = torch.autograd.grad(value * go, param, allow_unused=True)
            gradient = None if gradient is None else gradient / go
        return (torch.zeros_like(param) if gradient is None else gradient).reshape(-1)

    @contextmanager
    def restored_state(self) -> Iterator[None]:
        """Set the random state, and restore buffers afterwards, so that calls are independent."""
        if self.combination.stochastic:
            torch.default_generator.manual_seed(self.seed)
        try:
            yield
        finally:
            # Replace the buffers with copies, because backward may need the buffers of this call.
            with torch.inference_mode(False):
                for name, buffer in self._buffers.items():
                    module, _, own = name.rpartition(".")
                    self.combination.get_submodule(module)._buffers[own] = buffer.clone()


def _agree(batched: Tensor, one_by_one: Iterable[Tensor], predictions: Tensor) -> bool:
    """Return True if values from a batch equal the values that were computed one by one.

    They differ if a call depends on state that the previous call left.
    """
    expected = torch.stack(list(one_by_one))
    size = float(predictions.abs().amax())
    return torch.allclose(batched, expected, rtol=1e-9, atol=1e-9 * size, equal_nan=True)
