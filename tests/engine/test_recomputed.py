"""A pose that runs again: each test is a way in which the obvious implementation is wrong."""

import contextlib
import copy
import gc
import random
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

from mtenn_core import Combination, MultiPoseModel
from mtenn_core._engine import fingerprint, replay
from mtenn_core._engine.fingerprint import marks_of
from mtenn_core._engine.mode_table import MODES
from mtenn_core._engine.tensor_search import tensors_in
from mtenn_core.errors import ChangedBeforeBackwardError, DoubleBackwardError, GradientError

# Gradients are sums of a few hundred float64 products, in another order in each mode.
EXACT = {"rtol": 1e-12, "atol": 1e-13}


class SmoothMinimum(Combination):
    """Without a closed form; ``scale`` 1000 leaves one weight that is not zero."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def combine(self, predictions: Tensor) -> Tensor:
        return -torch.logsumexp(-self.scale * predictions, dim=0) / self.scale


class ClosedForm(SmoothMinimum):
    def pose_weights(self, predictions: Tensor) -> Tensor:
        return torch.softmax(-self.scale * predictions, dim=0)


class Counting(torch.nn.Module):
    """Counts the runs of a module, second runs included."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        # Not a number: the engine would put it back after a second run.
        self._tally = SimpleNamespace(n_runs=0)

    @property
    def n_runs(self) -> int:
        return self._tally.n_runs

    def reset(self):
        self._tally.n_runs = 0

    def forward(self, pose):
        self._tally.n_runs += 1
        return self.inner(pose)


def recomputed(pose_model, combination=None, **options):
    combination = combination or ClosedForm()
    return MultiPoseModel(pose_model, combination, gradients="recomputed", **options)


def gradients_of(model, *args, loss=None, **options):
    """Gradients of a loss on combined and pose predictions, by name."""
    model.zero_grad()
    out = model(*args, **options)
    (
        out.prediction.sum() + out.pose_predictions.sin().sum() if loss is None else loss(out)
    ).backward()
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] is None) == (gradient is None), name
        if gradient is not None:
            torch.testing.assert_close(
                found[name], gradient, **EXACT, msg=lambda text, name=name: f"{name}: {text}"
            )


def assert_like_graph(pose_model, *args, combination=None, loss=None, prepare=None, **options):
    """Both modes give the same gradients and leave the same buffers, from the same start."""
    found = []
    for gradients in ("graph", "recomputed"):
        torch.manual_seed(1)
        model = MultiPoseModel(
            copy.deepcopy(pose_model),
            combination or SmoothMinimum(),
            gradients=gradients,
            **options,
        )
        with (prepare or nullcontext)():
            found.append((gradients_of(model, *args, loss=loss), dict(model.named_buffers())))
            found[-1] += (torch.rand(1),)
    (graph, buffers, drawn), (again, buffers_again, drawn_again) = found
    assert_same(again, graph)
    for name in buffers:
        torch.testing.assert_close(buffers_again[name], buffers[name], rtol=0, atol=0)
    assert torch.equal(drawn, drawn_again)  # the caller's random numbers go on as they would


def test_only_poses_with_weight_run_again(pose_model, poses):
    counting = Counting(pose_model)
    model = recomputed(counting, ClosedForm(1e5))
    out = model(poses)
    weights = torch.softmax(-1e5 * out.pose_predictions.detach(), dim=0)
    assert (weights > 0).sum() == 1
    assert counting.n_runs == len(poses)
    out.prediction.backward()
    assert counting.n_runs == len(poses) + 1
    assert_same(
        gradients_of(model, poses),
        gradients_of(MultiPoseModel(counting, ClosedForm(1e5)), poses),
    )


def test_a_loss_on_one_pose_runs_that_pose_again(pose_model, poses):
    counting = Counting(pose_model)
    recomputed(counting)(poses).pose_predictions[3].backward()
    assert counting.n_runs == len(poses) + 1


def test_a_weight_that_is_nan_is_never_left_out(pose_model, poses):
    counting = Counting(pose_model)
    recomputed(counting)(poses).pose_predictions.backward(torch.full((7,), torch.nan).double())
    assert counting.n_runs == 2 * len(poses)
    assert all(p.grad.isnan().any() for p in pose_model.parameters())


@pytest.mark.parametrize("gradients", ["graph", "recomputed"])
def test_small_weights_are_left_out_on_request_within_the_bound(pose_model, poses, gradients):
    counting = Counting(pose_model)
    model = MultiPoseModel(counting, ClosedForm(20.0), gradients=gradients, skip_below=1e-2)
    exact = gradients_of(model_of_all := MultiPoseModel(counting, ClosedForm(20.0)), poses, loss=_y)
    predictions = model_of_all(poses).pose_predictions
    weights = torch.softmax(-20.0 * predictions.detach(), dim=0)
    small = weights <= 1e-2 * weights.max()
    assert 0 < small.sum() < 7
    bound = 0.0
    for weight, prediction in zip(weights[small], predictions[small], strict=True):
        own = torch.autograd.grad(prediction, list(pose_model.parameters()), retain_graph=True)
        bound += weight * torch.cat([g.flatten() for g in own]).norm()
    counting.reset()
    found = gradients_of(model, poses, loss=_y)
    assert counting.n_runs == 7 + (gradients == "recomputed") * (~small).sum()
    assert model.estimate(poses).n_with_weight == (~small).sum()
    error = torch.cat([(found[name] - exact[name]).flatten() for name in exact]).norm()
    assert 0 < error <= bound * (1 + 1e-12)  # the bound itself is a sum that is rounded


def _y(out):
    return out.prediction


def test_chunks_are_left_out_as_a_whole(pose_model, poses):
    counting = Counting(pose_model)
    out = recomputed(counting, collate=torch.stack, chunk_size=3)(poses)
    assert counting.n_runs == 3
    out.pose_predictions[4].backward()
    assert counting.n_runs == 4


class Shared(torch.nn.Module):
    """Has a parameter that only the first pose uses."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.first = (torch.nn.Linear(4, 1).double() for _ in range(2))

    def forward(self, pose):
        return self.first(pose[1:]) if pose[0] else self.always(pose[1:])


@pytest.mark.parametrize("gradients", ["graph", "recomputed"])
def test_a_parameter_of_a_pose_without_weight_gets_zeros_as_autograd_gives(gradients):
    poses = torch.randn(4, 5).double()
    poses[:, 0] = torch.tensor([1, 0, 0, 0])
    model = MultiPoseModel(Shared(), ClosedForm(), gradients=gradients)
    model(poses).pose_predictions[2].backward()
    assert model.pose_model.first.weight.grad.tolist() == [[0.0] * 4]
    assert model.pose_model.always.weight.grad.abs().sum() > 0


def test_a_loss_without_any_weight_gives_zeros_as_autograd_gives(pose_model, poses):
    """A censored loss, say; None would leave the optimizer's momentum out."""
    counting = Counting(pose_model)
    (recomputed(counting)(poses).prediction * 0).backward()
    assert all(p.grad.abs().sum() == 0 for p in pose_model.parameters())
    assert counting.n_runs == len(poses) + 1


@pytest.mark.parametrize("combination", [SmoothMinimum(), ClosedForm(), ClosedForm(1e5)])
def test_dropout_is_replayed(pose_model, poses, combination):
    pose_model.insert(2, torch.nn.Dropout(0.5))
    assert_like_graph(pose_model, poses, combination=combination)


@pytest.mark.parametrize("options", [{}, {"chunk_size": 4}, {"chunk_size": 7}], ids=str)
def test_batch_norm_sees_the_same_batches_and_is_updated_once(pose_model, poses, options):
    pose_model.insert(1, torch.nn.BatchNorm1d(8).double())
    if not options:
        pose_model.eval()  # a batch of one has no variance
    assert_like_graph(pose_model, poses, collate=torch.stack, **({"chunk_size": 1} | options))


def test_spectral_norm_iterates_once_per_forward(pose_model, poses):
    """Each forward moves its buffers on, and the weight depends on them."""
    spectral_norm(pose_model[0])
    assert_like_graph(pose_model, poses)


class Reassigning(torch.nn.Module):
    """Puts a new tensor in the place of a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(4, 1).double()
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))

    def forward(self, pose):
        self.scale = self.scale * 1.5
        return self.inner(pose) * self.scale


def test_a_buffer_that_is_replaced_is_put_back(poses):
    assert_like_graph(Reassigning(), poses)


class LargestSoFar(torch.nn.Module):
    """Changes its buffer for some poses, which shows in no prediction: the readout is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.readout = torch.nn.Linear(4, 1).double()
        torch.nn.init.zeros_(self.readout.weight)
        self.register_buffer("largest", torch.ones((), dtype=torch.float64))

    def forward(self, pose):
        if pose.abs().max() > self.largest:
            self.largest = pose.abs().max()
        return self.readout(pose / self.largest)


def test_a_pose_that_left_the_buffers_alone_runs_again_with_those_that_it_saw(poses):
    growing = poses * torch.tensor([3.0, 1.0, 5.0, 2.0, 9.0, 1.0, 4.0])[:, None]
    assert_like_graph(LargestSoFar(), growing)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_buffer_that_changes_before_backward_is_as_it_was(poses, replaced):
    found = []
    for gradients in ("graph", "recomputed"):
        model = MultiPoseModel(LargestSoFar(), SmoothMinimum(), gradients=gradients)
        prediction = model(poses).prediction
        if replaced:
            model.pose_model.largest = torch.tensor(100.0, dtype=torch.float64)
        else:
            model.pose_model.largest.fill_(100.0)
        prediction.backward()
        found.append(model.pose_model.readout.weight.grad)
        assert model.pose_model.largest == 100.0
    torch.testing.assert_close(*found, **EXACT)


def test_buffers_are_those_of_a_functional_call(poses):
    pose_model = Reassigning()

    def gradient(gradients):
        model = MultiPoseModel(copy.deepcopy(pose_model), SmoothMinimum(), gradients=gradients)
        tensors = dict(model.named_parameters()) | {
            "pose_model.scale": torch.tensor(7.0, dtype=torch.float64)
        }
        torch.func.functional_call(model, tensors, (poses,)).prediction.backward()
        return model.pose_model.inner.weight.grad

    torch.testing.assert_close(gradient("recomputed"), gradient("graph"), **EXACT)


def test_train_and_eval_mode_are_those_of_the_forward(pose_model, poses):
    pose_model.insert(2, torch.nn.Dropout(0.5))
    torch.manual_seed(1)
    expected = gradients_of(MultiPoseModel(pose_model, ClosedForm()), poses)
    torch.manual_seed(1)
    model = recomputed(pose_model)
    model.zero_grad()
    out = model(poses)
    model.eval()
    (out.prediction.sum() + out.pose_predictions.sin().sum()).backward()
    assert not any(module.training for module in model.modules())
    assert_same({n: p.grad for n, p in model.named_parameters()}, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_that_of_the_forward(dtype):
    pose_model = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8), torch.nn.Linear(8, 1)
    )
    poses = torch.randn(7, 4)
    found = []
    for gradients in ("graph", "recomputed"):
        model = MultiPoseModel(pose_model, ClosedForm(), gradients=gradients)
        model.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            out = model(poses)
        (out.prediction * 2**8).backward()
        found.append([p.grad.clone() for p in pose_model.parameters()])
        assert not torch.is_autocast_enabled("cpu")
    for one, other in zip(*found, strict=True):
        # The same products in half precision; "graph" adds the poses up in it, too, where autocast
        # has cast a weight once for all of them.
        torch.testing.assert_close(
            one, other, rtol=0, atol=one.abs().max().item() * 8 * torch.finfo(dtype).eps
        )


def test_a_step_of_the_optimizer_before_backward_is_an_error(pose_model, poses):
    out = recomputed(pose_model)(poses)
    with torch.no_grad():
        pose_model[2].bias.add_(1e-9)
    with pytest.raises(
        ChangedBeforeBackwardError, match=r"parameter '2\.bias' was changed in place"
    ):
        out.prediction.backward()


@dataclass
class Pose:
    positions: Tensor


@dataclass
class Numbered:
    index: int
    positions: Tensor


POSES = {
    "tensor": lambda positions: positions,
    "tuple": lambda positions: ("name", [positions]),
    "dict": lambda positions: {"positions": positions},
    "numbered tuple": lambda positions: (3, positions),
    "numbered dict": lambda positions: {"index": 3, "positions": positions},
    "numbered list": lambda positions: [3, positions],
    "dataclass": Pose,
    "numbered dataclass": lambda positions: Numbered(3, positions),
    "Data": lambda positions: SimpleNamespace(_store=SimpleNamespace(_mapping={"pos": positions})),
}


@pytest.mark.parametrize("kind", POSES)
def test_a_pose_that_was_edited_before_backward_is_an_error(pose_model, poses, kind):
    class Reading(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.positions = pose_model, iter([*poses, *reversed(poses)])

        def forward(self, pose):
            return self.inner(next(self.positions))

    apart = [positions.clone() for positions in poses]
    out = recomputed(Reading())([POSES[kind](positions) for positions in apart])
    apart[3] += 1e-12  # which would not show in the prediction
    with pytest.raises(ChangedBeforeBackwardError, match=r"pose 3: .*shape \(4,\), was changed"):
        out.prediction.backward()


def test_poses_that_know_all_others_are_searched_once(poses):
    dataset = []
    dataset += [SimpleNamespace(positions=positions, dataset=dataset) for positions in poses]
    found = list(tensors_in(dataset))
    assert [pose for pose, _ in found] == list(range(len(poses)))
    assert all(tensor is pose.positions for (_, tensor), pose in zip(found, dataset, strict=True))


def test_a_cache_that_grows_is_an_error_that_names_the_pose(pose_model, poses):
    """The buffer is restored, and the number next to it is not."""

    class Cached(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.size = pose_model, 0
            self.register_buffer("table", torch.empty(0, dtype=torch.float64), persistent=False)

        def forward(self, pose):
            if len(pose) > self.size:
                self.table, self.size = torch.ones(len(pose), 1).double(), len(pose)
            return self.inner(pose * self.table[: len(pose)]).sum()

    out = recomputed(Cached())([poses[:2], poses[:5]])
    with pytest.raises(
        ChangedBeforeBackwardError,
        match=r"pose 1: the pose model ran again in backward and raised RuntimeError: .* is kept",
    ) as caught:
        out.prediction.backward()
    assert isinstance(caught.value.__cause__, RuntimeError)


OUT_OF_MEMORY = {
    "Python": MemoryError("no memory"),
    # torch raises a plain RuntimeError on a CPU.
    "CPU": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory:"
        " you tried to allocate 8000000000000 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "accelerator": torch.OutOfMemoryError("CUDA out of memory"),
}


@pytest.mark.parametrize("error", OUT_OF_MEMORY.values(), ids=OUT_OF_MEMORY)
def test_running_out_of_memory_in_backward_stays_what_it_is(pose_model, poses, error):
    class Full(torch.nn.Module):
        def forward(self, pose):
            if out is not None:
                raise error
            return pose_model(pose)

    out = None
    out = recomputed(Full())(poses)
    with pytest.raises(type(error), match=r"no memory|can't allocate|out of memory") as caught:
        out.prediction.backward()
    assert caught.value is error


class Turning(torch.nn.Module):
    """Predicts the same in each run. From a given run on, its gradient is another."""

    def __init__(self, pose_model: torch.nn.Module) -> None:
        super().__init__()
        self.inner = pose_model
        self._run = SimpleNamespace(turned=False)  # the engine restores numbers

    def turn(self, turned: bool) -> None:
        self._run.turned = turned

    def forward(self, pose):
        hidden = self.inner(pose)
        factor = 5.0 if self._run.turned else 3.0
        return hidden + factor * (hidden.sin() - hidden.sin().detach()) * (hidden * factor)


@pytest.fixture
def n_compared(monkeypatch):
    """Return the number of poses whose saved tensors a forward has noted."""
    found = []
    monkeypatch.setattr(replay, "marks_of", lambda *given: found.append(1) or marks_of(*given))
    return lambda: (len(found), found.clear())[0]


def test_all_poses_are_compared_until_three_calls_agree_and_then_one_in_fifty(
    pose_model, n_compared
):
    model, poses = recomputed(pose_model), torch.randn(32, 4).double()
    compared = []
    for _ in range(53):
        prediction = model(poses).prediction
        compared.append(n_compared())
        prediction.backward()
    assert compared[:3] == [32, 32, 32]
    assert sum(compared[3:]) == 32


def test_in_many_calls_each_pose_is_compared_once(pose_model, monkeypatch):
    model, poses = recomputed(pose_model), torch.randn(5, 4).double()
    for _ in range(3):
        model(poses).prediction.backward()
    compared = []
    after_run = replay.Replay.after_run

    def note(self, run, predictions, n_saved, saved):
        compared.append(saved is not None)
        after_run(self, run, predictions, n_saved, saved)

    monkeypatch.setattr(replay.Replay, "after_run", note)
    for _ in range(50):
        model(poses).prediction.backward()
    assert torch.tensor(compared).view(50, 5).sum(0).tolist() == [1] * 5


@pytest.mark.parametrize("change", ["train", "autocast", "collate"])
def test_under_other_conditions_all_poses_are_compared_again(pose_model, poses, n_compared, change):
    pose_model = pose_model.float()
    model, poses = recomputed(pose_model, collate=torch.stack), list(poses.float())
    for _ in range(4):
        model(poses).prediction.backward()
    n_compared()
    if change == "train":
        pose_model.eval()
    if change == "collate":
        model.collate = lambda poses: torch.stack(poses)
    with torch.autocast("cpu", enabled=change == "autocast"):
        model(poses)
    assert n_compared() == len(poses)


def test_a_call_without_backward_proves_nothing(pose_model, poses, n_compared):
    model = recomputed(pose_model)
    for _ in range(5):
        model(poses)
        assert n_compared() == len(poses)


def test_after_a_disagreement_all_poses_are_compared_again(pose_model, n_compared, monkeypatch):
    monkeypatch.setattr("mtenn_core._engine.recomputed.ONE_IN", 2)
    turning, poses = Turning(pose_model), torch.randn(32, 4).double()
    model = recomputed(turning)
    for _ in range(3):
        model(poses).prediction.backward()
    prediction = model(poses).prediction
    turning.turn(True)
    with pytest.raises(ChangedBeforeBackwardError, match="its gradient would be another"):
        prediction.backward()
    turning.turn(False)
    n_compared()
    for _ in range(3):
        prediction = model(poses).prediction
        assert n_compared() == 32
        prediction.backward()
    model(poses)
    assert n_compared() == 16


def test_a_pose_model_that_reads_something_else_in_backward_is_an_error(pose_model, poses):
    class Reading(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.database = pose_model, poses.numpy()

        def forward(self, pose):
            return self.inner(torch.from_numpy(self.database[pose]))

    out = recomputed(Reading())(range(7))
    poses.numpy()[3] += 1e-3
    with pytest.raises(
        ChangedBeforeBackwardError, match=r"pose 3: the pose model ran again .* It predicted "
    ):
        out.prediction.backward()


def test_random_numbers_from_elsewhere_are_an_error(pose_model, poses):
    class Shaken(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = pose_model

        def forward(self, pose):
            return self.inner(pose * random.random())

    with pytest.raises(ChangedBeforeBackwardError, match="random numbers that are not torch's"):
        recomputed(Shaken())(poses).prediction.backward()


def test_a_pose_model_that_keeps_a_part_of_its_graph_is_an_error(pose_model, poses):
    class Cached(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.cache = pose_model, None

        def forward(self, pose):
            if self.cache is None:
                self.cache = self.inner[2].weight.square().sum()
            return self.inner(pose) * self.cache

    with pytest.raises(
        ChangedBeforeBackwardError, match=r"pose 0: .* It saved \d+ tensors instead of"
    ):
        recomputed(Cached())(poses).prediction.backward()


@pytest.mark.parametrize("gradients", MODES)
def test_parameters_are_those_of_a_functional_call(pose_model, poses, gradients):
    model = MultiPoseModel(pose_model, ClosedForm(), gradients=gradients)
    others = {
        name: torch.randn_like(param).requires_grad_() for name, param in model.named_parameters()
    }
    out = torch.func.functional_call(model, others, (poses,))
    found = torch.autograd.grad(out.prediction, list(others.values()))
    own = {name.removeprefix("pose_model."): other for name, other in others.items()}
    plain = torch.cat([torch.func.functional_call(pose_model, own, (pose,)) for pose in poses])
    expected = torch.autograd.grad(-torch.logsumexp(-plain, 0), list(others.values()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize("gradients", ["graph", "recomputed"])
@pytest.mark.parametrize("scale", [1.0, 1e5])
def test_poses_that_require_grad_get_their_gradient(pose_model, poses, gradients, scale):
    apart = [pose.clone().requires_grad_() for pose in poses]
    MultiPoseModel(pose_model, ClosedForm(scale), gradients=gradients)(apart).prediction.backward()
    again = poses.clone().requires_grad_()
    plain = torch.cat([pose_model(pose) for pose in again])
    (-torch.logsumexp(-scale * plain, 0) / scale).backward()
    torch.testing.assert_close(torch.stack([pose.grad for pose in apart]), again.grad, **EXACT)


def test_a_second_backward_runs_the_poses_again(pose_model, poses):
    model = recomputed(pose_model)
    expected = gradients_of(model, poses)
    model.zero_grad()
    out = model(poses)
    loss = out.prediction.sum() + out.pose_predictions.sin().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert_same({n: p.grad / 2 for n, p in model.named_parameters()}, expected)


def test_a_penalty_on_gradients_is_right_without_a_closed_form_and_refused_with_it(
    pose_model, poses
):
    params = list(pose_model.parameters())
    found = []
    for gradients in ("graph", "recomputed"):
        model = MultiPoseModel(pose_model, SmoothMinimum(), gradients=gradients)
        first = torch.autograd.grad(model(poses).prediction, params, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), params[0])[0])
    torch.testing.assert_close(*found, **EXACT)
    with pytest.raises(DoubleBackwardError, match="gradients='graph'"):
        torch.autograd.grad(recomputed(pose_model)(poses).prediction, params, create_graph=True)


class Spread(Combination):
    """Has weights of exactly zero, whose derivatives are not."""

    def combine(self, predictions: Tensor) -> Tensor:
        return (predictions - predictions.detach()).square().sum()


@pytest.mark.parametrize("gradients", ["graph", "recomputed"])
def test_poses_without_weight_are_not_left_out_of_a_penalty_on_gradients(
    pose_model, poses, gradients
):
    params, found = list(pose_model.parameters()), []
    model = MultiPoseModel(pose_model, Spread(), gradients=gradients)
    for y in (model(poses).prediction, Spread().combine(pose_model(poses))):
        first = torch.autograd.grad(y, params, create_graph=True)
        assert not any(gradient.any() for gradient in first)
        found.append(torch.autograd.grad(sum(g.sum() for g in first), params[0])[0])
    assert found[1].abs().max() > 0.1
    torch.testing.assert_close(*found, **EXACT)


class Forces(torch.nn.Module):
    """Its prediction has a gradient in it, taken in forward."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pose):
        pose = pose.detach().requires_grad_()
        energy = self.inner(pose)
        (force,) = torch.autograd.grad(energy.sum(), pose, create_graph=True)
        return energy + force.square().sum()


class Checkpointed(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module, *, reentrant: bool) -> None:
        super().__init__()
        self.first, self.rest, self.reentrant = inner[0], inner[1:], reentrant

    def forward(self, pose):
        return checkpoint(self.rest, self.first(pose), use_reentrant=self.reentrant)


class Square(torch.autograd.Function):
    """A Function in Python: torch gives it zeros for no gradient, and it computes with them."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        return 2 * x * grad_output


class WithFunction(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pose):
        return self.inner(Square.apply(pose @ self.inner[0].weight.t() @ self.inner[0].weight))


class WithHooks(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        inner.register_full_backward_hook(lambda module, grad_input, grad_output: None)

    def forward(self, pose):
        hidden = self.inner[0](pose)
        # It gets None where the pose is skipped.
        hidden.register_hook(lambda grad: None if grad is None else grad * 2)
        return self.inner[1:](hidden)


class InPlace(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pose):
        hidden = self.inner[0](pose)
        hidden[:2] *= 3
        return self.inner[2](hidden.exp_())


@pytest.mark.filterwarnings("ignore:.torch.jit.(trace|trace_method). is deprecated")
@pytest.mark.parametrize("scale", [1.0, 1e5], ids=["dense", "sharp"])
@pytest.mark.parametrize(
    "wrap",
    [
        Forces,
        WithFunction,
        WithHooks,
        InPlace,
        lambda inner: Checkpointed(inner, reentrant=True),
        lambda inner: Checkpointed(inner, reentrant=False),
        lambda inner: torch.compile(inner, backend="aot_eager"),
        lambda inner: torch.jit.trace(inner, torch.zeros(4, dtype=torch.float64)),
    ],
    ids=["forces", "Function", "hooks", "in place", "reentrant", "checkpoint", "compile", "traced"],
)
def test_pose_models_of_every_kind_have_the_gradients_of_graph(pose_model, poses, wrap, scale):
    loss = _y if scale > 1 else None  # one on all poses would leave none without weight
    found = [
        gradients_of(
            MultiPoseModel(wrap(pose_model), SmoothMinimum(scale), gradients=g), poses, loss=loss
        )
        for g in ("graph", "recomputed")
    ]
    assert_same(*found)
    model = wrap(pose_model)
    refused = isinstance(model, Forces) or getattr(model, "reentrant", False)
    words = "requires grad and is not a parameter of the pose model|use_reentrant=False"
    with pytest.raises((GradientError, RuntimeError), match=words) if refused else nullcontext():
        stored = MultiPoseModel(model, SmoothMinimum(scale), gradients="stored")
        assert_same(gradients_of(stored, poses, loss=loss), found[0])


def test_one_graph_at_most_is_alive_and_nothing_is_left(pose_model, poses):
    alive, graphs = [], []

    class Tracking(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = pose_model

        def forward(self, pose):
            alive.append(sum(graph() is not None for graph in graphs))
            hidden = self.inner(pose)
            graphs.append(weakref.ref(hidden.untyped_storage()))
            return hidden * hidden

    out = recomputed(Tracking())(poses)
    assert sum(graph() is not None for graph in graphs) == 0
    out.prediction.backward()
    assert max(alive) <= 1
    assert sum(graph() is not None for graph in graphs) == 0


@pytest.mark.parametrize("gradients", MODES)
def test_a_step_leaves_nothing_behind(pose_model, poses, gradients):
    """Not even for the collector of cycles: that is late, and does not count what tensors weigh."""
    model = MultiPoseModel(pose_model, ClosedForm(1e5), gradients=gradients)
    counts = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(4):
            gradients_of(model, poses)
            counts.append(len(gc.get_objects()))
    finally:
        gc.enable()
    assert counts[-1] <= counts[-2] + 1  # the entry in this list's own bookkeeping


@pytest.mark.parametrize("gradients", MODES)
def test_a_pose_without_weight_does_no_harm_whatever_its_gradient(gradients):
    """0 · inf would be NaN. The square root of 0 has an infinite derivative."""

    class Root(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))

        def forward(self, pose):
            return (self.scale * pose).sqrt() - pose

    poses = torch.tensor([[0.0], [1.0], [9.0]], dtype=torch.float64)
    model = MultiPoseModel(Root(), ClosedForm(1e5), gradients=gradients)
    model(poses).prediction.backward()
    # The minimum is that of pose 2, √18 - 9, whose derivative is 9 / (2√18).
    expected = torch.tensor([9 / (2 * 18**0.5)], dtype=torch.float64)
    torch.testing.assert_close(model.pose_model.scale.grad, expected)


def test_no_grad_runs_each_pose_once(pose_model, poses):
    counting = Counting(pose_model)
    with torch.no_grad():
        recomputed(counting)(poses)
    assert counting.n_runs == len(poses)


def test_the_transforms_of_torch_func_are_right_in_graph_and_refused_elsewhere(pose_model, poses):
    params = {n: p.detach() for n, p in pose_model.named_parameters()}

    def predict(params, gradients):
        model = MultiPoseModel(pose_model, SmoothMinimum(), gradients=gradients)
        given = {f"pose_model.{name}": param for name, param in params.items()}
        return torch.func.functional_call(model, given, (poses,)).prediction

    found = torch.func.grad(predict)(params, "graph")
    expected = gradients_of(
        MultiPoseModel(pose_model, SmoothMinimum()), poses, loss=lambda out: out.prediction
    )
    assert_same({f"pose_model.{n}": g for n, g in found.items()}, expected)
    hessian = torch.func.hessian(lambda b: predict(params | {"2.bias": b}, "graph"))
    assert hessian(params["2.bias"]).abs().max() < 1e-12  # a shift of all poses shifts the value
    for gradients in ("stored", "recomputed"):
        with pytest.raises(GradientError, match=r"grad, vjp.* Use gradients='graph'"):
            torch.func.grad(predict)(params, gradients)


def ensemble(pose_model, gradients, **options):
    """Return a function of stacked parameters: the predictions of several models at once."""
    model = MultiPoseModel(pose_model, SmoothMinimum(), gradients=gradients, **options)
    params = dict(model.named_parameters())
    stacked = {name: torch.stack([param, 1.1 * param]).detach() for name, param in params.items()}

    def predict(params, poses):
        return torch.func.functional_call(model, params, (poses,)).prediction

    return torch.func.vmap(predict, in_dims=(0, None)), stacked


@pytest.mark.parametrize("gradients", MODES)
def test_an_ensemble_predicts_by_vmap_without_gradients(pose_model, poses, gradients):
    predict, stacked = ensemble(pose_model, gradients, check_finite=False)
    with torch.no_grad():
        found = predict(stacked, poses)
        first, second = MultiPoseModel(pose_model, SmoothMinimum()), copy.deepcopy(pose_model)
        for param in second.parameters():
            param.mul_(1.1)
        expected = [first(poses).prediction]
        expected.append(MultiPoseModel(second, SmoothMinimum())(poses).prediction)
    torch.testing.assert_close(found, torch.stack(expected), **EXACT)


def test_an_ensemble_trains_by_vmap_in_graph(pose_model, poses):
    predict, stacked = ensemble(pose_model, "graph", check_finite=False)
    params = {name: param.requires_grad_() for name, param in stacked.items()}
    found = torch.autograd.grad(predict(params, poses).sum(), params.values())
    expected = gradients_of(
        MultiPoseModel(pose_model, SmoothMinimum()), poses, loss=lambda out: out.prediction
    )
    assert_same(dict(zip(params, [g[0] for g in found], strict=True)), expected)


@pytest.mark.parametrize("gradients", ["stored", "recomputed"])
def test_training_by_vmap_names_the_mode_that_works(pose_model, poses, gradients):
    predict, stacked = ensemble(pose_model, gradients, check_finite=False)
    params = {name: param.requires_grad_() for name, param in stacked.items()}
    with pytest.raises(GradientError, match=r"vmap.* Use gradients='graph'.* use torch\.no_grad"):
        predict(params, poses)


def test_vmap_names_the_option_that_works(pose_model, poses):
    predict, stacked = ensemble(pose_model, "graph")
    with pytest.raises(RuntimeError, match="data-dependent") as caught:
        predict(stacked, poses)
    assert "inside torch.func.vmap, pass check_finite=False to MultiPoseModel" in (
        caught.value.__notes__
    )


def test_stored_loses_no_tangent(pose_model, poses):
    forward_ad = torch.autograd.forward_ad
    with forward_ad.dual_level(), pytest.raises(GradientError, match="forward-mode"):
        MultiPoseModel(pose_model, SmoothMinimum(), gradients="stored")(poses)


class EditsWhatItSaved(torch.nn.Module):
    """``exp`` saves its result, which is then changed."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pose):
        hidden = self.inner[0](pose).exp()
        hidden.add_(1.0)
        return self.inner[2](hidden)


@pytest.mark.parametrize("gradients", MODES)
def test_a_pose_model_that_edits_what_it_saved_is_an_error(pose_model, poses, gradients):
    model = MultiPoseModel(EditsWhatItSaved(pose_model), ClosedForm(), gradients=gradients)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(poses).prediction.backward()


class Attention(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.project = inner, torch.nn.Linear(1, 12).double()

    def forward(self, pose):
        query, key, value = self.project(pose[:, None]).view(4, 3, 2, 2).permute(1, 2, 0, 3)
        mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        return self.inner(mixed.sum((0, 2)))


@pytest.mark.parametrize("scale", [1.0, 1e5], ids=["dense", "sharp"])
def test_attention_is_left_out_and_run_again_rightly(pose_model, poses, scale):
    attention = Attention(pose_model)
    expected, *found = (
        gradients_of(MultiPoseModel(attention, ClosedForm(scale), gradients=g), poses, loss=_y)
        for g in MODES
    )
    for gradients in found:
        assert_same(gradients, expected)


class Penalised(torch.nn.Module):
    """Keeps a penalty on its weights, and an activation, for a loss besides the predictions."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.activations = inner, []

    def forward(self, pose):
        self.penalty = self.inner[0].weight.square().sum()
        self.activations.append(self.inner[0](pose))
        return self.inner(pose)


@pytest.mark.parametrize("other", ["penalty", "activations"])
@pytest.mark.parametrize("gradients", MODES)
def test_a_loss_besides_the_predictions_is_right(pose_model, poses, gradients, other):
    found = []
    for mode in ("graph", gradients):
        penalised = Penalised(pose_model)
        model = MultiPoseModel(penalised, ClosedForm(1e5), gradients=mode)
        model.zero_grad()
        out = model(poses)
        # Before backward: a second run of a pose would keep its own.
        loss = penalised.penalty if other == "penalty" else sum(penalised.activations).sin().sum()
        out.prediction.backward(retain_graph=True)
        loss.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters()})
    assert_same(found[1], found[0])


@pytest.mark.parametrize("gradients", MODES)
def test_many_backwards_at_once_give_the_jacobian(pose_model, poses, gradients):
    model = MultiPoseModel(pose_model, ClosedForm(), gradients=gradients)
    out = model(poses)
    weight = pose_model[0].weight
    eye = torch.eye(7, dtype=torch.float64)
    (jacobian,) = torch.autograd.grad(out.pose_predictions, weight, eye, is_grads_batched=True)
    for pose, row in zip(poses, jacobian, strict=True):
        (expected,) = torch.autograd.grad(pose_model(pose), weight)
        torch.testing.assert_close(row, expected, **EXACT)


@pytest.mark.parametrize("gradients", ["stored", "recomputed"])
def test_a_lazy_module_asks_for_a_first_run(poses, gradients):
    pose_model = torch.nn.Sequential(torch.nn.LazyLinear(8), torch.nn.Linear(8, 1)).double()
    model = MultiPoseModel(pose_model, ClosedForm(), gradients=gradients)
    with pytest.raises(GradientError, match="run the pose model once"):
        model(poses)
    pose_model(poses[0])
    model(poses).prediction.backward()


def test_what_is_frozen_or_thawed_before_backward_counts_as_it_was(pose_model, poses):
    found = []
    for gradients in ("graph", "recomputed"):
        model = MultiPoseModel(copy.deepcopy(pose_model), SmoothMinimum(), gradients=gradients)
        first, _, last = model.pose_model
        first.requires_grad_(False)
        out = model(poses)
        first.requires_grad_(True)
        last.bias.requires_grad_(False)
        out.prediction.backward()
        assert first.weight.requires_grad
        assert not last.bias.requires_grad
        found.append({n: p.grad for n, p in model.named_parameters()})
    assert found[0]["pose_model.2.weight"] is not None
    assert_same(*found)


def test_buffers_that_do_not_change_are_copied_once(poses):
    class Tables(Reassigning):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.zeros(1000))

    model = recomputed(Tables())
    out = model(poses)
    chunks = out.pose_predictions.grad_fn.chunks
    assert len({chunk.first_run.buffers.copies[1].tensor.data_ptr() for chunk in chunks}) == 1
    assert len({chunk.first_run.buffers.copies[0].tensor.data_ptr() for chunk in chunks}) == len(
        poses
    )


def test_what_backward_has_no_use_for_is_let_go(pose_model, poses):
    """A gradient for only the last layer leaves the saved tensors of the first unused."""
    storages = []

    class Tracking(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = pose_model

        def forward(self, pose):
            hidden = self.inner[:2](pose)
            storages.append(weakref.ref(hidden.untyped_storage()))
            return self.inner[2](hidden * hidden)

    out = recomputed(Tracking())(poses)
    torch.autograd.grad(out.prediction, pose_model[2].weight, retain_graph=True)
    assert sum(storage() is not None for storage in storages) <= 1


def test_threads_may_run_backward_at_once(pose_model, poses):
    """Each puts buffers and modes in their places while it runs poses again."""
    spectral_norm(pose_model[0])
    model = recomputed(pose_model)
    outs = [model(poses[i : i + 3]) for i in range(4)]
    expected = [
        torch.autograd.grad(out.prediction, pose_model[2].weight, retain_graph=True)[0]
        for out in outs
    ]
    with ThreadPoolExecutor(4) as pool:
        found = list(
            pool.map(lambda o: torch.autograd.grad(o.prediction, pose_model[2].weight)[0], outs)
        )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_poses_run_again_in_one_thread_at_a_time(pose_model, poses):
    """One would take what the other has put into the places of buffers for its own."""
    begun, inside = threading.Barrier(2), threading.Barrier(2)

    class Slow(torch.nn.Module):
        met = 0

        def forward(self, pose):
            with contextlib.suppress(threading.BrokenBarrierError):
                inside.wait(1.0)
                self.met += 1
            return pose_model(pose)

    def backward(out):
        begun.wait()
        out.prediction.backward()

    model = recomputed(Slow())
    inside.abort()  # forward need not wait
    outs = [model(poses[i : i + 1]) for i in range(2)]
    inside.reset()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(backward, outs))
    assert model.pose_model.met == 0


def test_a_pose_with_many_numbers_is_not_searched(pose_model, monkeypatch):
    from mtenn_core._engine import replay as module

    seen = []
    search = module.tensors_in
    monkeypatch.setattr(module, "tensors_in", lambda *a: seen.append(1) or search(*a))

    class Reading(torch.nn.Module):
        def forward(self, pose):
            return pose_model(torch.tensor(pose[:4], dtype=torch.float64))

    recomputed(Reading())([[0.5] * 1000]).prediction.backward()
    assert len(seen) == 1


def test_torch_func_inside_a_pose_model_is_refused_and_right_elsewhere(pose_model, poses):
    class Forces(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = pose_model

        def forward(self, pose):
            return torch.func.grad(lambda x: self.inner(x).sum())(pose).square().sum()

    with pytest.raises(GradientError, match="inside the pose model"):
        recomputed(Forces())(poses)
    found = [
        gradients_of(MultiPoseModel(Forces(), SmoothMinimum(), gradients=g), poses)
        for g in ("graph", "stored")
    ]
    assert_same(*found)


class KeepsAPenalty(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, pose):
        hidden = self.inner[0](pose)
        self.penalty = hidden.square().sum()
        return self.inner[2](self.inner[1](hidden))


@pytest.mark.parametrize("gradients", MODES)
def test_a_kept_tensor_that_no_loss_uses_keeps_no_earlier_graph(pose_model, poses, gradients):
    model = MultiPoseModel(KeepsAPenalty(pose_model), ClosedForm(), gradients=gradients)
    for _ in range(4):
        model(poses)
        model.pose_model.penalty, kept = None, weakref.ref(model.pose_model.penalty)
        gc.collect()
        assert kept() is None


def test_a_collate_that_refers_to_the_pose_model_does_not_keep_it():
    class Collating(torch.nn.Linear):
        def collate(self, poses):
            return torch.stack(poses)

    pose_model = Collating(4, 1)
    model = recomputed(pose_model, collate=pose_model.collate)
    model(list(torch.randn(3, 4))).prediction.backward()
    reference = weakref.ref(pose_model)
    del pose_model, model
    gc.collect()
    assert reference() is None


@pytest.mark.filterwarnings("ignore:.torch.jit.(trace|trace_method). is deprecated")
@pytest.mark.parametrize("gradients", ["stored", "recomputed"])
def test_a_scripted_model_with_buffers_is_right(poses, gradients):
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))
    scripted = torch.jit.trace(net.double().eval(), poses)
    for _ in range(4):  # TorchScript optimizes itself in its first runs
        torch.autograd.grad(scripted(poses).sum(), list(scripted.parameters()))
    found = [
        gradients_of(
            MultiPoseModel(scripted, ClosedForm(), gradients=mode, collate=torch.stack), poses
        )
        for mode in (gradients, "graph")
    ]
    assert_same(*found)


def test_another_default_device_changes_nothing(pose_model, poses):
    fingerprint._factors.cache_clear()
    with torch.device("meta"):
        found = gradients_of(recomputed(pose_model), poses)
    assert_same(found, gradients_of(MultiPoseModel(pose_model, ClosedForm()), poses))


@pytest.mark.parametrize("gradients", ["stored", "recomputed"])
def test_the_penalty_of_a_later_pose_is_right(pose_model, poses, gradients):
    class Later(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.penalty = copy.deepcopy(pose_model), 0.0

        def forward(self, pose):
            hidden = self.inner[0](pose)
            if pose[0] == poses[2, 0]:
                self.penalty = self.penalty + hidden.square().sum()
            return self.inner[2](self.inner[1](hidden))

    found = []
    for mode in ("graph", gradients):
        later = Later()
        out = MultiPoseModel(later, ClosedForm(), gradients=mode)(poses)
        (out.prediction + later.penalty).backward()
        found.append({name: p.grad for name, p in later.named_parameters()})
    assert_same(*found)
