"""Scoring without gradients: all modes, in evaluation mode, with and without inference mode."""

import pytest
import torch

from mtenn_core import Combination, MultiPoseModel
from mtenn_core.errors import PredictionError

SIZES = [5, 1, 5, 3]
MODES = pytest.mark.parametrize("gradients", ["graph", "stored", "recomputed"])
WITHOUT_GRADIENTS = pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])


class LogSumExp(Combination):
    def combine(self, predictions):
        return torch.logsumexp(predictions, 0)


@pytest.fixture
def pose_model():
    """A model whose dropout and BatchNorm would give other numbers in training mode."""
    torch.manual_seed(0)
    layers = torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(), torch.nn.Flatten()
    model = torch.nn.Sequential(*layers, torch.nn.Linear(8, 1)).double()
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2.0)
    return model


@pytest.fixture
def poses():
    """Batches of one pose each, since BatchNorm wants a batch."""
    torch.manual_seed(1)
    return list(torch.randn(sum(SIZES), 1, 4, dtype=torch.float64))


@pytest.mark.parametrize("collated", [False, True], ids=["one by one", "collated"])
@WITHOUT_GRADIENTS
@MODES
def test_scores_are_those_of_autograd_in_evaluation_mode(
    pose_model, poses, gradients, context, collated
):
    pose_model.eval()
    y = pose_model(torch.cat(poses))[:, 0].detach().requires_grad_()
    expected = torch.stack([torch.logsumexp(own, 0) for own in y.split(SIZES)])
    (weights,) = torch.autograd.grad(expected.sum(), y)

    model = MultiPoseModel(pose_model, LogSumExp(), gradients=gradients).eval()
    with context():
        out = model(torch.cat(poses) if collated else poses, SIZES, collated=collated)
        found = model.pose_weights(out.pose_predictions, SIZES)
    # float64; a matrix product of many rows may add in another order than that of one
    torch.testing.assert_close(out.prediction, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, weights, rtol=1e-12, atol=1e-12)
    assert not out.prediction.requires_grad


@WITHOUT_GRADIENTS
@MODES
def test_a_model_trains_on_after_it_has_scored(pose_model, poses, gradients, context):
    pose_model.eval()
    params = list(pose_model.parameters())
    expected = torch.autograd.grad(
        torch.logsumexp(pose_model(torch.cat(poses))[:, 0], 0).square(), params
    )
    model = MultiPoseModel(pose_model, LogSumExp(), gradients=gradients)
    with context():
        model.pose_weights(model(poses, SIZES).pose_predictions, SIZES)
    found = torch.autograd.grad(model(poses).prediction.square(), params)
    # float64; the poses' gradients are added in another order
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("sizes", "compound"), [([0, 14], 0), ([14, 0], 1), ([0], 0), ([0, 0, 0], 0)]
)
@MODES
def test_the_error_has_the_index_of_the_compound_without_poses(
    pose_model, poses, gradients, sizes, compound
):
    model = MultiPoseModel(pose_model, LogSumExp(), gradients=gradients).eval()
    with torch.inference_mode(), pytest.raises(PredictionError, match="found") as raised:
        model(poses[: sum(sizes)], sizes)
    assert raised.value.compound == compound
    assert raised.value.pose is None
