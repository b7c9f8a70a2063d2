"""Poses without weight, whose graphs backward skips."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mtenn_core._engine.autograd_nodes import (
    computes_anyway,
    current_backward,
    is_batched,
    is_leaf,
    nodes_of,
)


class Skippable(Protocol):
    """Records the backward pass that skips the graph of some poses, or None."""

    skipped_in: int | None


def join_chunks(
    predictions: Sequence[Tensor],
    chunks: Sequence[Skippable] = (),
    skip_below: float | None = 0.0,
) -> Tensor:
    """Return the predictions of all chunks of poses as one vector, shape (n_poses,).

    Its backward skips a chunk if all its weights are zero. The chunk then costs nothing, and an
    infinite gradient of a pose without weight does no harm (0 · inf is NaN).

    Parameters
    ----------
    predictions : one tensor per chunk
    chunks : told in which backward they are skipped; none where nobody needs to know
    skip_below : also skip weights up to this fraction of the largest; None skips none
    """
    no_graph = not any(chunk.requires_grad for chunk in predictions)
    if len(predictions) == 1 or no_graph or skip_below is None:
        return torch.cat(list(predictions))
    joined: Tensor = _Join.apply(chunks, skip_below, *predictions)
    return joined


def with_weight(weights: Tensor, skip_below: float | None) -> Tensor:
    """Return which poses have a weight above the limit, shape (n_poses,), bool.

    A weight that is NaN or infinite counts as one.
    """
    sizes = weights.abs()
    if skip_below is None:
        return torch.ones_like(sizes, dtype=torch.bool)
    # "not at most", since every comparison with NaN is false.
    return ~(sizes <= skip_below * sizes.max()) | sizes.isinf()


class _Join(torch.autograd.Function):
    """``torch.cat`` that gives None, and not zeros, to chunks without weight.

    The engine still calls the nodes of such a chunk, and torch's own formulas then return None
    without computing anything. With zeros, they would compute.
    """

    # So that torch.func.vmap works around the model, and vjp of a batch of weights.
    generate_vmap_rule = True

    @staticmethod
    def forward(chunks: Sequence[Skippable], skip_below: float, *predictions: Tensor) -> Tensor:
        return torch.cat(predictions)

    # Apart from forward, which vmap and jvp require.
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.chunks, ctx.skip_below, *predictions = inputs
        ctx.sizes = [len(chunk) for chunk in predictions]

    @staticmethod
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor | None, ...]:
        parts = weights.split(ctx.sizes)
        # Under create_graph a weight of zero may have a derivative that is not zero. A batch of
        # weights has no values to read.
        if torch.is_grad_enabled() or is_batched(weights):
            runs = [True] * len(parts)
        else:
            counts = with_weight(weights, ctx.skip_below).tolist()
            has_weight = [any(of_chunk) for of_chunk in _split(counts, ctx.sizes)]
            runs = _graphs_to_run([node for node, _ in ctx.next_functions], has_weight)
        for chunk, run in zip(ctx.chunks, runs, strict=False):
            chunk.skipped_in = None if run else current_backward()
        return None, None, *(part if run else None for part, run in zip(parts, runs, strict=True))

    @staticmethod
    def jvp(ctx: Any, _chunks: None, _skip_below: None, *tangents: Tensor) -> Tensor:
        return torch.cat(tangents)


def _split(values: list[bool], sizes: Sequence[int]) -> Iterator[list[bool]]:
    start = 0
    for size in sizes:
        yield values[start : start + size]
        start += size


def _graphs_to_run(roots: Sequence[Any], has_weight: Sequence[bool]) -> list[bool]:
    """Return for each graph whether backward must run it.

    A graph without weight must run if no other graph holds one of its leaves, whose gradient is
    then zero and not None; or if a node of it computes something without a gradient.
    """
    if all(has_weight):
        return list(has_weight)
    # Leaves and such nodes only: the nodes of all poses would be many objects for Python's garbage
    # collector to go through.
    known: set[Any] = set()
    for root, weight in zip(roots, has_weight, strict=True):
        if weight:
            known.update(filter(_must_run, nodes_of(root, known)))
    runs = list(has_weight)
    for index, root in enumerate(roots):
        if not runs[index]:
            # Known nodes run anyway, with another graph.
            found = list(filter(_must_run, nodes_of(root, known)))
            runs[index] = bool(found)
            known.update(found)
    return runs


def _must_run(node: Any) -> bool:
    return is_leaf(node) or computes_anyway(node.__class__)
