"""Gradients of all poses, taken one pose at a time so that one graph at most is alive."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from mtenn_core.errors import GradientError
from mtenn_core.gradients import at_least_float32, attach, sum_over_poses

Predict = Callable[[torch.nn.Module, Any, int], Tensor]
Shapes = dict[str, torch.Size]


class StoredGradients:
    """Pose predictions and ∂ŷ_i/∂θ, for every trainable parameter that some pose uses.

    Parameters
    ----------
    pose_model : its parameters are those that the gradients are taken of
    poses : n_poses of them
    predict : ``predict(model, pose, index)`` returns the prediction of one pose, shape ()

    Attributes
    ----------
    predictions : shape (n_poses,), detached
    params : the parameters by name
    """

    def __init__(self, pose_model: torch.nn.Module, poses: Sequence[Any], predict: Predict) -> None:
        trainable = {n: p for n, p in pose_model.named_parameters() if p.requires_grad}
        self._blocks = _blocks(trainable)
        # One row a pose: the sum over poses is one product of a vector and this matrix.
        self._buffers = [
            torch.empty(
                len(poses), sum(p.numel() for p in block.values()), dtype=dtype, device=device
            )
            for (device, dtype), block in self._blocks.items()
        ]
        aliases = {name: param.detach().requires_grad_() for name, param in trainable.items()}
        used: set[str] = set()

        def run(model: torch.nn.Module) -> Tensor:
            predictions = []
            for index, pose in enumerate(poses):
                prediction = predict(model, pose, index)
                used.update(self._store(prediction, aliases, index))
                predictions.append(prediction.detach())
            return torch.stack(predictions)

        # Gradients are taken of aliases, so that hooks on the parameters (and whatever stands on
        # such hooks: DistributedDataParallel, FSDP) see one backward, not one more for every pose.
        names = {f"module.{name}": alias for name, alias in aliases.items()}
        self.predictions = functional_call(_Around(pose_model), names, (run,))
        self.params = {name: param for name, param in trainable.items() if name in used}

    def attach(self) -> Tensor:
        """Return the predictions as one differentiable vector, shape (n_poses,)."""
        shapes = [{n: p.shape for n, p in block.items()} for block in self._blocks.values()]
        # The function gets shapes, not this object: backward could not free the buffers otherwise.
        weighted_sum = partial(_weighted_sum, shapes=shapes, names=list(self.params))
        return attach(self.predictions, self._buffers, weighted_sum, list(self.params.values()))

    def grad_dict(self, poses: slice) -> dict[str, list[Tensor]]:
        """Return views of the gradients of some poses, as a combination's ``forward`` takes."""
        views: dict[str, Tensor] = {}
        for block, buffer in zip(self._blocks.values(), self._buffers, strict=True):
            views |= _split(buffer[poses], {n: p.shape for n, p in block.items()})
        return {name: list(views[name]) for name in self.params}

    def _store(self, prediction: Tensor, aliases: dict[str, Tensor], pose: int) -> set[str]:
        """Write one row of gradients and return the names of the parameters that were used."""
        found: dict[str, Tensor | None] = dict.fromkeys(aliases)
        if prediction.requires_grad:
            _refuse_other_leaves(prediction, aliases, pose)
            if aliases:
                gradients = torch.autograd.grad(
                    prediction, list(aliases.values()), allow_unused=True
                )
                found = dict(zip(aliases, gradients, strict=True))
        for block, buffer in zip(self._blocks.values(), self._buffers, strict=True):
            row = [_dense(name, found[name], param) for name, param in block.items()]
            torch.cat(row, out=buffer[pose])
        return {name for name, gradient in found.items() if gradient is not None}


class _Around(torch.nn.Module):
    """Lets one ``functional_call`` span the loop over all poses."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, body: Callable[[torch.nn.Module], Tensor]) -> Tensor:
        return body(self.module)


def _blocks(params: Mapping[str, Tensor]) -> dict[tuple[Any, Any], dict[str, Tensor]]:
    """Group parameters by device and dtype, each group to share a buffer."""
    blocks: dict[tuple[Any, Any], dict[str, Tensor]] = {}
    for name, param in params.items():
        blocks.setdefault((param.device, param.dtype), {})[name] = param
    return blocks


def _dense(name: str, gradient: Tensor | None, param: Tensor) -> Tensor:
    if gradient is None:
        return param.new_zeros(param.numel())
    if gradient.layout is not torch.strided:
        raise GradientError(
            f"parameter {name!r}: gradients='stored' keeps dense gradients; found a sparse one"
            " (use sparse=False, or gradients='graph')",
            parameter=name,
        )
    return gradient.reshape(-1)


def _refuse_other_leaves(prediction: Tensor, aliases: dict[str, Tensor], pose: int) -> None:
    """Raise if something beside the parameters would get a gradient: its graph ends here."""
    known = {id(alias) for alias in aliases.values()}
    for leaf in _leaves(prediction):
        if id(leaf) not in known:
            raise GradientError(
                f"pose {pose}: its prediction depends on a tensor of shape {tuple(leaf.shape)} that"
                " requires grad and is no parameter of the pose model (an input, or a parameter"
                " that was not registered); gradients='stored' would lose its gradient:"
                " detach it, register it, or use gradients='graph'",
                pose=pose,
            )


def _leaves(root: Tensor) -> Iterator[Tensor]:
    """Yield the leaves of a graph that would receive a gradient."""
    if root.grad_fn is None:
        yield root
        return
    seen, stack = {root.grad_fn}, [root.grad_fn]
    while stack:
        node = stack.pop()
        if isinstance(node, _AccumulateGrad):
            yield node.variable  # type: ignore[attr-defined]
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append(parent)


# The class of the node that adds a gradient to a leaf has no public name.
_AccumulateGrad = type(
    torch.autograd.graph.get_gradient_edge(torch.empty((), requires_grad=True)).node
)


def _weighted_sum(
    weights: Tensor, buffers: Sequence[Tensor], *, shapes: Sequence[Shapes], names: Sequence[str]
) -> list[Tensor]:
    sums: dict[str, Tensor] = {}
    for buffer, block in zip(buffers, shapes, strict=True):
        sums |= _split(_weighted_rows(weights.to(buffer.device), buffer), block)
    return [sums[name] for name in names]


def _weighted_rows(weights: Tensor, buffer: Tensor) -> Tensor:
    if buffer.dtype != at_least_float32(buffer.dtype):  # a product would sum in half precision, too
        return sum_over_poses(weights, list(buffer), [buffer.dtype])[0]
    return weights.to(buffer.dtype) @ buffer


def _split(rows: Tensor, shapes: Shapes) -> dict[str, Tensor]:
    """Cut the last dimension into parameters: (..., P) to {name: (..., *shape)}."""
    parts = rows.split([shape.numel() for shape in shapes.values()], dim=-1)
    return {
        name: part.view(*rows.shape[:-1], *shape)
        for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }
