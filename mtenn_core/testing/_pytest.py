"""The conformance suite as tests: a class to inherit from, and a decorator.

pytest is imported when a test runs, so that ``mtenn_core.testing`` does without it.
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

# In the place of a test that a class has no use for: pytest collects what can be called.
_NOT_FOR_THIS_CLASS = object()


@dataclass(frozen=True)
class BoundCheck:
    """A check of the suite as the body of a test; called, it passes, fails, skips or xfails.

    Attributes
    ----------
    check : of the catalogue
    level : how thoroughly to probe
    seed : of the numbers to probe with
    why : the reason if a failure is expected
    who : the combination that it is for, in the summary
    whole_class : whether all tests of a class are one suite
    """

    check: Check
    level: Level
    seed: int
    why: str | None
    who: str
    whole_class: bool = False

    def __call__(self, combination: Source) -> None:
        __tracebackhide__ = True
        import pytest

        from mtenn_core._pytest_plugin import ConformanceFailure, note

        report = self._report(combination)
        note(report, self.who, whole_class=self.whole_class)
        (record,) = report.records
        if record.status == "skip":
            pytest.skip(record.reason)
        if record.status == "xfail":
            pytest.xfail(record.reason)
        if record.status != "pass":
            block = f"{report.name}, {report.combination}\n{record}"
            short = record.cause or record.reason.partition("\n")[0]
            if record.status == "xpass":
                short = f"it passes: take {record.id!r} out of expected_failures"
                block += f"\n    {short}"
            raise ConformanceFailure(block, short=f"{record.id} {record.status}: {short}")

    def _report(self, combination: Source) -> Report:
        __tracebackhide__ = True
        from mtenn_core._pytest_plugin import ConformanceFailure

        id = self.check.id
        try:
            with _seeded(self.seed):
                report = check_combination(
                    combination,
                    level=self.level,
                    expected_failures={} if self.why is None else {id: self.why},
                    seed=self.seed,
                    only=[id],
                )
        except Exception as error:  # not of a check: those are in the report
            what, where = described(error).rsplit("\n", 1)
            advice = (
                "; arguments that its constructor needs are declared in the class:"
                " examples = ({'name': value},)"
            )
            # From None: beside a message without a traceback, pytest would show this one twice.
            raise ConformanceFailure(
                f"{self.who} cannot be checked: {what}"
                f"{'' if isinstance(error, MtennError) else advice}\n{where}"
            ) from None
        return replace(report, n_expected=len(chosen_checks(self.level)))


def _test_of(check: Check) -> Callable[[CombinationConformance, Case], None]:
    def test(self: CombinationConformance, case: Case) -> None:
        why = self.expected_failures.get(check.id)
        bound = BoundCheck(check, self.level, self.seed, why, case.label, whole_class=True)
        bound(case.maker)

    test.__name__ = "test_" + re.sub(r"[^a-z0-9]+", "_", f"{check.id} {check.title}".lower())
    test.__qualname__ = f"CombinationConformance.{test.__name__}"
    test.__doc__ = f"{check.id}: {check.title}."
    return test


_TEST_OF = {check: _test_of(check) for check in CHECKS}


def _found(cls: type, test: Callable[..., None]) -> object:
    """Return what a class has under the name of a test."""
    return getattr(cls, test.__name__, None)


class CombinationConformance:
    """Inherit from it, and pytest holds a combination to the conformance suite.

    One test for each check, and for each of the ``examples`` of a class:

    >>> class TestPowerMean(CombinationConformance):
    ...     combination = PowerMean

    Attributes
    ----------
    combination : a class, an instance, or a function that makes one
    level : of the checks, see :func:`check_combination`; there are no tests for those above it
    seed : of the numbers to probe with
    expected_failures : for the id of each check that may fail, why; with such a reason its test may
        also be replaced or set to None
    """

    combination: ClassVar[Source]
    level: ClassVar[Level] = "full"
    seed: ClassVar[int] = 0
    expected_failures: ClassVar[Expected] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.test_no_check_was_taken_out is not _GUARD:
            raise TypeError(f"{cls.__name__} must not replace test_no_check_was_taken_out")
        nothing_to_test = _about_source(cls._source())
        for _, test, wanted in cls._tests():
            found = _found(cls, test)
            if found is test or found is _NOT_FOR_THIS_CLASS:
                wanted = _NOT_FOR_THIS_CLASS if nothing_to_test else wanted
                setattr(cls, test.__name__, wanted)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run the tests of the suite for each of the examples; pytest calls it."""
        if metafunc.function in _TEST_OF.values():
            metafunc.parametrize("case", cases_of([self._source()]), ids=str)

    def test_no_check_was_taken_out(self) -> None:
        """The suite is whole, and what may fail has a reason."""
        from mtenn_core._pytest_plugin import ConformanceFailure

        wrong = _about_source(self._source()) or self._about_tests()
        wrong += _about_expected(self.expected_failures)
        if wrong:
            raise ConformanceFailure("\n".join(f"{type(self).__name__}: {what}" for what in wrong))

    @classmethod
    def _source(cls) -> Any:
        # Of the class: a function among the attributes of an instance would be a method.
        return getattr(cls, "combination", None)

    @classmethod
    def _tests(cls) -> Iterator[tuple[Check, Callable[..., None], object]]:
        """Yield every check, its test, and what belongs in its place at the level of this class."""
        chosen = chosen_checks(cls.level)
        for check, test in _TEST_OF.items():
            yield check, test, test if check in chosen else _NOT_FOR_THIS_CLASS

    @classmethod
    def _about_tests(cls) -> list[str]:
        return [
            f"{test.__name__} is not that of the suite; found {_found(cls, test)!r}; remove it, or"
            f" say why: expected_failures = {{{check.id!r}: 'the reason'}}"
            for check, test, wanted in cls._tests()
            if _found(cls, test) is not wanted and check.id not in cls.expected_failures
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
    """Run a test for each check of each combination.

    >>> @parametrize_with_checks([Mean, PowerMean(power=3)])
    ... def test_conformance(combination, check):
    ...     check(combination)

    Parameters
    ----------
    combinations : each a class, of which every one of the ``examples`` is made, an instance, or a
        function that makes one
    level : of the checks, see :func:`check_combination`
    seed : of the numbers to probe with
    expected_failures : for the id of each check that may fail, why; or a function that returns that
        for a combination

    Raises
    ------
    ValueError : there is no such level, no check of an expected failure's id, or no reason for one
    """
    import pytest

    checks = chosen_checks(level)
    parameters = []
    for case in cases_of(combinations):
        with _seeded(seed):
            made = case.maker if isinstance(case.maker, Combination) else case.maker()
        expected = expected_failures(made) if callable(expected_failures) else expected_failures
        if wrong := _about_expected(expected or {}):
            raise ValueError("; ".join(wrong))
        for check in checks:
            bound = BoundCheck(check, level, seed, (expected or {}).get(check.id), case.label)
            parameters.append(pytest.param(made, bound, id=f"{case}-{check.id}"))
    return pytest.mark.parametrize(("combination", "check"), parameters)


def _about_source(source: object) -> list[str]:
    """Return what is wrong with the ``combination`` of a test class."""
    if isinstance(source, Combination) or callable(source):
        return []
    return [
        "it must say what to test, combination = MyCombination: a class, an instance, or a function"
        f" that makes one; found {source!r}"
    ]


def _about_expected(expected: Expected) -> list[str]:
    """Return what is wrong with expected failures."""
    known = [check.id for check in CHECKS]
    return [
        f"expected_failures: no check is called {id!r}; known: {', '.join(known)}"
        for id in expected
        if id not in known
    ] + [
        f"expected_failures: {id!r} needs a reason, in words; found {why!r}"
        for id, why in expected.items()
        if not (isinstance(why, str) and why.strip())
    ]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Make combinations that draw random parameters the same in each test."""
    # devices=[]: combinations are made on the CPU, and asking for the GPUs' states starts CUDA.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
