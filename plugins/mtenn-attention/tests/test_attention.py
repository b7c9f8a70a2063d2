import copy
import pickle

import pytest
import torch
from mtenn_attention import AttentionCombination, GatedAttentionCombination

from mtenn_core import MultiPoseModel, registry
from mtenn_core.errors import CheckpointError
from mtenn_core.testing import CombinationConformance, check_combination

RULES = {"attention": AttentionCombination, "gated": GatedAttentionCombination}
BOTH = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
READOUT = pytest.mark.parametrize("readout", [False, True], ids=["embedding", "readout"])
SIZES = [4, 1, 4, 7, 4, 2]
RARE = pytest.mark.slow("a gate that is shut by mistake is rare")
SEEDS = [0, *(pytest.param(seed, marks=RARE) for seed in range(1, 30))]
ONE_BY_ONE = pytest.mark.slow("with dropout, the checks draw random numbers again for each value")
*PLAIN, WITH_DROPOUT = AttentionCombination.examples
EXAMPLES = [*PLAIN, pytest.param(WITH_DROPOUT, marks=ONE_BY_ONE)]


@ONE_BY_ONE
class TestAttention(CombinationConformance):
    combination = AttentionCombination
    level = "quality"


@ONE_BY_ONE
class TestGatedAttention(CombinationConformance):
    combination = GatedAttentionCombination
    level = "quality"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("arguments", EXAMPLES, ids=str)
@BOTH
def test_the_gate_opens_at_every_seed(rule, arguments, seed):
    torch.manual_seed(seed)
    report = check_combination(rule(**arguments), level="gate", seed=seed)
    assert report.passed, str(report)


def made(rule, **arguments):
    """Return a rule for 3 features in float64, with the same parameters in each call."""
    torch.manual_seed(5)
    return rule(3, 4, **arguments).double()


def embeddings(n_poses=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n_poses, 3, dtype=torch.float64, generator=generator)


def by_the_paper(combination, h, keep=1.0):
    """Return a and z of equations 7 to 9, written out pose by pose, with τ and dropout.

    Parameters
    ----------
    keep : shape (n_poses, n_hidden), the factor of each hidden unit
    """
    keep = torch.as_tensor(keep, dtype=h.dtype).expand(len(h), 4)
    scores = []
    for pose, factors in zip(h, keep, strict=True):
        units = torch.tanh(combination.V.weight @ pose)
        if isinstance(combination, GatedAttentionCombination):
            units = units * torch.sigmoid(combination.U.weight @ pose)
        scores.append(combination.w.weight[0] @ (factors * units) / combination.temperature)
    exponentials = torch.stack(scores).exp()
    attention = exponentials / exponentials.sum()
    pooled = sum(a * pose for a, pose in zip(attention, h, strict=True))
    if combination.readout is not None:
        pooled = combination.readout.weight[0] @ pooled + combination.readout.bias[0]
    return attention, pooled


def close(found, expected):
    # The same formula in float64. Sums run in another order.
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("arguments", RULES["attention"].examples, ids=str)
@BOTH
def test_it_is_the_formula_of_the_paper(rule, arguments):
    torch.manual_seed(1)
    combination = rule(**arguments).double().eval()
    for n_poses in (1, 2, 6):
        h = embeddings(n_poses)
        attention, pooled = by_the_paper(combination, h)
        close(combination.combine(h), pooled)
        close(combination.attention_weights(h), attention)
        close(combination.reference(h), pooled)


@pytest.mark.parametrize("name", ["attention", "gated_attention"])
def test_it_is_found_by_name(name):
    assert registry.info(name).distribution == "mtenn-attention"


@READOUT
@BOTH
def test_the_derivatives_are_those_of_the_formula(rule, readout):
    combination = made(rule, readout=readout, temperature=0.5, learnable=True)
    leaves = [embeddings().requires_grad_(), *combination.parameters()]
    direction = torch.tensor(1.0 if readout else [0.3, -1.0, 0.7], dtype=torch.float64)
    found = torch.autograd.grad((combination.combine(leaves[0]) * direction).sum(), leaves)
    pooled = by_the_paper(combination, leaves[0])[1]
    expected = torch.autograd.grad((pooled * direction).sum(), leaves)
    for ours, theirs in zip(found, expected, strict=True):
        close(ours, theirs)


@READOUT
@BOTH
def test_the_derivatives_are_those_of_finite_differences(rule, readout):
    combination = made(rule, readout=readout, temperature=0.5, learnable=True)
    names = [name for name, _ in combination.named_parameters()]

    def value(h, *params):
        own = dict(zip(names, params, strict=True))
        return torch.func.functional_call(combination, own, (h,))

    # functional_call calls forward, and the value is that of combine.
    combination.forward = combination.combine
    leaves = [embeddings(4), *(p.detach() for p in combination.parameters())]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(value, leaves)
    assert torch.autograd.gradgradcheck(value, leaves)


@BOTH
def test_the_readme_has_the_derivative_of_the_embedding(rule):
    """∂z/∂h_i = a_i I + a_i (h_i - z) (∂s_i/∂h_i)ᵀ/τ."""
    combination = made(rule, temperature=0.5)
    h = embeddings()
    found = torch.func.jacrev(combination.combine)(h)
    a, z = combination.attention_weights(h), combination.combine(h)
    V, w = combination.V.weight, combination.w.weight[0]
    t = torch.tanh(h @ V.T)
    if rule is AttentionCombination:
        of_score = (w * (1 - t**2)) @ V
    else:
        U = combination.U.weight
        g = torch.sigmoid(h @ U.T)
        of_score = (w * g * (1 - t**2)) @ V + (w * t * g * (1 - g)) @ U
    outer = torch.einsum("i,ia,ib->aib", a, h - z, of_score / 0.5)
    close(found, torch.einsum("i,ab->aib", a, torch.eye(3, dtype=h.dtype)) + outer)


class PoseModel(torch.nn.Module):
    """Three features of a pose, with dropout."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(5, 8), torch.nn.SiLU(), torch.nn.Dropout(0.3), torch.nn.Linear(8, 3)
        )

    def forward(self, pose):
        return self.layers(pose)


def loss_on_results(results, pose_outputs):
    return (results - 0.3).square().sum()


def loss_on_poses(results, pose_outputs):
    return (pose_outputs + 1.0).cos().sum()


def loss_on_both(results, pose_outputs):
    return loss_on_results(results, pose_outputs) * (1 + loss_on_poses(results, pose_outputs))


LOSSES = [loss_on_results, loss_on_poses, loss_on_both]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("chunk_size", [None, 3], ids=["poses", "chunks"])
@pytest.mark.parametrize("dropout", [0.0, 0.4], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("gradients", ["graph", "recomputed"])
@READOUT
@BOTH
def test_gradients_equal_plain_autograd(rule, readout, gradients, dropout, chunk_size, loss):
    """Ragged compounds, the same random numbers in the pose model and in the gate."""
    combination = made(rule, readout=readout, dropout=dropout, learnable=True)
    pose_model = PoseModel().double()
    collate = torch.stack if chunk_size else None
    model = MultiPoseModel(
        pose_model, combination, gradients=gradients, collate=collate, chunk_size=chunk_size
    )
    poses = torch.randn(sum(SIZES), 5, dtype=torch.float64)
    params = list(model.parameters())

    torch.manual_seed(3)
    chunks = poses.split(chunk_size) if chunk_size else poses[:, None]
    plain = torch.cat([pose_model(chunk) for chunk in chunks])
    results = torch.stack([combination.combine(own) for own in plain.split(SIZES)])
    expected = torch.autograd.grad(loss(results, plain), params, materialize_grads=True)

    torch.manual_seed(3)
    out = model(poses, SIZES)
    found = torch.autograd.grad(loss(*out), params, materialize_grads=True)
    assert out.prediction.shape == ((len(SIZES),) if readout else (len(SIZES), 3))
    torch.testing.assert_close(out.prediction, results, rtol=1e-12, atol=1e-13)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-10 * theirs.abs().max()


@BOTH
def test_stored_gives_the_gradients_of_graph(rule):
    poses = torch.randn(sum(SIZES), 5, dtype=torch.float64)
    found = []
    for gradients in ("graph", "stored"):
        combination = made(rule, dropout=0.4)
        torch.manual_seed(3)
        model = MultiPoseModel(PoseModel().double(), combination, gradients=gradients)
        loss = loss_on_both(*model(poses, SIZES))
        found.append(torch.autograd.grad(loss, list(model.parameters())))
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).abs().max() <= 1e-10 * theirs.abs().max()


@READOUT
@BOTH
def test_a_batch_of_compounds_gives_the_numbers_of_each_compound(rule, readout):
    combination = made(rule, readout=readout, temperature=0.7, learnable=True)
    model = MultiPoseModel(torch.nn.Identity(), combination)
    h = embeddings(sum(SIZES)).requires_grad_()
    together = model(list(h), SIZES).prediction
    close(together, torch.stack([combination.combine(own) for own in h.split(SIZES)]))
    batch = torch.func.vmap(combination.combine)(h[:20].view(5, 4, 3))
    close(batch, torch.stack([combination.combine(own) for own in h[:20].split(4)]))


@BOTH
def test_dropout_zeroes_hidden_units_of_each_pose(rule):
    combination = made(rule, dropout=0.25)
    h = embeddings()
    torch.manual_seed(2)
    found = combination.combine(h)
    torch.manual_seed(2)
    keep = torch.nn.functional.dropout(torch.ones(6, 4, dtype=torch.float64), 0.25)
    assert {*keep.flatten().tolist()} == {0.0, 1 / 0.75}
    close(found, by_the_paper(combination, h, keep)[1])
    torch.manual_seed(2)
    close(combination.reference(h), found)


@BOTH
def test_dropout_draws_anew_in_training_mode_only(rule):
    combination, without = made(rule, dropout=0.25), made(rule)
    h = embeddings()
    assert combination.stochastic
    assert not combination.properties
    assert not torch.equal(combination.combine(h), combination.combine(h))
    combination.eval()
    assert not combination.stochastic
    assert combination.properties == without.properties
    state = torch.get_rng_state()
    assert torch.equal(combination.combine(h), without.combine(h))
    assert torch.equal(torch.get_rng_state(), state)


def test_attention_weights_have_no_dropout():
    combination, without = made(AttentionCombination, dropout=0.25), made(AttentionCombination)
    state = torch.get_rng_state()
    weights = combination.attention_weights(embeddings())
    assert torch.equal(weights, without.attention_weights(embeddings()))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("convert", [list, torch.tensor], ids=["list", "tensor"])
@BOTH
def test_attention_weights_of_each_compound_sum_to_one(rule, convert):
    combination = made(rule)
    h = embeddings(sum(SIZES))
    weights = combination.attention_weights(h, convert(SIZES))
    assert weights.shape == (sum(SIZES),)
    for own, of_compound in zip(h.split(SIZES), weights.split(SIZES), strict=True):
        close(of_compound, combination.attention_weights(own))
        close(of_compound.sum().item(), 1.0)
        close(of_compound @ own, combination.combine(own))


@pytest.mark.parametrize("gradients", ["graph", "recomputed"])
def test_a_loss_may_use_the_attention_weights(gradients):
    """The entropy of the attention, through the pose outputs of the model."""
    combination = made(GatedAttentionCombination)
    torch.manual_seed(3)
    pose_model = PoseModel().double().eval()
    model = MultiPoseModel(pose_model, combination, gradients=gradients)
    poses = torch.randn(6, 5, dtype=torch.float64)
    params = list(model.parameters())

    def entropy(h):
        weights = combination.attention_weights(h)
        return -(weights * weights.log()).sum()

    found = torch.autograd.grad(entropy(model(poses).pose_predictions), params)
    expected = torch.autograd.grad(entropy(pose_model(poses)), params)
    for ours, theirs in zip(found, expected, strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@READOUT
@BOTH
def test_half_precision_is_that_of_float32_rounded_once(rule, readout, dtype):
    h = embeddings(16).to(dtype)
    combination = made(rule, readout=readout).float()
    value = combination.combine(h)
    assert torch.equal(value, combination.combine(h.float()).to(dtype))
    weights = combination.attention_weights(h)
    assert torch.equal(weights, combination.attention_weights(h.float()).to(dtype))


@pytest.mark.parametrize("own", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("given", [torch.float32, torch.float64])
def test_parameters_may_have_another_dtype_than_the_embeddings(own, given):
    combination = made(GatedAttentionCombination, readout=True, learnable=True).to(own)
    wide = copy.deepcopy(combination).double()
    h = embeddings().to(given)
    value = combination.combine(h)
    assert value.dtype == given
    # Parameters of float64 are rounded to the float32 of the embeddings.
    eps = 1e-12 if given == torch.float64 else 1e-5
    torch.testing.assert_close(value.double(), wide.combine(h.double()), rtol=eps, atol=eps)


def test_one_pose_has_all_the_attention():
    combination, h = made(AttentionCombination), embeddings(1)
    assert combination.attention_weights(h).tolist() == [1.0]
    assert torch.equal(combination.combine(h), h[0])


@BOTH
def test_equal_poses_share_the_attention(rule):
    h = embeddings(1).expand(4, 3)
    close(made(rule).attention_weights(h).tolist(), [0.25] * 4)


@pytest.mark.parametrize("temperature", [1e-300, 1e-50, 1e-6])
@pytest.mark.parametrize("learnable", [False, True], ids=["fixed", "learnable"])
def test_a_vanishing_temperature_selects_the_pose_with_the_highest_score(temperature, learnable):
    combination = made(AttentionCombination, temperature=temperature, learnable=learnable)
    h = embeddings().requires_grad_()
    best = made(AttentionCombination).attention_weights(h).argmax()
    pooled = combination.combine(h)
    assert torch.equal(pooled, h[best])
    gradients = torch.autograd.grad(pooled.sum(), [h, *combination.parameters()])
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("temperature", [1e9, 1e50, 1e300])
@pytest.mark.parametrize("learnable", [False, True], ids=["fixed", "learnable"])
def test_an_infinite_temperature_gives_the_mean(temperature, learnable):
    combination = made(AttentionCombination, temperature=temperature, learnable=learnable)
    h = embeddings().requires_grad_()
    pooled = combination.combine(h)
    torch.testing.assert_close(pooled, h.mean(0), rtol=1e-8, atol=1e-8)  # 1/τ
    gradients = torch.autograd.grad(pooled.sum(), [h, *combination.parameters()])
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_large_embeddings_saturate_the_score():
    combination = made(GatedAttentionCombination)
    h = 1e30 * embeddings()
    weights = combination.attention_weights(h)
    bound = combination.w.weight.abs().sum()  # |s_i| is at most the sum of |w|
    assert (weights >= torch.exp(-2 * bound) / 6).all()
    assert combination.combine(h).isfinite().all()


def test_nan_in_gives_nan_out():
    h = embeddings()
    h[2, 1] = torch.nan
    assert made(GatedAttentionCombination).combine(h).isnan().all()


WRONG = {
    "n_features": (0, "n_features must be at least 1; found 0$"),
    "n_hidden": (0, "n_hidden must be at least 1; found 0$"),
    "dropout": (1.0, "dropout must be at least 0 and below 1; found 1.0$"),
    "temperature": (0.0, "temperature and 1/temperature must be positive and finite; found .* 0.0"),
}


@pytest.mark.parametrize("name", WRONG)
@BOTH
def test_an_argument_out_of_range_is_refused(rule, name):
    value, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        rule(**{"n_features": 3} | {name: value})


@BOTH
def test_a_model_of_other_features_is_refused_with_the_number(rule):
    model = MultiPoseModel(torch.nn.Identity(), made(rule))
    with pytest.raises(ValueError, match=r"3.*found shape \(4,\)"):
        model(torch.zeros(2, 4))


@BOTH
def test_the_seed_decides_the_start(rule):
    one, same = made(rule, readout=True), made(rule, readout=True)
    torch.manual_seed(6)
    other = rule(3, 4, readout=True).double()
    for name, param in one.named_parameters():
        assert torch.equal(param, same.get_parameter(name))
        assert not torch.equal(param, other.get_parameter(name))


@BOTH
def test_it_starts_as_linear_layers_do(rule):
    """Uniform within ±1/√n_in."""
    torch.manual_seed(0)
    combination = rule(100, 25)
    layers = [combination.V, combination.w] + ([combination.U] if hasattr(combination, "U") else [])
    for layer in layers:
        bound = layer.in_features**-0.5
        assert 0.8 * bound < layer.weight.abs().max() <= bound
        assert layer.bias is None


@BOTH
def test_it_survives_copies(rule):
    combination = made(rule, readout=True, temperature=0.5, learnable=True)
    h = embeddings()
    pickled = pickle.loads(pickle.dumps(combination))
    for twin in (copy.deepcopy(combination), pickled):
        assert repr(twin) == repr(combination)
        assert torch.equal(twin.combine(h), combination.combine(h))
        assert all(
            ours is not theirs
            for ours, theirs in zip(twin.parameters(), combination.parameters(), strict=True)
        )


@BOTH
def test_a_checkpoint_restores_the_trained_numbers(rule):
    poses = torch.randn(6, 5, dtype=torch.float64)
    trained = MultiPoseModel(
        PoseModel().double(), made(rule, readout=True, temperature=0.5, learnable=True)
    )
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    trained(poses).prediction.square().backward()
    optimizer.step()
    fresh = MultiPoseModel(PoseModel(), rule(3, 4, readout=True, learnable=True)).double()
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh.eval()(poses).prediction, trained.eval()(poses).prediction)
    # Without a readout, the model predicts something else.
    other = MultiPoseModel(PoseModel(), rule(3, 4, learnable=True)).double()
    with pytest.raises(CheckpointError, match="readout=False"):
        other.load_state_dict(trained.state_dict(), strict=False)


def test_it_shows_its_arguments():
    text = repr(made(AttentionCombination, dropout=0.1))
    assert "n_features=3, n_hidden=4, dropout=0.1, readout=False, temperature=1.0" in text


@BOTH
def test_every_parameter_trains(rule):
    torch.manual_seed(0)
    combination = made(rule, readout=True, learnable=True)
    model = MultiPoseModel(PoseModel().double(), combination, gradients="recomputed")
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    model(torch.randn(6, 5, dtype=torch.float64)).prediction.square().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    same = [name for name, param in model.named_parameters() if torch.equal(param, before[name])]
    assert not same
