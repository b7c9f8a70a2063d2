"""Poses with several numbers: tasks, and combinations that take a vector from each pose."""

import copy
import itertools
from collections import UserList

import pytest
import torch
from torch import Tensor

from mtenn_core import Combination, MultiPoseModel, as_mtenn_combination, jackknife_error
from mtenn_core._engine.mode_table import MODES
from mtenn_core.errors import (
    CheckpointError,
    CombinationContractError,
    GradientError,
    PredictionError,
)

SIZES = [3, 1, 2, 3, 3, 2]
N_POSES = sum(SIZES)

# float64 sums of a few hundred products, in another order: 1e-15 of the largest, which is about 10.
EXACT = {"rtol": 1e-12, "atol": 1e-12}


class SmoothMinimum(Combination):
    def __init__(self, scale: float = 2.0):
        super().__init__()
        self.log_scale = torch.nn.Parameter(torch.tensor([scale], dtype=torch.float64).log())

    def combine(self, predictions: Tensor) -> Tensor:
        scale = self.log_scale.exp().squeeze()
        return -torch.logsumexp(-scale * predictions, dim=0) / scale

    def pose_weights(self, predictions: Tensor) -> Tensor:
        return torch.softmax(-self.log_scale.exp() * predictions, dim=0)


class Scored(Combination):
    pose_inputs = ("score",)

    def combine(self, predictions: Tensor, score: Tensor) -> Tensor:
        return (torch.softmax(score, dim=0) * predictions).sum()


class FullDepth(Combination):
    def forward(self, pred_list, grad_dict, param_names, *model_params):
        return SmoothMinimum()(pred_list, grad_dict, param_names, *model_params)


class Confident(Combination):
    """Σ softmax(c)_i y_i, with its derivative in closed form."""

    pose_columns = ("affinity", "confidence")

    def combine(self, predictions: Tensor) -> Tensor:
        affinities, confidences = predictions.unbind(-1)
        return (torch.softmax(confidences, dim=0) * affinities).sum()

    def pose_weights(self, predictions: Tensor) -> Tensor:
        affinities, confidences = predictions.unbind(-1)
        p = torch.softmax(confidences, dim=0)
        return torch.stack([p, p * (affinities - (p * affinities).sum())], dim=-1)


class DeepSets(Combination):
    """A vector of three numbers from any number of columns, with a pose input."""

    pose_columns = "any"
    pose_inputs = ("strain",)

    def __init__(self) -> None:
        super().__init__()
        self.outer = torch.nn.LazyLinear(3, dtype=torch.float64)

    def combine(self, predictions: Tensor, strain: Tensor) -> Tensor:
        return self.outer((strain.exp().unsqueeze(-1) * predictions.tanh()).sum(0))


class Attention(Combination):
    """Gated attention over embeddings, whose gate has dropout in training."""

    def __init__(self, n_columns: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.pose_columns = n_columns
        self.value = torch.nn.Linear(n_columns, 5, dtype=torch.float64)
        self.gate = torch.nn.Linear(n_columns, 5, dtype=torch.float64)
        self.score = torch.nn.Linear(5, 1, dtype=torch.float64)
        self.dropout = torch.nn.Dropout(dropout)
        self.stochastic = dropout > 0

    def combine(self, predictions: Tensor) -> Tensor:
        hidden = self.value(predictions).tanh() * self.gate(predictions).sigmoid()
        scores = self.score(self.dropout(hidden)).squeeze(-1)
        return torch.softmax(scores, dim=0) @ predictions


class Largest(Combination):
    """The largest number of each column: the other poses have weights of zero."""

    pose_columns = "any"
    smooth = False

    def combine(self, predictions: Tensor) -> Tensor:
        return predictions.amax(0)


def new_pose_model(n_columns):
    return torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, n_columns)
    ).double()


def new_poses(n_poses=N_POSES):
    return list(3 * torch.randn(n_poses, 4, dtype=torch.float64))


LOSSES = {
    "result": lambda prediction, _: _weighted(prediction),
    "poses": lambda _, of_poses: of_poses.sin().sum(),
    "both": lambda prediction, of_poses: _weighted(prediction) + 0.1 * of_poses.sin().sum(),
}


def _weighted(prediction: Tensor) -> Tensor:
    """Return a loss with another factor for each number, so that none can replace another."""
    factors = torch.linspace(1, 2, prediction.numel(), dtype=prediction.dtype)
    return (factors.view_as(prediction) * prediction.sin()).sum()


def plain_output(model, poses, sizes, inputs=None):
    """Return combined and pose predictions of plain autograd."""
    combinations = [model.combination]
    if isinstance(model.combination, torch.nn.ModuleList):
        combinations = list(model.combination)
    y = torch.stack([model.pose_model(pose) for pose in poses])
    of_compounds = []
    parts = {name: numbers.split(sizes) for name, numbers in (inputs or {}).items()}
    for index, own in enumerate(y.split(sizes)):
        given = {name: of_input[index] for name, of_input in parts.items()}
        if model.tasks is None:
            of_compounds.append(combinations[0].combine(own, **given))
            continue
        several = itertools.cycle(combinations)
        columns = [
            c.combine(column, **{name: given[name] for name in c.pose_inputs})
            for column, c in zip(own.unbind(1), several, strict=False)
        ]
        of_compounds.append(torch.stack(columns))
    return torch.stack(of_compounds), y


def gradients_of(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: param.grad for name, param in model.named_parameters()}


def assert_as_plain_autograd(model, poses, sizes, inputs=None, losses=LOSSES, **options):
    """Compare values and gradients of each loss with those of plain autograd."""
    for loss in losses.values():
        torch.manual_seed(3)
        expected = plain_output(model, poses, sizes, inputs)
        # One loss needs no combination, and the other would not be of the gate.
        expected_gradients = gradients_of(model, loss(*expected))
        torch.manual_seed(3)
        out = model(poses, sizes, inputs, **options)
        torch.testing.assert_close(tuple(out), expected, **EXACT)
        found = gradients_of(model, loss(*out))
        for name, gradient in expected_gradients.items():
            zero = torch.zeros(())
            one, other = (zero if g is None else g for g in (found[name], gradient))
            torch.testing.assert_close(one, other, **EXACT, msg=lambda m, name=name: f"{name}: {m}")


TASKS = {
    "one combination": (SmoothMinimum, 3),
    "pose input": (Scored, ("a", "b")),
    "one for each": (lambda: [SmoothMinimum(), Scored(), SmoothMinimum(0.5)], ("a", "b", "c")),
    "one task": (SmoothMinimum, 1),
}
VECTORS = {
    "closed form": (Confident, 2),
    "vector result": (DeepSets, 5),
    "attention": (lambda: Attention(6), 6),
    "kinks": (Largest, 4),
}


def new_model(combination, n_columns, **options):
    pose_model = new_pose_model(n_columns)
    return MultiPoseModel(pose_model, combination, **options)


def inputs_of(model):
    listed = [model.combination]
    if isinstance(model.combination, torch.nn.ModuleList):
        listed = list(model.combination)
    names = {name for combination in listed for name in combination.pose_inputs}
    return {name: torch.randn(N_POSES, dtype=torch.float64) for name in names}


@pytest.mark.parametrize("gradients", MODES)
@pytest.mark.parametrize("case", TASKS)
def test_tasks_give_the_numbers_of_plain_autograd(case, gradients):
    make, tasks = TASKS[case]
    n_tasks = tasks if isinstance(tasks, int) else len(tasks)
    model = new_model(make(), n_tasks, tasks=tasks, gradients=gradients)
    assert_as_plain_autograd(model, new_poses(), SIZES, inputs_of(model))


@pytest.mark.parametrize("gradients", MODES)
@pytest.mark.parametrize("case", VECTORS)
def test_vectors_give_the_numbers_of_plain_autograd(case, gradients):
    make, n_columns = VECTORS[case]
    model = new_model(make(), n_columns, gradients=gradients)
    inputs = inputs_of(model)
    model(new_poses(), SIZES, inputs)  # makes lazy parameters
    assert_as_plain_autograd(model, new_poses(), SIZES, inputs)


@pytest.mark.parametrize("gradients", ["graph", "recomputed"])
@pytest.mark.parametrize("chunk_size", [1, 4, 100])
@pytest.mark.parametrize("make", [lambda: Attention(6), SmoothMinimum], ids=["vectors", "tasks"])
def test_chunks_change_nothing(make, chunk_size, gradients):
    options = {} if make is not SmoothMinimum else {"tasks": 6}
    model = new_model(
        make(), 6, gradients=gradients, collate=torch.stack, chunk_size=chunk_size, **options
    )
    assert_as_plain_autograd(model, new_poses(), SIZES)
    model.collate, model.chunk_size = None, None
    for out in (model(torch.stack(new_poses()), SIZES, collated=True), model(new_poses(), SIZES)):
        assert out.pose_predictions.shape == (N_POSES, 6)
        assert out.prediction.shape == (len(SIZES), 6)


def test_a_combination_of_full_depth_works_for_each_task():
    model = new_model(FullDepth(), 3, tasks=3, gradients="stored")
    model.combination.combine = SmoothMinimum().combine  # for plain autograd
    assert_as_plain_autograd(model, new_poses(), SIZES)
    mixed = new_model([FullDepth(), SmoothMinimum()], 2, tasks=2, gradients="stored")
    mixed.combination[0].combine = SmoothMinimum().combine
    assert_as_plain_autograd(mixed, new_poses(), SIZES)
    with torch.no_grad():
        assert mixed(new_poses(), SIZES).prediction.shape == (len(SIZES), 2)


@pytest.mark.parametrize("gradients", MODES)
def test_one_compound_has_one_number_per_task(gradients):
    model = new_model(SmoothMinimum(), 3, tasks=3, gradients=gradients)
    out = model(new_poses(5))
    assert out.prediction.shape == (3,)
    assert out.pose_predictions.shape == (5, 3)
    assert new_model(FullDepth(), 3, tasks=3, gradients="stored")(new_poses(5))[0].shape == (3,)


@pytest.mark.parametrize("gradients", MODES)
def test_the_prediction_of_a_task_depends_on_no_other_task(gradients):
    model = new_model(SmoothMinimum(), 3, tasks=3, gradients=gradients)
    readout = model.pose_model[2]
    for sizes in (None, SIZES):
        out = model(new_poses(), sizes)
        for task in range(3):
            (gradient,) = torch.autograd.grad(
                out.prediction[..., task].sum(), readout.weight, retain_graph=True
            )
            others = [other for other in range(3) if other != task]
            assert gradient[task].abs().min() > 0
            assert not gradient[others].any()


@pytest.mark.parametrize("gradients", ["graph", "recomputed"])
@pytest.mark.parametrize("sizes", [[N_POSES], SIZES], ids=["one compound", "ragged"])
def test_dropout_in_a_gate_is_that_of_plain_autograd(gradients, sizes):
    model = new_model(Attention(6, dropout=0.5), 6, gradients=gradients)
    assert_as_plain_autograd(model, new_poses(), sizes)
    model(new_poses(), sizes).prediction.sum().backward()
    assert not torch.equal(*(model(new_poses(2)).prediction for _ in range(2)))


def test_dropout_in_the_pose_model_and_in_the_gate_are_replayed():
    """Bit for bit: the second run repeats the first, and the gate is not run again."""
    models = []
    for gradients in ("graph", "recomputed"):
        torch.manual_seed(0)
        pose_model = torch.nn.Sequential(new_pose_model(6), torch.nn.Dropout(0.3))
        model = MultiPoseModel(pose_model, Attention(6, dropout=0.5), gradients=gradients)
        torch.manual_seed(1)
        out = model(new_poses(), SIZES)
        loss = LOSSES["both"](*out)
        models.append([loss, *gradients_of(model, loss).values()])
    for one, other in zip(*models, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("gradients", ["graph", "recomputed"])
def test_a_pose_is_skipped_when_its_whole_row_of_weights_is_zero(gradients):
    runs = []

    class Counted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 2)

        def forward(self, pose):
            y = self.layer(pose).tanh()
            y.register_hook(lambda gradient: None if gradient is None else runs.append(gradient))
            return y

    poses = torch.tensor([[5.0, 0, 0, 0], [0, 5.0, 0, 0], [0, 0, 0, 0], [1.0, 1, 0, 0]])
    model = MultiPoseModel(Counted(), Largest(), gradients=gradients)
    with torch.no_grad():
        model.pose_model.layer.bias.zero_()
        model.pose_model.layer.weight.copy_(torch.eye(2, 4))
    model(poses).prediction.sum().backward()
    assert len(runs) == 2  # pose 0 has the largest of column 0, pose 1 that of column 1
    estimate = model.estimate(poses)
    assert estimate.n_with_weight == 2
    found = {cost.gradients: cost[1:3] for cost in estimate.modes}
    assert found == {"graph": (4, 2), "stored": (4, 8), "recomputed": (6, 2)}


def test_stored_refuses_embeddings_and_names_the_mode_that_works():
    words = r"at most 16 numbers per pose; found 17\. Use gradients='recomputed'"
    for model in (
        new_model(Attention(17), 17, gradients="stored"),
        new_model(SmoothMinimum(), 17, tasks=17, gradients="stored"),
    ):
        with pytest.raises(GradientError, match=words):
            model(new_poses(3))
        assert {cost.gradients for cost in model.estimate(new_poses(3)).modes} == {
            "graph",
            "recomputed",
        }
    assert new_model(Attention(16), 16, gradients="stored")(new_poses(3)).prediction.shape == (16,)


def test_stored_needs_memory_for_each_number():
    costs = {}
    for n_columns in (1, 4):
        model = new_model(SmoothMinimum(), n_columns, tasks=n_columns)
        estimate = model.estimate(new_poses(10))
        costs[n_columns] = {cost.gradients: cost for cost in estimate.modes}
        stored = costs[n_columns]["stored"]
        assert (stored.forwards, stored.backwards) == (10, 10 * n_columns)
        # 10 poses, each with a gradient for each number; the rest is the same in all modes.
        assert stored.memory > 10 * n_columns * estimate.parameters


@pytest.mark.parametrize("gradients", MODES)
def test_pose_weights_have_the_shape_of_the_pose_predictions(gradients):
    model = new_model([SmoothMinimum(), Scored()], 2, tasks=2, gradients=gradients)
    inputs = inputs_of(model)
    out = model(new_poses(), SIZES, inputs)
    weights = model.pose_weights(out.pose_predictions, SIZES, inputs)
    y = out.pose_predictions.detach().split(SIZES)
    expected = [
        torch.stack([torch.softmax(-2 * own[:, 0], 0), torch.softmax(score, 0)], dim=1)
        for own, score in zip(y, inputs["score"].split(SIZES), strict=True)
    ]
    torch.testing.assert_close(weights, torch.cat(expected), **EXACT)
    model = new_model(Confident(), 2, gradients=gradients)
    out = model(new_poses(), SIZES)
    weights = model.pose_weights(out.pose_predictions, SIZES)
    expected = [Confident().pose_weights(own) for own in out.pose_predictions.split(SIZES)]
    torch.testing.assert_close(weights, torch.cat(expected).detach(), **EXACT)


def test_the_pose_weights_of_a_vector_are_an_error():
    model = new_model(Attention(6), 6)
    out = model(new_poses(), SIZES)
    words = "Attention returns a vector, and pose weights are the derivative of one number"
    with pytest.raises(CombinationContractError, match=words):
        model.pose_weights(out.pose_predictions, SIZES)
    with pytest.raises(CombinationContractError, match=words):
        model.combination.pose_weights(torch.randn(3, 6, dtype=torch.float64))


def test_pose_weights_of_a_task_need_the_column_of_the_task():
    """Softmax over the wrong axis would give numbers that look like weights."""
    model = new_model(SmoothMinimum(), 3, tasks=3)
    of_poses = model(new_poses(4)).pose_predictions
    words = r"takes the predictions for one compound, shape \(n_poses,\); found shape \(4, 3\)"
    with pytest.raises(PredictionError, match=words):
        model.combination.pose_weights(of_poses)
    several = model(new_poses(), SIZES).pose_predictions
    with pytest.raises(PredictionError, match="found those for 6 compounds"):
        model.combination.pose_weights(several[:, 0])
    with pytest.raises(PredictionError, match=r"3 per pose, like the .*; found \(12, 2\)"):
        model.pose_weights(several[:12, :2])


@pytest.mark.parametrize("gradients", MODES)
def test_a_number_that_is_not_finite_is_named_by_pose_and_column(gradients):
    class WithNaN(torch.nn.Module):
        def forward(self, pose):
            return torch.where(pose > 5, torch.nan, pose)

    poses = torch.zeros(N_POSES, 2)
    poses[4, 1] = 6
    model = MultiPoseModel(WithNaN(), Confident(), gradients=gradients)
    with pytest.raises(
        PredictionError, match=r"pose 4 \(pose 0 of compound 2\), column 1 \('confidence'\): the"
    ) as raised:
        model(poses, SIZES)
    assert (raised.value.pose, raised.value.compound) == (4, 2)
    model = MultiPoseModel(WithNaN(), SmoothMinimum(), tasks=2, gradients=gradients)
    with pytest.raises(PredictionError, match=r"pose 4 .*, column 1: the prediction is nan"):
        model(poses, SIZES)


@pytest.mark.parametrize("gradients", MODES)
@pytest.mark.parametrize(
    ("columns", "shape", "words"),
    [
        (
            Confident,
            (3,),
            r"2 numbers per pose \(affinity, confidence\), shape \(2,\), in floating",
        ),
        (Confident, (), r"2 numbers per pose .* found shape \(\), torch.float64"),
        (Confident, (2, 1), r"shape \(2,\), in floating point; found shape \(2, 1\)"),
        (Largest, (), r"some numbers per pose, shape \(n,\), in floating point; found shape \(\)"),
        (Largest, (0,), r"some numbers per pose"),
        (SmoothMinimum, (2,), r"one number in floating point; found shape \(2,\)"),
    ],
)
def test_another_number_of_columns_is_an_error(columns, shape, words, gradients):
    class Fixed(torch.nn.Module):
        def forward(self, pose):
            return torch.zeros(shape, dtype=torch.float64)

    model = MultiPoseModel(Fixed(), columns(), gradients=gradients)
    with pytest.raises(PredictionError, match=words):
        model(new_poses(3))


def test_a_batch_with_another_number_of_columns_is_an_error():
    model = new_model(Confident(), 3, collate=torch.stack)
    with pytest.raises(PredictionError, match=r"poses 0 to 4: .* shape \(5, 2\), in floating"):
        model(new_poses(5))
    model = new_model(SmoothMinimum(), 3, collate=torch.stack, tasks=("a", "b"))
    with pytest.raises(PredictionError, match=r"2 numbers per pose \(a, b\), .*found shape \(5, 3"):
        model(new_poses(5))


def test_a_vector_from_a_combination_of_one_number_is_an_error():
    class Vector(Combination):
        def combine(self, predictions):
            return predictions[:2]

    class Matrix(Combination):
        pose_columns = 3

        def combine(self, predictions):
            return predictions

    with pytest.raises(CombinationContractError, match=r"a scalar tensor, shape \(\); found"):
        new_model(Vector(), 1)(new_poses(3))
    with pytest.raises(CombinationContractError, match=r"or a vector, shape \(n_results,\); found"):
        new_model(Matrix(), 3)(new_poses(3))


def test_vectors_of_different_lengths_are_an_error():
    class Ragged(Combination):
        pose_columns = 3

        def combine(self, predictions):
            return predictions[:, 0]

    with pytest.raises(CombinationContractError, match="the same shape for every compound; found"):
        new_model(Ragged(), 3)(new_poses(), SIZES)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tasks": 0}, "tasks must be a whole number above 0, .*; found 0"),
        ({"tasks": True}, "found True"),
        ({"tasks": "ab"}, "a list of different names, or None; found 'ab'"),
        ({"tasks": ["a", "a"]}, "different names"),
        ({"tasks": 2.0}, "found 2.0"),
        ({"tasks": []}, r"found \[\]"),
        ({"combination": [SmoothMinimum()] * 2}, "several combinations need the argument tasks"),
        ({"combination": [SmoothMinimum()] * 2, "tasks": 3}, "each of the 3 tasks; found 2"),
        ({"combination": Confident(), "tasks": 2}, "Leave out tasks"),
    ],
)
def test_tasks_that_fit_nothing_are_refused(options, words):
    options = {"combination": SmoothMinimum()} | options
    with pytest.raises(ValueError, match=words):
        MultiPoseModel(new_pose_model(2), **options)


@pytest.mark.parametrize("names", [("a", "b"), UserList("ab")], ids=["tuple", "UserList"])
def test_names_of_tasks_may_be_in_any_sequence(names):
    model = new_model(SmoothMinimum(), 2, tasks=names)
    state = new_model(SmoothMinimum(), 2, tasks=["a", "b"]).state_dict()
    model.load_state_dict(state)
    with pytest.raises(CheckpointError, match="tasks"):
        new_model(SmoothMinimum(), 2, tasks=UserList("ba")).load_state_dict(state)
    assert model(new_poses(), SIZES).prediction.shape == (len(SIZES), 2)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ("all", "found 'all'"),
        (0, "found 0"),
        (True, "found True"),
        (("a", "a"), "different names"),
        ((), r"found \(\)"),
        (2.5, "found 2.5"),
    ],
)
def test_columns_that_cannot_be_are_refused(columns, words):
    class Wrong(Largest):
        pose_columns = columns

    with pytest.raises(
        CombinationContractError, match=f"Wrong.pose_columns must be .*{words}|{words}"
    ):
        new_model(Wrong(), 2)


def test_a_class_with_columns_cannot_override_forward():
    class Both(FullDepth):
        pose_columns = 2

    with pytest.raises(CombinationContractError, match=r"Both overrides forward, .* Write combine"):
        new_model(Both(), 2, gradients="stored")


@pytest.mark.parametrize("gradients", MODES)
def test_half_precision_becomes_float32(gradients):
    model = MultiPoseModel(new_pose_model(2).bfloat16(), Confident(), gradients=gradients)
    out = model([pose.bfloat16() for pose in new_poses()], SIZES)
    assert out.prediction.dtype == out.pose_predictions.dtype == torch.float32
    out.prediction.sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        model = MultiPoseModel(new_pose_model(3).float(), SmoothMinimum(), tasks=3)
        assert (
            model([pose.float() for pose in new_poses()], SIZES).prediction.dtype == torch.float32
        )


def test_a_checkpoint_knows_the_combination_of_each_task():
    def model_of(*combinations, **options):
        return new_model(list(combinations), 2, tasks=2, **options)

    state = model_of(SmoothMinimum(), Scored()).state_dict()
    model_of(SmoothMinimum(), Scored()).load_state_dict(copy.deepcopy(state))
    with pytest.raises(CheckpointError, match=r"Scored.*SmoothMinimum"):
        model_of(SmoothMinimum(), SmoothMinimum()).load_state_dict(state, strict=False)
    single = new_model(SmoothMinimum(), 2, tasks=2)
    with pytest.raises(CheckpointError, match=r"has 2 combination\(s\), and this model has 1"):
        single.load_state_dict(state, strict=False)
    named = new_model(SmoothMinimum(), 2, tasks=("a", "b"))
    named.load_state_dict(single.state_dict())
    with pytest.raises(CheckpointError, match=r"is of the tasks \['a', 'b'\], in this order"):
        new_model(SmoothMinimum(), 2, tasks=["b", "a"]).load_state_dict(named.state_dict())


def test_forward_of_a_vector_combination_takes_a_gradient_for_each_number():
    combination, pose_model = Confident(), new_pose_model(2)
    params = dict(pose_model.named_parameters())
    pred_list = [pose_model(pose) for pose in new_poses(4)]
    grad_dict = {
        name: [
            torch.stack([torch.autograd.grad(n, param, retain_graph=True)[0] for n in y])
            for y in pred_list
        ]
        for name, param in params.items()
    }
    value = combination([y.detach() for y in pred_list], grad_dict, list(params), *params.values())
    expected = combination.combine(torch.stack(pred_list))
    torch.testing.assert_close(value, expected, **EXACT)
    for one, other in zip(
        torch.autograd.grad(value, list(params.values())),
        torch.autograd.grad(expected, list(params.values())),
        strict=True,
    ):
        torch.testing.assert_close(one, other, **EXACT)


def test_what_takes_one_number_per_pose_says_so():
    with pytest.raises(ValueError, match="Confident has pose_columns"):
        as_mtenn_combination(Confident())
    with pytest.raises(
        ValueError, match="takes several numbers per pose, and jackknife_error only"
    ):
        jackknife_error(Confident(), torch.randn(4, 2))


def test_one_pass_over_many_compounds_runs_combine_a_few_times():
    """No Python per compound: as many calls for 20 compounds as for 2,000."""
    counts = []
    for n_compounds in (20, 2000):
        calls = []

        class Counting(Confident):
            def combine(self, predictions, calls=calls):
                calls.append(1)
                return super().combine(predictions)

        model = MultiPoseModel(torch.nn.Identity(), Counting())
        poses = torch.randn(3 * n_compounds, 2)
        for _ in range(2):  # the first call compares the batch with a loop
            calls.clear()
            model(poses, [3] * n_compounds, collated=True)
        counts.append(len(calls))
    assert counts[0] == counts[1] == 1


class RowMaximum(Combination):
    """Its derivative at ties within a pose depends on whether ``max`` gets a dimension."""

    pose_columns = "any"

    def combine(self, predictions: Tensor) -> Tensor:
        return torch.stack([row.max() for row in predictions.unbind(0)]).sum()


def test_ties_within_a_pose_have_the_derivative_of_the_loop():
    model = MultiPoseModel(torch.nn.Identity(), RowMaximum())
    model(torch.randn(80, 3), [4] * 20, collated=True)  # no ties here
    tied = torch.zeros(80, 3, requires_grad=True)
    out = model(tied, [4] * 20, collated=True)
    (gradient,) = torch.autograd.grad(out.prediction.sum(), tied)
    torch.testing.assert_close(gradient, torch.full_like(tied, 1 / 3))


def test_forward_of_a_vector_combination_names_what_does_not_fit():
    combination, w = Confident(), torch.nn.Parameter(torch.ones(2))
    two, gradients = [torch.ones(2)] * 2, [torch.ones(2, 2)] * 2
    for pred_list, grads, error, words in [
        ([torch.ones(3), torch.ones(1)], gradients, PredictionError, "pose 0: .* 2 numbers"),
        ([torch.ones(2), torch.ones(())], gradients, PredictionError, r"pose 1: .*found \(\)"),
        ([torch.ones(2), None], gradients, PredictionError, "pose 1: .*found NoneType"),
        (two, gradients[:1], GradientError, "'w': expected 2 pose gradients, .*; found 1"),
        (two, [torch.ones(2, 2), None], GradientError, "'w', pose 1: .* found NoneType"),
        (two, [torch.ones(2, 2), torch.ones(3, 2)], GradientError, r"pose 1: .*found \(3, 2\)"),
    ]:
        with pytest.raises(error, match=words):
            combination(pred_list, {"w": grads}, ["w"], w)


def test_a_vector_needs_a_class_without_pose_weights():
    class Both(Confident):
        def combine(self, predictions):
            return predictions.sum(0)

    for gradients in MODES:
        with pytest.raises(CombinationContractError, match="because it defines pose_weights"):
            new_model(Both(), 2, gradients=gradients)(new_poses(3))


@pytest.mark.parametrize("gradients", MODES)
def test_poses_of_different_widths_are_an_error(gradients):
    class Growing(torch.nn.Module):
        def forward(self, pose):
            return pose[: 2 if pose[0] < 2 else 3]

    poses = torch.arange(16.0).view(4, 4)
    model = MultiPoseModel(Growing(), Largest(), gradients=gradients)
    words = "pose 1: .* returned 2 for pose 0; found 3"
    with pytest.raises(PredictionError, match=words):
        model(poses)
    with pytest.raises(PredictionError, match=words), torch.no_grad():
        model(poses)


def test_an_error_for_weights_leaves_batches_on():
    calls = []

    class Counting(Largest):
        def combine(self, predictions, calls=calls):
            calls.append(1)
            return super().combine(predictions)

    model = MultiPoseModel(torch.nn.Identity(), Counting())
    poses = torch.randn(300, 2)
    of_poses = model(poses, [3] * 100, collated=True).pose_predictions
    for _ in range(4):
        with pytest.raises(CombinationContractError, match="returns a vector"):
            model.pose_weights(of_poses, [3] * 100)
    calls.clear()
    model(poses, [3] * 100, collated=True)
    assert len(calls) == 1


def test_results_of_tasks_are_contiguous():
    model = new_model(SmoothMinimum(), 3, tasks=3)
    out = model(new_poses(), SIZES)
    assert out.prediction.is_contiguous()
    assert model.pose_weights(out.pose_predictions, SIZES).is_contiguous()


def test_options_that_change_after_construction_are_checked():
    model = new_model(Largest(), 2)
    model.combination.pose_columns = "affinity"
    with pytest.raises(CombinationContractError, match="found 'affinity'"):
        model(new_poses(3))
    model = new_model([SmoothMinimum(), SmoothMinimum()], 2, tasks=2)
    model.tasks = None
    with pytest.raises(ValueError, match="several combinations need the argument tasks"):
        model(new_poses(3))
    model.tasks, model.combination = 2, torch.nn.ModuleList([torch.nn.Linear(1, 1)] * 2)
    with pytest.raises(TypeError, match="an instance of Combination; found Linear"):
        model(new_poses(3))


def test_weights_of_predictions_that_are_no_matrix_are_an_error():
    model = new_model(Confident(), 2)
    for wrong in (torch.tensor(1.0), [1.0, 2.0], torch.randn(3), torch.randn(3, 2).int()):
        with pytest.raises(PredictionError, match="floating-point numbers, 2 per pose"):
            model.pose_weights(wrong)
    with pytest.raises(PredictionError, match="floating-point numbers, some per pose"):
        new_model(Largest(), 2).pose_weights(torch.tensor(1.0))
