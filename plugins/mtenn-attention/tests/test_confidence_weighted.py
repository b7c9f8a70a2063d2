import copy
import math
import pickle

import pytest
import torch
from mtenn_attention import ConfidenceWeightedCombination

from mtenn_core import MultiPoseModel, registry
from mtenn_core.testing import CombinationConformance, check_combination

LEARNABLE = pytest.mark.parametrize("learnable", [False, True], ids=["fixed", "learnable"])
FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
SIZES = [4, 1, 4, 7, 4, 2]
ARGUMENTS = [{}, {"temperature": 0.1}, {"temperature": 0.5, "learnable": True}]
RARE = pytest.mark.slow("a gate that is shut by mistake is rare")
SEEDS = [*range(5), *(pytest.param(seed, marks=RARE) for seed in range(5, 100))]


class TestConfidenceWeighted(CombinationConformance):
    combination = ConfidenceWeightedCombination
    level = "quality"


@pytest.mark.parametrize("seed", SEEDS)
def test_the_gate_opens_at_every_seed(seed):
    arguments = ARGUMENTS[seed % len(ARGUMENTS)]
    report = check_combination(ConfidenceWeightedCombination(**arguments), level="gate", seed=seed)
    assert report.passed, str(report)


def some_poses(n_poses=6, seed=0):
    """Return affinities and confidences, shape (n_poses, 2)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n_poses, 2, dtype=torch.float64, generator=generator)


def close(found, expected):
    # The same formula in float64. Sums run in another order.
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def written_out(poses, temperature):
    factors = [math.exp(c / temperature) for _, c in poses.tolist()]
    return sum(f * y for f, (y, _) in zip(factors, poses.tolist(), strict=True)) / sum(factors)


@LEARNABLE
@pytest.mark.parametrize("temperature", [0.1, 1.0, 30.0])
def test_it_is_the_formula(temperature, learnable):
    combination = ConfidenceWeightedCombination(temperature, learnable).double()
    for n_poses in (1, 2, 6):
        poses = some_poses(n_poses)
        # A learned ln τ is rounded to float32 in __init__.
        own = torch.as_tensor(combination.temperature, dtype=torch.float64)
        expected = written_out(poses, own.item())
        close(combination.combine(poses).item(), expected)
        close(combination.reference(poses).item(), expected)


def test_it_is_found_by_name():
    assert registry.info("confidence_weighted").distribution == "mtenn-attention"


def test_worked_by_hand():
    """Weights 3/4 and 1/4 at confidences ln 3 and 0: h = -7 for the affinities -8 and -4."""
    combination = ConfidenceWeightedCombination(learnable=True).double()
    poses = torch.tensor([[-8.0, math.log(3)], [-4.0, 0.0]], dtype=torch.float64)
    value = combination.combine(poses)
    close(value.item(), -7.0)
    close(combination.pose_weights(poses).tolist(), [[0.75, -0.75], [0.25, 0.75]])
    (gradient,) = torch.autograd.grad(value, combination.log_temperature)
    close(gradient.item(), 0.75 * math.log(3))


@LEARNABLE
@pytest.mark.parametrize("temperature", [0.1, 1.0, 30.0])
def test_the_closed_form_is_the_derivative(temperature, learnable):
    combination = ConfidenceWeightedCombination(temperature, learnable).double()
    for n_poses in (1, 2, 6):
        poses = some_poses(n_poses).requires_grad_()
        (by_autograd,) = torch.autograd.grad(combination.combine(poses), poses)
        weights = combination.pose_weights(poses.detach())
        close(weights, by_autograd)
        close(weights.sum(0).tolist(), [1.0, 0.0])
        step = 1e-6
        for pose, column in torch.cartesian_prod(torch.arange(n_poses), torch.arange(2)):
            shift = torch.zeros(n_poses, 2, dtype=torch.float64)
            shift[pose, column] = step
            up, down = (combination.combine(poses.detach() + s) for s in (shift, -shift))
            numerical = (up - down) / (2 * step)
            # Central differences with step h are off by h²/τ³ and by the roundoff over h.
            torch.testing.assert_close(weights[pose, column], numerical, rtol=1e-7, atol=1e-8)


def test_second_derivatives_are_those_of_finite_differences():
    combination = ConfidenceWeightedCombination(0.7, learnable=True).double()
    assert torch.autograd.gradgradcheck(combination.combine, some_poses(4).requires_grad_())


def test_the_derivative_with_respect_to_the_temperature_is_that_of_the_readme():
    """∂h/∂ ln τ = -Σ p_i (c_i - c̄) (y_i - h)/τ."""
    combination = ConfidenceWeightedCombination(0.4, learnable=True).double()
    poses = some_poses()
    value = combination.combine(poses)
    (found,) = torch.autograd.grad(value, combination.log_temperature)
    y, c = poses.unbind(1)
    tau = combination.temperature
    p = torch.softmax(c / tau, 0)
    close(found[0], -(p * (c - (p * c).sum()) * (y - value)).sum().detach() / tau.detach())


@pytest.mark.parametrize("use", ["results", "poses", "both"])
@pytest.mark.parametrize("gradients", ["graph", "stored", "recomputed"])
@LEARNABLE
def test_gradients_equal_plain_autograd(learnable, gradients, use):
    """Ragged compounds, dropout in the pose model, against the formula in plain torch."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(5, 8), torch.nn.SiLU(), torch.nn.Dropout(0.3), torch.nn.Linear(8, 2)]
    pose_model = torch.nn.Sequential(*layers).double()
    combination = ConfidenceWeightedCombination(0.5, learnable).double()
    model = MultiPoseModel(pose_model, combination, gradients=gradients)
    poses = torch.randn(sum(SIZES), 5, dtype=torch.float64)
    params = list(model.parameters())

    def loss(results, pose_outputs):
        of_results = (results - 0.3).square().sum()
        of_poses = (pose_outputs + 1.0).cos().sum()
        return {"results": of_results, "poses": of_poses, "both": of_results * of_poses}[use]

    torch.manual_seed(3)
    plain = torch.stack([pose_model(pose) for pose in poses])
    results = [
        (torch.softmax(own[:, 1] / combination.temperature, 0) * own[:, 0]).sum()
        for own in plain.split(SIZES)
    ]
    expected = torch.autograd.grad(
        loss(torch.stack(results), plain), params, materialize_grads=True
    )
    torch.manual_seed(3)
    out = model(poses, SIZES)
    found = torch.autograd.grad(loss(*out), params, materialize_grads=True)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-10 * theirs.abs().max()
    weights = model.pose_weights(out.pose_predictions, SIZES)
    parts = zip(weights.split(SIZES), plain.detach().split(SIZES), strict=True)
    for of_compound, own in parts:
        close(of_compound, combination.pose_weights(own).detach())


@LEARNABLE
def test_a_batch_of_compounds_gives_the_numbers_of_each_compound(learnable):
    combination = ConfidenceWeightedCombination(0.5, learnable).double()
    poses = some_poses(20).view(5, 4, 2)
    for method in (combination.combine, combination.pose_weights):
        close(torch.func.vmap(method)(poses), torch.stack([method(own) for own in poses]))


def results(combination, poses):
    """Return the value, the closed form, autograd's weights, and the gradient of ln τ (or 0)."""
    poses = poses.clone().requires_grad_()
    value = combination.combine(poses)
    by_autograd, *of_log = torch.autograd.grad(value, [poses, *combination.parameters()])
    gradient = of_log[0].item() if of_log else 0.0
    return value.detach(), combination.pose_weights(poses.detach()).detach(), by_autograd, gradient


@FLOATS
@LEARNABLE
@pytest.mark.parametrize("temperature", [0.5, 1e-3, 100.0])
@pytest.mark.parametrize("affinity", [-7.0, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("confidence", [-math.inf, -3e38])
def test_a_pose_without_confidence_counts_as_absent(
    confidence, affinity, temperature, learnable, dtype
):
    failed = [affinity, confidence]
    poses = torch.tensor([failed, [-8.0, 0.5], [-7.5, 0.25], failed, [-6.0, 0.0]], dtype=dtype)
    there = torch.tensor([1, 2, 4])
    combination = ConfidenceWeightedCombination(temperature, learnable)
    value, weights, by_autograd, of_log = results(combination, poses)
    expected = results(combination, poses[there])
    assert not weights[[0, 3]].any()
    assert not by_autograd[[0, 3]].any()
    # The sums have more terms, which are 0. Their order may differ.
    few = 16 * torch.finfo(dtype).eps / min(temperature, 1)
    found = (value, weights[there], by_autograd[there])
    torch.testing.assert_close(found, expected[:3], rtol=few, atol=few)
    assert of_log == pytest.approx(expected[3], rel=few, abs=few)


@FLOATS
@LEARNABLE
def test_the_largest_confidences_have_a_derivative(learnable, dtype):
    largest = torch.finfo(dtype).max
    poses = torch.tensor([[1.0, largest], [2.0, largest]], dtype=dtype)
    _, weights, by_autograd, _ = results(ConfidenceWeightedCombination(1.0, learnable), poses)
    assert weights.tolist() == by_autograd.tolist() == [[0.5, -0.25], [0.5, 0.25]]


INFINITE = {
    "all -inf": ([-math.inf, -math.inf], [0.5, 0.5]),
    "one +inf": ([1.0, math.inf, -math.inf, 2.0], [0, 1, 0, 0]),
    "two +inf": ([math.inf, 1.0, math.inf], [0.5, 0, 0.5]),
    "one pose": ([-math.inf], [1]),
}


@FLOATS
@LEARNABLE
@pytest.mark.parametrize("case", INFINITE.values(), ids=INFINITE)
def test_poses_at_an_infinite_highest_confidence_share_the_weight(case, learnable, dtype):
    confidences, weights = case
    affinities = torch.arange(len(weights), dtype=dtype)
    poses = torch.stack([affinities, torch.tensor(confidences, dtype=dtype)], 1)
    found = results(ConfidenceWeightedCombination(0.5, learnable), poses)
    assert found[0] == (affinities * torch.tensor(weights, dtype=dtype)).sum()
    assert found[1][:, 0].tolist() == found[2][:, 0].tolist() == weights
    assert found[1][:, 1].tolist() == found[2][:, 1].tolist() == [0] * len(weights)
    assert found[3] == 0


@LEARNABLE
@pytest.mark.parametrize("affinity", [2.0, math.inf, math.nan])
@pytest.mark.parametrize("confidence", [-math.inf, -1e6, 0.0, math.inf, math.nan])
def test_the_closed_form_is_autograd_for_numbers_that_are_not_finite(
    confidence, affinity, learnable
):
    poses = torch.tensor([[1.0, 0.5], [affinity, confidence], [3.0, 0.0]], dtype=torch.float64)
    _, weights, by_autograd, _ = results(ConfidenceWeightedCombination(0.5, learnable), poses)
    torch.testing.assert_close(weights, by_autograd, rtol=1e-12, atol=1e-13, equal_nan=True)


class ShiftedPoses(torch.nn.Module):
    """Affinity a x_0, and a confidence b x_1 that a constant of the pose makes infinite."""

    def __init__(self):
        super().__init__()
        self.scales = torch.nn.Parameter(torch.tensor([1.5, 2.0], dtype=torch.float64))

    def forward(self, pose):
        affinity, confidence = (self.scales * pose[..., :2]).unbind(-1)
        return torch.stack([affinity, confidence + pose[..., 2]], -1)


@LEARNABLE
@pytest.mark.parametrize("case", INFINITE.values(), ids=INFINITE)
@pytest.mark.parametrize("gradients", ["graph", "stored", "recomputed"])
def test_infinite_confidences_give_every_mode_the_same_gradients(gradients, case, learnable):
    confidences, weights = (torch.tensor(numbers, dtype=torch.float64) for numbers in case)
    x = some_poses(len(weights))
    combination = ConfidenceWeightedCombination(0.5, learnable).double()
    model = MultiPoseModel(ShiftedPoses(), combination, gradients=gradients, check_finite=False)
    model(torch.cat([x, confidences[:, None]], 1)).prediction.backward()
    # The affinities of the poses that share the weight; no derivative for confidences.
    expected = torch.stack([weights @ x[:, 0], torch.zeros((), dtype=torch.float64)])
    torch.testing.assert_close(model.pose_model.scales.grad, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("sign", [-1, 1])
def test_an_infinite_affinity_with_weight_makes_the_value_infinite(sign):
    poses = torch.tensor([[sign * math.inf, 0.0], [1.0, 0.0]])
    assert ConfidenceWeightedCombination().combine(poses) == sign * math.inf


@pytest.mark.parametrize("column", [0, 1])
@pytest.mark.parametrize("confidence", [0.0, -1e4])
def test_nan_in_gives_nan_out(column, confidence):
    poses = torch.tensor([[1.0, 0.0], [2.0, confidence], [3.0, 0.0]])
    poses[1, column] = math.nan
    assert ConfidenceWeightedCombination().combine(poses).isnan()
    assert ConfidenceWeightedCombination().pose_weights(poses).isnan().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_that_of_float32_rounded_once(dtype):
    poses = some_poses(64).to(dtype)
    combination = ConfidenceWeightedCombination(0.5)
    for method in (combination.combine, combination.pose_weights):
        assert method(poses).dtype == dtype
        assert torch.equal(method(poses), method(poses.float()).to(dtype))


@pytest.mark.parametrize("base", [1e4, -1e4])
def test_large_affinities_keep_the_digits_of_the_weights(base):
    """In float32, y_i - h has no more error than the rounding of y."""
    poses = some_poses(64).float()
    poses[:, 0] += base
    combination = ConfidenceWeightedCombination(0.1)
    exact = combination.pose_weights(poses.double())
    torch.testing.assert_close(
        combination.pose_weights(poses).double(), exact, rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(
        combination.combine(poses).double(), combination.combine(poses.double()), rtol=1e-7, atol=0
    )


def at_log_temperature(log_temperature):
    combination = ConfidenceWeightedCombination(learnable=True)
    with torch.no_grad():
        combination.log_temperature.fill_(log_temperature)
    return combination


COLD = {
    "ln τ = -1000": lambda: at_log_temperature(-1000.0),
    "τ = 1e-308": lambda: ConfidenceWeightedCombination(1e-308),
}
HOT = {
    "ln τ = 1000": lambda: at_log_temperature(1000.0),
    "τ = 1e308": lambda: ConfidenceWeightedCombination(1e308),
}


@FLOATS
@pytest.mark.parametrize("made", COLD.values(), ids=COLD)
def test_a_vanishing_temperature_selects_the_most_confident_poses(made, dtype):
    poses = torch.tensor([[3.0, 0.0], [-9.0, 2.0], [-5.0, 1.0], [-9.0, 2.0]], dtype=dtype)
    value, weights, by_autograd, of_log = results(made(), poses)
    assert value == -9
    assert weights.tolist() == by_autograd.tolist() == [[0, 0], [0.5, 0], [0, 0], [0.5, 0]]
    assert of_log == 0


@FLOATS
@pytest.mark.parametrize("made", HOT.values(), ids=HOT)
def test_an_infinite_temperature_gives_the_mean(made, dtype):
    poses = torch.tensor([[3.0, 0.0], [-9.0, 2.0], [-5.0, 1.0], [-9.0, 2.0]], dtype=dtype)
    value, weights, by_autograd, of_log = results(made(), poses)
    assert value == -5
    assert weights[:, 0].tolist() == by_autograd[:, 0].tolist() == [0.25] * 4
    assert of_log == pytest.approx(0, abs=1e-30)


# 1e-320 is positive, and 1/1e-320 is inf.
@pytest.mark.parametrize("temperature", [0.0, -0.6, math.inf, math.nan, 1e-320])
def test_a_temperature_that_is_not_positive_and_finite_is_refused(temperature):
    message = f"must be positive and finite; found temperature = {temperature}$"
    with pytest.raises(ValueError, match=message):
        ConfidenceWeightedCombination(temperature)


@pytest.mark.parametrize("temperature", ["a", "1", None, True, 10**400])
def test_a_temperature_that_is_no_number_is_refused(temperature):
    message = f"^temperature and 1/temperature must be .*; found temperature = {temperature!r}$"
    with pytest.raises(ValueError, match=message):
        ConfidenceWeightedCombination(temperature)


@pytest.mark.parametrize("learnable", ["no", 1, None])
def test_learnable_is_true_or_false(learnable):
    message = f"^learnable must be True or False; found learnable = {learnable!r}$"
    with pytest.raises(ValueError, match=message):
        ConfidenceWeightedCombination(learnable=learnable)


def test_an_error_names_the_column():
    model = MultiPoseModel(torch.nn.Identity(), ConfidenceWeightedCombination())
    poses = some_poses(5)
    poses[3, 1] = math.nan
    with pytest.raises(ValueError, match=r"pose 3.*column 1 \('confidence'\)"):
        model(list(poses))


@LEARNABLE
def test_arguments_show_and_survive_copies(learnable):
    combination = ConfidenceWeightedCombination(0.5, learnable)
    pickled = pickle.loads(pickle.dumps(combination))
    for twin in (combination, copy.deepcopy(combination), pickled):
        shown = f"ConfidenceWeightedCombination(temperature=0.5, learnable={learnable})"
        assert repr(twin) == shown
        assert torch.equal(twin.combine(some_poses()), combination.combine(some_poses()))


def test_a_learned_temperature_shows_as_it_is_now():
    shown = "ConfidenceWeightedCombination(temperature=0.5, learnable=True)"
    assert repr(at_log_temperature(math.log(0.5))) == shown


def test_a_checkpoint_has_the_learned_temperature():
    pose_model = torch.nn.Linear(5, 2)
    trained = MultiPoseModel(pose_model, ConfidenceWeightedCombination(0.25, learnable=True))
    fresh = MultiPoseModel(pose_model, ConfidenceWeightedCombination(1.0, learnable=True))
    fresh.load_state_dict(trained.state_dict())
    torch.testing.assert_close(fresh.combination.temperature.item(), 0.25)
