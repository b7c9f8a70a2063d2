"""Advice: what the contract does not promise is shown and counted, and is no failure."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from bank import make_wrong
from bank.bases import FullDepth, Plain
from bank.right import GuideWordForWord, RequiredArgument
from bank.wrong import BrokenPromise, HalfSum, WidensHalf

from mtenn_core import MultiPoseModel, registry
from mtenn_core.testing import Report, check_combination
from mtenn_core.testing._html.page import render

ADVISED = ["D4", "A10", "A11"]


def ids(records):
    return [record.id for record in records]


def only(check, combination, **options):
    (record,) = check_combination(combination, only=[check], **options).records
    return record


@pytest.fixture(scope="module")
def guide():
    return check_combination(GuideWordForWord)


def test_the_class_of_the_guide_passes_with_advice(guide):
    assert guide.passed
    assert guide.failures == []
    assert ids(guide.advice) == ADVISED
    assert ", 3 of them with advice" in guide.verdict
    n_skipped = sum(record.status == "skip" for record in guide.records)
    n_checks = len(guide.records)
    assert guide.verdict.startswith(
        f"passed {n_checks - n_skipped} of {n_checks} checks, 3 of them"
    )


def test_advice_says_the_hazard_and_the_code_that_removes_it(guide):
    precision, second, bad_input = guide.advice
    assert precision.reason.startswith("training in torch.")
    assert "in float64" in precision.reason
    assert "float32" in precision.cause
    assert "gradient penalty" in second.reason
    assert "once_differentiable" in second.cause
    assert "zip stops at the shorter list" in bad_input.reason
    assert "check_gradients(" in bad_input.cause
    for record in guide.advice:
        assert f"    to do: {record.cause}" in str(guide)
        assert record.reason.splitlines()[0] in str(guide)
    assert "likely cause" not in str(guide)


def test_advice_is_a_failure_at_the_level_quality():
    report = check_combination(GuideWordForWord, level="quality", only=ADVISED)
    assert not report.passed
    assert ids(report.failures) == ADVISED
    assert report.advice == []
    for record in report.failures:
        assert record.is_advice
        assert f"    to do: {record.cause}" in str(record)
        assert record.repro.endswith(f" --only {record.id} --seed 0 --level quality")


def test_the_page_of_advice_that_fails_says_what_to_do():
    report = check_combination(GuideWordForWord, level="quality", only=["A11"])
    page = render([report])
    assert "To do:" in page
    assert "Likely cause:" not in page


def test_the_command_of_a_class_that_cannot_be_imported_has_the_level():
    class Local(GuideWordForWord):
        pass

    assert "level='quality'" in only("A10", Local(), level="quality").repro
    assert "level=" not in only("A10", Local()).repro


@pytest.mark.parametrize("level", ["full", "quality"])
def test_advice_may_be_an_expected_failure(level):
    expected = dict.fromkeys(ADVISED, "nobody needs it")
    report = check_combination(
        GuideWordForWord, level=level, only=ADVISED, expected_failures=expected
    )
    assert [record.status for record in report.records] == ["xfail"] * 3
    assert report.passed


def test_a_report_with_failures_counts_advice():
    class Wrong(GuideWordForWord):
        properties = frozenset({"bounded"})

    report = check_combination(Wrong, only=["D2", *ADVISED])
    assert report.verdict == "failed 1 of 4 checks, 3 with advice"


def test_advice_survives_json(guide):
    again = Report.from_json(json.loads(json.dumps(guide.to_json())))
    assert again.passed
    assert ids(again.advice) == ADVISED


# What stays a failure.


class Declares(GuideWordForWord):
    properties = frozenset({"half_precision"})


@pytest.mark.parametrize("combination", [Declares, BrokenPromise, WidensHalf])
def test_half_precision_that_is_promised_and_a_wrong_dtype_are_failures(combination):
    assert only("D4", combination).status == "fail"


def test_half_precision_that_is_not_promised_is_advice():
    assert only("D4", HalfSum).status == "advice"


@pytest.mark.parametrize(("declared", "status"), [((), "advice"), (("half_precision",), "error")])
def test_an_error_in_half_precision_is_advice_unless_it_is_promised(declared, status):
    class Refuses(FullDepth):
        properties = frozenset(declared)

        def forward(self, pred_list, *args):
            if pred_list[0].dtype in (torch.bfloat16, torch.float16):
                raise TypeError("only float32 and float64")
            return super().forward(pred_list, *args)

    record = only("D4", Refuses)
    assert record.status == status
    assert "only float32 and float64" in record.reason


def test_half_precision_can_be_declared():
    class Declared(FullDepth):
        properties = frozenset({"half_precision"})

    report = check_combination(Declared, only=["D2", "D4"])
    assert {record.id: record.status for record in report.records} == {"D2": "skip", "D4": "pass"}
    assert report.records[0].reason == "D4 tests half_precision"


SECOND_DERIVATIVES = [
    "combine by an autograd function whose weights are constants",
    "combine that is once_differentiable: no error for a linear loss",
    "combine detached, with its weights put in under no_grad",
    "second derivative of combine without that of the populations",
]


@pytest.mark.parametrize("name", SECOND_DERIVATIVES)
def test_a_wrong_second_derivative_of_combine_is_a_failure(name):
    record = only("A10", partial(make_wrong, name=name, t=1.0))
    assert record.status == "fail"
    assert "finite difference" in record.reason


def penalty(combination, y):
    """Return the gradient of |∂h/∂θ|² in the mode graph, for a pose model that is θ·x."""
    pose_model = torch.nn.Linear(1, 1, bias=False).double()
    model = MultiPoseModel(pose_model, combination, gradients="graph")
    prediction = model(list(y[:, None])).prediction
    (gradient,) = torch.autograd.grad(prediction, pose_model.weight, create_graph=True)
    (found,) = torch.autograd.grad(gradient.square().sum(), pose_model.weight)
    return found


def test_a_gradient_penalty_in_graph_is_what_the_check_judges():
    """The mistake is silent for a user, too: half of the Hessian of combine."""
    y = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)
    torch.manual_seed(0)
    right = penalty(RequiredArgument(kT=0.593), y)
    torch.manual_seed(0)
    wrong = penalty(make_wrong(SECOND_DERIVATIVES[-1], 1 / 0.593), y)
    assert (wrong - right).abs() > 0.1 * right.abs()


def test_a_class_without_combine_has_no_second_derivative_to_check():
    assert "comparisons" not in only("A10", FullDepth).metrics


@pytest.mark.parametrize(("combination", "n"), [(Plain, 17), (GuideWordForWord, None)])
def test_the_second_derivative_is_compared_for_every_probe(combination, n):
    assert only("A10", combination).metrics.get("comparisons") == n


# Where it is shown.


def test_the_page_shows_advice_in_a_group_of_its_own(guide):
    page = render([replace(guide, curves={})])
    assert "Passed with advice: 3" in page
    assert page.count("<strong>To do:</strong>") == 3
    assert '<span class="status advice">→ advice</span>' in page
    assert "Likely cause" not in page


def test_the_overview_of_a_page_names_the_checks_with_advice(guide):
    plain = replace(guide, curves={})
    assert f"<small>{', '.join(ADVISED)}</small>" in render([plain, plain])


def test_the_registry_returns_a_class_with_advice():
    with registry.temporary({"guide": GuideWordForWord}) as temporary:
        assert temporary.get("guide") is GuideWordForWord
        assert isinstance(temporary.create("guide"), GuideWordForWord)
