"""Skip the graphs of poses without weight in backward."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mtenn_core._engine.autograd_nodes import computes_anyway, is_batched, is_leaf, nodes_of
from mtenn_core._engine.columns import check_same_columns
from mtenn_core._torch_internals import current_backward


class Skippable(Protocol):
    """An object that records in ``skipped_in`` which backward pass skips its graph, or None."""

    skipped_in: int | None

    def kept(self) -> Iterable[int]:
        """Return the indices of chunks whose graphs a loss may need besides their predictions."""


def join_chunks(
    predictions: Sequence[Tensor],
    chunks: Sequence[Skippable] = (),
    skip_below: float | None = 0.0,
    shared: Collection[Any] = (),
) -> Tensor:
    """Return the predictions of all chunks of poses in one tensor, shape (n_poses, …).

    Its backward skips a chunk if all weights of the chunk are zero. This saves time. It also avoids
    NaN from 0 · inf if a pose without weight has an infinite gradient.

    Parameters
    ----------
    predictions : one tensor per chunk, shape (n_poses,) or (n_poses, n_columns)
    chunks : objects whose ``skipped_in`` is set in backward; empty if it is not needed
    skip_below : also skip weights up to this fraction of the largest weight; None skips nothing
    shared : the nodes of tensors that the poses of a compound share
    """
    if predictions[0].dim() > 1:
        check_same_columns(predictions)
    no_graph = not any(chunk.requires_grad for chunk in predictions)
    if len(predictions) == 1 or no_graph or skip_below is None:
        return torch.cat(list(predictions))
    joined: Tensor = _Join.apply(chunks, skip_below, shared, *predictions)
    return joined


def with_weight(weights: Tensor, skip_below: float | None) -> Tensor:
    """Return which poses have a weight above the limit, shape (n_poses,), bool.

    The result is True for a weight that is NaN or infinite.

    Parameters
    ----------
    weights : shape (n_poses,), or (n_poses, n_columns). Then the largest weight of a pose counts.
    """
    sizes = weights.abs()
    if sizes.dim() > 1:
        sizes = sizes.amax(1)
    if skip_below is None:
        return torch.ones_like(sizes, dtype=torch.bool)
    # Not "sizes > …": every comparison with NaN is false.
    return ~(sizes <= skip_below * sizes.max()) | sizes.isinf()


class _Join(torch.autograd.Function):
    """A ``torch.cat`` whose backward gives None, and not zeros, to chunks without weight.

    The engine still calls the nodes of such a chunk. If torch's own formulas get None, they return
    None and compute nothing. If they got zeros, they would compute.
    """

    # torch.func.vmap around the model needs this rule, and so does the vjp of a batch of weights.
    generate_vmap_rule = True

    @staticmethod
    def forward(
        chunks: Sequence[Skippable],
        skip_below: float,
        shared: Collection[Any],
        *predictions: Tensor,
    ) -> Tensor:
        return torch.cat(predictions)

    # vmap and jvp require a setup_context that is separate from forward.
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.chunks, ctx.skip_below, ctx.shared, *predictions = inputs
        ctx.sizes = [len(chunk) for chunk in predictions]

    @staticmethod
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor | None, ...]:
        parts = weights.split(ctx.sizes)
        # With create_graph=True, a weight of zero may have a nonzero derivative. The values of a
        # batch of weights cannot be read.
        if torch.is_grad_enabled() or is_batched(weights):
            runs = [True] * len(parts)
        else:
            counts = with_weight(weights, ctx.skip_below).tolist()
            has_weight = [any(of_chunk) for of_chunk in _split(counts, ctx.sizes)]
            runs = _graphs_to_run([node for node, _ in ctx.next_functions], has_weight, ctx.shared)
            if ctx.chunks and not all(runs):
                for index in ctx.chunks[0].kept():
                    runs[index] = True
        for chunk, run in zip(ctx.chunks, runs, strict=False):
            chunk.skipped_in = None if run else current_backward()
        return (
            None,
            None,
            None,
            *(part if run else None for part, run in zip(parts, runs, strict=True)),
        )

    @staticmethod
    def jvp(ctx: Any, _chunks: None, _skip_below: None, _shared: None, *tangents: Tensor) -> Tensor:
        return torch.cat(tangents)


def _split(values: list[bool], sizes: Sequence[int]) -> Iterator[list[bool]]:
    start = 0
    for size in sizes:
        yield values[start : start + size]
        start += size


def _graphs_to_run(
    roots: Sequence[Any], has_weight: Sequence[bool], shared: Collection[Any] = ()
) -> list[bool]:
    """Return for each graph whether backward must run it.

    A graph without weight must run in two cases. First, one of its leaves is in no other graph that
    runs. The gradient of this leaf must be zero and not None. Second, one of its nodes may compute
    something even without a gradient.
    """
    if all(has_weight):
        return list(has_weight)

    def found_in(root: Any) -> list[Any]:
        # A node of the shared part stands for all leaves behind it, so that each graph need not be
        # searched again.
        if not shared:
            return list(filter(_must_run, nodes_of(root, known)))
        nodes = nodes_of(root, known, shared)
        return [node for node in nodes if node in shared or _must_run(node)]

    # The set holds only leaves and nodes that must run. With the nodes of all poses, it would hold
    # many objects, and Python's garbage collector would visit each of them.
    known: set[Any] = set()
    for root, weight in zip(roots, has_weight, strict=True):
        if weight:
            known.update(found_in(root))
    runs = list(has_weight)
    for index, root in enumerate(roots):
        if not runs[index]:
            # Known nodes already run with another graph.
            found = found_in(root)
            runs[index] = bool(found)
            known.update(found)
    return runs


def _must_run(node: Any) -> bool:
    return is_leaf(node) or computes_anyway(node.__class__)
