"""The cost of a training step in each mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class ModeCost(NamedTuple):
    """The cost of one training step in one mode.

    Attributes
    ----------
    gradients : the mode
    forwards, backwards : how often a chunk of poses is run each way
    memory : bytes besides parameters and poses: graphs, stored gradients, the gradient itself
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
    never_skipped : backward must run it even if its weight is zero
    """

    saved: float
    bare: float
    never_skipped: bool


class StepTotals(NamedTuple):
    """The runs of one training step, and the bytes of what a mode may keep.

    Attributes
    ----------
    n_poses : poses
    n_chunks, n_chunks_run : chunks, and those that backward runs
    saved, bare : of the graphs of all poses
    largest_chunk : saved by the graph of the largest chunk
    largest_bare : the nodes of the largest graph of one pose
    gradient : the gradient, and the part of it that is added next
    stored_gradient : one pose's stored gradient
    """

    n_poses: int
    n_chunks: int
    n_chunks_run: int
    saved: float
    bare: float
    largest_chunk: float
    largest_bare: float
    gradient: int
    stored_gradient: int


def step_totals(
    graphs: Sequence[PoseGraph],
    has_weight: Sequence[bool],
    chunk_size: int,
    gradient: int,
    stored_gradient: int,
) -> StepTotals:
    """Return the totals for poses that run in chunks of one size.

    Parameters
    ----------
    graphs, has_weight : one entry per pose
    gradient, stored_gradient : bytes, see :class:`StepTotals`
    """
    runs = [weight or graph.never_skipped for weight, graph in zip(has_weight, graphs, strict=True)]
    chunks = [slice(first, first + chunk_size) for first in range(0, len(graphs), chunk_size)]
    return StepTotals(
        n_poses=len(graphs),
        n_chunks=len(chunks),
        n_chunks_run=sum(any(runs[chunk]) for chunk in chunks),
        saved=sum(graph.saved for graph in graphs),
        bare=sum(graph.bare for graph in graphs),
        largest_chunk=max(sum(graph.saved for graph in graphs[chunk]) for chunk in chunks),
        largest_bare=max(graph.bare for graph in graphs),
        gradient=gradient,
        stored_gradient=stored_gradient,
    )
