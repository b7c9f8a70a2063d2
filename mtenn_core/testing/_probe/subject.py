"""A combination under test: compute its values, weights and gradients."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mtenn_core._engine.declarations import declared_kinds, overrides
from mtenn_core._engine.evaluation import (
    autograd_weights,
    backward_weights,
    combined_prediction,
    value_of_forward,
)
from mtenn_core._torch_internals import buffers_of, parameters_of
from mtenn_core.combination import Combination
from mtenn_core.testing._probe.forward_only import ForwardOnly
from mtenn_core.testing._probe.instances import independent_copy, own_parameter
from mtenn_core.testing._probe.labels import (
    Labels,
    declared_labels,
    find_labels,
    n_poses_of_trials,
)
from mtenn_core.testing._probe.one_number import as_written, factors, use_one_number
from mtenn_core.testing._probe.poses import Poses
from mtenn_core.testing._probe.probes import N_COLUMNS, Probes
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
    factors : None if the value is one number. If it is a vector, the checks use the sum of its
        entries times these factors, see :mod:`mtenn_core.testing._probe.one_number`
    two_derivatives : True if ``gradients="graph"`` and ``"stored"`` use different derivatives: the
        first is the derivative of ``combine`` by autograd
    """

    def __init__(
        self,
        combination: Combination,
        seed: int,
        *,
        thorough: bool = False,
        copied: bool = True,
        n_columns: int = N_COLUMNS,
    ) -> None:
        self.original = combination
        self.seed = seed
        self.factors: list[float] | None = None
        self.combination = combination = self.copy(torch.float64) if copied else combination
        self.thorough = thorough
        self.bounded = any(math.isfinite(end) for end in combination.domain)
        self.full_depth = overrides(type(combination), "forward")
        own_derivative = self.full_depth or overrides(type(combination), "pose_weights")
        self.two_derivatives = own_derivative and overrides(type(combination), "combine")
        self._buffers = {name: b.clone() for name, b in combination.named_buffers()}
        self.probes = Probes(combination, seed, self._find_labels, n_columns)
        if self.probes.columns is not None:
            self._use_one_number()

    def _find_labels(self) -> Labels:
        # Another instance, because its calls may leave state behind. Checks look for such state.
        trial = copy.copy(self)
        trial.combination = independent_copy(self.combination)
        probes = Probes(trial.combination, self.seed, n_columns=self.probes.n_columns)
        fewest = self.combination.min_poses
        predictions = probes.predictions(n_poses_of_trials(fewest))
        if kinds := declared_kinds(self.combination):
            return declared_labels(kinds, trial.value, predictions, self.seed, fewest)
        names = tuple(self.combination.pose_inputs)
        return find_labels(names, trial.value, predictions, self.seed, fewest)

    @property
    def may_batch(self) -> bool:
        """True if many values may be computed in one batch: no call depends on another.

        With columns, a stochastic combination draws the same random numbers for the whole batch.
        """
        is_random = self.combination.stochastic and self.probes.columns is None
        return not (is_random or self._buffers)

    def _use_one_number(self) -> None:
        """If the value is a vector, let the combination return one number."""
        try:
            trial = copy.copy(self)
            trial.combination = independent_copy(self.combination)
            probes = Probes(trial.combination, self.seed, self.probes.labels, self.probes.n_columns)
            value = trial.value(probes.poses(3))
        except Exception:  # the checks report it
            return
        if isinstance(value, Tensor) and value.dim() == 1 and len(value):
            self.factors = factors(len(value), self.seed)
            use_one_number(self.combination, self.factors)
            self.two_derivatives = False

    def copy(self, dtype: torch.dtype | None = None, *, as_written: bool = False) -> Combination:
        """Return another copy on the CPU.

        Parameters
        ----------
        dtype : dtype of its parameters and buffers
        as_written : if the value is a vector, the copy returns the vector
        """
        made = independent_copy(self.original).to("cpu", dtype)
        if self.factors is not None and not as_written:
            use_one_number(made, self.factors)
        return made

    def takes(self, poses: Poses) -> bool:
        """Return True if the combination accepts poses that were made for another combination."""
        names = self.combination.pose_inputs
        has_columns = poses.predictions.shape == self.probes.shape(len(poses))
        few = len(poses) < self.combination.min_poses
        return has_columns and not few and [*poses.inputs] == [*names]

    def values(self, rows: Tensor) -> Tensor:
        """Return the values of many sets of poses.

        Parameters
        ----------
        rows : shape (batch, n_numbers), each row from :meth:`Poses.row`

        Returns
        -------
        shape (batch,)
        """
        return self._batch_or_loop(self._value, self._values_one_by_one, rows, rows)

    def _values_one_by_one(self, rows: Tensor) -> Tensor:
        return torch.stack([self.value(self._poses_of(row)) for row in rows])

    def _batch_or_loop(
        self,
        function: Callable[[Combination, Tensor], Tensor],
        loop: Callable[[Tensor], Tensor],
        inputs: Tensor,
        rows: Tensor,
    ) -> Tensor:
        """Return the values for many inputs, shape (batch,).

        They are computed as one batch if a comparison shows that the batch gives the right values.

        Parameters
        ----------
        function : the value for one of the inputs
        loop : the values for several inputs, one by one
        inputs : shape (batch, size)
        rows : the numbers that are combined for each of the inputs, shape (batch, any)
        """
        if not self.may_batch:
            return loop(inputs)
        try:
            # Use a copy, because a tensor that forward keeps on self belongs to vmap and cannot
            # be used later.
            combination = independent_copy(self.combination)
            with self.restored_state(), torch.no_grad(), ForwardOnly():
                one = partial(function, combination)
                randomness = "same" if self.combination.stochastic else "error"
                batch = torch.func.vmap(one, randomness=randomness)(inputs.clone())
        except Exception:  # for example, because control flow depends on numbers
            return loop(inputs)
        # Repeat the first input after the last, to find values that change from call to call.
        some = [0, -1, 0]
        if _agree(batch[some], loop(inputs[some]), rows[some]):
            return batch
        return loop(inputs)

    def _value(self, combination: Combination, row: Tensor) -> Tensor:
        poses = self._poses_of(row)
        if not self.full_depth:
            return combination.combine(poses.predictions, **poses.inputs)
        zeros = list(torch.zeros(len(poses), 1, dtype=row.dtype))
        param = torch.zeros(1, dtype=row.dtype, requires_grad=True)
        step = list(poses.predictions), {"probe": zeros}, ["probe"], param
        return value_of_forward(combination, *step, **poses.inputs)

    def _poses_of(self, row: Tensor) -> Poses:
        names, columns = self.combination.pose_inputs, self.probes.columns
        if not names and columns is None:
            return Poses(row)
        n_columns = self.probes.shape(1)[-1]
        n_poses = len(row) // (n_columns + len(names))
        sizes = [n_poses * n_columns, *(len(names) * [n_poses])]
        predictions, *inputs = row.split(sizes)
        predictions = predictions.view(self.probes.shape(n_poses))
        names_of_columns = columns.names if columns else ()
        return Poses(predictions, dict(zip(names, inputs, strict=True)), names_of_columns)

    def value(self, poses: Poses) -> Tensor:
        """Return the combined prediction, shape (), without a graph."""
        row = poses.row()  # a copy
        with self.restored_state(), torch.no_grad():
            return self._value(self.combination, row)

    def result(self, poses: Poses, method: str = "combine") -> Tensor:
        """Return the combined prediction as it is written: shape (), or a vector.

        Parameters
        ----------
        method : ``"reference"`` for the value of the declared reference
        """
        if self.factors is None and method == "combine":
            return self.value(poses)
        with self.restored_state(), torch.no_grad(), as_written(self.combination):
            given = poses.map(torch.clone)
            value: Tensor = getattr(self.combination, method)(given.predictions, **given.inputs)
            return value

    def weights_of_results(self, poses: Poses) -> Tensor:
        """Return the pose weights of each entry of the value, shape (n_results, …)."""
        if self.factors is None:
            return self.weights(poses)[None]
        with self.restored_state(), as_written(self.combination), torch.enable_grad():
            y = poses.predictions.detach().clone().requires_grad_()
            value = combined_prediction(self.combination, y.clone(), poses.copied_inputs())
            rows = [torch.autograd.grad(entry, y, retain_graph=True)[0] for entry in value]
        return torch.stack(rows)

    def weights(self, poses: Poses) -> Tensor:
        """Return the pose weights that backward uses in training, in the predictions' shape."""
        with self.restored_state():
            if self.full_depth:
                return backward_weights(self.combination, poses.predictions, poses.copied_inputs())
            # This avoids attach_gradients, which would need M² numbers. B1 checks that it uses the
            # same weights.
            with torch.inference_mode(False), torch.enable_grad():
                y = poses.predictions.detach().clone().requires_grad_()
                # With y itself, a change in place would raise an error here. A4 reports such a
                # change.
                value = combined_prediction(self.combination, y.clone(), poses.copied_inputs())
                (weights,) = torch.autograd.grad(value, y)
                return weights

    def autograd_weights(self, poses: Poses) -> Tensor:
        """Return the pose weights that autograd derives from ``combine``."""
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
            args = (pred_list, grad_dict, param_names, *step.params.values())
            return value_of_forward(combination or self.combination, *args, **pose_inputs)

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
        param = own_parameter(self.combination, name)
        row = poses.row()

        def value(combination: Combination, setting: Tensor) -> Tensor:
            parameters: dict[str, Any] = parameters_of(combination.get_submodule(module))
            parameters[own] = setting.view_as(param)
            return self._value(combination, row.clone())

        def one_by_one(settings: Tensor) -> Tensor:
            before, values = param.detach().clone(), []
            with torch.no_grad():
                for setting in settings:
                    param.copy_(setting.view_as(param))
                    values.append(self.value(poses))
                param.copy_(before)
            return torch.stack(values)

        return self._batch_or_loop(value, one_by_one, settings, row.expand(len(settings), -1))

    def gradient_of_parameter(self, name: str, poses: Poses) -> Tensor:
        """Return the flattened gradient of one of its own parameters, as training uses it."""
        param = own_parameter(self.combination, name)
        if self.probes.columns is None:
            value = self.call(Step(poses, {}, {}))
        else:  # forward is the core's, and slow for a list with many columns
            y = poses.predictions.clone().requires_grad_()
            with self.restored_state(), torch.enable_grad():
                value = combined_prediction(self.combination, y, poses.copied_inputs())
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
                    buffers_of(self.combination.get_submodule(module))[own] = buffer.clone()


def _agree(batch: Tensor, one_by_one: Tensor, rows: Tensor) -> bool:
    """Return True if values from a batch equal those computed one by one, to the last digits.

    They differ if a call depends on state that the previous call left.
    """
    size = torch.maximum(rows.abs().amax(1), one_by_one.abs())
    close = (batch - one_by_one).abs() <= 64 * torch.finfo(rows.dtype).eps * size
    same = (batch == one_by_one) | (batch.isnan() & one_by_one.isnan())
    return bool((close | same).all())
