"""Gradients of all poses, taken one pose at a time so that one graph at most is alive."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mtenn_core._engine.autograd_nodes import accumulators, computes_in, is_batched
from mtenn_core._engine.module_tensors import Places, is_sharded, lock_of
from mtenn_core.errors import GradientError
from mtenn_core.gradients import at_least_float32, attach, no_autocast

Predict = Callable[[Any, int], Tensor]
Params = Mapping[str, Tensor]

# Gradients of one prediction, before any loss is known, may be too small for float16 (below 6e-8).
# A power of two, so that it changes no digit.
FLOAT16_SCALE = 2.0**16


Key = tuple[torch.device, torch.dtype]
Spare = dict[Key, torch.UntypedStorage]
# Memory that no graph needs any more. To fill fresh memory takes five times as long: the operating
# system finds each page of it when the page is first written to.
_SPARE: WeakKeyDictionary[torch.nn.Module, Spare] = WeakKeyDictionary()


class StoredGradients:
    """Pose predictions and ∂ŷ_i/∂θ, for every trainable parameter that some pose uses.

    Parameters
    ----------
    pose_model : its parameters are those that the gradients are taken of
    poses : n_poses of them
    predict : ``predict(pose, index)`` returns the prediction of one pose, shape (1,)

    Attributes
    ----------
    predictions : shape (n_poses,), detached
    params : the parameters by name

    Raises
    ------
    GradientError : the pose model is sharded, or has a gradient that would be lost
    """

    def __init__(self, pose_model: torch.nn.Module, poses: Sequence[Any], predict: Predict) -> None:
        _refuse_sharded(pose_model)
        places = Places(pose_model, "parameters")
        with lock_of(pose_model):
            trainable = {n: p for n, p in pose_model.named_parameters() if p.requires_grad}
            self._blocks = _blocks(trainable)
            # One row a pose: the sum over poses is one product of a vector and this matrix.
            self._spare = _SPARE.setdefault(pose_model, {})
            self._buffers = [
                _buffer(self._spare, key, len(poses), sum(p.numel() for p in block.values()))
                for key, block in self._blocks.items()
            ]
            # Gradients are taken of aliases, so that hooks on the parameters (and whatever stands
            # on such hooks: DistributedDataParallel, FSDP) see one backward, not one per pose more.
            aliases = {name: param.detach().requires_grad_() for name, param in trainable.items()}
            for name, alias in aliases.items():
                alias.register_post_accumulate_grad_hook(partial(_refuse_other_losses, name))
            self._scale: float | None = None  # of the inner gradients, known at the first pose
            alias_of = {id(param): aliases[name] for name, param in trainable.items()}
            with places.holding([alias_of.get(id(param), param) for param in places.tensors()]):
                self.predictions, used = self._run(aliases, poses, predict)
        self.params = {name: param for name, param in trainable.items() if name in used}

    def attach(self, *, reuse: bool = True) -> Tensor:
        """Return the predictions as one differentiable vector, shape (n_poses,).

        Parameters
        ----------
        reuse : whether the next call may fill the same memory once backward has read it; not where
            somebody was given the ``grad_dict``
        """
        # Shapes, not this object: backward could not free the buffers otherwise.
        layout = [
            {name: (param.shape, param.dtype) for name, param in block.items()}
            for block in self._blocks.values()
        ]
        spare = self._spare if reuse else {}
        names = list(self.params)
        weighted_sum = partial(_weighted_sum, layout=layout, names=names, spare=spare)
        return attach(self.predictions, self._buffers, weighted_sum, list(self.params.values()))

    def grad_dict(self, poses: slice) -> dict[str, list[Tensor]]:
        """Return views of the gradients of some poses, as a combination's ``forward`` takes."""
        views: dict[str, Tensor] = {}
        for block, buffer in zip(self._blocks.values(), self._buffers, strict=True):
            views |= _split(buffer[poses], {n: (p.shape, p.dtype) for n, p in block.items()})
        return {name: list(views[name]) for name in self.params}

    def _run(
        self, aliases: Params, poses: Sequence[Any], predict: Predict
    ) -> tuple[Tensor, set[str]]:
        """Fill the buffers; return the predictions and the names of the parameters used."""
        known: set[Any] = set()
        used: set[str] = set()
        predictions = []
        for index, pose in enumerate(poses):
            prediction = predict(pose, index)
            if prediction.requires_grad:
                known |= _accumulators_of(prediction, aliases, known, index)
            used |= self._store(prediction, aliases, index)
            # A clone: a view would keep the whole tensor that it is a view of.
            predictions.append(prediction.detach().clone())
        return torch.cat(predictions), used

    def _store(self, prediction: Tensor, aliases: Params, pose: int) -> set[str]:
        """Write one row of gradients and return the names of the parameters that were used."""
        found: dict[str, Tensor] = {}
        scale = 1.0
        if prediction.requires_grad:
            if self._scale is None:
                half = computes_in(torch.float16, prediction)
                self._scale = FLOAT16_SCALE if half else 1.0
            gradients, scale = _gradients(prediction, aliases, self._scale)
            named = zip(aliases, gradients, strict=False)
            found = {name: gradient for name, gradient in named if gradient is not None}
        for block, buffer in zip(self._blocks.values(), self._buffers, strict=True):
            # Into the dtype of the sums, too.
            row = [_flat(name, found.get(name), param) for name, param in block.items()]
            torch.cat(row, out=buffer[pose])
            if scale != 1:
                buffer[pose] /= scale
        return set(found)


def _buffer(spare: Spare, key: Key, n_poses: int, n_numbers: int) -> Tensor:
    """Return memory for a matrix of gradients, not set to anything."""
    device, dtype = key
    fresh = torch.empty(0, dtype=dtype, device=device)
    storage = spare.pop(key, None)
    if storage is None or storage.nbytes() < n_poses * n_numbers * dtype.itemsize:
        return fresh.resize_(n_poses, n_numbers)
    return fresh.set_(storage, 0, (n_poses, n_numbers), (n_numbers, 1))


def _blocks(params: Params) -> dict[Key, dict[str, Tensor]]:
    """Group parameters by device and by the dtype of their sums, each group to share a buffer."""
    blocks: dict[Key, dict[str, Tensor]] = {}
    for name, param in params.items():
        key = param.device, at_least_float32(param.dtype)
        blocks.setdefault(key, {})[name] = param
    return blocks


def _gradients(prediction: Tensor, aliases: Params, scale: float) -> tuple[list[Any], float]:
    """Return scale · ∂ŷ/∂θ, None for a parameter that ŷ does not depend on, and the scale."""
    params = list(aliases.values())
    while params:
        # Backward runs outside of autocast, as that of a loss does.
        with no_autocast(prediction.device.type):
            gradients = torch.autograd.grad(
                prediction * scale if scale > 1 else prediction,
                params,
                allow_unused=True,
                retain_graph=scale > 1,
            )
        if scale == 1 or all(g.isfinite().all() for g in gradients if g is not None):
            return list(gradients), scale
        scale /= 16
    return [], 1.0


def _flat(name: str, gradient: Tensor | None, param: Tensor) -> Tensor:
    """Return a gradient as a part of a row."""
    if gradient is None:
        return param.new_zeros(param.numel())
    if gradient.layout is not torch.strided:
        raise GradientError(
            f"parameter {name!r}: gradients='stored' keeps dense gradients; found a sparse one"
            " (use sparse=False, or gradients='recomputed' or 'graph')",
            parameter=name,
        )
    return gradient.flatten()


def _refuse_sharded(pose_model: torch.nn.Module) -> None:
    """Raise if the pose model, or a part of it, is spread over processes.

    Their hooks put parameters in and take them out in each run, and would not see the gradients.
    """
    modules = list(pose_model.named_modules())
    sharding = set(filter(_shards, {type(module) for _, module in modules}))
    for name, module in modules:
        if type(module) in sharding or any(map(is_sharded, module._parameters.values())):
            raise GradientError(
                f"module {name or type(pose_model).__name__!r} of the pose model is sharded over"
                " processes, and gradients='stored' takes the gradients of whole parameters: use"
                " gradients='recomputed' or 'graph', or shard the MultiPoseModel as one"
            )


def _shards(module_class: type[torch.nn.Module]) -> bool:
    """Whether modules have been through ``fully_shard``, or are ``FullyShardedDataParallel``.

    Between forward and backward its parameters may look like any others. By name, since the
    classes moved from one module of torch to another, whose import takes time.
    """
    return any(
        parent.__name__ in ("FSDPModule", "FullyShardedDataParallel")
        and parent.__module__.startswith("torch.distributed.")
        for parent in module_class.__mro__
    )


def _refuse_other_losses(name: str, alias: Tensor) -> None:
    """Raise where a loss reaches an alias: its gradient would not reach the parameter."""
    raise GradientError(
        f"parameter {name!r}: a loss uses something of the pose model beside its predictions (a"
        " penalty that it keeps, an activation), and gradients='stored' would lose its gradient:"
        " compute it outside of the pose model, or use gradients='graph'",
        parameter=name,
    )


def _accumulators_of(prediction: Tensor, aliases: Params, known: set[Any], pose: int) -> set[Any]:
    """Return the nodes, beside the known ones, that would add a gradient to an alias.

    Raises
    ------
    GradientError : something else would get a gradient too, and its graph ends here
    """
    found = accumulators(prediction, known)
    own = {id(alias) for alias in aliases.values()} if found else set()
    for node in found:
        if id(node.variable) not in own:
            raise GradientError(
                f"pose {pose}: its prediction depends on a tensor of shape"
                f" {tuple(node.variable.shape)} that requires grad and is no parameter of the pose"
                " model (an input, a parameter that was not registered or is reached other than"
                " through its module, or reentrant checkpointing); gradients='stored' would lose"
                " its gradient: detach it, register it, or use gradients='graph'",
                pose=pose,
            )
    return set(found)


Layout = Mapping[str, tuple[torch.Size, torch.dtype]]


def _weighted_sum(
    weights: Tensor,
    buffers: Sequence[Tensor],
    *,
    layout: Sequence[Layout],
    names: Sequence[str],
    spare: Spare,
) -> list[Tensor]:
    sums: dict[str, Tensor] = {}
    for buffer, block in zip(buffers, layout, strict=True):
        sums |= _split(_product(weights.to(buffer.device, buffer.dtype), buffer), block)
        # An accelerator's allocator keeps memory itself.
        if buffer.device.type == "cpu" and not _graph_is_retained():
            spare[buffer.device, buffer.dtype] = buffer.untyped_storage()
    return [sums[name] for name in names]


def forget_memory(pose_model: torch.nn.Module) -> None:
    """Give back the memory that is kept for the next step."""
    _SPARE.pop(pose_model, None)


def _graph_is_retained() -> bool:
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


def _product(weights: Tensor, buffer: Tensor) -> Tensor:
    """Return Σ_i w_i row_i without those whose weight is zero: 0 · inf would be NaN."""
    with no_autocast(weights.device.type):
        if is_batched(weights):
            return weights @ buffer
        with_weight = weights != 0
        n_with_weight = int(with_weight.sum())
        # To copy rows and to read the copy is three times what it is to read them.
        if 3 * n_with_weight > len(weights):
            product = weights @ buffer
            if n_with_weight == len(weights) or product.isfinite().all():
                return product
        return weights[with_weight] @ buffer[with_weight]


def _split(rows: Tensor, layout: Layout) -> dict[str, Tensor]:
    """Cut the last dimension into parameters: (..., P) to {name: (..., *shape)}."""
    parts = rows.split([shape.numel() for shape, _ in layout.values()], dim=-1)
    return {
        name: part.view((*rows.shape[:-1], *shape)).to(dtype)
        for (name, (shape, dtype)), part in zip(layout.items(), parts, strict=True)
    }
