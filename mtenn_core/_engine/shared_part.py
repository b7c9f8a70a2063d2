"""A part of the pose model that all poses of a compound share: it runs once for each compound."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

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


class Detached(NamedTuple):
    """An output of the shared part, cut off from its graph.

    Attributes
    ----------
    output : the output with leaves instead of tensors with a graph
    tensors, leaves : the tensors with a graph by name, and the leaf in the place of each
    """

    output: Any
    tensors: dict[str, Tensor]
    leaves: dict[str, Tensor]


def detached(output: Any) -> Detached:
    """Return an output of the shared part without its graph.

    Raises
    ------
    GradientError : a tensor with a graph is not in a tuple, list or dict
    """
    cut = Detached(output, {}, {})
    cut = cut._replace(output=_cut(output, cut))
    known = set(map(id, cut.tensors.values()))
    for _, tensor in tensors_in([output]):
        if tensor.requires_grad and id(tensor) not in known:
            raise GradientError(
                "gradients='stored' finds the tensors of the shared part's output only in tuples,"
                f" lists and dicts; found {type(output).__name__}. Return one of these, or use"
                " gradients='recomputed' or 'graph'."
            )
    return cut


def _cut(part: Any, cut: Detached) -> Any:
    """Return a part of an output without its graph. Add its tensors and leaves to ``cut``."""
    if isinstance(part, Tensor):
        if not part.requires_grad:
            return part
        leaf = part.detach().requires_grad_()
        # The gradients of poses do not accumulate in .grad. Only the backward of a loss does.
        leaf.register_post_accumulate_grad_hook(_refuse)
        name = f"shared output {len(cut.tensors)}"
        cut.tensors[name], cut.leaves[name] = part, leaf
        return leaf
    if isinstance(part, dict):
        # Keep the class: the dicts of some libraries have their entries as attributes, too.
        whole = copy.copy(part)
        for key, value in part.items():
            whole[key] = _cut(value, cut)
        return whole
    if isinstance(part, list | tuple):
        values = [_cut(value, cut) for value in part]
        return type(part)(*values) if hasattr(part, "_fields") else type(part)(values)
    return part


def _refuse(_: Tensor) -> None:
    raise GradientError(
        "the loss uses a tensor that the pose model computed from the output of the shared part and"
        " kept, such as a penalty. gradients='stored' would lose the gradient of the shared part."
        " Use gradients='recomputed' or 'graph', or compute the tensor in the shared part."
    )
