"""The estimated cost of a training step in each mode, measured on given poses."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from mtenn_core._engine.autograd_nodes import computes_anyway, operations
from mtenn_core._engine.call import Call, checked_call, total_sizes
from mtenn_core._engine.chunk import Chunk
from mtenn_core._engine.compounds import (
    combine_compounds,
    weights_of_compounds,
    weights_of_tasks,
)
from mtenn_core._engine.cost import ModeCost, PoseGraph, step_totals
from mtenn_core._engine.declarations import overrides
from mtenn_core._engine.evaluation import PoseInputs, inputs_like
from mtenn_core._engine.mode import GradientMode, Mode, Options
from mtenn_core._engine.mode_table import MODES
from mtenn_core._engine.module_tensors import Places, accelerators, copied, lock_of
from mtenn_core._engine.plain_attributes import attributes_kept
from mtenn_core._engine.precision import at_least_float32
from mtenn_core._engine.shared_part import replaced, with_outputs
from mtenn_core._engine.skipping import with_weight
from mtenn_core._engine.stored import NOT_IN_A_BATCH
from mtenn_core._process.html_table import html_table
from mtenn_core._torch_internals import weak_reference

# Bytes of one node. They include the allocator's overhead and the Python hooks for saved tensors.
# Measured with torch 2.13 on graphs of 6 to 300 nodes.
NODE = 1000

_COLUMNS = ("gradients", "forwards", "backwards", "memory", "")


@dataclass(frozen=True)
class Estimate:
    """The result of :meth:`MultiPoseModel.estimate`. Notebooks and ``print`` show it as a table.

    Attributes
    ----------
    n_poses : number of poses
    n_with_weight : number of poses with nonzero weight in the combined prediction
    graph : bytes that the largest graph of one pose saves
    parameters : bytes of the trainable parameters
    free : bytes of free memory on the device of the parameters; None if unknown
    modes : the cost of each mode that works with the combination
    best : the recommended mode
    """

    n_poses: int
    n_with_weight: int
    graph: int
    parameters: int
    free: int | None
    modes: tuple[ModeCost, ...]
    best: GradientMode

    def __str__(self) -> str:
        rows = [
            f"{gradients:<12}{forwards:>10}{backwards:>11}{memory:>10}  {advice}".rstrip()
            for gradients, forwards, backwards, memory, advice in [_COLUMNS, *self._rows()]
        ]
        return "\n".join([self._summary(), *rows])

    def _repr_html_(self) -> str:
        return html_table(self._summary(), _COLUMNS, self._rows())

    def _summary(self) -> str:
        free = "" if self.free is None else f"; {_size(self.free)} free"
        return (
            f"{self.n_poses} poses, {self.n_with_weight} with a weight that is not zero; the graph"
            f" of one: {_size(self.graph)}; parameters: {_size(self.parameters)}{free}"
        )

    def _rows(self) -> list[tuple[str, int, int, str, str]]:
        """Return the row of each mode in the table."""
        return [
            (*mode[:3], _size(mode.memory), "<- take this" if mode.gradients == self.best else "")
            for mode in self.modes
        ]


def estimate(
    options: Options,
    poses: Iterable[Any],
    sizes: Sequence[int] | Tensor | None,
    pose_inputs: Mapping[str, Any] | None,
    shared_inputs: Sequence[Any] | None,
    collated: bool,
) -> Estimate:
    """Return the cost of a training step on some poses in each mode.

    Parameters
    ----------
    options : the options of the model
    poses, sizes, pose_inputs, shared_inputs, collated : see
        :meth:`mtenn_core.MultiPoseModel.estimate`
    """
    chunk_size = MODES[options.gradients].chunk_size(options)
    call = checked_call(options, chunk_size, poses, sizes, pose_inputs, shared_inputs, collated)
    n_poses = total_sizes(options.combinations, [call.sizes], sizes)
    predictions, graphs, shared = _measure(options, call)
    modes = _possible_modes(options, collated, predictions.shape[1:].numel())
    inputs = inputs_like(predictions, call.inputs)
    weights = loss_weights(options, predictions, inputs, n_poses)
    has_weight = with_weight(weights, options.skip_below).tolist()
    modules = torch.nn.ModuleList(filter(None, (options.pose_model, options.shared)))
    params = [param for param in modules.parameters() if param.requires_grad]
    gradient = sum(param.nbytes for param in params)
    of_pose_model = [param for param in options.pose_model.parameters() if param.requires_grad]
    n_columns = predictions.shape[1:].numel()
    stored = n_columns * (sum(map(_stored_bytes, of_pose_model)) + shared.largest_output)
    costs = []
    for mode in modes:
        size = (None if collated else mode.chunk_size(options)) or len(graphs)
        # Count the gradient twice, because the next one needs memory until it is added.
        cost = mode.cost(step_totals(graphs, has_weight, size, 2 * gradient, stored, n_columns))
        costs.append(cost._replace(memory=cost.memory + shared.saved))
    free = free_memory(weights.device)
    return Estimate(
        n_poses=len(graphs),
        n_with_weight=sum(has_weight),
        graph=round(max(graph.saved for graph in graphs)),
        parameters=gradient,
        free=free,
        modes=tuple(costs),
        best=choose(costs, free),
    )


def loss_weights(
    options: Options, predictions: Tensor, inputs: PoseInputs, sizes: list[int]
) -> Tensor:
    """Return the weights of all poses in a loss, in the shape of ``predictions``.

    If a combined prediction is a vector, the loss is a sum with a different factor for each number.
    """
    given = predictions, inputs, sizes
    if options.tasks is not None:
        return weights_of_tasks(options.combinations, *given)
    (combination,) = options.combinations
    if combination.pose_columns is None:
        return weights_of_compounds(combination, *given)
    with torch.enable_grad():
        y = predictions.detach().clone().requires_grad_()
        values = combine_compounds(combination, y, inputs, sizes, closed_form=False)
        factors = torch.linspace(1, 2, values.numel(), dtype=values.dtype, device=values.device)
        (weights,) = torch.autograd.grad(values.flatten() @ factors, y)
    return weights


def _possible_modes(options: Options, collated: bool, n_columns: int) -> list[Mode]:
    """Return the modes that work with combinations, columns and, if ``collated``, one batch."""
    has_combine = all(overrides(type(each), "combine") for each in options.combinations)
    modes = [
        mode
        for mode in MODES.values()
        if (has_combine or not mode.needs_combine)
        and (mode.takes_batches or not collated)
        and n_columns <= (mode.most_columns or n_columns)
    ]
    if not modes:
        raise ValueError(NOT_IN_A_BATCH)
    return modes


class _SharedGraphs(NamedTuple):
    """The graphs of the shared part: their bytes, and the bytes of a stored output gradient."""

    saved: int = 0
    largest_output: int = 0


def _measure(options: Options, call: Call) -> tuple[Tensor, list[PoseGraph], _SharedGraphs]:
    """Return the predictions of all poses, shape (n_poses, …), and the graph of each.

    The graphs do not keep their saved tensors. At the end, buffers, plain attributes of modules and
    random states are restored. The bytes of a chunk's graph are divided equally among its poses.
    """
    modules = [*options.pose_model.modules(), *(options.shared.modules() if options.shared else ())]
    buffers = Places(modules, "buffers")
    copies = list(map(copied, buffers.now()))
    held = Places(modules, "parameters").tensors()
    held += [place.tensor for place in copies if place.tensor is not None]
    own = set(map(_address, held))
    predictions: list[Tensor] = []
    graphs: list[PoseGraph] = []
    with (
        lock_of(options.pose_model),
        buffers.holding(copies),
        attributes_kept(map(vars, modules)),
        torch.random.fork_rng(accelerators(held)),
        torch.enable_grad(),
    ):
        chunks, shared = _measure_shared(options.shared, call, own)
        for chunk in chunks:
            prediction, saved = _run_and_measure(chunk.run, own)
            predictions.append(prediction.detach())
            classes, n_poses = operations(prediction), len(prediction)
            never_skipped = any(map(computes_anyway, classes))
            bare = len(classes) * NODE
            graphs += [PoseGraph(saved / n_poses, bare / n_poses, never_skipped)] * n_poses
    return torch.cat(predictions), graphs, shared


def _measure_shared(
    shared: torch.nn.Module | None, call: Call, own: set[int]
) -> tuple[list[Chunk], _SharedGraphs]:
    """Run the shared part. Return the chunks with its outputs, and the bytes of its graphs.

    Parameters
    ----------
    own : addresses of tensors that are not counted. The outputs are added.
    """
    if shared is None or call.shared_inputs is None:
        return call.chunks, _SharedGraphs()
    saved, outputs = 0, []
    for given in call.shared_inputs:
        output, of_graph = _run_and_measure(partial(shared, given), own)
        saved += of_graph
        outputs.append(replaced(output, _leaf))
    tensors = [list(output.replacements.values()) for output in outputs]
    own |= {_address(tensor) for of_output in tensors for tensor in of_output}
    largest = max(sum(map(_stored_bytes, of_output)) for of_output in tensors)
    chunks = with_outputs(call.chunks, [output.output for output in outputs], call)
    return chunks, _SharedGraphs(saved, largest)


def _leaf(tensor: Tensor) -> Tensor:
    """Return the tensor without its graph, which does not belong to the graphs of poses."""
    return tensor.detach().requires_grad_()


def _stored_bytes(tensor: Tensor) -> int:
    """Return the bytes of a stored gradient. In half precision it is stored in float32."""
    return tensor.numel() * at_least_float32(tensor.dtype).itemsize


def _run_and_measure(run: Callable[[], Any], without: Container[int]) -> tuple[Any, int]:
    """Return the result of ``run``, and the number of bytes that its graph would save.

    Parameters
    ----------
    without : addresses of tensors that are not counted
    """
    sizes = _Sizes(without)
    try:
        # The hooks replace each saved tensor by 0, so that the graph keeps nothing alive.
        with saved_tensors_hooks(sizes.add, _raise):
            return run(), sizes.total
    except _BackwardRuns:  # the pose model takes gradients in its own forward
        sizes = _Sizes(without)
        with saved_tensors_hooks(sizes.add_and_keep, lambda tensor: tensor):
            return run(), sizes.total


class _BackwardRuns(Exception):
    """Backward needs a saved tensor, but the tensor was not kept."""


def _raise(_: int) -> Tensor:
    raise _BackwardRuns


class _Sizes:
    """A counter of the bytes that a graph would save."""

    def __init__(self, without: Container[int]) -> None:
        self.total = 0
        self._without = without
        self._seen: dict[int, Any] = {}

    def add(self, tensor: Tensor) -> int:
        storage, address = tensor.untyped_storage(), _address(tensor)
        known = self._seen.get(address)
        # Count shared memory once. After memory is freed, another tensor may use its address.
        if address not in self._without and (known is None or known.expired()):
            self._seen[address] = weak_reference(storage)
            self.total += storage.nbytes()
        return 0

    def add_and_keep(self, tensor: Tensor) -> Tensor:
        self.add(tensor)
        return tensor


def choose(modes: Sequence[ModeCost], free: int | None) -> GradientMode:
    """Return the fastest mode that needs at most half of the free memory."""
    fitting = [mode for mode in modes if free is None or mode.memory <= free / 2]
    if not fitting:
        return min(modes, key=lambda mode: mode.memory).gradients
    # A backward takes about twice as long as a forward.
    best = min(fitting, key=lambda mode: (mode.forwards + 2 * mode.backwards, mode.memory))
    return best.gradients


def free_memory(device: torch.device) -> int | None:
    """Return the number of free bytes on a device, or None if it is unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            found = dict(line.split(":", 1) for line in lines)
        return int(found["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        try:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, OSError, ValueError):
            return None


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _size(nbytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"
