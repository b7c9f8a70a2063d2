"""Pose inputs that a network predicts get the gradients of plain autograd, in every mode."""

import itertools
from typing import ClassVar

import pytest
import torch
from bank.bases import smooth_max
from bank.right import ScoreWeightedFullDepth
from torch import Tensor

from mtenn_core import Combination, MultiPoseModel
from mtenn_core.combination import InputKind
from mtenn_core.errors import CombinationContractError, PredictionError

MODES = ("graph", "stored", "recomputed")
# Ragged, and three compounds of one size, which are combined in one batch.
SIZES = [3, 1, 3, 4, 3]
# Sums in another order differ in their last digits.
SAME = {"rtol": 1e-12, "atol": 1e-12}


class ScoreWeighted(Combination):
    pose_inputs = ("score",)

    def combine(self, predictions: Tensor, score: Tensor) -> Tensor:
        return (torch.softmax(-score, dim=0) * predictions).sum()


class ClosedForm(ScoreWeighted):
    def pose_weights(self, predictions: Tensor, score: Tensor) -> Tensor:
        return torch.softmax(-score, dim=0)


class Degeneracies(Combination):
    """Free energy of states with degeneracies, plus a real strain."""

    pose_inputs: ClassVar[dict[str, InputKind]] = {"degeneracy": "positive", "strain": "real"}

    def combine(self, predictions: Tensor, degeneracy: Tensor, strain: Tensor) -> Tensor:
        return -torch.logsumexp(degeneracy.log() - predictions - strain.square(), dim=0)

    def pose_weights(self, predictions: Tensor, degeneracy: Tensor, strain: Tensor) -> Tensor:
        return torch.softmax(degeneracy.log() - predictions - strain.square(), dim=0)


class OneByOne(ScoreWeighted):
    """Control flow that depends on numbers, so that no batch of compounds is possible."""

    def combine(self, predictions: Tensor, score: Tensor) -> Tensor:
        return super().combine(predictions, score if score[0] > 0 else 2 * score)


class FullDepth(ScoreWeightedFullDepth):
    pose_inputs = ("score",)

    def forward(self, *step, score):
        return super().forward(*step, docking_score=score)

    combine = ScoreWeighted.combine


class Charged(Combination):
    pose_inputs: ClassVar[dict[str, InputKind]] = {"charge": "label", "score": "positive"}

    def combine(self, predictions: Tensor, charge: Tensor, score: Tensor) -> Tensor:
        return smooth_max(predictions + 0.1 * charge + score.log(), 1.0)


CASES = [
    *itertools.product((ScoreWeighted, ClosedForm, Degeneracies, OneByOne), MODES),
    (FullDepth, "stored"),
]


@pytest.fixture
def network():
    """Maps a pose to two numbers: pose inputs."""
    layers = torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)
    return torch.nn.Sequential(*layers).double()


def inputs_of(combination, network, poses) -> dict[str, Tensor]:
    columns = dict(zip(combination.pose_inputs, network(poses).unbind(-1), strict=False))
    kinds = combination.pose_inputs if isinstance(combination.pose_inputs, dict) else {}
    return {n: v.exp() if kinds.get(n) == "positive" else v for n, v in columns.items()}


def gradients(loss, *modules) -> list[Tensor]:
    params = [p for module in modules for p in module.parameters() if p.requires_grad]
    return list(torch.autograd.grad(loss, params, materialize_grads=True))


def plain(combination, pose_model, poses, sizes, inputs) -> tuple[Tensor, Tensor]:
    predictions = pose_model(poses)[:, 0]
    columns = (values.split(sizes) for values in (predictions, *inputs.values()))
    values = [combination.combine(*own) for own in zip(*columns, strict=True)]
    return torch.stack(values), predictions


def of_prediction(prediction, pose_predictions):
    return (prediction.square() - prediction).sum()


def of_both(prediction, pose_predictions):
    factors = torch.linspace(-1, 1, len(pose_predictions), dtype=torch.float64)
    return of_prediction(prediction, pose_predictions) + factors @ pose_predictions.square()


@pytest.mark.parametrize("loss", [of_prediction, of_both])
@pytest.mark.parametrize(("combination", "mode"), CASES)
def test_learned_inputs_get_the_gradients_of_autograd(combination, mode, loss, pose_model, network):
    poses, combination = torch.randn(sum(SIZES), 4, dtype=torch.float64), combination()
    model = MultiPoseModel(pose_model, combination, gradients=mode)
    out = model(poses, SIZES, inputs_of(combination, network, poses))
    expected = plain(combination, pose_model, poses, SIZES, inputs_of(combination, network, poses))
    torch.testing.assert_close(tuple(out), expected, **SAME)
    found = gradients(loss(*out), pose_model, network)
    assert all(gradient.any() for gradient in found)
    torch.testing.assert_close(found, gradients(loss(*expected), pose_model, network), **SAME)


@pytest.mark.parametrize(("combination", "mode"), CASES)
def test_learned_inputs_of_a_frozen_pose_model_get_their_gradients(
    combination, mode, pose_model, network
):
    poses, combination = torch.randn(sum(SIZES), 4, dtype=torch.float64), combination()
    pose_model.requires_grad_(False)
    model = MultiPoseModel(pose_model, combination, gradients=mode)
    out = model(poses, SIZES, inputs_of(combination, network, poses))
    expected = plain(combination, pose_model, poses, SIZES, inputs_of(combination, network, poses))
    found = gradients(of_prediction(*out), network)
    torch.testing.assert_close(found, gradients(of_prediction(*expected), network), **SAME)


@pytest.mark.parametrize("mode", ["graph", "recomputed"])
def test_learned_inputs_of_chunks_of_poses_get_their_gradients(mode, pose_model, network):
    poses, combination = torch.randn(sum(SIZES), 4, dtype=torch.float64), Degeneracies()
    options = {"gradients": mode, "collate": torch.stack, "chunk_size": 5}
    out = MultiPoseModel(pose_model, combination, **options)(
        list(poses), SIZES, inputs_of(combination, network, poses)
    )
    expected = plain(combination, pose_model, poses, SIZES, inputs_of(combination, network, poses))
    found = gradients(of_both(*out), pose_model, network)
    torch.testing.assert_close(found, gradients(of_both(*expected), pose_model, network), **SAME)


@pytest.mark.parametrize("mode", MODES)
def test_a_network_may_predict_poses_and_inputs(mode, pose_model):
    """The input is made of the parameters that the pose model has, too."""
    poses, combination = torch.randn(sum(SIZES), 4, dtype=torch.float64), ClosedForm()
    model = MultiPoseModel(pose_model, combination, gradients=mode)
    out = model(poses, SIZES, {"score": pose_model(2 * poses)[:, 0]})
    inputs = {"score": pose_model(2 * poses)[:, 0]}
    expected = plain(combination, pose_model, poses, SIZES, inputs)
    found = gradients(of_both(*out), pose_model)
    torch.testing.assert_close(found, gradients(of_both(*expected), pose_model), **SAME)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            {"charge": [0, 1, 2, 0, 1.5, 1, 0], "score": [1.0] * 7},
            r"pose 4 \(pose 1 of compound 1\): pose_inputs\['charge'\] must be a whole number"
            r" from 0 on, because Charged declares it as 'label'; found 1\.5",
        ),
        (
            {"charge": [0, -1, 2, 0, 1, 1, 0], "score": [1.0] * 7},
            r"pose 1 \(pose 1 of compound 0\): pose_inputs\['charge'\].*found -1\.0",
        ),
        (
            {"charge": [0] * 7, "score": [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0]},
            r"pose 6 \(pose 3 of compound 1\): pose_inputs\['score'\] must be a number above 0,"
            r" because Charged declares it as 'positive'; found 0\.0",
        ),
        (
            {"charge": [0, 2**53, *[0] * 5], "score": [1.0] * 7},
            r"a whole number from 0 on and below 9007199254740992, because torch.float64 merges",
        ),
        (
            {"charge": [0] * 7, "score": [1.0] * 6 + [torch.inf]},
            r"pose_inputs\['score'\] is inf",
        ),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_an_input_that_breaks_its_kind_is_named(mode, inputs, message, pose_model, poses):
    model = MultiPoseModel(pose_model, Charged(), gradients=mode)
    with pytest.raises(PredictionError, match=message) as error:
        model(poses, [3, 4], inputs)
    assert error.value.compound in (0, 1)
    assert error.value.pose is not None


def test_without_check_finite_kinds_are_not_checked(pose_model, poses):
    model = MultiPoseModel(pose_model, Charged(), check_finite=False)
    out = model(poses, None, {"charge": [0.5] * 7, "score": [1.0] * 7})
    assert out.prediction.isfinite()


def test_names_are_shown_if_an_input_is_missing(pose_model, poses):
    model = MultiPoseModel(pose_model, Charged())
    with pytest.raises(PredictionError, match=r"Its pose_inputs are \('charge', 'score'\)"):
        model(poses, None, {"strain": [0.0] * 7})


def test_an_unknown_kind_is_refused_in_a_call(pose_model, poses):
    odd = type("Odd", (ScoreWeighted,), {"pose_inputs": {"score": "lable"}})
    with pytest.raises(CombinationContractError, match="Did you mean 'label'"):
        MultiPoseModel(pose_model, odd())(poses, None, {"score": [1.0] * 7})


def test_pose_weights_need_inputs_of_the_declared_kinds():
    """A label of -1 would be the last row of a table."""
    model = MultiPoseModel(torch.nn.Identity(), Charged())
    inputs = {"charge": [0, 1, -1], "score": [1.0] * 3}
    with pytest.raises(PredictionError, match=r"pose_inputs\['charge'\] must be a whole number"):
        model.pose_weights(torch.randn(3), pose_inputs=inputs)


class DetachedInBatches(Combination):
    """In a batch, a tensor says that it requires no gradient."""

    pose_inputs = ("score",)

    def combine(self, predictions: Tensor, score: Tensor) -> Tensor:
        score = score if score.requires_grad else score.detach()
        return (torch.softmax(score, dim=0) * predictions).sum()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "known", [False, True], ids=["first call", "after a call without gradients"]
)
def test_a_batch_gives_a_learned_input_the_gradient_of_the_loop(mode, known):
    model = MultiPoseModel(torch.nn.Linear(4, 1).double(), DetachedInBatches(), gradients=mode)
    poses, sizes = torch.randn(12, 4, dtype=torch.float64), [3] * 4
    score = torch.randn(12, dtype=torch.float64, requires_grad=True)
    if known:
        model(poses, sizes, {"score": score.detach()})
    out = model(poses, sizes, {"score": score})
    (found,) = torch.autograd.grad(out.prediction.square().sum(), score, retain_graph=True)
    y = model.pose_model(poses).flatten()
    rows = torch.softmax(score.view(4, 3), dim=1) * y.view(4, 3)
    (expected,) = torch.autograd.grad(rows.sum(1).square().sum(), score)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
