"""The tensors that a module holds: noted, put in for a while, put back."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor


class Places:
    """Where a module and its children hold tensors, each place once.

    ``functional_call`` takes a module that is registered under two names for two places, and puts
    its own tensor back into the second.

    Parameters
    ----------
    module : the module
    kind : ``"parameters"`` or ``"buffers"``
    """

    def __init__(self, module: torch.nn.Module, kind: str) -> None:
        self._places = [
            (held, name)
            for child in module.modules()
            for held in [getattr(child, f"_{kind}")]
            for name, tensor in held.items()
            if tensor is not None
        ]

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


def lock_of(module: torch.nn.Module) -> threading.RLock:
    """Return the lock to hold while a module holds other tensors."""
    return _LOCKS.setdefault(module, threading.RLock())
