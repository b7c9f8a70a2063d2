"""Find the tensors inside of poses. A pose may be any object."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

_NO_TENSORS = (int, float, complex, str, bytes, type(None), type, FunctionType, ModuleType)
_LONG = 100
_DEPTH = 5


def tensors_in(values: Sequence[Any]) -> list[tuple[int, Tensor]]:
    """Return each tensor inside of the values once, with the index of a value that contains it.

    A value may be a tensor, a dict, a list, a dataclass or any object with attributes (PyG's
    ``Data``). The search goes to a depth of five. It does not look into modules.
    """
    # The search goes breadth first. So a tensor is found in its own pose, even if every pose refers
    # to a data set of all poses. ``seen`` keeps the objects alive; otherwise another object could
    # get the id of an object that was freed.
    found = []
    seen: dict[int, object] = {}
    level: list[tuple[int, Any]] = list(enumerate(values))
    for _ in range(_DEPTH):
        below = []
        for index, part in level:
            if isinstance(part, (*_NO_TENSORS, torch.nn.Module)) or id(part) in seen:
                continue
            seen[id(part)] = part
            if isinstance(part, Tensor):
                found.append((index, part))
            else:
                below += [(index, inner) for inner in _parts(part)]
        level = below
    return found


def _parts(whole: Any) -> Iterable[Any]:
    if isinstance(whole, Mapping):
        return whole.values()
    if isinstance(whole, list | tuple):
        # A long list of names or numbers contains no tensors, and a search in it takes long.
        return () if len(whole) > _LONG and isinstance(whole[0], _NO_TENSORS) else whole
    slots = getattr(type(whole), "__slots__", ())
    names = [*getattr(whole, "__dict__", ()), *([slots] if isinstance(slots, str) else slots)]
    return [getattr(whole, name, None) for name in names]
