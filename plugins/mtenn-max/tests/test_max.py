import copy
import math
import pickle

import numpy as np
import pytest
import torch
from mtenn_max import MaxCombination, MinCombination, exp_beyond_line, log_mean_exp

from mtenn_core import MultiPoseModel, registry
from mtenn_core.errors import CheckpointError
from mtenn_core.testing import CombinationConformance, check_combination

ARGUMENTS = [
    {},
    {"normalize": True},
    {"pred_scale": 10.0},
    {"pred_scale": 1 / 0.593, "normalize": True},
    {"pred_scale": 1000.0},
    {"pred_scale": 0.593, "learnable": True},
    {"pred_scale": 1 / 0.593, "normalize": True, "learnable": True},
]
RARE = pytest.mark.slow("a gate that is shut by mistake is rare")
SEEDS = [*range(5), *(pytest.param(seed, marks=RARE) for seed in range(5, 100))]
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64]
)


class TestMax(CombinationConformance):
    combination = MaxCombination
    level = "quality"


class TestMin(CombinationConformance):
    combination = MinCombination
    level = "quality"


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
# 1e-320 is positive, and 1/1e-320 is inf.
@pytest.mark.parametrize("scale", [0.0, -5.0, math.inf, math.nan, 1e-320])
def test_a_scale_that_is_not_positive_and_finite_is_refused(cls, scale):
    message = (
        f"pred_scale and 1/pred_scale must be positive and finite; found pred_scale = {scale}$"
    )
    with pytest.raises(ValueError, match=message):
        cls(pred_scale=scale)


@pytest.mark.parametrize("cls", [MaxCombination, MinCombination])
@pytest.mark.parametrize("scale", ["a", "1", None, True, 10**400])
def test_a_scale_that_is_no_number_is_refused(cls, scale):
    message = f"^pred_scale and 1/pred_scale must be .*; found pred_scale = {scale!r}$"
    with pytest.raises(ValueError, match=message):
        cls(pred_scale=scale)


@pytest.mark.parametrize("value", ["no", 1, None])
@pytest.mark.parametrize("name", ["negate_preds", "normalize", "learnable"])
def test_a_flag_is_true_or_false(name, value):
    message = f"^{name} must be True or False; found {name} = {value!r}$"
    with pytest.raises(ValueError, match=message):
        MaxCombination(**{name: value})


@pytest.mark.parametrize("scale", [2, np.int64(2), np.float32(2), torch.tensor(2.0)], ids=repr)
def test_a_number_of_any_kind_is_a_scale(scale):
    assert MaxCombination(pred_scale=scale).pred_scale == 2


FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
NORMALIZE = pytest.mark.parametrize("normalize", [False, True], ids=["sum", "normalized"])


def results(combination, y):
    """Return the value, the closed form and autograd's weights."""
    y = y.clone().requires_grad_()
    value = combination.combine(y)
    (by_autograd,) = torch.autograd.grad(value, y)
    return value.detach(), combination.pose_weights(y.detach()), by_autograd


@FLOATS
@NORMALIZE
@pytest.mark.parametrize("failed", ["mark", "largest", "inf"])
def test_a_failed_pose_has_no_weight_in_the_minimum(dtype, normalize, failed):
    largest = torch.finfo(dtype).max
    mark = {"mark": largest / 3, "largest": largest, "inf": math.inf}[failed]
    y = torch.tensor([mark, -8.0, -7.4, mark, -6.1], dtype=dtype)
    there = torch.tensor([1, 2, 4])
    value, weights, by_autograd = results(MinCombination(2.0, normalize), y)
    expected = results(MinCombination(2.0, normalize), y[there])
    # A mean over five poses, of which two add nothing, and not over three.
    more = math.log(5 / 3) / 2 if normalize else 0
    few = 8 * torch.finfo(dtype).eps  # the sums have more terms, in another order
    torch.testing.assert_close(value, expected[0] + more, rtol=few, atol=0)
    for found in (weights, by_autograd):
        assert found[[0, 3]].tolist() == [0, 0]
        torch.testing.assert_close(found[there], expected[1], rtol=few, atol=few)


@NORMALIZE
def test_a_failed_pose_has_no_second_derivative(normalize):
    y = torch.tensor([-8.0, -7.4, 1e300, math.inf], dtype=torch.float64)
    combine = MinCombination(2.0, normalize).combine
    found = torch.autograd.functional.hessian(combine, y)
    expected = torch.zeros_like(found)
    expected[:2, :2] = torch.autograd.functional.hessian(combine, y[:2])
    torch.testing.assert_close(found, expected)


INFINITE = {  # for the maximum
    "all -inf": ([-math.inf, -math.inf], -math.inf, [0.5, 0.5]),
    "one +inf": ([1.0, math.inf, -math.inf, 2.0], math.inf, [0, 1, 0, 0]),
    "two +inf": ([math.inf, 1.0, math.inf], math.inf, [0.5, 0, 0.5]),
    "one pose": ([math.inf], math.inf, [1]),
}


@FLOATS
@NORMALIZE
@pytest.mark.parametrize("case", INFINITE.values(), ids=INFINITE)
def test_poses_at_an_infinite_extreme_share_the_weight(case, dtype, normalize):
    y, value, weights = case
    y = torch.tensor(y, dtype=dtype)
    high = MaxCombination(pred_scale=2.0, normalize=normalize)
    low = MinCombination(pred_scale=2.0, normalize=normalize)
    for found, expected in ((results(high, y), value), (results(low, -y), -value)):
        assert found[0] == expected
        assert found[1].tolist() == found[2].tolist() == weights


@FLOATS
@NORMALIZE
def test_the_largest_numbers_have_a_derivative(dtype, normalize):
    largest = torch.finfo(dtype).max
    y = torch.tensor([largest, -largest, largest], dtype=dtype)
    value, weights, by_autograd = results(MaxCombination(normalize=normalize), y)
    assert value == largest
    assert weights.tolist() == [0.5, 0, 0.5]
    # Normalized, autograd divides the exponentials by 3 and multiplies by 3/2.
    torch.testing.assert_close(by_autograd, weights, rtol=torch.finfo(dtype).eps, atol=0)


@NORMALIZE
@pytest.mark.parametrize("learnable", [False, True], ids=["fixed", "learnable"])
@pytest.mark.parametrize("cls", [MaxCombination, MinCombination])
@pytest.mark.parametrize("other", [math.inf, -math.inf, 2.0])
def test_with_a_nan_all_is_nan(cls, other, learnable, normalize):
    y = torch.tensor([math.nan, other, 1.0])
    combination = cls(normalize=normalize, learnable=learnable)
    for found in results(combination, y):
        assert found.isnan().all()


@FLOATS
@NORMALIZE
@pytest.mark.parametrize("scale", [1e30, 1e39, 1e308])
def test_a_scale_that_overflows_gives_the_hard_extreme(scale, dtype, normalize):
    y = torch.tensor([3.0, -9.0, -5.0, -9.0], dtype=dtype)
    value, *weights = results(MinCombination(scale, normalize), y)
    assert value == -9
    # Autograd divides by the scale and multiplies by it, with a rounding each.
    for found in weights:
        torch.testing.assert_close(found.tolist(), [0.0, 0.5, 0.0, 0.5], rtol=3e-7, atol=0)


@FLOATS
@pytest.mark.parametrize("scale", [1e-30, 1e-37, 1e-45, 1e-50, 1e-300, 1e-308])
@pytest.mark.parametrize("cls", [MaxCombination, MinCombination])
def test_a_scale_that_underflows_gives_the_mean_if_normalized(cls, scale, dtype):
    y = torch.tensor([3.0, -9.0, -5.0, -9.0], dtype=dtype)
    value, *weights = results(cls(pred_scale=scale, normalize=True), y)
    # A few roundings of float32.
    torch.testing.assert_close(value.item(), -5.0, rtol=1e-6, atol=0)
    for found in weights:
        torch.testing.assert_close(found.tolist(), [0.25] * 4, rtol=1e-6, atol=0)


@FLOATS
@NORMALIZE
@pytest.mark.parametrize("scale", [1e-30, 1e-45, 1e-308])
def test_an_infinite_pose_has_no_weight_at_a_scale_that_underflows(scale, dtype, normalize):
    y = torch.tensor([-9.0, math.inf], dtype=dtype)
    _, *weights = results(MinCombination(scale, normalize), y)
    for found in weights:  # by autograd, with a few roundings of float32
        torch.testing.assert_close(found.tolist(), [1.0, 0.0], rtol=1e-6, atol=0)


@FLOATS
@pytest.mark.parametrize("scale", [1e-30, 1e-45, 1e-308])
def test_one_pose_gives_its_own_value_at_a_scale_that_underflows(scale, dtype):
    y = torch.tensor([-7.25], dtype=dtype)
    assert results(MaxCombination(pred_scale=scale), y) == (y[0], 1, 1)


SHAPES = {
    "one dominates": lambda n: torch.where(torch.arange(n) == n // 2, 0.0, -1.0),
    "one falls behind": lambda n: torch.where(torch.arange(n) == n // 2, -1.0, 0.0),
    "evenly spread": lambda n: torch.linspace(-1.0, 0.0, n),
}
SPREADS = (1e-6, 1e-3, 0.1, 0.6, 0.8, 3.0, 10.0, 30.0, 100.0, 1000.0)
MANY = pytest.param(
    10_000_000,
    (1e-6, 0.6, 1000.0),
    marks=pytest.mark.slow("ten million poses take seconds"),
    id="10M",
)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
    ("n_poses", "spreads"),
    [*(pytest.param(n, SPREADS, id=str(n)) for n in (1, 2, 10, 1000, 100_000)), MANY],
)
def test_the_normalized_value_keeps_its_digits(n_poses, spreads, shape):
    """Against log-sum-exp less ln M in float64. A spread is that of t y."""
    scale = 3.0
    combination = MaxCombination(pred_scale=scale, normalize=True)
    for spread in spreads:
        for base in (0.0, -8.0):
            y = base + shape(n_poses) * (spread / scale)
            extreme = y.amax().double()
            log_sum_exp = torch.logsumexp(scale * (y.double() - extreme), dim=0)
            distance = (log_sum_exp - math.log(n_poses)) / scale
            error = (combination.combine(y).double() - extreme - distance).abs()
            # The distance from the extreme is right to a few eps, and the sum is rounded once.
            bound = torch.finfo(torch.float32).eps * (
                8 * distance.abs() + (extreme + distance).abs()
            )
            # The reference loses the digits of ln M in float64.
            bound += 4 * torch.finfo(torch.float64).eps * (1 + math.log(n_poses))
            assert error <= bound, (spread, base)


def test_autograd_of_the_log_mean_exp_is_finite_where_the_mean_rounds_to_minus_one():
    """In bfloat16, a thousand poses are as many as 100 million in float32."""
    exponents = torch.full((1000,), -200.0, dtype=torch.bfloat16)
    exponents[3] = 0
    assert exponents.expm1().mean() == -1
    exponents.requires_grad_()
    log_mean_exp(exponents).backward()
    assert exponents.grad.nonzero().tolist() == [[3]]
    # 1/M and M are rounded once each, to 8 digits.
    torch.testing.assert_close(exponents.grad[3].item(), 1.0, rtol=2**-7, atol=0)


@pytest.mark.parametrize("cls", [MaxCombination, MinCombination])
@pytest.mark.parametrize("below", [0.0, 0.5, 1.3, 1.5, 40.0])  # a is 1/2 between 1.3 and 1.5
def test_the_normalized_value_has_its_derivative_in_both_formulas(cls, below):
    combination = cls(pred_scale=1.0, normalize=True)
    sign = 1 if cls is MaxCombination else -1
    y = sign * (torch.tensor([0.0, -1.0, -1.0, -0.9], dtype=torch.float64) * below - 8)
    weights, by_autograd = results(combination, y)[1:]
    torch.testing.assert_close(by_autograd, weights, rtol=1e-14, atol=1e-16)
    step = 1e-5
    by_differences = [
        (combination.combine(y + step * axis) - combination.combine(y - step * axis)) / (2 * step)
        for axis in torch.eye(4, dtype=torch.float64)
    ]
    # The step squared, and the roundoff of 8 over the step, are about 1e-10.
    torch.testing.assert_close(torch.stack(by_differences), weights, rtol=0, atol=1e-9)


CLASSES = pytest.mark.parametrize("cls", [MaxCombination, MinCombination])
LEARNED = {
    "two poses": [0.0, 1.0986],
    "spread": [-8.0, -7.4, -6.1, -5.0, 3.0],
    "ties": [2.0, 2.0, 1.5],
    "equal": [2.0, 2.0],
    "one pose": [-7.25],
}


def learned(cls, log_scale, normalize):
    """Return a combination with learnable ln t, set to a value that no start gives in float32."""
    combination = cls(normalize=normalize, learnable=True).double()
    with torch.no_grad():
        combination.log_pred_scale.fill_(log_scale)
    return combination


def log_scale_gradient(combination, y):
    (gradient,) = torch.autograd.grad(combination.combine(y), combination.log_pred_scale)
    return gradient.item()


def exact_log_scale_gradient(cls, log_scale, normalize, y):
    """Return the derivative in float64, as n/t times a sum of terms that do not cancel.

    Σ p y - h is -n/t times the entropy of p. With ``normalize``, it is n/t times
    Σ p ln(M p) = mean(φ(ln(M p))) with φ(d) = d exp(d) - exp(d) + 1, which is never negative.
    """
    n = 1 if cls is MaxCombination else -1
    t = math.exp(log_scale)
    x = n * t * (y.double() - (y.amax() if n == 1 else y.amin()).double())
    if not normalize:
        log_p = torch.log_softmax(x, dim=0)
        return n / t * (-(-log_p * log_p.exp()).sum()).item()
    d = x - x.exp().mean().log() if t * (y.amax() - y.amin()) > 1e-3 else x - x.mean()
    phi = torch.where(d.abs() < 1e-3, d**2 / 2 + d**3 / 3 + d**4 / 8, d * d.exp() - d.expm1())
    return n / t * phi.mean().item()


@CLASSES
@NORMALIZE
@pytest.mark.parametrize("log_scale", [-3.0, -0.3, 0.0, 1.1, 3.0])
@pytest.mark.parametrize("y", LEARNED.values(), ids=LEARNED)
def test_the_derivative_of_ln_t_is_the_mean_prediction_less_the_value(y, log_scale, normalize, cls):
    """Closed form, autograd and finite differences: ∂h/∂ ln t = Σ p y - h, normalized or not."""
    y = torch.tensor(y, dtype=torch.float64)
    combination = learned(cls, log_scale, normalize)
    value, weights = combination.combine(y), combination.pose_weights(y)
    closed_form = ((weights * y).sum() - value).item()
    found = log_scale_gradient(combination, y)
    # Roundoff of the value, which is at most ln 2 / exp(-3) = 14 and cancels.
    assert found == pytest.approx(closed_form, rel=0, abs=1e-13)
    step = 1e-4
    above, below = (
        learned(cls, log_scale + by, normalize).combine(y).item() for by in (step, -step)
    )
    # The step squared times the third derivative, which is like the value, and roundoff / step.
    assert found == pytest.approx((above - below) / (2 * step), rel=1e-6, abs=1e-6)


@CLASSES
def test_a_learned_scale_at_two_equal_poses_worked_by_hand(cls):
    """h = y + n ln 2 / t, and its derivative with respect to ln t is -n ln 2 / t."""
    n = 1 if cls is MaxCombination else -1
    y = torch.full((2,), -7.5, dtype=torch.float64)
    found = log_scale_gradient(learned(cls, math.log(2), False), y)
    assert found == pytest.approx(-n * math.log(2) / 2, rel=1e-15)
    assert log_scale_gradient(learned(cls, math.log(2), True), y) == 0


@CLASSES
@NORMALIZE
def test_a_learned_scale_gives_the_values_and_weights_of_a_fixed_one(cls, normalize):
    for log_scale in (-12.0, -1.0, 0.0, 2.0, 7.0):
        y = torch.linspace(-8, -3, 7, dtype=torch.float64)
        fixed = cls(pred_scale=math.exp(log_scale), normalize=normalize)
        found = results(learned(cls, log_scale, normalize), y)
        # exp of ln t rounds t, and the shift is by the mean. Both cost a few roundings.
        torch.testing.assert_close(found, results(fixed, y), rtol=1e-14, atol=1e-14)


@CLASSES
@NORMALIZE
def test_second_derivatives_of_a_learned_scale_are_those_of_the_formula(cls, normalize):
    y = torch.tensor([-8.0, -7.4, -6.1, -5.0], dtype=torch.float64)
    n = 1 if cls is MaxCombination else -1

    def plain(log_scale, y):
        t = log_scale.exp()
        return n / t * (torch.logsumexp(n * t * y, 0) - math.log(len(y)) * int(normalize))

    for start in (-3.0, 0.0, 1.5):  # about the mean, and about the extreme
        combination = learned(cls, start, normalize)

        def ours(log_scale, y, combination=combination):
            parameters = {"log_pred_scale": log_scale[None]}
            return torch.func.functional_call(combination, parameters, (y,))

        combination.forward = combination.combine
        at = (torch.tensor(start, dtype=torch.float64), y)
        found = torch.autograd.functional.hessian(ours, at)
        expected = torch.autograd.functional.hessian(plain, at)
        # 1/t is 20, and the plain formula has no shift.
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


@CLASSES
@NORMALIZE
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("n_poses", [2, 10, 1000])
def test_the_derivative_of_ln_t_keeps_its_digits_in_float32(n_poses, shape, normalize, cls):
    """Plain autograd of a log-mean-exp has no right digit at a spread of 1e-6."""
    n = 1 if cls is MaxCombination else -1
    eps = torch.finfo(torch.float32).eps
    for spread in SPREADS:
        for log_scale in (-30.0, 0.0, 1.1, 30.0):
            combination = learned(cls, log_scale, normalize).float()
            log_scale = combination.log_pred_scale.item()
            y = n * shape(n_poses) * (spread / math.exp(log_scale))
            found = log_scale_gradient(combination, y)
            expected = exact_log_scale_gradient(cls, log_scale, normalize, y)
            # t is right to |ln t| eps. Above the spread of 4, the sum of the terms about the
            # extreme is right to a few eps of ln M, in units of 1/t.
            relative = 4 * eps * (4 + abs(log_scale))
            absolute = 4 * eps / math.exp(log_scale)
            if normalize and spread <= 3:
                absolute = 1e-30
            assert found == pytest.approx(expected, rel=relative, abs=absolute), (spread, log_scale)


@CLASSES
@NORMALIZE
@FLOATS
@pytest.mark.parametrize("log_scale", [-1000.0, -89.0, -80.0, -40.0, 40.0, 80.0, 89.0, 1000.0])
@pytest.mark.parametrize(
    "y",
    [[3.0, -9.0, -5.0, -9.0], [3e38, -3e38, 1.0], [math.inf, 1.0, 2.0], [-math.inf, 1.0, 2.0]],
    ids=str,
)
def test_a_learned_scale_has_a_finite_derivative_everywhere(y, log_scale, dtype, normalize, cls):
    combination = learned(cls, log_scale, normalize).to(dtype)
    y = torch.tensor(y, dtype=dtype, requires_grad=True)
    value = combination.combine(y)
    of_y, of_scale = torch.autograd.grad(value, [y, combination.log_pred_scale])
    fixed = cls(pred_scale=math.exp(max(min(log_scale, 707.0), -707.0)), normalize=normalize)
    # t is right to |ln t| eps.
    few = 1000 * torch.finfo(dtype).eps
    torch.testing.assert_close(value, fixed.combine(y), rtol=few, atol=0)
    torch.testing.assert_close(of_y, fixed.pose_weights(y.detach()), rtol=few, atol=few)
    assert math.isfinite(of_scale.item())
    if value.isinf() or abs(log_scale) == 1000:
        assert of_scale.item() == 0


@CLASSES
@NORMALIZE
@pytest.mark.parametrize("kind", ["mark", "inf"])
def test_a_failed_pose_does_not_disturb_the_derivative_of_ln_t(kind, normalize, cls):
    """-n/t times the entropy of the others. Normalized, ln(5/4) / t more."""
    n = 1 if cls is MaxCombination else -1
    y = torch.tensor([-8.0, -7.4, -6.1, -5.0], dtype=torch.float64)
    failed = torch.tensor([-n * {"mark": 1e300, "inf": math.inf}[kind]], dtype=torch.float64)
    combination = learned(cls, 0.7, normalize)
    more = n * math.log(5 / 4) / math.exp(0.7) if normalize else 0.0
    found = log_scale_gradient(combination, torch.cat([y, failed]))
    # A few roundings of numbers below 10.
    assert found == pytest.approx(log_scale_gradient(combination, y) + more, rel=0, abs=1e-14)


@NORMALIZE
def test_a_float32_scale_is_computed_in_the_dtype_of_the_predictions(normalize):
    combination = learned(MaxCombination, 95.0, normalize).float()  # exp(95) is inf in float32
    y = torch.tensor([0.0, math.log(2) * math.exp(-95)], dtype=torch.float64)
    expected = math.log(3 / 2 if normalize else 3)
    assert combination.combine(y).item() * math.exp(95) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_exponential_beyond_its_line_keeps_its_digits(dtype):
    x = torch.cat([torch.logspace(-12, 0.6, 200), -torch.logspace(-12, 3, 200)]).to(dtype)
    x.requires_grad_()
    found = exp_beyond_line(x)
    (slope,) = torch.autograd.grad(found.sum(), x)
    wide = x.detach().double()
    expected = sum(wide**k / float(math.factorial(k)) for k in range(2, 25))
    expected = torch.where(wide.abs() < 2, expected, wide.expm1() - wide)
    # expm1(x) - x loses a factor of 2 / |x| at 1/16, and a little more as the series is summed.
    rounding = 64 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=rounding, atol=0)
    torch.testing.assert_close(slope.double(), wide.expm1(), rtol=rounding, atol=0)


@pytest.mark.parametrize("gradients", ["graph", "stored", "recomputed"])
@CLASSES
def test_a_learnable_scale_trains_with_the_model(cls, gradients):
    torch.manual_seed(0)
    pose_model = torch.nn.Linear(4, 1).double()
    poses = torch.randn(6, 4, dtype=torch.float64)
    model = MultiPoseModel(pose_model, learned(cls, 0.3, True), gradients=gradients)
    model(poses).prediction.square().backward()
    log_scale = model.combination.log_pred_scale
    y = pose_model(poses)[:, 0].detach()
    value, weights = model.combination.combine(y), model.combination.pose_weights(y)
    expected = 2 * value * ((weights * y).sum() - value)
    torch.testing.assert_close(log_scale.grad[0], expected, rtol=1e-12, atol=0)
    before = log_scale.item()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    assert log_scale.item() != before


@CLASSES
def test_a_fixed_scale_is_no_parameter(cls):
    assert list(cls(pred_scale=2.0).parameters()) == []
    assert cls(pred_scale=2.0).pred_scale == 2.0


def test_arguments_show_and_survive_copies():
    combination = MinCombination(pred_scale=2.0, normalize=True)
    text = "MinCombination(pred_scale=2.0, normalize=True, learnable=False)"
    for twin in (combination, copy.deepcopy(combination), pickle.loads(pickle.dumps(combination))):
        assert repr(twin) == text


def test_a_learned_scale_shows_as_it_is_now():
    combination = MaxCombination(pred_scale=3.0, normalize=True, learnable=True)
    text = "MaxCombination(negate_preds=False, pred_scale={}, normalize=True, learnable=True)"
    assert repr(combination) == text.format(3)
    with torch.no_grad():
        combination.log_pred_scale.fill_(math.log(0.5))
    assert repr(combination) == repr(copy.deepcopy(combination)) == text.format(0.5)


def model_of(cls, **arguments):
    return MultiPoseModel(torch.nn.Linear(4, 1), cls(**arguments))


@CLASSES
def test_a_checkpoint_with_a_learned_scale_loads_with_another_start(cls):
    trained = model_of(cls, pred_scale=4.0, normalize=True, learnable=True)
    with torch.no_grad():
        trained.combination.log_pred_scale.fill_(math.log(0.25))
    fresh = model_of(cls, pred_scale=1.0, normalize=True, learnable=True)
    fresh.load_state_dict(trained.state_dict())
    # float32 holds ln 0.25 to 1e-7.
    assert fresh.combination.pred_scale.item() == pytest.approx(0.25, rel=1e-6)
    poses = torch.randn(3, 4)
    assert fresh(poses).prediction == trained(poses).prediction


@pytest.mark.parametrize(
    "other",
    [{"learnable": True}, {"pred_scale": 4.0, "normalize": True}, {"pred_scale": 1.0}],
    ids=str,
)
def test_a_checkpoint_with_a_learned_scale_does_not_load_into_another_rule(other):
    trained = model_of(MinCombination, pred_scale=4.0, normalize=True, learnable=True)
    state = trained.state_dict()
    if "learnable" not in other:
        state.pop("combination.log_pred_scale")
    with pytest.raises(CheckpointError, match="this model has other arguments"):
        model_of(MinCombination, **other).load_state_dict(state)
