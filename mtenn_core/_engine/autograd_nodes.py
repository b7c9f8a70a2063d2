"""The nodes of autograd's graphs, and every private interface of torch that the engine uses.

For each private interface, a comment gives its use, the version of torch in which it was seen, and
a replacement ("Without it"). The other modules of the engine use these interfaces only through this
module.
"""

from __future__ import annotations

import functools
import operator
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from mtenn_core._process.interrupts import delayed_interrupts

# Returns the number of the backward pass that runs on this thread, or -1 if none runs. Two calls of
# a hook or a Function belong to the same backward if they get the same number. Seen in torch 2.13,
# where torch.utils.checkpoint and register_multi_grad_hook use it, too. Without it: _Join
# (skipping.py) could count its backwards, but would miss backwards that start below the join.
current_backward = torch._C._current_graph_task_id

# Returns True if the running backward pass was called with retain_graph=True. Seen in torch 2.13,
# where AOTAutograd calls it before it frees saved tensors. Without it: the memory of the gradients
# could not be reused, and each step would fill fresh memory.
graph_is_retained = torch._C._autograd._get_current_graph_task_keep_graph

# Returns how often a tensor was changed in place, or raises a RuntimeError for a tensor that was
# made in inference_mode. Autograd compares the same number when it checks saved tensors. Seen in
# torch 2.13; every release since 0.4 has it, but it is not documented. Without it: keep copies of
# the values, which need memory.
version_of = operator.attrgetter("_version")


def versions_of(tensors: Iterable[Tensor | None]) -> list[int]:
    """Return how often each tensor was changed in place; -1 for None and for inference tensors."""
    tensors = list(tensors)
    try:
        return list(map(version_of, tensors))
    except (AttributeError, RuntimeError):
        return [-1 if t is None or t.is_inference() else version_of(t) for t in tensors]


# Returns the tensor of which a tensor is a view, or None. Seen in torch 2.13; every release has it,
# but it is not documented. Without it: compare the addresses of the memory.
base_of = operator.attrgetter("_base")

# Returns a node's number. Nodes that one thread creates later have larger numbers. Seen in torch
# 2.13, where profilers use it. Without it: skip no pose if the pose model keeps any tensor.
sequence_number = operator.methodcaller("_sequence_nr")

# Returns an object for the innermost transform of torch.func that runs this code, or None. Seen in
# torch 2.13. Without it: errors inside of transforms are torch's own, and name no mode that works.
current_transform = torch._C._functorch.peek_interpreter_stack

# Returns the level of torch.autograd.forward_ad, or -1 outside of it. Seen in torch 2.13. Without
# it: "stored" would lose tangents.
forward_ad_level = functools.partial(getattr, torch.autograd.forward_ad, "_current_level")


def is_batched(tensor: Tensor) -> bool:
    """Return whether a tensor represents many tensors, under ``vmap`` or ``is_grads_batched``.

    Such a tensor has a hidden dimension, so its values cannot be read (``tolist``, ``item``).
    """
    # Both functions were seen in torch 2.13. is_grads_batched makes "legacy" tensors. Without them:
    # try tolist() and catch the RuntimeError.
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor)


def over_rows(
    function: Callable[..., Tensor], rows: Tensor, named_rows: Mapping[str, Tensor]
) -> Tensor:
    """Call a function once for all rows, as ``torch.func.vmap`` does. Return its results.

    Parameters
    ----------
    function : ``function(row, **{name: row})``
    rows, named_rows : tensors with one entry per row
    """
    # torch.func.vmap takes 30 µs more per call, for trees of arguments. The four functions were
    # seen in torch 2.13, where vmap calls them. Without them: torch.func.vmap.
    functorch, n_rows = torch._C._functorch, len(rows)
    level = functorch._vmap_increment_nesting(n_rows, "error")
    try:
        row, *named = (
            functorch._add_batch_dim(each, 0, level) for each in (rows, *named_rows.values())
        )
        result = function(row, **dict(zip(named_rows, named, strict=True)))
        return functorch._remove_batch_dim(result, level, n_rows, 0)
    finally:
        functorch._vmap_decrement_nesting()


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
    # caller. _engine_run_backward was seen in torch 2.13; backward(), grad() and similar functions
    # all call it. Without it: always return the tensor. Poses without a gradient would then run
    # again, too.
    return caller is None or caller.f_code is torch.autograd.graph._engine_run_backward.__code__


# The class of the nodes that add gradients to leaves. It has no public name. Seen in torch 2.13,
# where the gradient edge of a leaf has such a node. Without it: compare class names.
AccumulateGrad = type(
    torch.autograd.graph.get_gradient_edge(torch.empty((), requires_grad=True)).node
)


def is_leaf(node: Any) -> bool:
    """Return whether a node adds a gradient to a leaf. The leaf is ``node.variable``."""
    return type(node) is AccumulateGrad


# Returns the hooks of a tensor as a dict, or None. For a leaf, the engine reads this dict in every
# backward. Seen in torch 2.13; every release has it, because Tensor.register_hook writes to it.
# Without it: take the gradients of detached aliases, which a pose model can tell from parameters.
hooks_of = operator.attrgetter("_backward_hooks")


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
    """Return whether any node of a graph has a result of this dtype."""
    # _input_metadata describes the gradients that enter a node. They have the dtypes of its
    # results. Seen in torch 2.13. Without it: a TorchDispatchMode around the run, which is slow.
    nodes = nodes_of(root.grad_fn)
    return any(result.dtype == dtype for node in nodes for result in node._input_metadata)


# These nodes of torch (fused attention and recurrent layers) read their saved tensors even if they
# get no gradient. They were found in torch 2.13. tests/engine/test_skipping.py repeats the search:
# it runs, without a gradient, every formula of derivatives.yaml that has several results.
_READS_ANYWAY = re.compile("Attention|Rnn|Lstm|Mkldnn")


@functools.lru_cache
def computes_anyway(node_class: type) -> bool:
    """Return whether a node may compute something although it gets no gradient.

    The engine calls every node of a graph, with or without a gradient. If torch's own formulas get
    None, they return None. A Function in Python or C++ gets zeros instead of None, and runs its
    code.
    """
    name = node_class.__name__
    # BackwardCFunction is the base class of the nodes of all Functions in Python. It is not
    # documented; seen in torch 2.13. Without it: hasattr(node, "saved_tensors").
    in_python = issubclass(node_class, torch.autograd.function.BackwardCFunction)
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


def add_in_place(sums: list[Tensor], tensors: list[Tensor], factor: float) -> None:
    """Add ``factor`` · tensor to each sum in one call."""
    # This is a beta interface of torch 2.13, which the optimizers also use. Without it: a loop of
    # add_().
    torch._foreach_add_(sums, tensors, alpha=factor)
