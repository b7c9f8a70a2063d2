"""Mode ``"stored"``: it takes and keeps the gradient of each pose, with one graph at a time.

The gradients are taken with respect to the parameters themselves, so that the pose model is exactly
the user's. Hooks on parameters belong to the backward of the loss; they are muted while the
gradient of a pose is taken.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from mtenn_core._engine.autograd_nodes import computes_in, is_compiled, muted_hooks
from mtenn_core._engine.call import Call
from mtenn_core._engine.columns import other_columns
from mtenn_core._engine.cost import ModeCost, StepTotals
from mtenn_core._engine.evaluation import PoseGradients
from mtenn_core._engine.gradient_buffers import (
    GradientBuffer,
    Memory,
    Params,
    Spare,
    allocate,
    split_columns,
    weighted_sum,
)
from mtenn_core._engine.known_gradients import attach
from mtenn_core._engine.mode import Mode, Options
from mtenn_core._engine.module_tensors import Leaves, lock_of, sharded_part
from mtenn_core._engine.plain_attributes import SIMPLE, KeptTensors
from mtenn_core._engine.precision import no_autocast
from mtenn_core._engine.shared_part import NO_GATE, NOTHING, Gate, Replaced, replaced, with_outputs
from mtenn_core._engine.skipping import join_chunks
from mtenn_core._torch_internals import (
    AccumulateGrad,
    current_transform,
    forward_ad_level,
    hooks_of,
    version_of,
)
from mtenn_core.combination import Combination
from mtenn_core.errors import GradientError

Run = Callable[[], Tensor]

# Each number of a pose takes one backward, and memory for one gradient.
MOST_COLUMNS = 16

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
    most_columns = MOST_COLUMNS

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
        at_full_depth = [type(c).__name__ for c in options.combinations if _needs_gradients(c)]
        if at_full_depth and torch.is_grad_enabled():
            raise ValueError(
                f"{at_full_depth[0]} overrides forward, which needs all gradients of a compound in"
                " one process. But group= shares the poses of a compound among several processes."
                " Give one process the whole compound, or write combine(predictions) and use"
                " gradients='recomputed'."
            )

    def chunk_size(self, options: Options) -> int:
        return 1

    def predict(self, options: Options, call: Call) -> tuple[Tensor, list[PoseGradients] | None]:
        needs_gradients = any(map(_needs_gradients, options.combinations))
        if not torch.is_grad_enabled():
            predictions = join_chunks([chunk.run() for chunk in call.chunks])
            n_columns = predictions.shape[1:].numel()
            nothing = [PoseGradients({}, dict)] * (len(call.sizes) * n_columns)
            return predictions, nothing if needs_gradients else None
        if call.collated:
            raise ValueError(NOT_IN_A_BATCH)
        if call.shared_outputs is None:
            parts = [StoredGradients(options.pose_model, [chunk.run for chunk in call.chunks])]
        else:
            parts = list(_by_compound(options.pose_model, call))
        # A combination may keep the grad_dict that it gets, so its memory must not be used again.
        vectors = [part.attach(reuse=not needs_gradients) for part in parts]
        predictions = vectors[0] if len(vectors) == 1 else torch.cat(vectors)
        if not needs_gradients:
            return predictions, None
        # Only a combination of one number per pose, or of one per task, overrides forward.
        n_columns = predictions.shape[1:].numel()
        return predictions, [
            of_compound
            for column in range(n_columns)
            for of_compound in _of_compounds(parts, call.sizes, column, n_columns)
        ]

    def cost(self, totals: StepTotals) -> ModeCost:
        graph = totals.largest_chunk + totals.largest_bare
        memory = totals.gradient + graph + totals.n_poses * totals.stored_gradient
        backwards = totals.n_chunks * totals.n_columns
        return ModeCost(self.name, totals.n_chunks, backwards, round(memory))


def _needs_gradients(combination: Combination) -> bool:
    """Return whether a combination has its own ``forward``, which takes a ``grad_dict``."""
    return type(combination).forward is not Combination.forward


def _by_compound(pose_model: torch.nn.Module, call: Call) -> Iterator[StoredGradients]:
    """Yield the gradients of each compound that has poses. Each has its own shared output."""
    assert call.shared_outputs is not None
    gate = Gate()
    outputs = [replaced(output, gate.through) for output in call.shared_outputs]
    runs = iter(with_outputs(call.chunks, [shared.output for shared in outputs], call))
    for shared, size in zip(outputs, call.sizes, strict=True):
        if size:
            own = [chunk.run for chunk in itertools.islice(runs, size)]
            yield StoredGradients(pose_model, own, shared, gate)


def _of_compounds(
    parts: Sequence[StoredGradients], sizes: Sequence[int], column: int, n_columns: int
) -> list[PoseGradients]:
    """Return the gradients of a column for each compound.

    Parameters
    ----------
    parts : the gradients of all compounds, or of one compound each
    """
    first = [n_columns * start for start in (0, *itertools.accumulate(sizes))]
    if len(parts) == 1:
        rows = [slice(start + column, end, n_columns) for start, end in itertools.pairwise(first)]
        return [PoseGradients(parts[0].params, partial(parts[0].grad_dict, own)) for own in rows]
    own = slice(column, None, n_columns)
    return [PoseGradients(part.params, partial(part.grad_dict, own)) for part in parts]


class StoredGradients:
    """Pose predictions and ∂ŷ_i/∂θ, for every trainable parameter that at least one pose uses.

    If a pose has several predictions, each has its own row of gradients. The rows of a pose follow
    one another.

    Parameters
    ----------
    pose_model : the module that has the parameters θ
    runs : for each pose, a function that returns its prediction, shape (1,) or (1, n_columns)
    shared, gate : the output of the shared part, whose tensors count as parameters, and the gate
        through which the runs get these tensors

    Attributes
    ----------
    predictions : shape (n_poses,) or (n_poses, n_columns), detached
    params : the parameters by name

    Raises
    ------
    GradientError : the pose model is sharded, a gradient would be lost, or a pose has too many
        predictions
    """

    def __init__(
        self,
        pose_model: torch.nn.Module,
        runs: Sequence[Run],
        shared: Replaced = NOTHING,
        gate: Gate = NO_GATE,
    ) -> None:
        if current_transform() is not None or forward_ad_level() >= 0:
            raise GradientError(
                "gradients='stored' does not work inside transforms of torch.func (grad, vjp, jvp,"
                " vmap) and forward-mode differentiation. Use gradients='graph'. For predictions"
                " without gradients, use torch.no_grad."
            )
        if (sharded := sharded_part(pose_model)) is not None:
            # The hooks of a sharded module replace parameters in each run. The gradients of those
            # parameters would be lost.
            raise GradientError(
                f"module {sharded!r} of the pose model is sharded over processes, and"
                " gradients='stored' needs whole parameters. Use gradients='recomputed' or 'graph',"
                " or shard the MultiPoseModel as one."
            )
        own = Leaves(pose_model)
        lock = lock_of(pose_model)
        in_place = own.in_place()
        kept = KeptTensors(pose_model.modules())
        params = own.params | shared.tensors
        self._spare: Spare = {}
        self._buffers: list[GradientBuffer] = []
        memory = partial(allocate, pose_model, params, len(runs))
        with in_place:
            self._inner = _InnerGradients(own.leaves, shared.replacements, gate, kept, lock)
            self.predictions = torch.cat([self._store(*each, memory) for each in enumerate(runs)])
        used = self._inner.used
        self.params = {name: param for name, param in params.items() if name in used}

    def attach(self, *, reuse: bool = True) -> Tensor:
        """Return the predictions as one differentiable tensor, in their shape.

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

    def grad_dict(self, rows: slice) -> dict[str, list[Tensor]]:
        """Return views of some rows of gradients, for a combination's ``forward``."""
        views: dict[str, Tensor] = {}
        for buffer in self._buffers:
            views |= split_columns(buffer.matrix[rows], buffer.layout)
        return {name: list(views[name]) for name in self.params}

    def _store(self, pose: int, run: Run, memory: Callable[[int], Memory]) -> Tensor:
        """Run a pose and write its rows of gradients. Return its prediction, detached.

        The graph of the pose is freed here, unless the pose model keeps a part of it.

        Parameters
        ----------
        memory : returns the memory for all rows. It gets the number of predictions per pose, which
            the first pose shows.
        """
        prediction = run()
        # A view of each number would add a node to the graph.
        numbers = [prediction] if prediction.dim() == 1 else list(prediction[0])
        if pose == 0:
            if len(numbers) > MOST_COLUMNS:
                raise GradientError(_TOO_MANY.format(len(numbers)), pose=pose)
            self._spare, self._buffers = memory(len(numbers))
            self._n_numbers = len(numbers)
        if len(numbers) != self._n_numbers:
            raise other_columns(pose, len(numbers), self._n_numbers)
        for column, number in enumerate(numbers):
            more = column + 1 < len(numbers)
            gradients, scale = self._inner.of(number, pose, retains=more)
            row = pose * len(numbers) + column
            for layout, matrix in self._buffers:
                parts = [_flat(n, gradients.get(n), self._inner.inputs[n]) for n in layout]
                torch.cat(parts, out=matrix[row])  # it converts half precision to float32
                if scale != 1:
                    matrix[row] /= scale
        # Clone the prediction, because a view would keep the tensor of its base alive.
        return prediction.detach().clone()


class _InnerGradients:
    """Gradients of predictions with respect to the parameters.

    Parameters
    ----------
    leaves : the parameters by name; all are leaves of autograd's graphs
    shared : the tensors from the shared part by name, behind the gate
    gate : is closed while a gradient is taken
    kept : tells whether the pose model keeps a part of its graph
    lock : hold it while hooks are muted

    Attributes
    ----------
    inputs : the parameters and the tensors from the shared part
    used : the names of the parameters that affect any prediction
    """

    def __init__(
        self,
        leaves: Params,
        shared: Params,
        gate: Gate,
        kept: KeptTensors,
        lock: AbstractContextManager[object],
    ) -> None:
        self.inputs = {**leaves, **shared}
        self.used: set[str] = set()
        self._leaves = list(leaves.values())
        self._ends = {get_gradient_edge(tensor).node for tensor in shared.values()}
        self._gate = gate
        self._kept = kept
        self._lock = lock
        self._own = {id(leaf) for leaf in leaves.values()}
        # Nodes of leaves in the graphs of earlier poses, and the version of each leaf. This dict
        # keeps the nodes alive, so that each leaf has the same node in the graph of the next pose.
        self._known: dict[Any, int] = {}
        self._takes_several = False
        # Both are set at the first pose.
        self._scale: float | None = None
        self._outside_autocast: AbstractContextManager[object] = nullcontext()

    def of(
        self, prediction: Tensor, pose: int, *, retains: bool = False
    ) -> tuple[dict[str, Tensor], float]:
        """Return scale · ∂ŷ/∂θ for the parameters θ that affect ŷ, and the scale.

        Parameters
        ----------
        retains : True if the graph of the pose must stay whole for another prediction
        """
        if not prediction.requires_grad:
            return {}, 1.0
        node_classes = self._check_nodes(prediction, pose)
        self._search_for_kept_tensors()
        # If the pose model keeps a part of the graph (a penalty, a receptor that all poses share),
        # it must stay whole. Otherwise, memory shrinks during the backward.
        self._takes_several |= retains
        retains |= self._kept.found or bool(self._ends)
        compiled = any(map(is_compiled, node_classes))
        if compiled and self._takes_several:
            raise GradientError(f"pose {pose}: {_COMPILED}", pose=pose)
        self._gate.closed = True
        try:
            gradients, scale = self._scaled(prediction, retains, compiled)
        except RuntimeError as error:
            if "backward through the graph a second time" not in str(error):
                raise
            raise GradientError(f"pose {pose}: {_FREED}", pose=pose) from error
        finally:
            self._gate.closed = False
        named = zip(self.inputs, gradients, strict=False)
        found = {name: gradient for name, gradient in named if gradient is not None}
        self.used.update(found)
        return found, scale

    def _search_for_kept_tensors(self) -> None:
        """Find out whether the pose model keeps a tensor of this pose or of an earlier one."""
        kept = self._kept
        # Most modules have only numbers, before and after a run. So each pose needs only this test.
        types = {type(held[name]) for held, name in kept.places if name in held}
        is_known = list(map(len, kept.owned)) == kept.lengths and types <= SIMPLE
        if not kept.found and not is_known:
            kept.search()

    def _check_nodes(self, prediction: Tensor, pose: int) -> set[type]:
        """Return the classes of a graph's nodes. Raise an error if a gradient would be lost."""
        # nodes_of() is not used: this code runs for every pose and looks only for leaves.
        root = get_gradient_edge(prediction).node
        if type(root) is AccumulateGrad:
            self._check_leaf(root, pose)
            return set()
        seen = {root, *self._ends}
        nodes = [] if root in self._ends else [root]
        for node in nodes:  # the loop also visits the nodes that it appends
            for parent, _ in node.next_functions:
                # None represents an input that needs no gradient.
                if parent is None or parent in seen:
                    continue
                if type(parent) is not AccumulateGrad:
                    seen.add(parent)
                    nodes.append(parent)
                    continue
                if parent not in self._known:
                    self._check_leaf(parent, pose)
                # torch keeps this dict as long as the node. If the pose model keeps the node until
                # the parameter changes, the gradient belongs to the old value. torch itself does
                # not notice this, because the graphs are retained.
                version = self._known[parent]
                metadata: Any = node.metadata
                if metadata.setdefault(parent, version) != version:
                    raise GradientError(f"pose {pose}: {_OLD}", pose=pose)
        return set(map(type, nodes))

    def _check_leaf(self, node: Any, pose: int) -> None:
        """Raise a GradientError if a leaf is not a parameter of the pose model."""
        if id(node.variable) in self._own:
            self._known[node] = version_of(node.variable)
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

    def _muted(self) -> AbstractContextManager[object]:
        """Return a context in which the parameters' hooks do not run."""
        # The dict of hooks is not None if another thread has muted the hooks.
        hooked = [leaf for leaf in self._leaves if hooks_of(leaf) is not None]
        return muted_hooks(hooked, self._lock) if hooked else nullcontext()

    def _scaled(
        self, prediction: Tensor, retains: bool, compiled: bool
    ) -> tuple[Sequence[Tensor | None], float]:
        """Return scale · ∂ŷ/∂θ for each parameter θ (None if it does not affect ŷ), and scale.

        Parameters
        ----------
        retains : True if the graph must stay whole
        compiled : True if a part of the graph belongs to a compiled module, which cannot stay whole
        """
        if self._scale is None:
            self._scale = FLOAT16_SCALE if computes_in(torch.float16, prediction) else 1.0
            device_type = prediction.device.type
            # Users call the backward of a loss after the autocast block, so do the same here.
            if torch.is_autocast_enabled(device_type):
                self._outside_autocast = no_autocast(device_type)
        inputs = list(self.inputs.values())
        scale = self._scale
        while inputs:
            with self._outside_autocast, self._muted():
                gradients = torch.autograd.grad(
                    prediction * scale if scale > 1 else prediction,
                    inputs,
                    allow_unused=True,
                    retain_graph=(retains or scale > 1) and not compiled,  # or for a smaller scale
                )
            if scale == 1 or all(g.isfinite().all() for g in gradients if g is not None):
                return gradients, scale
            if compiled:
                raise GradientError(_OVERFLOW)
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


_FREED = (
    "the prediction uses a part of a graph that an earlier backward has freed, such as a receptor"
    " that the pose model embedded for another pose. Give the part that all poses of a compound"
    " share to MultiPoseModel as shared=…, or use gradients='graph'."
)
_OLD = (
    "the pose model uses a tensor that it computed before a parameter changed (for example, in an"
    " optimizer's step). Its gradient would belong to the old value. Compute the tensor again in"
    " each call. If all poses of a compound use it, give its module to MultiPoseModel as shared=…."
    " If the value has not changed, use gradients='graph'."
)
_TOO_MANY = (
    "gradients='stored' takes one backward for each number of a pose, and keeps its gradient."
    f" It takes at most {MOST_COLUMNS} numbers per pose; found {{}}. Use gradients='recomputed',"
    " whose memory does not grow with them."
)
_COMPILED = (
    "the pose model is compiled, and a compiled module cannot repeat its backward for another"
    " number of the pose. Use gradients='recomputed' or 'graph'."
)
_OVERFLOW = (
    "a gradient of the compiled pose model overflows in float16, and a compiled module cannot"
    " repeat its backward with another scale. Use gradients='recomputed' or 'graph', or bfloat16."
)
