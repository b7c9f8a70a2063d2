"""The buffers of a pose model before each run: their places, states and copies."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

from mtenn_core._engine.autograd_nodes import versions_of
from mtenn_core._engine.module_tensors import Place, Places, copied

_UNCOUNTED = ("running_mean", "running_var")


class Buffers(NamedTuple):
    """The buffers before a run.

    Attributes
    ----------
    places : the places and the buffers themselves
    states : for each buffer, a value that changes when the buffer or its place changes
    copies : the places with copies of the buffers
    """

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
        places = self._places.now()
        states = _states(places)
        if states != self._noted.states:
            known = dict(zip(self._noted.states, self._noted.copies, strict=True))
            copies = [
                known[state] if state in known else copied(place)
                for place, state in zip(places, states, strict=True)
            ]
            self._noted = Buffers(places, states, copies)
        return self._noted

    def differ_from(self, buffers: Buffers) -> bool:
        """Return whether a buffer is new, gone or another tensor, or has another value."""
        return _states(self._places.now()) != buffers.states

    def holding(self, buffers: Buffers) -> AbstractContextManager[None]:
        """Return a context in which the module has copies of these buffers, and no others."""
        # Copy the copies, because a run may change its buffers, and may have to be repeated.
        return self._places.holding(list(map(copied, buffers.copies)))


def _states(places: Sequence[Place]) -> list[Hashable]:
    """Return a value for each buffer that changes when the buffer changes.

    torch's batch norm (2.13) does not count its changes of these statistics as changes of a tensor.
    Only another buffer of the module, a counter, shows them.
    """
    versions = versions_of(place.tensor for place in places)
    # An id identifies a tensor, because Buffers keeps the tensors alive.
    states = [
        (id(place.held), place.name, id(place.tensor), version)
        for place, version in zip(places, versions, strict=True)
    ]
    return [
        (place.name, *(of for of in states if of[0] == state[0]))
        if place.name in _UNCOUNTED
        else state
        for place, state in zip(places, states, strict=True)
    ]
