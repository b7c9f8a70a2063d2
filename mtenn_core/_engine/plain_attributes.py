"""Keep the plain attributes of a pose model (counters, metrics) from moving in a second run.

These are attributes of modules and parameters: any value, the entries of lists, dicts and sets, and
tensors that are changed in place. A second run still moves numpy arrays, the attributes of other
objects, and variables of closures.
"""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mtenn_core._engine.autograd_nodes import versions_of
from mtenn_core._torch_internals import buffers_of

Attributes = dict[str, Any]

# torch's own attributes of a module. Its parameters, buffers and flags are restored elsewhere.
_OF_TORCH = frozenset(vars(torch.nn.Module()))
_CONTAINERS = (list, dict, set, deque, tuple)
# Look only at the length of longer containers (a vocabulary, a data set), because there may be many
# entries.
_LONG = 1000

# Values of these types hold no tensor.
SIMPLE = {int, float, bool, str, type(None)}


class PlainAttributes:
    """The plain attributes of modules and parameters, noted before the first run.

    Parameters
    ----------
    owners : the modules and parameters

    Attributes
    ----------
    owned : the attributes of each owner
    """

    def __init__(self, owners: Iterable[Any]) -> None:
        self.owned = [owner.__dict__ for owner in owners]
        self._noted = _notes(self.owned)
        self._moving: dict[int, Attributes] = {}
        # Weak, because a tensor may have a graph, and the graph refers to this object.
        self._edited: list[weakref.ref[Tensor]] = []

    @contextmanager
    def kept(self, *, all_of_them: bool = False) -> Iterator[None]:
        """Undo, at the end of a block, what it has changed in attributes.

        Parameters
        ----------
        all_of_them : keep the attributes of all owners, and note which ones the block changes.
            Otherwise keep only attributes that forward or such a block has changed.
        """
        self._compare_with_noted()
        owned = self.owned if all_of_them else list(self._moving.values())
        notes = _notes(owned, with_all=True)
        edited = [tensor for ref in self._edited if (tensor := ref()) is not None]
        try:
            with _numbers_kept(edited):
                yield
        finally:
            for note in notes:
                if note.has_changed():
                    self._moving[id(note.attributes)] = note.attributes
                    note.restore()

    def move(self) -> bool:
        """Return whether forward or a block has changed any attribute. Most pose models do not."""
        self._compare_with_noted()
        return bool(self._moving)

    def _compare_with_noted(self) -> None:
        """Find the owners whose attributes forward has changed, and tensors changed in place."""
        for note in self._noted:
            if note.has_changed():
                self._moving[id(note.attributes)] = note.attributes
                self._edited += map(weakref.ref, note.edited())
        self._noted = []


class KeptTensors:
    """Tells whether a module keeps a tensor with its graph, in plain attributes or buffers.

    Parameters
    ----------
    modules : the module and its children, each once

    Attributes
    ----------
    found : True if a tensor has been found
    owned, lengths : the attributes of all modules, and the number of attributes of each
    places : those attributes that are not torch's, as pairs of a dict and a name
    """

    def __init__(self, modules: Iterable[torch.nn.Module]) -> None:
        self.found = False
        self.owned = [held for m in modules for held in (m.__dict__, buffers_of(m))]
        self.lengths: list[int] = []
        self.places: list[tuple[Attributes, str]] = []

    def search(self) -> None:
        """Look for a tensor with a graph."""
        lengths = list(map(len, self.owned))
        if lengths != self.lengths:
            self.lengths = lengths
            self.places = [(held, name) for held in self.owned for name in _without_torch(held)]
        self.found = bool(_with_graph(held[name] for held, name in self.places if name in held))


def tensors_with_graph(owned: Iterable[Attributes]) -> list[Tensor]:
    """Return the attributes, and entries of containers, that are tensors with a graph."""
    return _with_graph(value for held in owned for value in _without_torch(held).values())


def _with_graph(values: Iterable[Any]) -> list[Tensor]:
    return [tensor for tensor in _tensors(values) if tensor.grad_fn is not None]


@contextmanager
def attributes_kept(owned: Iterable[Attributes]) -> Iterator[None]:
    """Undo, at the end of a block, what it has changed in attributes.

    Parameters
    ----------
    owned : ``vars()`` of modules and parameters
    """
    notes = _notes(owned, with_all=True)
    try:
        with _numbers_kept([tensor for note in notes for tensor in note.tensors()]):
            yield
    finally:
        for note in notes:
            note.restore()


@contextmanager
def _numbers_kept(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Put the numbers of tensors back at the end of a block."""
    # An expanded tensor is a view. Its base has the numbers.
    own = [tensor for tensor in tensors if 0 not in tensor.stride()]
    copies = [tensor.detach().clone() for tensor in own]
    try:
        yield
    finally:
        for tensor, copy in zip(own, copies, strict=True):
            # With .data, torch does not count a change. A graph may have saved the tensor.
            tensor.data.copy_(copy)


def _notes(owned: Iterable[Attributes], *, with_all: bool = False) -> list[_Note]:
    return [_Note(attributes, with_all=with_all) for attributes in owned]


class _Note:
    """The attributes of one owner at one time.

    Parameters
    ----------
    attributes : the attributes of the owner
    with_all : also note the entries of long containers, and keep tensors with a graph alive
    """

    def __init__(self, attributes: Attributes, *, with_all: bool = False) -> None:
        self.attributes = attributes
        self._values = values = _without_torch(attributes)
        self._entries: list[tuple[Any, int, list[Any] | None]] = []
        self._versions: dict[int, int] = {}
        self._is_simple = SIMPLE.issuperset(map(type, values.values()))
        if self._is_simple:  # as in most modules
            return
        containers = _containers(values.values())
        self._entries = [
            (found, len(found), _entries(found) if with_all or len(found) <= _LONG else None)
            for found in containers
        ]
        tensors = _tensors(values.values())
        self._versions = dict(zip(map(id, tensors), versions_of(tensors), strict=True))
        if not with_all:
            # A note lives as long as the graphs of the call. It must not keep earlier graphs alive.
            values = {name: _weak(value) for name, value in values.items()}
            self._entries = [
                (found, length, entries and list(map(_weak, entries)))
                for found, length, entries in self._entries
            ]
        self._values = values

    def has_changed(self) -> bool:
        now = _without_torch(self.attributes)
        if now.keys() != self._values.keys() or not all(
            map(_is, now.values(), self._values.values())
        ):
            return True
        if self._is_simple:
            return False
        return any(itertools.starmap(_differs, self._entries)) or bool(self.edited())

    def tensors(self) -> list[Tensor]:
        """Return the tensors that are attributes now, or entries of containers."""
        return _tensors(_without_torch(self.attributes).values())

    def edited(self) -> list[Tensor]:
        """Return the tensors that are new, or that were changed in place since the note."""
        tensors = self.tensors()
        versions = zip(tensors, versions_of(tensors), strict=True)
        return [tensor for tensor, now in versions if self._versions.get(id(tensor)) != now]

    def restore(self) -> None:
        for name in _without_torch(self.attributes).keys() - self._values.keys():
            del self.attributes[name]
        self.attributes.update(self._values)
        for container, length, entries in self._entries:
            if entries is not None and _differs(container, length, entries):
                _refill(container, entries)


def _without_torch(attributes: Attributes) -> Attributes:
    return {name: value for name, value in attributes.items() if name not in _OF_TORCH}


def _containers(values: Iterable[Any]) -> list[Any]:
    """Return the containers among some values, and those inside of them."""
    found = {id(value): value for value in values if isinstance(value, _CONTAINERS)}
    unseen = list(found.values())
    for container in unseen:  # the loop also visits the containers that it appends
        for entry in _short(container):
            if isinstance(entry, _CONTAINERS) and id(entry) not in found:
                found[id(entry)] = entry
                unseen.append(entry)
    return unseen


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors among some values, and those in containers."""
    values = list(values)
    inside = itertools.chain.from_iterable(map(_short, _containers(values)))
    return [value for value in (*values, *inside) if isinstance(value, Tensor)]


def _short(container: Any) -> Iterable[Any]:
    """Return the values in a container, or nothing for a long one."""
    if len(container) > _LONG:
        return ()
    values: Iterable[Any] = container.values() if isinstance(container, dict) else container
    return values


def _entries(container: Any) -> list[Any]:
    """Return the entries of a list or set. Return the keys of a dict, and then its values."""
    return [*container, *container.values()] if isinstance(container, dict) else [*container]


def _refill(container: Any, entries: list[Any]) -> None:
    """Put the result of :func:`_entries` back into a container."""
    container.clear()
    if isinstance(container, dict):
        half = len(entries) // 2
        # One by one, because Counter.update counts.
        for key, value in zip(entries[:half], entries[half:], strict=True):
            container[key] = value
    elif isinstance(container, set):
        container.update(entries)
    else:
        container.extend(entries)


def _differs(container: Any, length: int, entries: list[Any] | None) -> bool:
    """Return whether the entries of a container have changed; if they are None, its length."""
    if entries is None or len(container) != length:
        return len(container) != length
    return not all(map(_is, _entries(container), entries))


def _weak(value: Any) -> Any:
    """Return a weak reference to a tensor that may have a graph, and any other value itself."""
    # Not grad_fn: torch raises an error for the views of FullyShardedDataParallel.
    may_have_graph = isinstance(value, Tensor) and value.requires_grad
    return weakref.ref(value) if may_have_graph else value


def _is(value: Any, noted: Any) -> bool:
    return value is noted or (isinstance(noted, weakref.ref) and value is noted())
