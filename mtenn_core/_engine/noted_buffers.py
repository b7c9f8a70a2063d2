"""The buffers of a pose model before each run: their places, states and copies."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

from torch import Tensor

from mtenn_core._engine.autograd_nodes import versions_of
from mtenn_core._engine.module_tensors import Place, Places, copied

_UNCOUNTED = ("running_mean", "running_var")


class Buffers(NamedTuple):
    """The buffers before a run.

    Attributes
    ----------
    key : changes when a buffer is new, gone or another tensor, or has another value
    places : the places and the buffers themselves. They are kept alive, so an id identifies one.
    states : for each buffer, a value that changes when this buffer changes
    copies : the places with copies of the buffers
    """

    key: object = ()
    places: Sequence[Place] = ()
    states: Sequence[Hashable] = ()
    copies: Sequence[Place] = ()


class NotedBuffers:
    """The buffers of a module and its children, and copies for the second runs.

    Parameters
    ----------
    places : the places of the buffers
    """

    def __init__(self, places: Places) -> None:
        self._places = places
        self._noted = Buffers()

    def now(self) -> Buffers:
        """Return the buffers. Use copies from the previous run again if they are still right."""
        key = self._key()
        if key != self._noted.key:
            places = self._places.now()
            states = list(map(_state, places))
            known = dict(zip(self._noted.states, self._noted.copies, strict=True))
            copies = [
                known[state] if state in known else copied(place)
                for place, state in zip(places, states, strict=True)
            ]
            self._noted = Buffers(key, places, states, copies)
        return self._noted

    def differ_from(self, buffers: Buffers) -> bool:
        """Return whether a buffer is new, gone or another tensor, or has another value."""
        return self._key() != buffers.key

    def holding(self, buffers: Buffers) -> AbstractContextManager[None]:
        """Return a context in which the module has copies of these buffers, and no others."""
        # Copy the copies, because a run may change its buffers, and may have to be repeated.
        return self._places.holding(list(map(copied, buffers.copies)))

    def _key(self) -> object:
        # Each chunk calls this three times, so it makes no Place for each buffer.
        dicts = [held for held in self._places.dicts if held]
        tensors = [tensor for held in dicts for tensor in held.values()]
        if any(map(_hides_changes, dicts)):
            return object()  # equal to no other key
        names = [(id(held), *held.keys()) for held in dicts]
        return names, list(map(id, tensors)), versions_of(tensors)


def _state(place: Place) -> Hashable:
    state = id(place.held), place.name, id(place.tensor), *versions_of([place.tensor])
    if place.name not in _UNCOUNTED:
        return state
    # torch's batch norm (2.13) does not count its changes of running statistics as changes of a
    # tensor. Only the counter of the module shows them.
    counter = dict(place.held.items()).get("num_batches_tracked")
    if counter is None:
        return object()
    return *state, id(counter), *versions_of([counter])


def _hides_changes(held: dict[str, Tensor | None]) -> bool:
    """Return whether a module has running statistics, but no counter that shows their changes."""
    if not any(name in held.keys() for name in _UNCOUNTED):  # noqa: SIM118 (a ScriptModule's dict)
        return False
    return dict(held.items()).get("num_batches_tracked") is None
