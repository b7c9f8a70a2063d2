"""What each mode of a multi-pose model would cost, measured on given poses."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from mtenn_core._engine.autograd_nodes import computes_anyway, operations
from mtenn_core._engine.module_tensors import Places, accelerators, lock_of
from mtenn_core.gradients import at_least_float32


class ModeCost(NamedTuple):
    """The bill of one training step in one mode.

    Attributes
    ----------
    gradients : the mode
    forwards, backwards : how often a chunk of poses is run each way
    memory : bytes, beside parameters and poses: graphs, stored gradients, the gradient itself
    """

    gradients: str
    forwards: int
    backwards: int
    memory: int


class PoseGraph(NamedTuple):
    """The graph of one pose.

    Attributes
    ----------
    saved, bare : bytes of the tensors that it saves, and of its nodes
    never_left_out : whether backward must run it even if its weight is zero
    """

    saved: float
    bare: float
    never_left_out: bool


# Bytes of a node with what the allocator adds and, in Python, the hooks for what it saves:
# measured with torch 2.13 on graphs of 6 to 300 nodes.
NODE = 1000


@dataclass(frozen=True)
class Estimate:
    """What :meth:`MultiPoseModel.estimate` found; ``print`` shows it as a table.

    Attributes
    ----------
    n_poses, n_with_weight : poses, and those whose weight in the combined prediction is not zero
    graph : bytes that the largest graph of one pose saves
    parameters : bytes of the trainable parameters
    free : bytes of memory that are free where the parameters are; None if that is not known
    modes : the bill of each mode that the combination allows
    best : the mode to take
    """

    n_poses: int
    n_with_weight: int
    graph: int
    parameters: int
    free: int | None
    modes: tuple[ModeCost, ...]
    best: str

    def __str__(self) -> str:
        free = "" if self.free is None else f"; {_size(self.free)} free"
        lines = [
            f"{self.n_poses} poses, {self.n_with_weight} with a weight that is not zero; the graph"
            f" of one: {_size(self.graph)}; parameters: {_size(self.parameters)}{free}",
            f"{'gradients':<12}{'forwards':>10}{'backwards':>11}{'memory':>10}",
        ]
        for mode in self.modes:
            take = "  <- take this" if mode.gradients == self.best else ""
            lines.append(
                f"{mode.gradients:<12}{mode.forwards:>10}{mode.backwards:>11}"
                f"{_size(mode.memory):>10}{take}"
            )
        return "\n".join(lines)


def measured(
    pose_model: torch.nn.Module, runs: Sequence[Callable[[], Tensor]]
) -> tuple[Tensor, list[PoseGraph]]:
    """Return the predictions of all poses, shape (n_poses,), and the graph of each.

    Nothing is saved, and buffers and random states stay as they are.

    Parameters
    ----------
    runs : each returns the predictions of some poses, which share the bytes of their graph
    """
    buffers = Places(pose_model, "buffers")
    copies = [buffer.clone() for buffer in buffers.tensors()]
    held = [*Places(pose_model, "parameters").tensors(), *copies]
    devices = accelerators(held)
    own = set(map(_address, held))
    predictions: list[Tensor] = []
    graphs: list[PoseGraph] = []
    with (
        lock_of(pose_model),
        buffers.holding(copies),
        torch.random.fork_rng(devices),
        torch.enable_grad(),
    ):
        for run in runs:
            prediction, saved = _run(run, own)
            predictions.append(prediction.detach())
            classes, n_poses = operations(prediction), len(prediction)
            never_left_out = any(map(computes_anyway, classes))
            bare = len(classes) * NODE
            graphs += [PoseGraph(saved / n_poses, bare / n_poses, never_left_out)] * n_poses
    return torch.cat(predictions), graphs


def _run(run: Callable[[], Tensor], without: Container[int]) -> tuple[Tensor, int]:
    """Return what ``run`` does, and how many bytes its graph would save."""
    sizes = _Sizes(without)
    try:
        with saved_tensors_hooks(sizes.add, _wanted):
            return run(), sizes.total
    except _Wanted:  # a pose model that takes gradients in its own forward
        sizes = _Sizes(without)
        with saved_tensors_hooks(sizes.add_and_keep, lambda tensor: tensor):
            return run(), sizes.total


class _Wanted(Exception):
    """Backward runs, and what its graph has saved is gone."""


def _wanted(_: int) -> Tensor:
    raise _Wanted


class _Sizes:
    """Adds up what a graph would save, and lets go of it."""

    def __init__(self, without: Container[int]) -> None:
        self.total = 0
        self._without = without
        self._seen: dict[int, StorageWeakRef] = {}

    def add(self, tensor: Tensor) -> int:
        storage, address = tensor.untyped_storage(), _address(tensor)
        known = self._seen.get(address)
        # Memory that was given back may be that of another tensor now.
        if address not in self._without and (known is None or known.expired()):
            self._seen[address] = StorageWeakRef(storage)
            self.total += storage.nbytes()
        return 0

    def add_and_keep(self, tensor: Tensor) -> Tensor:
        self.add(tensor)
        return tensor


def estimate(
    pose_model: torch.nn.Module,
    graphs: Sequence[PoseGraph],
    counts: Tensor,
    chunk_sizes: Mapping[str, int],
) -> Estimate:
    """Return the bill of each mode.

    Parameters
    ----------
    graphs : of each pose
    counts : which poses have a weight, shape (n_poses,), bool
    chunk_sizes : by mode, how many poses run together
    """
    params = [param for param in pose_model.parameters() if param.requires_grad]
    gradient = sum(param.nbytes for param in params)
    # Sums are of float32 at least.
    stored = sum(param.numel() * at_least_float32(param.dtype).itemsize for param in params)
    modes = tuple(
        _cost(mode, graphs, counts.tolist(), size, 2 * gradient, stored)
        for mode, size in chunk_sizes.items()
    )
    free = free_memory(counts.device)
    return Estimate(
        n_poses=len(graphs),
        n_with_weight=int(counts.sum()),
        graph=round(max(graph.saved for graph in graphs)),
        parameters=gradient,
        free=free,
        modes=modes,
        best=choose(modes, free),
    )


def _cost(
    mode: str,
    graphs: Sequence[PoseGraph],
    counts: Sequence[bool],
    chunk_size: int,
    gradient: int,
    stored: int,
) -> ModeCost:
    """Return the bill of one mode.

    Parameters
    ----------
    gradient : bytes of the gradient, and of the part of it that is added next
    stored : bytes of the stored gradient of a pose
    """
    runs = [count or graph.never_left_out for count, graph in zip(counts, graphs, strict=True)]
    starts = range(0, len(graphs), chunk_size)
    n_chunks, n_run = len(starts), sum(any(runs[i : i + chunk_size]) for i in starts)
    largest = max(sum(graph.saved for graph in graphs[i : i + chunk_size]) for i in starts)
    bare = sum(graph.bare for graph in graphs)
    if mode == "graph":
        saved = sum(graph.saved for graph in graphs)
        return ModeCost(mode, n_chunks, n_run, round(gradient + saved + bare))
    if mode == "stored":
        memory = gradient + largest + max(graph.bare for graph in graphs) + len(graphs) * stored
        return ModeCost(mode, n_chunks, n_chunks, round(memory))
    return ModeCost(mode, n_chunks + n_run, n_run, round(gradient + largest + bare))


def choose(modes: tuple[ModeCost, ...], free: int | None) -> str:
    """Return the fastest mode among those that take no more than half of the free memory."""
    fitting = [mode for mode in modes if free is None or mode.memory <= free / 2]
    if not fitting:
        return min(modes, key=lambda mode: mode.memory).gradients
    # A backward takes about twice as long as a forward.
    best = min(fitting, key=lambda mode: (mode.forwards + 2 * mode.backwards, mode.memory))
    return best.gradients


def free_memory(device: torch.device) -> int | None:
    """Return how many bytes are free on a device, None if that is not known."""
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
