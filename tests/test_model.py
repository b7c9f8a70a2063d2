import contextlib
import copy
import functools
import inspect
import subprocess
import sys
import threading
import weakref
from collections import UserDict
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import get_args, get_type_hints

import pytest
import torch
from torch import Tensor

from mtenn_core import Combination, MultiPoseModel, registry
from mtenn_core._engine import mode_table
from mtenn_core._engine.gradient_buffers import _SPARE
from mtenn_core._torch_internals import graph_is_retained
from mtenn_core.errors import (
    CombinationContractError,
    CombinationNotFoundError,
    DoubleBackwardError,
    GradientError,
    PredictionError,
)
from mtenn_core.model import GradientMode

# Gradients are sums of a few hundred float64 products, in another order in each mode.
EXACT = {"rtol": 1e-12, "atol": 1e-13}
GRADIENTS = get_args(GradientMode)
MODES = pytest.mark.parametrize("gradients", GRADIENTS)
SIZES = [1, 4, 2]


class LogSumExp(Combination):
    def combine(self, predictions: Tensor) -> Tensor:
        return torch.logsumexp(predictions, dim=0)


class ClosedForm(LogSumExp):
    def pose_weights(self, predictions: Tensor) -> Tensor:
        return torch.softmax(predictions, dim=0)


class Learnable(Combination):
    def __init__(self) -> None:
        super().__init__()
        self.log_kT = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def combine(self, predictions: Tensor) -> Tensor:
        return (torch.softmax(-predictions / self.log_kT.exp(), dim=0) * predictions).sum()


class FullDepth(Combination):
    """Hands over to the default; a test of the contract between the model and depth 3."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def forward(self, pred_list, grad_dict, param_names, *model_params):
        self.calls.append((pred_list, grad_dict, param_names, model_params))
        return ClosedForm()(pred_list, grad_dict, param_names, *model_params)


def losses(out):
    """Losses on the combined prediction, on the pose predictions, and on both."""
    combined, poses = out.prediction.square().sum(), out.pose_predictions.sin().sum()
    return {"combined": combined, "poses": poses, "both": combined + poses}


def plain_autograd(pose_model, combination, poses, sizes):
    """The reference: no code of the model under test."""
    predictions = torch.cat([pose_model(pose) for pose in poses])
    combined = torch.stack([combination.combine(part) for part in predictions.split(sizes)])
    return type("Out", (), {"prediction": combined, "pose_predictions": predictions})


def grads(module):
    return {name: param.grad for name, param in module.named_parameters()}


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], **EXACT, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("loss", ["combined", "poses", "both"])
@pytest.mark.parametrize(
    ("gradients", "combination"),
    [
        *product(GRADIENTS, [LogSumExp, ClosedForm, Learnable]),
        ("stored", FullDepth),  # full depth works on stored gradients
    ],
)
@pytest.mark.parametrize("collate", [None, torch.stack], ids=["single", "collated"])
def test_gradients_equal_plain_autograd(pose_model, poses, gradients, collate, combination, loss):
    combination = combination()
    own = ClosedForm() if isinstance(combination, FullDepth) else combination
    losses(plain_autograd(pose_model, own, poses, SIZES))[loss].backward()
    model = MultiPoseModel(pose_model, combination, gradients=gradients, collate=collate)
    expected = {name: grad.clone() for name, grad in grads(model).items() if grad is not None}
    model.zero_grad()
    losses(model(poses, sizes=SIZES))[loss].backward()
    assert_same_gradients({n: g for n, g in grads(model).items() if g is not None}, expected)


def test_the_type_of_the_option_names_all_modes():
    assert tuple(mode_table.MODES) == GRADIENTS


def test_the_signature_of_the_class_is_that_of_its_constructor():
    _, *arguments = inspect.signature(MultiPoseModel.__init__).parameters.values()
    assert [*inspect.signature(MultiPoseModel).parameters.values()] == arguments
    # jsonargparse reads the types from __new__.
    assert get_type_hints(MultiPoseModel.__new__)["gradients"] == GradientMode


def test_a_function_that_wraps_the_model_has_a_signature():
    @functools.wraps(MultiPoseModel)  # copies the attributes of the class
    def make_model(*args, **kwargs):
        return MultiPoseModel(*args, **kwargs)

    assert list(inspect.signature(make_model).parameters) == ["args", "kwargs"]


@MODES
def test_one_compound_is_a_scalar_and_several_are_a_vector(pose_model, poses, gradients):
    model = MultiPoseModel(pose_model, LogSumExp(), gradients=gradients)
    alone, batch = model(poses), model(poses, sizes=[3, 4])
    assert alone.prediction.shape == ()
    assert batch.prediction.shape == (2,)
    assert alone.pose_predictions.shape == batch.pose_predictions.shape == (7,)
    torch.testing.assert_close(model(poses[:3]).prediction, batch.prediction[0])


@MODES
def test_one_pose_is_enough(pose_model, poses, gradients):
    model = MultiPoseModel(pose_model, LogSumExp(), gradients=gradients)
    out = model(poses[:1])
    assert out.prediction == out.pose_predictions[0]
    out.prediction.backward()
    assert all(grad is not None for grad in grads(model).values())


def test_chunks_change_nothing(pose_model, poses):
    seen = []

    def collate(batch):
        seen.append(len(batch))
        return torch.stack(batch)

    whole = MultiPoseModel(pose_model, LogSumExp(), collate=collate)(poses).prediction
    parts = MultiPoseModel(pose_model, LogSumExp(), collate=collate, chunk_size=3)(poses)
    torch.testing.assert_close(parts.prediction, whole, **EXACT)
    assert seen == [7, 3, 3, 1]


@MODES
def test_gradients_accumulate_over_compounds(pose_model, poses, gradients):
    """Neither forward nor a forward for validation touches ``.grad``."""
    model = MultiPoseModel(pose_model, LogSumExp(), gradients=gradients)
    (model(poses[:3]).prediction + model(poses[3:]).prediction).backward()
    together = copy.deepcopy(grads(model))
    model.zero_grad()
    model(poses[:3]).prediction.backward()
    with torch.no_grad():
        model(poses)
    model(poses)
    model(poses[3:]).prediction.backward()
    assert_same_gradients(grads(model), together)


@MODES
def test_frozen_parameters_get_no_gradient(pose_model, poses, gradients):
    pose_model[0].requires_grad_(False)
    model = MultiPoseModel(pose_model, LogSumExp(), gradients=gradients)
    model(poses).prediction.backward()
    assert pose_model[0].weight.grad is None
    assert pose_model[2].weight.grad is not None


@MODES
def test_a_model_without_trainable_parameters_predicts(pose_model, poses, gradients):
    pose_model.requires_grad_(False)
    out = MultiPoseModel(pose_model, LogSumExp(), gradients=gradients)(poses)
    assert not out.prediction.requires_grad


@MODES
def test_the_combination_trains_where_the_pose_model_is_frozen(pose_model, poses, gradients):
    pose_model.requires_grad_(False)
    model = MultiPoseModel(pose_model, Learnable(), gradients=gradients)
    model(poses).prediction.backward()
    assert model.combination.log_kT.grad.abs() > 0


class Branching(torch.nn.Module):
    """Uses ``rare`` only for poses with a positive first number, and ``never`` for none."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.rare, self.never = (torch.nn.Linear(4, 1).double() for _ in range(3))

    def forward(self, pose):
        return self.always(pose) + (self.rare(pose) if pose[0] > 0 else 0)


@MODES
def test_unused_parameters_get_what_autograd_gives_them(poses, gradients):
    model = MultiPoseModel(Branching(), LogSumExp(), gradients=gradients)
    model(poses).prediction.backward()
    found = copy.deepcopy(grads(model))
    model.zero_grad()
    torch.logsumexp(torch.cat([model.pose_model(pose) for pose in poses]), 0).backward()
    assert found["pose_model.never.weight"] is None
    assert_same_gradients(
        {n: g for n, g in found.items() if g is not None},
        {n: g for n, g in grads(model).items() if g is not None},
    )


@MODES
def test_no_gradient_work_is_done_without_grad(pose_model, poses, gradients, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a gradient was taken")

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    model = MultiPoseModel(pose_model, ClosedForm(), gradients=gradients)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert not model(poses).prediction.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@MODES
def test_half_precision_poses_give_float32_predictions(dtype, gradients):
    pose_model = torch.nn.Linear(4, 1).to(dtype)
    poses = torch.randn(5, 4, dtype=dtype)
    model = MultiPoseModel(pose_model, ClosedForm(), gradients=gradients)
    out = model(poses)
    assert out.prediction.dtype == out.pose_predictions.dtype == torch.float32
    out.prediction.backward()
    weights = torch.softmax(out.pose_predictions.detach(), 0)
    # The gradient of a linear model is Σ w_i x_i; parameters keep 11 (8) bits of it. "graph" rounds
    # the weights, and adds up, in that dtype, as autograd does.
    torch.testing.assert_close(
        pose_model.weight.grad[0].float(),
        (weights[:, None] * poses.float()).sum(0),
        rtol=0,
        atol=8 * torch.finfo(dtype).eps,
    )


@MODES
def test_hooks_on_parameters_run_once_per_backward(pose_model, poses, gradients):
    calls = []
    pose_model[0].weight.register_hook(lambda grad: calls.append("tensor"))
    pose_model[0].weight.register_post_accumulate_grad_hook(lambda p: calls.append("accumulate"))
    out = MultiPoseModel(pose_model, LogSumExp(), gradients=gradients)(poses)
    assert calls == []
    out.prediction.backward()
    assert calls == ["tensor", "accumulate"]


@MODES
def test_tied_parameters_count_once(poses, gradients):
    first = torch.nn.Linear(4, 4).double()
    pose_model = torch.nn.Sequential(first, torch.nn.Tanh(), torch.nn.Linear(4, 4).double())
    pose_model[2].weight = first.weight
    pose_model.append(torch.nn.Linear(4, 1).double())
    losses(plain_autograd(pose_model, LogSumExp(), poses, SIZES))["both"].backward()
    model = MultiPoseModel(pose_model, LogSumExp(), gradients=gradients)
    expected = copy.deepcopy(grads(model))
    model.zero_grad()
    losses(model(poses, sizes=SIZES))["both"].backward()
    assert_same_gradients(grads(model), expected)


class RegisteredTwice(torch.nn.Module):
    """One module under two names, as PyG's SchNet has its filter networks."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh()).double()
        self.same = torch.nn.ModuleDict({"mlp": self.mlp})
        self.last = torch.nn.Linear(4, 1).double()

    def forward(self, pose):
        return self.last(self.same["mlp"](self.mlp(pose)))


def test_a_module_that_is_registered_twice_trains_on_step_after_step(poses):
    """With only ``functional_call``, an alias would stay in place of its parameters."""
    pose_model = RegisteredTwice()
    params = list(pose_model.parameters())
    losses(plain_autograd(pose_model, LogSumExp(), poses, SIZES))["both"].backward()
    expected = [param.grad.clone() for param in params]
    model = MultiPoseModel(pose_model, LogSumExp(), gradients="stored")
    for _ in range(3):
        model.zero_grad()
        losses(model(poses, sizes=SIZES))["both"].backward()
        assert all(p is q for p, q in zip(pose_model.parameters(), params, strict=True))
        for param, gradient in zip(params, expected, strict=True):
            torch.testing.assert_close(param.grad, gradient, **EXACT)


def test_dropout_is_the_same_in_both_modes(pose_model, poses):
    pose_model.insert(1, torch.nn.Dropout(0.5))
    found = []
    for gradients in ("graph", "stored"):
        torch.manual_seed(1)
        model = MultiPoseModel(pose_model, LogSumExp(), gradients=gradients)
        model.zero_grad()
        model(poses).prediction.backward()
        found.append(copy.deepcopy(grads(model)))
    assert_same_gradients(*found)


CHANGES = {
    "an optimizer step": lambda model, poses: torch.optim.SGD(model.parameters(), lr=1.0).step(),
    "an edit of a pose": lambda model, poses: poses.mul_(2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_stored_gradients_survive_what_changes_before_backward(pose_model, poses, change):
    """They were taken in forward, and need neither parameters nor poses any more."""
    model = MultiPoseModel(pose_model, ClosedForm(), gradients="stored")
    model(poses).prediction.backward()
    expected = copy.deepcopy(grads(model))
    out = model(poses)
    CHANGES[change](model, poses)
    model.zero_grad()
    out.prediction.backward()
    assert_same_gradients(grads(model), expected)


@pytest.mark.parametrize("change", CHANGES)
def test_graph_leaves_what_changes_before_backward_to_torch(pose_model, poses, change):
    model = MultiPoseModel(pose_model, ClosedForm(), gradients="graph")
    model(poses).prediction.backward()
    out = model(poses)
    CHANGES[change](model, poses)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.prediction.backward()


def test_stored_frees_every_graph_and_then_the_gradients(pose_model, poses):
    alive, graphs = [], []

    class Tracking(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = pose_model

        def forward(self, pose):
            alive.append(sum(graph() is not None for graph in graphs))
            hidden = self.inner(pose)
            graphs.append(weakref.ref(hidden))
            return hidden * hidden  # its graph holds hidden, until backward frees it

    model = MultiPoseModel(Tracking(), ClosedForm(), gradients="stored")
    out = model(poses)
    assert max(alive) <= 1  # the pose before, until its variable is bound anew
    out.prediction.backward()
    with pytest.raises(RuntimeError, match="already been freed"):
        _ = out.pose_predictions.grad_fn.saved_tensors


def _memory(out):
    return out.pose_predictions.grad_fn.saved_tensors[0].data_ptr()


def test_stored_fills_the_memory_of_the_step_before(pose_model, poses):
    model = MultiPoseModel(pose_model, ClosedForm(), gradients="stored")
    out = model(poses)
    first = _memory(out)
    out.prediction.backward()
    expected = copy.deepcopy(grads(model))
    for n_poses in (3, 7):  # fewer, and as many again
        model.zero_grad()
        out = model(poses[:n_poses])
        assert _memory(out) == first
        out.prediction.backward()
    assert_same_gradients(grads(model), expected)


def test_stored_leaves_gradients_alone_that_a_graph_still_needs(pose_model, poses):
    model = MultiPoseModel(pose_model, ClosedForm(), gradients="stored")
    model(poses).prediction.backward()
    expected = copy.deepcopy(grads(model))
    model.zero_grad()
    out = model(poses)
    out.prediction.backward(retain_graph=True)
    others = model(2 * poses), model(3 * poses)
    assert len({_memory(out), *map(_memory, others)}) == 3
    model.zero_grad()
    out.prediction.backward()
    assert_same_gradients(grads(model), expected)


def test_stored_leaves_gradients_alone_that_a_combination_was_given(pose_model, poses):
    combination = FullDepth()
    model = MultiPoseModel(pose_model, combination, gradients="stored")
    model(poses).pose_predictions.sum().backward()
    _, given, _, _ = combination.calls[0]
    before = copy.deepcopy(given)
    model(2 * poses)
    assert all(torch.equal(x, y) for n in before for x, y in zip(before[n], given[n], strict=True))


def test_a_penalty_on_gradients_is_right_in_graph(pose_model, poses):
    params = list(pose_model.parameters())
    model = MultiPoseModel(pose_model, ClosedForm(), gradients="graph")
    plain = torch.logsumexp(torch.cat([pose_model(pose) for pose in poses]), 0)
    results = []
    for prediction in (model(poses).prediction, plain):
        first = torch.autograd.grad(prediction, params, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), params[0])[0])
    torch.testing.assert_close(*results, **EXACT)


def test_a_penalty_on_gradients_is_refused_in_stored(pose_model, poses):
    out = MultiPoseModel(pose_model, LogSumExp(), gradients="stored")(poses)
    with pytest.raises(DoubleBackwardError, match="gradients='graph'"):
        torch.autograd.grad(out.prediction, list(pose_model.parameters()), create_graph=True)


def test_gradients_for_poses_are_right_in_graph_and_refused_in_stored(pose_model, poses):
    poses.requires_grad_()
    MultiPoseModel(pose_model, LogSumExp(), gradients="graph")(poses).prediction.backward()
    assert poses.grad.abs().sum() > 0
    with pytest.raises(GradientError, match=r"pose 0: .*shape \(7, 4\) that requires grad"):
        MultiPoseModel(pose_model, LogSumExp(), gradients="stored")(poses)


def test_a_parameter_that_was_not_registered_is_noticed_in_stored(pose_model, poses):
    hidden = torch.ones((), dtype=torch.float64, requires_grad=True)

    class Forgetful(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.scales = pose_model, [hidden]

        def forward(self, pose):
            return self.inner(pose) * self.scales[0]

    with pytest.raises(GradientError, match="a parameter that was not registered"):
        MultiPoseModel(Forgetful(), LogSumExp(), gradients="stored")(poses)


def test_one_pose_alone_with_a_gradient_that_would_be_lost_is_noticed_in_stored(pose_model, poses):
    poses = list(poses)
    poses[3] = poses[3].clone().requires_grad_()
    with pytest.raises(GradientError, match=r"pose 3: .*shape \(4,\) that requires grad"):
        MultiPoseModel(pose_model, LogSumExp(), gradients="stored")(poses)


@MODES
def test_a_prediction_may_be_a_parameter_itself(gradients):
    class Constant(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.values = torch.nn.ParameterList(torch.randn(1).double() for _ in range(3))

        def forward(self, pose):
            return self.values[pose]

    pose_model = Constant()
    out = MultiPoseModel(pose_model, ClosedForm(), gradients=gradients)([0, 1, 2])
    out.prediction.backward()
    weights = torch.softmax(torch.cat([p.detach() for p in pose_model.values]), 0)
    torch.testing.assert_close(torch.cat([p.grad for p in pose_model.values]), weights, **EXACT)


@pytest.mark.parametrize("gradients", ["graph", "recomputed"])
def test_sparse_gradients_stay_sparse(gradients):
    embedding = torch.nn.Embedding(5, 1, sparse=True)
    out = MultiPoseModel(embedding, ClosedForm(), gradients=gradients)(torch.arange(3))
    out.prediction.backward()
    assert embedding.weight.grad.is_sparse
    expected = torch.cat([torch.softmax(out.pose_predictions.detach(), 0), torch.zeros(2)])
    torch.testing.assert_close(embedding.weight.grad.to_dense()[:, 0], expected)


def test_sparse_gradients_are_refused_in_stored():
    embedding = torch.nn.Embedding(5, 1, sparse=True)
    model = MultiPoseModel(embedding, LogSumExp(), gradients="stored")
    with pytest.raises(GradientError, match=r"parameter 'weight': .*sparse=False.*'recomputed'"):
        model(torch.arange(3))


class TwoDtypes(torch.nn.Module):
    """As models have whose last layer is in double precision."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Linear(4, 8), torch.nn.Linear(8, 1).double()

    def forward(self, pose):
        return self.last(torch.tanh(self.first(pose.float())).double())


@MODES
def test_parameters_may_differ_in_dtype(poses, gradients):
    pose_model = TwoDtypes()
    losses(plain_autograd(pose_model, LogSumExp(), poses, SIZES))["both"].backward()
    model = MultiPoseModel(pose_model, LogSumExp(), gradients=gradients)
    expected = copy.deepcopy(grads(model))
    model.zero_grad()
    losses(model(poses, sizes=SIZES))["both"].backward()
    for name, gradient in expected.items():
        # Sums of seven products in the dtype of the parameter, in another order.
        eps = 32 * torch.finfo(gradient.dtype).eps
        torch.testing.assert_close(grads(model)[name], gradient, rtol=eps, atol=eps)


@MODES
def test_what_a_pose_model_raises_has_the_pose_in_a_note(pose_model, poses, gradients):
    model = MultiPoseModel(pose_model, LogSumExp(), gradients=gradients)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as raised:
        model([*poses[:3], poses[3][:2]])
    assert raised.value.__notes__ == ["raised by the pose model on pose 3"]


def test_full_depth_sees_each_compound_as_the_contract_says(pose_model, poses):
    combination = FullDepth()
    MultiPoseModel(pose_model, combination, gradients="stored")(poses, sizes=SIZES)
    assert [len(call[0]) for call in combination.calls] == SIZES
    names = [name for name, _ in pose_model.named_parameters()]
    for pred_list, grad_dict, param_names, params in combination.calls:
        assert param_names == names
        assert set(grad_dict) == set(names)
        assert all(p is q for p, q in zip(params, pose_model.parameters(), strict=True))
        assert not any(prediction.requires_grad for prediction in pred_list)
        for name, param in zip(param_names, params, strict=True):
            assert [g.shape for g in grad_dict[name]] == [param.shape] * len(pred_list)


def test_graph_takes_combine_where_full_depth_has_both(pose_model, poses):
    class Both(FullDepth):
        def combine(self, predictions):
            return torch.logsumexp(predictions, dim=0)

    combination = Both()
    MultiPoseModel(pose_model, combination, gradients="graph")(poses).prediction.backward()
    assert combination.calls == []
    expected = copy.deepcopy(grads(pose_model))
    pose_model.zero_grad()
    MultiPoseModel(pose_model, combination, gradients="stored")(poses).prediction.backward()
    assert len(combination.calls) == 1
    assert_same_gradients(grads(pose_model), expected)


def test_full_depth_predicts_without_grad(pose_model, poses):
    with torch.no_grad():
        out = MultiPoseModel(pose_model, FullDepth(), gradients="stored")(poses)
    torch.testing.assert_close(out.prediction, torch.logsumexp(out.pose_predictions, 0))


def test_a_full_depth_output_that_is_no_scalar_is_refused(pose_model, poses):
    class Wrong(FullDepth):
        def forward(self, *args):
            return super().forward(*args).reshape(1)

    with pytest.raises(CombinationContractError, match=r"Wrong must return a scalar.*\(1,\)"):
        MultiPoseModel(pose_model, Wrong(), gradients="stored")(poses)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@MODES
def test_a_pose_without_a_finite_prediction_is_named(pose_model, poses, gradients, value):
    poses[3, 0] = value
    pose_model[1] = torch.nn.Identity()
    model = MultiPoseModel(pose_model, LogSumExp(), gradients=gradients)
    with pytest.raises(PredictionError, match=r"pose 3: the prediction is (nan|-?inf)") as raised:
        model(poses)
    assert raised.value.pose == 3
    with pytest.raises(PredictionError, match=r"pose 3 \(pose 2 of compound 1\)") as raised:
        model(poses, sizes=SIZES)
    assert raised.value.compound == 1


def test_the_first_pose_of_a_compound_is_named_with_its_own_compound(pose_model, poses):
    poses[SIZES[0], 0] = float("nan")
    with pytest.raises(PredictionError, match=r"pose 1 \(pose 0 of compound 1\)"):
        MultiPoseModel(pose_model, LogSumExp())(poses, sizes=SIZES)


def test_a_pose_without_a_finite_prediction_is_combined_on_request(pose_model, poses):
    class IgnoresNan(Combination):
        def combine(self, predictions):
            return predictions.nanmean()

    poses[3, 0] = torch.nan
    out = MultiPoseModel(pose_model, IgnoresNan(), check_finite=False)(poses)
    assert out.prediction.isfinite()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda y: y.expand(2), r"pose 0: .* one number .*found shape \(2,\)"),
        (lambda y: [y], "pose 0: .*in a tensor; found list"),
        (lambda y: y.round().long(), r"floating point; found shape \(1,\), torch.int64"),
    ],
)
@MODES
def test_an_output_that_is_not_one_number_is_refused(pose_model, poses, gradients, output, message):
    class Wrong(torch.nn.Module):
        def forward(self, pose):
            return output(pose_model(pose))

    with pytest.raises(PredictionError, match=message):
        MultiPoseModel(Wrong(), LogSumExp(), gradients=gradients)(poses)


def test_several_tasks_are_not_taken_for_several_poses(poses):
    model = MultiPoseModel(torch.nn.Linear(4, 2).double(), LogSumExp(), collate=torch.stack)
    with pytest.raises(PredictionError, match=r"poses 0 to 6: .* 7 numbers.*found shape \(7, 2\)"):
        model(poses)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([3, 3], "2 compounds with 6 poses in all; found 7 poses"),
        ([3, 0, 4], r"compound 1: .* needs at least 1 pose\(s\); found 0"),
        ([8, -1], "compound 1: .*found -1"),
        ([], "sizes must name at least one compound; found none"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(pose_model, poses, sizes, message):
    with pytest.raises(PredictionError, match=message):
        MultiPoseModel(pose_model, LogSumExp())(poses, sizes=sizes)


@MODES
def test_no_poses_are_refused(pose_model, gradients):
    with pytest.raises(PredictionError, match="expected at least one pose; found none"):
        MultiPoseModel(pose_model, LogSumExp(), gradients=gradients)([])


def test_a_compound_with_too_few_poses_is_named(pose_model, poses):
    class Pair(LogSumExp):
        min_poses = 2

    with pytest.raises(
        PredictionError, match=r"compound 0: Pair needs at least 2 pose\(s\); found"
    ):
        MultiPoseModel(pose_model, Pair())(poses, sizes=SIZES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradients": "grpah"}, r"one of \('graph', 'stored', 'recomputed'\); found 'grpah'"),
        ({"chunk_size": 2}, "needs collate"),
        ({"chunk_size": 0}, "at least 1, or None; found 0"),
        ({"chunk_size": "8"}, "chunk_size must be a whole number .* found '8'"),
        ({"chunk_size": 2.0}, r"chunk_size must be a whole number .* found 2\.0"),
        ({"skip_below": -1.0}, r"skip_below .* at least 0 and below 1, or None; found -1\.0"),
        ({"skip_below": "a"}, "skip_below must be a number .* found 'a'"),
        ({"skip_below": 1e-3, "gradients": "stored"}, "for 'recomputed' and 'graph'"),
        (
            {"chunk_size": 2, "collate": torch.stack, "gradients": "stored"},
            "pose by pose.*chunk_size must be 1 or None; found 2",
        ),
    ],
)
def test_options_that_do_not_exist_or_exclude_each_other_are_refused(pose_model, options, message):
    with pytest.raises(ValueError, match=message):
        MultiPoseModel(pose_model, LogSumExp(), **options)


def test_collate_must_be_a_function(pose_model):
    with pytest.raises(TypeError, match=r"collate must be a function .* found 'stack'"):
        MultiPoseModel(pose_model, LogSumExp(), collate="stack")


@pytest.mark.parametrize("gradients", ["graph", "recomputed"])
def test_full_depth_needs_stored_gradients(gradients, pose_model, poses):
    message = rf"FullDepth defines only forward.*gradients='stored' instead of '{gradients}'"
    with pytest.raises(ValueError, match=message):
        MultiPoseModel(pose_model, FullDepth(), gradients=gradients)
    model = MultiPoseModel(pose_model, FullDepth(), gradients="stored")
    model.gradients = gradients
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        model(poses)


def test_a_combination_comes_by_name(pose_model):
    with registry.temporary({"log-sum-exp": LogSumExp}):
        model = MultiPoseModel(pose_model, "log_sum_exp")
    assert isinstance(model.combination, LogSumExp)
    with pytest.raises(CombinationNotFoundError, match="unknown combination 'log_sum_exp'"):
        MultiPoseModel(pose_model, "log_sum_exp")


def test_a_class_is_not_an_instance(pose_model):
    with pytest.raises(TypeError, match="an instance of Combination; found <class"):
        MultiPoseModel(pose_model, LogSumExp)


class TinyGradients(torch.nn.Module):
    """Gradients around 1e-7, most of which float16 rounds to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Linear(64, 32), torch.nn.Linear(32, 1)

    def forward(self, pose):
        return self.last(torch.tanh(self.first(pose))) * 1e-5


def _relative_error(found, expected):
    found, expected = (torch.cat([g.double().flatten() for g in gs]) for gs in (found, expected))
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "float16 parameters"])
def test_gradients_of_float16_do_not_underflow_in_stored(autocast):
    """A loss that is scaled by 2**16, as GradScaler does, is too late for them."""
    pose_model, poses = TinyGradients(), torch.randn(6, 64)
    reference = MultiPoseModel(copy.deepcopy(pose_model).double(), ClosedForm())
    (reference(poses.double()).prediction * 2**16).backward()
    expected = [param.grad for param in reference.parameters()]

    if not autocast:
        pose_model, poses = pose_model.half(), poses.half()
    model = MultiPoseModel(pose_model, ClosedForm(), gradients="stored")
    with torch.autocast("cpu", dtype=torch.float16, enabled=autocast):
        out = model(poses)
    (out.prediction * 2**16).backward()
    # float16 has 11 bits, and a few roundings in a row. Without the inner scale it is 0.02.
    assert _relative_error([param.grad for param in model.parameters()], expected) < 5e-3


def test_the_inner_scale_gives_way_to_large_gradients():
    pose_model = torch.nn.Linear(4, 1, bias=False).half()
    poses = torch.full((3, 4), 3e4, dtype=torch.float16)
    model = MultiPoseModel(pose_model, ClosedForm(), gradients="stored", check_finite=False)
    model(poses).prediction.backward()
    assert pose_model.weight.grad.tolist() == [[3e4] * 4]


def test_a_prediction_does_not_keep_what_it_is_a_view_of(pose_model, poses, monkeypatch):
    class View(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = pose_model

        def forward(self, pose):
            return self.inner(pose).expand(1000).contiguous()[0]

    kept, cat = [], torch.cat

    def noting(tensors, **where):
        if not where:  # with out=, a row of gradients
            kept.extend(tensors)
        return cat(tensors, **where)

    monkeypatch.setattr(torch, "cat", noting)
    MultiPoseModel(View(), ClosedForm(), gradients="stored")(poses)
    assert len(kept) == len(poses)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in kept)


def test_threads_that_share_a_pose_model_do_not_mix_their_gradients(pose_model, poses):
    """Each swaps the parameters for aliases while it runs, and must find the parameters."""
    params = list(pose_model.parameters())
    entered = threading.Barrier(2, timeout=0.2)

    class Slow(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = pose_model

        def forward(self, pose):
            with contextlib.suppress(threading.BrokenBarrierError):
                entered.wait()  # both inside at once, if nothing keeps one out
            return self.inner(pose)

    model = MultiPoseModel(Slow(), ClosedForm(), gradients="stored")
    with ThreadPoolExecutor(2) as pool:
        outs = list(pool.map(lambda part: model(part), [poses[:1], poses[1:2]]))
    assert [*model.pose_model.parameters()] == params
    for out in outs:
        assert len(torch.autograd.grad(out.prediction, params)) == len(params)


@pytest.mark.parametrize(
    ("poses", "message"),
    [
        (torch.tensor(1.0).double(), "poses must be a sequence"),
        (3, "poses must be a sequence with one entry per pose; found int"),
        ("pose", "one entry per pose; found str"),
        ({"x": torch.zeros(4)}, r"found dict\. Put a single pose into a list\. .* collated=True"),
        (UserDict(x=torch.zeros(4)), r"found UserDict\. Put a single pose into a list"),
    ],
    ids=["number", "int", "str", "dict", "like PyG's Data"],
)
def test_poses_that_are_no_sequence_are_refused(pose_model, poses, message):
    with pytest.raises(PredictionError, match=message):
        MultiPoseModel(pose_model, LogSumExp())(poses)


@pytest.mark.parametrize("sizes", [[2.9, 4.1], "34", [[3], [4]]])
def test_sizes_that_are_no_whole_numbers_are_refused(pose_model, poses, sizes):
    with pytest.raises(PredictionError, match="sizes must be whole numbers, one per compound"):
        MultiPoseModel(pose_model, LogSumExp())(poses, sizes=sizes)


def test_sizes_may_be_a_tensor(pose_model, poses):
    out = MultiPoseModel(pose_model, LogSumExp())(poses, sizes=torch.tensor(SIZES))
    assert out.prediction.shape == (3,)


def test_a_pose_model_is_a_module():
    with pytest.raises(TypeError, match=r"pose_model must be a torch\.nn\.Module; found <function"):
        MultiPoseModel(lambda pose: pose, LogSumExp())


def test_a_batch_is_handed_on_as_it_is(pose_model, poses):
    found = []
    for given, options in [(list(poses), {}), (poses, {"collated": True})]:
        model = MultiPoseModel(pose_model, ClosedForm(), collate=torch.stack)
        model.zero_grad()
        losses(model(given, sizes=SIZES, **options))["both"].backward()
        found.append(copy.deepcopy(grads(model)))
    assert_same_gradients(*found)


@pytest.mark.parametrize(
    ("gradients", "sizes", "error", "message"),
    [
        ("graph", None, PredictionError, "poses that come in one batch need the argument sizes"),
        ("graph", [3, 3], PredictionError, r"poses 0 to 5: .* 6 numbers, .*shape \(7, 1\)"),
        ("graph", [8, -1], PredictionError, "compound 1: .*must not be negative; found -1"),
        ("stored", [7], ValueError, "'stored' runs pose by pose .*gradients='recomputed'"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(pose_model, poses, gradients, sizes, error, message):
    model = MultiPoseModel(pose_model, ClosedForm(), gradients=gradients)
    with pytest.raises(error, match=message):
        model(poses, sizes=sizes, collated=True)


class Weighted(Combination):
    """Mean with weights from docking scores: ŷ = Σ softmax(-score)_i ŷ_i."""

    pose_inputs = ("score", "prior")

    def combine(self, predictions: Tensor, score: Tensor, prior: Tensor) -> Tensor:
        return (torch.softmax(-score, dim=0) * (predictions + prior)).sum()


class WeightedClosedForm(Weighted):
    def pose_weights(self, predictions: Tensor, score: Tensor, prior: Tensor) -> Tensor:
        return torch.softmax(-score, dim=0)


class WeightedFullDepth(Weighted):
    def forward(self, pred_list, grad_dict, param_names, *model_params, score, prior):
        assert score.shape == prior.shape == (len(pred_list),)
        return super().forward(
            pred_list, grad_dict, param_names, *model_params, score=score, prior=prior
        )


@MODES
@pytest.mark.parametrize("combination", [Weighted, WeightedClosedForm, WeightedFullDepth])
def test_pose_inputs_reach_the_combination_of_their_compound(
    pose_model, poses, gradients, combination
):
    score, prior = torch.randn(2, 7, dtype=torch.float64)
    model = MultiPoseModel(pose_model, combination(), gradients=gradients)
    predictions = torch.cat([pose_model(pose) for pose in poses])
    weights = torch.cat([torch.softmax(-part, 0) for part in score.split(SIZES)])
    parts = (weights * (predictions + prior)).split(SIZES)
    expected = torch.stack([part.sum() for part in parts])
    (expected.square().sum() + predictions.sin().sum()).backward()
    by_hand = copy.deepcopy(grads(model))
    model.zero_grad()
    out = model(poses, sizes=SIZES, pose_inputs={"score": score, "prior": prior.tolist()})
    torch.testing.assert_close(out.prediction, expected, **EXACT)
    losses(out)["both"].backward()
    assert_same_gradients(grads(model), by_hand)


@MODES
def test_pose_inputs_that_require_grad_get_it(pose_model, poses, gradients):
    score = torch.randn(7, dtype=torch.float64, requires_grad=True)
    model = MultiPoseModel(pose_model, WeightedClosedForm(), gradients=gradients)
    out = model(poses, pose_inputs={"score": score, "prior": torch.zeros(7)})
    (found,) = torch.autograd.grad(out.prediction, score)
    own = WeightedClosedForm().combine(out.pose_predictions.detach(), score, torch.zeros(7))
    torch.testing.assert_close(found, torch.autograd.grad(own, score)[0], **EXACT)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"Weighted needs pose_inputs=\{'score': …\}, one number for each pose; found \[\]"),
        ({"score": [0.0] * 7}, r"needs pose_inputs=\{'prior': …\}.*found \['score'\]"),
        ({"scores": [0.0] * 7}, r"pose_inputs\['scores'\]: Weighted takes no input of this name"),
        (
            {"score": [0.0] * 6, "prior": [0.0] * 7},
            r"pose_inputs\['score'\] must be .*shape \(7,\); found shape \(6,\)",
        ),
        ({"score": ["a"] * 7, "prior": [0.0] * 7}, r"pose_inputs\['score'\]: "),
        (
            {"score": torch.zeros(7, dtype=torch.complex64), "prior": [0.0] * 7},
            r"pose_inputs\['score'\] must be real numbers; found torch\.complex64",
        ),
        (
            {"score": [0.0] * 7, "prior": [0.0] * 4 + [float("nan")] + [0.0] * 2},
            r"pose 4 \(pose 3 of compound 1\): pose_inputs\['prior'\] is nan",
        ),
    ],
    ids=["none", "one missing", "unknown", "too few", "no numbers", "complex", "NaN"],
)
def test_pose_inputs_that_do_not_fit_are_named(pose_model, poses, given, message):
    with pytest.raises(PredictionError, match=message):
        MultiPoseModel(pose_model, Weighted())(poses, sizes=SIZES, pose_inputs=given)


def test_pose_inputs_in_a_list_of_tensors_get_their_gradient(pose_model, poses):
    scores = [torch.tensor(float(i), dtype=torch.float64, requires_grad=True) for i in range(7)]
    model = MultiPoseModel(pose_model, Weighted())
    model(poses, pose_inputs={"score": scores, "prior": torch.zeros(7)}).prediction.backward()
    stacked = torch.arange(7.0, dtype=torch.float64, requires_grad=True)
    model(poses, pose_inputs={"score": stacked, "prior": torch.zeros(7)}).prediction.backward()
    assert torch.equal(torch.stack([score.grad for score in scores]), stacked.grad)
    assert stacked.grad.any()


@pytest.mark.parametrize("scores", [[1.0] * 7, torch.zeros(7)], ids=["list", "tensor"])
def test_pose_inputs_must_be_a_dict(pose_model, poses, scores):
    with pytest.raises(PredictionError, match=r"pose_inputs must be a dict .* (list|Tensor)$"):
        MultiPoseModel(pose_model, Weighted())(poses, pose_inputs=scores)


def test_a_combination_without_pose_inputs_takes_none(pose_model, poses):
    with pytest.raises(PredictionError, match=r"LogSumExp takes no input of this name.*are \(\)"):
        MultiPoseModel(pose_model, LogSumExp())(poses, pose_inputs={"score": torch.zeros(7)})


@MODES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_with_a_gradient_scaler_trains_as_float32_does(gradients, dtype):
    """Two steps; half precision has 8 or 11 bits."""
    poses, found = torch.randn(6, 8), []
    start = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    for enabled in (False, True):
        model = MultiPoseModel(copy.deepcopy(start), ClosedForm(), gradients=gradients)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        # With a scale that fits: the scaler skips a step whose gradients overflow.
        half = enabled and dtype == torch.float16
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=half)
        for _ in range(2):
            with torch.autocast("cpu", dtype=dtype, enabled=enabled):
                out = model(poses, sizes=[4, 2])
            loss = out.prediction.square().sum() + out.pose_predictions.sin().sum()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    moved = (found[0] - torch.cat([p.detach().flatten() for p in start.parameters()])).norm()
    # A few roundings in a row, in each of some ten products.
    assert (found[1] - found[0]).norm() / moved < 8 * torch.finfo(dtype).eps


@MODES
@pytest.mark.parametrize("what", ["pose model", "whole model"])
def test_a_compiled_model_has_the_same_gradients(pose_model, poses, gradients, what):
    model = MultiPoseModel(pose_model, ClosedForm(), gradients=gradients)
    losses(model(poses, sizes=SIZES))["both"].backward()
    expected = copy.deepcopy(grads(pose_model))
    if what == "pose model":
        model.pose_model = torch.compile(pose_model, backend="aot_eager")
    compiled = model if what == "pose model" else torch.compile(model, backend="aot_eager")
    for _ in range(2):
        pose_model.zero_grad()
        losses(compiled(poses, sizes=SIZES))["both"].backward()
    assert_same_gradients(grads(pose_model), expected)


class CompiledFunction(torch.autograd.Function):
    """A stand-in for the Function of AOTAutograd: same name, and it refuses ``retain_graph``."""

    @staticmethod
    def forward(ctx, hidden):
        ctx.save_for_backward(hidden)
        return hidden.tanh()

    @staticmethod
    def backward(ctx, gradient):
        assert not graph_is_retained()
        (hidden,) = ctx.saved_tensors
        return gradient * (1 - hidden.tanh().square())


def test_stored_does_not_retain_the_graph_of_a_compiled_module(pose_model, poses):
    class Compiled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = pose_model

        def forward(self, pose):
            return self.inner[2](CompiledFunction.apply(self.inner[0](pose)))

    losses(MultiPoseModel(pose_model, ClosedForm())(poses))["both"].backward()
    expected = copy.deepcopy(grads(pose_model))
    pose_model.zero_grad()
    losses(MultiPoseModel(Compiled(), ClosedForm(), gradients="stored")(poses))["both"].backward()
    assert_same_gradients(grads(pose_model), expected)


class AsMtennReturns(FullDepth):
    """Returns the pair of mtenn 0.5 and later, through a Function with two outputs."""

    def forward(self, pred_list, grad_dict, param_names, *model_params):
        return TwoOutputs.apply(pred_list, grad_dict, param_names, *model_params)


class TwoOutputs(torch.autograd.Function):
    @staticmethod
    def forward(pred_list, grad_dict, param_names, *model_params):
        predictions = torch.stack(pred_list).flatten()
        return torch.logsumexp(predictions, dim=0), predictions

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, grad_dict, ctx.names, *_ = inputs
        ctx.keys, tensors = Combination.split_grad_dict(grad_dict)
        ctx.save_for_backward(output[1], *tensors)

    @staticmethod
    def backward(ctx, go_combined, go_poses):
        predictions, *tensors = ctx.saved_tensors
        grad_dict = Combination.join_grad_dict(ctx.keys, tensors)
        weights = go_combined * torch.softmax(predictions, dim=0) + go_poses
        sums = [sum(w * g for w, g in zip(weights, grad_dict[n], strict=True)) for n in ctx.names]
        return None, None, None, *sums


@pytest.mark.parametrize("loss", ["combined", "poses", "both"])
def test_a_combination_that_returns_the_pair_of_mtenn_is_accepted(pose_model, poses, loss):
    found = []
    for combination in (ClosedForm(), AsMtennReturns()):
        model = MultiPoseModel(pose_model, combination, gradients="stored")
        model.zero_grad()
        losses(model(poses, sizes=SIZES))[loss].backward()
        found.append(copy.deepcopy(grads(model)))
    assert_same_gradients(*found)


def test_a_combination_that_returns_the_pair_of_mtenn_passes_the_gate():
    with registry.temporary({"pair": AsMtennReturns}):
        assert registry.get("pair") is AsMtennReturns


@MODES
def test_combining_is_in_float32_under_autocast(gradients):
    class Products(Combination):
        def combine(self, predictions):
            return torch.softmax(predictions, dim=0) @ predictions

        def pose_weights(self, predictions):
            p = torch.softmax(predictions, dim=0)
            return p * (1 + predictions - p @ predictions)

    pose_model, poses = torch.nn.Linear(4, 1), torch.randn(5, 4)
    model = MultiPoseModel(pose_model, Products(), gradients=gradients)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(poses)
    assert out.prediction == Products().combine(out.pose_predictions)


def test_stored_gradients_are_taken_outside_of_autocast():
    """As backward of a loss is: what a pose model does in float32 has a gradient in float32."""

    class Island(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(64, 1)

        def forward(self, pose):
            with torch.autocast("cpu", enabled=False):
                return self.inner(torch.tanh(pose @ self.inner.weight.t() * pose))

    pose_model, poses = Island(), torch.randn(3, 64)
    found = []
    for gradients in ("graph", "stored"):
        model = MultiPoseModel(pose_model, ClosedForm(), gradients=gradients)
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(poses)
        out.prediction.backward()
        found.append(pose_model.inner.weight.grad.clone())
    # Float32 has 24 bits; bfloat16, with 8, would be off by 4e-3.
    assert _relative_error([found[1]], [found[0]]) < 1e-6


@pytest.mark.parametrize("n_with_weight", [9, 7, 2])
def test_stored_gradients_are_added_up_in_float32_where_backward_is_inside_of_autocast(
    n_with_weight,
):
    pose_model, poses = torch.nn.Linear(64, 1), torch.randn(9, 64)
    weights = torch.randn(9) * (torch.arange(9) < n_with_weight)
    found = []
    for enabled in (False, True):
        out = MultiPoseModel(pose_model, ClosedForm(), gradients="stored")(poses)
        pose_model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out.pose_predictions.backward(weights)
        found.append(pose_model.weight.grad.clone())
    assert torch.equal(*found)


@pytest.mark.parametrize("n_with_weight", [9, 7, 2, 0])
def test_stored_gradients_without_weight_do_no_harm_however_large(n_with_weight):
    """However many have weight: few are taken by themselves."""
    poses = torch.randn(9, 4, dtype=torch.float64)
    weights = torch.randn(9, dtype=torch.float64) * (torch.arange(9) < n_with_weight)
    expected = weights @ poses
    poses[n_with_weight:] = torch.inf
    pose_model = torch.nn.Linear(4, 1).double()
    model = MultiPoseModel(pose_model, ClosedForm(), gradients="stored", check_finite=False)
    model(poses).pose_predictions.backward(weights)
    torch.testing.assert_close(pose_model.weight.grad[0], expected, **EXACT)


def test_a_step_does_not_import_sympy():
    """It takes half a second, once, and torch does where it is asked for ``grad_outputs=``."""
    code = """
import sys, torch
from mtenn_core import Combination, MultiPoseModel
from mtenn_core._engine.mode_table import MODES

class Mean(Combination):
    def combine(self, predictions):
        return predictions.mean()

    def pose_weights(self, predictions):
        return torch.full_like(predictions, 1 / len(predictions))

for gradients in MODES:
    model = MultiPoseModel(torch.nn.Linear(4, 1), Mean(), gradients=gradients)
    model(torch.randn(3, 4)).prediction.backward()
    print("sympy" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == len(GRADIENTS) * "False\n"


def test_gradients_do_not_underflow_where_the_pose_model_has_autocast_of_its_own():
    class Inner(TinyGradients):
        def forward(self, pose):
            with torch.autocast("cpu", dtype=torch.float16):
                return super().forward(pose)

    pose_model, poses = Inner(), torch.randn(6, 64)
    reference = TinyGradients()
    reference.load_state_dict(pose_model.state_dict())
    plain = MultiPoseModel(reference.double(), ClosedForm())(poses.double()).prediction
    expected = torch.autograd.grad(plain, list(reference.parameters()))
    model = MultiPoseModel(pose_model, ClosedForm(), gradients="stored")
    found = torch.autograd.grad(model(poses).prediction, list(pose_model.parameters()))
    assert _relative_error(found, expected) < 5e-3  # 11 bits, and a few roundings in a row


def test_the_end_of_training_gives_memory_back(pose_model, poses):
    model = MultiPoseModel(pose_model, ClosedForm(), gradients="stored")
    model(poses).prediction.backward()
    assert pose_model in _SPARE
    model.eval()
    assert pose_model not in _SPARE
    model.train()
    model(poses).prediction.backward()


def test_options_that_are_set_later_are_checked(pose_model, poses):
    model = MultiPoseModel(pose_model, ClosedForm())
    model.gradients = "recompute"
    with pytest.raises(ValueError, match="found 'recompute'"):
        model(poses)
