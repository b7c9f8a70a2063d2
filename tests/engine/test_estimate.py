import weakref

import pytest
import torch
from torch import Tensor

from mtenn_core import Combination, MultiPoseModel
from mtenn_core._engine.autograd_nodes import operations
from mtenn_core._engine.cost import ModeCost
from mtenn_core._engine.estimate import NODE, choose
from mtenn_core._engine.mode_table import MODES
from mtenn_core.errors import GradientError


class SmoothMinimum(Combination):
    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def combine(self, predictions: Tensor) -> Tensor:
        return -torch.logsumexp(-self.scale * predictions, dim=0) / self.scale


class FullDepth(Combination):
    def forward(self, *args):
        return SmoothMinimum()(*args)


def costs(estimate):
    return {cost.gradients: cost[1:3] for cost in estimate.modes}


def test_passes_are_those_that_a_step_makes(pose_model, poses):
    for gradients in MODES:
        model = MultiPoseModel(pose_model, SmoothMinimum(1e5), gradients=gradients)
        estimate = model.estimate(poses)
        assert estimate.n_with_weight == 1
        assert costs(estimate) == {"graph": (7, 1), "stored": (7, 7), "recomputed": (8, 1)}
        runs = []
        hook = pose_model.register_forward_pre_hook(lambda *args, runs=runs: runs.append(1))
        model(poses).prediction.backward()
        hook.remove()
        assert len(runs) == costs(estimate)[gradients][0]


def test_chunks_are_counted_where_poses_run_together(pose_model, poses):
    model = MultiPoseModel(pose_model, SmoothMinimum(), collate=torch.stack, chunk_size=3)
    found = costs(model.estimate(poses, sizes=[3, 4]))
    assert found == {"graph": (3, 3), "stored": (7, 7), "recomputed": (6, 3)}


def test_memory_is_that_of_graphs_and_gradients():
    """One layer saves its input, 8 bytes a number, and the other nothing more: it is the same."""

    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(100, 1).double()

        def forward(self, pose):
            return self.layer(pose) + self.layer(pose)

    poses = [torch.randn(100).double() for _ in range(5)]
    estimate = MultiPoseModel(Twice(), SmoothMinimum()).estimate(poses)
    assert estimate.graph == 800
    assert estimate.parameters == (gradient := 808)
    bare = NODE * len(operations(Twice()(poses[0])))
    assert {cost.gradients: cost.memory for cost in estimate.modes} == {
        "graph": 5 * (800 + bare) + 2 * gradient,
        "stored": 800 + bare + 7 * gradient,
        "recomputed": 800 + 5 * bare + 2 * gradient,
    }


def test_stored_gradients_of_half_precision_are_counted_as_float32(poses):
    def stored(n_poses):
        pose_model = torch.nn.Linear(4, 1).bfloat16()
        own = [pose.bfloat16() for pose in poses[:n_poses]]
        estimate = MultiPoseModel(pose_model, SmoothMinimum()).estimate(own)
        return next(cost.memory for cost in estimate.modes if cost.gradients == "stored")

    assert stored(7) - stored(6) == 5 * 4  # weights and bias, 4 bytes each


def test_one_batch_is_one_chunk_and_cannot_be_stored(pose_model, poses):
    model = MultiPoseModel(pose_model, SmoothMinimum(1e6))
    estimate = model.estimate(poses, sizes=[3, 4], collated=True)
    assert costs(estimate) == {"graph": (1, 1), "recomputed": (2, 1)}


def test_poses_that_are_never_left_out_are_counted(pose_model, poses):
    """Attention looks at what it saved even where it has no gradient."""

    class Attention(torch.nn.Module):
        def forward(self, pose):
            hidden = pose_model[:2](pose)[None, None, None]
            attended = torch.nn.functional.scaled_dot_product_attention(hidden, hidden, hidden)
            return pose_model[2](attended).sum()

    estimate = MultiPoseModel(Attention(), SmoothMinimum(1e6)).estimate(poses)
    assert estimate.n_with_weight == 1
    assert costs(estimate)["recomputed"] == (2 * len(poses), len(poses))


def test_a_lazy_module_asks_for_a_first_run(poses):
    with pytest.raises(GradientError, match="run the pose model once"):
        MultiPoseModel(torch.nn.LazyLinear(1), SmoothMinimum()).estimate(poses)


def test_without_skipping_all_poses_are_counted(pose_model, poses):
    estimate = MultiPoseModel(pose_model, SmoothMinimum(1e6), skip_below=None).estimate(poses)
    assert estimate.n_with_weight == len(poses)


def test_an_estimate_keeps_no_graph(pose_model, poses):
    storages = []

    class Tracking(torch.nn.Module):
        def forward(self, pose):
            hidden = pose_model(pose)
            assert not any(storage() is not None for storage in storages[:-1])
            storages.append(weakref.ref(hidden.untyped_storage()))
            return hidden * hidden

    MultiPoseModel(Tracking(), SmoothMinimum()).estimate(poses)
    assert len(storages) == len(poses)


def test_an_estimate_leaves_no_trace(pose_model, poses):
    pose_model.insert(1, torch.nn.BatchNorm1d(8).double())
    pose_model.insert(2, torch.nn.Dropout(0.5))
    # A batch of one has no variance: they must be measured in the chunks of the mode.
    model = MultiPoseModel(pose_model, SmoothMinimum(), collate=torch.stack, chunk_size=7)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(0)
    drawn = torch.rand(1)
    torch.manual_seed(0)
    model.estimate(poses)
    assert torch.equal(torch.rand(1), drawn)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(param.grad is None for param in model.parameters())


@pytest.mark.parametrize("option", [{"chunk_size": 4}, {"skip_below": 1e-3}], ids=str)
def test_options_of_other_modes_do_not_stop_it(pose_model, poses, option):
    model = MultiPoseModel(pose_model, SmoothMinimum(), collate=torch.stack, **option)
    expected = model.estimate(poses)
    model.gradients = "stored"
    with pytest.raises(ValueError, match="gradients='stored'"):
        model(poses)
    assert costs(model.estimate(poses)) == costs(expected)


def test_a_mode_that_the_combination_excludes_does_not_stop_it(pose_model, poses):
    model = MultiPoseModel(pose_model, FullDepth(), gradients="stored")
    model.gradients = "graph"
    assert [cost.gradients for cost in model.estimate(poses).modes] == ["stored"]


def test_full_depth_has_one_mode(pose_model, poses):
    model = MultiPoseModel(pose_model, FullDepth(), gradients="stored")
    assert [cost.gradients for cost in model.estimate(poses).modes] == ["stored"]


@pytest.mark.parametrize(
    ("free", "best"),
    [(None, "graph"), (2000, "graph"), (1999, "recomputed"), (1, "recomputed")],
)
def test_the_fastest_that_fits_into_half_of_the_memory_is_best(free, best):
    modes = (
        ModeCost("graph", 10, 1, 1000),
        ModeCost("stored", 10, 10, 500),
        ModeCost("recomputed", 11, 1, 100),
    )
    assert choose(modes, free) == best


def test_dense_weights_are_stored_where_that_fits_and_the_graphs_do_not():
    modes = (
        ModeCost("graph", 10, 10, 1000),
        ModeCost("stored", 10, 10, 500),
        ModeCost("recomputed", 20, 10, 100),
    )
    assert choose(modes, 1500) == "stored"
    assert choose(modes, 500) == "recomputed"


def test_a_backward_takes_twice_as_long_as_a_forward():
    modes = (ModeCost("stored", 10, 10, 100), ModeCost("recomputed", 15, 5, 100))
    assert choose(modes, None) == "recomputed"


def test_it_prints_as_a_table(pose_model, poses):
    lines = str(MultiPoseModel(pose_model, SmoothMinimum(1e5)).estimate(poses)).splitlines()
    assert lines[0].startswith("7 poses, 1 with a weight that is not zero; the graph of one: ")
    assert [line.split()[:3] for line in lines[1:]] == [
        ["gradients", "forwards", "backwards"],
        ["graph", "7", "1"],
        ["stored", "7", "7"],
        ["recomputed", "8", "1"],
    ]
    assert lines[2].endswith("<- take this")


def test_a_pose_model_that_takes_gradients_is_measured(pose_model, poses):
    class Forces(torch.nn.Module):
        def forward(self, pose):
            pose = pose.detach().requires_grad_()
            energy = pose_model(pose)
            (force,) = torch.autograd.grad(energy.sum(), pose, create_graph=True)
            return energy + force.square().sum()

    assert MultiPoseModel(Forces(), SmoothMinimum()).estimate(poses).graph > 0
