import copy
import math
import pickle

import numpy as np
import pytest
import torch
from mtenn_boltzmann import BoltzmannCombination

from mtenn_core import MultiPoseModel, registry
from mtenn_core.testing import CombinationConformance, check_combination

ARGUMENTS = [{}, {"kT": 0.593}, {"kT": 0.01}, {"kT": 0.593, "learnable": True}, {"kT": 100.0}]
RARE = pytest.mark.slow("a gate that is shut by mistake is rare")
SEEDS = [*range(5), *(pytest.param(seed, marks=RARE) for seed in range(5, 100))]


class TestBoltzmann(CombinationConformance):
    combination = BoltzmannCombination
    level = "quality"


@pytest.mark.parametrize("seed", SEEDS)
def test_the_gate_opens_at_every_seed(seed):
    arguments = ARGUMENTS[seed % len(ARGUMENTS)]
    report = check_combination(BoltzmannCombination(**arguments), level="gate", seed=seed)
    assert report.passed, str(report)


def test_it_is_found_by_name():
    assert registry.get("boltzmann") is BoltzmannCombination
    assert registry.info("boltzmann").distribution == "mtenn-boltzmann"


def test_worked_by_hand():
    """Populations 4/5 and 1/5 at y = 0 and kT ln 4: m = kT ln 4 / 5."""
    kT = 0.593
    y = torch.tensor([0.0, kT * math.log(4)], dtype=torch.float64)
    torch.testing.assert_close(BoltzmannCombination().combine(y / kT).item(), math.log(4) / 5)
    combination = BoltzmannCombination(kT)
    mean = kT * math.log(4) / 5
    torch.testing.assert_close(combination.combine(y).item(), mean)
    expected = [0.8 * (1 + mean / kT), 0.2 * (1 + (mean - y[1].item()) / kT)]
    torch.testing.assert_close(combination.pose_weights(y).tolist(), expected)
    assert expected[1] < 0  # more than kT above the mean: raising it further lowers the mean


def test_weights_sum_to_one():
    for kT in (0.1, 1.0, 10.0):
        weights = BoltzmannCombination(kT).pose_weights(torch.randn(9, dtype=torch.float64))
        torch.testing.assert_close(weights.sum().item(), 1.0)


def test_the_limits_are_the_minimum_and_the_mean():
    y = torch.tensor([-7.0, -5.0, -9.0], dtype=torch.float64)
    assert BoltzmannCombination(1e-3).combine(y) == -9
    torch.testing.assert_close(BoltzmannCombination(1e9).combine(y).item(), -7.0)


def test_it_lies_below_the_free_energy_average():
    """By kT (ln M - S) ≥ 0, with S the entropy of the populations."""
    kT = 0.593
    y = torch.randn(6, dtype=torch.float64)
    populations = torch.softmax(-y / kT, 0)
    entropy = -(populations * populations.log()).sum()
    free_energy = -kT * torch.logsumexp(-y / kT, 0) + kT * math.log(6)
    difference = free_energy - BoltzmannCombination(kT).combine(y)
    torch.testing.assert_close(difference, kT * (math.log(6) - entropy))
    assert difference > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kT", [0.01, 0.593, 10.0])
@pytest.mark.parametrize("base", [0.0, 1e4, -1e4])
def test_every_dtype_is_as_good_as_its_last_digit(dtype, kT, base):
    """Against float64 on the same rounded predictions."""
    y = (base + torch.tensor([0.0, 0.25, -0.5, 8.0, -16.0])).to(dtype)
    combination = BoltzmannCombination(kT)
    value, weights = combination.combine(y), combination.pose_weights(y)
    assert value.dtype == weights.dtype == dtype
    # One rounding at the end; float32 adds that of y/kT, whose last digit is 1e-4 at kT = 0.01.
    eps = max(torch.finfo(dtype).eps, 1e-6 if dtype == torch.float32 else 0)
    exact = combination.combine(y.double())
    assert (value - exact).abs() <= eps * exact.abs().clamp(min=1)
    torch.testing.assert_close(
        weights.double(), combination.pose_weights(y.double()), rtol=2 * eps, atol=2 * eps
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_that_of_float32_rounded_once(dtype):
    y = torch.randn(64).to(dtype)
    combination = BoltzmannCombination(0.593)
    assert torch.equal(combination.combine(y), combination.combine(y.float()).to(dtype))
    weights = combination.pose_weights(y.float())
    assert torch.equal(combination.pose_weights(y), weights.to(dtype))


def test_far_poses_in_half_precision_do_not_make_nan():
    y = torch.tensor([-1e4, 1e4], dtype=torch.float16)
    weights = BoltzmannCombination(0.01).pose_weights(y)
    assert weights.tolist() == [1.0, 0.0]


def test_one_pose_gives_its_own_value():
    y = torch.tensor([-7.25])
    assert BoltzmannCombination().combine(y) == y[0]
    assert BoltzmannCombination().pose_weights(y).tolist() == [1.0]


def test_ties_share_the_weight():
    y = torch.full((4,), 2.0, requires_grad=True)
    assert BoltzmannCombination().pose_weights(y.detach()).tolist() == [0.25] * 4
    BoltzmannCombination().combine(y).backward()
    assert y.grad.tolist() == [0.25] * 4


def test_nan_in_gives_nan_out():
    y = torch.tensor([1.0, torch.nan, 2.0])
    assert BoltzmannCombination().combine(y).isnan()
    assert BoltzmannCombination().pose_weights(y).isnan().any()


# 1e-320 is positive, and 1/1e-320 is inf.
@pytest.mark.parametrize("kT", [0.0, -0.6, math.inf, math.nan, 1e-320])
def test_a_temperature_that_is_not_positive_and_finite_is_refused(kT):
    message = f"kT and 1/kT must be positive and finite; found kT = {kT}$"
    with pytest.raises(ValueError, match=message):
        BoltzmannCombination(kT)


@pytest.mark.parametrize("kT", ["a", "1", None, True, 10**400])
def test_a_temperature_that_is_no_number_is_refused(kT):
    message = f"^kT and 1/kT must be positive and finite; found kT = {kT!r}$"
    with pytest.raises(ValueError, match=message):
        BoltzmannCombination(kT)


@pytest.mark.parametrize("learnable", ["no", 1, None])
def test_learnable_is_true_or_false(learnable):
    message = f"^learnable must be True or False; found learnable = {learnable!r}$"
    with pytest.raises(ValueError, match=message):
        BoltzmannCombination(learnable=learnable)


@pytest.mark.parametrize("kT", [2, np.int64(2), np.float32(2), torch.tensor(2.0)], ids=repr)
def test_a_number_of_any_kind_is_a_temperature(kT):
    assert BoltzmannCombination(kT).kT == 2


FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
LEARNABLE = pytest.mark.parametrize("learnable", [False, True], ids=["fixed", "learnable"])


def results(combination, y):
    """Return the value, the closed form, autograd's weights, and the gradient of ln kT (or 0)."""
    y = y.clone().requires_grad_()
    value = combination.combine(y)
    by_autograd, *of_log_kT = torch.autograd.grad(value, [y, *combination.parameters()])
    log_kT_gradient = of_log_kT[0].item() if of_log_kT else 0.0
    return value.detach(), combination.pose_weights(y.detach()), by_autograd, log_kT_gradient


@FLOATS
@LEARNABLE
@pytest.mark.parametrize("kT", [0.593, 1e-3, 100.0])
@pytest.mark.parametrize("failed", ["mark", "largest", "inf"])
def test_a_failed_pose_counts_as_absent(dtype, learnable, kT, failed):
    largest = torch.finfo(dtype).max
    mark = {"mark": largest / 3, "largest": largest, "inf": math.inf}[failed]
    y = torch.tensor([mark, -8.0, -7.4, mark, -6.1], dtype=dtype)
    there = torch.tensor([1, 2, 4])
    combination = BoltzmannCombination(kT, learnable)
    value, weights, by_autograd, log_kT_gradient = results(combination, y)
    expected = results(combination, y[there])
    assert weights[[0, 3]].tolist() == by_autograd[[0, 3]].tolist() == [0, 0]
    # The sums have more terms, which are 0. Their order may differ.
    few = 8 * torch.finfo(dtype).eps
    found = (value, weights[there], by_autograd[there])
    torch.testing.assert_close(found, expected[:3], rtol=few, atol=few)
    assert log_kT_gradient == pytest.approx(expected[3], rel=few, abs=few)


@LEARNABLE
def test_a_failed_pose_has_no_second_derivative(learnable):
    y = torch.tensor([-8.0, -7.4, 1e300, math.inf], dtype=torch.float64)
    combination = BoltzmannCombination(0.593, learnable)
    found = torch.autograd.functional.hessian(combination.combine, y)
    expected = torch.zeros_like(found)
    expected[:2, :2] = torch.autograd.functional.hessian(combination.combine, y[:2])
    torch.testing.assert_close(found, expected)


@FLOATS
@LEARNABLE
def test_a_difference_that_overflows_counts_as_infinite(dtype, learnable):
    largest = torch.finfo(dtype).max
    y = torch.tensor([largest, -largest], dtype=dtype)
    value, weights, by_autograd, log_kT_gradient = results(BoltzmannCombination(1, learnable), y)
    assert value == -largest
    assert weights.tolist() == by_autograd.tolist() == [0, 1]
    assert log_kT_gradient == 0


INFINITE = {
    "all +inf": ([math.inf, math.inf], math.inf, [0.5, 0.5]),
    "one -inf": ([1.0, -math.inf, math.inf, 2.0], -math.inf, [0, 1, 0, 0]),
    "two -inf": ([-math.inf, 1.0, -math.inf], -math.inf, [0.5, 0, 0.5]),
    "one pose": ([math.inf], math.inf, [1]),
}


@FLOATS
@LEARNABLE
@pytest.mark.parametrize("kT", [0.593, 1e-3])
@pytest.mark.parametrize("case", INFINITE.values(), ids=INFINITE)
def test_poses_at_an_infinite_minimum_share_the_weight(case, kT, dtype, learnable):
    y, value, weights = case
    found = results(BoltzmannCombination(kT, learnable), torch.tensor(y, dtype=dtype))
    assert found[0] == value
    assert found[1].tolist() == found[2].tolist() == weights
    assert found[3] == 0


@LEARNABLE
@pytest.mark.parametrize("other", [math.inf, -math.inf, 2.0])
def test_with_a_nan_all_is_nan(other, learnable):
    y = torch.tensor([math.nan, other, 1.0])
    value, weights, by_autograd, _ = results(BoltzmannCombination(1, learnable), y)
    for found in (value, weights, by_autograd):
        assert found.isnan().all()


def at_log_kT(log_kT):
    combination = BoltzmannCombination(learnable=True)
    with torch.no_grad():
        combination.log_kT.fill_(log_kT)
    return combination


COLD = {
    "ln kT = -50": lambda: at_log_kT(-50.0),
    "ln kT = -1000": lambda: at_log_kT(-1000.0),
    "kT = 1e-50": lambda: BoltzmannCombination(1e-50),
    "kT = 1e-308": lambda: BoltzmannCombination(1e-308),
}
HOT = {
    "ln kT = 89": lambda: at_log_kT(89.0),
    "ln kT = 1000": lambda: at_log_kT(1000.0),
    "kT = 1e39": lambda: BoltzmannCombination(1e39),
    "kT = 1e308": lambda: BoltzmannCombination(1e308),
}


@FLOATS
@pytest.mark.parametrize("made", COLD.values(), ids=COLD)
def test_a_vanishing_temperature_gives_the_minimum(made, dtype):
    y = torch.tensor([3.0, -9.0, -5.0, -9.0], dtype=dtype)
    value, weights, by_autograd, log_kT_gradient = results(made(), y)
    assert value == -9
    assert weights.tolist() == by_autograd.tolist() == [0, 0.5, 0, 0.5]
    assert log_kT_gradient == 0


@FLOATS
@pytest.mark.parametrize("made", HOT.values(), ids=HOT)
def test_an_infinite_temperature_gives_the_mean(made, dtype):
    y = torch.tensor([3.0, -9.0, -5.0, -9.0], dtype=dtype)
    value, weights, by_autograd, log_kT_gradient = results(made(), y)
    assert value == -5
    assert weights.tolist() == by_autograd.tolist() == [0.25] * 4
    assert log_kT_gradient == pytest.approx(0, abs=1e-30)  # Var/kT, with kT of 1.7e35 at least


@pytest.mark.parametrize("log_kT", [82.0, 89.0, 1000.0])
def test_a_hot_learned_temperature_takes_the_largest_numbers(log_kT):
    """The exponential of the largest ln kT is rounded up in float32."""
    for y, value in (([3e38, -3e38], -3e38), ([math.inf, -math.inf, 0.0], -math.inf)):
        found = results(at_log_kT(log_kT), torch.tensor(y))
        assert found[0] == torch.tensor(value)
        assert all(torch.as_tensor(part).isfinite().all() for part in found[1:])


@LEARNABLE
@pytest.mark.parametrize("kT", [1e-30, 1e-10, 1e10, 1e30])
def test_a_temperature_within_the_range_only_sets_the_unit(kT, learnable):
    """y = (0, kT ln 4), as worked by hand. The derivative with respect to ln kT is Var/kT."""
    y = torch.tensor([0.0, kT * math.log(4)])
    value, weights, by_autograd, gradient = results(BoltzmannCombination(kT, learnable), y)
    mean, top = math.log(4) / 5, 0.2 * (1 - 0.8 * math.log(4))
    # float32 holds ln kT to 4e-6, and that is the relative error of kT.
    assert value / kT == pytest.approx(mean, rel=1e-5)
    for found in (weights, by_autograd):
        torch.testing.assert_close(found, torch.tensor([1 - top, top]), rtol=1e-5, atol=1e-5)
    if learnable:
        assert gradient / kT == pytest.approx(0.16 * math.log(4) ** 2, rel=1e-5)


def test_a_float32_temperature_is_computed_in_the_dtype_of_the_predictions():
    kT = math.exp(89)  # inf in float32
    y = torch.tensor([0.0, kT * math.log(4)], dtype=torch.float64)
    value = at_log_kT(89.0).combine(y)
    torch.testing.assert_close(value.item() / kT, math.log(4) / 5, rtol=1e-12, atol=0)


@pytest.mark.parametrize("gradients", ["graph", "stored"])
def test_a_learnable_temperature_trains_with_the_model(gradients):
    torch.manual_seed(0)
    pose_model = torch.nn.Linear(4, 1).double()
    poses = torch.randn(6, 4, dtype=torch.float64)
    model = MultiPoseModel(
        pose_model,
        registry.create("boltzmann", kT=0.593, learnable=True).double(),
        gradients=gradients,
    )
    model(poses).prediction.square().backward()
    log_kT = model.combination.log_kT
    y = pose_model(poses)[:, 0].detach()

    def loss(log_kT):
        return (torch.softmax(-y / log_kT.exp(), 0) * y).sum().square()

    step = 1e-6
    numerical = (loss(log_kT.detach() + step) - loss(log_kT.detach() - step)) / (2 * step)
    # Central differences with step h are off by h² and by the roundoff over h, about 1e-10 each.
    torch.testing.assert_close(log_kT.grad[0], numerical, rtol=1e-7, atol=0)
    before = log_kT.item()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    assert log_kT.item() != before


def test_a_fixed_temperature_is_no_parameter():
    assert list(BoltzmannCombination(0.593).parameters()) == []
    assert BoltzmannCombination(0.593).kT == 0.593


def test_arguments_show_and_survive_copies():
    for learnable in (False, True):
        combination = BoltzmannCombination(0.593, learnable=learnable)
        pickled = pickle.loads(pickle.dumps(combination))
        for twin in (combination, copy.deepcopy(combination), pickled):
            assert repr(twin) == f"BoltzmannCombination(kT=0.593, learnable={learnable})"


def test_a_learned_temperature_shows_as_it_is_now():
    combination = BoltzmannCombination(1.0, learnable=True)
    with torch.no_grad():
        combination.log_kT.fill_(math.log(0.5))
    assert repr(combination) == "BoltzmannCombination(kT=0.5, learnable=True)"


def test_a_learned_temperature_is_in_the_checkpoint():
    trained = BoltzmannCombination(0.25, learnable=True)
    fresh = BoltzmannCombination(1.0, learnable=True)
    fresh.load_state_dict(trained.state_dict())
    torch.testing.assert_close(fresh.kT.item(), 0.25)
