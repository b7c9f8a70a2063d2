"""The registry: names to validated combinations."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from packaging.utils import InvalidName, canonicalize_name

from mtenn_core._registry._arguments import (
    build_example,
    declared_examples,
    validation_key,
)
from mtenn_core._registry._scan import PluginRecord, path_key, scan
from mtenn_core.errors import (
    CombinationConflictError,
    CombinationNotFoundError,
    GradientValidationError,
    PluginSpecError,
)

if TYPE_CHECKING:
    import pluggy

    from mtenn_core.combination import Combination

GROUP = "mtenn.combinations"


class Registry:
    """Combinations by name: those of installed distributions and those registered by a call.

    Names are compared without case, with ``-``, ``_`` and ``.`` as one; ``distribution:name``
    always works. Listing imports no plugin. :meth:`get` and :meth:`create` import the one plugin
    that is asked for, and hand it out after its gradient was validated against finite differences,
    once per class and arguments in a process.

    Parameters
    ----------
    group : the entry-point group to look in
    """

    def __init__(self, group: str = GROUP) -> None:
        self.group = group
        self._scanned: tuple[Any, list[PluginRecord]] | None = None
        self._registered: dict[str, PluginRecord] = {}
        self._temporary: list[dict[str, PluginRecord]] = []
        self._classes: dict[PluginRecord, type[Combination]] = {}
        self._validated: set[Any] = set()
        self._manager: pluggy.PluginManager | None = None

    # Listing ------------------------------------------------------------------------------------

    def records(self) -> list[PluginRecord]:
        """Return what is known of every plugin, sorted by name, without importing any."""
        hidden = {key for layer in self._temporary for key in layer}
        found = [record for record in self._installed() if record.key not in hidden]
        return sorted([*found, *self._here().values()], key=PluginRecord.sort_key)

    def names(self) -> list[str]:
        """Return the names of all combinations, sorted, without importing any."""
        return list({record.key: record.name for record in self.records()}.values())

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and bool(self._candidates(name))

    def __repr__(self) -> str:
        return f"Registry({self.group!r}: {', '.join(self.names()) or 'no combinations'})"

    def info(self, name: str) -> PluginRecord:
        """Return what is known of one plugin, without importing it.

        Raises
        ------
        CombinationNotFoundError : no plugin has this name; the message has the closest ones
        CombinationConflictError : several distributions have it; ask for ``distribution:name``
        """
        candidates = self._candidates(name)
        if not candidates:
            raise CombinationNotFoundError(self._not_found(name))
        if len(candidates) > 1:
            raise CombinationConflictError(
                f"combination {name!r} is offered by {len(candidates)} distributions; ask for one"
                f" of {', '.join(repr(record.qualified_name) for record in candidates)}",
                record=candidates[0],
            )
        return candidates[0]

    def refresh(self) -> None:
        """Look again for what is installed. Modules that were imported stay as they are."""
        importlib.invalidate_caches()
        self._scanned = None

    # Handing out --------------------------------------------------------------------------------

    def get(self, name: str, *, validate: bool = True) -> type[Combination]:
        """Return the class of a combination, validated with each of its ``examples``.

        An instance that is made of it with other arguments has not been validated;
        :meth:`create` validates with the arguments that it is given.

        Parameters
        ----------
        name : as in :meth:`names`, or ``distribution:name``
        validate : False hands the class out unchecked

        Raises
        ------
        CombinationNotFoundError, CombinationConflictError : see :meth:`info`
        PluginIncompatibleError, PluginLoadError, PluginSpecError : the plugin does not work
        GradientValidationError : its gradient is not the derivative of its value
        """
        record = self.info(name)
        combination = self._load(record)
        if validate:
            for example in declared_examples(record, combination):
                key = validation_key(record, combination, (), example)
                self._validate(key, record, partial(build_example, record, combination, example))
        return combination

    def create(self, name: str, /, *args: Any, validate: bool = True, **kwargs: Any) -> Combination:
        """Return an instance of a combination, validated with these arguments.

        Parameters
        ----------
        name : as in :meth:`names`, or ``distribution:name``
        *args, **kwargs : for the combination
        validate : False hands the instance out unchecked

        Raises
        ------
        as :meth:`get`, and whatever the combination raises on these arguments
        """
        record = self.info(name)
        combination = self._load(record)(*args, **kwargs)
        if validate:
            key = validation_key(record, type(combination), args, kwargs)
            self._validate(key, record, lambda: combination)
        return combination

    # Registering --------------------------------------------------------------------------------

    def register(self, name: str, combination: type[Combination]) -> None:
        """Add a combination for this process; it goes through the same gate as any other.

        Raises
        ------
        CombinationConflictError : the name is taken
        PluginSpecError : it cannot be a name, or ``combination`` is no subclass of Combination
        """
        taken = self._candidates(name)
        if taken:
            raise CombinationConflictError(
                f"cannot register {name!r}: the name belongs to {taken[0]}; choose another, or"
                " replace it for a while with registry.temporary",
                record=taken[0],
            )
        record = _registered_record(name, combination)
        self._load(record)
        self._registered[record.key] = record

    def unregister(self, name: str) -> None:
        """Remove a combination that :meth:`register` added."""
        record = self._registered.pop(canonicalize_name(name), None)
        if record is None:
            raise CombinationNotFoundError(
                f"{name!r} was not registered in this process; registered:"
                f" {', '.join(known.name for known in self._registered.values()) or 'none'}"
            )
        self._forget(record)

    @contextmanager
    def temporary(self, combinations: Mapping[str, type[Combination]]) -> Iterator[Registry]:
        """Add combinations, or replace installed ones, while the context lasts."""
        records = [_registered_record(name, cls) for name, cls in combinations.items()]
        added = {record.key: record for record in records}
        if len(added) < len(records):
            raise CombinationConflictError(
                f"names that are the same but for case, '-', '_' and '.': {', '.join(combinations)}"
            )
        self._temporary.append(added)
        try:
            for record in records:
                self._load(record)
            yield self
        finally:
            # Not the state from before: contexts need not end in the order in which they began.
            self._temporary = [layer for layer in self._temporary if layer is not added]
            for record in records:
                self._forget(record)

    # Inside -------------------------------------------------------------------------------------

    def _installed(self) -> list[PluginRecord]:
        if self._scanned is None:
            key = path_key()
            self._scanned = key, scan(self.group)
        return self._scanned[1]

    def _candidates(self, name: str) -> list[PluginRecord]:
        found = self._known(name)
        if not found and self._scanned and self._scanned[0] != path_key():
            self.refresh()  # something was installed while the process ran
            found = self._known(name)
        return found

    def _known(self, name: str) -> list[PluginRecord]:
        if not isinstance(name, str):
            raise TypeError(f"expected the name of a combination; found {name!r}")
        distribution, colon, bare = name.rpartition(":")
        key = canonicalize_name(bare)
        if not colon:
            return [record for record in self.records() if record.key == key]
        return [
            record
            for record in self._installed()
            if record.key == key
            and canonicalize_name(str(record.distribution)) == canonicalize_name(distribution)
        ]

    def _here(self) -> dict[str, PluginRecord]:
        """Return what was added in this process, by key; the latest of each."""
        here = dict(self._registered)
        for layer in self._temporary:
            here |= layer
        return here

    def _forget(self, record: PluginRecord) -> None:
        """Let go of a class that is no longer registered."""
        combination = self._classes.pop(record, None)
        self._validated = {key for key in self._validated if key[0] is not combination}
        if self._manager and combination and combination not in self._classes.values():
            self._manager.unregister(combination)

    def _not_found(self, name: str) -> str:
        names = self.names()
        if not names:
            return (
                f"unknown combination {name!r}: no plugin is installed in {sys.prefix} (none has an"
                f" entry point of the group {self.group!r}); install one with pip"
            )
        known = {str(canonicalize_name(known)): known for known in names}
        close = difflib.get_close_matches(canonicalize_name(name), known, n=1)
        hint = f" Did you mean {known[close[0]]!r}?" if close else ""
        return f"unknown combination {name!r}; installed: {', '.join(names)}.{hint}"

    def _load(self, record: PluginRecord) -> type[Combination]:
        from mtenn_core._registry._load import combination_class, import_plugin, plugin_manager

        if record not in self._classes:
            plugin = import_plugin(record) if record.plugin is None else record.plugin
            self._manager = self._manager or plugin_manager()
            self._classes[record] = combination_class(self._manager, plugin, record)
        return self._classes[record]

    def _validate(self, key: Any, record: PluginRecord, make: Callable[[], Combination]) -> None:
        """Run the gate, unless it has passed for ``key`` before; None is no key."""
        from mtenn_core.testing import check_combination
        from mtenn_core.testing._target import target_of

        if key is not None and key in self._validated:
            return
        combination = make()
        # A name that was registered in this process means nothing to a shell.
        path = record.qualified_name if record.distribution else None
        target = target_of(combination, path)
        report = check_combination(combination, level="gate", name=str(record), target=target)
        if not report.passed:
            raise GradientValidationError(
                f"{report}\nIt is not handed out. validate=False hands it out unchecked.",
                record=record,
                report=report,
            )
        if key is not None:
            self._validated.add(key)


def _registered_record(name: str, combination: type[Combination]) -> PluginRecord:
    if not isinstance(combination, type):
        raise PluginSpecError(
            f"cannot register {name!r}: expected a subclass of Combination; found {combination!r}"
        )
    try:
        canonicalize_name(name, validate=True)
    except (InvalidName, TypeError):
        raise PluginSpecError(
            f"cannot register {name!r}: a name is letters and digits, with '-', '_' and '.' inside"
        ) from None
    target = f"{combination.__module__}:{combination.__qualname__}"
    return PluginRecord(name, target, plugin=combination)


registry = Registry()
