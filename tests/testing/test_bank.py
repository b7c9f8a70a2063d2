"""The suite is tested by wrong combinations, each of which it must catch, and by right ones."""

import shlex
import subprocess
from functools import partial

import pytest
from bank import RIGHT, WRONG, make_right, make_wrong

from mtenn_core.testing import CHECKS, check_combination

# `tox run -e bank` tries every scale with every seed.
SCALE_AND_SEED = ((1.0, 0), (10.0, 1), (1000.0, 2))
# For each check, a mistake that no other check sees.
ALONE = {
    "A1": "gradient keeps the axis of the poses",
    "A2": "output in the dtype of the parameters",
    "A3": "gradients matched by shape",
    "A4": "zero_grad inside forward",
    "A5": "backward works once and then returns zeros",
    "A6": "last predictions kept on the instance until backward",
    "A7": "attached under no_grad too",
    "A8": "history of the predictions kept on the class",
    "A8q": "pose gradients are attributes of ctx",
    "A9": "pickling loses the scale",
    "A9q": "repr without the arguments",
    "A10": "double backward knows the loss alone: half of the Hessian, silently",
    "A11": "predictions without a gradient are left out of the weighted sum",
    "A11q": "a key of grad_dict that is no parameter is ignored",
    "A12": "predictions of shape (1,) are taken in float32",
    "A13": "ones made on the default device",
    "B1": "grad_output clamped to ±100",
    "B2": "pose gradients read in the order of their memory",
    "B3": "weights wrong above fifty poses",
    "C1": "weights wrong far from zero",
    "C2": "parameters that an optimizer trains decay, plain tensors do not",
    "C3": "own parameter detached",
    "D1": "last pose dropped from value and weights",
    "D2": "bounded, and grows by ln M",
    "D3": "NaN taken for zero",
    "D4": "gradients added up in their own half precision, pose by pose",
    "D5": "an argument is ignored",
    "D5q": "a scale of zero, a negative one and NaN are accepted",
}


def failed(make, **options):
    report = check_combination(make, level="quality", **options)
    return [record.id for record in report.failures]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.name)
def test_the_check_that_is_there_for_a_mistake_catches_it(wrong):
    missed = [
        (t, seed)
        for t, seed in SCALE_AND_SEED
        if not failed(partial(make_wrong, name=wrong.name, t=t), seed=seed, only=[wrong.check])
    ]
    assert not missed


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.id)
def test_every_check_has_a_mistake_that_it_alone_catches(check):
    assert failed(partial(make_wrong, name=ALONE[check.id], t=1.0)) == [check.id]


@pytest.mark.parametrize("right", RIGHT, ids=lambda right: right.name)
def test_right_combinations_raise_no_alarm(right):
    for seed in range(2):
        report = check_combination(partial(make_right, name=right.name), seed=seed)
        assert report.passed, str(report)


def test_the_likely_cause_is_named_for_most_mistakes():
    named = 0
    for wrong in WRONG:
        make = partial(make_wrong, name=wrong.name, t=1.0)
        (record,) = check_combination(make, level="quality", only=[wrong.check]).failures
        named += bool(record.cause)
        assert wrong.cause.lower() in str(record).lower(), wrong.name
    assert named >= 0.85 * len(WRONG)


@pytest.mark.parametrize("check", ["A4", "B1", "C1", "D5"])
def test_the_line_for_the_shell_reproduces_the_failure(check):
    make = partial(make_wrong, name=ALONE[check], t=1.0)
    (record,) = check_combination(make, only=[check]).failures
    assert record.repro.startswith("mtenn check ")
    run = subprocess.run(shlex.split(record.repro), capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert all(line in run.stdout for line in record.reason.splitlines())
