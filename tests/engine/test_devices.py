"""The same gradients on every device that there is, random numbers and half precision included."""

import pytest
import torch
from torch import Tensor

from mtenn_core import Combination, MultiPoseModel
from mtenn_core._engine.mode_table import MODES

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    ),
]
SIZES = [1, 4, 2]


class SmoothMinimum(Combination):
    pose_inputs = ("prior",)

    def combine(self, predictions: Tensor, prior: Tensor) -> Tensor:
        return -torch.logsumexp(-predictions - prior, dim=0)

    def pose_weights(self, predictions: Tensor, prior: Tensor) -> Tensor:
        return torch.softmax(-predictions - prior, dim=0)


@pytest.fixture(params=DEVICES)
def device(request):
    return torch.device(request.param)


@pytest.fixture
def poses(poses, device):
    return poses.to(device)


@pytest.fixture
def pose_model(pose_model, device):
    pose_model.insert(2, torch.nn.Dropout(0.5))
    return pose_model.to(device)


def gradients_of(loss, params):
    return torch.autograd.grad(loss, list(params))


@pytest.mark.parametrize("gradients", MODES)
def test_gradients_equal_plain_autograd(pose_model, poses, device, gradients):
    prior = torch.randn(7)  # on the CPU, and float32
    torch.manual_seed(1)
    plain = torch.cat([pose_model(pose) for pose in poses])
    wide = prior.to(plain)
    rule = SmoothMinimum()
    parts = zip(plain.split(SIZES), wide.split(SIZES), strict=True)
    combined = torch.stack([rule.combine(*part) for part in parts])
    expected = gradients_of(combined.square().sum() + plain.sin().sum(), pose_model.parameters())
    torch.manual_seed(1)
    model = MultiPoseModel(pose_model, rule, gradients=gradients)
    out = model(poses, sizes=SIZES, pose_inputs={"prior": prior})
    assert out.prediction.device.type == device.type
    loss = out.prediction.square().sum() + out.pose_predictions.sin().sum()
    for found, gradient in zip(gradients_of(loss, pose_model.parameters()), expected, strict=True):
        # Sums of a few hundred float64 products, in another order.
        torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gradients", ["stored", "recomputed"])
def test_half_precision_is_that_of_graph(pose_model, poses, device, gradients, dtype):
    found = []
    for mode in ("graph", gradients):
        torch.manual_seed(1)
        model = MultiPoseModel(pose_model.float(), SmoothMinimum(), gradients=mode)
        with torch.autocast(device.type, dtype=dtype):
            out = model(poses.float(), pose_inputs={"prior": torch.zeros(7)})
        scaled = gradients_of(out.prediction * 2**8, pose_model.parameters())
        found.append(torch.cat([g.flatten() for g in scaled]) / 2**8)
    # A few roundings in a row, in each of some ten products.
    assert (found[1] - found[0]).norm() < 8 * torch.finfo(dtype).eps * found[0].norm()


def test_an_estimate_knows_how_much_memory_is_free(pose_model, poses):
    estimate = MultiPoseModel(pose_model, SmoothMinimum()).estimate(
        poses, pose_inputs={"prior": [0.0] * 7}
    )
    assert estimate.n_with_weight == 7
    assert estimate.free is None or estimate.free > 0
