"""The nodes of autograd's graphs, and what autograd's engine does with them."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from mtenn_core._process.interrupts import delayed_interrupts
from mtenn_core._torch_internals import (
    ENGINE_CODE,
    AccumulateGrad,
    current_transform,
    hooks_of,
    input_metadata,
    is_batched_by_vmap,
    is_legacy_batched,
    version_of,
)
from mtenn_core.errors import TorchVersionError


def versions_of(tensors: Iterable[Tensor | None]) -> list[int]:
    """Return how often each tensor was changed in place; -1 for None and for inference tensors."""
    tensors = list(tensors)
    try:
        return list(map(version_of, tensors))
    except (AttributeError, RuntimeError):
        return [-1 if t is None or t.is_inference() else version_of(t) for t in tensors]


def is_batched(tensor: Tensor) -> bool:
    """Return whether a tensor represents many tensors, under ``vmap`` or ``is_grads_batched``.

    Such a tensor has a hidden dimension, so its values cannot be read (``tolist``, ``item``).
    """
    return is_batched_by_vmap(tensor) or is_legacy_batched(tensor)


def inside_vmap() -> bool:
    """Return whether ``torch.func.vmap`` is the innermost transform that runs this code."""
    interpreter = current_transform()
    return interpreter is not None and interpreter.key().name == "Vmap"


def engine_asks() -> bool:
    """Return whether autograd's engine called the hook that calls this function.

    If not, Python code called the hook because it needs the tensor: ``torch.utils.checkpoint``, or
    code that reads ``grad_fn.saved_tensors``.
    """
    hook: Any = sys._getframe(1)
    caller = hook.f_back
    # The engine runs CPU nodes on the thread that called the engine. There, the hook's caller is
    # the function that called the engine. On threads of accelerators, the hook has no Python
    # caller.
    return caller is None or caller.f_code is ENGINE_CODE


def is_leaf(node: Any) -> bool:
    """Return whether a node adds a gradient to a leaf. The leaf is ``node.variable``."""
    return type(node) is AccumulateGrad


@contextmanager
def muted_hooks(tensors: Iterable[Tensor], lock: AbstractContextManager[object]) -> Iterator[None]:
    """Leave out the hooks of leaf tensors in the backward passes of a block.

    ``torch.autograd.grad`` leaves out the other hooks of a leaf: those of its ``AccumulateGrad``
    node (DistributedDataParallel, FSDP) and those of ``register_post_accumulate_grad_hook``.

    Parameters
    ----------
    lock : is held during the block, so that only one thread mutes the hooks
    """
    # A Ctrl-C could lose the hooks.
    with delayed_interrupts(), lock:
        muted = [(hooks, dict(hooks)) for hooks in map(hooks_of, tensors)]
        try:
            for hooks, _ in muted:
                hooks.clear()
            yield
        finally:
            for hooks, kept in muted:
                added = dict(hooks)
                hooks.clear()
                hooks.update(kept | added)


def nodes_of(root: Any, known: Iterable[Any] = (), ends: Collection[Any] = ()) -> list[Any]:
    """Return the nodes of a graph. Leave out known nodes, and nodes reached only through these.

    Parameters
    ----------
    ends : nodes that are returned, but whose own inputs are left out
    """
    # In next_functions, None represents an input that needs no gradient.
    seen = {*known, None}
    if root in seen:
        return []
    seen.add(root)
    found = [root]
    for node in found:  # the loop also visits the nodes that it appends
        if ends and node in ends:
            continue
        for parent, _ in node.next_functions:
            if parent not in seen:
                seen.add(parent)
                found.append(parent)
    return found


def operations(root: Tensor) -> list[type]:
    """Return the class of each node of a graph. Leave out the nodes of leaves."""
    return [type(node) for node in nodes_of(root.grad_fn) if not is_leaf(node)]


def computes_in(dtype: torch.dtype, root: Tensor) -> bool:
    """Return whether any node of a graph has a result of this dtype, or True if it is unknown."""
    # The gradients that enter a node have the dtypes of its results.
    nodes = nodes_of(root.grad_fn)
    try:
        return any(result.dtype == dtype for node in nodes for result in input_metadata(node))
    except TorchVersionError:
        return True


# These nodes of torch (fused attention and recurrent layers) read their saved tensors even if they
# get no gradient. They were found in torch 2.13. tests/engine/test_skipping.py repeats the search:
# it runs, without a gradient, every formula of derivatives.yaml that has several results.
_READS_ANYWAY = re.compile("Attention|Rnn|Lstm|Mkldnn")


def is_function(node_class: type) -> bool:
    """Return whether a node belongs to a ``torch.autograd.Function`` in Python."""
    return hasattr(node_class, "saved_tensors")


@functools.lru_cache
def computes_anyway(node_class: type) -> bool:
    """Return whether a node may compute something although it gets no gradient.

    The engine calls every node of a graph, with or without a gradient. If torch's own formulas get
    None, they return None. A Function in Python or C++ gets zeros instead of None, and runs its
    code.
    """
    name = node_class.__name__
    in_python = is_function(node_class)
    # torch 2.13 gives this name to the nodes of Functions in C++.
    in_cpp = name == "CppFunction"
    return in_python or in_cpp or _READS_ANYWAY.search(name) is not None


@functools.lru_cache
def is_compiled(node_class: type) -> bool:
    """Return whether a node belongs to a compiled module, which refuses ``retain_graph=True``."""
    # AOTAutograd gives this name to its Function. It may reuse memory that backward has read
    # (donated buffers). Seen in torch 2.13. Without it: catch the RuntimeError about donated
    # buffers, and take the gradient of the pose without retain_graph.
    return node_class.__name__ == "CompiledFunctionBackward"
