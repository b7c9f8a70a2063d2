"""The gate is tested by combinations that are wrong on purpose."""

import copy
import json
import subprocess
import sys
from functools import partial
from typing import ClassVar

import pytest
import torch
from packaging.version import Version
from tiers import slow
from torch import Tensor

from mtenn_core import Combination, Registry
from mtenn_core.errors import CombinationContractError, GradientValidationError
from mtenn_core.testing import CHECKS, check_combination
from mtenn_core.testing._probe import forward_only
from mtenn_core.testing._probe.subject import Subject

gate = partial(check_combination, level="gate")


class Function(torch.autograd.Function):
    """(1/t) ln Σ exp(t ŷ_i), with a mistake."""

    @staticmethod
    def forward(t, mistake, pred_list, grad_dict, param_names, *model_params):
        return torch.logsumexp(t * torch.stack(pred_list).flatten(), dim=0) / t

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.t, ctx.mistake, pred_list, grad_dict, ctx.param_names, *_ = inputs
        ctx.keys, gradients = Combination.split_grad_dict(grad_dict)
        ctx.save_for_backward(torch.stack(pred_list).flatten(), *gradients)

    @staticmethod
    def backward(ctx, grad_output):
        predictions, *gradients = ctx.saved_tensors
        grad_dict = Combination.join_grad_dict(ctx.keys, gradients)
        go, weights = ctx.mistake(grad_output, torch.softmax(ctx.t * predictions, dim=0))
        sums = {n: go * torch.tensordot(weights, torch.stack(g), 1) for n, g in grad_dict.items()}
        return *[None] * 5, *(sums[name] for name in ctx.param_names)


class FullDepth(Combination):
    t = 1.0

    @staticmethod
    def mistake(go: Tensor, weights: Tensor) -> tuple[Tensor | float, Tensor]:
        return go, weights

    def forward(self, pred_list, grad_dict, param_names, *model_params):
        return Function.apply(
            self.t, self.mistake, pred_list, grad_dict, param_names, *model_params
        )


class ClosedForm(Combination):
    t = 1.0
    mistake = staticmethod(FullDepth.mistake)

    def combine(self, predictions):
        return torch.logsumexp(self.t * predictions, dim=0) / self.t

    def pose_weights(self, predictions):
        return self.mistake(1.0, torch.softmax(self.t * predictions, dim=0))[1]


class Mean(Combination):
    def combine(self, predictions):
        return predictions.mean()


MISTAKES = {
    "0.1 % off": lambda go, w: (go, 1.001 * w),
    "wrong sign": lambda go, w: (go, -w),
    "wrong pose order": lambda go, w: (go, w.flip(0)),
    "not normalised": lambda go, w: (go, w * len(w)),
    "one-hot": lambda go, w: (go, (w == w.max()).to(w.dtype)),
    "uniform": lambda go, w: (go, torch.full_like(w, 1 / len(w))),
    "not a number": lambda go, w: (go, w * torch.nan),
}
IN_GRAD_OUTPUT = {
    "ignored": lambda go, w: (1.0, w),
    "its absolute value": lambda go, w: (abs(go), w),
    "its square": lambda go, w: (go * go, w),
    "clamped": lambda go, w: (go.clamp(-1, 1), w),
}
SCALES = pytest.mark.parametrize("t", [1.0, 10.0, 1000.0])
SEEDS = pytest.mark.parametrize(
    "seed", [0, *slow(1, 2, 3, reason="one seed of four finds the same mistakes")]
)


def make(base, mistake=None, t=1.0):
    wrong = {} if mistake is None else {"mistake": staticmethod(mistake)}
    return type("Wrong", (base,), {"t": t, **wrong})


def failed(combination, **options):
    return [record.id for record in gate(combination, **options).failures]


@SEEDS
@SCALES
@pytest.mark.parametrize("base", [FullDepth, ClosedForm])
def test_a_right_combination_passes(base, t, seed):
    report = gate(make(base, t=t), seed=seed)
    assert report.passed, str(report)
    assert len(report.records) == sum(check.level == "gate" for check in CHECKS)


@SEEDS
@SCALES
@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
@pytest.mark.parametrize("base", [FullDepth, ClosedForm])
def test_wrong_weights_are_caught(base, mistake, t, seed):
    assert "C1" in failed(make(base, mistake, t), seed=seed)


@SEEDS
@pytest.mark.parametrize("mistake", IN_GRAD_OUTPUT.values(), ids=IN_GRAD_OUTPUT)
def test_a_wrong_grad_output_is_caught(mistake, seed):
    assert "B1" in failed(make(FullDepth, mistake), seed=seed)


def test_a_mean_without_one_over_n_is_caught():
    class Forgotten(Mean):
        def pose_weights(self, predictions):
            return torch.ones_like(predictions)

    assert failed(Forgotten) == ["C1"]


def test_full_depth_may_refuse_a_second_derivative():
    class Once(Function):
        @staticmethod
        def backward(ctx, grad_output):
            if torch.is_grad_enabled():
                raise RuntimeError("no second derivative")
            return Function.backward(ctx, grad_output)

    class Refuses(FullDepth):
        def forward(self, *args):
            return Once.apply(self.t, self.mistake, *args)

    assert failed(Refuses) == []


@pytest.mark.parametrize(
    "wrong", [lambda y: y.mean(), lambda y: y.detach().logsumexp(0) + 0 * y[0]]
)
def test_combine_and_forward_must_agree(wrong):
    """``gradients="graph"`` takes combine, ``"stored"`` takes forward: they must agree."""
    right = type("Right", (FullDepth,), {"combine": lambda self, y: y.logsumexp(0)})
    assert failed(right) == []
    assert failed(type("Wrong", (FullDepth,), {"combine": lambda self, y: wrong(y)})) == ["C1"]


def test_a_combine_that_autograd_cannot_differentiate_is_caught():
    """``gradients="graph"`` takes its gradient from combine, whatever ``pose_weights`` says."""

    class HalfDetached(ClosedForm):
        def combine(self, predictions):
            return super().combine(0.5 * predictions + 0.5 * predictions.detach())

    report = gate(HalfDetached)
    assert "autograd of combine, pose" in str(report)


@SEEDS
@pytest.mark.parametrize("order", [lambda ctx, grads: list(grads), lambda ctx, grads: grads[::-1]])
def test_gradients_in_another_order_than_param_names_are_caught(order, seed):
    class InOrderOfTheDict(Function):
        @staticmethod
        def backward(ctx, grad_output):
            names = list(dict.fromkeys(ctx.keys))
            ctx.param_names = order(ctx, names)
            return Function.backward(ctx, grad_output)

    class Wrong(FullDepth):
        def forward(self, *args):
            return InOrderOfTheDict.apply(self.t, self.mistake, *args)

    report = gate(Wrong, seed=seed)
    (record,) = [record for record in report.records if record.id == "A3"]
    assert record.status == "fail"
    assert "use the order of param_names" in record.cause


RAW = {
    "unsummed": (lambda g, n: g.expand(n, *g.shape) / n, "A1"),
    "flattened": (lambda g, n: g.reshape(-1), "A1"),
    "float32": (lambda g, n: g.float(), "A1"),
    "missing": (lambda g, n: None, "A1"),
}


@pytest.mark.parametrize("case", RAW)
def test_the_results_of_backward_are_checked_before_autograd_changes_them(case):
    change, check = RAW[case]

    class Raw(Function):
        @staticmethod
        def backward(ctx, grad_output):
            n_poses = len(ctx.saved_tensors[0])
            gradients = Function.backward(ctx, grad_output)[5:]
            return *[None] * 5, *(change(gradient, n_poses) for gradient in gradients)

    class Wrong(FullDepth):
        def forward(self, *args):
            return Raw.apply(self.t, self.mistake, *args)

    assert check in failed(Wrong)


OUTPUTS = {
    "shape (1,)": (
        lambda y: y.mean().reshape(1),
        r"expected a tensor of shape \(\)|must return a sc",
    ),
    "detached": (lambda y: y.detach().mean(), "the output must require a gradient"),
    "a float": (lambda y: y.mean().item(), "found float"),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_an_output_that_cannot_be_trained_is_caught(case):
    combine, message = OUTPUTS[case]
    wrong = type("Wrong", (Combination,), {"combine": lambda self, y: combine(y)})
    report = gate(wrong)
    assert not report.passed
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(str(report))


class Temperature(Combination):
    detach = False

    def __init__(self):
        super().__init__()
        self.log_kT = torch.nn.Parameter(torch.tensor(-0.3))

    def combine(self, predictions):
        log_kT = self.log_kT.detach() if self.detach else self.log_kT
        return (torch.softmax(-predictions / log_kT.exp(), dim=0) * predictions).sum()


def test_the_gradient_of_an_own_parameter_is_checked():
    assert failed(Temperature) == []
    assert failed(type("Wrong", (Temperature,), {"detach": True})) == ["C3"]


class RangeOfParameter(Temperature):
    """It keeps the largest value of its parameter, as a log of the training."""

    largest = None

    def combine(self, predictions):
        log_kT = self.log_kT.detach()
        self.largest = log_kT if self.largest is None else torch.maximum(self.largest, log_kT)
        return super().combine(predictions)


class FirstParameter(Temperature):
    first = None

    def combine(self, predictions):
        if self.first is None:
            self.first = self.log_kT.detach().clone()
        return super().combine(predictions) + 0 * self.first


class RangeOfPredictions(Temperature):
    largest = torch.tensor(-torch.inf)

    def combine(self, predictions):
        self.largest = torch.maximum(self.largest, predictions.detach().amax())
        return super().combine(predictions)


@pytest.mark.parametrize("right", [RangeOfParameter, FirstParameter, RangeOfPredictions])
def test_what_a_combination_keeps_from_a_batch_does_not_reach_later_calls(right):
    report = gate(right)
    assert report.passed, str(report)


class InPlace(Combination):
    def combine(self, predictions):
        centre = predictions.mean().detach()
        predictions -= centre
        return centre + torch.logsumexp(predictions, dim=0)


def test_a_change_of_the_predictions_in_place_is_named_by_the_check_for_it():
    (record,) = gate(InPlace).failures
    assert record.id == "A4"
    assert "combine changed the predictions" in record.reason
    assert "an operation in place" in record.cause
    others = [check.id for check in CHECKS if check.id != "A4" and check.level != "quality"]
    report = check_combination(InPlace, only=others)
    assert not [record for record in report.records if "leaf Variable" in record.reason]


def test_the_registry_does_not_return_a_combination_that_changes_the_users_predictions():
    class Doubles(Combination):
        def combine(self, predictions):
            return predictions.mul_(2).mean()

    registry = Registry()
    with (
        registry.temporary({"doubles": Doubles}),
        pytest.raises(GradientValidationError, match="combine changed the predictions"),
    ):
        registry.create("doubles")


class ContainsItself(Mean):
    def __init__(self):
        super().__init__()
        self.facts = {}
        self.facts["facts"] = [self.facts]


def test_a_container_may_contain_itself():
    assert failed(ContainsItself) == []


def test_a_parameter_hidden_in_a_container_is_found_and_named():
    class Hidden(ContainsItself):
        def __init__(self):
            super().__init__()
            self.facts["kT"] = [torch.ones((), requires_grad=True)]

    (record,) = gate(Hidden).failures
    assert record.id == "C3"
    assert "'facts' requires a gradient, so it must be in parameters()" in record.reason


class Weighted(Combination):
    """An own parameter with many entries, which is probed in random directions."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Sequential(
            torch.nn.Linear(1, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)
        )

    def combine(self, predictions):
        scores = self.layer(predictions[:, None])[:, 0]
        return (torch.softmax(scores, dim=0) * predictions).sum()


class TopTwo(Combination):
    min_poses, smooth = 2, False

    def combine(self, predictions):
        return predictions.topk(2).values.mean()


class PowerMean(Combination):
    domain = (0.0, float("inf"))

    def combine(self, predictions):
        return predictions.pow(3).mean().pow(1 / 3)


class NoisyOr(Combination):
    domain = (0.0, 1.0)

    def combine(self, predictions):
        return 1 - (1 - predictions).prod()


class Gumbel(Combination):
    stochastic = True

    def combine(self, predictions):
        noise = -(-torch.rand_like(predictions).log()).log()
        return (torch.softmax(predictions + noise, dim=0) * predictions).sum()


class Running(Combination):
    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros(()))

    def combine(self, predictions):
        value = (predictions - self.centre).square().mean()
        self.centre.lerp_(predictions.detach().mean(), 0.1)
        return value


class InFloat32(Combination):
    def combine(self, predictions):
        return torch.logsumexp(predictions.float(), dim=0)


class BranchesOnData(Combination):
    def combine(self, predictions):
        low = predictions.min() if predictions.max() > 0 else predictions.amin()
        return low.detach() + torch.logsumexp(predictions - low.detach(), dim=0)


RIGHT = [Weighted, TopTwo, PowerMean, NoisyOr, Gumbel, Running, InFloat32, BranchesOnData]


@SEEDS
@pytest.mark.parametrize("combination", RIGHT)
def test_legitimate_combinations_pass_with_what_they_declare(combination, seed):
    report = gate(combination, seed=seed)
    assert report.passed, str(report)


def test_undeclared_noise_does_not_pass():
    class Undeclared(Gumbel):
        stochastic = False

    assert not gate(Undeclared).passed


def test_a_value_that_ignores_the_predictions_is_inconclusive():
    class Constant(Combination):
        def combine(self, predictions):
            return 0 * predictions.sum() + 3.0

    (record,) = gate(Constant).failures
    assert (record.id, record.status) == ("C1", "inconclusive")


def test_a_constant_value_with_weights_of_its_own_is_wrong():
    """A constant such as 0.5 is a number of every dtype, so it shows no low precision."""

    class Constant(ClosedForm):
        def combine(self, predictions):
            return 0 * predictions.sum() + 0.5

    (record,) = gate(Constant).failures
    assert (record.id, record.status) == ("C1", "fail")
    assert "the value does not depend on the predictions" in record.cause


class SwitchedOff(ClosedForm):
    def __init__(self, on=True):
        super().__init__()
        self.on = on

    def combine(self, predictions):
        return super().combine(predictions) if self.on else 0 * predictions.sum()


def test_an_argument_that_makes_the_value_constant_needs_weights_of_zero():
    (record,) = check_combination(SwitchedOff, only=["D5"]).failures
    assert "SwitchedOff(on=False)" in record.cause
    assert "the value does not depend on the predictions" in record.cause
    right = type("Right", (SwitchedOff,), {"pose_weights": Combination.pose_weights})
    assert check_combination(right, only=["D5"]).passed


class InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(numbers, factor):
        return numbers.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output * ctx.factor.to(grad_output.dtype), None


class InfiniteOwn(Combination):
    """The gradient of an own parameter is infinite, in some of its entries."""

    factor: ClassVar = torch.tensor(torch.inf)

    def __init__(self):
        super().__init__()
        self.scales = torch.nn.Parameter(torch.linspace(0.5, 1.5, self.factor.numel()))

    def combine(self, predictions):
        t = InfiniteGradient.apply(self.scales, self.factor.reshape(-1)).mean()
        return torch.logsumexp(t * predictions, dim=0) / t


FACTORS = {
    "infinite": torch.tensor(torch.inf),
    "minus infinity": torch.tensor(-torch.inf),
    "one entry of three": torch.tensor([1.0, torch.inf, 1.0]),
    "one entry of nine": torch.ones(9).index_fill(0, torch.tensor(4), torch.inf),
}


@pytest.mark.parametrize("factor", FACTORS.values(), ids=FACTORS)
def test_an_infinite_gradient_of_an_own_parameter_is_wrong(factor):
    (record,) = gate(type("Infinite", (InfiniteOwn,), {"factor": factor})).failures
    assert (record.id, record.status) == ("C3", "fail")
    assert "your backward      " in record.reason
    assert "the gradient of 'scales' is not a finite number" in record.cause


@pytest.mark.parametrize("n_poses", [1, 2, 3, 6, 33])
@pytest.mark.parametrize("base", [FullDepth, ClosedForm])
def test_an_infinite_weight_is_wrong_at_any_number_of_poses(base, n_poses):
    def infinite(go, weights):
        last = torch.arange(1, len(weights) + 1) == n_poses
        return go, torch.where(last & (len(weights) == n_poses), torch.inf, weights)

    (record,) = [r for r in gate(make(base, infinite)).failures if r.id == "C1"]
    assert record.status == "fail"
    assert "a weight is not finite" in record.cause


def test_an_error_of_a_combination_is_reported_with_its_file_and_line():
    class Raises(Combination):
        def combine(self, predictions):
            raise RuntimeError("not for you")

    record = gate(Raises).failures[0]
    assert record.status == "error"
    assert "RuntimeError: not for you\nraised in" in record.reason
    assert "test_gate.py" in record.reason


def test_an_error_inside_torch_shows_the_line_of_the_combination():
    class Raises(Combination):
        def combine(self, predictions):
            return torch.nn.Linear(3, 3).double()(predictions[:1]).sum()

    record = gate(Raises).failures[0]
    assert "raised in" in record.reason
    assert "test_gate.py" in record.reason.splitlines()[-1]


def test_the_checks_do_not_change_the_combination():
    combination = Running()
    before = torch.get_rng_state()
    gate(combination)
    assert combination.centre == 0
    assert combination.centre.dtype == torch.float32
    assert torch.equal(torch.get_rng_state(), before)


class Scale(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.log_t = torch.nn.Parameter(torch.tensor(0.5))
        self.register_buffer("shift", torch.tensor(0.25))


class OneForAll(Combination):
    """A combination with parameters, of which ``copy.deepcopy`` returns the same object."""

    def __init__(self):
        super().__init__()
        self.scale = Scale()
        self.log_t = torch.nn.Parameter(torch.tensor(0.5))

    def combine(self, predictions):
        t = (self.log_t + self.scale.log_t).exp()
        return torch.logsumexp(t * predictions, dim=0) / t + self.scale.shift

    def __deepcopy__(self, memo):
        return self


class Shallow(OneForAll):
    def __deepcopy__(self, memo):
        return copy.copy(self)


class SharesModule(OneForAll):
    """Its inner module is the same in all copies."""

    def __deepcopy__(self, memo):
        memo[id(self.scale)] = self.scale
        new = type(self)()
        new.__dict__.update(copy.deepcopy(vars(self), memo))
        return new


class SharesMemory(OneForAll):
    def __deepcopy__(self, memo):
        new = type(self)().double()
        for ours, theirs in zip(new.parameters(), self.parameters(), strict=True):
            ours.data = theirs.data
        return new


@pytest.mark.parametrize("base", [OneForAll, Shallow, SharesModule, SharesMemory])
def test_a_check_does_not_touch_an_instance_that_cannot_be_copied(base):
    combination = base().double() if base is SharesMemory else base()
    before = {name: (t, t.clone()) for name, t in combination.state_dict(keep_vars=True).items()}
    assert gate(combination).passed
    # C3 gives the parameters other values, and A13 moves its copy to the meta device.
    (record,) = check_combination(combination, only=["C3", "A9", "A13"]).failures
    assert record.id == "A9"
    assert "found one that it shares with the original" in record.reason
    for name, tensor in combination.state_dict(keep_vars=True).items():
        same, value = before[name]
        assert tensor is same
        assert tensor.dtype == value.dtype
        assert torch.equal(tensor, value)


def test_the_registry_returns_an_instance_in_its_own_dtype():
    registry = Registry()
    with registry.temporary({"one": OneForAll}):
        assert registry.create("one").log_t.dtype == torch.float32


def test_a_report_shows_both_numbers_and_goes_to_json():
    report = gate(make(FullDepth, MISTAKES["0.1 % off"]))
    assert not report.passed
    for words in ("your backward", "finite difference", "±", "times the tolerance", "pose "):
        assert words in str(report)
    loaded = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert loaded["passed"] is False
    assert [record["status"] for record in loaded["records"] if record["id"] == "C1"] == ["fail"]


def test_the_registry_refuses_what_the_gate_refuses():
    registry = Registry()
    wrong = {**MISTAKES, **IN_GRAD_OUTPUT}
    for base in (FullDepth, ClosedForm):
        for mistake in wrong if base is FullDepth else MISTAKES:
            with (
                registry.temporary({"wrong": make(base, wrong[mistake])}),
                pytest.raises(GradientValidationError, match=r"failed \d of 9 checks"),
            ):
                registry.get("wrong")


class FewWeights(torch.autograd.Function):
    """A rule whose weights are short binary numbers, with a mistake in how they are used."""

    @staticmethod
    def forward(rule, use, pred_list, grad_dict, param_names, *model_params):
        return rule(torch.stack(pred_list).flatten())[0]

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.rule, ctx.use, ctx.pred_list, ctx.grad_dict, ctx.param_names, *_ = inputs

    @staticmethod
    def backward(ctx, grad_output):
        _, weights = ctx.rule(torch.stack(ctx.pred_list).flatten())
        names = ctx.param_names if ctx.use is not USES["order of the dict"] else ctx.grad_dict
        stacked = (torch.stack(ctx.grad_dict[name]) for name in names)
        return *[None] * 5, *(ctx.use(grad_output, weights, gradient) for gradient in stacked)


def weighted(go, weights, gradient):
    return go * torch.tensordot(weights, gradient, 1)


def transposed(gradient):
    square = gradient.dim() == 2 and gradient.shape[0] == gradient.shape[1]
    return gradient.T if square else gradient


RULES = {
    "mean": lambda y: (y.mean(), torch.full_like(y, 1 / len(y))),
    "sum": lambda y: (y.sum(), torch.ones_like(y)),
    "hard maximum": lambda y: (y.amax(), (y == y.amax()).to(y.dtype)),
}
USES = {
    "right": weighted,
    "absolute value of go": lambda go, w, g: weighted(go.abs(), w, g),
    "go clamped": lambda go, w, g: weighted(go.clamp(-100, 100), w, g),
    "gradients clipped": lambda go, w, g: weighted(go, w, g.clamp(-1, 1)),
    "absolute gradients": lambda go, w, g: weighted(go, w, g.abs()),
    "transposed": lambda go, w, g: transposed(weighted(go, w, g)),
    "order of the dict": lambda go, w, g: weighted(go, w, g),
}


@SEEDS
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("rule", RULES)
def test_mistakes_in_round_weights_are_caught(rule, use, seed):
    """Weights of 1 or 1/4 say nothing of the precision that a combination computes in."""

    class Rule(Combination):
        min_poses, smooth = 4, rule != "hard maximum"

        def forward(self, *args):
            return FewWeights.apply(RULES[rule], USES[use], *args)

    assert bool(failed(Rule, seed=seed)) == (use != "right")


class ClampedTail(ClosedForm):
    def pose_weights(self, predictions):
        return torch.softmax(predictions, dim=0).clamp(min=1e-3)


class NoNegativeWeights(Combination):
    def combine(self, predictions):
        return (torch.softmax(-predictions, dim=0) * predictions).sum()

    def pose_weights(self, predictions):
        populations = torch.softmax(-predictions, dim=0)
        mean = (populations * predictions).sum()
        return (populations * (1 + mean - predictions)).clamp(min=0)


class WrongForTwo(Mean):
    def pose_weights(self, predictions):
        return torch.full_like(predictions, 1 if len(predictions) == 2 else 1 / len(predictions))


@SEEDS
@pytest.mark.parametrize("wrong", [ClampedTail, NoNegativeWeights, WrongForTwo])
def test_mistakes_at_some_predictions_only_are_caught(wrong, seed):
    assert failed(wrong, seed=seed) == ["C1"]


class TopSix(Combination):
    """Its weights are right up to six poses."""

    smooth = False

    def combine(self, predictions):
        return predictions.topk(min(6, len(predictions))).values.mean()

    def pose_weights(self, predictions):
        return torch.full_like(predictions, 1 / min(6, len(predictions)))


class WeightsInFloat32(ClosedForm):
    def pose_weights(self, predictions):
        weights = super().pose_weights(predictions)
        return 1.01 * weights if predictions.dtype == torch.float32 else weights


class ValueInFloat32(ClosedForm):
    def combine(self, predictions):
        value = super().combine(predictions)
        return 1.01 * value if predictions.dtype == torch.float32 else value


@SEEDS
@pytest.mark.parametrize(
    ("wrong", "check"), [(TopSix, "C1"), (WeightsInFloat32, "D4"), (ValueInFloat32, "D4")]
)
def test_mistakes_above_six_poses_or_in_float32_alone_are_caught(wrong, check, seed):
    assert failed(wrong, seed=seed) == [check]


class Skewness(Combination):
    """Ill-conditioned where the predictions are close together."""

    min_poses = 3

    def combine(self, predictions):
        centred = predictions - predictions.mean()
        return centred.pow(3).mean() / centred.square().mean().pow(1.5)


class VarianceByMoments(Combination):
    """Right, and at 1e4 without a correct digit."""

    min_poses = 2

    def combine(self, predictions):
        return predictions.square().mean() - predictions.mean().square()


@pytest.mark.parametrize("seed", [*range(3), *slow(*range(3, 20), reason="alarms are rare")])
@pytest.mark.parametrize("combination", [Skewness, VarianceByMoments])
def test_right_but_ill_conditioned_combinations_do_not_fail(combination, seed):
    statuses = {record.status for record in gate(combination, seed=seed).records}
    assert not statuses & {"fail", "error"}


def test_a_combination_that_exits_is_an_error():
    class Exits(Combination):
        def combine(self, predictions):
            raise SystemExit(0)

    report = gate(Exits)
    assert {record.status for record in report.failures} == {"error"}
    assert "SystemExit: 0" in str(report)


def test_a_repr_that_raises_is_shown_as_such():
    class Unprintable(Mean):
        def extra_repr(self):
            raise ZeroDivisionError("nothing to show")

    report = gate(Unprintable)
    assert report.passed
    assert "its repr raises ZeroDivisionError: nothing to show" in str(report)


@pytest.mark.parametrize(
    ("fact", "value", "rule"),
    [
        ("domain", (1.0, 0.0), r"\(low, high\) with low < high; found \(1.0, 0.0\)"),
        ("domain", None, "found None"),
        ("min_poses", 0, "an int above 0; found 0"),
        ("min_poses", 1.5, "found 1.5"),
        ("properties", "bounded", "a set of names; found 'bounded'"),
    ],
)
def test_an_error_names_invalid_facts(fact, value, rule):
    with pytest.raises(CombinationContractError, match=rf"Odd\.{fact} must be .*{rule}"):
        gate(type("Odd", (Mean,), {fact: value}))


def test_a_set_of_properties_goes_to_json():
    report = gate(type("Set", (Mean,), {"properties": {"bounded"}}))
    assert json.loads(json.dumps(report.to_json()))["facts"]["properties"] == ["bounded"]


def batched_value_and_loop(combination):
    """Return the values of several poses in one batch and in a loop, and the calls of forward."""
    calls = []
    subject = Subject(combination, 0)
    points = [subject.probes.poses(3) for _ in range(9)]
    with pytest.MonkeyPatch.context() as patch:
        forward = type(combination).forward
        patch.setattr(
            type(combination),
            "forward",
            lambda self, *args: (calls.append(None), forward(self, *args))[1],
        )
        found = subject.values(torch.stack([poses.row() for poses in points]))
    return found, torch.stack([subject.value(poses) for poses in points]), len(calls)


def test_values_at_full_depth_are_computed_in_one_batch():
    batch, loop, n_calls = batched_value_and_loop(FullDepth())
    assert n_calls == 4  # the batch, its first and last value again, and once more the first
    torch.testing.assert_close(batch, loop, rtol=1e-12, atol=0)


def test_a_batch_at_full_depth_is_not_used_if_calls_depend_on_earlier_ones():
    class Cached(FullDepth):
        def __init__(self):
            super().__init__()
            self.values = {}

        def forward(self, pred_list, *args):
            value = super().forward(pred_list, *args)
            return self.values.setdefault(len(pred_list), value)

    batch, loop, n_calls = batched_value_and_loop(Cached())
    assert n_calls == 4 + 9
    assert torch.equal(batch, loop)


def test_values_are_computed_one_by_one_if_torch_lacks_the_hook_of_its_transforms(monkeypatch):
    monkeypatch.setattr(forward_only, "custom_function_call", None)
    batch, loop, n_calls = batched_value_and_loop(FullDepth())
    assert n_calls == 1 + 9  # the batch, which raises
    assert torch.equal(batch, loop)


@pytest.mark.parametrize("drift", [1e-8, 1e-6, 1e-5])
def test_a_value_at_full_depth_that_drifts_from_call_to_call_is_not_a_pass(drift):
    class Drifting(FullDepth):
        n_calls = 0

        def forward(self, pred_list, *args):
            self.n_calls += 1
            return super().forward([y + drift * self.n_calls for y in pred_list], *args)

    assert "C1" in failed(Drifting)


@pytest.mark.parametrize(("drift", "n_calls"), [(0, 3), (1e-10, 3 + 9), (1e-6, 3 + 9)])
def test_a_batch_of_settings_is_not_used_if_the_value_drifts(drift, n_calls):
    class Drifting(Temperature):
        n_calls = 0

        def combine(self, predictions):
            self.n_calls += 1
            return super().combine(predictions) + drift * self.n_calls

    subject = Subject(Drifting(), 0)
    settings = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None]
    subject.values_of_parameter("log_kT", subject.probes.poses(3), settings)
    assert subject.combination.n_calls == n_calls  # those of the batch are of a copy


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.7"), reason="torch.func.vmap of torch 2.6 imports it"
)
def test_the_full_level_does_not_import_the_compiler_of_torch():
    code = """
import sys, torch
from mtenn_core import Combination
from mtenn_core.testing import check_combination
class SmoothMax(Combination):
    def combine(self, predictions):
        return torch.logsumexp(predictions, dim=0)
class Clamped(Combination):  # the backward of clamp combines two masks in place
    def combine(self, predictions):
        return predictions.clamp(-1e30, 1e30).mean()
assert check_combination(SmoothMax()).passed
assert check_combination(Clamped()).passed
print([name for name in ("torch._dynamo", "sympy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
