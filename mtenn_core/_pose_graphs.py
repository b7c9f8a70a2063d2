"""The graphs of poses: what they depend on, and which of them backward may leave out."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# The class of the node that adds a gradient to a leaf has no public name.
_AccumulateGrad = type(
    torch.autograd.graph.get_gradient_edge(torch.empty((), requires_grad=True)).node
)
_PythonFunction = torch.autograd.function.BackwardCFunction


def join_chunks(chunks: Sequence[Tensor]) -> Tensor:
    """Return the predictions of all chunks as one vector, shape (n_poses,).

    Its backward leaves out a chunk whose weights are all zero, so that it costs nothing and that
    an infinite gradient of a pose without weight does no harm (0 · inf is NaN).
    """
    if len(chunks) == 1 or not any(chunk.requires_grad for chunk in chunks):
        return torch.cat(list(chunks))
    joined: Tensor = _Join.apply(*chunks)
    return joined


class _Join(torch.autograd.Function):
    """``torch.cat`` that hands no gradient at all to chunks whose gradient is zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*chunks: Tensor) -> Tensor:
        return torch.cat(chunks)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.sizes = [len(chunk) for chunk in inputs]

    @staticmethod
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor | None, ...]:
        parts = weights.split(ctx.sizes)
        # A weight of zero may have a derivative that is not.
        if torch.is_grad_enabled():
            return parts
        has_weight = [any(w) for w in _split((weights != 0).tolist(), ctx.sizes)]
        runs = _runs([node for node, _ in ctx.next_functions], has_weight)
        return tuple(part if run else None for part, run in zip(parts, runs, strict=True))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return torch.cat(tangents)


def _split(values: list[bool], sizes: Sequence[int]) -> Iterator[list[bool]]:
    start = 0
    for size in sizes:
        yield values[start : start + size]
        start += size


def _runs(roots: Sequence[Any], has_weight: Sequence[bool]) -> list[bool]:
    """Return for each graph whether backward must run it.

    One without weight must if it alone holds a leaf, whose gradient is then zero and not None; or a
    Function written in Python, which computes something of a gradient that is None, too.
    """
    if all(has_weight):
        return list(has_weight)
    runs, covered = list(has_weight), set[Any]()
    for root, weight in zip(roots, has_weight, strict=True):
        if weight:
            covered.update(_nodes(root, covered))
    for index, root in enumerate(roots):
        if not runs[index]:
            nodes = set(_nodes(root, covered))
            runs[index] = any(isinstance(n, (_AccumulateGrad, _PythonFunction)) for n in nodes)
            if runs[index]:
                covered |= nodes
    return runs


def leaves(root: Tensor) -> Iterator[Tensor]:
    """Yield the leaves of a graph that would receive a gradient."""
    if root.grad_fn is None:
        yield root
        return
    for node in _nodes(root.grad_fn):
        if isinstance(node, _AccumulateGrad):
            yield node.variable  # type: ignore[attr-defined]


def _nodes(root: Any, without: Container[Any] = ()) -> Iterator[Any]:
    """Yield the nodes of a graph, each once; not those behind ``without``."""
    if root is None or root in without:
        return
    seen, stack = {root}, [root]
    while stack:
        node = stack.pop()
        yield node
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen and parent not in without:
                seen.add(parent)
                stack.append(parent)
