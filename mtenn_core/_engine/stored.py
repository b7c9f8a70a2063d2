"""Mode ``"stored"``: it takes and keeps the gradient of each pose, with one graph at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from mtenn_core._engine.autograd_nodes import AccumulateGrad, computes_in
from mtenn_core._engine.call import Call
from mtenn_core._engine.cost import ModeCost, StepTotals
from mtenn_core._engine.evaluation import PoseGradients
from mtenn_core._engine.gradient_buffers import (
    Params,
    allocate,
    spare_memory,
    split_columns,
    weighted_sum,
)
from mtenn_core._engine.known_gradients import attach
from mtenn_core._engine.mode import Mode, Options
from mtenn_core._engine.module_tensors import Aliases, lock_of, sharded_part
from mtenn_core._engine.precision import no_autocast
from mtenn_core.combination import Combination
from mtenn_core.errors import GradientError

Run = Callable[[], Tensor]

# No loss scaler has multiplied the gradient of a single prediction. Its entries may be below 6e-8,
# the smallest float16, so the prediction is scaled first. The scale is a power of two, so that it
# changes no digit.
FLOAT16_SCALE = 2.0**16

NOT_IN_A_BATCH = (
    "gradients='stored' runs pose by pose and does not take one batch. Pass a list of poses, or use"
    " gradients='recomputed'."
)


class Stored(Mode):
    """The mode that keeps one gradient per pose and frees the graph of the pose."""

    name = "stored"
    needs_combine = False
    takes_batches = False

    def check_options(self, options: Options) -> None:
        if options.skip_below:
            raise ValueError(
                "gradients='stored' takes the gradient of a pose before its weight is known, and so"
                " it cannot skip poses. skip_below is only for 'recomputed' and 'graph'."
            )
        if options.chunk_size is not None and options.chunk_size > 1:
            raise ValueError(
                "gradients='stored' runs pose by pose, so that each pose has its own gradient."
                f" chunk_size must be 1 or None; found {options.chunk_size}"
            )

    def check_group(self, options: Options) -> None:
        if _needs_gradients(options.combination) and torch.is_grad_enabled():
            raise ValueError(
                f"{type(options.combination).__name__} overrides forward, which needs all gradients"
                " of a compound in one process. But group= shares the poses of a compound among"
                " several processes. Give one process the whole compound, or write"
                " combine(predictions) and use gradients='recomputed'."
            )

    def chunk_size(self, options: Options) -> int:
        return 1

    def predict(self, options: Options, call: Call) -> tuple[Tensor, PoseGradients | None]:
        needs_gradients = _needs_gradients(options.combination)
        runs = [chunk.run for chunk in call.chunks]
        if not torch.is_grad_enabled():
            return torch.cat([run() for run in runs]), _NoGradients() if needs_gradients else None
        if call.collated:
            raise ValueError(NOT_IN_A_BATCH)
        stored = StoredGradients(options.pose_model, runs)
        # A combination may keep the grad_dict that it gets, so its memory must not be used again.
        return stored.attach(reuse=not needs_gradients), stored if needs_gradients else None

    def cost(self, totals: StepTotals) -> ModeCost:
        graph = totals.largest_chunk + totals.largest_bare
        memory = totals.gradient + graph + totals.n_poses * totals.stored_gradient
        return ModeCost(self.name, totals.n_chunks, totals.n_chunks, round(memory))


def _needs_gradients(combination: Combination) -> bool:
    """Return whether a combination has its own ``forward``, which takes a ``grad_dict``."""
    return type(combination).forward is not Combination.forward


class _NoGradients:
    """An empty set of gradients, for calls under ``torch.no_grad``."""

    params: Params = MappingProxyType({})

    def grad_dict(self, poses: slice) -> dict[str, list[Tensor]]:
        return {}


class StoredGradients:
    """Pose predictions and ∂ŷ_i/∂θ, for every trainable parameter that at least one pose uses.

    Parameters
    ----------
    pose_model : the module that has the parameters θ
    runs : for each pose, a function that returns its prediction, shape (1,)

    Attributes
    ----------
    predictions : shape (n_poses,), detached
    params : the parameters by name

    Raises
    ------
    GradientError : the pose model is sharded, or a gradient would be lost
    """

    def __init__(self, pose_model: torch.nn.Module, runs: Sequence[Run]) -> None:
        if (sharded := sharded_part(pose_model)) is not None:
            # The hooks of a sharded module replace parameters in each run. They would not see the
            # gradients of aliases.
            raise GradientError(
                f"module {sharded!r} of the pose model is sharded over processes, and"
                " gradients='stored' needs whole parameters. Use gradients='recomputed' or 'graph',"
                " or shard the MultiPoseModel as one."
            )
        with lock_of(pose_model):
            # The pose model runs with aliases. So hooks on the parameters (from users,
            # DistributedDataParallel or FSDP) run only once, in the backward of the loss. With the
            # parameters themselves, the hooks would also run for each pose.
            own = Aliases(pose_model)
            self._aliases = own.aliases
            with own.in_place():
                self._spare = spare_memory(pose_model)
                self._buffers = allocate(own.params, len(runs), self._spare)
                for name, alias in self._aliases.items():
                    alias.register_post_accumulate_grad_hook(partial(_refuse_other_losses, name))
                used = self._run(runs)
        self.params = {name: param for name, param in own.params.items() if name in used}

    def attach(self, *, reuse: bool = True) -> Tensor:
        """Return the predictions as one differentiable vector, shape (n_poses,).

        Parameters
        ----------
        reuse : True if the next call may use the same memory after backward has read it
        """
        # The function gets the layouts and not this object. Backward frees only tensors that were
        # saved for backward, and this object would keep its buffers alive.
        total = partial(
            weighted_sum,
            layouts=[buffer.layout for buffer in self._buffers],
            names=list(self.params),
            spare=self._spare if reuse else {},
        )
        matrices = [buffer.matrix for buffer in self._buffers]
        return attach(self.predictions, matrices, total, list(self.params.values()))

    def grad_dict(self, poses: slice) -> dict[str, list[Tensor]]:
        """Return views of the gradients of some poses, for a combination's ``forward``."""
        views: dict[str, Tensor] = {}
        for buffer in self._buffers:
            views |= split_columns(buffer.matrix[poses], buffer.layout)
        return {name: list(views[name]) for name in self.params}

    def _run(self, runs: Sequence[Run]) -> set[str]:
        """Run all poses and store their gradients. Return the names of the used parameters."""
        inner = _InnerGradients(self._aliases)
        used: set[str] = set()
        predictions = []
        for pose, run in enumerate(runs):
            prediction = run()
            used |= self._store(pose, *inner.of(prediction, pose))
            # Clone the prediction, because a view would keep the tensor of its base alive.
            predictions.append(prediction.detach().clone())
        self.predictions = torch.cat(predictions)
        return used

    def _store(self, pose: int, gradients: dict[str, Tensor], scale: float) -> set[str]:
        """Write one row of gradients. Return the names of the used parameters."""
        for layout, matrix in self._buffers:
            row = [_flat(name, gradients.get(name), self._aliases[name]) for name in layout]
            torch.cat(row, out=matrix[pose])  # it converts half precision to float32
            if scale != 1:
                matrix[pose] /= scale
        return set(gradients)


class _InnerGradients:
    """Gradients of predictions with respect to aliases of the parameters."""

    def __init__(self, aliases: Params) -> None:
        self._aliases = aliases
        self._own = {id(alias) for alias in aliases.values()}
        # Nodes of aliases in the graphs of earlier poses. This set keeps them alive, so that each
        # alias has the same node in the graph of the next pose.
        self._known: set[Any] = set()
        # Both are set at the first pose.
        self._scale: float | None = None
        self._outside_autocast: AbstractContextManager[object] = nullcontext()

    def of(self, prediction: Tensor, pose: int) -> tuple[dict[str, Tensor], float]:
        """Return scale · ∂ŷ/∂θ for the parameters θ that affect ŷ, and the scale."""
        if not prediction.requires_grad:
            return {}, 1.0
        self._check_leaves(prediction, pose)
        gradients, scale = self._scaled(prediction)
        named = zip(self._aliases, gradients, strict=False)
        return {name: gradient for name, gradient in named if gradient is not None}, scale

    def _check_leaves(self, prediction: Tensor, pose: int) -> None:
        """Raise a GradientError if any leaf besides the aliases would get a gradient."""
        # nodes_of() is not used: this code runs for every pose and looks only for leaves.
        root = torch.autograd.graph.get_gradient_edge(prediction).node
        seen = {root}
        nodes = [root]
        for node in nodes:  # the loop also visits the nodes that it appends
            if type(node) is AccumulateGrad:
                self._check_leaf(node, pose)
            for parent, _ in node.next_functions:
                # None represents an input that needs no gradient.
                if parent is not None and parent not in seen and parent not in self._known:
                    seen.add(parent)
                    nodes.append(parent)

    def _check_leaf(self, node: Any, pose: int) -> None:
        if id(node.variable) in self._own:
            self._known.add(node)
            return
        raise GradientError(
            f"pose {pose}: the prediction depends on a tensor of shape"
            f" {tuple(node.variable.shape)} that requires grad and is not a parameter of the pose"
            " model. gradients='stored' would lose the gradient of this tensor. The tensor may be"
            " an input, a parameter that was not registered, or a parameter that is not read from"
            " its module. Reentrant checkpointing also makes such tensors. Detach the tensor,"
            " register it, or use gradients='graph'.",
            pose=pose,
        )

    def _scaled(self, prediction: Tensor) -> tuple[Sequence[Tensor | None], float]:
        """Return scale · ∂ŷ/∂θ for each parameter θ (None if it does not affect ŷ), and scale."""
        if self._scale is None:
            self._scale = FLOAT16_SCALE if computes_in(torch.float16, prediction) else 1.0
            device_type = prediction.device.type
            # Users call the backward of a loss after the autocast block, so do the same here.
            if torch.is_autocast_enabled(device_type):
                self._outside_autocast = no_autocast(device_type)
        params = list(self._aliases.values())
        scale = self._scale
        while params:
            with self._outside_autocast:
                gradients = torch.autograd.grad(
                    prediction * scale if scale > 1 else prediction,
                    params,
                    allow_unused=True,
                    retain_graph=scale > 1,  # another attempt may follow
                )
            if scale == 1 or all(g.isfinite().all() for g in gradients if g is not None):
                return gradients, scale
            scale /= 16
        return [], 1.0


def _flat(name: str, gradient: Tensor | None, param: Tensor) -> Tensor:
    """Return a gradient as a flat part of a row. Return zeros if there is no gradient."""
    if gradient is None:
        return param.new_zeros(param.numel())
    if gradient.layout is not torch.strided:
        raise GradientError(
            f"parameter {name!r}: gradients='stored' keeps only dense gradients; found a sparse"
            " one. Use sparse=False, or gradients='recomputed' or 'graph'.",
            parameter=name,
        )
    return gradient.flatten()


def _refuse_other_losses(name: str, alias: Tensor) -> None:
    """Raise an error: a loss has reached an alias, and its gradient would not reach the parameter.

    The inner ``torch.autograd.grad`` accumulates no gradients. So this hook runs only in the
    backward of a loss.
    """
    raise GradientError(
        f"parameter {name!r}: the loss uses a tensor from inside the pose model (for example, a"
        " stored penalty or an activation), not only its predictions. gradients='stored' would lose"
        " the gradient of that tensor. Compute it outside of the pose model, or use"
        " gradients='graph'.",
        parameter=name,
    )
