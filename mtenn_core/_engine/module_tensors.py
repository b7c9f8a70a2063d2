"""The parameters and buffers of a module, replaced for a while."""

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
    """The attributes of a module and its children that hold tensors, each once.

    Not ``torch.func.functional_call``: it counts a child that is registered under two names twice,
    and then leaves its own tensor in the second place.

    Parameters
    ----------
    module : the module
    kind : ``"parameters"`` or ``"buffers"``

    Raises
    ------
    GradientError : a tensor has no shape before the first run (``LazyLinear``)
    """

    def __init__(self, module: torch.nn.Module, kind: str) -> None:
        # Module._parameters and Module._buffers, the dicts themselves: setattr would refuse a plain
        # tensor in place of a parameter. torch.nn.Module keeps both for subclasses to read.
        self._places = [
            (held, name)
            for child in module.modules()
            for held in [getattr(child, f"_{kind}")]
            for name, tensor in held.items()
            if tensor is not None
        ]
        if any(map(torch.nn.parameter.is_lazy, self.tensors())):
            raise GradientError(
                "a lazy module of the pose model has no parameters yet. First run the pose model"
                " once on a pose, or use gradients='graph'."
            )

    def tensors(self) -> list[Tensor]:
        """Return the tensors in these places; a tied parameter more than once."""
        return [held[name] for held, name in self._places]

    @contextmanager
    def holding(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Put other tensors into these places, and at the end the previous ones."""
        before = self.tensors()
        self._put(tensors)
        try:
            yield
        finally:
            self._put(before)

    def _put(self, tensors: Sequence[Any]) -> None:
        for (held, name), tensor in zip(self._places, tensors, strict=True):
            held[name] = tensor


class Aliases:
    """Detached aliases of a module's trainable parameters: other tensors on the same memory.

    A graph on aliases ends there: hooks on the parameters do not see its backward.

    Attributes
    ----------
    params, aliases : by the name of the parameter
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._places = Places(module, "parameters")
        self.params = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.aliases = {n: p.detach().requires_grad_() for n, p in self.params.items()}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the aliases into the module, and at the end its parameters."""
        alias_of = {id(param): self.aliases[name] for name, param in self.params.items()}
        tensors = [alias_of.get(id(param), param) for param in self._places.tensors()]
        with self._places.holding(tensors):
            yield


# While a module holds other tensors, another thread would run with them.
_LOCKS: WeakKeyDictionary[torch.nn.Module, threading.RLock] = WeakKeyDictionary()


def lock_of(module: torch.nn.Module) -> threading.RLock:
    """Return the lock of a module, held while other tensors are in its places."""
    return _LOCKS.setdefault(module, threading.RLock())


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this process has only a part of a tensor (``DTensor``)."""
    return hasattr(tensor, "device_mesh")


def sharded_part(module: torch.nn.Module) -> str | None:
    """Return the name of a module that is sharded over processes, None if there is none."""
    modules = list(module.named_modules())
    sharding = set(filter(_is_sharding, {type(part) for _, part in modules}))
    for name, part in modules:
        if type(part) in sharding or any(map(is_sharded, part._parameters.values())):
            return name or type(module).__name__
    return None


def _is_sharding(module_class: type[torch.nn.Module]) -> bool:
    """Return whether ``fully_shard`` or ``FullyShardedDataParallel`` manages modules of a class.

    Between forward and backward, the parameters of such a module may look like any others. The
    classes are compared by name: they moved from one module of torch to another, whose import takes
    time.
    """
    return any(
        parent.__name__ in ("FSDPModule", "FullyShardedDataParallel")
        and parent.__module__.startswith("torch.distributed.")
        for parent in module_class.__mro__
    )


def accelerators(tensors: Sequence[Tensor]) -> list[torch.device]:
    """Return the devices besides the CPU on which a run may draw random numbers."""
    devices = {t.device for t in tensors if t.device.type not in ("cpu", "meta")}
    if torch.cuda.is_initialized():
        devices.add(torch.device("cuda", torch.cuda.current_device()))
    return sorted(devices, key=str)
