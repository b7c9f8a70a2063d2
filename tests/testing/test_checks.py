"""Single checks, on mistakes that another check of the suite would catch as well."""

import random

import numpy
import pytest
import torch
from bank import WRONG

from mtenn_core import Combination
from mtenn_core.testing import check_combination
from mtenn_core.testing._probe.operations import pretended


def only(check, combination):
    (record,) = check_combination(combination, level="quality", only=[check]).records
    return record


class NoneForTheLast(torch.autograd.Function):
    @staticmethod
    def forward(pred_list, grad_dict, param_names, *model_params):
        return torch.stack(pred_list).mean()

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.grad_dict, ctx.param_names, *_ = inputs

    @staticmethod
    def backward(ctx, grad_output):
        means = [grad_output * torch.stack(ctx.grad_dict[n]).mean(0) for n in ctx.param_names]
        if len(means) > 1:
            means[-1] = None
        return None, None, None, *means


def test_the_chain_rule_needs_a_gradient_for_each_parameter():
    class Mean(Combination):
        def forward(self, *args):
            return NoneForTheLast.apply(*args)

    record = only("B1", Mean)
    assert record.status == "fail"
    assert "backward returned no gradient" in record.reason


def test_a_value_that_is_nan_does_not_ignore_nan():
    class Mean(Combination):
        properties = frozenset({"ignores_nan"})

        def combine(self, predictions):
            return predictions.mean()

    record = only("D2", Mean)
    assert record.status == "fail"
    assert "ignores_nan" in record.reason


@pytest.mark.parametrize("columns", [None, 3])
def test_a_product_passes_although_torch_rounds_it_in_another_way_under_a_dispatch_mode(columns):
    class NoisyOr(Combination):
        domain = (0.0, 1.0)
        pose_columns = columns

        def combine(self, predictions):
            return 1 - (1 - predictions).prod(0)

    for seed in (2, 4):
        (record,) = check_combination(NoisyOr(), only=["A6"], seed=seed).records
        assert record.status == "pass", record.reason


def test_the_suite_restores_the_random_states_that_a_combination_uses():
    class Noisy(Combination):
        def combine(self, predictions):
            return predictions.mean() + 0 * (random.random() + numpy.random.random())

    states = random.getstate(), numpy.random.get_state()[1].tolist()
    check_combination(Noisy, level="gate")
    assert (random.getstate(), numpy.random.get_state()[1].tolist()) == states


class NoCombination(torch.nn.Module):
    """A combination of mtenn, say."""

    def forward(self, pred_list, grad_dict, param_names, *model_params):
        return torch.stack(pred_list).mean()


@pytest.mark.parametrize(
    ("source", "found"),
    [
        (NoCombination(), "an instance of NoCombination"),
        (NoCombination, "<class '.*NoCombination'>"),
        (lambda: NoCombination(), "an instance of NoCombination"),
        (lambda: 3, "an instance of int"),
        ("mean", "'mean'"),
        (None, "an instance of NoneType"),
    ],
    ids=["instance", "class", "function", "number", "name", "nothing"],
)
def test_only_a_combination_is_checked(source, found):
    with pytest.raises(TypeError, match=rf"takes an instance of .*Combination.* found {found}\. "):
        check_combination(source)


class HiddenScale(Combination):
    """The number 0.6 has no name, so the suite must find the factor in the weights."""

    def combine(self, predictions):
        return -0.6 * torch.logsumexp(-predictions / 0.6, dim=0)

    def pose_weights(self, predictions):
        return torch.softmax(-predictions, dim=0)


class WithoutProductRule(Combination):
    def combine(self, predictions):
        return (torch.softmax(-predictions, dim=0) * predictions).sum()

    def pose_weights(self, predictions):
        return torch.softmax(-predictions, dim=0)


class DetachedScale(Combination):
    def combine(self, predictions):
        scale = 1 + predictions.std(unbiased=False).detach()
        return torch.logsumexp(scale * predictions, 0) / scale


class LogarithmOfInput(Combination):
    pose_inputs = ("weight",)

    def combine(self, predictions, weight):
        return predictions.mean() + weight[0].log()


class CastToFloat32(Combination):
    def combine(self, predictions):
        return -torch.logsumexp(-predictions, dim=0)

    def pose_weights(self, predictions):
        return torch.softmax(-predictions.float(), dim=0).to(predictions.dtype)


class ChangesGradOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pred_list, grad_dict, param_names, *model_params):
        ctx.sums = [sum(grad_dict[name]) for name in param_names]
        ctx.n_poses = len(pred_list)
        return torch.stack(pred_list).mean()

    @staticmethod
    def backward(ctx, grad_output):
        grad_output /= ctx.n_poses
        return None, None, None, *(grad_output * total for total in ctx.sums)


class InPlace(Combination):
    def forward(self, *args):
        return ChangesGradOutput.apply(*args)


@pytest.mark.parametrize(
    ("combination", "check", "cause"),
    [
        (HiddenScale, "C1", "value: the factor 1.667 in the exponent is missing"),
        (WithoutProductRule, "C1", "the derivative of the populations (product rule)"),
        (DetachedScale, "C1", "or that of a detached scale"),
        (LogarithmOfInput, "D3", "for these pose inputs, whatever the predictions are"),
        (CastToFloat32, "C1", "the predictions are cast to torch.float32"),
        (InPlace, "A5", "grad_output is changed in place"),
    ],
)
def test_the_likely_cause_is_the_mistake(combination, check, cause):
    record = only(check, combination)
    assert record.status == "fail"
    assert cause in record.cause
    assert "shift by the extreme" not in record.cause


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("grad_output clamped to ±10,000", "grad_output is changed if it is large"),
        ("grad_output taken for zero below 1e-7", "grad_output is changed if it is small"),
        ("grad_output zero where it is not finite", "grad_output is changed if it is not finite"),
        ("pose gradients of kernels transposed", "wrong for kernels of convolutions"),
        ("of several frozen parameters in a row, one is counted", "frozen parameters are left out"),
        ("the value has no graph if the own parameter is frozen", "a frozen parameter of the comb"),
        ("own parameter trains only together with the model", "only if a parameter of the model"),
        ("hard maximum in eval mode", "asks self.training"),
        ("a scale that each return to training raises", "change more than self.training"),
        ("ones kept from inference_mode, which backward cannot use", "made under inference_mode"),
        ("own scale kept from no_grad, and so without a gradient", "made under no_grad"),
        ("hard maximum while torch compiles", "whether it runs under torch.compile"),
        ("the value and its graph kept on the instance", "keep value.detach()"),
        ("predictions of a validation kept until the next training step", "a validation never"),
        ("the mean of each call kept in the module", "grows with every call"),
        ("predictions cached by the address of the first of them", "by the address"),
        ("scale annealed after a thousand calls", "calls are counted"),
        ("predictions read from memory one after another", "reads the memory"),
        ("the batch behind the predictions centred in place", "in place on ._base"),
        ("deepcopy thaws a frozen parameter", "loses requires_grad"),
        ("pickle returns the combination itself", "__reduce__"),
        ("names compared by their end: 1.weight takes those of 11.weight", "compare whole names"),
    ],
)
def test_the_likely_cause_of_a_mistake_in_the_bank_is_the_mistake(name, cause):
    wrong = next(wrong for wrong in WRONG if wrong.name == name)
    record = only(wrong.check, wrong.make(1.0))
    assert record.status == "fail"
    assert cause in record.cause


class Loop(Combination):
    """Keeps the largest number of poses."""

    most = 0

    def combine(self, predictions):
        Loop.most = max(Loop.most, len(predictions))
        return sum(predictions, torch.zeros_like(predictions[0])) / len(predictions)


class Batch(Loop):
    def combine(self, predictions):
        Loop.most = max(Loop.most, len(predictions))
        return predictions.mean()


@pytest.mark.parametrize(("combination", "most"), [(Loop, 1000), (Batch, 2048)])
def test_a_loop_over_the_poses_is_not_run_for_the_largest_numbers_of_poses(
    monkeypatch, combination, most
):
    monkeypatch.setattr(Loop, "most", 0)
    assert check_combination(combination, only=["B3"]).passed
    assert Loop.most == most


class ScriptedLayer(Combination):
    def __init__(self):
        super().__init__()
        self.layer = torch.jit.script(torch.nn.Linear(1, 2))

    def combine(self, predictions):
        scores = self.layer(predictions[:, None].to(self.layer.weight.dtype))
        return torch.tanh(scores).mean().to(predictions) + predictions.mean()


# Newer versions of torch deprecate TorchScript, and modules of older plugins still use it.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_parameters_of_a_torchscript_module_are_own_parameters():
    report = check_combination(ScriptedLayer, only=["B1", "C2", "C3", "A7", "A10"])
    assert [record.status for record in report.records] == ["pass"] * 5, str(report)


def test_a_pretended_compilation_ends_with_its_context():
    def answers():  # torch 2.6 has no is_exporting
        is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
        return torch.compiler.is_compiling(), is_exporting()

    with pretended("torch.export"):
        assert answers() == (True, True)
    assert answers() == (False, False)
