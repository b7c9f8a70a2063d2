import copy
import math
import pickle

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


@pytest.mark.parametrize("kT", [0.0, -0.6, math.inf, math.nan])
def test_a_temperature_that_is_not_positive_and_finite_is_refused(kT):
    with pytest.raises(ValueError, match=f"kT must be positive and finite; found {kT}"):
        BoltzmannCombination(kT)


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
