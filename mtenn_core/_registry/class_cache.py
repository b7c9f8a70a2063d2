"""The classes of the plugins that a registry has loaded."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from mtenn_core._process.locks import Lock, hold
from mtenn_core._registry.policy import Policy
from mtenn_core._registry.record import PluginRecord
from mtenn_core.errors import PluginWarning

if TYPE_CHECKING:
    from mtenn_core.combination import Combination


class ClassCache:
    """The classes of loaded plugins.

    A plugin is loaded once. Other threads that need it wait for the first thread.
    """

    def __init__(self) -> None:
        self._lock = Lock()  # never held while code of a plugin runs
        self._loading: dict[PluginRecord, Lock] = {}
        # The key contains the pins, because a class must be checked again after the pins changed.
        self._classes: dict[tuple[PluginRecord, Any], type[Combination]] = {}

    def load(self, record: PluginRecord, policy: Policy) -> type[Combination]:
        """Return the class of a plugin. Errors: see :func:`mtenn_core._registry.load.load`."""
        from mtenn_core._registry.load import load  # lazy, because a query does not need pluggy

        with self._lock:
            loading = self._loading.setdefault(record, Lock())
        with hold(loading):
            combination = self._classes.get((record, policy.pins))
            if combination is None:
                self._warn_of_older_version(record)
                combination = load(record, policy)
                with self._lock:
                    self._classes[record, policy.pins] = combination
            return combination

    def load_all(self, records: Iterable[PluginRecord], policy: Policy) -> None:
        """Load all plugins, because the policy is strict."""
        try:
            for record in records:
                self.load(record, policy)
        except BaseException as error:
            error.add_note("It was imported because the policy is strict (MTENN_STRICT).")
            raise

    def records(self, combination: type[Combination]) -> list[PluginRecord]:
        """Return the loaded plugins that have this class."""
        with self._lock:
            return [record for (record, _), cls in self._classes.items() if cls is combination]

    def forget(self, record: PluginRecord) -> list[type[Combination]]:
        """Remove a plugin and return its classes."""
        with self._lock:
            self._loading.pop(record, None)
            keys = [key for key in self._classes if key[0] == record]
            return [self._classes.pop(key) for key in keys]

    def _warn_of_older_version(self, record: PluginRecord) -> None:
        with self._lock:
            loaded = [other for other, _ in self._classes if other.owner == record.owner]
        older = [other for other in loaded if other.version != record.version]
        if record.distribution and older:
            warnings.warn(
                f"{record}{record.where}: Python has already imported {older[0].origin}, and keeps"
                " it. Restart Python to use the version that is installed now",
                PluginWarning,
                stacklevel=4,
            )
