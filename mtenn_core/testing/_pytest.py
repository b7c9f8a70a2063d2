"""The conformance suite as tests: a class to inherit from, and a decorator.

This module imports pytest only inside functions, so ``mtenn_core.testing`` does not require it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from mtenn_core.combination import Combination
from mtenn_core.errors import MtennError
from mtenn_core.testing._catalogue import CHECKS, chosen_checks
from mtenn_core.testing._checks.check import Check, Level
from mtenn_core.testing._examples import Case, Source, cases_of
from mtenn_core.testing._report import Report
from mtenn_core.testing._runner import check_combination, described

if TYPE_CHECKING:
    import pytest

Expected = Mapping[str, str]

# This replaces tests that do not apply to a class. pytest does not collect it, because it is not
# callable.
_NO_TEST = object()


@dataclass(frozen=True)
class BoundCheck:
    """A check of the suite as the body of a test. A call passes, fails, skips or xfails.

    Attributes
    ----------
    check : a check of the catalogue
    level : level of the checks, which also decides the number of probes
    seed : seed of the random numbers that the check uses
    expected_failure : the reason why the check may fail, or None
    label : name of the combination in the summary
    whole_class : True if the checks of one combination are the tests of a class
    """

    check: Check
    level: Level
    seed: int
    expected_failure: str | None
    label: str
    whole_class: bool = False

    def __call__(self, combination: Source) -> None:
        __tracebackhide__ = True
        import pytest

        from mtenn_core._pytest_plugin import ConformanceFailure, add_result

        report = self._report(combination)
        add_result(report, self.label, whole_class=self.whole_class)
        (record,) = report.records
        if record.status == "skip":
            pytest.skip(record.reason)
        if record.status == "xfail":
            pytest.xfail(record.reason)
        if record.status not in ("pass", "advice"):
            message = f"{report.name}, {report.combination}\n{record}"
            hazard = record.reason.partition("\n")[0]
            short = hazard if record.is_advice else record.cause or hazard
            if record.status == "xpass":
                short = f"the check passes; remove {record.id!r} from expected_failures"
                message += f"\n    {short}"
            raise ConformanceFailure(message, short=f"{record.id} {record.status}: {short}")

    def _report(self, combination: Source) -> Report:
        __tracebackhide__ = True
        from mtenn_core._pytest_plugin import ConformanceFailure

        id = self.check.id
        try:
            with _seeded(self.seed):
                report = check_combination(
                    combination,
                    level=self.level,
                    expected_failures=_reason_by_id(id, self.expected_failure),
                    seed=self.seed,
                    only=[id],
                )
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # an error outside of the checks; others are in the report
            what, where = described(error).rsplit("\n", 1)
            if not isinstance(error, MtennError):
                what += (
                    ". Declare the arguments that the constructor needs in the class:"
                    " examples = ({'name': value},)"
                )
            # Raise from None, because pytest would otherwise show this error twice.
            raise ConformanceFailure(f"{self.label} cannot be checked: {what}\n{where}") from None
        return replace(report, n_expected=len(chosen_checks(self.level)))


def _reason_by_id(id: str, reason: str | None) -> Expected:
    return {} if reason is None else {id: reason}


def _test_of(check: Check) -> Callable[[CombinationConformance, Case], None]:
    def test(self: CombinationConformance, case: Case) -> None:
        reason = self.expected_failures.get(check.id)
        bound = BoundCheck(check, self.level, self.seed, reason, case.label, whole_class=True)
        bound(case.maker)

    test.__name__ = "test_" + re.sub(r"[^a-z0-9]+", "_", f"{check.id} {check.title}".lower())
    test.__qualname__ = f"CombinationConformance.{test.__name__}"
    test.__doc__ = f"{check.id}: {check.title}."
    return test


_TEST_OF = {check: _test_of(check) for check in CHECKS}


def _attribute(cls: type, test: Callable[..., None]) -> object:
    """Return the attribute of a class that has the name of a test."""
    return getattr(cls, test.__name__, None)


class CombinationConformance:
    """A base class for tests: pytest runs the conformance suite on a combination.

    Each check has one test for each of the ``examples`` of the class:

    >>> class TestPowerMean(CombinationConformance):
    ...     combination = PowerMean

    Attributes
    ----------
    combination : a class, an instance, or a function that makes an instance
    level : level of the checks, see :func:`check_combination`; checks of higher levels have no test
    seed : seed of the random numbers that the checks use
    expected_failures : maps the id of each check that may fail to the reason. A subclass may also
        replace the test of such a check, or set it to None
    """

    combination: ClassVar[Source]
    level: ClassVar[Level] = "full"
    seed: ClassVar[int] = 0
    expected_failures: ClassVar[Expected] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.test_no_check_was_taken_out is not _GUARD:
            raise TypeError(f"{cls.__name__} must not replace test_no_check_was_taken_out")
        has_no_source = bool(_source_problems(cls._source()))
        for _, test, expected in cls._tests():
            attribute = _attribute(cls, test)
            if attribute is test or attribute is _NO_TEST:
                setattr(cls, test.__name__, _NO_TEST if has_no_source else expected)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Parametrize the tests of the suite with the examples; pytest calls this hook."""
        if metafunc.function in _TEST_OF.values():
            metafunc.parametrize("case", cases_of([self._source()]), ids=str)

    def test_no_check_was_taken_out(self) -> None:
        """No test of the suite is missing, and each expected failure has a reason."""
        from mtenn_core._pytest_plugin import ConformanceFailure

        problems = _source_problems(self._source()) or self._test_problems()
        problems += _expectation_problems(self.expected_failures)
        if problems:
            name = type(self).__name__
            raise ConformanceFailure("\n".join(f"{name}: {problem}" for problem in problems))

    @classmethod
    def _source(cls) -> Any:
        # Use the attribute of the class, because on an instance a function becomes a bound method.
        return getattr(cls, "combination", None)

    @classmethod
    def _tests(cls) -> Iterator[tuple[Check, Callable[..., None], object]]:
        """Yield every check, its test, and the attribute that this class must have for it."""
        chosen = chosen_checks(cls.level)
        for check, test in _TEST_OF.items():
            yield check, test, test if check in chosen else _NO_TEST

    @classmethod
    def _test_problems(cls) -> list[str]:
        return [
            f"{test.__name__} must be the test of the suite; found {_attribute(cls, test)!r}."
            f" Remove it, or give the reason: expected_failures = {{{check.id!r}: 'the reason'}}"
            for check, test, expected in cls._tests()
            if _attribute(cls, test) is not expected and check.id not in cls.expected_failures
        ]


_GUARD = CombinationConformance.test_no_check_was_taken_out
for _test in _TEST_OF.values():
    setattr(CombinationConformance, _test.__name__, _test)


def parametrize_with_checks(
    combinations: Iterable[Source],
    *,
    level: Level = "full",
    seed: int = 0,
    expected_failures: Expected | Callable[[Combination], Expected] | None = None,
) -> pytest.MarkDecorator:
    """Parametrize a test with each check of each combination.

    >>> @parametrize_with_checks([Mean, PowerMean(power=3)])
    ... def test_conformance(combination, check):
    ...     check(combination)

    Parameters
    ----------
    combinations : classes, instances, or functions that make an instance. A class is tested with
        each of its ``examples``
    level : level of the checks, see :func:`check_combination`
    seed : seed of the random numbers that the checks use
    expected_failures : maps the id of each check that may fail to the reason; or a function that
        takes a combination and returns this mapping

    Raises
    ------
    ValueError : the level is unknown, or an expected failure has an unknown id or no reason
    """
    import pytest

    checks = chosen_checks(level)
    parameters = []
    for case in cases_of(combinations):
        with _seeded(seed):
            combination = case.maker if isinstance(case.maker, Combination) else case.maker()
        expected = expected_failures
        if callable(expected):
            expected = expected(combination)
        expected = expected or {}
        if problems := _expectation_problems(expected):
            raise ValueError("; ".join(problems))
        for check in checks:
            bound = BoundCheck(check, level, seed, expected.get(check.id), case.label)
            parameters.append(pytest.param(combination, bound, id=f"{case}-{check.id}"))
    return pytest.mark.parametrize(("combination", "check"), parameters)


def _source_problems(source: object) -> list[str]:
    """Return the problems with the ``combination`` of a test class."""
    if isinstance(source, Combination) or callable(source):
        return []
    return [
        "combination must be a class, an instance, or a function that makes an instance; found"
        f" {source!r}. Write: combination = MyCombination"
    ]


def _expectation_problems(expected: Expected) -> list[str]:
    """Return the problems with expected failures: unknown ids and missing reasons."""
    known = [check.id for check in CHECKS]
    return [
        f"expected_failures: no check has the id {id!r}; known ids: {', '.join(known)}"
        for id in expected
        if id not in known
    ] + [
        f"expected_failures: {id!r} needs a reason in words; found {reason!r}"
        for id, reason in expected.items()
        if not (isinstance(reason, str) and reason.strip())
    ]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Set the seed, so that random parameters are the same in each test. Restore the old state."""
    # devices=[]: combinations are on the CPU, and a query of the GPUs' states would start CUDA.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
