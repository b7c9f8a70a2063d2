"""The messages at the places where people stumble have the words that help."""

import json
import re
import sys
import warnings

import pytest
import torch
from click.testing import CliRunner
from installed import write_distribution

from mtenn_core import Combination, MultiPoseModel, as_mtenn_combination, registry
from mtenn_core._cli.commands import main
from mtenn_core._engine import evaluation
from mtenn_core.errors import (
    CombinationContractError,
    CombinationNotFoundError,
    DirectionWarning,
    PredictionError,
)
from mtenn_core.testing import check_combination
from mtenn_core.uncertainty import jackknife_error


class Softmin(Combination):
    def __init__(self, kT=1.0, *, normalize=False):
        super().__init__()
        self.kT, self.normalize = kT, normalize

    def combine(self, predictions):
        return -self.kT * torch.logsumexp(-predictions / self.kT, dim=0)


class Mean(Combination):
    def combine(self, predictions):
        return predictions.mean()


class Scaled(Combination):
    examples = ({"factor": 2.0},)

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def combine(self, predictions):
        return self.factor * predictions.mean()


@pytest.fixture
def linear():
    return torch.nn.Linear(8, 1)


# Arguments of a combination ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Softmin(kt=1), r"^Softmin got an .* argument 'kt'\. Did you mean 'kT'\? Its"),
        (lambda: Softmin(KT=1), "Did you mean 'kT'"),
        (lambda: Softmin(normalise=True), "Did you mean 'normalize'"),
        (lambda: Softmin(1.0, x=2), r"'x'\. Its arguments are: kT=1\.0, \*?.*normalize=False$"),
        (lambda: Scaled(factr=2), r"Did you mean 'factor'\? Its arguments are: factor$"),
        (lambda: Mean(kT=1), r"'kT'\. Its arguments are: none$"),
    ],
    ids=["kt", "KT", "spelling", "list", "required", "none"],
)
def test_an_unknown_argument_of_a_combination_names_the_others(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_the_registry_names_the_arguments_of_a_combination():
    wrong = pytest.raises(TypeError, match=r"'kt'\. Did you mean 'kT'\? .*kT=1\.0")
    with registry.temporary({"softmin": Softmin}), wrong:
        registry.create("softmin", kt=1)


def test_mtenn_check_names_the_arguments_of_a_combination(tmp_path, monkeypatch):
    (tmp_path / "softmin_of_a_file.py").write_text(
        "import mtenn_core\n\n\n"
        "class Softmin(mtenn_core.Combination):\n"
        "    def __init__(self, kT=1.0):\n"
        "        super().__init__()\n\n"
        "    def combine(self, predictions):\n"
        "        return predictions.mean()\n"
    )
    monkeypatch.setattr("sys.path", sys.path.copy())
    target = str(tmp_path / "softmin_of_a_file.py:Softmin")
    result = CliRunner().invoke(main, ["check", target, "--arg", "kt=1"])
    assert result.exit_code == 1
    assert "'kt'. Did you mean 'kT'? Its arguments are: kT=1.0" in result.stderr


def test_any_keyword_may_be_an_argument():
    class Anything(Mean):
        def __init__(self, **options):
            super().__init__()
            self.options = options

    assert Anything(kt=1).options == {"kt": 1}


@pytest.mark.parametrize(
    ("combination", "advice"),
    [
        ("softmin", r"registry\.create\('softmin', kT=0\.593\)"),
        (Softmin, r"Softmin\(kT=0\.593\)"),
        (Softmin(), r"Softmin\(kT=0\.593\)"),
    ],
    ids=["name", "class", "instance"],
)
def test_arguments_of_a_combination_do_not_belong_to_the_model(linear, combination, advice):
    with pytest.raises(TypeError, match=rf"'kT'\. .*MultiPoseModel\(pose_model, {advice}\)"):
        MultiPoseModel(linear, combination, kT=0.593)


def test_a_misspelt_option_of_the_model_is_not_taken_for_an_argument_of_the_combination(linear):
    with pytest.raises(TypeError, match=r"'gradient'\. Did you mean 'gradients'\?"):
        MultiPoseModel(linear, Softmin(), gradient="stored")


# A class where an instance belongs --------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "instance"), [(Softmin, r"Softmin\(\)"), (Scaled, r"Scaled\(factor=…\)")]
)
@pytest.mark.parametrize(
    "use",
    [
        lambda cls: MultiPoseModel(torch.nn.Linear(8, 1), cls),
        lambda cls: MultiPoseModel(torch.nn.Linear(8, 2), [cls, cls], tasks=2),
        lambda cls: jackknife_error(cls, torch.randn(4)),
        as_mtenn_combination,
    ],
    ids=["model", "tasks", "jackknife_error", "as_mtenn_combination"],
)
def test_a_class_in_the_place_of_an_instance(use, cls, instance):
    with pytest.raises(TypeError, match=rf"Pass an instance: {instance}$"):
        use(cls)


def test_a_class_in_the_place_of_a_name():
    with pytest.raises(
        TypeError, match=r"name of a combination; found .*Softmin.*instance: Softmin\(…\)"
    ):
        registry.create(Softmin)


def test_an_instance_in_the_place_of_a_class():
    with pytest.raises(
        TypeError, match=r"a subclass of Combination; found Softmin.* its class: Softmin$"
    ):
        registry.register("softmin", Softmin())


# One tensor per compound ------------------------------------------------------------------------


@pytest.mark.parametrize("gradients", ["graph", "stored", "recomputed"])
@pytest.mark.parametrize("sizes", [None, [1, 1]])
def test_one_tensor_per_compound_is_told_of_sizes(linear, gradients, sizes):
    model = MultiPoseModel(linear, Mean(), gradients=gradients)
    advice = r"one tensor per compound, pass the poses of all compounds in one list.*sizes=\[5, …\]"
    with pytest.raises(PredictionError, match=advice):
        model([torch.randn(5, 8), torch.randn(3, 8)], sizes)


@pytest.mark.parametrize("collate", [torch.stack, torch.cat])
def test_a_batch_with_one_tensor_per_compound_is_told_of_sizes(linear, collate):
    model = MultiPoseModel(linear, Mean(), collate=collate)
    with pytest.raises(PredictionError, match=r"one tensor per compound.*sizes=\[5, 5, …\]"):
        model([torch.randn(5, 8), torch.randn(5, 8)])


def test_one_tensor_per_compound_is_told_of_sizes_with_tasks():
    model = MultiPoseModel(torch.nn.Linear(8, 2), Mean(), tasks=2)
    with pytest.raises(PredictionError, match=r"one tensor per compound.*sizes=\[5, …\]"):
        model([torch.randn(5, 8), torch.randn(3, 8)])


def test_a_list_of_poses_per_compound_is_told_of_sizes(linear):
    with pytest.raises(TypeError) as caught:
        MultiPoseModel(linear, Mean())([[torch.randn(8)] * 5, [torch.randn(8)] * 3])
    assert any("pass the poses of all compounds in one list" in n for n in caught.value.__notes__)


def test_an_output_of_another_length_is_not_taken_for_a_compound():
    model = MultiPoseModel(torch.nn.Linear(8, 2), Mean())
    with pytest.raises(PredictionError, match=r"found shape \(2,\), torch\.float32$"):
        model([torch.randn(8)] * 5)


# A forgotten super().__init__() -----------------------------------------------------------------


class Forgetful(Softmin):
    def __init__(self, kT=1.0):
        self.kT = kT


class ForgetfulWithParameter(Softmin):
    def __init__(self):
        self.kT = torch.nn.Parameter(torch.ones(()))


class ForgetfulWithModule(Softmin):
    def __init__(self):
        self.net = torch.nn.Linear(1, 1)


class ForgetfulWithBuffer(Softmin):
    def __init__(self):
        self.register_buffer("kT", torch.ones(()))


class Heir(Forgetful):
    pass


@pytest.mark.parametrize(
    "cls", [Forgetful, ForgetfulWithParameter, ForgetfulWithModule, ForgetfulWithBuffer, Heir]
)
@pytest.mark.parametrize("make", [lambda cls: cls(), check_combination], ids=["make", "check"])
def test_a_forgotten_call_of_super_init_is_named(cls, make):
    rule = rf"{cls.__name__}\.__init__ must call super\(\)\.__init__\(\) first"
    with pytest.raises(CombinationContractError, match=rule):
        make(cls)


def test_the_call_of_super_init_may_come_last():
    class Late(Softmin):
        def __init__(self):
            self.early = 2.0
            super().__init__(kT=3.0)

    class Later(Late):
        def __init__(self):
            self.earlier = 1.0
            super().__init__()

    late = Later()
    assert (late.earlier, late.early, late.kT) == (1.0, 2.0, 3.0)


def test_another_attribute_error_of_init_is_its_own():
    class Misspelt(Softmin):
        def __init__(self):
            super().__init__()
            self.kT = self.temperature

    with pytest.raises(AttributeError, match="temperature"):
        Misspelt()


# (values, indices) ------------------------------------------------------------------------------


PAIRS = {
    "min": lambda y: torch.min(y, dim=0),
    "max": lambda y: torch.max(y, dim=0),
    "median": lambda y: torch.median(y, dim=0),
    "nanmedian": lambda y: torch.nanmedian(y, dim=0),
    "topk": lambda y: torch.topk(y, 1),
    "sort": lambda y: torch.sort(y),
    "kthvalue": lambda y: torch.kthvalue(y, 1),
    "mode": lambda y: torch.mode(y),
    "cummax": lambda y: torch.cummax(y, dim=0),
}


def returning(function):
    class Pair(Combination):
        def combine(self, predictions):
            return function(predictions)

    return Pair()


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("sizes", [None, [2, 2]], ids=["one compound", "two compounds"])
def test_a_pair_of_values_and_indices_is_told_of_values(linear, name, sizes):
    model = MultiPoseModel(linear, returning(PAIRS[name]))
    with pytest.raises(CombinationContractError, match=rf"of torch\.{name}\. Take \.values of it"):
        model(torch.randn(4, 8), sizes)


@pytest.mark.parametrize("name", ["min", "topk"])
def test_the_suite_says_to_take_the_values(name):
    (record,) = check_combination(returning(PAIRS[name]), only=["A2"]).failures
    assert "Take .values of it" in record.reason + record.cause


def test_a_pose_model_that_returns_a_pair_is_told_of_values():
    class Best(torch.nn.Module):
        def forward(self, pose):
            return pose.min(dim=0)

    with pytest.raises(PredictionError, match=r"of torch\.min\. Take \.values of it"):
        MultiPoseModel(Best(), Mean())(torch.randn(4, 8))


# pIC50 with a combination that prefers the lowest prediction --------------------------------------


class Largest(Softmin):
    def combine(self, predictions):
        return -super().combine(-predictions)


class Identity(torch.nn.Module):
    def forward(self, pose):
        return pose


PIC50 = [torch.tensor(y) for y in (6.2, 7.9, 5.1)]


@pytest.fixture
def no_hint_was_given(monkeypatch):
    monkeypatch.setattr(evaluation, "_HINTS_GIVEN", set())


def hints(combination, poses, sizes=None, *, training=False, **options):
    """Return the hints of two calls of a model."""
    model = MultiPoseModel(Identity(), combination, **options).train(training)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            model(poses, sizes)
    assert all(each.category is DirectionWarning for each in caught)
    return [str(each.message) for each in caught]


@pytest.mark.parametrize("sizes", [None, [3], [1, 2]])
def test_pic50_with_a_minimum_gives_one_hint_per_process(no_hint_was_given, sizes):
    (hint,) = hints(Softmin(), PIC50, sizes)
    assert re.search(
        r"as pIC50 is, .* higher is better\. But Softmin .* use 'max', or negate", hint
    )
    assert hints(Softmin(), PIC50) == []


@pytest.mark.parametrize(
    ("combination", "poses", "options"),
    [
        (Largest(), PIC50, {}),
        (Mean(), PIC50, {}),
        (Softmin(), [-y for y in PIC50], {}),
        (Softmin(), [*PIC50, torch.tensor(-0.1)], {}),
        (Softmin(), [*PIC50, torch.tensor(12.5)], {}),
        (Softmin(), PIC50[:1], {}),
        (Softmin(), PIC50, {"training": True}),
        (Softmin(), PIC50, {"check_finite": False}),
    ],
    ids=["max", "mean", "ΔG", "one below", "one above", "one pose", "training", "unchecked"],
)
def test_other_predictions_and_combinations_give_no_hint(
    no_hint_was_given, combination, poses, options
):
    assert hints(combination, poses, **options) == []


def test_only_the_first_call_of_a_combination_is_examined(no_hint_was_given):
    combination = Softmin()
    assert hints(combination, [-y for y in PIC50]) == []
    assert hints(combination, PIC50) == []


# What is installed ------------------------------------------------------------------------------


MISSPELT = ["mtenn.combination", "mtenn_combinations", "mtenn.combos", "Mtenn.Combinations"]


@pytest.mark.parametrize("group", MISSPELT)
def test_a_misspelt_group_is_named_by_the_error_and_by_doctor(places, monkeypatch, group):
    monkeypatch.setenv("COLUMNS", "500")
    lines = f"[{group}]\nbest-two = demo_bad:Good\n"
    write_distribution(places.site, "demo-bad", lines)
    registry.refresh()
    told = rf"demo-bad has .* group '{re.escape(group)}', .* Did you mean 'mtenn\.combinations'\?"
    with pytest.raises(CombinationNotFoundError, match=told):
        registry.get("best-two")
    result = CliRunner().invoke(main, ["doctor", "--no-import"])
    assert result.exit_code == 1
    assert re.search(f"misspelt group +{told}", result.stdout), result.stdout


def test_a_misspelt_group_is_named_where_there_is_no_plugin(places, monkeypatch):
    monkeypatch.setattr("sys.path", [str(places.front)])
    write_distribution(places.front, "demo-bad", "[mtenn.combination]\nbest = demo_bad:Good\n")
    registry.refresh()
    with pytest.raises(CombinationNotFoundError, match=r"Did you mean 'mtenn\.combinations'"):
        registry.get("best")


@pytest.mark.parametrize("group", ["console_scripts", "mtenn.models", "pytest11", "mtenn"])
def test_another_group_is_not_taken_for_a_misspelt_one(places, group):
    write_distribution(places.site, "demo-other", f"[{group}]\nx = demo_other:Good\n")
    registry.refresh()
    assert not [problem for problem in registry.problems() if "demo-other" in problem.message]


@pytest.mark.parametrize(
    ("requires", "message"),
    [
        ("absent-package>=2", r"requires absent-package>=2 \(found: none\)\. Run: pip install"),
        ("torch>=99", r"requires torch>=99 \(found: 2\.\S+\)\. Run: pip install 'torch>=99'"),
    ],
    ids=["missing", "too old"],
)
def test_doctor_names_requirements_that_are_not_met(places, requires, message):
    write_distribution(places.site, "demo-bad", {"bad": "demo_bad:Good"}, requires=requires)
    registry.refresh()
    result = CliRunner().invoke(main, ["doctor", "--no-import", "--json"])
    found = [p for p in json.loads(result.stdout)["problems"] if p["kind"] == "requirement"]
    assert len(found) == 1
    assert re.search(rf"^demo-bad 1\.0 {message}", found[0]["message"])
    assert found[0]["plugin"]["name"] == "bad"


@pytest.mark.parametrize(
    "requires", ["torch>=2", "absent; extra == 'x'", "absent; python_version < '3'", "a b c"]
)
def test_doctor_accepts_requirements_that_are_met_or_do_not_apply(places, requires):
    write_distribution(places.site, "demo-fine", {"fine": "demo_fine:Good"}, requires=requires)
    registry.refresh()
    result = CliRunner().invoke(main, ["doctor", "--no-import"])
    assert "demo-fine" not in result.stdout


class CountingCalls(Softmin):
    """Counts its calls, and its value has no graph."""

    def __init__(self):
        super().__init__()
        self.register_buffer("n_calls", torch.zeros(()))

    def combine(self, predictions):
        self.n_calls += 1
        return super().combine(predictions.detach())


def test_a_hint_is_never_an_error_and_does_not_change_the_combination(no_hint_was_given):
    combination = CountingCalls()
    assert hints(combination, PIC50) == []  # its weights cannot be computed
    assert combination.n_calls == 2


def test_a_hint_points_to_the_call_of_the_model(no_hint_was_given):
    model = MultiPoseModel(Identity(), Softmin()).eval()
    with pytest.warns(DirectionWarning) as caught:
        model(PIC50)
    assert caught[0].filename == __file__
