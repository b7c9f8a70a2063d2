"""The suite is tested by wrong combinations, each of which it must catch, and by right ones."""

import shlex
import subprocess
from functools import partial

import pytest
from bank import RIGHT, RIGHT_VECTORS, WRONG, make_right, make_wrong
from tiers import slow

from mtenn_core.testing import CHECKS, check_combination

# `tox run -e bank` tries every scale with every seed.
SCALE_AND_SEED = ((1.0, 0), (10.0, 1), (1000.0, 2))
# They take two thirds of the time.
LONG = ("A6", "B3", "C1", "D4", "D5")
SAMPLED = pytest.mark.slow("the fast tier takes a fixed part of them")
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
    "A14": "rule for vmap divides by the number of compounds",
    "B1": "grad_output clamped to ±100",
    "B2": "pose gradients read in the order of their memory",
    "B3": "weights wrong above fifty poses",
    "C1": "weights wrong far from zero",
    "C2": "parameters that an optimizer trains decay, plain tensors do not",
    "C3": "own gradient is that of t, not of ln t",
    "C4": "a learned pose input gets the derivative of another pose",
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


def wrong_scale_and_seed():
    """Yield every mistake with every scale; the fast tier takes one scale of each, in turn."""
    for i, wrong in enumerate(WRONG):
        for j, (t, seed) in enumerate(SCALE_AND_SEED):
            marks = () if j == i % len(SCALE_AND_SEED) else SAMPLED
            yield pytest.param(wrong, t, seed, marks=marks, id=f"{wrong.name}, t = {t:g}")


@pytest.mark.parametrize(("wrong", "t", "seed"), [*wrong_scale_and_seed()])
def test_each_mistake_is_caught_by_its_check(wrong, t, seed):
    make = partial(make_wrong, name=wrong.name, t=t)
    (record,) = check_combination(make, level="quality", seed=seed, only=[wrong.check]).records
    assert record.failed
    assert t != 1.0 or wrong.cause.lower() in str(record).lower()


@pytest.mark.slow("one check of each mistake, at the scale that the fast tier may leave out")
def test_the_likely_cause_is_named_for_most_mistakes():
    named = 0
    for wrong in WRONG:
        make = partial(make_wrong, name=wrong.name, t=1.0)
        (record,) = check_combination(make, level="quality", only=[wrong.check]).failures
        named += bool(record.cause)
    assert named >= 0.85 * len(WRONG)


def with_neighbours(check):
    """Return the ids of a check and of those before and after it in the catalogue."""
    ids = [each.id for each in CHECKS]
    at = ids.index(check.id)
    return ids[max(at - 1, 0) : at + 2]


def check_and_others():
    """Yield every check with its neighbours and with all others, which takes whole suites."""
    for check in CHECKS:
        yield pytest.param(check, with_neighbours(check), id=f"{check.id} and its neighbours")
        yield pytest.param(check, None, id=check.id, marks=pytest.mark.slow("a whole suite"))


@pytest.mark.parametrize(("check", "others"), [*check_and_others()])
def test_every_check_catches_a_mistake_that_no_other_check_catches(check, others):
    assert failed(partial(make_wrong, name=ALONE[check.id], t=1.0), only=others) == [check.id]


def right_seed_and_checks():
    """Yield every right one with two seeds; the fast tier leaves long checks out of most."""
    short = [check.id for check in CHECKS if check.level != "quality" and check.id not in LONG]
    for i, right in enumerate(RIGHT):
        marks = () if i % 6 == 0 else SAMPLED
        # Rules for vectors have many numbers per pose, and often networks.
        of_short = marks if right in RIGHT_VECTORS else ()
        yield pytest.param(right, 0, short, marks=of_short, id=f"{right.name}, short checks")
        yield pytest.param(right, 1, None, marks=marks, id=f"{right.name}, all checks")
        yield pytest.param(right, 0, LONG, marks=SAMPLED, id=f"{right.name}, long checks")


@pytest.mark.parametrize(("right", "seed", "only"), [*right_seed_and_checks()])
def test_right_combinations_pass(right, seed, only):
    report = check_combination(partial(make_right, name=right.name), seed=seed, only=only)
    assert report.passed, str(report)


@pytest.mark.parametrize("check", ["B1", *slow("A4", "C1", "D5", reason="a new interpreter each")])
def test_the_shell_command_reproduces_the_failure(check):
    make = partial(make_wrong, name=ALONE[check], t=1.0)
    (record,) = check_combination(make, only=[check]).failures
    assert record.repro.startswith("mtenn check ")
    run = subprocess.run(shlex.split(record.repro), capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert all(line in run.stdout for line in record.reason.splitlines())
