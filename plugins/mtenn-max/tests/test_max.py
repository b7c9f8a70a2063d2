import copy
import math
import pickle

import pytest
import torch
from mtenn_max import MaxCombination, MinCombination

from mtenn_core import registry
from mtenn_core.testing import CombinationConformance, check_combination

ARGUMENTS = [
    {},
    {"normalize": True},
    {"pred_scale": 10.0},
    {"pred_scale": 1 / 0.593, "normalize": True},
    {"pred_scale": 1000.0},
]
RARE = pytest.mark.slow("a gate that is shut by mistake is rare")
SEEDS = [*range(5), *(pytest.param(seed, marks=RARE) for seed in range(5, 100))]
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64]
)


class TestMax(CombinationConformance):
    combination = MaxCombination


class TestMin(CombinationConformance):
    combination = MinCombination


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("cls", [MaxCombination, MinCombination])
def test_the_gate_opens_at_every_seed(cls, seed):
    arguments = ARGUMENTS[seed % len(ARGUMENTS)]
    report = check_combination(cls(**arguments), level="gate", seed=seed)
    assert report.passed, str(report)


@pytest.mark.parametrize(("name", "cls"), [("max", MaxCombination), ("min", MinCombination)])
def test_they_are_found_by_name(name, cls):
    assert registry.get(name) is cls
    assert registry.info(name).distribution == "mtenn-max"


def test_worked_by_hand():
    """Σ exp(ln 1, ln 2, ln 5) = 8."""
    y = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64).log()
    combination = MaxCombination()
    torch.testing.assert_close(combination.combine(y).item(), math.log(8))
    torch.testing.assert_close(combination.pose_weights(y), torch.tensor([1, 2, 5]).double() / 8)
    normalized = MaxCombination(normalize=True)
    torch.testing.assert_close(normalized.combine(y).item(), math.log(8 / 3))
    torch.testing.assert_close(normalized.pose_weights(y), combination.pose_weights(y))
    half = MaxCombination(pred_scale=2.0)  # Σ exp(2 y) = 30
    torch.testing.assert_close(half.combine(y).item(), math.log(30) / 2)
    torch.testing.assert_close(MinCombination().combine(-y).item(), -math.log(8))


def test_the_minimum_is_the_mirrored_maximum():
    y = torch.randn(5, dtype=torch.float64)
    low, high = MinCombination(pred_scale=3.0), MaxCombination(pred_scale=3.0)
    assert low.combine(y) == -high.combine(-y)
    assert torch.equal(low.pose_weights(y), high.pose_weights(-y))
    mirrored = MaxCombination(negate_preds=True, pred_scale=3.0)
    assert mirrored.combine(y) == low.combine(y)


def test_the_normalized_minimum_is_the_free_energy_average():
    kT = 0.593
    y = torch.randn(5, dtype=torch.float64)
    found = MinCombination(pred_scale=1 / kT, normalize=True).combine(y)
    torch.testing.assert_close(found, -kT * (-y / kT).exp().mean().log())


@pytest.mark.parametrize("cls", [MaxCombination, MinCombination])
@pytest.mark.parametrize("n_poses", [1, 2, 10])
def test_equal_poses_give_their_value_if_normalized_and_ln_m_more_if_not(cls, n_poses):
    y = torch.full((n_poses,), -7.5, dtype=torch.float64)
    sign = 1 if cls is MaxCombination else -1
    shift = sign * math.log(n_poses) / 2.0
    torch.testing.assert_close(
        cls(2.0, normalize=True).combine(y)
        if cls is MinCombination
        else cls(pred_scale=2.0, normalize=True).combine(y),
        y[0],
    )
    torch.testing.assert_close(cls(pred_scale=2.0).combine(y).item(), -7.5 + shift)


def test_sharp_scales_give_the_hard_extreme():
    y = torch.tensor([-7.0, -5.0, -9.0], dtype=torch.float64)
    assert MaxCombination(pred_scale=1000.0).combine(y) == -5
    assert MinCombination(pred_scale=1000.0).combine(y) == -9
    assert MinCombination(pred_scale=1000.0).pose_weights(y).tolist() == [0, 0, 1]


@pytest.mark.parametrize("cls", [MaxCombination, MinCombination])
def test_small_scales_give_the_mean_if_normalized(cls):
    """To the last digit of float32, of which logsumexp less ln M would have lost six."""
    y = torch.tensor([-7.0, -5.0, -9.0])
    value = cls(pred_scale=1e-7, normalize=True).combine(y)
    torch.testing.assert_close(value.item(), -7.0, rtol=1e-6, atol=0)


@DTYPES
@pytest.mark.parametrize("scale", [1.0, 10.0, 1000.0])
@pytest.mark.parametrize("cls", [MaxCombination, MinCombination])
@pytest.mark.parametrize("base", [0.0, 1e4, -1e4])
def test_every_dtype_is_as_good_as_its_last_digit(dtype, scale, cls, base):
    """Against float64 on the same rounded predictions."""
    y = (base + torch.tensor([0.0, 0.25, -0.5, 8.0, -16.0])).to(dtype)
    combination = cls(pred_scale=scale)
    value, weights = combination.combine(y), combination.pose_weights(y)
    assert value.dtype == weights.dtype == dtype
    # One rounding at the end; float32 adds that of the exponent, at most 24 * 1000 ulp deep.
    eps = max(torch.finfo(dtype).eps, 1e-6 if dtype == torch.float32 else 0)
    exact = combination.combine(y.double())
    assert (value - exact).abs() <= eps * exact.abs().clamp(min=1)
    torch.testing.assert_close(
        weights.double(), combination.pose_weights(y.double()), rtol=0, atol=2 * eps
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cls", [MaxCombination, MinCombination])
def test_half_precision_is_that_of_float32_rounded_once(cls, dtype):
    y = torch.randn(64).to(dtype)
    combination = cls(pred_scale=3.0)
    assert torch.equal(combination.combine(y), combination.combine(y.float()).to(dtype))
    weights = combination.pose_weights(y.float())
    assert torch.equal(combination.pose_weights(y), weights.to(dtype))


@pytest.mark.parametrize("cls", [MaxCombination, MinCombination])
def test_one_pose_gives_its_own_value(cls):
    y = torch.tensor([-7.25])
    assert cls(pred_scale=1000.0).combine(y) == y[0]
    assert cls().pose_weights(y).tolist() == [1.0]


@pytest.mark.parametrize("cls", [MaxCombination, MinCombination])
def test_ties_share_the_weight(cls):
    y = torch.tensor([2.0, 2.0, 2.0, 2.0], requires_grad=True)
    assert cls().pose_weights(y.detach()).tolist() == [0.25] * 4
    cls().combine(y).backward()
    assert y.grad.tolist() == [0.25] * 4


@pytest.mark.parametrize("cls", [MaxCombination, MinCombination])
def test_nan_in_gives_nan_out(cls):
    y = torch.tensor([1.0, torch.nan, 2.0])
    assert cls().combine(y).isnan()
    assert cls().pose_weights(y).isnan().any()


@pytest.mark.parametrize("cls", [MaxCombination, MinCombination])
@pytest.mark.parametrize("scale", [0.0, -5.0, math.inf, math.nan])
def test_a_scale_that_is_not_positive_and_finite_is_refused(cls, scale):
    with pytest.raises(ValueError, match=f"pred_scale must be positive and finite; found {scale}"):
        cls(pred_scale=scale)


def test_arguments_show_and_survive_copies():
    combination = MinCombination(pred_scale=2.0, normalize=True)
    text = "MinCombination(pred_scale=2.0, normalize=True)"
    for twin in (combination, copy.deepcopy(combination), pickle.loads(pickle.dumps(combination))):
        assert repr(twin) == text
