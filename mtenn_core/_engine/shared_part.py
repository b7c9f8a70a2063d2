"""A part of the pose model that all poses of a compound share: it runs once for each compound."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from mtenn_core._engine.call import Call
from mtenn_core._engine.chunk import Chunk
from mtenn_core._engine.tensor_search import tensors_in
from mtenn_core.errors import GradientError


def run_shared(shared: torch.nn.Module, call: Call) -> Call:
    """Run the shared part for each compound. Return the call with its outputs.

    Parameters
    ----------
    shared : the option of the model
    call : a call with ``shared_inputs``
    """
    assert call.shared_inputs is not None
    outputs: list[Any] = []
    for compound, (given, size) in enumerate(zip(call.shared_inputs, call.sizes, strict=True)):
        try:
            # Another process of a group has the poses of a compound without poses.
            outputs.append(shared(given) if size else None)
        except Exception as error:
            error.add_note(f"raised by the shared part on compound {compound}")
            raise
    return call._replace(chunks=with_outputs(call.chunks, outputs, call), shared_outputs=outputs)


def with_outputs(chunks: Sequence[Chunk], outputs: Sequence[Any], call: Call) -> list[Chunk]:
    """Return chunks that give the pose model an output for each pose, or a list for a batch.

    Parameters
    ----------
    outputs : one entry per compound
    """
    of_poses = [out for out, size in zip(outputs, call.sizes, strict=True) for _ in range(size)]
    extended = []
    for chunk in chunks:
        own = of_poses[chunk.first_pose : chunk.first_pose + chunk.n_poses]
        one = chunk.collate is None and not call.collated
        extended.append(chunk._replace(shared=(own[0] if one else own,)))
    return extended


def nodes_of_outputs(call: Call) -> frozenset[Any]:
    """Return the nodes of the graphs in which the tensors of the shared part's outputs end."""
    if call.shared_outputs is None:
        return frozenset()
    tensors = [tensor for _, tensor in tensors_in(call.shared_outputs)]
    return frozenset(get_gradient_edge(t).node for t in tensors if t.requires_grad)


class Replaced(NamedTuple):
    """An output of the shared part with other tensors in the place of those with a graph.

    Attributes
    ----------
    output : the output with the other tensors
    tensors, replacements : the tensors with a graph by name, and the tensor in the place of each
    """

    output: Any
    tensors: dict[str, Tensor]
    replacements: dict[str, Tensor]


NOTHING = Replaced(None, {}, {})


def replaced(output: Any, replacement: Callable[[Tensor], Tensor]) -> Replaced:
    """Return an output of the shared part with a replacement for each tensor that has a graph.

    Raises
    ------
    GradientError : a tensor with a graph is not in a tuple, list or dict
    """
    found = Replaced(output, {}, {})
    found = found._replace(output=_replace(output, replacement, found))
    known = set(map(id, found.tensors.values()))
    for _, tensor in tensors_in([output]):
        if tensor.requires_grad and id(tensor) not in known:
            raise GradientError(
                "gradients='stored' finds the tensors of the shared part's output only in tuples,"
                f" lists and dicts; found {type(output).__name__}. Return one of these, or use"
                " gradients='recomputed' or 'graph'."
            )
    return found


def _replace(part: Any, replacement: Callable[[Tensor], Tensor], found: Replaced) -> Any:
    """Return a part of an output with replacements. Add its tensors to ``found``."""
    if isinstance(part, Tensor):
        if not part.requires_grad:
            return part
        name = f"shared output {len(found.tensors)}"
        found.tensors[name], found.replacements[name] = part, replacement(part)
        return found.replacements[name]
    if isinstance(part, dict):
        # Keep the class: the dicts of some libraries have their entries as attributes, too.
        whole = copy.copy(part)
        for key, value in part.items():
            whole[key] = _replace(value, replacement, found)
        return whole
    if isinstance(part, list | tuple):
        values = [_replace(value, replacement, found) for value in part]
        return type(part)(*values) if hasattr(part, "_fields") else type(part)(values)
    return part


class Gate:
    """Lets tensors through unchanged. While it is closed, their gradients end at the gate.

    ``"stored"`` closes it to take the gradient of a pose with respect to the tensors. If a loss
    uses another tensor of the pose model (a penalty), its gradient goes on to the shared part.

    Attributes
    ----------
    closed : True while gradients end here
    """

    def __init__(self) -> None:
        self.closed = False

    def through(self, tensor: Tensor) -> Tensor:
        """Return the tensor with the gate in its graph."""
        passed: Tensor = _Through.apply(tensor, self)
        return passed


NO_GATE = Gate()


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, gate: Gate) -> Tensor:
        ctx.gate = gate
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None]:
        return None if ctx.gate.closed else grad_output, None
