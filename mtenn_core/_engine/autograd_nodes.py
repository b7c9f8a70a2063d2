"""The nodes of autograd's graphs, and every private interface of torch that the engine uses.

Each private interface has a comment: its use, the version of torch in which it was seen to work,
and what could replace it. The rest of the engine goes through this module.
"""

from __future__ import annotations

import functools
import operator
import re
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# The number of the backward pass that runs on this thread, -1 outside of one. It says whether two
# calls of a hook or a Function belong to the same backward. Seen in torch 2.13, whose
# torch.utils.checkpoint and register_multi_grad_hook use it too. Without it: a number that _Join
# (skipping.py) raises in each backward, which does not see backwards that start below the join.
current_backward = torch._C._current_graph_task_id

# Whether the backward pass that runs was called with retain_graph=True. Seen in torch 2.13, whose
# AOTAutograd asks it before it frees what it saved. Without it: the buffer of gradients could not
# be reused, and each step would fill fresh memory.
graph_is_retained = torch._C._autograd._get_current_graph_task_keep_graph

# How often a tensor was changed in place; RuntimeError for a tensor of inference_mode. Autograd's
# own check of saved tensors compares the same number. Seen in torch 2.13; every release since 0.4
# has it, without documentation. Without it: copies of the values, which cost their memory.
version_of = operator.attrgetter("_version")


def is_batched(tensor: Tensor) -> bool:
    """Return whether a tensor stands for many, under ``vmap`` or ``is_grads_batched``.

    Its values cannot be read (``tolist``, ``item``), since they differ along the hidden dimension.
    """
    # Seen in torch 2.13. is_grads_batched uses the "legacy" kind. Without them: try tolist() and
    # catch the RuntimeError.
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor)


def engine_asks() -> bool:
    """Return whether autograd's engine has called the hook that calls this function.

    Otherwise Python code did that wants to compute with the tensor: ``torch.utils.checkpoint``, or
    somebody who reads ``grad_fn.saved_tensors``.
    """
    hook: Any = sys._getframe(1)
    caller = hook.f_back
    # The engine runs nodes of the CPU on the thread that called it, so the frame below the hook is
    # the one that called the engine. Threads of accelerators have no Python frame below the hook.
    # _engine_run_backward was seen in torch 2.13; all of backward(), grad() and their like end
    # there. Without it: hand out the tensor always, which runs poses again that have no gradient.
    return caller is None or caller.f_code is torch.autograd.graph._engine_run_backward.__code__


# The class of the nodes that add a gradient to a leaf has no public name. Seen in torch 2.13, where
# the gradient edge of a leaf is such a node. Without it: compare class names.
AccumulateGrad = type(
    torch.autograd.graph.get_gradient_edge(torch.empty((), requires_grad=True)).node
)


def is_leaf(node: Any) -> bool:
    """Return whether a node adds a gradient to a leaf; ``node.variable`` is that leaf."""
    return type(node) is AccumulateGrad


def nodes_of(root: Any, known: Iterable[Any] = ()) -> list[Any]:
    """Return the nodes of a graph, without known ones and those only reached through them."""
    # None stands in next_functions for an input that needs no gradient.
    seen = {*known, None}
    if root in seen:
        return []
    seen.add(root)
    found = [root]
    for node in found:  # which grows meanwhile
        for parent, _ in node.next_functions:
            if parent not in seen:
                seen.add(parent)
                found.append(parent)
    return found


def operations(root: Tensor) -> list[type]:
    """Return the class of each node of a graph that is no leaf."""
    return [type(node) for node in nodes_of(root.grad_fn) if not is_leaf(node)]


def computes_in(dtype: torch.dtype, root: Tensor) -> bool:
    """Return whether some node of a graph has a result of this dtype."""
    # _input_metadata describes the gradients that a node takes, which have the dtypes of its
    # results. Seen in torch 2.13. Without it: a TorchDispatchMode around the run, which is slow.
    nodes = nodes_of(root.grad_fn)
    return any(result.dtype == dtype for node in nodes for result in node._input_metadata)


# Nodes of torch that read what they saved even where they have no gradient: fused attention and
# recurrent layers. Found in torch 2.13 by running every formula of derivatives.yaml that has
# several results without a gradient; tests/engine/test_skipping.py repeats that.
_READS_ANYWAY = re.compile("Attention|Rnn|Lstm|Mkldnn")


@functools.lru_cache
def computes_anyway(node_class: type) -> bool:
    """Return whether a node may compute something where it is given no gradient.

    The engine calls every node of a graph, with or without a gradient. torch's own formulas return
    None for None. A Function in Python or C++ is given zeros instead, and runs its code.
    """
    name = node_class.__name__
    # The base of the nodes of all Functions in Python, undocumented; seen in torch 2.13. Without
    # it: hasattr(node, "saved_tensors").
    in_python = issubclass(node_class, torch.autograd.function.BackwardCFunction)
    # The name that torch 2.13 gives to nodes of Functions in C++.
    in_cpp = name == "CppFunction"
    return in_python or in_cpp or _READS_ANYWAY.search(name) is not None


def add_in_place(sums: list[Tensor], tensors: list[Tensor], factor: float) -> None:
    """Add ``factor`` · tensor to each sum in one call."""
    # A beta interface of torch 2.13, which the optimizers use. Without it: a loop of add_().
    torch._foreach_add_(sums, tensors, alpha=factor)
