"""The parameters and buffers of a module, and their temporary replacement."""

from __future__ import annotations

import operator
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mtenn_core._torch_internals import buffers_of, parameters_of
from mtenn_core.errors import GradientError


class Place(NamedTuple):
    """A place in a module: the dict ``Module._parameters`` or ``Module._buffers``, and a name."""

    held: dict[str, Tensor | None]
    name: str
    tensor: Tensor | None


class Places:
    """The places in a module and its children that hold parameters or buffers.

    ``torch.func.functional_call`` does not work here. If a child is registered under two names,
    ``functional_call`` counts the child twice and leaves its own tensor in the second place.

    Parameters
    ----------
    modules : the module and its children, each once
    kind : ``"parameters"`` or ``"buffers"``

    Attributes
    ----------
    dicts : the dict of each module, from a name to a tensor or None

    Raises
    ------
    GradientError : a tensor gets its shape only in the first run (``LazyLinear``)
    """

    def __init__(self, modules: Iterable[torch.nn.Module], kind: str) -> None:
        # setattr would refuse a plain tensor in place of a parameter.
        table_of = parameters_of if kind == "parameters" else buffers_of
        self.dicts = [table_of(module) for module in modules]
        if any(map(torch.nn.parameter.is_lazy, self.tensors())):
            raise GradientError(
                "a lazy module of the pose model has no parameters yet. First run the pose model"
                " once on a pose, or use gradients='graph'."
            )

    def now(self) -> list[Place]:
        """Return the places as they are now. A forward may add, empty and remove places."""
        return [Place(held, *item) for held in self.dicts if held for item in held.items()]

    def tensors(self) -> list[Tensor]:
        """Return the tensors in these places. A tied parameter appears more than once."""
        return [t for held in self.dicts if held for t in held.values() if t is not None]

    @contextmanager
    def holding(self, places: Sequence[Place]) -> Iterator[None]:
        """Make these the only places. At the end, restore the previous places and tensors."""
        before = self.now()
        try:
            self._put(places)
            yield
        finally:
            self._put(before)

    def _put(self, places: Sequence[Place]) -> None:
        # Only if a forward has added or removed places: a ScriptModule refuses to clear its dict.
        now = [(id(place.held), place.name) for place in self.now()]
        if now != [(id(place.held), place.name) for place in places]:
            for held in self.dicts:
                held.clear()
        for held, name, tensor in places:
            held[name] = tensor


def same_places(one: Sequence[Place], other: Sequence[Place]) -> bool:
    """Return whether the same places hold the same tensors."""
    return len(one) == len(other) and all(
        a.tensor is b.tensor and a.name == b.name for a, b in zip(one, other, strict=True)
    )


def copied(place: Place) -> Place:
    """Return the place with a copy of its tensor."""
    if (tensor := place.tensor) is None:
        return place
    return place._replace(tensor=tensor.detach().clone().requires_grad_(tensor.requires_grad))


class Leaves:
    """A module's trainable parameters, as leaves of the graphs of its runs.

    Inside ``torch.func.functional_call``, a parameter may be the result of a computation. A
    detached alias then takes its place: another tensor with the same memory. The gradient with
    respect to the alias does not contain what the parameter passes on to other parameters.

    Attributes
    ----------
    params, leaves : dicts from the name of the parameter to the tensor
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._places = Places(module.modules(), "parameters")
        self.params = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.leaves = {
            name: param if param.is_leaf else param.detach().requires_grad_()
            for name, param in self.params.items()
        }

    def in_place(self) -> AbstractContextManager[None]:
        """Return a context with the leaves in the module. At the end, the parameters are back."""
        same = all(map(operator.is_, self.params.values(), self.leaves.values()))
        return nullcontext() if same else self._holding_leaves()

    @contextmanager
    def _holding_leaves(self) -> Iterator[None]:
        alias_of = {id(param): self.leaves[name] for name, param in self.params.items()}
        now = self._places.now()
        with self._places.holding(
            [place._replace(tensor=alias_of.get(id(place.tensor), place.tensor)) for place in now]
        ):
            yield


# While a module temporarily holds other tensors, a run in a second thread would use them.
_LOCKS: WeakKeyDictionary[torch.nn.Module, threading.RLock] = WeakKeyDictionary()


def lock_of(module: torch.nn.Module) -> threading.RLock:
    """Return the lock of a module. Hold it while other tensors are in the module's places."""
    return _LOCKS.setdefault(module, threading.RLock())


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a ``DTensor``, of which this process has only a part."""
    return hasattr(tensor, "device_mesh")


def sharded_part(module: torch.nn.Module) -> str | None:
    """Return the name of a submodule that is sharded over processes, or None."""
    modules = list(module.named_modules())
    sharding = set(filter(_is_sharding, {type(part) for _, part in modules}))
    for name, part in modules:
        if type(part) in sharding or any(map(is_sharded, parameters_of(part).values())):
            return name or type(module).__name__
    return None


def _is_sharding(module_class: type[torch.nn.Module]) -> bool:
    """Return whether ``fully_shard`` or ``FullyShardedDataParallel`` manages modules of a class.

    Between forward and backward, the parameters of such a module may look like ordinary parameters.
    The classes are compared by name because torch has moved them to another module, and because
    their import takes time.
    """
    return any(
        parent.__name__ in ("FSDPModule", "FullyShardedDataParallel")
        and parent.__module__.startswith("torch.distributed.")
        for parent in module_class.__mro__
    )


def unsharded_class(module_class: type) -> type:
    """Return the class that a module had before ``fully_shard`` replaced it by a subclass."""
    return next(parent for parent in module_class.__mro__ if not _is_sharding(parent))


def accelerators(tensors: Sequence[Tensor]) -> list[torch.device]:
    """Return the devices, without the CPU, on which a run may draw random numbers."""
    devices = {t.device for t in tensors if t.device.type not in ("cpu", "meta")}
    if torch.cuda.is_initialized():
        devices.add(torch.device("cuda", torch.cuda.current_device()))
    return sorted(devices, key=str)
