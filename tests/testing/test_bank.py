"""The suite is tested by wrong combinations, each of which it must catch, and by right ones."""

from functools import partial

import pytest
from bank import RIGHT, WRONG, make_right, make_wrong

from mtenn_core.testing import CHECKS, check_combination

SCALES = (1.0, 10.0, 1000.0)
ALONE = {wrong.check: wrong for wrong in reversed(WRONG) if wrong.only}


def failed(make, **options):
    report = check_combination(make, level="quality", **options)
    return [record.id for record in report.failures]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.name)
def test_the_check_that_is_there_for_a_mistake_catches_it(wrong):
    for t in SCALES:
        make = partial(make_wrong, wrong.name, t)
        missed = [seed for seed in range(4) if not failed(make, seed=seed, only=[wrong.check])]
        assert not missed, f"at t = {t}, seeds {missed}"


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.id)
def test_every_check_has_a_mistake_that_it_alone_catches(check):
    assert failed(partial(make_wrong, ALONE[check.id].name, 1.0)) == [check.id]


@pytest.mark.parametrize("right", RIGHT, ids=lambda right: right.name)
def test_right_combinations_raise_no_alarm(right):
    for seed in range(3):
        report = check_combination(partial(make_right, right.name), seed=seed)
        assert report.passed, str(report)


def test_the_likely_cause_is_named_for_most_mistakes():
    reports = [
        check_combination(partial(make_wrong, wrong.name, 1.0), level="quality", only=[wrong.check])
        for wrong in WRONG
    ]
    named = sum(bool(record.cause) for report in reports for record in report.failures)
    assert named >= 0.8 * len(WRONG)
