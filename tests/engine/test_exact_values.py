import collections
import enum
import functools
import json
import math

import numpy as np
import pytest
import torch

from mtenn_core._engine.exact_values import MAX_LENGTH, Encoder, NotExactError, decode

NOTHING = torch.nn.Module()


def again(value, module=NOTHING):
    data = json.loads(json.dumps(Encoder(module).encode(value)))
    return decode(data, module.state_dict())


def assert_same(found, expected):
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, torch.Tensor | np.ndarray | np.generic):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        # as_tensor would warn about a scalar of numpy 1.
        pair = [torch.as_tensor(each[None]).double() for each in (found, expected)]
        torch.testing.assert_close(*pair, rtol=0, atol=0, equal_nan=True)
    elif isinstance(expected, float) and math.isnan(expected):
        assert math.isnan(found)
    else:
        assert found == expected


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0,
        -(10**30),
        0.1,
        5e-324,
        math.inf,
        -math.inf,
        math.nan,
        -0.0,
        "nan",
        "a \udcff …",
        [1, 1.0, True],
        (),
        (1, [2, (3,)], {"a": (4,)}),
        {"a": 1, "b": [2.5]},
        {1: 0.5, "1": 0.25, (2, 3): None},
        {"!tuple": [1]},
        {1, 2, "a"},
        frozenset({0.5}),
        1 - 2j,
        b"\x00\xff",
        np.float64(0.1),
        np.float32(0.1),
        np.int64(3),
        np.bool_(True),
        np.array([[0.1, math.inf], [math.nan, 1e-310]]),
        np.arange(3, dtype=np.int8),
        np.zeros((0, 2)),
        torch.tensor(0.1),
        torch.tensor([[1, 2]]),
        torch.tensor([0.1, math.nan], dtype=torch.float64),
        torch.tensor([0.1], dtype=torch.bfloat16),
        torch.tensor([True]),
        torch.float64,
        torch.device("cuda", 1),
    ],
    ids=repr,
)
def test_a_value_comes_back_with_its_type(value):
    assert_same(again(value), value)


class Kind(enum.IntEnum):
    A = 1


Pair = collections.namedtuple("Pair", "a b")


@pytest.mark.parametrize(
    "value",
    [
        lambda y: y,
        torch.tanh,
        functools.partial(pow, 2),
        torch.nn.Linear(1, 1),
        Kind.A,
        Pair(1, 2),
        collections.OrderedDict(a=1),
        [1, object()],
        {"a": {2: print}},
        np.array(["a"], dtype=object),
        np.longdouble("0.1"),
        np.str_("a"),
        torch.eye(2).to_sparse(),
        torch.zeros(2, requires_grad=True),
        torch.zeros(2, device="meta"),
        10**5000,
        list(range(MAX_LENGTH)),
        "a" * MAX_LENGTH,
        functools.reduce(lambda nested, _: [nested], range(10_000), []),
    ],
    ids=lambda value: type(value).__name__,
)
def test_another_value_is_not_exact(value):
    with pytest.raises(NotExactError):
        Encoder(NOTHING).encode(value)


def test_a_list_that_contains_itself_is_not_exact():
    value = []
    value.append(value)
    with pytest.raises(NotExactError):
        Encoder(NOTHING).encode(value)


def test_equal_sets_are_written_in_the_same_order():
    one, other = {0, 8}, {8, 0}  # equal hashes in a table of 8: the first is found first
    assert list(one) != list(other)
    assert Encoder(NOTHING).encode(one) == Encoder(NOTHING).encode(other)


def test_a_tensor_of_the_module_is_written_as_its_name():
    module = torch.nn.Linear(2, 1)
    data = Encoder(module).encode([module.weight, module.bias.detach()])
    assert data == [{"!parameter": "weight"}, {"!state": "bias"}]
    weight, bias = again([module.weight, module.bias.detach()], module)
    assert isinstance(weight, torch.nn.Parameter)
    assert not isinstance(bias, torch.nn.Parameter)
    assert torch.equal(weight, module.weight)
    assert weight.data_ptr() != module.weight.data_ptr()


@pytest.mark.parametrize(
    "data",
    [{"!": 1}, {"!eval": "1"}, {"!dtype": "nn"}, {"!tensor": [1]}, {"!state": "absent"}],
    ids=str,
)
def test_unknown_data_are_refused(data):
    with pytest.raises(ValueError, match="cannot read"):
        decode(data, {})
