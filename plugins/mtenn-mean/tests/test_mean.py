import math

import pytest
import torch
from mtenn_mean import MeanCombination

from mtenn_core import MultiPoseModel, registry
from mtenn_core.testing import CombinationConformance, check_combination

RARE = pytest.mark.slow("a gate that is shut by mistake is rare")
SEEDS = [*range(5), *(pytest.param(seed, marks=RARE) for seed in range(5, 100))]


class TestMean(CombinationConformance):
    combination = MeanCombination
    level = "quality"


@pytest.mark.parametrize("seed", SEEDS)
def test_the_gate_opens_at_every_seed(seed):
    report = check_combination(MeanCombination, level="gate", seed=seed)
    assert report.passed, str(report)


def test_it_is_found_by_name():
    assert registry.get("mean") is MeanCombination
    assert registry.info("mean").distribution == "mtenn-mean"


def test_worked_by_hand():
    y = torch.tensor([-7.0, -5.0, -9.0])
    assert MeanCombination().combine(y) == -7
    torch.testing.assert_close(MeanCombination().pose_weights(y), torch.full((3,), 1 / 3))


def test_one_pose_gives_its_own_value():
    y = torch.tensor([-7.25])
    assert MeanCombination().combine(y) == y[0]
    assert MeanCombination().pose_weights(y).tolist() == [1.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_large_predictions_keep_their_dtype_and_their_digits(dtype):
    y = torch.tensor([1e4, 9984.0, 1.0e4, 9984.0]).to(dtype)
    value, weights = MeanCombination().combine(y), MeanCombination().pose_weights(y)
    assert value.dtype == weights.dtype == dtype
    exact = y.double().mean()
    assert (value - exact).abs() <= torch.finfo(dtype).eps * exact.abs()
    assert (weights == 0.25).all()


@pytest.mark.parametrize("n_poses", [3, 7, 11, 49])
def test_the_mean_of_whole_numbers_is_exact(n_poses):
    y = torch.arange(1.0, n_poses + 1)
    assert MeanCombination().combine(y) == (n_poses + 1) / 2


LARGE = {  # in units of the largest number
    "the sum overflows": ([1.0, 0.5], 0.75),
    "partial sums overflow": ([1.0] * 16 + [-1.0] * 16, 0.0),
    "one infinite": ([math.inf, 1.0, 1.0], math.inf),
    "opposite infinities": ([math.inf, -math.inf], math.nan),
    "NaN": ([math.nan, 1.0, 1.0], math.nan),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", LARGE.values(), ids=LARGE)
def test_the_mean_of_large_predictions_does_not_overflow(case, dtype):
    y, expected = case
    largest = torch.finfo(dtype).max
    y = (torch.tensor(y, dtype=dtype) * largest).requires_grad_()
    value = MeanCombination().combine(y)
    expected = torch.tensor(expected, dtype=dtype) * largest
    # Each of up to 32 terms of up to 1/32 of the largest number is rounded once.
    torch.testing.assert_close(
        value, expected, rtol=0, atol=torch.finfo(dtype).eps * largest, equal_nan=True
    )
    value.backward()
    torch.testing.assert_close(y.grad, MeanCombination().pose_weights(y.detach()))


@pytest.mark.parametrize("gradients", ["graph", "stored"])
def test_training_equals_plain_autograd(gradients):
    torch.manual_seed(0)
    pose_model = torch.nn.Linear(4, 1).double()
    poses = torch.randn(6, 4, dtype=torch.float64)
    pose_model(poses).mean().square().backward()
    expected = pose_model.weight.grad.clone()
    pose_model.zero_grad()
    model = MultiPoseModel(pose_model, "mean", gradients=gradients)
    model(poses).prediction.square().backward()
    torch.testing.assert_close(pose_model.weight.grad, expected, rtol=1e-12, atol=0)
