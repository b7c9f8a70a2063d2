"""Mode ``"recomputed"``: graphs save no tensors in forward. In backward, poses run a second time.

Every chunk of poses has its ordinary graph, so that hooks, inputs that require grad and distributed
wrappers work as usual. But the graph does not keep its saved tensors. When backward needs one of
them, the chunk runs a second time, and this run provides all of them.
"""

from __future__ import annotations

import itertools
import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from mtenn_core._engine.autograd_nodes import engine_asks, inside_vmap, is_leaf, nodes_of
from mtenn_core._engine.call import Call
from mtenn_core._engine.chunk import Chunk
from mtenn_core._engine.cost import ModeCost, StepTotals
from mtenn_core._engine.mode import Collate, Mode, Options, check_has_combine
from mtenn_core._engine.replay import Replay, Run
from mtenn_core._engine.shared_part import nodes_of_outputs
from mtenn_core._engine.skipping import join_chunks
from mtenn_core._torch_internals import (
    current_backward,
    current_transform,
    sequence_number,
    version_of,
)
from mtenn_core.combination import Combination
from mtenn_core.errors import ChangedBeforeBackwardError, GradientError, MtennError


class Recomputed(Mode):
    """The mode that keeps only predictions and, in backward, runs poses with weight again."""

    name = "recomputed"

    def check_options(self, options: Options) -> None:
        for combination in options.combinations:
            if type(combination).combine is Combination.combine:  # a shortcut for each call
                check_has_combine(options)

    def check_group(self, options: Options) -> None:
        """Accept all groups, because each process takes the gradients of its own poses."""

    def chunk_size(self, options: Options) -> int:
        return options.chunk_size or 1

    def predict(self, options: Options, call: Call) -> tuple[Tensor, None]:
        if not torch.is_grad_enabled():
            return join_chunks([chunk.run() for chunk in call.chunks]), None
        if current_transform() is not None and inside_vmap():
            raise GradientError(
                "gradients='recomputed' does not work inside torch.func.vmap, because backward runs"
                " outside of it. Use gradients='graph'. For predictions without gradients, use"
                " torch.no_grad."
            )
        graphs = RecomputedGraphs(options.pose_model, call, options.collate)
        return graphs.predict(call.chunks, options.skip_below), None

    def cost(self, totals: StepTotals) -> ModeCost:
        memory = totals.gradient + totals.largest_chunk + totals.bare
        forwards = totals.n_chunks + totals.n_chunks_run
        return ModeCost(self.name, forwards, totals.n_chunks_run, round(memory))


# A tensor that a run saves for backward, detached, and its version in the run. torch does not check
# tensors that hooks saved.
Saved = tuple[Tensor, int]


# For a small pose, a comparison of saved tensors takes half as long as the pose. A pose model that
# does not repeat itself usually shows this at once. So all chunks are compared until the runs have
# agreed in a few calls under the same conditions, and later one chunk in ONE_IN. Predictions are
# always compared.
FEW_CALLS = 3
ONE_IN = 50


@dataclass
class Record:
    """The number of calls of a pose model, and in how many its runs agreed, under conditions."""

    n_calls: int = 0
    n_agreed: int = 0
    conditions: object = None

    def compared(self, n_chunks: int) -> list[bool]:
        """Return for each chunk of a call whether the saved tensors of its runs are compared."""
        if current_transform() is not None:  # numbers cannot be read
            return [False] * n_chunks
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
    call : the inputs of all chunks
    collate : see :class:`Options`

    Attributes
    ----------
    lock : a lock that is held while a chunk runs again
    """

    def __init__(self, pose_model: torch.nn.Module, call: Call, collate: Collate | None) -> None:
        self._replay = Replay(pose_model, call.poses, call.shared_outputs or ())
        conditions = self._replay.conditions(), id(collate)  # it may refer to the pose model
        # A shortcut: most calls have no shared part.
        self._shared = () if call.shared_outputs is None else nodes_of_outputs(call)
        self.lock = self._replay.lock
        # The graphs of chunks refer to this object. Only the graph of the predictions owns these
        # graphs. If this object also owned one of them, there would be a reference cycle, and
        # memory would stay until the garbage collector runs. So this is a weak reference.
        self._last: Callable[[], RecomputedGraph | None] = lambda: None
        self._record = _RECORDS.setdefault(pose_model, Record())
        self._record.n_calls += 1
        if conditions != self._record.conditions:
            self._record.conditions = conditions
            self._record.n_agreed = 0
        self._agreed = False  # True after the first comparison
        self._ends: list[int] = []  # for each chunk, the number of the last node of its graph

    def predict(self, chunks: Sequence[Chunk], skip_below: float | None) -> Tensor:
        """Run all chunks and return their predictions. The graphs save no tensors.

        Parameters
        ----------
        skip_below : see :func:`join_chunks`

        Returns
        -------
        shape (n_poses,) or (n_poses, n_columns)
        """
        compared = self._record.compared(len(chunks))
        graphs = list(map(partial(RecomputedGraph, self), chunks, compared))
        predictions = []
        try:
            for graph in graphs:
                # Set this before the run. If a pose model takes gradients in its own forward, the
                # second run starts before the first run ends.
                graph.first_run = self._replay.before_run()
                try:
                    with saved_tensors_hooks(graph.numbering.hook, graph.saved_again):
                        prediction = graph.chunk.run()
                    self._replay.after_run(
                        graph.first_run,
                        prediction,
                        next(graph.numbering.count),
                        graph.numbering.tensors if graph.is_compared else None,
                    )
                finally:  # the tensors have graphs, which refer to this object
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
        return join_chunks(predictions, graphs, skip_below, self._shared)

    def kept(self) -> list[int]:
        """Return the indices of chunks that computed a tensor that the pose model keeps."""
        roots = [tensor.grad_fn for tensor in self._replay.kept_tensors()]
        nodes = {node for root in roots for node in nodes_of(root) if not is_leaf(node)}
        before = max(map(sequence_number, self._shared), default=-1)
        chunks = set()
        for number in map(sequence_number, nodes):
            if number > before:
                index = bisect_left(self._ends, number)
                # A forward hook may compute a penalty after the prediction of the chunk before.
                chunks |= {index - 1, index} & set(range(len(self._ends)))
        return sorted(chunks)

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

        before = self._replay.parameters_now()
        # Backward runs with grad mode off. The second run needs grad mode to save tensors.
        try:
            with (
                self._replay.restored(graph.first_run),
                torch.enable_grad(),
                saved_tensors_hooks(keep, _unchanged),
            ):
                predictions = graph.run_again()
            self._replay.check_parameters(before, predictions)
            self._check(graph, predictions.detach(), tensors)
        finally:
            tensors.clear()  # they have graphs
        return saved

    def _check(self, graph: RecomputedGraph, predictions: Tensor, saved: Sequence[Tensor]) -> None:
        """Raise an error if the second run of a graph differed from the first.

        Parameters
        ----------
        predictions, saved : the result of the second run, and the tensors that it saves
        """
        differs = self._replay.difference(graph.first_run, predictions, saved)
        if differs is not None:
            self._record.n_agreed = 0
            pose, how = differs
            who = graph.chunk.named() if pose is None else f"pose {graph.chunk.first_pose + pose}"
            raise ChangedBeforeBackwardError(
                f"{who}: the pose model ran again in backward and behaved differently than in"
                f" forward. {how} {_QUESTIONS}"
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

    def __init__(self, graphs: RecomputedGraphs, chunk: Chunk, is_compared: bool) -> None:
        self.chunk = chunk
        self.is_compared = is_compared
        self.numbering = Numbering(is_compared)
        self._graphs = graphs
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
                f"{self.chunk.named()}: the pose model ran again in backward and raised"
                f" {type(error).__name__}: {error}. {_QUESTIONS}"
            ) from error

    def kept(self) -> list[int]:
        """Return the indices of chunks whose graphs a loss may need besides their predictions."""
        return self._graphs.kept()

    def forget(self) -> None:
        """Free the saved tensors that backward has not used."""
        self._saved = {}


_QUESTIONS = (
    "gradients='recomputed' needs the same computation twice. Usual causes: random numbers that are"
    " not torch's, a set or threads whose order changes, values written to the pose, a counter that"
    " decides something, or a part of the graph that is kept for the next pose. If all poses of a"
    " compound share this part, pass it as MultiPoseModel(..., shared=…). Otherwise use"
    " gradients='stored' or 'graph', which run each pose once."
)

# It is on the meta device, so code that computes with it by mistake raises an error.
_NOTHING = torch.empty(1, device="meta")


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor
