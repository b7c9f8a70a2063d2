import functools
import sys

import pytest

from mtenn_core import Combination
from mtenn_core._registry import registry
from mtenn_core._registry.targets import make_combinations
from mtenn_core.errors import CombinationNotFoundError, TargetError
from mtenn_core.testing._target import Target, parse_argument, target_of

MODULE = """
from mtenn_core import Combination

class Scaled(Combination):
    examples = ({}, {"scale": 2.0})

    def __init__(self, scale=1.0):
        super().__init__()
        if scale < 0:
            raise ValueError("scale is negative")

    def combine(self, predictions):
        return predictions.mean()

class Nothing(Scaled):
    examples = ()

class Listed(Scaled):
    examples = ({}, 3)

def made():
    return Scaled(3.0)

def no_combination():
    return 3

not_callable = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Name of a module in the folder in which the shell is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    (tmp_path / "targets.py").write_text(MODULE)
    yield "targets"
    sys.modules.pop("targets", None)


def shown(target: Target) -> list[str]:
    return [repr(made) for _, _, made in make_combinations(target, registry)]


@pytest.mark.parametrize("path", ["targets:Scaled", "targets.py:Scaled", "./targets.py:Scaled"])
def test_a_class_is_made_with_each_of_its_examples(module, path):
    assert shown(Target(path)) == ["Scaled(scale=1.0)", "Scaled(scale=2.0)"]


def test_arguments_come_instead_of_the_examples(module):
    assert shown(Target("targets:Scaled", {"scale": 5})) == ["Scaled(scale=5)"]


def test_a_function_may_make_the_instance(module):
    assert shown(Target("targets:made")) == ["Scaled(scale=3.0)"]


def test_a_file_in_a_package_is_imported_as_its_module(module, tmp_path):
    package = tmp_path / "folder" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "scaled.py").write_text("from .base import Scaled")
    (package / "base.py").write_text(MODULE)
    ((_, _, made), _) = make_combinations(Target("folder/package/scaled.py:Scaled"), registry)
    assert type(made).__module__ == "package.base"


def test_a_name_of_the_registry_comes_with_its_distribution(install_plugin):
    install_plugin("demo-target", {"targeted": "demo_target:Scaled"}, MODULE)
    first, second = make_combinations(Target("targeted"), registry)
    assert first[0] == "plugin 'targeted' (demo-target 1.0)"
    assert first[1].path == "demo-target:targeted"
    assert repr(second[2]) == "Scaled(scale=2.0)"
    with pytest.raises(TargetError, match=r"'targeted' cannot be called .* scale is negative"):
        shown(Target("targeted", {"scale": -1}))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("targets:Scaaled", "has no attribute 'Scaaled'"),
        ("no_such_module:Scaled", "No module named 'no_such_module'"),
        ("no_such_file.py:Scaled", "there is no file 'no_such_file.py'"),
        ("targets.py", "must name a class or function. Add :Class"),
        ("targets:", "must name a class or function. Add :Class"),
        ("targets:no_combination", "must be a subclass .* it returned 3"),
        ("targets:not_callable", "cannot be called with {}: TypeError"),
        (
            "targets:Nothing",
            r"Nothing\.examples must be a tuple of at least one dict .*; found \(\)\. Write",
        ),
        (
            "targets:Listed",
            r"Listed\.examples must be a tuple of at least one dict .*; found \(\{\}, 3\)\. Write",
        ),
    ],
)
def test_a_target_that_is_not_a_combination_is_an_error(module, path, message):
    with pytest.raises(TargetError, match=message) as caught:
        shown(Target(path))
    assert repr(path) in str(caught.value)


def test_a_name_without_a_colon_is_one_of_the_registry():
    with pytest.raises(CombinationNotFoundError, match="unknown combination 'no-such-name'"):
        shown(Target("no-such-name"))


def test_a_file_whose_name_another_module_has_is_not_taken_for_it(module, tmp_path):
    shown(Target("targets.py:Scaled"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "targets.py").write_text(MODULE.replace("Scaled", "Other"))
    with pytest.raises(TargetError, match=r"the name 'targets' belongs to .*\. Rename the file"):
        shown(Target("other/targets.py:Scaled"))


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("scale=10", "scale", 10),
        ("scale=-1e-3", "scale", -0.001),
        ("normalize=True", "normalize", True),
        ("kind=soft", "kind", "soft"),
        ("kind='10'", "kind", "10"),
        ("kind=", "kind", ""),
        ("kind=a=b", "kind", "a=b"),
        ("range=(0, 1)", "range", (0, 1)),
        ("range={[]: 1}", "range", "{[]: 1}"),
        ("upper=inf", "upper", float("inf")),
        ("lower=-inf", "lower", float("-inf")),
    ],
)
def test_the_value_of_an_argument_is_a_literal_or_else_text(text, name, value):
    assert parse_argument(text) == (name, value)
    assert type(parse_argument(text)[1]) is type(value)
    (again,) = Target("max", {name: value}).argument_texts()
    assert parse_argument(again) == (name, value)


@pytest.mark.parametrize("text", ["scale", "=1", "1=1", "a b=1", ""])
def test_an_argument_is_a_name_and_a_value(text):
    with pytest.raises(ValueError, match="expected name=value"):
        parse_argument(text)


def test_a_command_can_be_copied_into_a_shell():
    target = Target("a folder/file.py:Class", {"kind": "it's", "n": 2})
    assert target.command("--seed", "0") == (
        "mtenn check 'a folder/file.py:Class' --arg 'kind=it'\"'\"'s' --arg n=2 --seed 0"
    )


def test_a_combination_is_named_so_that_it_is_found_again(module):
    ((_, _, made),) = make_combinations(Target("targets:Scaled", {"scale": 5.0}), registry)
    target = target_of(made)
    assert target == Target("targets.py:Scaled", {"scale": 5.0})
    assert shown(target) == [repr(made)]
    assert target_of(functools.partial(type(made), scale=5.0)) == target
    assert target_of(made, "scaled") == Target("scaled", {"scale": 5.0})


def test_a_combination_without_text_form_has_no_target():
    class Local(Combination):
        def __init__(self, function=None):
            super().__init__()

        def combine(self, predictions):
            return predictions.mean()

    assert target_of(Local()) is None
    assert target_of(lambda: Local()) is None
    assert target_of(Local(function=print), "local") is None
    assert target_of(functools.partial(Local, print), "local") is None
    assert target_of(Local(function="print"), "local") == Target("local", {"function": "print"})
