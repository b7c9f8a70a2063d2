"""Error bars against closed forms, autograd, plain loops, random draws, and the formula of EXP."""

from __future__ import annotations

import math

import pytest
import torch

from mtenn_core import (
    Combination,
    MultiPoseModel,
    effective_poses,
    jackknife_error,
    propagated_error,
)
from mtenn_core._engine import leave_one_out
from mtenn_core._engine.evaluation import note_sizes
from mtenn_core.errors import PredictionError

# Sums of a few float64 products in another order differ in the last digits.
EXACT = {"rtol": 1e-12, "atol": 0.0}
SIZES = [3, 1, 6, 3]
N_POSES = sum(SIZES)
KT = 0.593


class Mean(Combination):
    def combine(self, predictions):
        return predictions.mean()


class ExponentialAverage(Combination):
    """The smooth minimum with normalize, -kT ln <exp(-y/kT)>."""

    def combine(self, predictions):
        n_poses = predictions.shape[0]
        return -KT * (torch.logsumexp(-predictions / KT, 0) - math.log(n_poses))


class Boltzmann(Combination):
    """Has negative weights."""

    def combine(self, predictions):
        return (torch.softmax(-predictions / KT, 0) * predictions).sum()


class Largest(Combination):
    """Control flow that depends on numbers: it cannot run in batches."""

    min_poses = 2

    def combine(self, predictions):
        return predictions[0] if predictions[0] > predictions[1] else predictions[1:].max()


class Scored(Combination):
    pose_inputs = ("score",)

    def combine(self, predictions, score):
        return (torch.softmax(score, 0) * predictions).sum()


class OnlyForward(Combination):
    def forward(self, pred_list, grad_dict, param_names, *model_params):
        return torch.stack(list(pred_list)).exp().mean()


class Exponential(Combination):
    """The value of OnlyForward."""

    def combine(self, predictions):
        return predictions.exp().mean()


COMBINATIONS = [Mean(), ExponentialAverage(), Boltzmann()]


@pytest.fixture
def y():
    return torch.randn(N_POSES, dtype=torch.float64)


def weights_of(combination, y, sizes):
    return MultiPoseModel(torch.nn.Identity(), combination).pose_weights(y, sizes)


def covariance_of(n, rank=None):
    factors = torch.randn(n, rank or n, dtype=torch.float64)
    return factors @ factors.T


# Effective poses


def test_equal_weights_count_all_poses_and_one_weight_counts_one():
    weights = torch.tensor([0.25, 0.25, 0.25, 0.25, 0, 1, 0]).double()
    torch.testing.assert_close(
        effective_poses(weights, [4, 3]), torch.tensor([4.0, 1.0]).double(), **EXACT
    )


def test_effective_poses_are_one_over_the_sum_of_squares_of_normalized_weights(y):
    weights = weights_of(ExponentialAverage(), y, SIZES)
    expected = torch.stack([1 / part.square().sum() for part in weights.split(SIZES)])
    torch.testing.assert_close(effective_poses(weights, SIZES), expected, **EXACT)


@pytest.mark.parametrize("factor", [3.0, -1.0, 1e-200, 1e200])
def test_the_sum_of_the_weights_does_not_count(y, factor):
    weights = y.exp()
    torch.testing.assert_close(
        effective_poses(factor * weights, SIZES), effective_poses(weights, SIZES), **EXACT
    )


@pytest.mark.parametrize(
    ("weights", "expected"),
    [([2.0, -1.0], 1 / 5), ([1.0, -1.0], 0.0), ([0.0, 0.0], math.nan), ([3.0], 1.0)],
    ids=["negative", "sum zero", "all zero", "one pose"],
)
def test_unusual_weights_have_effective_poses_without_an_error(weights, expected):
    found = effective_poses(torch.tensor(weights))
    torch.testing.assert_close(found, torch.tensor(expected), equal_nan=True)


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_equal_errors_shrink_with_the_root_of_the_effective_poses(y, combination):
    weights = weights_of(combination, y, SIZES)
    error = propagated_error(weights, [0.7] * N_POSES, SIZES)
    torch.testing.assert_close(error, 0.7 / effective_poses(weights, SIZES).sqrt(), **EXACT)


# Shapes and precision


FUNCTIONS = {
    "effective": lambda y, **sizes: effective_poses(y, **sizes),
    "deviations": lambda y, **sizes: propagated_error(y, y.abs(), **sizes),
    "covariance": lambda y, **sizes: propagated_error(y, torch.eye(len(y), device="cpu"), **sizes),
    "jackknife": lambda y, **sizes: jackknife_error(Mean(), y, **sizes),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_sizes_and_ptr_decide_the_shape(y, function):
    assert function(y).shape == ()
    assert function(y, sizes=[N_POSES]).shape == (1,)
    of_compounds = function(y, sizes=SIZES)
    assert of_compounds.shape == (len(SIZES),)
    ptr = torch.tensor([0, *SIZES]).cumsum(0)
    for same in ({"sizes": torch.tensor(SIZES)}, {"ptr": ptr}, {"ptr": ptr.tolist()}):
        assert torch.equal(function(y, **same).nan_to_num(-1), of_compounds.nan_to_num(-1))


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_compound_is_computed_as_if_it_were_alone(y, function):
    alone = torch.stack([function(part) for part in y.split(SIZES)])
    torch.testing.assert_close(function(y, sizes=SIZES), alone, **EXACT, equal_nan=True)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_computed_in_float32(y, function, dtype):
    y = y.to(dtype)
    found, expected = function(y, sizes=SIZES), function(y.double(), sizes=SIZES)
    assert found.dtype == torch.float32
    # A few roundings of float32.
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize(
    "context",
    [lambda: torch.autocast("cpu", dtype=torch.bfloat16), lambda: torch.device("meta")],
    ids=["autocast", "default device"],
)
def test_the_surroundings_do_not_matter(y, function, context):
    y, sizes = y[:12].float(), [2, 4, 2, 1, 1, 2]
    expected = function(y, sizes=sizes)
    with context():
        found = function(y, sizes=sizes)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_sizes_and_ptr_together_are_refused(y, function):
    with pytest.raises(PredictionError, match="Pass only one of them"):
        function(y, sizes=SIZES, ptr=[0, N_POSES])


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_sizes_that_do_not_add_up_are_refused(y, function):
    with pytest.raises(PredictionError, match="sizes must add up to the number of poses"):
        function(y, sizes=[3, 4])


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_numbers_of_several_compounds_need_their_sizes(y, function):
    note_sizes(y, SIZES)
    with pytest.raises(PredictionError, match=r"of 4 compounds|for 4 compounds"):
        function(y)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_named(y, function, number):
    y[5] = number
    with pytest.raises(PredictionError, match=r"pose 5 \(pose 1 of compound 2\): .* found") as info:
        function(y, sizes=SIZES)
    assert (info.value.pose, info.value.compound) == (5, 2)
    with pytest.raises(PredictionError, match=r"pose 5: .* must be finite; found (nan|inf)"):
        function(y)


# First order


@pytest.mark.parametrize("n_poses", [1, 5, 100])
def test_the_error_of_a_mean_falls_with_the_root_of_the_number(n_poses):
    weights = torch.full((n_poses,), 1 / n_poses, dtype=torch.float64)
    found = propagated_error(weights, [0.5] * n_poses)
    assert found.item() == pytest.approx(0.5 / math.sqrt(n_poses), rel=1e-12)


def test_equal_errors_that_are_fully_correlated_do_not_shrink():
    weights = torch.full((9,), 1 / 9, dtype=torch.float64)
    assert propagated_error(weights, torch.full((9, 9), 0.25)).item() == pytest.approx(0.5)


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_the_error_is_that_of_the_gradient_of_autograd(y, combination):
    covariance = covariance_of(N_POSES)
    y.requires_grad_()
    expected = []
    for places in torch.arange(N_POSES).split(SIZES):
        (gradient,) = torch.autograd.grad(combination.combine(y[places]), y)
        expected.append((gradient @ covariance @ gradient).sqrt())
    weights = weights_of(combination, y.detach(), SIZES)
    found = propagated_error(weights, covariance, SIZES)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-10, atol=0)


def test_deviations_and_all_forms_of_a_covariance_agree(y):
    deviations = torch.rand(N_POSES, dtype=torch.float64)
    blocks = [torch.diag(part.square()) for part in deviations.split(SIZES)]
    whole = torch.block_diag(*blocks)
    whole[:3, 3] = whole[3, :3] = 0.01  # between two compounds: of no effect
    expected = propagated_error(y, deviations, SIZES)
    for errors in (whole, whole.tolist(), blocks, tuple(blocks), deviations.tolist()):
        torch.testing.assert_close(propagated_error(y, errors, SIZES), expected, **EXACT)
    equal = torch.stack([torch.diag(part.square()) for part in deviations[:12].split(3)])
    torch.testing.assert_close(
        propagated_error(y[:12], equal, [3] * 4),
        propagated_error(y[:12], deviations[:12], [3] * 4),
        **EXACT,
    )


def test_a_column_of_a_table_counts_by_position(y):
    numpy = pytest.importorskip("numpy", reason="a column is an array with labels")

    class Column:
        ndim = 1

        def __array__(self, dtype=None, copy=None):
            return numpy.arange(float(N_POSES))

        def __getitem__(self, label):
            raise KeyError(label)

    expected = propagated_error(y, torch.arange(float(N_POSES)))
    assert torch.equal(propagated_error(y, Column()), expected)


def test_a_covariance_of_few_models_is_accepted_and_its_roundoff_is_no_variance(y):
    # Three models: rank 2. In float32, its zero eigenvalues are not zero.
    covariance = torch.cov(torch.randn(N_POSES, 3)).double()
    assert propagated_error(y, covariance).isfinite()
    ones = torch.ones(2, dtype=torch.float64)
    opposite = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    assert propagated_error(ones, opposite * 0.1).item() == 0


def test_the_error_has_a_gradient_also_where_it_is_zero(y):
    errors = torch.zeros(N_POSES, dtype=torch.float64)
    errors[3:] = 0.3
    errors.requires_grad_()
    propagated_error(y, errors, SIZES).sum().backward()
    assert errors.grad[:3].tolist() == [0, 0, 0]
    assert (errors.grad[3:] > 0).all()
    errors.grad = None
    assert torch.autograd.gradcheck(lambda e: propagated_error(y[3:], e), errors[3:])


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_small_errors_are_those_of_random_draws(y, combination):
    n_draws, sd = 40_000, 0.01 * KT
    y = 0.3 * y[:6]
    draws = y + sd * torch.randn(n_draws, 6, dtype=torch.float64)
    spread = torch.func.vmap(combination.combine)(draws).std()
    found = propagated_error(weights_of(combination, y, [6]), [sd] * 6)
    # The spread of n draws has the relative error 1/√(2n), 0.35 %; 4 of them. The second order
    # adds a relative (sd/kT)², 0.01 %.
    assert found.item() == pytest.approx(spread.item(), rel=4 / math.sqrt(2 * n_draws) + 1e-3)


@pytest.mark.parametrize(
    ("sd", "first_order", "spread", "fall"),
    [(0.1, 0.05, 0.05, 0.00), (0.3, 0.15, 0.15, 0.03), (1, 0.50, 0.56, 0.34), (3, 1.5, 1.98, 1.99)],
)
def test_errors_of_equal_poses_are_those_of_the_docstring(sd, first_order, spread, fall):
    n_draws = 40_000
    noise = sd * KT * torch.randn(n_draws, 4, dtype=torch.float64)
    drawn = torch.func.vmap(ExponentialAverage().combine)(noise)
    weights = torch.full((4,), 0.25, dtype=torch.float64)
    found = propagated_error(weights, [sd * KT] * 4).item()
    # Half of the last digit that is shown, and 4 standard errors of these draws and those shown.
    rounding, of_draws = 0.005, 4 * math.sqrt(1 / n_draws + 1 / 100_000) * spread
    assert found / KT == pytest.approx(first_order, abs=rounding)
    assert drawn.std().item() / KT == pytest.approx(spread, abs=rounding + of_draws)
    assert -drawn.mean().item() / KT == pytest.approx(fall, abs=rounding + of_draws)


def test_the_smooth_minimum_falls_as_its_docstring_says(y):
    n_draws, sd = 40_000, 0.1 * KT
    y = 0.3 * y[:6]
    noise = sd * torch.randn(n_draws, 6, dtype=torch.float64)
    weights = weights_of(ExponentialAverage(), y, [6])
    # The draws and their mirror images: what is linear in the noise cancels.
    combine = torch.func.vmap(ExponentialAverage().combine)
    shifts = (combine(y + noise) + combine(y - noise)) / 2 - ExponentialAverage().combine(y)
    expected = -(weights * (1 - weights)).sum() * sd**2 / (2 * KT)
    # The fourth order is of the relative size (sd/kT)².
    tolerance = 4 * shifts.std().item() / math.sqrt(n_draws) + 0.02 * abs(expected.item())
    assert shifts.mean().item() == pytest.approx(expected.item(), abs=tolerance)


BAD_ERRORS = {
    "negative": ([0.1] * 5 + [-0.1] * 8, r"pose 5 \(pose 1 of compound 2\): its standard devia"),
    "nan": ([math.nan] * 13, r"pose 0 \(pose 0 of compound 0\): .* finite and not negative; .*nan"),
    "too few": ([0.1] * 12, r"errors must be standard deviations, .*found shape \(12,\)"),
    "number": (0.1, r"errors must be standard deviations, .*found shape \(\)"),
    "words": (["a"] * 13, r"errors: "),
    "complex": (torch.ones(13) * 1j, r"errors must be real numbers; found torch.complex64"),
    "not square": (torch.ones(13, 12), r"shape \(13, 13\); found \(13, 12\)"),
    "too few blocks": ([torch.eye(3)] * 3, r"each of 4 compounds; found 3"),
    "small block": (
        [torch.eye(3), torch.eye(1), torch.eye(5), torch.eye(3)],
        r"compound 2: a covariance of 6 pose\(s\) must have the shape \(6, 6\); found \(5, 5\)",
    ),
}


@pytest.mark.parametrize(("errors", "message"), BAD_ERRORS.values(), ids=BAD_ERRORS)
def test_malformed_errors_are_refused(y, errors, message):
    with pytest.raises(PredictionError, match=message):
        propagated_error(y, errors, SIZES)


@pytest.mark.parametrize(
    ("i", "j", "value", "message"),
    [
        (5, 5, -0.1, r"its variance must not be negative; found -0.1"),
        (5, 6, math.nan, r"its covariances must be finite; found nan"),
        (5, 6, 0.25, r"symmetric; found 0.25 in row 1 and column 2, and 0.0 in row 2 and column 1"),
    ],
)
def test_a_wrong_entry_of_a_covariance_is_named(y, i, j, value, message):
    covariance = torch.eye(N_POSES, dtype=torch.float64)
    covariance[i, j] = value
    where = r"pose 5 \(pose 1 of compound 2\): .*"
    with pytest.raises(PredictionError, match=where + message) as info:
        propagated_error(y, covariance, SIZES)
    assert (info.value.pose, info.value.compound) == (5, 2)


def test_a_covariance_with_a_negative_eigenvalue_is_refused(y):
    blocks = [torch.eye(size, dtype=torch.float64) for size in SIZES]
    blocks[3][0, 1] = blocks[3][1, 0] = 1.5
    message = r"compound 3: the covariance must be positive semidefinite; found the eigenvalue -0.5"
    with pytest.raises(PredictionError, match=message) as info:
        propagated_error(y, blocks, SIZES)
    assert info.value.compound == 3


@pytest.mark.parametrize("weights", [[0.5, 0.5], torch.ones(2, 2), torch.ones(2, dtype=torch.int)])
def test_weights_that_are_no_vector_are_refused(weights):
    with pytest.raises(PredictionError, match="pose_weights must be a vector"):
        effective_poses(weights)


def test_a_compound_without_poses_has_no_error():
    with pytest.raises(PredictionError, match="compound 1: expected at least one pose"):
        effective_poses(torch.ones(3), [3, 0])


# Jackknife


def jackknife_by_hand(combination, y, inputs=None):
    inputs = inputs or {}
    values = []
    for left_out in range(len(y)):
        kept = [i for i in range(len(y)) if i != left_out]
        own = {name: numbers[kept] for name, numbers in inputs.items()}
        values.append(combination.combine(y[kept], **own))
    values = torch.stack(values)
    return ((len(y) - 1) * (values - values.mean()).square().mean()).sqrt()


def test_the_jackknife_of_a_mean_is_its_standard_error(y):
    found = jackknife_error(Mean(), y)
    torch.testing.assert_close(found, y.std() / math.sqrt(N_POSES), **EXACT)


@pytest.mark.parametrize("limit", [1, 7, 1_000_000])
@pytest.mark.parametrize("combination", [*COMBINATIONS, Largest()], ids=lambda c: type(c).__name__)
def test_the_jackknife_leaves_each_pose_out(y, combination, limit, monkeypatch):
    monkeypatch.setattr(leave_one_out, "LARGEST_BATCH", limit)
    sizes = [3, 4, 3, 3]
    expected = torch.stack([jackknife_by_hand(combination, part) for part in y.split(sizes)])
    # The differences of a few numbers of size 1 lose a few digits.
    torch.testing.assert_close(jackknife_error(combination, y, sizes), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("limit", [30, 100])
def test_no_batch_is_larger_than_the_limit(limit, monkeypatch):
    monkeypatch.setattr(leave_one_out, "LARGEST_BATCH", limit)
    sizes, seen = [9, 2, 5, 1, 6], []
    combine = leave_one_out.combine_without_gradients

    def note(combination, predictions, inputs, sizes):
        seen.append(len(predictions))
        return combine(combination, predictions, inputs, sizes)

    monkeypatch.setattr(leave_one_out, "combine_without_gradients", note)
    jackknife_error(Mean(), torch.randn(sum(sizes)), sizes)
    assert sum(seen) == sum(n * (n - 1) for n in sizes)
    assert len(seen) > 1
    assert max(seen) <= limit


def test_combine_runs_as_often_for_many_poses_as_for_few(monkeypatch):
    calls = []
    combine = Mean.combine
    monkeypatch.setattr(Mean, "combine", lambda self, y: calls.append(1) or combine(self, y))
    mean = Mean()
    jackknife_error(mean, torch.randn(8), [4, 4])  # finds out that it runs in batches
    counts = []
    for n_poses in (10, 60):
        calls.clear()
        jackknife_error(mean, torch.randn(2 * n_poses), [n_poses, n_poses])
        counts.append(len(calls))
    assert counts == [2, 2]  # a new number of poses runs once alone, too


def test_a_compound_with_too_few_poses_has_no_jackknife(y):
    assert jackknife_error(Mean(), y, SIZES).isnan().tolist() == [False, True, False, False]
    assert jackknife_error(Largest(), y, [2, 3, 8]).isnan().tolist() == [True, False, False]
    assert jackknife_error(Mean(), y[:1]).isnan()
    with pytest.raises(PredictionError, match=r"compound 1: Largest needs at least 2 pose\(s\)"):
        jackknife_error(Largest(), y, SIZES)


def test_pose_inputs_are_left_out_with_their_pose(y):
    score = torch.randn(N_POSES, dtype=torch.float64)
    found = jackknife_error(Scored(), y, [5, 8], {"score": score.tolist()})
    parts = zip(y.split([5, 8]), score.split([5, 8]), strict=True)
    expected = [jackknife_by_hand(Scored(), part, {"score": own}) for part, own in parts]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-10, atol=0)


def test_a_combination_that_defines_only_forward_has_a_jackknife(y):
    found = jackknife_error(OnlyForward(), y, [5, 8])
    torch.testing.assert_close(found, jackknife_error(Exponential(), y, [5, 8]), **EXACT)


def test_the_jackknife_has_no_graph(y):
    assert not jackknife_error(Mean(), y.requires_grad_()).requires_grad


@pytest.mark.parametrize("given", ["mean", Mean, MultiPoseModel(torch.nn.Identity(), Mean())])
def test_the_jackknife_wants_a_combination(y, given):
    with pytest.raises(TypeError, match=r"such as model\.combination; found"):
        jackknife_error(given, y)


# Exponential averaging: the error of its sampling, from the variance of x = exp(-y/kT)


def error_of_exp(y):
    """Return kT sd(x) / (√M <x>), the error of pymbar's other_estimators.exp times kT."""
    x = torch.exp(-(y - y.min()) / KT)
    return KT * x.std(correction=0) / math.sqrt(len(y)) / x.mean()


def test_the_error_of_exp_comes_from_the_effective_poses(y):
    n = effective_poses(weights_of(ExponentialAverage(), y, [N_POSES]))
    torch.testing.assert_close(
        KT * (1 / n - 1 / N_POSES).sqrt(), error_of_exp(y), rtol=1e-10, atol=0
    )


def test_the_error_of_exp_is_a_propagated_error(y):
    """It is that of M samples of size kT whose mean is known."""
    weights = weights_of(ExponentialAverage(), y, [N_POSES])
    centred = KT**2 * (torch.eye(N_POSES, dtype=torch.float64) - 1 / N_POSES)
    torch.testing.assert_close(
        propagated_error(weights, centred), error_of_exp(y), rtol=1e-10, atol=0
    )


def test_the_jackknife_of_many_poses_is_the_error_of_exp():
    y = 0.5 * KT * torch.randn(1000, dtype=torch.float64)
    found, expected = jackknife_error(ExponentialAverage(), y), error_of_exp(y)
    weights = weights_of(ExponentialAverage(), y, [1000])
    # Without pose i, the average changes by -kT ln(1 - w_i) and a constant. That is kT w_i, and
    # relatively w_i / 2 more; the jackknife's factor is √(M/(M - 1)).
    tolerance = weights.max().item() + 1 / 1000
    assert tolerance < 0.02
    assert found.item() == pytest.approx(expected.item(), rel=tolerance)


def test_the_jackknife_of_exp_is_its_closed_form(y):
    weights = weights_of(ExponentialAverage(), y, [N_POSES])
    changes = KT * torch.log1p(-weights)
    expected = (N_POSES - 1) / math.sqrt(N_POSES) * changes.std()
    torch.testing.assert_close(
        jackknife_error(ExponentialAverage(), y), expected, rtol=1e-10, atol=0
    )


@pytest.mark.parametrize("unit", [1e-30, 1e-21, 1e30])
@pytest.mark.parametrize("shape", ["deviations", "covariance"])
def test_the_unit_of_the_errors_does_not_matter(unit, shape):
    weights = torch.tensor([0.25, 0.75])
    deviations = torch.tensor([3.0, 4.0])
    scaled = unit * deviations.double()
    errors = scaled if shape == "deviations" else torch.diag(scaled**2)
    found = propagated_error(weights, errors)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(unit * propagated_error(weights, deviations).item())


def test_a_stochastic_combination_has_no_jackknife(y):
    class Noisy(Mean):
        stochastic = True

    with pytest.raises(ValueError, match="Noisy is stochastic"):
        jackknife_error(Noisy(), y)
