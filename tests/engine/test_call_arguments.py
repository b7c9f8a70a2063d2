"""Poses, sizes and pose inputs come in columns of tables and in arrays of all kinds."""

import numpy as np
import pytest
import torch
from torch import Tensor

from mtenn_core import Combination, MultiPoseModel
from mtenn_core.errors import PredictionError

SCORES = [-5.0, -6.0, -8.0]


class ScoreWeighted(Combination):
    pose_inputs = ("score",)

    def combine(self, predictions: Tensor, score: Tensor) -> Tensor:
        return (torch.softmax(-score, dim=0) * predictions).sum()


class Mean(Combination):
    def combine(self, predictions: Tensor) -> Tensor:
        return predictions.mean()


class BareColumn:
    """A sequence with labels: ``[…]`` looks a label up, iteration goes by position."""

    def __init__(self, values, labels=(7, 3, 5)):
        self.values = values
        self.by_label = dict(zip(labels, values, strict=False))

    def __len__(self):
        return len(self.values)

    def __iter__(self):
        return iter(self.values)

    def __getitem__(self, label):
        return self.by_label[label]


class Column(BareColumn):
    """A column of a table, as in pandas."""

    ndim = 1

    def keys(self):
        return self.by_label.keys()

    def __array__(self, dtype=None, copy=None):
        return read_only(self.values)  # as in pandas 3


class Table:
    """A table, as in pandas: iteration goes over the names of its columns."""

    columns = (2, 1)

    def __iter__(self):
        return iter(self.columns)


def read_only(values):
    array = np.array(values)
    array.flags.writeable = False
    return array


def objects(values):
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def pandas_column(values):
    return pytest.importorskip("pandas").Series(values, index=[7, 3, 5])


@pytest.mark.parametrize(
    "column",
    [
        Column,
        lambda values: Column(values, [2, 0, 1]),
        lambda values: Column(values, "abc"),
        lambda values: Column(values, [0, 0, 0]),
        BareColumn,
        pandas_column,
        np.array,
        lambda values: np.array(values[::-1])[::-1],
        lambda values: np.array(values, dtype=">f8"),
        lambda values: np.array(values, dtype=np.longdouble),
        lambda values: np.array(values, dtype=np.int32),
        read_only,
        objects,
        lambda values: objects([torch.tensor(value) for value in values]),
        lambda values: np.ma.array(values, mask=False),
        lambda values: [np.array(value) for value in values],
        lambda values: [torch.tensor(values[0]), *np.array(values[1:])],
        lambda values: dict(enumerate(values)).values(),
    ],
    ids=[
        "labels",
        "labels out of order",
        "names",
        "equal labels",
        "labels, no array",
        "pandas",
        "array",
        "reversed array",
        "other byte order",
        "long doubles",
        "integers",
        "read-only array",
        "objects",
        "tensors in an array",
        "masked array without a mask",
        "arrays in a list",
        "tensors and arrays in a list",
        "values of a dict",
    ],
)
def test_pose_inputs_are_taken_in_the_order_of_their_positions(column, pose_model, poses):
    model = MultiPoseModel(pose_model, ScoreWeighted())
    expected = model(poses[:3], pose_inputs={"score": SCORES}).prediction
    found = model(poses[:3], pose_inputs={"score": column(SCORES)}).prediction
    assert torch.equal(found, expected)


@pytest.mark.parametrize("gradients", ["graph", "recomputed"])
def test_an_array_may_change_after_the_call(gradients, pose_model, poses):
    scores = np.array(SCORES)
    model = MultiPoseModel(pose_model, ScoreWeighted(), gradients=gradients)
    params = list(pose_model.parameters())
    values = [model(poses[:3], pose_inputs={"score": s}).prediction for s in (SCORES, scores)]
    scores[:] = 0
    expected, found = (torch.autograd.grad(value, params) for value in values)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.ma.array(SCORES, mask=[False, True, False]), "NoneType"),
        (objects([-5.0, None, -8.0]), "NoneType"),
        (np.array(SCORES, dtype=complex), "expected real numbers; found complex128"),
        (np.array(["2020-01-01"] * 3, dtype="M8[D]"), r"expected real numbers; found datetime64"),
        (np.array(["-5", "-6", "-8"]), "expected real numbers; found <U2"),
        (objects(["-5", "-6", "-8"]), "'str'"),
        (dict(enumerate(SCORES)), "dict"),
        (set(SCORES), "set"),
        ([10**400, 0, 0], "too large to convert to float"),
        ([Column([value]) for value in SCORES], "could not determine the shape"),
        (np.array(SCORES)[:, None], r"one number for each pose.*found shape \(3, 1\)"),
        (-5.0, r"one number for each pose.*found shape \(\)"),
    ],
    ids=[
        "masked",
        "missing",
        "complex",
        "dates",
        "strings",
        "strings as objects",
        "dict",
        "set",
        "beyond float64",
        "columns in a list",
        "two dimensions",
        "one number",
    ],
)
def test_pose_inputs_that_are_no_real_numbers_in_order_are_refused(
    values, message, pose_model, poses
):
    with pytest.raises(PredictionError, match=rf"pose_inputs\['score'\].*{message}"):
        MultiPoseModel(pose_model, ScoreWeighted())(poses[:3], pose_inputs={"score": values})


@pytest.mark.parametrize(
    "column", [Column, objects, pandas_column], ids=["labels", "objects", "pandas"]
)
def test_poses_are_taken_in_the_order_of_their_positions(column, pose_model, poses):
    model = MultiPoseModel(pose_model, Mean())
    listed = [{"x": pose} for pose in poses[:3]]
    model.pose_model.register_forward_pre_hook(lambda _, args: args[0]["x"])
    expected, found = model(listed), model(column(listed))
    assert torch.equal(found.pose_predictions, expected.pose_predictions)


@pytest.mark.parametrize(
    "sizes",
    [
        Column([2, 1]),
        Column([2, 1], [1, 0]),
        np.array([2, 1]),
        np.array([2, 1], dtype=np.uint8),
        objects([2, 1]),
        torch.tensor([2, 1]),
    ],
    ids=["labels", "labels out of order", "array", "small integers", "objects", "tensor"],
)
def test_sizes_are_taken_in_the_order_of_their_positions(sizes, pose_model, poses):
    model = MultiPoseModel(pose_model, Mean())
    expected = model(poses[:3], sizes=[2, 1]).prediction
    assert torch.equal(model(poses[:3], sizes=sizes).prediction, expected)


@pytest.mark.parametrize(
    "sizes",
    [{2: "a", 1: "b"}, {2, 1}, Table(), np.ma.array([2, 1], mask=[False, True]), np.array(3)],
    ids=["dict", "set", "table", "masked", "one number"],
)
def test_sizes_without_an_order_are_refused(sizes, pose_model, poses):
    with pytest.raises(PredictionError, match="sizes must be whole numbers, one per compound"):
        MultiPoseModel(pose_model, Mean())(poses[:3], sizes=sizes)


@pytest.mark.parametrize("poses", [Table(), {1, 2}], ids=["table", "set"])
def test_poses_without_an_order_are_refused(poses, pose_model):
    with pytest.raises(PredictionError, match=r"poses must be a sequence .* found (Table|set)"):
        MultiPoseModel(pose_model, Mean())(poses)
