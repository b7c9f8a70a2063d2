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

from mtenn_core._module_state import Places, accelerators, lock_of


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


@dataclass(frozen=True)
class Estimate:
    """What :meth:`MultiPoseModel.estimate` found; ``print`` shows it as a table.

    Attributes
    ----------
    n_poses, n_with_weight : poses, and those whose weight in the combined prediction is not zero
    graph : bytes of the largest graph of one pose
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
) -> tuple[Tensor, list[float]]:
    """Return the predictions of all poses, shape (n_poses,), and the bytes of each one's graph.

    Nothing is saved, and buffers and random states stay as they are.

    Parameters
    ----------
    runs : each returns the predictions of some poses, which share the bytes of their graph
    """
    buffers = Places(pose_model, "buffers")
    copies = [buffer.clone() for buffer in buffers.tensors()]
    devices = accelerators([*pose_model.parameters(), *copies])
    own = {_address(tensor) for tensor in (*pose_model.parameters(), *copies)}
    predictions: list[Tensor] = []
    graphs: list[float] = []
    with (
        lock_of(pose_model),
        buffers.holding(copies),
        torch.random.fork_rng(devices),
        torch.enable_grad(),
    ):
        for run in runs:
            sizes = _Sizes(own)
            try:
                with saved_tensors_hooks(sizes.add, _wanted):
                    predictions.append(run().detach())
            except _Wanted:  # a pose model that takes gradients in its own forward
                sizes = _Sizes(own)
                with saved_tensors_hooks(sizes.add_and_keep, lambda tensor: tensor):
                    predictions.append(run().detach())
            n_poses = len(predictions[-1])
            graphs += [sizes.total / n_poses] * n_poses
    return torch.cat(predictions), graphs


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
    graphs: Sequence[float],
    counts: Tensor,
    chunk_sizes: Mapping[str, int],
) -> Estimate:
    """Return the bill of each mode.

    Parameters
    ----------
    graphs : bytes of the graph of each pose
    counts : which poses have a weight, shape (n_poses,), bool
    chunk_sizes : by mode, how many poses run together
    """
    params = [param for param in pose_model.parameters() if param.requires_grad]
    gradient = sum(param.nbytes for param in params)
    modes = tuple(_cost(mode, graphs, counts, size, gradient) for mode, size in chunk_sizes.items())
    free = free_memory(counts.device)
    return Estimate(
        n_poses=len(graphs),
        n_with_weight=int(counts.sum()),
        graph=round(max(graphs)),
        parameters=gradient,
        free=free,
        modes=modes,
        best=choose(modes, free),
    )


def _cost(
    mode: str, graphs: Sequence[float], counts: Tensor, chunk_size: int, gradient: int
) -> ModeCost:
    chunks = [sum(graphs[i : i + chunk_size]) for i in range(0, len(graphs), chunk_size)]
    with_weight = sum(bool(part.any()) for part in counts.split(chunk_size))
    # The gradient, and the part of it that is added next.
    memory = 2 * gradient
    if mode == "graph":
        return ModeCost(mode, len(chunks), with_weight, memory + round(sum(chunks)))
    if mode == "stored":
        stored = len(graphs) * gradient
        return ModeCost(mode, len(chunks), len(chunks), memory + round(max(chunks)) + stored)
    return ModeCost(mode, len(chunks) + with_weight, with_weight, memory + round(max(chunks)))


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
