import weakref

import pytest
import torch

from mtenn_core import attach_gradients
from mtenn_core.errors import DoubleBackwardError, GradientError, PredictionError
from mtenn_core.gradients import join_grad_dict, split_grad_dict

# Sums of a few float64 products in another order differ in the last two digits.
EXACT = {"rtol": 1e-14, "atol": 1e-14}


@pytest.fixture
def step():
    """Predictions, gradients and parameters of three poses, as a model would store them."""
    params = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in [(), (2, 3), (3,)]]
    names = ["scale", "weight", "bias"]
    predictions = list(torch.randn(3, dtype=torch.float64))
    grad_dict = {
        name: [torch.randn_like(param) for _ in predictions]
        for name, param in zip(names, params, strict=True)
    }
    return predictions, grad_dict, names, params


def test_join_inverts_split():
    grad_dict = {"a": [torch.randn(2), torch.randn(2)], "b": [torch.randn(()), torch.randn(())]}
    keys, tensors = split_grad_dict(grad_dict)
    assert keys == ["a", "a", "b", "b"]
    assert all(x is y for x, y in zip(tensors, grad_dict["a"] + grad_dict["b"], strict=True))
    assert join_grad_dict(keys, tensors) == grad_dict


def test_split_and_join_of_nothing_are_nothing():
    assert split_grad_dict({}) == ([], [])
    assert join_grad_dict([], []) == {}


@pytest.mark.parametrize(
    ("grad_dict", "message"),
    [
        ({"a": [torch.ones(1)] * 2, "b": [torch.ones(1)]}, "parameter 'b': expected 2 .* found 1"),
        ({"a": []}, "parameter 'a': expected one gradient per pose; found none"),
    ],
)
def test_split_names_the_key_and_the_numbers(grad_dict, message):
    with pytest.raises(GradientError, match=message):
        split_grad_dict(grad_dict)


def test_join_wants_one_key_per_tensor():
    with pytest.raises(GradientError, match="found 2 keys and 1 gradients"):
        join_grad_dict(["a", "a"], [torch.ones(1)])


def test_join_wants_every_key_equally_often():
    with pytest.raises(GradientError, match=r"parameter 'b': expected 2 .* found 1"):
        join_grad_dict(["a", "a", "b"], [torch.ones(1)] * 3)


def test_backward_is_the_weighted_sum_of_the_stored_gradients(step):
    predictions, grad_dict, names, params = step
    weights = torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64)
    attached = attach_gradients(predictions, grad_dict, names, *params)
    torch.testing.assert_close(attached, torch.stack(predictions), rtol=0, atol=0)
    (attached * weights).sum().backward()
    for name, param in zip(names, params, strict=True):
        expected = sum(w * g for w, g in zip(weights, grad_dict[name], strict=True))
        torch.testing.assert_close(param.grad, expected, **EXACT)


def test_the_orders_of_names_and_of_the_dict_are_independent(step):
    predictions, grad_dict, names, params = step
    backwards = {name: grad_dict[name] for name in reversed(names)}
    attach_gradients(predictions, backwards, names, *params)[1].backward()
    for name, param in zip(names, params, strict=True):
        torch.testing.assert_close(param.grad, grad_dict[name][1], rtol=0, atol=0)


def test_predictions_may_have_shape_one(step):
    predictions, grad_dict, names, params = step
    predictions = [prediction.reshape(1) for prediction in predictions]
    assert attach_gradients(predictions, grad_dict, names, *params).shape == (3,)


def test_without_parameters_the_predictions_have_no_gradient():
    assert not attach_gradients([torch.tensor(1.0)], {}, []).requires_grad


def test_half_precision_gradients_are_summed_in_float32():
    param = torch.zeros(1, dtype=torch.float16, requires_grad=True)
    gradients = [torch.full((1,), 1.0, dtype=torch.float16) for _ in range(4096)]
    predictions = [torch.tensor(0.0)] * 4096
    attached = attach_gradients(predictions, {"p": gradients}, ["p"], param)
    attached.sum().backward()
    # In float16, 2048 + 1 is 2048: the sum would stop half way.
    assert param.grad.item() == 4096


def test_parameters_may_differ_in_dtype():
    params = [torch.zeros(2, dtype=t, requires_grad=True) for t in (torch.float32, torch.float64)]
    grad_dict = {"a": [torch.ones(2)] * 2, "b": [torch.ones(2, dtype=torch.float64)] * 2}
    attached = attach_gradients([torch.tensor(1.0)] * 2, grad_dict, ["a", "b"], *params)
    attached.sum().backward()
    assert [param.grad.dtype for param in params] == [torch.float32, torch.float64]
    assert all(param.grad.tolist() == [2, 2] for param in params)


def test_a_second_derivative_is_refused(step):
    predictions, grad_dict, names, params = step
    attached = attach_gradients(predictions, grad_dict, names, *params)
    with pytest.raises(DoubleBackwardError, match="gradients='graph'"):
        torch.autograd.grad(attached.sum(), params, create_graph=True)


def test_backward_frees_the_stored_gradients():
    param, gradient = torch.zeros(3, requires_grad=True), torch.ones(3)
    attached = attach_gradients([torch.tensor(1.0)], {"p": [gradient]}, ["p"], param)
    stored = weakref.ref(gradient)
    del gradient
    assert stored() is not None
    attached.sum().backward()
    assert stored() is None
    assert attached.grad_fn is not None  # it is alive, and holds nothing


def test_a_stored_gradient_that_was_edited_is_noticed(step):
    predictions, grad_dict, names, params = step
    attached = attach_gradients(predictions, grad_dict, names, *params)
    grad_dict["bias"][0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        attached.sum().backward()


def _rename(step, **changes):
    predictions, grad_dict, names, params = step
    values = {"predictions": predictions, "grad_dict": grad_dict, "names": names, "params": params}
    values |= {key: change(values[key]) for key, change in changes.items()}
    return values


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            {"names": lambda n: n[:2]}, "found 2 names and 3 parameters", id="name missing"
        ),
        pytest.param(
            {"names": lambda n: [n[0], n[1], n[1]]},
            "parameter 'weight' must be in param_names once; found 2 times",
            id="name twice",
        ),
        pytest.param(
            {"names": lambda n: [n[0], n[1], "other"]},
            r"parameter 'other' has no gradients.*\['bias', 'scale', 'weight'\]",
            id="unknown name",
        ),
        pytest.param(
            {"names": lambda n: n[:2], "params": lambda p: p[:2]},
            "parameter 'bias' is in grad_dict but not in param_names",
            id="extra key",
        ),
        pytest.param(
            {"names": lambda n: [n[0], n[2], n[1]]},
            r"parameter 'bias', pose 0: .*shape \(2, 3\).*found shape \(3,\)",
            id="misordered names",
        ),
        pytest.param(
            {"grad_dict": lambda d: {**d, "bias": d["bias"][:2]}},
            "parameter 'bias': expected 3 pose gradients, one per prediction; found 2",
            id="unequal lists",
        ),
        pytest.param(
            {"grad_dict": lambda d: {**d, "bias": [*d["bias"][:2], torch.ones(3)]}},
            "parameter 'bias', pose 2: .*float64.*found .*float32",
            id="wrong dtype",
        ),
        pytest.param(
            {"grad_dict": lambda d: {**d, "bias": [*d["bias"][:2], 0.5]}},
            r"parameter 'bias', pose 2: .*found 0\.5",
            id="no tensor",
        ),
    ],
)
def test_gradients_that_do_not_fit_are_named(step, changes, message):
    step = _rename(step, **changes)
    with pytest.raises(GradientError, match=message):
        attach_gradients(step["predictions"], step["grad_dict"], step["names"], *step["params"])


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        pytest.param([], "at least one pose; found none", id="empty"),
        pytest.param(
            [torch.ones(()), torch.ones(2)],
            r"pose 1: a prediction must be one number.*found shape \(2,\)",
            id="two numbers",
        ),
        pytest.param(
            [torch.ones(()), torch.ones(()).double()], "pose 1: .*float32.*float64", id="dtypes"
        ),
    ],
)
def test_predictions_that_do_not_fit_are_named(predictions, message):
    with pytest.raises(PredictionError, match=message):
        attach_gradients(predictions, {}, [])
