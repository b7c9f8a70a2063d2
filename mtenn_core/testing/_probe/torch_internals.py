"""Private interfaces of torch that the conformance suite uses.

Each has a comment: its use, the version of torch in which it was seen to work, and what could
replace it. The suite also uses ``version_of`` from the engine's own list of them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils import _pytree

# Apply a function to the leaves of nested lists, tuples and dicts: the arguments of an operation.
# Seen in torch 2.13, whose own dispatch modes use it. Without it: a recursion of a few lines.
tree_map = _pytree.tree_map


def tensors_of(arguments: Any) -> list[Tensor]:
    """Return the tensors among the arguments or results of an operation, repeated ones too."""
    # See tree_map.
    return [leaf for leaf in _pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)]
