"""Backward skips poses without weight, and torch still computes the right gradients."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mtenn_core import Combination, MultiPoseModel

MODES = ("graph", "recomputed")


class Largest(Combination):
    def combine(self, predictions: Tensor) -> Tensor:
        return predictions.max()


class Minimum(Combination):
    """The smallest prediction, so that all other poses have no weight."""

    def combine(self, predictions: Tensor) -> Tensor:
        return predictions.min()


def definite(h: Tensor) -> Tensor:
    return h.mT @ h + torch.eye(4, dtype=h.dtype)


def triangle(h: Tensor) -> Tensor:
    return torch.linalg.cholesky(definite(h))


ROWS = torch.tensor([0, 1, 1, 2, 3, 0])
# Of h, shape (6, 4), which depends on the pose, and w, shape (4, 4). Nodes with several results are
# called where they have no gradient, too; of torch's, these are the kinds that a CPU has.
OPERATIONS = {
    "atan2": lambda h, w: torch.atan2(h, w[0]),
    "attention": lambda h, w: F.scaled_dot_product_attention(*[h[None, None]] * 3),
    "batch_norm": lambda h, w: F.batch_norm(h, None, None, w[0], w[1], training=True),
    "bilinear": lambda h, w: F.bilinear(h, h, w.expand(3, 4, 4)),
    "cdist": lambda h, w: torch.cdist(h, w),
    "cdist, many rows": lambda h, w: torch.cdist(h.repeat(6, 1), w),
    "cholesky": lambda h, w: triangle(h),
    "cholesky_solve": lambda h, w: torch.cholesky_solve(w, triangle(h)),
    "clamp": lambda h, w: torch.clamp(h, w[0], w[1]),
    "conv": lambda h, w: F.conv2d(h[None, None], w[None, None]),
    "cross_entropy": lambda h, w: F.cross_entropy(h, ROWS),
    "eig": lambda h, w: torch.linalg.eig(definite(h))[0].abs(),
    "eigh": lambda h, w: torch.linalg.eigh(definite(h))[1].abs(),
    "einsum": lambda h, w: torch.einsum("ij,jk,il->kl", h, w, h),
    "embedding_bag": lambda h, w: F.embedding_bag(ROWS[:3], h, ROWS[:2], mode="max"),
    "grid_sample": lambda h, w: F.grid_sample(
        h[None, None], torch.tanh(w).reshape(1, 4, 2, 2), align_corners=False
    ),
    "group_norm": lambda h, w: F.group_norm(h, 2, w[0], w[1]),
    "gru": lambda h, w: torch.gru(h[:, None], w[:1][None], [w.repeat(3, 1)] * 2, False, 1, 0.0,
                                  True, False, False)[0],
    "householder": lambda h, w: torch.linalg.householder_product(h, w[0]),
    "index_reduce": lambda h, w: w.index_reduce(0, ROWS, h, "mean"),
    "layer_norm": lambda h, w: F.layer_norm(h, (4,), w[0], w[1]),
    "lstm": lambda h, w: torch.lstm(h[:, None], [w[:1][None]] * 2, [w.repeat(4, 1)] * 2, False, 1,
                                    0.0, True, False, False)[0],
    "lstsq": lambda h, w: torch.linalg.lstsq(h, h.square() @ w)[0],
    "matmul": lambda h, w: h @ w,
    "matmul, batched": lambda h, w: h.expand(2, 3, 6, 4) @ w,
    "max_pool": lambda h, w: F.max_pool1d(h, 2),
    "ormqr": lambda h, w: torch.ormqr(w, w[0], h, left=False),
    "polar": lambda h, w: torch.polar(h.abs(), h).abs(),
    "prelu": lambda h, w: F.prelu(h, w[0]),
    "qr": lambda h, w: torch.linalg.qr(h)[1].abs(),
    "rms_norm": lambda h, w: F.rms_norm(h, (4,), w[0]),
    "scatter_reduce": lambda h, w: w.scatter_reduce(0, ROWS[:, None].expand(6, 4), h, "prod"),
    "slogdet": lambda h, w: torch.linalg.slogdet(definite(h))[1],
    "solve": lambda h, w: torch.linalg.solve(definite(h), w),
    "solve_triangular": lambda h, w: torch.linalg.solve_triangular(triangle(h), w, upper=False),
    "sort": lambda h, w: h.sort(0)[0],
    "sparse": lambda h, w: torch.sparse.mm(h.to_sparse(), w),
    "std_mean": lambda h, w: sum(torch.std_mean(h, 0)),
    "svd": lambda h, w: torch.linalg.svd(h, full_matrices=False)[0].abs(),
    "weight_norm": lambda h, w: h @ torch._weight_norm(w, w.norm(dim=1, keepdim=True), 0),
}  # fmt: skip


class Operation(torch.nn.Module):
    def __init__(self, operation, dtype):
        super().__init__()
        self.operation = operation
        self.first = torch.nn.Linear(4, 4, dtype=dtype)
        self.second = torch.nn.Parameter(torch.randn(4, 4, dtype=dtype))

    def forward(self, pose):
        return self.operation(self.first(pose), self.second).sum()


# In float32, recurrent layers have another node.
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.filterwarnings("ignore:index_reduce.. is in beta")
def test_no_operation_minds_that_its_pose_is_left_out(operation, dtype):
    poses = torch.randn(5, 6, 4, dtype=dtype)
    pose_model = Operation(OPERATIONS[operation], dtype)
    lowest = min(range(5), key=[pose_model(pose).item() for pose in poses].__getitem__)
    pose_model(poses[lowest]).backward()
    expected = [None if p.grad is None else p.grad.clone() for p in pose_model.parameters()]
    for gradients in MODES:
        pose_model.zero_grad()
        MultiPoseModel(pose_model, Minimum(), gradients=gradients)(poses).prediction.backward()
        for param, gradient in zip(pose_model.parameters(), expected, strict=True):
            assert (param.grad is None) == (gradient is None)
            if gradient is not None:
                # The same operations on one pose, some of which add in another order each time.
                eps = 1000 * torch.finfo(dtype).eps
                torch.testing.assert_close(param.grad, gradient, rtol=eps, atol=eps)


@pytest.mark.parametrize("gradients", MODES)
def test_an_infinite_weight_spoils_the_gradient_as_autograd_does(pose_model, poses, gradients):
    """A GradScaler has to see it, and a fraction of infinity is infinite."""
    model = MultiPoseModel(pose_model, Minimum(), gradients=gradients, skip_below=1e-3)
    weights = torch.ones(7, dtype=torch.float64)
    weights[2] = torch.inf
    model(poses).pose_predictions.backward(weights)
    assert not pose_model[2].weight.grad.isfinite().any()


class Double(torch.autograd.Function):
    """A Function in Python, which may compute something where it has no gradient."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


@pytest.mark.parametrize("gradients", MODES)
def test_what_poses_share_makes_none_of_them_run(poses, gradients):
    """A receptor, say, computed once. The pose at √0 has no weight and an infinite gradient."""
    receptor = torch.ones(4, dtype=torch.float64, requires_grad=True)
    shared = Double.apply(receptor)

    class Distance(torch.nn.Module):
        def forward(self, pose):
            return (pose * shared).square().sum().sqrt()

    poses[0] = 0.0
    MultiPoseModel(Distance(), Largest(), gradients=gradients)(poses).prediction.backward()
    assert receptor.grad.isfinite().all()


class Clipped(torch.nn.Module):
    """With a hook that cannot do without a tensor."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, pose):
        hidden = self.inner[:2](pose)
        hidden.register_hook(lambda gradient: gradient.clamp(-1, 1))
        return self.inner[2](hidden)


@pytest.mark.parametrize("gradients", MODES)
def test_none_left_out_hands_zeros_to_hooks(pose_model, poses, gradients):
    model = MultiPoseModel(Clipped(pose_model), Minimum(), gradients=gradients)
    with pytest.raises(AttributeError, match="NoneType"):
        model(poses).prediction.backward()
    pose_model.zero_grad()
    model.skip_below = None
    model(poses).prediction.backward()
    found = pose_model[0].weight.grad.clone()
    pose_model.zero_grad()
    model.pose_model(poses[model(poses).pose_predictions.argmin()]).backward()
    torch.testing.assert_close(found, pose_model[0].weight.grad, rtol=0, atol=1e-15)
