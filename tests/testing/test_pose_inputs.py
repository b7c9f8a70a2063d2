"""Combinations that take further numbers for each pose, beside its prediction."""

import re

import pytest
import torch
from bank import RIGHT, make_right
from bank.bases import smooth_max, soft_weights
from bank.right import PenaltyAndScore, ScoreWeighted, ScoreWeightedFullDepth
from bank.wrong import (
    FirstInputKept,
    InputNotDeclared,
    InputNotTaken,
    ScoredClosedForm,
    WeightsWithoutInput,
)
from tiers import slow

from mtenn_core import Combination, registry
from mtenn_core.errors import CombinationContractError, GradientValidationError
from mtenn_core.testing import check_combination
from mtenn_core.testing._probe.finite_differences import directional_derivatives
from mtenn_core.testing._probe.subject import Subject

WITH_INPUTS = [right.name for right in RIGHT if right.make().pose_inputs]


def failures(combination, **options):
    report = check_combination(combination, **options)
    return {record.id: record for record in report.failures}


@pytest.mark.parametrize("seed", [2, *slow(3, 4, 5, reason="whole suites")])
@pytest.mark.parametrize("name", WITH_INPUTS)
def test_right_combinations_pass_with_any_pose_inputs(name, seed):
    report = check_combination(make_right(name), level="quality", seed=seed)
    assert report.passed, str(report)
    assert report.curves


@pytest.mark.parametrize("level", ["gate", "quality"])
def test_inputs_come_in_the_shape_and_dtype_of_the_predictions(level):
    class Strict(ScoreWeighted):
        def combine(self, predictions, docking_score):
            assert docking_score.shape == predictions.shape
            assert docking_score.dtype == predictions.dtype
            assert docking_score.device == predictions.device
            return super().combine(predictions, docking_score)

    assert not failures(Strict(), level=level)


def test_a_forward_gets_inputs_in_the_dtype_of_the_predictions():
    class Strict(ScoreWeightedFullDepth):
        def forward(self, pred_list, *step, docking_score):
            if pred_list:  # an empty list is handed over to see whether it is refused
                assert docking_score.shape == (len(pred_list),)
                assert docking_score.dtype == pred_list[0].dtype
            return super().forward(pred_list, *step, docking_score=docking_score)

    assert not failures(Strict(), level="full", only=["A1", "A2", "A11", "A12", "B1", "C1", "D4"])


def test_inputs_are_those_of_the_seed():
    first, again, other = (Subject(ScoreWeighted(), seed).probes.poses(4) for seed in (0, 0, 1))
    assert torch.equal(first.inputs["docking_score"], again.inputs["docking_score"])
    assert not torch.equal(first.inputs["docking_score"], other.inputs["docking_score"])


def test_inputs_differ_from_probe_to_probe_and_spread_as_the_predictions_do():
    subject = Subject(PenaltyAndScore(), 0)
    near, far = subject.probes.poses(50, 7.0, 1e-3), subject.probes.poses(50, 7.0, 100.0)
    assert [*near.inputs] == ["penalty", "docking_score"]
    for name in near.inputs:
        assert 1e-4 < near.inputs[name].std() < 1e-2
        assert 10 < far.inputs[name].std() < 1000
        assert len(near.inputs[name].unique()) == 50
    assert not torch.equal(near.inputs["penalty"], near.inputs["docking_score"])


def test_steps_move_the_predictions_alone():
    seen = []

    def function(rows):
        seen.append(rows)
        return (rows[:, :2] * rows[:, 2:]).sum(dim=1)

    row = torch.tensor([[1.0, 2.0, 3.0, -4.0]], dtype=torch.float64)
    axes = torch.eye(2, dtype=torch.float64)
    fd = directional_derivatives(function, row.expand(2, -1), axes, torch.tensor([0.125, 0.125]))
    torch.testing.assert_close(fd.derivative, row[0, 2:], rtol=1e-9, atol=0)
    (rows,) = seen
    assert (rows[:, 2:] == row[:, 2:]).all()


def test_many_poses_are_combined_in_one_batch():
    calls = []

    class Counted(ScoreWeighted):
        def combine(self, predictions, docking_score):
            calls.append(predictions)
            return super().combine(predictions, docking_score)

    subject = Subject(Counted(), 0)
    points = [subject.probes.poses(3) for _ in range(9)]
    calls.clear()  # those that found out that the input is no label
    found = subject.values(torch.stack([poses.row() for poses in points]))
    assert len(calls) == 4  # the batch, its first and last value again, and once more the first
    expected = torch.stack([subject.value(poses) for poses in points])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_selected_poses_keep_their_inputs():
    poses = Subject(ScoreWeighted(), 0).probes.poses(4)
    turned = poses[[3, 0, 0]]
    for name, numbers in poses.named().items():
        assert turned.named()[name].tolist() == [numbers[3], numbers[0], numbers[0]]


def test_a_failure_shows_the_inputs_beside_the_predictions():
    record = failures(WeightsWithoutInput(), level="gate")["C1"]
    first, *_ = record.reason.splitlines()
    assert "predictions [" in first
    assert "], score [" in first
    assert "do not depend on 'score'" in record.cause


@pytest.mark.parametrize("check", ["D1", "D2", "D3"])
def test_a_wrong_value_is_shown_with_the_inputs(check):
    class Wrong(Combination):
        pose_inputs = ("score",)
        properties = frozenset({"bounded"})

        def combine(self, predictions, score):
            return torch.log(torch.exp(predictions.half() + 1 + score.half()).sum()).to(predictions)

        def reference(self, predictions, score):
            return torch.logsumexp(predictions + score, dim=0)

    assert "], score [" in failures(Wrong(), only=[check])[check].reason


def test_the_report_says_what_was_declared():
    report = check_combination(PenaltyAndScore(), only=["A2"])
    assert report.facts["pose_inputs"] == ("penalty", "docking_score")


@pytest.mark.parametrize(
    ("combination", "words"),
    [
        (
            InputNotDeclared,
            r"pose_inputs = \(\): combine must take \(predictions\);"
            r" found combine\(predictions, score\): missing a required argument: 'score'",
        ),
        (
            InputNotTaken,
            r"pose_inputs = \('score',\): pose_weights must take \(predictions, score\);"
            r" found pose_weights\(predictions\): got an unexpected keyword argument 'score'",
        ),
        (
            type("Twice", (ScoreWeighted,), {"pose_inputs": ("predictions",)}),
            "multiple values for argument 'predictions'",
        ),
        (
            type("NotInForward", (ScoreWeightedFullDepth,), {"pose_inputs": ("score",)}),
            r"forward must take \(pred_list, grad_dict, param_names, \*model_params, score\)",
        ),
    ],
    ids=["not declared", "not taken", "name of the predictions", "not in forward"],
)
def test_a_failure_names_the_wrong_pose_inputs(combination, words):
    record = failures(combination(), level="gate")["A2"]
    assert record.status == "fail"
    assert re.search(words, record.reason)
    assert "pose_inputs must name" in record.cause


@pytest.mark.parametrize("found", ["score", ["score"], ("a score",), (1,)])
def test_pose_inputs_that_are_no_tuple_of_names_are_refused(found):
    odd = type("Odd", (ScoreWeighted,), {"pose_inputs": found})
    with pytest.raises(CombinationContractError, match="pose_inputs must be a tuple of names"):
        check_combination(odd)


def test_a_builtin_function_may_be_combine():
    class Builtin(Combination):
        combine = staticmethod(torch.mean)

    assert not failures(Builtin())


def test_an_argument_may_switch_an_input_on():
    class Switched(Combination):
        examples = ({}, {"scored": True})

        def __init__(self, scored=False):
            super().__init__()
            self.pose_inputs = ("score",) if scored else ()

        def combine(self, predictions, score=None):
            return smooth_max(predictions if score is None else predictions + score, 1.0)

        def pose_weights(self, predictions, score=None):
            return soft_weights(predictions if score is None else predictions + score, 1.0)

    for scored in (False, True):
        assert not failures(Switched(scored), level="quality")


def test_a_failure_names_the_pose_inputs_of_an_earlier_call():
    record = failures(FirstInputKept(), only=["A6"])["A6"]
    assert "after a call with another 'score'" in record.reason


def test_the_registry_validates_before_it_returns_a_combination():
    given = {"scored": ScoredClosedForm, "wrongly-scored": WeightsWithoutInput}
    with registry.temporary(given):
        assert registry.create("scored", t=3.0).pose_inputs == ("score",)
        with pytest.raises(GradientValidationError, match="score"):
            registry.get("wrongly-scored")
