"""Make the first operation on torch's meta device fast.

Tensors on the meta device have a shape and a dtype, but no numbers. Most operations on it are
written in Python. The first of them imports torch's compiler, which takes about one second.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtenn_core._torch_internals import DispatchMode
from mtenn_core.testing._probe.operations import (
    changes_first_argument,
    makes_new_tensors,
    tensors_of,
    tree_map,
)

META = torch.device("meta")


class ShapesFromCpu(DispatchMode):
    """A mode that runs operations on the CPU to find the shapes of results on the meta device.

    This applies only to operations that make new tensors or change one in place, and whose
    arguments are all on the meta device. Torch itself runs all other operations. It raises an error
    if an operation mixes devices or needs numbers.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        in_place = changes_first_argument(func)
        if not (_only_on_meta(args, kwargs) and (in_place or makes_new_tensors(func))):
            return func(*args, **kwargs)
        try:
            result = func(*tree_map(_on_cpu, args), **tree_map(_on_cpu, kwargs))
        except Exception:  # for example, because a matrix of ones is singular
            return func(*args, **kwargs)
        return args[0] if in_place else tree_map(_on_meta, result)


def _only_on_meta(args: Any, kwargs: Any) -> bool:
    devices = {tensor.device for tensor in tensors_of((args, kwargs))}
    devices |= {each for each in kwargs.values() if isinstance(each, torch.device)}
    return devices == {META}


def _on_cpu(each: Any) -> Any:
    if isinstance(each, Tensor):
        strided = torch.empty_strided(each.shape, each.stride(), dtype=each.dtype)
        return strided.fill_(1)
    return torch.device("cpu") if isinstance(each, torch.device) else each


def _on_meta(each: Any) -> Any:
    if isinstance(each, Tensor):
        return torch.empty_strided(each.shape, each.stride(), dtype=each.dtype, device=META)
    return each
