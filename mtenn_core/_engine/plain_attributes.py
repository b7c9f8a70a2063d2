"""Keep the plain attributes of a pose model (counters, metrics) from moving in a second run.

These are attributes of modules and parameters: any value, the entries of lists, dicts and sets, and
tensors that are changed in place. A second run still moves numpy arrays, the attributes of other
objects, and variables of closures.
"""

from __future__ import annotations

import itertools
import operator
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from mtenn_core._engine.autograd_nodes import versions_of

Attributes = dict[str, Any]

# torch's own attributes of a module. Its parameters, buffers and flags are restored elsewhere.
_OF_TORCH = frozenset(vars(torch.nn.Module()))
_CONTAINERS = (list, dict, set, deque, tuple)
# Look only at the length of longer containers (a vocabulary, a data set), because there may be many
# entries.
_LONG = 1000


class PlainAttributes:
    """The plain attributes of modules and parameters, noted before the first run.

    Parameters
    ----------
    owners : the modules and parameters
    """

    def __init__(self, owners: Iterable[Any]) -> None:
        self._owners = [owner.__dict__ for owner in owners]
        self._noted = [_Note(attributes) for attributes in self._owners]
        self._moving: list[Attributes] | None = None

    def move(self) -> bool:
        """Return whether the first run has changed any attribute. Most pose models change none."""
        if self._moving is None:
            self._moving = [note.attributes for note in self._noted if note.has_changed()]
            self._noted = []
        return bool(self._moving)

    def kept(self) -> AbstractContextManager[None]:
        """Return a context that, at the end, undoes changes of attributes.

        It knows only attributes that the first run has changed, too.
        """
        return attributes_kept(self._moving or ())

    def tensors_with_graph(self) -> list[Tensor]:
        """Return the attributes, and entries of containers, that are tensors with a graph."""
        values = [v for attributes in self._owners for v in _without_torch(attributes).values()]
        for container in _containers(values):
            if len(container) <= _LONG:
                values += container.values() if isinstance(container, dict) else container
        return [v for v in values if isinstance(v, Tensor) and v.grad_fn is not None]


@contextmanager
def attributes_kept(owners: Iterable[Attributes]) -> Iterator[None]:
    """Undo, at the end of a block, what it has changed in attributes.

    Parameters
    ----------
    owners : ``vars()`` of modules and parameters
    """
    notes = [_Note(attributes, with_long=True) for attributes in owners]
    tensors = [(tensor, tensor.detach().clone()) for note in notes for tensor in note.tensors]
    try:
        yield
    finally:
        for note in notes:
            note.restore()
        for tensor, copy in tensors:
            # With .data, torch does not count a change. A graph may have saved the tensor.
            tensor.data.copy_(copy)


class _Note:
    """The attributes of one owner at one time.

    Parameters
    ----------
    attributes : the attributes of the owner
    with_long : also note the entries of long containers

    Attributes
    ----------
    tensors : the tensors among the attributes
    """

    def __init__(self, attributes: Attributes, *, with_long: bool = False) -> None:
        self.attributes = attributes
        self._values = _without_torch(attributes)
        values = self._values.values()
        self._entries = [
            (found, len(found), _entries(found) if with_long or len(found) <= _LONG else None)
            for found in _containers(values)
        ]
        self.tensors = [value for value in values if isinstance(value, Tensor)]
        self._versions = self.tensors and versions_of(self.tensors)

    def has_changed(self) -> bool:
        now = _without_torch(self.attributes)
        return not (
            now.keys() == self._values.keys()
            and all(map(operator.is_, now.values(), self._values.values()))
            and (not self.tensors or versions_of(self.tensors) == self._versions)
            and not any(itertools.starmap(_differs, self._entries))
        )

    def restore(self) -> None:
        for name in _without_torch(self.attributes).keys() - self._values.keys():
            del self.attributes[name]
        self.attributes.update(self._values)
        for container, length, entries in self._entries:
            if entries is not None and _differs(container, length, entries):
                container.clear()
                _refill(container, entries)


def _without_torch(attributes: Attributes) -> Attributes:
    return {name: value for name, value in attributes.items() if name not in _OF_TORCH}


def _containers(values: Iterable[Any]) -> list[Any]:
    """Return the containers among some values, and those inside of them."""
    found = {id(value): value for value in values if isinstance(value, _CONTAINERS)}
    unseen = list(found.values())
    for container in unseen:  # the loop also visits the containers that it appends
        if len(container) > _LONG:
            continue
        for entry in container.values() if isinstance(container, dict) else container:
            if isinstance(entry, _CONTAINERS) and id(entry) not in found:
                found[id(entry)] = entry
                unseen.append(entry)
    return unseen


def _entries(container: Any) -> list[Any]:
    """Return the entries of a list or set. Return the keys of a dict, and then its values."""
    return [*container, *container.values()] if isinstance(container, dict) else [*container]


def _refill(container: Any, entries: list[Any]) -> None:
    """Put the result of :func:`_entries` back into an empty container."""
    if isinstance(container, dict):
        half = len(entries) // 2
        container.update(zip(entries[:half], entries[half:], strict=True))
    elif isinstance(container, set):
        container.update(entries)
    else:
        container.extend(entries)


def _differs(container: Any, length: int, entries: list[Any] | None) -> bool:
    """Return whether a container has other entries; None if only the length is known."""
    if entries is None or len(container) != length:
        return len(container) != length
    return not all(map(operator.is_, _entries(container), entries))
