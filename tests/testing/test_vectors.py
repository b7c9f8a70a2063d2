"""The suite checks combinations that take several numbers per pose, or return several."""

import math
import re
from functools import partial

import pytest
import torch
from tiers import slow
from torch import nn

from mtenn_core import Combination
from mtenn_core.testing import check_combination
from mtenn_core.testing._probe.one_number import as_written, factors
from mtenn_core.testing._probe.poses import Poses
from mtenn_core.testing._probe.subject import Subject

POOLING = frozenset({"permutation_invariant", "replication_invariant"})


def seeded(make):
    """Return a module with the same initial parameters each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


class DeepSets(Combination):
    pose_columns = 8
    properties = frozenset({"permutation_invariant"})

    def __init__(self, activation=nn.Tanh):
        super().__init__()
        make = partial(self._network, activation)
        self.phi, self.rho = seeded(make)

    @staticmethod
    def _network(activation):
        layers = nn.Linear(8, 16), activation(), nn.Linear(16, 16), activation()
        return nn.Sequential(*layers), nn.Linear(16, 1)

    def combine(self, predictions):
        return self.rho(self.phi(predictions).sum(0))[0]


class MeanOfSets(DeepSets):
    properties = POOLING

    def combine(self, predictions):
        return self.rho(self.phi(predictions).mean(0))[0]


class GatedAttention(Combination):
    properties = POOLING | {"bounded"}

    def __init__(self, n_columns=6, hidden=5):
        super().__init__()
        self.pose_columns = n_columns
        self.v, self.u, self.w = seeded(
            lambda: (
                nn.Linear(n_columns, hidden),
                nn.Linear(n_columns, hidden),
                nn.Linear(hidden, 1),
            )
        )

    def scores(self, predictions):
        return self.w(torch.tanh(self.v(predictions)) * torch.sigmoid(self.u(predictions)))

    def combine(self, predictions):
        return (torch.softmax(self.scores(predictions), dim=0) * predictions).sum(0)


class WithReadout(GatedAttention):
    properties = POOLING

    def __init__(self, n_columns=6):
        super().__init__(n_columns)
        self.readout = seeded(lambda: nn.Linear(n_columns, 1))

    def combine(self, predictions):
        return self.readout(super().combine(predictions))[0]


class WithDropout(WithReadout):
    stochastic = True
    properties = frozenset()

    def scores(self, predictions):
        return nn.functional.dropout(super().scores(predictions), 0.25, self.training)


class MaxPooling(Combination):
    pose_columns = "any"
    smooth = False
    properties = POOLING | {"bounded", "idempotent", "monotone", "translation_equivariant"}

    def combine(self, predictions):
        return predictions.amax(0)

    def reference(self, predictions):
        return predictions.sort(0).values[-1]


class SelfAttention(Combination):
    pose_columns = 4
    properties = POOLING

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = seeded(lambda: [nn.Linear(4, 4) for _ in range(3)])

    def combine(self, predictions):
        scores = self.q(predictions) @ self.k(predictions).T / math.sqrt(4)
        return (torch.softmax(scores, dim=1) @ self.v(predictions)).mean(0)


class Confidence(Combination):
    """Σ_i p_i y_i with p = softmax(c), and its closed form ∂/∂y_i = p_i, ∂/∂c_i = p_i (y_i - h)."""

    pose_columns = ("affinity", "confidence")
    properties = POOLING | {"translation_equivariant"}

    def combine(self, predictions):
        y, c = predictions.unbind(1)
        return torch.softmax(c, 0) @ y

    def pose_weights(self, predictions):
        y, c = predictions.unbind(1)
        p = torch.softmax(c, 0)
        return torch.stack([p, p * (y - p @ y)], dim=1)

    def reference(self, predictions):
        y, c = predictions.unbind(1)
        weights = (c - c.max()).exp()
        return (weights * y).sum() / weights.sum()


class Penalized(Combination):
    """A pose input besides the columns."""

    pose_columns = 3
    pose_inputs = ("energy",)

    def combine(self, predictions, energy):
        return torch.softmax(-energy, 0) @ predictions


class ClosedSets(Combination):
    """A rule of a user: h = Σ_i tanh(y_i W) · r, with its closed form."""

    pose_columns = 3

    def __init__(self):
        super().__init__()
        self.w, self.r = seeded(
            lambda: (nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(5)))
        )

    def combine(self, predictions):
        return torch.tanh(predictions @ self.w).sum(0) @ self.r

    def pose_weights(self, predictions):
        return ((1 - torch.tanh(predictions @ self.w).square()) * self.r) @ self.w.T


RIGHT = {
    "sum of an MLP": DeepSets,
    "sum of an MLP with kinks at no ties": partial(DeepSets, nn.ReLU),
    "mean of an MLP": MeanOfSets,
    "gated attention": GatedAttention,
    "gated attention with a readout": WithReadout,
    "64 embeddings": partial(WithReadout, 64),
    "dropout in the gate": WithDropout,
    "max pooling": MaxPooling,
    "self-attention over the poses": SelfAttention,
    "confidence as weight": Confidence,
    "a pose input": Penalized,
    "closed form of a user": ClosedSets,
}
BRIEF = ("confidence as weight", "max pooling")


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", RIGHT)
def test_a_right_rule_passes_the_gate(name, seed):
    report = check_combination(RIGHT[name](), level="gate", seed=seed)
    assert report.passed, str(report)
    assert not report.advice


@pytest.mark.parametrize(
    "name", [*BRIEF, *slow(*(RIGHT.keys() - BRIEF), reason="whole suites, seconds each")]
)
def test_a_right_rule_passes_all_checks_without_advice(name):
    report = check_combination(RIGHT[name](), level="quality", seed=2)
    assert report.passed, str(report)
    assert not report.advice
    assert report.curves


def test_only_inapplicable_checks_are_skipped():
    report = check_combination(Confidence())
    reasons = {record.id: record.reason for record in report.records if record.status == "skip"}
    assert reasons == {
        "A1": "it has no forward of its own",
        "C3": "it has no parameters of its own",
        "C4": "it has no pose inputs, or all of them are labels",
        "D5": "it has no arguments for which the check can guess other values",
    }


def only(check, combination, **options):
    (record,) = check_combination(combination, only=[check], **options).records
    return record


class OneWeightOff(ClosedSets):
    def pose_weights(self, predictions):
        weights = super().pose_weights(predictions).clone()
        weights[len(weights) // 2, 2] *= 1.01
        return weights


class OneNumberOff(ClosedSets):
    def pose_weights(self, predictions):
        w = self.w.clone()
        w[1, 2] *= 1.01
        return ((1 - torch.tanh(predictions @ self.w).square()) * self.r) @ w.T


class Transposed(ClosedSets):
    def pose_weights(self, predictions):
        return super().pose_weights(predictions).T.reshape(predictions.shape)


class OtherPose(ClosedSets):
    def pose_weights(self, predictions):
        return super().pose_weights(predictions).roll(1, 0)


class OtherColumn(ClosedSets):
    def pose_weights(self, predictions):
        return super().pose_weights(predictions).flip(1)


class OverColumns(Confidence):
    def pose_weights(self, predictions):
        y, c = predictions.unbind(1)
        p = torch.softmax(predictions, dim=1)[:, 1]
        return torch.stack([p, p * (y - torch.softmax(c, 0) @ y)], dim=1)


class ConstantConfidence(Confidence):
    def pose_weights(self, predictions):
        p = torch.softmax(predictions[:, 1], 0)
        return torch.stack([p, 0 * p], dim=1)


class DetachedGate(Confidence):
    pose_weights = Combination.pose_weights

    def combine(self, predictions):
        return torch.softmax(predictions[:, 1].detach(), 0) @ predictions[:, 0]


class DetachedAttention(GatedAttention):
    def scores(self, predictions):
        return super().scores(predictions).detach()


class Undeclared(Combination):
    pose_columns = 3

    def combine(self, predictions):
        return predictions.amax(0) @ predictions.new_tensor([1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("combination", "place", "cause"),
    [
        (OneWeightOff, "pose 1 of 3, column 2", "only the weights of column 2 are wrong"),
        (OneNumberOff, r"pose \d of \d, column 1", "only the weights of column 1 are wrong"),
        (Transposed, r"pose \d of 3, column \d", "the weights are transposed"),
        (OtherPose, r"pose \d of 3, column \d", r"the weights are shifted by one pose \(roll\)"),
        (OtherColumn, r"pose \d of 3, column \d", "the columns of the weights are in reverse"),
        (OverColumns, r"column \d \('(affinity|confidence)'\)", ""),
        (
            ConstantConfidence,
            r"pose \d of \d, column 1 \('confidence'\)",
            r"only the weights of column 1 \('confidence'\) are wrong: they are zero",
        ),
        (
            DetachedGate,
            r"pose \d of \d, column 1 \('confidence'\)",
            r"column 1 \('confidence'\) are wrong: they are zero \(is the column detached\?\)",
        ),
        (DetachedAttention, r"pose \d of \d, column \d", ""),
    ],
)
def test_wrong_weights_are_named_by_pose_and_column(combination, place, cause):
    record = only("C1", combination(), level="gate")
    assert record.status == "fail"
    assert re.search(place, record.reason)
    assert re.search(cause, record.cause)


def test_of_many_columns_the_wrong_one_is_found_by_halving():
    record = only("C1", ManyColumns(), level="gate")
    assert re.search(r"pose \d of \d, column 37,", record.reason)
    assert "your backward" in record.reason


class _WrongRow(torch.autograd.Function):
    """y W, with a wrong entry in the derivative by y, or by W."""

    @staticmethod
    def forward(ctx, y, w, wrong):
        ctx.save_for_backward(y, w)
        ctx.wrong = wrong
        return y @ w

    @staticmethod
    def backward(ctx, grad_output):
        y, w = ctx.saved_tensors
        off = w.clone()
        by_w = y.T @ grad_output
        if ctx.wrong == "y":
            off[37, 2] *= 1.01
        else:
            by_w[37, 2] *= 1.01
        return grad_output @ off.T, by_w, None


class ManyColumns(Combination):
    pose_columns = 48
    wrong = "y"

    def __init__(self):
        super().__init__()
        self.w = seeded(lambda: nn.Parameter(torch.randn(48, 5) / 7))

    def combine(self, predictions):
        return torch.tanh(_WrongRow.apply(predictions, self.w, self.wrong)).sum(0)


def test_of_many_entries_of_a_parameter_the_wrong_one_is_found_by_halving():
    record = only("C3", type("Wrong", (ManyColumns,), {"wrong": "w"})(), level="gate")
    assert "'w', entry [37, 2] of shape (48, 5)" in record.reason


class _Turned(torch.autograd.Function):
    """y W, with the transpose of the Jacobian as its derivative."""

    @staticmethod
    def forward(ctx, y, w):
        ctx.save_for_backward(w)
        return y @ w

    @staticmethod
    def backward(ctx, grad_output):
        (w,) = ctx.saved_tensors
        return grad_output @ w, None


class TransposedJacobian(Combination):
    pose_columns = 3

    def combine(self, predictions):
        w = predictions.new_tensor([[1.0, 2.0, 0.5], [-1.0, 0.3, 0.7], [0.2, -0.4, 1.5]])
        return _Turned.apply(predictions, w).mean(0)


def test_a_transposed_jacobian_is_named():
    record = only("C1", TransposedJacobian(), level="gate")
    assert record.status == "fail"
    assert "the Jacobian is transposed" in record.cause


class SumOverColumns(Combination):
    pose_columns = 4

    def combine(self, predictions):
        return predictions.mean(1)


class KeepsTheDimension(Combination):
    pose_columns = 4

    def combine(self, predictions):
        return predictions.mean(0, keepdim=True)


@pytest.mark.parametrize(
    ("combination", "words"),
    [
        (SumOverColumns, r"found \(1,\) for 1 pose\(s\), \(2,\) for 2 pose\(s\)"),
        (KeepsTheDimension, r"or a vector, shape \(n_results,\); found \(1, 4\)"),
    ],
)
def test_a_value_of_a_wrong_shape_is_refused(combination, words):
    record = only("A2", combination(), level="gate")
    assert re.search(words, record.reason)
    assert "dim=0" in record.cause


class ConfidenceOverColumns(Confidence):
    pose_weights = Combination.pose_weights

    def combine(self, predictions):
        return (torch.softmax(predictions, dim=1)[:, 1] * predictions[:, 0]).sum()


class ConfidenceOfOtherPose(Confidence):
    pose_weights = Combination.pose_weights

    def combine(self, predictions):
        return torch.softmax(predictions[:, 1].roll(1), 0) @ predictions[:, 0]


class HidesNan(Combination):
    pose_columns = 3

    def combine(self, predictions):
        return predictions.nan_to_num().mean(0)


class OtherReference(MaxPooling):
    def reference(self, predictions):
        return super().reference(predictions).flip(0)


class ReferenceOfOneNumber(MaxPooling):
    def reference(self, predictions):
        return predictions.amax()


class OneNumberIsNotIdempotent(Confidence):
    properties = frozenset({"idempotent"})


@pytest.mark.parametrize(
    ("combination", "check", "words"),
    [
        (ConfidenceOverColumns, "D1", "reference"),
        (ConfidenceOverColumns, "D2", "replication_invariant"),
        (ConfidenceOfOtherPose, "D1", "reference"),
        (ConfidenceOfOtherPose, "D2", "permutation_invariant"),
        (HidesNan, "D3", "pose 0 of 3, column 0 is NaN: expected the value NaN"),
        (OtherReference, "D1", "entry 0 of 2"),
        (ReferenceOfOneNumber, "D1", r"shape of the value, \(2,\); found \(\)"),
        (OneNumberIsNotIdempotent, "D2", r"shape \(2,\); found a value of shape \(\)"),
        (Undeclared, "C1", r"pose \d of \d, column \d"),
    ],
)
def test_a_wrong_value_is_caught_by_its_check(combination, check, words):
    record = only(check, combination())
    assert record.status == "fail"
    assert re.search(words, record.reason)


class Buggy(Combination):
    """Right for two columns, the number that is probed first; wrong for more."""

    pose_columns = "any"

    def combine(self, predictions):
        left, right = predictions[:, :2], predictions[:, 2:].detach()
        return left.sum() + right.square().sum()


def test_a_rule_for_any_number_of_columns_is_checked_with_several():
    assert only("C1", Buggy(), level="gate").status == "pass"
    record = only("C1", Buggy())
    assert "wrong for 5 column(s)" in record.cause


def test_the_checks_use_the_number_of_columns_of_the_instance():
    seen = set()

    class Seen(GatedAttention):
        def combine(self, predictions):
            seen.add(predictions.shape[-1])
            return super().combine(predictions)

    assert check_combination(Seen(7), level="gate").passed
    assert seen == {7}


def test_the_report_shows_the_columns():
    report = check_combination(Confidence(), only=["A2"])
    assert report.facts["pose_columns"] == ("affinity", "confidence")
    assert report.to_json()["facts"]["pose_columns"] == ["affinity", "confidence"]


def test_the_factors_of_a_projection_are_never_zero():
    for seed in range(20):
        assert {abs(factor) for factor in factors(9, seed)} <= {0.5, 1.0}


def test_a_subject_returns_one_number_and_knows_the_vector():
    subject = Subject(MaxPooling(), 0)
    y = torch.tensor([[1.0, 5.0], [3.0, 2.0]], dtype=torch.float64)
    poses = Poses(y)
    vector = torch.tensor([3.0, 5.0], dtype=torch.float64)
    by = torch.tensor(subject.factors, dtype=torch.float64)
    assert torch.equal(subject.value(poses), vector @ by)
    assert torch.equal(subject.result(poses), vector)
    one = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    assert torch.equal(subject.weights(poses), one * by)
    with as_written(subject.combination):
        assert type(subject.combination) is MaxPooling
    assert torch.equal(subject.values(poses.row()[None])[0], subject.value(poses))
