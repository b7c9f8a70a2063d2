"""The comparison of two runs by checksums of the tensors that they save."""

import math

import pytest
import torch
from torch import Tensor

from mtenn_core._engine import fingerprint
from mtenn_core._engine.fingerprint import Fingerprint, difference, marks_of

PREDICTIONS = torch.tensor([1.0, 2.0])
ANOTHER_GRADIENT = "It predicted the same, but its gradient would be another."


def of_run(saved: list[Tensor], predictions: Tensor = PREDICTIONS) -> Fingerprint:
    return Fingerprint(predictions, len(saved), marks_of(saved, {}))


def changed(one: list[Tensor], other: list[Tensor]) -> str | None:
    """Return how a run that saves other tensors differs from the first run."""
    found = difference(of_run(one), PREDICTIONS.clone(), other, {})
    return None if found is None else found[1]


def test_the_order_of_tensors_matters():
    one, other = torch.randn(3), torch.randn(3)
    assert changed([one, other], [one, other]) is None
    assert changed([one, other], [other, one]) == ANOTHER_GRADIENT


def test_the_order_of_numbers_matters():
    tensor = torch.randn(8)
    assert changed([tensor], [tensor.flip(0)]) == ANOTHER_GRADIENT


def test_another_number_of_tensors_is_named():
    assert changed([torch.ones(3)], [torch.ones(3)] * 2) == "It saved 2 tensors instead of 1."


def test_the_first_pose_with_another_prediction_is_named():
    found = difference(of_run([]), torch.tensor([1.0, 3.0]), [], {})
    assert found == (1, "It predicted 3.0 instead of 2.0.")


def test_tensors_of_another_size_differ():
    assert changed([torch.ones(3)], [torch.ones(4)]) == ANOTHER_GRADIENT


def test_without_samples_only_predictions_and_numbers_of_tensors_are_compared():
    first = Fingerprint(PREDICTIONS, 1, None)
    assert difference(first, PREDICTIONS.clone(), [torch.randn(3)], {}) is None
    assert difference(first, PREDICTIONS.clone(), [], {}) == (
        None,
        "It saved 0 tensors instead of 1.",
    )


SHAPES = {"vector": (1000,), "matrix": (40, 30), "transposed": (30, 40), "three": (5, 6, 7)}


@pytest.mark.parametrize("place", [0, 1, 599, 1023, 1024, -1])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_changed_number_is_seen_in_each_place(shape, place):
    tensor = torch.randn(SHAPES[shape])
    if shape == "transposed":
        tensor = tensor.t()
    other = tensor.contiguous().clone()
    other.view(-1)[place % other.numel()] += 1
    assert changed([tensor], [other]) == ANOTHER_GRADIENT


def test_two_swapped_rows_are_seen():
    tensor = torch.randn(4000, 3)
    for one, other in ((0, 1), (7, 3999), (1000, 2024)):
        swapped = tensor.clone()
        swapped[[one, other]] = tensor[[other, one]]
        assert changed([tensor], [swapped]) == ANOTHER_GRADIENT


def test_a_parameter_and_its_view_are_known_by_their_place():
    one, other = (torch.nn.Parameter(torch.ones(2, 3)) for _ in range(2))
    indices = {id(one): 0, id(other): 1}
    first = Fingerprint(PREDICTIONS, 2, marks_of([one, other[1]], indices))
    for saved, same in (
        ([one, other[1]], True),
        ([one, other[0]], False),
        ([other, one[1]], False),
    ):
        assert (difference(first, PREDICTIONS.clone(), saved, indices) is None) == same


@pytest.mark.parametrize(
    "tensor",
    [torch.tensor(3.0), torch.empty(0), torch.empty(0, 3), torch.empty(2, 3, 0), torch.ones(1)],
    ids=lambda tensor: str(tuple(tensor.shape)),
)
def test_small_tensors_have_a_checksum(tensor):
    assert changed([tensor], [tensor.clone()]) is None


def test_expanded_tensors_have_a_checksum():
    tensor = torch.ones(3, 1).expand(3, 400)
    assert changed([tensor], [tensor]) is None
    assert changed([tensor], [2 * tensor]) is not None


@pytest.mark.parametrize(
    "tensor",
    [
        pytest.param(torch.ones(3), id="finite"),
        pytest.param(torch.tensor([1.0, math.inf, math.nan]), id="not finite"),
        pytest.param(torch.ones(3, dtype=torch.bfloat16), id="half precision"),
        pytest.param(torch.arange(3), id="integers"),
        pytest.param(torch.ones(3, dtype=torch.complex64), id="complex"),
    ],
)
def test_a_checksum_on_a_cpu_is_a_number_and_no_tensor(tensor):
    """For a small pose, a tensor for each checksum would take a third of the memory that stays."""
    (mark,) = marks_of([tensor], {})
    assert isinstance(mark.value, float)
    assert math.isfinite(mark.value)


def test_the_same_numbers_in_another_dtype_differ():
    assert changed([torch.ones(3)], [torch.ones(3).double()]) == ANOTHER_GRADIENT


@pytest.mark.parametrize(
    ("dtype", "rounding", "seen"),
    [
        # The limit on a CPU is 200 eps: 2.4e-5 in float32, 4.4e-14 in float64.
        (torch.float32, 1e-6, False),
        (torch.float32, 1e-4, True),
        (torch.float64, 1e-15, False),
        (torch.float64, 1e-12, True),
    ],
)
def test_rounding_is_accepted(dtype, rounding, seen):
    tensor = torch.tensor([1.0, 1e-3, -5.0], dtype=dtype)
    predictions = PREDICTIONS.to(dtype)
    first = of_run([tensor], predictions)
    # 1e-3 may move by as much as 5 does, because a sum of large numbers may be small.
    other = tensor.clone()
    other[0] += 5 * rounding
    found = difference(first, predictions.clone(), [other], {})
    assert (found is not None) == seen


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_equal_themselves(value):
    tensor = torch.tensor([1.0, value, 3.0])
    assert changed([tensor], [tensor * 1.0000001]) is None
    assert changed([tensor], [tensor[[1, 0, 2]]]) == ANOTHER_GRADIENT
    assert changed([tensor], [torch.tensor([1.0, value, 4.0])]) == ANOTHER_GRADIENT
    assert changed([tensor], [torch.tensor([1.0, 2.0, 3.0])]) == ANOTHER_GRADIENT
    assert changed([torch.tensor([1.0, 2.0, 3.0])], [tensor]) == ANOTHER_GRADIENT


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool])
def test_whole_numbers_are_compared_exactly(dtype):
    big = torch.tensor([10**6, 0, 10**6]).to(dtype)
    other = torch.tensor([10**6, 1, 10**6]).to(dtype)
    assert changed([big, torch.ones(2)], [big.clone(), torch.ones(2)]) is None
    assert changed([big, torch.ones(2)], [other, torch.ones(2)]) == ANOTHER_GRADIENT


def test_on_a_cpu_half_precision_has_no_more_room():
    tensor = torch.tensor([1.0, 2.0]).bfloat16()
    assert changed([tensor], [tensor.clone()]) is None
    assert changed([tensor], [tensor * 1.01]) == ANOTHER_GRADIENT


@pytest.mark.parametrize(
    ("n_changed", "seen"), [(20, False), (4000, True)], ids=["few", "all of them"]
)
def test_on_an_accelerator_few_numbers_of_half_precision_may_be_rounded_otherwise(
    monkeypatch, n_changed, seen
):
    """An ulp of bfloat16 in 20 of 4000 numbers is rounding, and in all numbers a jitter."""
    eps = torch.finfo(torch.bfloat16).eps
    monkeypatch.setattr(fingerprint, "_precision", lambda predictions, saved: eps)
    torch.manual_seed(0)
    tensor, signs = torch.ones(4000).bfloat16(), torch.randn(n_changed).sign()
    other = tensor.clone()
    other[:n_changed] += (eps * signs).bfloat16()
    assert (changed([tensor], [other]) is not None) == seen


def test_tensors_without_fixed_numbers_are_left_out():
    buffer_of_a_library = torch.ones(3, dtype=torch.uint8)
    assert marks_of([buffer_of_a_library, torch.eye(3).to_sparse()], {}) == [None, None]
