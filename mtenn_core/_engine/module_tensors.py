"""The tensors that a module holds: noted, put in for a while, put back."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mtenn_core.errors import GradientError


class Places:
    """Where a module and its children hold tensors, each place once.

    ``functional_call`` takes a module that is registered under two names for two places, and puts
    its own tensor back into the second.

    Parameters
    ----------
    module : the module
    kind : ``"parameters"`` or ``"buffers"``

    Raises
    ------
    GradientError : a tensor has no shape before the first run (``LazyLinear``, say)
    """

    def __init__(self, module: torch.nn.Module, kind: str) -> None:
        self._places = [
            (held, name)
            for child in module.modules()
            for held in [getattr(child, f"_{kind}")]
            for name, tensor in held.items()
            if tensor is not None
        ]
        if any(map(torch.nn.parameter.is_lazy, self.tensors())):
            raise GradientError(
                "a lazy module of the pose model has no parameters yet: run the pose model once on"
                " a pose, or use gradients='graph'"
            )

    def tensors(self) -> list[Tensor]:
        """Return what is there now; a tied parameter more than once."""
        return [held[name] for held, name in self._places]

    @contextmanager
    def holding(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Put these tensors there instead, and in the end what was there before."""
        before = self.tensors()
        self._put(tensors)
        try:
            yield
        finally:
            self._put(before)

    def _put(self, tensors: Sequence[Any]) -> None:
        for (held, name), tensor in zip(self._places, tensors, strict=True):
            held[name] = tensor


# While a module holds other tensors, another thread would take them for its own.
_LOCKS: WeakKeyDictionary[torch.nn.Module, threading.RLock] = WeakKeyDictionary()


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process has a part of it alone (``DTensor``, as ``fully_shard`` makes)."""
    return hasattr(tensor, "device_mesh")


def accelerators(tensors: Sequence[Tensor]) -> list[torch.device]:
    """Return the devices beside the CPU that a run may draw random numbers on."""
    devices = {t.device for t in tensors if t.device.type not in ("cpu", "meta")}
    if torch.cuda.is_initialized():
        devices.add(torch.device("cuda", torch.cuda.current_device()))
    return sorted(devices, key=str)


def lock_of(module: torch.nn.Module) -> threading.RLock:
    """Return the lock to hold while a module holds other tensors."""
    return _LOCKS.setdefault(module, threading.RLock())
