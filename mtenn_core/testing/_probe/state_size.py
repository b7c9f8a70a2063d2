"""Size of the state that a combination can keep between calls: on itself, its class, its module."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor
from torch.nn import Module

from mtenn_core.combination import Combination

CONTAINERS = (list, tuple, dict, set, frozenset, deque)
# Longer containers, and containers that are nested deeper, are counted but not searched.
LONGEST = 1000
DEEPEST = 5


def state_size(combination: Combination) -> int:
    """Return the number of entries, numbers and letters in all containers, tensors and texts.

    The sizes of all containers are exact, so their sum grows if one of them grows.
    """
    total = 0
    seen: dict[int, Any] = {}  # keeps the objects alive, so that no other object gets their id
    stack = [(0, place) for place in _places(combination)]
    while stack:
        depth, found = stack.pop()
        if id(found) in seen:
            continue
        seen[id(found)] = found
        total += _size(found)
        if depth < DEEPEST:
            stack += [(depth + 1, part) for part in _parts(found)]
    return total


def _places(combination: Combination) -> Iterator[Any]:
    """Yield the dicts of all modules in a combination, of their classes, and of their files."""
    for module in combination.modules():
        yield vars(module)
        for cls in type(module).__mro__:
            if not cls.__module__.startswith(("torch.", "mtenn_core.", "builtins")):
                yield dict(vars(cls))
                yield vars(sys.modules[cls.__module__]) if cls.__module__ in sys.modules else {}


def _size(found: Any) -> int:
    if isinstance(found, (*CONTAINERS, str, bytes, bytearray)):
        return len(found)
    if isinstance(found, Tensor):
        return found.numel()
    is_cache = isinstance(getattr(found, "__wrapped__", None), FunctionType)
    return int(found.cache_info().currsize) if is_cache and hasattr(found, "cache_info") else 0


def _parts(found: Any) -> list[Any]:
    if isinstance(found, CONTAINERS):
        if len(found) > LONGEST:
            return []
        return list(found.values()) if isinstance(found, dict) else list(found)
    if isinstance(found, ModuleType | type | Module | Tensor):
        return []  # other files and classes; modules are places of their own
    return [vars(found)] if hasattr(found, "__dict__") else []
