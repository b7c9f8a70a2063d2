"""The registry, which looks up combinations by name."""

from __future__ import annotations

import importlib
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

from mtenn_core._process.html_table import html_table
from mtenn_core._process.locks import Lock
from mtenn_core._registry.class_cache import ClassCache
from mtenn_core._registry.gate import Gate
from mtenn_core._registry.installed import Scan, path_key, scan
from mtenn_core._registry.messages import describe_error
from mtenn_core._registry.policy import Policy
from mtenn_core._registry.record import PluginRecord, Problem, canonical
from mtenn_core._registry.snapshot import Snapshot
from mtenn_core.errors import (
    CombinationConflictError,
    CombinationNotFoundError,
    PluginSpecError,
    PluginWarning,
    RegistryError,
)

if TYPE_CHECKING:
    from mtenn_core.combination import Combination
    from mtenn_core.testing import Report

    class _OfAnyArguments(Combination):
        """A combination whose arguments a type checker does not know."""

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...


_P = ParamSpec("_P")


# Without this, type checkers see the constructor of Combination, which has no arguments, and accept
# only registry.get("boltzmann")(). The signature that readers see stays simple.
def _of_any_arguments(
    get: Callable[Concatenate[Registry, _P], type[Combination]],
) -> Callable[Concatenate[Registry, _P], type[_OfAnyArguments]]:
    return get  # type: ignore[return-value]


GROUP = "mtenn.combinations"
_NAME = re.compile(r"[A-Za-z0-9]+([-_.]+[A-Za-z0-9]+)*")


class Registry:
    """Looks up combinations of installed distributions, and those that :meth:`register` added.

    Upper and lower case are equal in names, and so are ``-``, ``_`` and ``.``. A name may also have
    the form ``distribution:name``. Threads may share a registry.

    A query imports no plugin and changes nothing. :meth:`get` and :meth:`create` import only the
    plugin that has the name, and compare its gradient with finite differences. In one process, they
    do this once for each class and its arguments.

    Notebooks show a registry as a table of its combinations and the problems.

    Parameters
    ----------
    group : the entry-point group
    policy : rules for which plugins may be imported. Environment variables replace rules that are
        None. The policy may be set later:
        ``registry.policy = Policy(prefer=("my-distribution",))``
    """

    def __init__(self, group: str = GROUP, policy: Policy | None = None) -> None:
        self.group: str = group
        self.policy: Policy = policy or Policy()
        # This lock guards the attributes below. It is never held while code of a plugin runs.
        self._lock = Lock()
        self._scan: Scan | None = None
        self._snapshot: Snapshot | None = None  # None after a change, until the next query
        self._fully_loaded: Snapshot | None = None  # the last one that a strict policy has loaded
        self._registered: dict[str, PluginRecord] = {}
        self._temporary: list[dict[str, PluginRecord]] = []
        self._warned: set[str] = set()
        self._classes = ClassCache()
        self._gate = Gate()

    # Queries ------------------------------------------------------------------------------------

    def records(self, *, everything: bool = False) -> list[PluginRecord]:
        """Return the facts about all plugins, sorted by name, without importing a plugin.

        Parameters
        ----------
        everything : True to include disabled and shadowed plugins, which have another ``status``
        """
        snapshot = self._current()
        return list(snapshot.records) if everything else snapshot.available_records()

    def names(self) -> list[str]:
        """Return the sorted names of all combinations, without importing a plugin.

        A distribution that is installed later appears after a lookup that fails, or after
        :meth:`refresh`.

        Raises
        ------
        RegistryError : the policy is strict, and there is a problem. Problems of an import are not
            found here
        """
        return self._current().names()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self._current().available)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and bool(self._find(name)[1])

    def __repr__(self) -> str:
        try:
            names = ", ".join(self._current(strict=False).names())
        except RegistryError as error:  # a malformed setting
            names = str(error)
        return f"Registry({self.group!r}: {names or 'no combinations'})"

    def _repr_html_(self) -> str:
        title = f"Registry({self.group!r})"
        try:
            snapshot = self._current(strict=False)
        except RegistryError as error:  # a malformed setting
            return html_table(title, (), (), [str(error)])
        rows = [
            (each.name, each.distribution or each.origin, each.version or "", each.target)
            for each in snapshot.available_records()
        ]
        columns = ("name", "distribution", "version", "class") if rows else ()
        problems = [f"{each.kind}: {each.message}" for each in snapshot.problems()]
        return html_table(title if rows else f"{title}: no combinations", columns, rows, problems)

    def info(self, name: str) -> PluginRecord:
        """Return the facts about one plugin, without importing it.

        Raises
        ------
        CombinationNotFoundError : no plugin has this name; the message suggests a similar one
        CombinationDisabledError : the policy does not allow the plugin
        CombinationConflictError : several distributions have this name. Use
            ``distribution:name``, or prefer one of them in the policy
        """
        snapshot, records = self._find(name)
        if len(records) != 1:
            raise snapshot.lookup_error(name, self.group)
        return records[0]

    def record_of(self, combination: type[Combination]) -> PluginRecord | None:
        """Return the plugin that a class belongs to, or None if no plugin has this class.

        This does not import a plugin. If this registry has not loaded the class, it compares the
        module and the name of the class with all entry points.
        """
        if loaded := self._classes.records(combination):
            return loaded[0]
        target = f"{combination.__module__}:{combination.__qualname__}"
        records = self._current(strict=False).available_records()
        return next((r for r in records if r.target == target and r.plugin is None), None)

    def problems(self) -> list[Problem]:
        """Return the problems with plugins and settings, without importing a plugin.

        ``mtenn doctor`` shows these problems. It also imports each plugin in a child process, to
        find problems of the import.
        """
        return list(self._current(strict=False).problems())

    def refresh(self) -> None:
        """Scan the path again at the next query. This does not import modules again."""
        importlib.invalidate_caches()
        with self._lock:
            self._scan = self._snapshot = None

    # Combinations -------------------------------------------------------------------------------

    @_of_any_arguments
    def get(self, name: str, *, validate: bool = True) -> type[Combination]:
        """Return the class of a combination, validated with each of its ``examples``.

        If you make an instance with other arguments, it is not validated. :meth:`create` validates
        an instance with its own arguments.

        If the import changes settings of torch, they are restored. This also undoes changes that
        another thread made during the import. The gate restores the random state, so another thread
        may draw the same random numbers again after the validation.

        Parameters
        ----------
        name : a name in :meth:`names`, or ``distribution:name``
        validate : False to return the class without checks

        Raises
        ------
        CombinationNotFoundError, CombinationDisabledError, CombinationConflictError : see
            :meth:`info`
        PluginIncompatibleError, PluginPinError : the policy does not allow the import
        PluginLoadError, PluginSpecError : the plugin does not work
        GradientValidationError : its gradient is not the derivative of its value
        """
        record = self.info(name)
        combination = self._load(record)
        if validate:
            self._gate.validate_class(record, combination)
        return combination

    def create(self, name: str, /, *args: Any, validate: bool = True, **kwargs: Any) -> Combination:
        """Return an instance of a combination, validated with its arguments.

        Parameters
        ----------
        name : a name in :meth:`names`, or ``distribution:name``
        *args, **kwargs : arguments of the combination
        validate : False to return the instance without checks

        Raises
        ------
        errors of :meth:`get`, and any error of the constructor
        PluginSpecError : the constructor exits
        """
        record = self.info(name)
        return self._make(record, self._load(record), args, kwargs, validate=validate)

    def from_checkpoint(
        self,
        checkpoint: str | os.PathLike[str] | Mapping[str, Any],
        *,
        classes: Sequence[type[Combination]] = (),
        model: str | None = None,
        validate: bool = True,
    ) -> Combination | list[Combination]:
        """Return the combination of a checkpoint, with the values that it has learned.

        A checkpoint has the state dict of a :class:`~mtenn_core.MultiPoseModel`, which names the
        plugin and the arguments of its combination. This imports the plugin and makes the
        combination as :meth:`create` does. It does not need the pose model::

            combination = registry.from_checkpoint("model.pt")
            model = MultiPoseModel(PoseModel(), combination)
            model.load_state_dict(torch.load("model.pt", weights_only=True))

        Parameters
        ----------
        checkpoint : a file that ``torch.save``, Lightning or safetensors has written, or its
            content: a state dict, or a dict with one. A file is read with ``weights_only=True``, so
            that no code in it runs.
        classes : combination classes that no plugin has, such as those of your script. Their names
            count, and not their modules.
        model : if the checkpoint has several multi-pose models, the path of one in it, such as
            ``"ema"``
        validate : False to return the combination without checks

        Returns
        -------
        the combination; a list for a model with one combination for each task. It is on the CPU,
        and its parameters have the dtypes of the checkpoint.

        Raises
        ------
        CheckpointError : the checkpoint has no combination or is no checkpoint; the class is no
            plugin; or a checkpoint cannot hold an argument, for example a function. Numbers, text,
            None, torch's dtypes and devices, numbers and small arrays of torch and numpy, and
            lists, tuples, sets and dicts of these come back exactly.
        CombinationNotFoundError : the plugin is not installed. The message has the command that
            installs it
        OSError : the file cannot be read
        errors of :meth:`create`

        Warns
        -----
        PluginWarning : another version of the plugin is installed
        """
        from mtenn_core._engine.checkpoint_file import read_file, saved_model
        from mtenn_core._process.torch_modes import without_modes
        from mtenn_core._registry.checkpoints import make_again

        if isinstance(checkpoint, str | os.PathLike):
            _, checkpoint = read_file(checkpoint)
        saved = saved_model(checkpoint, model)
        make = partial(self._make, validate=validate)
        # On another default device, such as "meta", values of the checkpoint would be lost.
        with without_modes(process_wide=False):
            combinations = [
                make_again(self, make, identity, state, classes)
                for identity, state in zip(saved.identities, saved.states(), strict=True)
            ]
        return combinations if saved.several else combinations[0]

    def check(self, name: str, *, isolated: bool = False, **options: Any) -> list[Report]:
        """Run the conformance suite on a combination, with each of its ``examples``.

        Parameters
        ----------
        name : a name in :meth:`names`, or ``distribution:name``
        isolated : True to run it in a child process, and to report a crash, a hang or too much
            memory as a result. This works only for installed plugins. The policy of this registry
            applies. In the child process, the environment variables apply, too
        **options : ``level``, ``seed`` and other arguments of
            :func:`~mtenn_core.testing.check_combination`; if isolated, also ``time_limit`` in
            seconds and ``memory_limit`` in MiB

        Raises
        ------
        errors of :meth:`get`, except those of the validation
        """
        from mtenn_core._registry.isolated_checks import check_target
        from mtenn_core.testing._target import Target

        record = self.info(name)
        if isolated:
            if record.distribution is None or self.group != GROUP:
                raise RegistryError(
                    f"{record} cannot be checked in a child process, because only this process"
                    " knows it. Check it without isolation",
                    record=record,
                )
            self.policy.resolved().check(record)  # the child process does not know this policy
        checks = check_target(Target(record.qualified_name), self, isolated=isolated, **options)
        return [report for _, report in checks]

    # Registration -------------------------------------------------------------------------------

    def register(self, name: str, combination: type[Combination]) -> None:
        """Add a combination in this process. It is validated like an installed combination.

        Raises
        ------
        CombinationConflictError : another combination has this name
        PluginSpecError : the name is malformed, or ``combination`` is not a subclass of Combination
        """
        record = _record_to_register(name, combination)
        self._load(record)
        with self._lock:
            owners = list(self._current().available.get(record.key, ()))
            if not owners:
                self._registered[record.key] = record
                self._snapshot = None
        if owners:
            self._forget(record)
            raise CombinationConflictError(
                f"cannot register {name!r}: the name belongs to {owners[0]}. Choose another name,"
                " or replace the combination temporarily with registry.temporary",
                record=owners[0],
            )

    def unregister(self, name: str) -> None:
        """Remove a combination that :meth:`register` added.

        Raises
        ------
        CombinationNotFoundError : this process has not registered such a combination
        """
        with self._lock:
            record = self._registered.pop(canonical(name), None)
            names = ", ".join(other.name for other in self._registered.values())
            self._snapshot = None
        if record is None:
            raise CombinationNotFoundError(
                f"{name!r} was not registered in this process. Registered names: {names or 'none'}"
            )
        self._forget(record)

    @contextmanager
    def temporary(self, combinations: Mapping[str, type[Combination]]) -> Iterator[Registry]:
        """Add combinations, or replace installed ones, until the context ends.

        Raises
        ------
        CombinationConflictError : two of the names are equal
        PluginSpecError : see :meth:`register`
        """
        records = [_record_to_register(name, cls) for name, cls in combinations.items()]
        layer = {record.key: record for record in records}
        if len(layer) < len(records):
            raise CombinationConflictError(
                "names must differ in more than case, '-', '_' and '.'; found"
                f" {', '.join(combinations)}"
            )
        with self._lock:
            self._temporary = [*self._temporary, layer]
            self._snapshot = None
        try:
            for record in records:
                self._load(record)
            yield self
        finally:
            # Remove only this layer, because contexts may end in any order.
            with self._lock:
                self._temporary = [other for other in self._temporary if other is not layer]
                self._snapshot = None
            for record in records:
                self._forget(record)

    # Internals ----------------------------------------------------------------------------------

    def _current(self, *, strict: bool = True) -> Snapshot:
        """Return the current snapshot. Scan the path if there is no snapshot.

        Parameters
        ----------
        strict : False to return a snapshot with problems, also if the policy is strict
        """
        policy = self.policy.resolved()
        snapshot = self._snapshot
        if snapshot is None or snapshot.policy != policy:
            with self._lock:
                snapshot = self._snapshot = self._build_snapshot(policy)
                messages = [m for m in policy.unknown(snapshot.records) if m not in self._warned]
                self._warned.update(messages)
            for message in messages:
                warnings.warn(message, PluginWarning, stacklevel=4)
        if strict and policy.strict:
            snapshot.check_strictly()
        return snapshot

    def _build_snapshot(self, policy: Policy) -> Snapshot:
        registered = dict(self._registered)
        for layer in self._temporary:
            registered |= layer
        replaced = {key for layer in self._temporary for key in layer}
        self._scan = self._scan or scan(self.group)
        snapshot = Snapshot.build(self._scan, policy, registered.values(), replaced)
        if policy.unknown(snapshot.records) and self._scan.key != path_key():
            importlib.invalidate_caches()
            self._scan = scan(self.group)  # the plugin may have been installed meanwhile
            snapshot = Snapshot.build(self._scan, policy, registered.values(), replaced)
        return snapshot

    def _find(self, name: str) -> tuple[Snapshot, list[PluginRecord]]:
        """Return the current snapshot, and the plugins in it that ``name`` may refer to."""
        if not isinstance(name, str):
            make = f". Make an instance: {name.__name__}(…)" if isinstance(name, type) else ""
            raise TypeError(f"expected the name of a combination; found {name!r}{make}")
        snapshot = self._current()
        if not snapshot.find(name) and snapshot.scan.key != path_key():
            self.refresh()  # a distribution was installed while the process was running
            snapshot = self._current()
        return snapshot, snapshot.find(name)

    def _load(self, record: PluginRecord) -> type[Combination]:
        snapshot = self._current(strict=False)
        if snapshot.policy.strict and snapshot is not self._fully_loaded:
            self._classes.load_all(snapshot.available_records(), snapshot.policy)
            self._fully_loaded = snapshot
        return self._classes.load(record, snapshot.policy)

    def _make(
        self,
        record: PluginRecord,
        cls: type[Combination],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        validate: bool,
    ) -> Combination:
        """Return an instance of a plugin's class, validated with its arguments."""
        try:
            combination = cls(*args, **kwargs)
        except (Exception, KeyboardInterrupt):
            raise
        except BaseException as error:  # SystemExit would end the caller's program
            raise PluginSpecError(
                f"{record}{record.where}: the constructor of {cls.__name__} raises"
                f" {describe_error(error)}. {record.remedy}",
                record=record,
            ) from error
        if validate:
            self._gate.validate_instance(record, combination, args, kwargs)
        return combination

    def _forget(self, record: PluginRecord) -> None:
        """Release the class of a combination that is no longer registered."""
        self._gate.forget(self._classes.forget(record))


def current_snapshot(registry: Registry) -> Snapshot:
    """Return the snapshot that a registry's queries use, also if a strict policy refuses it."""
    return registry._current(strict=False)


def _record_to_register(name: str, combination: type[Combination]) -> PluginRecord:
    if not isinstance(combination, type):
        raise PluginSpecError(
            f"cannot register {name!r}: expected a subclass of Combination; found {combination!r}."
            f" Pass its class: {type(combination).__name__}"
        )
    if not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise PluginSpecError(
            f"cannot register {name!r}: a name must contain only letters and digits, with '-', '_'"
            " and '.' between them"
        )
    target = f"{combination.__module__}:{combination.__qualname__}"
    return PluginRecord(name, target, plugin=combination)


registry: Registry = Registry()
