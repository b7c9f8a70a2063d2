"""Torch's meta device, without its slow first use.

Tensors on the meta device have a shape and a dtype, but no numbers. Most of its operations are
written in Python, and the first call of one imports torch's compiler: about one second.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtenn_core.testing._probe.torch_internals import (
    DispatchMode,
    makes_new_tensors,
    tensors_of,
    tree_map,
)

META = torch.device("meta")


class ShapesFromCpu(DispatchMode):
    """Finds the shapes of results on the meta device by running the operation on the CPU.

    It does so only for operations that make new tensors from tensors on the meta device alone.
    Torch itself runs all others: it decides which devices may be mixed, and what needs numbers.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _only_on_meta(args, kwargs) and makes_new_tensors(func):
            try:
                result = func(*tree_map(_on_cpu, args), **tree_map(_on_cpu, kwargs))
            except Exception:  # for example, of a matrix that happens to be singular
                return func(*args, **kwargs)
            return tree_map(_on_meta, result)
        return func(*args, **kwargs)


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
