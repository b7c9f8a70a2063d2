"""The gate, which validates a combination before the registry returns it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from mtenn_core._process.locks import Lock, hold
from mtenn_core._registry.messages import describe_error, describe_value
from mtenn_core._registry.record import PluginRecord
from mtenn_core.errors import CombinationContractError, GradientValidationError, PluginSpecError

if TYPE_CHECKING:
    from mtenn_core.combination import Combination

# All registries share this lock, because validation changes random states of the whole process.
_lock = Lock()


class Gate:
    """Validates a class once for each set of arguments and each version."""

    def __init__(self) -> None:
        self._passed: set[Any] = set()
        self._passed_lock = Lock()

    def validate_class(self, record: PluginRecord, combination: type[Combination]) -> None:
        """Validate a class with each of its ``examples``.

        Raises
        ------
        PluginSpecError : the examples are malformed, or the constructor raises
        GradientValidationError : a check failed
        """
        for arguments in class_examples(record, combination):

            def make(arguments: Mapping[str, Any] = arguments) -> Combination:
                return make_example(record, combination, arguments)

            self._validate(_key(record, combination, (), arguments), record, make)

    def validate_instance(
        self,
        record: PluginRecord,
        combination: Combination,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> None:
        """Validate an instance that was made with these arguments.

        Raises
        ------
        GradientValidationError : a check failed
        """
        from mtenn_core._process.torch_modes import uses_modes
        from mtenn_core.testing._probe.instances import made_again

        key = _key(record, type(combination), args, kwargs)
        # The caller's modes and settings have made this instance, so check another one.
        make = partial(made_again, combination) if uses_modes() else lambda: combination
        self._validate(key, record, make)

    def forget(self, classes: Collection[type[Combination]]) -> None:
        """Forget that these classes were validated."""
        with self._passed_lock:
            self._passed = {key for key in self._passed if key[0] not in classes}

    def _validate(self, key: Any, record: PluginRecord, make: Callable[[], Combination]) -> None:
        """Run the checks, unless they have already passed for ``key``.

        With a key of None, the checks always run. They judge the combination, so they run without
        the caller's modes and settings of torch.
        """
        from mtenn_core._process.torch_modes import without_modes

        if key in self._passed:
            return
        # Take the lock first. A fork waits for it, so that it copies no changed settings.
        with hold(_lock):
            if key in self._passed:
                return  # another thread has validated it
            with without_modes():
                self._run_checks(key, record, make)

    def _run_checks(self, key: Any, record: PluginRecord, make: Callable[[], Combination]) -> None:
        from mtenn_core._registry.load import blamed  # lazy, because a query does not need pluggy
        from mtenn_core.testing import check_combination
        from mtenn_core.testing._probe.instances import with_numbers
        from mtenn_core.testing._target import target_of

        with blamed(record, "its check"):
            combination = make()
            try:
                combination = with_numbers(combination)
            except ValueError as error:
                raise GradientValidationError(
                    f"{record}: {error}, or use validate=False to get it unchecked", record=record
                ) from error
            # `mtenn check` runs in another process, which does not know combinations registered
            # here.
            path = record.qualified_name if record.distribution else None
            target = target_of(combination, path)
            report = check_combination(combination, level="gate", name=str(record), target=target)
        if report.passed and key is not None:
            # Do this while _lock is held, because a waiting thread looks up the key only once.
            with self._passed_lock:
                self._passed.add(key)
        if not report.passed:
            author = f" Tell its author; it is installed{record.where}." if record.where else ""
            raise GradientValidationError(
                f"{report}\nThe registry does not return a combination that fails. Use"
                f" validate=False to get it unchecked.{author}",
                record=record,
                report=report,
            )


def class_examples(
    record: PluginRecord, combination: type[Combination]
) -> Sequence[Mapping[str, Any]]:
    """Return the ``examples`` of a plugin's class.

    Raises
    ------
    PluginSpecError : the examples are malformed
    """
    from mtenn_core._registry.load import blamed
    from mtenn_core.testing._examples import declared_examples

    try:
        with blamed(record, f"{combination.__name__}.examples"):
            return declared_examples(combination)
    except CombinationContractError as error:
        raise PluginSpecError(f"{record}{record.where}: {error}", record=record) from error


def make_example(
    record: PluginRecord, combination: type[Combination], arguments: Mapping[str, Any]
) -> Combination:
    """Return an instance with one of the ``examples`` as arguments. Keep the random state.

    Raises
    ------
    PluginSpecError : the constructor raises
    """
    import torch

    try:
        with torch.random.fork_rng(devices=[]):
            return combination(**arguments)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise PluginSpecError(
            f"{record}{record.where}: `examples` of {combination.__name__} must be valid arguments;"
            f" found {describe_value(arguments)}, with which the constructor raises"
            f" {describe_error(error)}. Declare valid arguments: examples = ({{'name': value}},)",
            record=record,
        ) from error


def _key(
    record: PluginRecord, combination: type, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """Return the key of a validation, or None if an argument is mutable."""
    arguments = [(None, arg) for arg in args] + sorted(kwargs.items())
    if not all(isinstance(value, int | float | str | None) for _, value in arguments):
        return None
    # The key contains the types, because True == 1 == 1.0.
    return combination, record.version, tuple((n, type(v), v) for n, v in arguments)
