"""Pose inputs of a declared kind: the probes respect it, and derivatives are checked (C4)."""

import re
from functools import partial
from pathlib import Path
from typing import ClassVar

import bank
import pytest
from bank import make_right
from bank.bases import smooth_max, soft_weights
from bank.right import (
    ConstantScore,
    DeclaredRanks,
    Degeneracies,
    Microstates,
    PositiveWeights,
    ScoreWeightedFullDepth,
    TableAndStrain,
)
from bank.wrong import InputDetached, InputOfAnotherPose, NoneForInput
from click.testing import CliRunner

from mtenn_core import Combination
from mtenn_core._cli import main
from mtenn_core.combination import InputKind, as_mtenn_combination
from mtenn_core.errors import CombinationContractError
from mtenn_core.testing import check_combination
from mtenn_core.testing._probe.subject import Subject


def with_inputs(base, pose_inputs):
    return type("With", (base,), {"pose_inputs": pose_inputs})


def test_an_unknown_kind_is_refused_with_the_kinds_there_are():
    odd = with_inputs(Degeneracies, {"degeneracy": "positiv"})
    message = (
        r"With\.pose_inputs\['degeneracy'\] must be the kind of the input, one of 'real',"
        r" 'positive', 'label'; found 'positiv'\. Did you mean 'positive'\?"
    )
    with pytest.raises(CombinationContractError, match=message):
        check_combination(odd)


@pytest.mark.parametrize(("found", "meant"), [("integer", "label"), ("Real", "real")])
def test_another_word_for_a_kind_is_recognized(found, meant):
    with pytest.raises(CombinationContractError, match=rf"Did you mean '{meant}'"):
        check_combination(with_inputs(Degeneracies, {"degeneracy": found}))


@pytest.mark.parametrize("found", [None, 3, "xyzzy"])
def test_a_kind_like_no_other_is_refused_without_a_guess(found):
    with pytest.raises(CombinationContractError, match=rf"found {re.escape(repr(found))}$"):
        check_combination(with_inputs(Degeneracies, {"degeneracy": found}))


@pytest.mark.parametrize("found", [{"a score": "real"}, {1: "real"}])
def test_names_must_be_names(found):
    with pytest.raises(CombinationContractError, match="or a dict from names to kinds"):
        check_combination(with_inputs(Degeneracies, found))


def test_the_report_shows_the_kinds():
    report = check_combination(TableAndStrain(), only=["A2"])
    assert report.facts["pose_inputs"] == {"kind": "label", "strain": "real"}
    assert report.to_json()["facts"]["pose_inputs"] == {"kind": "label", "strain": "real"}


def test_the_command_shows_the_kinds():
    target = f"{Path(bank.__file__).parent / 'right.py'}:TableAndStrain"
    shown = CliRunner().invoke(main, ["check", target, "--only", "A2"]).stdout
    assert "pose_inputs=(kind: label, strain: real)" in shown


def test_messages_show_names_and_no_kinds():
    names = r"pose_inputs \('kind', 'strain'\)"
    with pytest.raises(ValueError, match=names):
        as_mtenn_combination(TableAndStrain())
    wrong = with_inputs(TableAndStrain, {"strain": "real"})
    (record,) = check_combination(wrong(), only=["A2"]).failures
    assert "pose_inputs = ('strain',): combine must take" in record.reason


class Watched(Combination):
    """Notes the numbers that it gets, one compound after the other: vmap refuses tolist()."""

    pose_inputs: ClassVar[dict[str, InputKind]] = {"g": "positive", "q": "label", "s": "real"}
    properties = frozenset({"permutation_invariant"})

    def combine(self, predictions, g, q, s):
        for name, numbers in (("g", g), ("q", q), ("s", s)):
            SEEN.setdefault(name, set()).update(numbers.tolist())
        return smooth_max(predictions + g.log() - 0.3 * q + s, 1.0)

    def pose_weights(self, predictions, g, q, s):
        return soft_weights(predictions + g.log() - 0.3 * q + s, 1.0)


SEEN: dict[str, set[float]] = {}


def test_probes_respect_the_kinds():
    SEEN.clear()
    report = check_combination(Watched, only=["A2", "B1", "C1", "C2", "C4", "D3", "D4", "D5"])
    assert report.passed, str(report)
    assert min(SEEN["g"]) > 0
    assert SEEN["q"] == {0.0, 1.0, 2.0}
    assert min(SEEN["s"]) < 0 < max(SEEN["s"])
    for name in ("g", "s"):
        assert min(map(abs, SEEN[name] - {0.0})) < 1e-2
        assert max(map(abs, SEEN[name])) > 10


@pytest.mark.parametrize("spread", [1e-3, 1.0, 1e4])
def test_steps_of_positive_inputs_keep_them_above_0(spread):
    probes = Subject(PositiveWeights(), 0).probes
    for n_poses in (1, 3, 33):
        numbers = probes.poses(n_poses, 0.0, spread).inputs["weight"]
        assert 0 < probes.first_step_of_input("weight", numbers) <= float(numbers.min()) / 2


def test_a_declared_label_needs_no_search():
    calls = []

    class Counted(Microstates):
        def combine(self, predictions, charge):
            calls.append(charge)
            return super().combine(predictions, charge)

    probes = Subject(Counted(), 0).probes
    assert probes.labels() == {"charge": (0, 1, 2)}
    assert all((charge == charge.round()).all() for charge in calls)
    assert len(calls) <= 5  # three sizes, and finite values for several and for the fewest poses
    n = len(calls)
    assert Subject(with_inputs(Degeneracies, {"degeneracy": "positive"})(), 0).probes.labels() == {}
    assert len(calls) == n


def test_a_rule_may_refuse_some_of_its_labels():
    assert Subject(DeclaredRanks(), 0).probes.labels() == {"rank": (1, 2, 3)}
    assert Subject(TableAndStrain(), 0).probes.labels() == {"kind": (0, 1)}


def test_a_declared_label_ends_a_false_alarm():
    """Each fraction is a charge state of its own, within which populations mean nothing."""
    undeclared = with_inputs(Microstates, ("charge",))
    (record,) = check_combination(undeclared(), only=["D5"]).failures
    assert "argument 'kT' must change the value" in record.reason
    assert "declare the groups' pose input: 'label'" in record.cause
    assert check_combination(Microstates(), only=["D5"]).passed


# C4: derivatives with respect to pose inputs.


def c4(make, **options):
    (record,) = check_combination(make, only=["C4"], **options).records
    return record


def test_a_detached_input_is_named_with_its_pose_and_the_likely_cause():
    record = c4(InputDetached)
    assert record.status == "fail"
    assert re.match(r"pose input 'score', gradients='graph', pose \d of 3, pred", record.reason)
    assert "your backward      0" in record.reason
    assert "derivative with respect to 'score' is zero or None: combine detaches" in record.cause


def test_the_registry_finds_a_detached_input():
    report = check_combination(InputDetached, level="gate")
    assert [record.id for record in report.failures] == ["C4"]


def test_the_derivative_of_another_pose_is_recognized():
    assert "'score' is that of another pose" in c4(InputOfAnotherPose).cause


@pytest.mark.parametrize("pose_inputs", [("score",), {"score": "real"}, {"score": "positive"}])
def test_a_forward_without_a_derivative_is_found_in_each_form(pose_inputs):
    record = c4(with_inputs(NoneForInput, pose_inputs))
    assert record.status == "fail"
    assert "gradients='stored'" in record.reason
    assert "pass it to `apply`" in record.cause


def test_a_forward_with_a_derivative_passes():
    assert c4(ScoreWeightedFullDepth).status == "pass"


@pytest.mark.parametrize("pose_inputs", [("docking_score",), {"docking_score": "real"}])
def test_an_error_for_a_learned_input_is_allowed(pose_inputs):
    record = c4(with_inputs(ConstantScore, pose_inputs))
    assert record.status == "pass"
    assert record.metrics["refused with a graph"] == ["docking_score"]


@pytest.mark.parametrize(
    "name",
    [
        "label as a pose input: mean of the means of all chains, by scatter",
        "declared label: ranks from 1 on",
    ],
)
def test_labels_have_no_derivative(name):
    record = c4(partial(make_right, name=name))
    assert record.status == "skip"
    assert "labels" in record.reason


def test_a_selection_by_a_score_has_a_derivative_of_0():
    record = c4(partial(make_right, name="pose input: the prediction of the pose that docks best"))
    assert record.status == "pass"
