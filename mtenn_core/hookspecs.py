"""The one hook of the pluggy project ``mtenn``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from mtenn_core.combination import Combination

PROJECT = "mtenn"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec(firstresult=True)
def mtenn_combination() -> type[Combination]:  # type: ignore[empty-body]
    """Return the combination class of this plugin.

    A plugin is whatever an entry point of the group ``mtenn.combinations`` names: a subclass of
    :class:`~mtenn_core.Combination`, which implements this hook already, or a module or object with
    a function of this name, marked with :data:`mtenn_core.hookimpl`. The name of the entry point is
    the name of the combination.

    Returns
    -------
    a subclass of :class:`~mtenn_core.Combination`
    """
