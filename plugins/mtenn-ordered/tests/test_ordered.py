import copy
import itertools
import math
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from mtenn_ordered import (
    MedianCombination,
    QuantileCombination,
    TopKMeanCombination,
    TrimmedMeanCombination,
)

from mtenn_core import MultiPoseModel, registry
from mtenn_core.testing import CombinationConformance, check_combination

CASES = {
    "top 1": partial(TopKMeanCombination, k=1),
    "top 3": TopKMeanCombination,
    "top 1, largest": partial(TopKMeanCombination, k=1, largest=True),
    "top 4, largest": partial(TopKMeanCombination, k=4, largest=True),
    "trimmed, 0": partial(TrimmedMeanCombination, proportion=0.0),
    "trimmed, 0.25": TrimmedMeanCombination,
    "trimmed, 0.49": partial(TrimmedMeanCombination, proportion=0.49),
    "median": MedianCombination,
    "quantile, 0": partial(QuantileCombination, q=0.0),
    "quantile, 0.25": QuantileCombination,
    "quantile, 0.9": partial(QuantileCombination, q=0.9),
    "quantile, 1": partial(QuantileCombination, q=1.0),
}
NAMES = {
    "median": MedianCombination,
    "quantile": QuantileCombination,
    "top_k_mean": TopKMeanCombination,
    "trimmed_mean": TrimmedMeanCombination,
}
RARE = pytest.mark.slow("a gate that is shut by mistake is rare")
SEEDS = [*range(2), *(pytest.param(seed, marks=RARE) for seed in range(2, 50))]
EVERY = pytest.mark.parametrize("make", CASES.values(), ids=CASES)
HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


class TestTopKMean(CombinationConformance):
    combination = TopKMeanCombination
    level = "quality"


class TestTrimmedMean(CombinationConformance):
    combination = TrimmedMeanCombination
    level = "quality"


class TestMedian(CombinationConformance):
    combination = MedianCombination
    level = "quality"


class TestQuantile(CombinationConformance):
    combination = QuantileCombination
    level = "quality"


def by_numpy(combination, y):
    """Return the value that numpy gives for the predictions of one compound."""
    y = np.sort(np.asarray(y, dtype=np.float64))
    match combination:
        case TopKMeanCombination(k=k, largest=True):
            return y[-k:].mean()
        case TopKMeanCombination(k=k):
            return y[:k].mean()
        case TrimmedMeanCombination(proportion=proportion):
            cut = int(proportion * len(y))
            return y[cut : len(y) - cut].mean()
        case MedianCombination():
            return np.median(y)
        case QuantileCombination(q=q):
            return np.quantile(y, q)


def by_autograd(combination, y):
    y = y.clone().requires_grad_()
    (weights,) = torch.autograd.grad(combination.combine(y), y)
    return weights


def by_differences(combination, y, step):
    """Return central differences, one for each pose."""
    axes = torch.eye(len(y), dtype=y.dtype)
    return torch.stack(
        [
            (combination.combine(y + step * axis) - combination.combine(y - step * axis))
            / (2 * step)
            for axis in axes
        ]
    )


@pytest.mark.parametrize("seed", SEEDS)
@EVERY
def test_the_gate_opens_at_every_seed(make, seed):
    report = check_combination(make(), level="gate", seed=seed)
    assert report.passed, str(report)


@pytest.mark.parametrize(("name", "cls"), NAMES.items())
def test_they_are_found_by_name(name, cls):
    assert registry.get(name) is cls
    assert registry.info(name).distribution == "mtenn-ordered"


def test_worked_by_hand():
    y = torch.tensor([1.0, 2.0, 2.0, 2.0, 7.0], dtype=torch.float64)
    cases = [
        (TopKMeanCombination(), 5 / 3, [1 / 3, *[2 / 9] * 3, 0]),
        (TopKMeanCombination(k=2), 1.5, [1 / 2, *[1 / 6] * 3, 0]),
        (TopKMeanCombination(k=2, largest=True), 4.5, [0, *[1 / 6] * 3, 1 / 2]),
        (TrimmedMeanCombination(), 2.0, [0, *[1 / 3] * 3, 0]),
        (TrimmedMeanCombination(proportion=0.4), 2.0, [0, *[1 / 3] * 3, 0]),
        (TrimmedMeanCombination(proportion=0.1), 2.8, [1 / 5] * 5),
        (MedianCombination(), 2.0, [0, *[1 / 3] * 3, 0]),
        (QuantileCombination(), 2.0, [0, *[1 / 3] * 3, 0]),
        (QuantileCombination(q=0.9), 5.0, [0, *[0.4 / 3] * 3, 0.6]),
        (QuantileCombination(q=0.1), 1.4, [0.6, *[0.4 / 3] * 3, 0]),
    ]
    for combination, value, weights in cases:
        torch.testing.assert_close(combination.combine(y).item(), value)
        torch.testing.assert_close(combination.pose_weights(y).tolist(), [*map(float, weights)])
    assert QuantileCombination().combine(torch.arange(5.0)) == 1


@EVERY
@pytest.mark.parametrize("n_poses", [1, 2, 3, 4, 5, 10, 41])
def test_values_are_those_of_numpy(make, n_poses):
    combination = make()
    for y in (torch.randn(n_poses, dtype=torch.float64), torch.randint(3, (n_poses,)).double()):
        # Sums of up to 41 numbers, in another order.
        assert combination.combine(y).item() == pytest.approx(
            by_numpy(combination, y), rel=1e-13, abs=1e-14
        )


@pytest.mark.parametrize("q", [0.1, 0.29, 0.3, 0.57, 0.7, 1 / 3, 0.99])
@pytest.mark.parametrize("n_poses", [2, 11, 101, 1001])
def test_quantiles_are_those_of_numpy_and_torch(q, n_poses):
    y = torch.randn(n_poses, dtype=torch.float64)
    value = QuantileCombination(q).combine(y).item()
    assert value == pytest.approx(np.quantile(y, q), rel=1e-12, abs=1e-12)
    assert value == pytest.approx(torch.quantile(y, q).item(), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("n_poses", range(1, 200))
def test_the_largest_proportion_leaves_one_or_two_poses(n_poses):
    weights = TrimmedMeanCombination(math.nextafter(0.5, 0)).pose_weights(torch.arange(n_poses) / 1)
    assert weights.count_nonzero() == 2 - n_poses % 2


@EVERY
@pytest.mark.parametrize("n_poses", [1, 2, 3, 6, 9])
def test_weights_agree_with_autograd_and_finite_differences(make, n_poses):
    combination = make()
    y = (torch.randperm(n_poses) + torch.rand(n_poses) / 2).double()
    weights = combination.pose_weights(y)
    assert torch.equal(by_autograd(combination, y), weights)
    # Linear between kinks, which are at least 1/2 apart: only roundoff over the step, about 1e-15.
    found = by_differences(combination, y, 0.125)
    torch.testing.assert_close(found, weights, rtol=0, atol=1e-13)


@EVERY
def test_weights_of_ties_are_the_mean_over_the_orders_of_the_tied_poses(make):
    """The order is that of tiny changes of the tied predictions."""
    combination = make()
    for y in ([1.0, 1.0, 1.0, 5.0], [0.0, 2.0, 2.0, 2.0, 2.0], [1.0, 3.0, 1.0, 3.0, 2.0, 3.0]):
        y = torch.tensor(y, dtype=torch.float64)
        orders = [
            combination.pose_weights(y + 1e-6 * torch.tensor(order, dtype=torch.float64))
            for order in itertools.permutations(range(len(y)))
        ]
        expected = torch.stack(orders).mean(0)  # of up to 720 numbers
        torch.testing.assert_close(combination.pose_weights(y), expected, rtol=0, atol=1e-14)
        assert torch.equal(by_autograd(combination, y), combination.pose_weights(y))


@EVERY
def test_a_common_change_of_ties_changes_the_value_by_their_weights(make):
    combination = make()
    y = torch.tensor([1.0, 3.0, 1.0, 3.0, 2.0, 3.0], dtype=torch.float64)
    for tied in (y == 1, y == 3):
        step = 0.25 * tied
        change = (combination.combine(y + step) - combination.combine(y - step)) / 0.5
        torch.testing.assert_close(change, combination.pose_weights(y)[tied].sum())


@EVERY
@pytest.mark.parametrize("n_poses", [1, 2, 3, 7, 30])
def test_equal_predictions_share_the_weight_equally(make, n_poses):
    combination = make()
    y = torch.full((n_poses,), 0.1)
    assert combination.combine(y) == y[0]
    weights = combination.pose_weights(y)
    assert torch.equal(weights, by_autograd(combination, y))
    # One rounding for each of the quotients.
    torch.testing.assert_close(weights, torch.full((n_poses,), 1 / n_poses), rtol=3e-7, atol=0)


@EVERY
def test_weights_add_up_to_one_and_follow_their_poses(make):
    combination = make()
    for y in (torch.randn(9), torch.randint(4, (9,)).float()):
        y = y.double()
        weights = combination.pose_weights(y)
        assert weights.min() >= 0
        torch.testing.assert_close(weights.sum().item(), 1.0)
        order = torch.randperm(9)
        assert torch.equal(combination.pose_weights(y[order]), weights[order])


@pytest.mark.parametrize("k", [3, 4, 1000])
@pytest.mark.parametrize("largest", [False, True])
def test_with_no_more_than_k_poses_the_top_k_mean_is_the_mean(k, largest):
    y = torch.tensor([-8.0, 5.0, -2.0], dtype=torch.float64)
    combination = TopKMeanCombination(k, largest)
    torch.testing.assert_close(combination.combine(y), y.mean())
    torch.testing.assert_close(combination.pose_weights(y).tolist(), [1 / 3] * 3)


def test_the_median_of_two_is_their_mean_and_not_the_lower_one():
    y = torch.tensor([-8.0, -5.0])
    assert MedianCombination().combine(y) == -6.5 != y.median()
    assert MedianCombination().pose_weights(y).tolist() == [0.5, 0.5]


@EVERY
def test_one_pose_gives_its_own_value(make):
    y = torch.tensor([-7.3])
    assert make().combine(y) == y[0]
    assert make().pose_weights(y).tolist() == [1.0]


INFINITE = {
    "top 2": (TopKMeanCombination(2), [math.inf, 1.0, 3.0, math.inf], 2.0, [0, 0.5, 0.5, 0]),
    "top 2, one finite": (
        TopKMeanCombination(2),
        [math.inf, 1.0, math.inf],
        math.inf,
        [0.25, 0.5, 0.25],
    ),
    "top 2, -inf": (TopKMeanCombination(2), [-math.inf, 1.0, 3.0], -math.inf, [0.5, 0.5, 0]),
    "largest 2": (TopKMeanCombination(2, True), [-math.inf, 1.0, 3.0], 2.0, [0, 0.5, 0.5]),
    "trimmed": (
        TrimmedMeanCombination(0.25),
        [math.inf, 1.0, 3.0, -math.inf],
        2.0,
        [0, 0.5, 0.5, 0],
    ),
    "median": (MedianCombination(), [math.inf, 3.0, -math.inf], 3.0, [0, 1, 0]),
    "median of two": (MedianCombination(), [math.inf, 3.0], math.inf, [0.5, 0.5]),
    "quantile": (QuantileCombination(0.25), [1.0, 3.0, math.inf], 2.0, [0.5, 0.5, 0]),
    "whole rank": (QuantileCombination(0.5), [1.0, 3.0, math.inf], 3.0, [0, 1, 0]),
    "all": (QuantileCombination(0.25), [math.inf, math.inf], math.inf, [0.5, 0.5]),
}


@pytest.mark.parametrize(("combination", "y", "value", "weights"), INFINITE.values(), ids=INFINITE)
def test_an_infinite_pose_counts_only_for_its_rank(combination, y, value, weights):
    y = torch.tensor(y, dtype=torch.float64)
    assert combination.combine(y) == value
    assert combination.pose_weights(y).tolist() == by_autograd(combination, y).tolist() == weights


@pytest.mark.parametrize("combination", [MedianCombination(), TrimmedMeanCombination(0.0)])
def test_both_infinities_with_weight_give_nan(combination):
    y = torch.tensor([math.inf, -math.inf])
    assert combination.combine(y).isnan()
    assert combination.pose_weights(y).tolist() == [0.5, 0.5]


def test_a_rank_that_is_whole_but_for_rounding_is_whole():
    assert 0.57 * 100 < 57
    y = torch.arange(101.0)
    y[:57] = -math.inf
    y[58:] = math.inf
    assert QuantileCombination(0.57).combine(y) == 57


def test_a_rank_just_above_a_whole_one_is_not_whole():
    y = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    value = QuantileCombination(0.5 * (1 + 1e-12)).combine(y).item()
    # The rank is 1 + 1e-12, and its last digit is 2e-16.
    assert value == pytest.approx(1e-12, rel=1e-3, abs=0)


@EVERY
@pytest.mark.parametrize("broken", range(4))
def test_nan_in_gives_nan_out(make, broken):
    y = torch.tensor([1.0, 4.0, 2.0, 3.0])
    y[broken] = math.nan
    assert make().combine(y).isnan()
    assert make().pose_weights(y).isnan().all()
    assert by_autograd(make(), y).isnan().all()


@EVERY
@HALF
def test_half_precision_is_that_of_float32_rounded_once(make, dtype):
    y = torch.randn(64).to(dtype)
    combination = make()
    value, weights = combination.combine(y), combination.pose_weights(y)
    assert value.dtype == weights.dtype == dtype
    assert torch.equal(value, combination.combine(y.float()).to(dtype))
    assert torch.equal(weights, combination.pose_weights(y.float()).to(dtype))


@EVERY
@HALF
def test_numbers_near_the_end_of_half_precision_do_not_overflow(make, dtype):
    y = torch.full((100,), 6e4).to(dtype)
    assert make().combine(y) == y[0]


@EVERY
def test_the_largest_numbers_do_not_overflow(make):
    y = torch.full((64,), 3e38)
    torch.testing.assert_close(make().combine(y), y[0], rtol=1e-6, atol=0)


MANY = pytest.mark.slow("a million poses take seconds")


@pytest.mark.parametrize(
    "make",
    [CASES["trimmed, 0.25"], *(pytest.param(make, marks=MANY) for make in CASES.values())],
    ids=["quick", *CASES],
)
def test_a_million_poses_in_float32_give_the_digits_of_float64(make):
    y = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0)) - 8
    combination = make()
    eps = torch.finfo(torch.float32).eps
    # One rounding, and the coefficients of a quantile, which are rounded once.
    found, exact = combination.combine(y).double(), combination.combine(y.double())
    torch.testing.assert_close(found, exact, rtol=4 * eps, atol=0)
    weights = combination.pose_weights(y)
    exact = combination.pose_weights(y.double())
    torch.testing.assert_close(weights.double(), exact, rtol=4 * eps, atol=0)


@EVERY
def test_second_derivatives_are_zero(make):
    y = torch.tensor([1.0, 3.0, 1.0, math.inf, 2.0, -4.0], dtype=torch.float64)
    found = torch.autograd.functional.hessian(make().combine, y)
    assert torch.equal(found, torch.zeros(6, 6, dtype=torch.float64))


@EVERY
@pytest.mark.parametrize("gradients", ["graph", "stored", "recomputed"])
def test_a_ragged_batch_gives_the_numbers_of_each_compound(make, gradients):
    """With ties: some poses are the same."""
    torch.manual_seed(0)
    model = MultiPoseModel(torch.nn.Linear(4, 1).double(), make(), gradients=gradients)
    sizes = [3, 1, 5, 3, 1, 5, 3, 2, 5, 3]
    poses = torch.randint(2, (sum(sizes), 4)).double()
    together = model(poses, sizes)
    alone = [model(own) for own in poses.split(sizes)]
    combined = torch.stack([out.prediction for out in alone])
    params = list(model.parameters())
    found = [together.prediction, model.pose_weights(together.pose_predictions, sizes)]
    found += torch.autograd.grad(together.prediction.square().sum(), params)
    weights = [model.combination.pose_weights(out.pose_predictions.detach()) for out in alone]
    expected = [combined, torch.cat(weights)]
    expected += torch.autograd.grad(combined.square().sum(), params)
    # Sums run in another order.
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@EVERY
def test_vmap_gives_the_numbers_of_a_loop(make):
    combination = make()
    rows = torch.randint(4, (20, 6)).double()
    for in_dims, batch in ((0, rows), (1, rows.t().contiguous())):
        for function in (combination.combine, combination.pose_weights):
            found = torch.func.vmap(function, in_dims=in_dims)(batch)
            torch.testing.assert_close(found, torch.stack([function(row) for row in rows]))


@pytest.mark.parametrize("k", [0, -3, 2.5, math.inf, math.nan, 3.0, "3", None, True])
def test_a_number_of_poses_that_is_not_whole_and_positive_is_refused(k):
    with pytest.raises(
        ValueError, match=f"k must be a whole number of at least 1; found k = {k!r}$"
    ):
        TopKMeanCombination(k)


@pytest.mark.parametrize("proportion", [-0.1, 0.5, 1.0, math.nan, "a", None, False])
def test_a_proportion_that_leaves_nothing_is_refused(proportion):
    message = f"proportion must be at least 0 and below 0.5; found proportion = {proportion!r}$"
    with pytest.raises(ValueError, match=message):
        TrimmedMeanCombination(proportion)


@pytest.mark.parametrize("q", [-0.1, 1.1, math.nan, math.inf, "a", "1", None, True])
def test_a_quantile_outside_of_zero_to_one_is_refused(q):
    with pytest.raises(ValueError, match=f"q must be between 0 and 1; found q = {q!r}$"):
        QuantileCombination(q)


@pytest.mark.parametrize("largest", ["no", 1, None])
def test_largest_is_true_or_false(largest):
    with pytest.raises(ValueError, match=f"^largest must be True or False; found .*{largest!r}$"):
        TopKMeanCombination(largest=largest)


def test_numbers_of_numpy_are_numbers():
    assert TopKMeanCombination(np.int64(2)).k == 2
    assert TrimmedMeanCombination(np.float32(0.25)).proportion == 0.25
    assert QuantileCombination(np.int64(1)).q == 1


def test_arguments_show_and_survive_copies():
    shown = {
        TopKMeanCombination(): "TopKMeanCombination(k=3, largest=False)",
        TrimmedMeanCombination(): "TrimmedMeanCombination(proportion=0.25)",
        MedianCombination(): "MedianCombination()",
        QuantileCombination(0.9): "QuantileCombination(q=0.9)",
    }
    for combination, text in shown.items():
        pickled = pickle.loads(pickle.dumps(combination))
        for twin in (combination, copy.deepcopy(combination), pickled):
            assert repr(twin) == text
