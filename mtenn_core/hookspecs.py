"""The one hook of the pluggy project ``mtenn``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from mtenn_core.combination import Combination

PROJECT = "mtenn"
hookspec: pluggy.HookspecMarker = pluggy.HookspecMarker(PROJECT)
hookimpl: pluggy.HookimplMarker = pluggy.HookimplMarker(PROJECT)


@hookspec(firstresult=True)
def mtenn_combination() -> type[Combination]:  # type: ignore[empty-body]
    """Return the combination class of this plugin.

    Each entry point of the group ``mtenn.combinations`` refers to one plugin. The name of the entry
    point is the name of the combination. The plugin can be a subclass of
    :class:`~mtenn_core.Combination`, which already implements this hook. The plugin can also be a
    module or an object with a function ``mtenn_combination`` that is marked with
    :data:`mtenn_core.hookimpl`.

    Returns
    -------
    a subclass of :class:`~mtenn_core.Combination`
    """
