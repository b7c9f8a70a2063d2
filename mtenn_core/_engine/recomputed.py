"""Mode ``"recomputed"``: graphs save no tensors in forward. In backward, poses run a second time.

Every chunk of poses has its ordinary graph, so that hooks, inputs that require grad and distributed
wrappers work as usual. But the graph does not keep its saved tensors. When backward needs one of
them, the chunk runs a second time, and this run provides all of them.
"""

from __future__ import annotations

import itertools
import sys
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from mtenn_core._engine.autograd_nodes import (
    current_backward,
    engine_asks,
    is_leaf,
    nodes_of,
    sequence_number,
    version_of,
)
from mtenn_core._engine.call import Call
from mtenn_core._engine.chunk import Chunk
from mtenn_core._engine.cost import ModeCost, StepTotals
from mtenn_core._engine.fingerprint import difference
from mtenn_core._engine.mode import Mode, Options, check_has_combine
from mtenn_core._engine.replay import Replay, Run
from mtenn_core._engine.skipping import join_chunks
from mtenn_core.errors import ChangedBeforeBackwardError, GradientError, MtennError


class Recomputed(Mode):
    """The mode that keeps only predictions and, in backward, runs poses with weight again."""

    name = "recomputed"

    def check_options(self, options: Options) -> None:
        check_has_combine(options)

    def check_group(self, options: Options) -> None:
        """Accept all groups, because each process takes the gradients of its own poses."""

    def chunk_size(self, options: Options) -> int:
        return options.chunk_size or 1

    def predict(self, options: Options, call: Call) -> tuple[Tensor, None]:
        if not torch.is_grad_enabled():
            return torch.cat([chunk.run() for chunk in call.chunks]), None
        graphs = RecomputedGraphs(options.pose_model, call.poses, call.shared_outputs or ())
        return graphs.predict(call.chunks, options.skip_below), None

    def cost(self, totals: StepTotals) -> ModeCost:
        memory = totals.gradient + totals.largest_chunk + totals.bare
        forwards = totals.n_chunks + totals.n_chunks_run
        return ModeCost(self.name, forwards, totals.n_chunks_run, round(memory))


# A tensor that a run saves for backward, detached, and its version in the run. torch does not check
# tensors that hooks saved.
Saved = tuple[Tensor, int]


# For a small pose, a comparison of saved tensors takes up to a third of the time. A pose model that
# does not repeat itself usually shows this at once. So all poses are compared until the runs have
# agreed in a few calls, and later one pose in ONE_IN. Predictions are always compared.
FEW_CALLS = 3
ONE_IN = 16


@dataclass
class Record:
    """The number of calls of a pose model, and the number of calls in which its runs agreed."""

    n_calls: int = 0
    n_agreed: int = 0

    def compared(self, n_chunks: int) -> list[bool]:
        """Return for each chunk of a call whether the saved tensors of its runs are compared."""
        everything = self.n_agreed < FEW_CALLS
        return [everything or (index + self.n_calls) % ONE_IN == 0 for index in range(n_chunks)]


_RECORDS: WeakKeyDictionary[torch.nn.Module, Record] = WeakKeyDictionary()


class Numbering:
    """The numbers of the tensors that a run saves for backward.

    Parameters
    ----------
    keeps_tensors : True if the tensors are needed at the end of the run

    Attributes
    ----------
    hook : returns the next number. It is called for each saved tensor.
    count : gives the next number
    tensors : the saved tensors, if they are kept
    """

    def __init__(self, keeps_tensors: bool) -> None:
        self.count = itertools.count()
        self.tensors: list[Tensor] = []
        # partial and count are fast: they run no Python code.
        keep = partial(_keep_and_number, self.tensors, self.count)
        self.hook: Callable[[Tensor], int] = keep if keeps_tensors else partial(next, self.count)


def _keep_and_number(tensors: list[Tensor], count: Iterator[int], tensor: Tensor) -> int:
    tensors.append(tensor)
    return next(count)


class RecomputedGraphs:
    """The graphs of all chunks of one forward call. At most one graph has its saved tensors.

    Parameters
    ----------
    pose_model : the module that the chunks run
    poses, shared : the inputs of all chunks

    Attributes
    ----------
    lock : a lock that is held while a chunk runs again
    """

    def __init__(
        self, pose_model: torch.nn.Module, poses: Sequence[Any], shared: Sequence[Any]
    ) -> None:
        self._replay = Replay(pose_model, poses, shared)
        self.lock = self._replay.lock
        # The graphs of chunks refer to this object. Only the graph of the predictions owns these
        # graphs. If this object also owned one of them, there would be a reference cycle, and
        # memory would stay until the garbage collector runs. So this is a weak reference.
        self._last: Callable[[], RecomputedGraph | None] = lambda: None
        self._record = _RECORDS.setdefault(pose_model, Record())
        self._record.n_calls += 1
        self._agreed = False  # True after the first comparison
        self._ends: list[int] = []  # for each chunk, the number of the last node of its graph
        self._kept: list[int] = []  # the numbers of nodes that the pose model keeps
        self._kept_in: int | None = None  # the backward for which they were found

    def predict(self, chunks: Sequence[Chunk], skip_below: float | None) -> Tensor:
        """Run all chunks and return their predictions. The graphs save no tensors.

        Parameters
        ----------
        skip_below : see :func:`join_chunks`

        Returns
        -------
        shape (n_poses,)
        """
        compared = self._record.compared(len(chunks))
        graphs = list(map(partial(RecomputedGraph, self), chunks, itertools.count(), compared))
        predictions = []
        try:
            for graph in graphs:
                # Set this before the run. If a pose model takes gradients in its own forward, the
                # second run starts before the first run ends.
                graph.first_run = self._replay.before_run()
                with saved_tensors_hooks(graph.numbering.hook, graph.saved_again):
                    prediction = graph.chunk.run()
                self._replay.after_run(
                    graph.first_run,
                    prediction,
                    next(graph.numbering.count),
                    graph.numbering.tensors if graph.is_compared else None,
                )
                graph.numbering.tensors.clear()
                predictions.append(prediction)
                root = prediction.grad_fn
                self._ends.append(sequence_number(root) if root else (self._ends or [-1])[-1])
            self._replay.after_forward(list(map(attrgetter("first_run"), graphs)))
        except RuntimeError as error:
            if "saved tensor hooks" not in str(error):
                raise
            raise GradientError(
                "gradients='recomputed' does not work with grad, vjp and jacrev of torch.func,"
                " around the model or inside the pose model. Use gradients='graph'."
            ) from error
        return join_chunks(predictions, graphs, skip_below)

    def is_kept(self, index: int) -> bool:
        """Return whether the pose model keeps a tensor that a chunk computed, with its graph.

        Parameters
        ----------
        index : the number of the chunk
        """
        if self._kept_in != current_backward():
            self._kept_in = current_backward()
            roots = [tensor.grad_fn for tensor in self._replay.kept_tensors()]
            nodes = {node for root in roots for node in nodes_of(root) if not is_leaf(node)}
            self._kept = sorted(map(sequence_number, nodes))
        # A forward hook may compute a penalty after the prediction, so look beyond the last node.
        begin = self._ends[index - 1] if index else -1
        end = self._ends[index + 1] if index + 1 < len(self._ends) else sys.maxsize
        return bisect_right(self._kept, begin) < bisect_right(self._kept, end)

    def run_again(self, graph: RecomputedGraph) -> list[Saved]:
        """Return all tensors that a graph would have saved."""
        # Backward goes through the chunks one after the other. Here, it has finished the previous
        # chunk. Free the unused tensors of that chunk.
        if (last := self._last()) is not None:
            last.forget()
        self._last = weakref.ref(graph)
        tensors: list[Tensor] = []
        saved: list[Saved] = []

        def keep(tensor: Tensor) -> Tensor:
            # Detach the tensor, so that the second graph is freed at once. No backward needs that
            # graph.
            detached = tensor.detach()
            tensors.append(tensor)
            saved.append((detached, version_of(detached)))
            return detached

        versions = self._replay.versions()
        # Backward runs with grad mode off. The second run needs grad mode to save tensors.
        with (
            self._replay.restored(graph.first_run),
            torch.enable_grad(),
            saved_tensors_hooks(keep, _unchanged),
        ):
            predictions = graph.run_again()
        self._replay.check_parameters(versions, predictions)
        self._check(graph, predictions.detach(), tensors)
        tensors.clear()  # they have graphs
        return saved

    def _check(self, graph: RecomputedGraph, predictions: Tensor, saved: Sequence[Tensor]) -> None:
        """Raise an error if the second run of a graph differed from the first.

        Parameters
        ----------
        predictions, saved : the result of the second run, and the tensors that it saves
        """
        first = graph.first_run.fingerprint
        if first is None:  # the pose model takes gradients in its own forward
            return
        differs = difference(first, predictions, saved)
        if differs is not None:
            self._record.n_agreed = 0
            pose, how = differs
            raise ChangedBeforeBackwardError(
                f"pose {graph.chunk.first_pose + pose}: the pose model ran again in backward and"
                f" behaved differently than in forward. {how} {_QUESTIONS}"
            )
        if graph.is_compared and not self._agreed:
            self._agreed = True
            self._record.n_agreed += 1


class RecomputedGraph:
    """The graph of one chunk. A second run provides its saved tensors.

    Attributes
    ----------
    chunk : the poses
    first_run : the conditions and the fingerprint of the first run
    is_compared : True if the saved tensors of the two runs are compared
    numbering : the numbers of the saved tensors of the first run
    skipped_in : the number of the backward pass that skips this graph, or None
    """

    first_run: Run
    skipped_in: int | None = None

    def __init__(
        self, graphs: RecomputedGraphs, chunk: Chunk, index: int, is_compared: bool
    ) -> None:
        self.chunk = chunk
        self.is_compared = is_compared
        self.numbering = Numbering(is_compared)
        self._graphs = graphs
        self._index = index
        self._saved: dict[int, Saved] = {}

    def saved_again(self, index: int) -> Tensor:
        """Return a tensor that the graph would have saved. torch calls this hook in backward.

        Parameters
        ----------
        index : the number of the tensor
        """
        # The engine also calls the nodes of a skipped chunk. Each node first unpacks its saved
        # tensors, then finds that it has no gradient, and computes nothing.
        if self.skipped_in is not None and self.skipped_in == current_backward() and engine_asks():
            return _NOTHING
        # Each tensor is returned once and forgotten, so that memory shrinks during backward. If a
        # node asks for it again (another backward, with retain_graph), the chunk runs again.
        found = self._saved.pop(index, None)
        tensor, version = found or self._from_second_run(index)
        if version_of(tensor) != version:
            raise ChangedBeforeBackwardError(
                "one of the variables needed for gradient computation, shape"
                f" {tuple(tensor.shape)}, was modified by an inplace operation of the pose model"
                " itself. Let this operation work on a copy."
            )
        return tensor

    def _from_second_run(self, index: int) -> Saved:
        with self._graphs.lock:
            found = self._saved.pop(index, None)  # another thread may have run the chunk
            if found is None:
                saved = dict(enumerate(self._graphs.run_again(self)))
                found = saved.pop(index)
                self._saved = saved
            return found

    def run_again(self) -> Tensor:
        """Return the predictions of a second run."""
        try:
            return self.chunk.run()
        except (MtennError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if "can't allocate memory" in str(error):  # torch has no class of its own for the CPU
                raise
            raise ChangedBeforeBackwardError(
                f"pose {self.chunk.first_pose}: the pose model ran again in backward and raised"
                f" {type(error).__name__}: {error}. {_QUESTIONS}"
            ) from error

    def is_kept(self) -> bool:
        """Return whether a loss may need the graph for another tensor than its prediction."""
        return self._graphs.is_kept(self._index)

    def forget(self) -> None:
        """Free the saved tensors that backward has not used."""
        self._saved = {}


_QUESTIONS = (
    "Has it read a value that changed in between? Does it write to its pose? Does it draw random"
    " numbers outside of torch, use a set whose order changes, count its runs, or keep something"
    " for the next pose, such as a cache that grows or a part of its graph? If all poses of a"
    " compound share that part, give it to MultiPoseModel as shared=…. Otherwise use"
    " gradients='stored' or 'graph', which run each pose once."
)

# It is on the meta device, so code that computes with it by mistake raises an error.
_NOTHING = torch.empty(1, device="meta")


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor
