import copy
import inspect
import pickle
from typing import get_type_hints

import pytest
import torch
from torch import Tensor

from mtenn_core import Combination, as_mtenn_combination
from mtenn_core._engine.evaluation import combined_prediction
from mtenn_core.errors import CombinationContractError, DoubleBackwardError, PredictionError


class SumOfSquares(Combination):
    """Depth 1."""

    def combine(self, predictions: Tensor) -> Tensor:
        return predictions.square().sum()


class ClosedForm(SumOfSquares):
    """Depth 2."""

    def pose_weights(self, predictions: Tensor) -> Tensor:
        return 2 * predictions


class Function(torch.autograd.Function):
    @staticmethod
    def forward(pred_list, grad_dict, param_names, *model_params):
        return torch.stack(pred_list).square().sum()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.pred_list, ctx.grad_dict, ctx.param_names, *_ = inputs

    @staticmethod
    def backward(ctx, grad_output):
        pairs = [zip(ctx.pred_list, ctx.grad_dict[name], strict=True) for name in ctx.param_names]
        return None, None, None, *(grad_output * sum(2 * y * g for y, g in pair) for pair in pairs)


class FullDepth(Combination):
    """Depth 3."""

    def forward(self, pred_list, grad_dict, param_names, *model_params):
        return Function.apply(pred_list, grad_dict, param_names, *model_params)


class Picklable(Combination):
    def __init__(self, power: float) -> None:
        super().__init__()
        self.power = torch.nn.Parameter(torch.tensor(power))

    def combine(self, predictions: Tensor) -> Tensor:
        return predictions.abs().pow(self.power).mean()


DEPTHS = pytest.mark.parametrize("depth", [SumOfSquares, ClosedForm, FullDepth])


@DEPTHS
def test_every_depth_gives_the_value_and_its_gradient(depth):
    predictions = list(torch.randn(4, dtype=torch.float64))
    gradients = [torch.randn(3, dtype=torch.float64) for _ in predictions]
    param = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    value = depth()(predictions, {"p": gradients}, ["p"], param)
    (2.5 * value).backward()
    expected = 2.5 * sum(2 * y * g for y, g in zip(predictions, gradients, strict=True))
    torch.testing.assert_close(value, torch.stack(predictions).square().sum())
    torch.testing.assert_close(param.grad, expected, rtol=1e-14, atol=1e-14)


@DEPTHS
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_every_depth_shows_its_pose_weights(depth, context):
    with context():
        predictions = torch.randn(4)
        torch.testing.assert_close(depth().pose_weights(predictions), 2 * predictions)


def test_a_closed_form_may_start_from_the_derived_one():
    class Doubled(SumOfSquares):
        def pose_weights(self, predictions):
            return 2 * super().pose_weights(predictions)

    y = torch.tensor([1.0, 3.0], requires_grad=True)
    assert Doubled().pose_weights(y.detach()).tolist() == [4, 12]
    combined_prediction(Doubled(), y).backward()
    assert y.grad.tolist() == [4, 12]


def test_a_class_that_says_nothing_cannot_be_instantiated():
    with pytest.raises(TypeError, match=r"define combine\(predictions\), or forward\(pred_list"):
        Combination()


def test_combine_of_a_full_depth_class_says_what_is_missing():
    with pytest.raises(CombinationContractError, match="FullDepth defines only forward"):
        FullDepth().combine(torch.ones(2))


def test_training_uses_the_closed_form():
    class Half(SumOfSquares):
        def pose_weights(self, predictions):
            return predictions

    y = torch.tensor([1.0, 3.0], requires_grad=True)
    combined_prediction(Half(), y).backward()
    assert y.grad.tolist() == [1, 3]


def test_a_stochastic_value_has_the_weights_that_were_drawn_for_it():
    class Noisy(SumOfSquares):
        stochastic = True

        def combine(self, predictions: Tensor) -> Tensor:
            self.drawn = torch.rand_like(predictions)
            return (self.drawn * predictions).sum()

        def pose_weights(self, predictions: Tensor) -> Tensor:
            return torch.rand_like(predictions)

    combination = Noisy()
    predictions = torch.randn(5, dtype=torch.float64, requires_grad=True)
    combined_prediction(combination, predictions).backward()
    assert torch.equal(predictions.grad, combination.drawn)


def test_graph_leaves_the_closed_form_out():
    class Wrong(SumOfSquares):
        def pose_weights(self, predictions):
            return torch.full_like(predictions, torch.nan)

    y = torch.tensor([1.0, 3.0], requires_grad=True)
    combined_prediction(Wrong(), y, closed_form=False).backward()
    assert y.grad.tolist() == [2, 6]


def test_a_closed_form_has_no_second_derivative():
    y = torch.tensor([1.0, 3.0], requires_grad=True)
    value = combined_prediction(ClosedForm(), y)
    with pytest.raises(DoubleBackwardError, match="gradient of a gradient"):
        torch.autograd.grad(value, y, create_graph=True)


def test_a_penalty_on_gradients_is_refused_not_dropped():
    y = torch.tensor([1.0, 3.0], requires_grad=True)
    value = combined_prediction(ClosedForm(), y)
    with pytest.raises(DoubleBackwardError):
        (value + value).backward(create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_combined_in_float32(dtype):
    seen = []

    class Spy(SumOfSquares):
        def combine(self, predictions):
            seen.append(predictions.dtype)
            return super().combine(predictions)

    value = combined_prediction(Spy(), torch.ones(3, dtype=dtype, requires_grad=True))
    assert value.dtype == dtype
    assert seen == [torch.float32]


def test_too_few_poses_are_refused():
    class Pair(SumOfSquares):
        min_poses = 2

    with pytest.raises(PredictionError, match="Pair needs at least 2 pose"):
        combined_prediction(Pair(), torch.ones(1))


@pytest.mark.parametrize(
    ("combine", "message"),
    [
        (lambda self, y: y, r"must return a scalar tensor, shape \(\); found shape \(3,\)"),
        (lambda self, y: y.sum().item(), "found float"),
    ],
)
def test_a_value_that_is_no_scalar_is_refused(combine, message):
    wrong = type("Wrong", (Combination,), {"combine": combine})
    with pytest.raises(CombinationContractError, match=message):
        combined_prediction(wrong(), torch.ones(3))


def test_weights_of_another_shape_are_refused():
    class Wrong(SumOfSquares):
        def pose_weights(self, predictions):
            return predictions.sum()

    with pytest.raises(
        CombinationContractError, match=r"one weight for each prediction, shape \(3,\)"
    ):
        combined_prediction(Wrong(), torch.ones(3, requires_grad=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_pose_inputs_come_in_the_dtype_that_is_combined_in(dtype):
    class Scored(Combination):
        pose_inputs = ("score",)

        def combine(self, predictions, score):
            assert score.dtype == predictions.dtype
            return (predictions * score).sum()

        def pose_weights(self, predictions, score):
            assert score.dtype == predictions.dtype
            return score

    y, score = (torch.ones(3, dtype=dtype, requires_grad=r) for r in (True, False))
    for closed_form in (True, False):
        value = combined_prediction(Scored(), y, {"score": score}, closed_form=closed_form)
        value.backward()
        assert value.dtype == dtype
    assert y.grad.tolist() == [2, 2, 2]


def test_weights_are_those_of_the_forward_pass():
    """An optimizer step on the combination between forward and backward changes nothing."""

    class Scaled(Combination):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(3.0))

        def combine(self, predictions):
            return self.scale * predictions.sum()

        def pose_weights(self, predictions):
            return self.scale.expand_as(predictions)

    combination, y = Scaled(), torch.ones(2, requires_grad=True)
    value = combined_prediction(combination, y)
    combination.scale.data.fill_(100.0)
    value.backward()
    assert y.grad.tolist() == [3, 3]
    assert combination.scale.grad.item() == 2


def test_copies_and_pickles_keep_their_parameters():
    combination = Picklable(2.0)
    for twin in (copy.deepcopy(combination), pickle.loads(pickle.dumps(combination))):
        assert twin.power.item() == 2.0
        assert twin.combine(torch.tensor([3.0])).item() == 9.0


class OfShape(torch.nn.Module):
    """A pose model whose prediction has a given shape. That of mtenn's SchNet has shape (1, 1)."""

    def __init__(self, pose_model: torch.nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.pose_model, self.shape = pose_model, shape

    def forward(self, pose):
        return self.pose_model(pose).reshape(self.shape)


class GroupedModel(torch.nn.Module):
    """Does with a combination only what mtenn's model of this name does, in mtenn's main branch."""

    def __init__(self, pose_model: torch.nn.Module, combination: torch.nn.Module) -> None:
        super().__init__()
        self.pose_model, self.combination = pose_model, combination

    def forward(self, poses):
        pred_list, grad_dict = [], {}
        for pose in poses:
            prediction = self.pose_model(pose)
            pred_list.append(prediction.detach())
            self.zero_grad()
            if prediction.requires_grad:  # releases up to 0.7 always run backward
                prediction.backward()
                for name, param in self.named_parameters():
                    grad_dict.setdefault(name, []).append(param.grad.detach())
        self.zero_grad()
        names, params = zip(*self.named_parameters(), strict=True)
        return self.combination(pred_list, grad_dict, names, *params)


def frozen_power() -> Combination:
    return Picklable(2.0).requires_grad_(False)


SHAPES = pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
CONVERTED = pytest.mark.parametrize(
    ("make", "value"),
    [
        (SumOfSquares, lambda y: y.square().sum()),
        (ClosedForm, lambda y: y.square().sum()),
        (FullDepth, lambda y: y.square().sum()),
        (frozen_power, lambda y: y.square().mean()),
    ],
    ids=["depth 1", "depth 2", "depth 3", "a frozen parameter of its own"],
)
LOSSES = {
    "combined": lambda combined, poses: combined.sin(),
    "pose": lambda combined, poses: poses.cos().sum(),
    "both": lambda combined, poses: combined.sin() + poses.cos().sum(),
}


@SHAPES
@CONVERTED
@pytest.mark.parametrize("loss", LOSSES)
def test_a_combination_trains_in_the_model_of_mtenn(make, value, loss, shape, pose_model, poses):
    plain = torch.cat([pose_model(pose) for pose in poses])
    params = list(pose_model.parameters())
    expected = torch.autograd.grad(LOSSES[loss](value(plain), plain), params)
    model = GroupedModel(OfShape(pose_model, shape), as_mtenn_combination(make().double()))
    combined, predictions = model(poses)
    assert combined.shape == ()
    assert predictions.shape == (len(poses),)
    LOSSES[loss](combined, predictions).backward()
    for param, gradient in zip(params, expected, strict=True):
        # Sums of seven float64 products, in another order.
        torch.testing.assert_close(param.grad, gradient, rtol=1e-12, atol=1e-13)


@SHAPES
@CONVERTED
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, "all frozen"])
def test_a_combination_predicts_in_the_model_of_mtenn(
    make, value, context, shape, pose_model, poses
):
    """At inference, the model passes all parameters and no gradients: ``grad_dict`` is empty."""
    with torch.no_grad():
        plain = torch.cat([pose_model(pose) for pose in poses])
    model = GroupedModel(OfShape(pose_model, shape), as_mtenn_combination(make().double()))
    if context == "all frozen":
        model.requires_grad_(False)
        combined, predictions = model(poses)
    else:
        with context():
            combined, predictions = model(poses)
    assert not combined.requires_grad
    assert not predictions.requires_grad
    assert torch.equal(predictions, plain)
    torch.testing.assert_close(combined, value(plain))


def test_a_frozen_parameter_of_a_converted_combination_is_moved_and_saved():
    """``GroupedModel`` needs a gradient for each of its parameters, so it must not see this one."""
    combination = frozen_power()
    converted = as_mtenn_combination(combination)
    model = torch.nn.Sequential(torch.nn.Linear(2, 1), converted).double()
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias"]
    assert combination.power.dtype == torch.float64
    assert set(model.state_dict()) == {"0.weight", "0.bias", "1.combination.power"}
    model.requires_grad_(True)
    assert not combination.power.requires_grad


def test_a_prediction_of_several_numbers_is_refused_by_a_converted_combination():
    converted = as_mtenn_combination(SumOfSquares())
    with pytest.raises(PredictionError, match=r"pose 1: .* one number.*found shape \(1, 2\)"):
        converted([torch.ones(1, 1), torch.ones(1, 2)], {}, ())


def test_only_a_combination_is_converted():
    with pytest.raises(TypeError, match=r"expected an instance of mtenn_core.Combination; found"):
        as_mtenn_combination("mean")


class NeedsScores(SumOfSquares):
    pose_inputs = ("score",)


@pytest.mark.parametrize(
    ("combination", "message"),
    [
        (Picklable(2.0), r"Picklable has trainable parameters \['power'\]\. mtenn's GroupedModel"),
        (NeedsScores(), r"NeedsScores has pose_inputs \('score',\).*Use mtenn_core.MultiPoseModel"),
    ],
)
def test_what_the_model_of_mtenn_cannot_train_is_refused(combination, message):
    with pytest.raises(ValueError, match=message):
        as_mtenn_combination(combination)


@pytest.mark.parametrize(
    ("cls", "signature"),
    [(SumOfSquares, "()"), (Picklable, "(power: float) -> None")],
    ids=["no constructor", "a constructor"],
)
def test_the_signature_of_a_class_is_that_of_its_constructor(cls, signature):
    assert str(inspect.signature(cls)) == signature


@pytest.mark.parametrize("cls", [Combination, SumOfSquares])
def test_annotations_of_a_class_can_be_evaluated(cls):
    assert "training" in get_type_hints(cls)


def test_the_signature_of_an_instance_is_not_that_of_the_constructor():
    assert "power" not in inspect.signature(Picklable(2.0)).parameters
