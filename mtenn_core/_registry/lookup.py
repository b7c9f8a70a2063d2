"""The registry: names to validated combinations."""

from __future__ import annotations

import importlib
import itertools
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from mtenn_core._registry.arguments import (
    build_example,
    declared_examples,
    validation_key,
)
from mtenn_core._registry.installed import Scan, path_key, scan
from mtenn_core._registry.policy import Policy
from mtenn_core._registry.record import PluginRecord, Problem, canonical
from mtenn_core._registry.snapshot import Known
from mtenn_core.errors import (
    CombinationConflictError,
    CombinationNotFoundError,
    GradientValidationError,
    PluginSpecError,
    PluginWarning,
    RegistryError,
)

if TYPE_CHECKING:
    from mtenn_core.combination import Combination
    from mtenn_core.testing import Report

GROUP = "mtenn.combinations"
# In seconds. A thread that holds a lock for longer hangs, or waits for us: it imports a module,
# say, that another thread imports, which asks the registry. Without the lock, work is done twice.
PATIENCE = 30.0

# The gate sets random states and warning filters, which belong to the whole process.
_gate = threading.RLock()


class Registry:
    """Combinations by name: those of installed distributions and those registered by a call.

    Names are compared without case, with ``-``, ``_`` and ``.`` as one; ``distribution:name``
    always works. Listing imports no plugin. :meth:`get` and :meth:`create` import the one plugin
    that is asked for, and hand it out after its gradient was validated against finite differences,
    once per class and arguments in a process. Threads may share a registry.

    Parameters
    ----------
    group : the entry-point group to look in
    policy : which plugins may be imported; what it leaves open the environment says. May be set
        later: ``registry.policy = Policy(prefer=("my-distribution",))``
    """

    def __init__(self, group: str = GROUP, policy: Policy | None = None) -> None:
        self.group = group
        self.policy = policy or Policy()
        # Held while what follows is changed, and never while a plugin's code runs.
        self._lock = threading.RLock()
        self._scan: Scan | None = None
        self._known: Known | None = None
        # Of a strict policy: that in which there was no problem, and that of which all has loaded.
        self._sound: Known | None = None
        self._all_loaded: Known | None = None
        self._registered: dict[str, PluginRecord] = {}
        self._temporary: list[dict[str, PluginRecord]] = []
        self._importing: dict[PluginRecord, threading.RLock] = {}
        # With the pins that it was held to: others may come later.
        self._classes: dict[tuple[PluginRecord, Any], type[Combination]] = {}
        self._validated: set[Any] = set()
        self._warned: set[str] = set()

    # Listing ------------------------------------------------------------------------------------

    def records(self, *, everything: bool = False) -> list[PluginRecord]:
        """Return what is known of every plugin, sorted by name, without importing any.

        Parameters
        ----------
        everything : also those that are disabled or shadowed, which their ``status`` tells
        """
        known = self._look()
        if everything:
            return list(known.records)
        return [record for found in known.available.values() for record in found]

    def names(self) -> list[str]:
        """Return the names of all combinations, sorted, without importing any.

        What is installed later shows when a name is not found, or after :meth:`refresh`.

        Raises
        ------
        RegistryError : the policy is strict, and there is a problem that shows without an import
        """
        return self._look().names()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self._look().available)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and bool(self._find(name)[1])

    def __repr__(self) -> str:
        try:
            names = ", ".join(self._look(strict=False).names())
        except RegistryError as error:  # of a setting
            names = str(error)
        return f"Registry({self.group!r}: {names or 'no combinations'})"

    def info(self, name: str) -> PluginRecord:
        """Return what is known of one plugin, without importing it.

        Raises
        ------
        CombinationNotFoundError : no plugin has this name; the message has the closest ones
        CombinationDisabledError : the policy does not allow it
        CombinationConflictError : several distributions have it; ask for ``distribution:name``, or
            prefer one
        """
        known, found = self._find(name)
        if len(found) != 1:
            raise known.error(name, self.group)
        return found[0]

    def record_of(self, combination: type[Combination]) -> PluginRecord | None:
        """Return the plugin that a class is of, None for a class that is not registered.

        Nothing is imported: a class that did not come from here is found by its module and name.
        """
        with self._lock:
            loaded = [
                record for (record, _), known in self._classes.items() if known is combination
            ]
        target = f"{combination.__module__}:{combination.__qualname__}"
        records = self._look(strict=False).available.values()
        named = [r for r in itertools.chain(*records) if r.target == target and r.plugin is None]
        return next(iter(loaded + named), None)

    def problems(self) -> list[Problem]:
        """Return what is wrong with installed plugins and settings, as far as no import is needed.

        ``mtenn doctor`` shows these, and imports each plugin in a process of its own for the rest.
        """
        return list(self._look(strict=False).problems())

    def refresh(self) -> None:
        """Look again for what is installed. Modules that were imported stay as they are."""
        importlib.invalidate_caches()
        with self._lock:
            self._scan = None
            self._know_no_more()

    # Handing out --------------------------------------------------------------------------------

    def get(self, name: str, *, validate: bool = True) -> type[Combination]:
        """Return the class of a combination, validated with each of its ``examples``.

        An instance that is made of it with other arguments has not been validated;
        :meth:`create` validates with the arguments that it is given. Settings of torch that the
        import changes are put back; so is what another thread sets meanwhile, and the random
        numbers that it draws while the gate runs come again.

        Parameters
        ----------
        name : as in :meth:`names`, or ``distribution:name``
        validate : False hands the class out unchecked

        Raises
        ------
        CombinationNotFoundError, CombinationDisabledError, CombinationConflictError : see
            :meth:`info`
        PluginIncompatibleError, PluginPinError : it is not imported
        PluginLoadError, PluginSpecError : the plugin does not work
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

    def check(self, name: str, *, isolated: bool = False, **options: Any) -> list[Report]:
        """Hold a combination to the conformance suite, with each of its ``examples``.

        Parameters
        ----------
        name : as in :meth:`names`, or ``distribution:name``
        isolated : in a child process, where a crash, a hang and too much memory are results, too;
            for what is installed, not for what was registered by a call. The policy counts, and
            in the child that of the environment, too
        **options : for :func:`~mtenn_core.testing.check_combination`, ``level`` and ``seed`` say;
            if isolated, also ``time_limit`` in seconds and ``memory_limit`` in MiB

        Raises
        ------
        as :meth:`get`, without validation
        """
        from mtenn_core._registry.isolated_checks import check_target
        from mtenn_core._registry.targets import Target

        record = self.info(name)
        if isolated:
            if record.distribution is None or self.group != GROUP:
                raise RegistryError(
                    f"{record} cannot be checked in a process of its own, which would not know it",
                    record=record,
                )
            self.policy.resolved().check(record)  # the child knows the environment's alone
        return list(check_target(Target(record.qualified_name), self, isolated=isolated, **options))

    # Registering --------------------------------------------------------------------------------

    def register(self, name: str, combination: type[Combination]) -> None:
        """Add a combination for this process; it goes through the same gate as any other.

        Raises
        ------
        CombinationConflictError : the name is taken
        PluginSpecError : it cannot be a name, or ``combination`` is no subclass of Combination
        """
        record = _registered_record(name, combination)
        self._load(record)
        with self._lock:
            taken = list(self._look().available.get(record.key, ()))
            if not taken:
                self._registered[record.key] = record
                self._know_no_more()
        if taken:
            self._forget(record)
            raise CombinationConflictError(
                f"cannot register {name!r}: the name belongs to {taken[0]}; choose another, or"
                " replace it for a while with registry.temporary",
                record=taken[0],
            )

    def unregister(self, name: str) -> None:
        """Remove a combination that :meth:`register` added."""
        with self._lock:
            record = self._registered.pop(canonical(name), None)
            registered = ", ".join(known.name for known in self._registered.values())
            self._know_no_more()
        if record is None:
            raise CombinationNotFoundError(
                f"{name!r} was not registered in this process; registered: {registered or 'none'}"
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
        with self._lock:
            self._temporary = [*self._temporary, added]
            self._know_no_more()
        try:
            for record in records:
                self._load(record)
            yield self
        finally:
            # Not the state from before: contexts need not end in the order in which they began.
            with self._lock:
                self._temporary = [layer for layer in self._temporary if layer is not added]
                self._know_no_more()
            for record in records:
                self._forget(record)

    # Inside -------------------------------------------------------------------------------------

    def _look(self, *, strict: bool = True) -> Known:
        """Return what is known now; look at the path if nobody has."""
        policy = self.policy.resolved()
        known = self._known
        if known is None or known.policy != policy:
            with self._lock:
                self._scan = self._scan or scan(self.group)
                known = self._know(self._scan, policy)
                unknown = policy.unknown(known.records)
                if unknown and self._scan.key != path_key():
                    importlib.invalidate_caches()
                    self._scan = scan(self.group)  # it may have been installed since
                    known = self._know(self._scan, policy)
                    unknown = policy.unknown(known.records)
                self._known = known
                unknown = [text for text in unknown if text not in self._warned]
                self._warned.update(unknown)
            for text in unknown:
                warnings.warn(text, PluginWarning, stacklevel=4)
        if strict and policy.strict and self._sound is not known:
            self._raise_problems()
            self._sound = known
        return known

    def _know(self, scanned: Scan, policy: Policy) -> Known:
        registered = dict(self._registered)
        for layer in self._temporary:
            registered |= layer
        replaced = {key for layer in self._temporary for key in layer}
        return Known.of(scanned, policy, registered.values(), replaced)

    def _know_no_more(self) -> None:
        self._known = self._sound = self._all_loaded = None

    def _raise_problems(self) -> None:
        problems = self.problems()
        if problems:
            raise RegistryError(
                f"plugins have problems ({len(problems)}), and the policy is strict"
                " (MTENN_STRICT):\n" + "\n".join(f"- {problem.message}" for problem in problems),
                record=problems[0].record,
            )

    def _find(self, name: str) -> tuple[Known, list[PluginRecord]]:
        """Return what is known, and of it the plugins that may be meant by ``name``."""
        if not isinstance(name, str):
            raise TypeError(f"expected the name of a combination; found {name!r}")
        known = self._look()
        if not known.named(name) and known.scan.key != path_key():
            self.refresh()  # something was installed while the process ran
            known = self._look()
        return known, known.named(name)

    def _load(self, record: PluginRecord) -> type[Combination]:
        """Return the class of a plugin, which one thread imports and the others wait for."""
        known = self._look(strict=False)
        if known.policy.strict and self._all_loaded is not known:
            self._load_all(known)
            self._all_loaded = known
        return self._load_one(record, known.policy)

    def _load_all(self, known: Known) -> None:
        try:
            for record in itertools.chain(*known.available.values()):
                self._load_one(record, known.policy)
        except BaseException as error:
            error.add_note("It was imported since the policy is strict (MTENN_STRICT).")
            raise

    def _load_one(self, record: PluginRecord, policy: Policy) -> type[Combination]:
        from mtenn_core._registry.load import load

        with self._lock:
            importing = self._importing.setdefault(record, threading.RLock())
        with _patiently(importing):
            found = self._classes.get((record, policy.pins))
            if found is None:
                self._warn_of_older(record)
                found = load(record, policy)
                with self._lock:
                    self._classes[record, policy.pins] = found
            return found

    def _warn_of_older(self, record: PluginRecord) -> None:
        with self._lock:
            loaded = [other for other, _ in self._classes if other.owner == record.owner]
        older = [other for other in loaded if other.version != record.version]
        if record.distribution and older:
            warnings.warn(
                f"{record}{record.where}: {older[0].origin} was imported before, and modules stay"
                " as they were imported: restart Python to get the one that is installed now",
                PluginWarning,
                stacklevel=4,
            )

    def _forget(self, record: PluginRecord) -> None:
        """Let go of a class that is no longer registered."""
        with self._lock:
            self._importing.pop(record, None)
            keys = [key for key in self._classes if key[0] == record]
            classes = [self._classes.pop(key) for key in keys]
            self._validated = {key for key in self._validated if key[0] not in classes}

    def _validate(self, key: Any, record: PluginRecord, make: Callable[[], Combination]) -> None:
        """Run the gate, unless it has passed for ``key`` before; None is no key."""
        from mtenn_core._registry.targets import target_of
        from mtenn_core.testing import check_combination

        if key is not None and key in self._validated:
            return
        combination = make()
        # A name that was registered in this process means nothing to a shell.
        path = record.qualified_name if record.distribution else None
        target = target_of(combination, path)
        with _patiently(_gate):
            if key is not None and key in self._validated:
                return  # by another thread, meanwhile
            report = check_combination(combination, level="gate", name=str(record), target=target)
            if report.passed and key is not None:
                # Before the gate opens: whoever waits there looks once, and then validates.
                with self._lock:
                    self._validated.add(key)
        if not report.passed:
            author = f" Tell its author; it is installed{record.where}." if record.where else ""
            raise GradientValidationError(
                f"{report}\nIt is not handed out. validate=False hands it out unchecked.{author}",
                record=record,
                report=report,
            )


@contextmanager
def _patiently(lock: threading.RLock) -> Iterator[None]:
    """Hold ``lock``, or go on without it where it does not come."""
    held = lock.acquire(timeout=PATIENCE)
    try:
        yield
    finally:
        if held:
            lock.release()


def _registered_record(name: str, combination: type[Combination]) -> PluginRecord:
    if not isinstance(combination, type):
        raise PluginSpecError(
            f"cannot register {name!r}: expected a subclass of Combination; found {combination!r}"
        )
    if not (isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9]+([-_.]+[A-Za-z0-9]+)*", name)):
        raise PluginSpecError(
            f"cannot register {name!r}: a name is letters and digits, with '-', '_' and '.' inside"
        )
    target = f"{combination.__module__}:{combination.__qualname__}"
    return PluginRecord(name, target, plugin=combination)


registry = Registry()
