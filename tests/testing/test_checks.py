"""Single checks, on mistakes that another check of the suite would catch as well."""

import random

import numpy
import pytest
import torch

from mtenn_core import Combination
from mtenn_core.testing import check_combination


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
