"""The graphs of poses: what they depend on, and which of them backward may leave out."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Chunk(Protocol):
    """What is told in which backward the graph of some poses is left out, if in one."""

    left_out_in: int | None


def join_chunks(
    predictions: Sequence[Tensor],
    chunks: Sequence[Chunk] = (),
    skip_below: float | None = 0.0,
) -> Tensor:
    """Return the predictions of all chunks of poses as one vector, shape (n_poses,).

    Its backward leaves out a chunk whose weights are all zero, so that it costs nothing and that
    an infinite gradient of a pose without weight does no harm (0 · inf is NaN).

    Parameters
    ----------
    skip_below : leave out weights up to this fraction of the largest, too; None leaves out none
    """
    no_graph = not any(chunk.requires_grad for chunk in predictions)
    if len(predictions) == 1 or no_graph or skip_below is None:
        return torch.cat(list(predictions))
    joined: Tensor = _Join.apply(chunks, skip_below, *predictions)
    return joined


def with_weight(weights: Tensor, skip_below: float | None) -> Tensor:
    """Return which poses count, shape (n_poses,); those whose weight is NaN or infinite do."""
    sizes = weights.abs()
    if skip_below is None:
        return torch.ones_like(sizes, dtype=torch.bool)
    return ~(sizes <= skip_below * sizes.max()) | sizes.isinf()


class _Join(torch.autograd.Function):
    """``torch.cat`` that hands no gradient at all to chunks whose gradient is zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(chunks: Sequence[Chunk], skip_below: float, *predictions: Tensor) -> Tensor:
        return torch.cat(predictions)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.chunks, ctx.skip_below, *predictions = inputs
        ctx.sizes = [len(chunk) for chunk in predictions]

    @staticmethod
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor | None, ...]:
        parts = weights.split(ctx.sizes)
        # A weight of zero may have a derivative that is not, and a batch of weights is many.
        if torch.is_grad_enabled() or is_batched(weights):
            runs = [True] * len(parts)
        else:
            counts = with_weight(weights, ctx.skip_below).tolist()
            has_weight = [any(of_chunk) for of_chunk in _split(counts, ctx.sizes)]
            runs = _runs([node for node, _ in ctx.next_functions], has_weight)
        for chunk, run in zip(ctx.chunks, runs, strict=False):
            chunk.left_out_in = None if run else torch._C._current_graph_task_id()
        return None, None, *(part if run else None for part, run in zip(parts, runs, strict=True))

    @staticmethod
    def jvp(ctx: Any, _chunks: None, _skip_below: None, *tangents: Tensor) -> Tensor:
        return torch.cat(tangents)


def _split(values: list[bool], sizes: Sequence[int]) -> Iterator[list[bool]]:
    start = 0
    for size in sizes:
        yield values[start : start + size]
        start += size


def _runs(roots: Sequence[Any], has_weight: Sequence[bool]) -> list[bool]:
    """Return for each graph whether backward must run it.

    One without weight must if it alone holds a leaf, whose gradient is then zero and not None; or a
    node that computes something where it is handed no gradient.
    """
    if all(has_weight):
        return list(has_weight)
    # Not every node: those of all poses would be many objects for the garbage collector.
    known: set[Any] = set()
    for root, weight in zip(roots, has_weight, strict=True):
        if weight:
            known.update(filter(_must_run, _nodes(root, known)))
    runs = list(has_weight)
    for index, root in enumerate(roots):
        if not runs[index]:
            # A known one runs anyway, or need not for another chunk either.
            found = list(filter(_must_run, _nodes(root, known)))
            runs[index] = bool(found)
            known.update(found)
    return runs


# Nodes of torch that look at what they saved where they have no gradient, too: fused attention, and
# recurrent layers. Found with every formula of derivatives.yaml that has several results.
_LOOK_ANYWAY = re.compile("Attention|Rnn|Lstm|Mkldnn")


def _must_run(node: Any) -> bool:
    return _is_leaf(node) or computes_anyway(node.__class__)


@functools.lru_cache
def computes_anyway(node_class: type) -> bool:
    """Whether a node may compute something where it is handed no gradient."""
    name = node_class.__name__
    in_python = issubclass(node_class, torch.autograd.function.BackwardCFunction)
    in_cpp = name == "CppFunction"
    return in_python or in_cpp or _LOOK_ANYWAY.search(name) is not None


def is_batched(tensor: Tensor) -> bool:
    """Whether it stands for many, under vmap or ``is_grads_batched``."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor)


def accumulators(root: Tensor, known: Iterable[Any] = ()) -> list[Any]:
    """Return the nodes of a graph that add a gradient to a leaf, but for those in ``known``."""
    first = torch.autograd.graph.get_gradient_edge(root).node
    return list(filter(_is_leaf, _nodes(first, known)))


# Its class has no public name.
_AccumulateGrad = type(
    torch.autograd.graph.get_gradient_edge(torch.empty((), requires_grad=True)).node
)


def _is_leaf(node: Any) -> bool:
    return type(node) is _AccumulateGrad


def operations(root: Tensor) -> list[type]:
    """Return the class of each node of a graph that is no leaf."""
    return [type(node) for node in _nodes(root.grad_fn) if not _is_leaf(node)]


def computes_in(dtype: torch.dtype, root: Tensor) -> bool:
    """Whether a graph has a result of some dtype."""
    nodes = _nodes(root.grad_fn)
    return any(result.dtype == dtype for node in nodes for result in node._input_metadata)


def _nodes(root: Any, known: Iterable[Any] = ()) -> list[Any]:
    """Return the nodes of a graph, without known ones and what is only reached through them."""
    seen = {*known, None}  # None for what needs no gradient
    if root in seen:
        return []
    seen.add(root)
    found = [root]
    for node in found:  # grows meanwhile
        for parent, _ in node.next_functions:
            if parent not in seen:
                seen.add(parent)
                found.append(parent)
    return found
