"""A kink that is not declared is named as such, by every check that fails because of it."""

import pytest
import torch
from bank import WRONG, make_wrong
from tiers import slow

from mtenn_core import Combination
from mtenn_core.testing import check_combination
from mtenn_core.testing._probe.finite_differences import directional_derivatives
from mtenn_core.testing._probe.kinks import KINK, at_kink
from mtenn_core.testing._probe.poses import Poses
from mtenn_core.testing._probe.subject import Subject


class Kinked(Combination):
    """Has a kink, and does not declare it."""


class BestTwo(Kinked):
    def combine(self, predictions):
        return predictions.topk(min(2, len(predictions))).values.mean()


class Lowest(Kinked):
    def combine(self, predictions):
        return predictions.min()


class Median(Kinked):
    def combine(self, predictions):
        return predictions.median()


class Quantile(Kinked):
    def combine(self, predictions):
        return predictions.quantile(0.3)


class HardMax(Kinked):
    def combine(self, predictions):
        return predictions.amax()


class HardMinClosedForm(Kinked):
    def combine(self, predictions):
        return predictions[predictions.argmin()]

    def pose_weights(self, predictions):
        return torch.zeros_like(predictions).index_fill(0, predictions.argmin(), 1.0)


class ByRank(Kinked):
    def combine(self, predictions):
        rank = torch.arange(1, len(predictions) + 1).to(predictions)
        return (predictions.sort().values / rank).sum() / (1 / rank).sum()


class Trimmed(Kinked):
    def combine(self, predictions):
        return predictions.sort().values[len(predictions) // 3 :].mean()


class BestHalf(Kinked):
    """Takes NaN for the highest number, as sort does."""

    def combine(self, predictions):
        return predictions.sort().values[: max(1, len(predictions) // 2)].mean()


class Selected(Kinked):
    """Has an argument, and so D5 takes derivatives as well."""

    def __init__(self, k=2):
        super().__init__()
        self.k = k

    def combine(self, predictions):
        return predictions.topk(min(int(self.k), len(predictions))).values.mean()


class LearnedLowest(Kinked):
    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(1.3))

    def combine(self, predictions):
        return (self.factor * predictions).amin() + self.factor.square() * predictions.mean()


class Clamped(Kinked):
    """Has kinks at fixed predictions, and not only where they are equal."""

    def combine(self, predictions):
        return predictions.relu().mean() + 0.5 * predictions.mean()


class Relu(Kinked):
    def combine(self, predictions):
        return predictions.relu().mean()


AT_TIES = [
    BestTwo,
    Lowest,
    Median,
    Quantile,
    HardMax,
    HardMinClosedForm,
    ByRank,
    Trimmed,
    BestHalf,
    Selected,
    LearnedLowest,
]


def name_of(cls):
    return cls.__name__


@pytest.mark.parametrize("seed", [0, *slow(1, 2, 3, 4, 5, 6, 7, reason="whole suites")])
@pytest.mark.parametrize("cls", AT_TIES, ids=name_of)
def test_a_kink_that_is_not_declared_is_named(cls, seed):
    failures = check_combination(cls(), seed=seed).failures
    assert "C1" in [record.id for record in failures]
    assert {record.cause for record in failures} == {KINK}


@pytest.mark.parametrize("seed", [0, *slow(1, 2, 3, 4, 5, 6, 7, reason="whole suites")])
@pytest.mark.parametrize("cls", [*AT_TIES, Clamped], ids=name_of)
def test_a_declared_kink_passes(cls, seed):
    report = check_combination(type(cls.__name__, (cls,), {"smooth": False})(), seed=seed)
    assert report.passed, str(report)


@pytest.mark.parametrize(
    ("cls", "seed"), [(BestTwo, 21), (Relu, 1)], ids=["6e-7 from a tie", "at 0, most values 0"]
)
def test_a_kink_near_a_wrong_weight_is_named(cls, seed):
    (record,) = check_combination(cls(), only=["C1"], seed=seed).failures
    assert record.cause == KINK


@pytest.mark.parametrize("check", ["C1", *slow("B3", "C3", "D1", reason="many mistakes each")])
def test_a_wrong_weight_is_not_called_a_kink(check):
    chosen = [wrong for wrong in WRONG if wrong.check == check][:: 1 if check != "C1" else 4]
    for wrong in chosen:
        make = lambda name=wrong.name: make_wrong(name, 1.0)  # noqa: E731
        (record,) = check_combination(make, only=[check]).failures
        assert record.cause != KINK, wrong.name


def test_a_wrong_weight_at_a_kink_is_not_excused():
    class TwiceTheMinimum(Lowest):
        def pose_weights(self, predictions):
            return 2 * super().pose_weights(predictions)

    (record,) = check_combination(TwiceTheMinimum(), only=["C1"]).failures
    assert record.cause != KINK


@pytest.mark.parametrize(
    ("combination", "predictions", "expected"),
    [
        (HardMax, [1.0, 1.0, 0.5], True),
        (HardMax, [1.0, 0.9, 0.5], False),
        (Median, [0.25, 0.25, 0.25], True),
        (Clamped, [0.0, 0.7], True),
        (Clamped, [0.1, 0.7], False),
    ],
    ids=["tie", "no tie", "median of a tie", "relu at 0", "relu elsewhere"],
)
def test_a_kink_is_where_the_slope_jumps(combination, predictions, expected):
    poses = Poses(torch.tensor(predictions, dtype=torch.float64))
    assert at_kink(Subject(combination(), 0), poses) is expected


def test_a_steep_smooth_value_has_no_kink():
    class Steep(Combination):
        def combine(self, predictions):
            return torch.logsumexp(1000 * predictions, dim=0) / 1000

    assert not at_kink(Subject(Steep(), 0), Poses(torch.full((3,), 0.25, dtype=torch.float64)))


def test_a_slope_of_zero_up_to_a_near_kink_is_not_taken_for_rounding():
    gap = 6e-6
    point = torch.tensor([[-gap]], dtype=torch.float64)
    step = torch.tensor([0.125], dtype=torch.float64)
    fd = directional_derivatives(lambda x: x[:, 0].relu(), point, torch.ones_like(point), step)
    # Within the gap, differences are exactly 0; beyond it, they come near to 1/2.
    assert abs(float(fd.derivative)) <= float(fd.error) < 1e-6
