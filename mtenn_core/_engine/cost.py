"""The cost of a training step in each mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mtenn_core._engine.mode import GradientMode


class ModeCost(NamedTuple):
    """The cost of one training step in one mode.

    Attributes
    ----------
    gradients : the mode
    forwards, backwards : the number of forward runs of chunks, and of backward runs
    memory : bytes of graphs, stored gradients and the gradient itself, without parameters and poses
    """

    gradients: GradientMode
    forwards: int
    backwards: int
    memory: int


class PoseGraph(NamedTuple):
    """The graph of one pose.

    Attributes
    ----------
    saved, bare : bytes of the saved tensors, and of the nodes
    never_skipped : True if backward must run the graph even if the weight of the pose is zero
    """

    saved: float
    bare: float
    never_skipped: bool


class StepTotals(NamedTuple):
    """The runs of one training step, and the bytes that a mode may keep.

    Attributes
    ----------
    n_poses : number of poses
    n_chunks, n_chunks_run : number of chunks, and number of chunks that backward runs
    saved, bare : bytes of the saved tensors and of the nodes, for all poses
    largest_chunk : bytes that the graph of the largest chunk saves
    largest_bare : bytes of the nodes of the largest graph of one pose
    gradient : bytes of the gradient, and of the next gradient that is added to it
    stored_gradient : bytes of one pose's stored gradient; with columns, of one gradient for each
    n_columns : number of predictions per pose
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
    n_columns: int = 1


def step_totals(
    graphs: Sequence[PoseGraph],
    has_weight: Sequence[bool],
    chunk_size: int,
    gradient: int,
    stored_gradient: int,
    n_columns: int = 1,
) -> StepTotals:
    """Return the totals for poses that run in chunks of ``chunk_size`` poses.

    Parameters
    ----------
    graphs, has_weight : one entry per pose
    gradient, stored_gradient, n_columns : see :class:`StepTotals`
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
        n_columns=n_columns,
    )
