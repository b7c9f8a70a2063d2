"""Every shipped combination, in every mode, on an MLP and on SchNet, against plain autograd."""

import pytest
import torch
from torch_geometric.data import Batch, Data
from torch_geometric.nn import SchNet

from mtenn_core import MultiPoseModel, as_mtenn_combination, registry
from mtenn_core._engine.mode_table import MODES

COMBINATIONS = {
    "mean": {},
    "max": {},
    "min": {"pred_scale": 1000.0},
    "min, free energy": {"pred_scale": 1 / 0.593, "normalize": True},
    "boltzmann": {"kT": 0.593},
    "boltzmann, learnable": {"kT": 0.593, "learnable": True},
    "max, learnable": {"learnable": True},
    "min, free energy, learnable": {"pred_scale": 1.7, "normalize": True, "learnable": True},
    "median": {},
    "quantile": {"q": 0.3},
    "top_k_mean": {"k": 2},
    "trimmed_mean": {"proportion": 0.3},
}
SHIPPED = {
    "attention": "mtenn-attention",
    "boltzmann": "mtenn-boltzmann",
    "confidence_weighted": "mtenn-attention",
    "gated_attention": "mtenn-attention",
    "max": "mtenn-max",
    "mean": "mtenn-mean",
    "median": "mtenn-ordered",
    "min": "mtenn-max",
    "quantile": "mtenn-ordered",
    "top_k_mean": "mtenn-ordered",
    "trimmed_mean": "mtenn-ordered",
}
SIZES = [1, 5, 3]


def complete_graph(pos, batch):
    """Every pair of atoms of one pose. SchNet's own search for neighbours is a compiled package."""
    edges = (batch[:, None] == batch).fill_diagonal_(False).nonzero().t()
    return edges, (pos[edges[0]] - pos[edges[1]]).norm(dim=-1)


class SchNetPose(torch.nn.Module):
    """One number for each graph of a batch, shape (n_poses, 1)."""

    def __init__(self):
        super().__init__()
        self.schnet = SchNet(
            hidden_channels=16,
            num_filters=16,
            num_interactions=2,
            num_gaussians=8,
            interaction_graph=complete_graph,
        )

    def forward(self, batch):
        return self.schnet(batch.z, batch.pos, batch.batch)


def mlp():
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.SiLU(), torch.nn.Linear(16, 1))
    return model.double(), list(torch.randn(9, 6, dtype=torch.float64)), torch.stack


def schnet():
    poses = [
        Data(z=torch.randint(1, 9, (n,)), pos=2 * torch.randn(n, 3, dtype=torch.float64))
        for n in (3, 7, 7, 6, 5, 7, 4, 8, 5)
    ]
    return SchNetPose().double(), poses, Batch.from_data_list


MODELS = {"MLP": mlp, "SchNet": schnet}


def losses(prediction, pose_predictions):
    combined, poses = (prediction + 3.0).square().sum(), (pose_predictions - 1.0).cos().sum()
    return {"combined": combined, "poses": poses, "sum": combined + poses}


@pytest.mark.parametrize("loss", ["combined", "poses", "sum"])
@pytest.mark.parametrize(
    ("gradients", "chunk_size"),
    [("graph", None), ("graph", 4), ("stored", None), ("recomputed", None), ("recomputed", 4)],
)
@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_plain_autograd(name, combination, gradients, chunk_size, loss):
    pose_model, poses, collate = MODELS[name]()
    rule = registry.create(combination.split(",")[0], **COMBINATIONS[combination]).double()
    model = MultiPoseModel(
        pose_model, rule, gradients=gradients, collate=collate, chunk_size=chunk_size
    )
    assert_gradients_equal_plain_autograd(model, poses, collate, loss)


@pytest.mark.parametrize("gradients", MODES)
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_gradients_equal_plain_autograd_under_dropout(combination, gradients):
    pose_model, poses, _ = MODELS["MLP"]()
    pose_model.insert(2, torch.nn.Dropout(0.5))
    rule = registry.create(combination.split(",")[0], **COMBINATIONS[combination]).double()
    model = MultiPoseModel(pose_model, rule, gradients=gradients)
    assert_gradients_equal_plain_autograd(model, poses, lambda batch: batch[0], "sum")


def assert_gradients_equal_plain_autograd(model, poses, collate, loss):
    pose_model, rule = model.pose_model, model.combination
    params = dict(model.named_parameters())
    torch.manual_seed(3)
    predictions = torch.cat([pose_model(collate([pose])).reshape(1) for pose in poses])
    combined = torch.stack([rule.combine(part) for part in predictions.split(SIZES)])
    reference = torch.autograd.grad(
        losses(combined, predictions)[loss], list(params.values()), allow_unused=True
    )
    torch.manual_seed(3)
    found = torch.autograd.grad(
        losses(*model(poses, sizes=SIZES))[loss], list(params.values()), allow_unused=True
    )
    for param_name, gradient, expected in zip(params, found, reference, strict=True):
        assert (gradient is None) == (expected is None), param_name
        if expected is not None:
            # Relative to the largest entry: single entries may cancel to nothing.
            error = (gradient - expected).abs().max() / expected.abs().max().clamp(min=1e-300)
            assert error <= 1e-10, f"{param_name}: {error:.1e}"


@pytest.mark.parametrize("combination", [c for c in COMBINATIONS if "learnable" not in c])
def test_every_shipped_combination_trains_in_the_model_of_mtenn(combination):
    """With the pair that it returns, from gradients that are stored in a dict."""
    pose_model, poses, _ = MODELS["MLP"]()
    rule = registry.create(combination.split(",")[0], **COMBINATIONS[combination])
    names, params = zip(*pose_model.named_parameters(), strict=True)
    plain = [pose_model(pose) for pose in poses]
    of_poses = [torch.autograd.grad(y, params, retain_graph=True) for y in plain]
    grad_dict = dict(zip(names, map(list, zip(*of_poses, strict=True)), strict=True))
    pair = as_mtenn_combination(rule)([y.detach() for y in plain], grad_dict, names, *params)
    together = torch.cat(plain)
    reference = torch.autograd.grad(losses(rule.combine(together), together)["sum"], params)
    found = torch.autograd.grad(losses(*pair)["sum"], params)
    for gradient, expected in zip(found, reference, strict=True):
        assert (gradient - expected).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_plugin_is_found_and_validated(name):
    assert name in registry
    assert registry.get(name).__name__ == f"{name.title().replace('_', '')}Combination"


def test_the_shipped_plugins_are_what_the_registry_lists():
    assert {r.name: r.distribution for r in registry.records()} == SHIPPED


@pytest.mark.parametrize("gradients", ["graph", "recomputed"])
def test_a_batch_that_a_loader_has_made_gives_what_its_poses_give(gradients):
    pose_model, poses, collate = MODELS["SchNet"]()
    rule = registry.create("boltzmann", kT=0.593)
    found = []
    for given, options in [(poses, {}), (collate(poses), {"collated": True})]:
        model = MultiPoseModel(pose_model, rule, gradients=gradients, collate=collate)
        model.zero_grad()
        out = model(given, sizes=SIZES, **options)
        losses(*out)["sum"].backward()
        found.append([out.prediction, *(param.grad.clone() for param in model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("gradients", MODES)
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_a_batch_of_compounds_gives_the_numbers_of_each_compound(combination, gradients):
    pose_model, _, _ = MODELS["MLP"]()
    rule = registry.create(combination.split(",")[0], **COMBINATIONS[combination]).double()
    model = MultiPoseModel(pose_model, rule, gradients=gradients)
    sizes = [3, 1, 5, 3, 1, 5, 3, 1, 5, 3]
    poses = torch.randn(sum(sizes), 6, dtype=torch.float64)
    params = list(model.parameters())

    together = model(poses, sizes)
    alone = [model(own) for own in poses.split(sizes)]
    combined = torch.stack([out.prediction for out in alone])
    of_poses = torch.cat([out.pose_predictions for out in alone])
    weights = [rule.pose_weights(out.pose_predictions.detach()).detach() for out in alone]
    expected = [combined, torch.cat(weights)]
    expected += torch.autograd.grad(losses(combined, of_poses)["sum"], params)
    found = [together.prediction, model.pose_weights(together.pose_predictions, sizes)]
    found += torch.autograd.grad(losses(*together)["sum"], params)
    for one, other in zip(found, expected, strict=True):
        # The same operations, in float64; sums run in another order.
        assert (one - other).abs().max() <= 1e-12 * other.abs().max()
