import gc
import importlib
import subprocess
import sys
import weakref

import pytest
import torch
from installed import GOOD, write_distribution

from mtenn_core import Combination, PluginRecord, Registry
from mtenn_core.errors import (
    CombinationConflictError,
    CombinationNotFoundError,
    GradientValidationError,
    PluginSpecError,
    PluginWarning,
    RegistryError,
)


class Mean(Combination):
    def combine(self, predictions):
        return predictions.mean()


class Scaled(Combination):
    def __init__(self, factor, offsets=()):
        super().__init__()
        self.factor = factor

    def combine(self, predictions):
        return self.factor * predictions.mean()

    def pose_weights(self, predictions):
        return torch.full_like(predictions, abs(self.factor) / len(predictions))


@pytest.fixture
def registry():
    """A registry that shares nothing with the default one."""
    return Registry()


def test_names_come_from_entry_points_and_import_nothing(registry, install_plugin):
    install_plugin("demo-good", {"zz-good": "demo_good:Good", "aa-bad": "nowhere:X"}, GOOD)
    assert [name for name in registry.names() if "-" in name] == ["aa-bad", "zz-good"]
    assert "demo_good" not in sys.modules
    assert "zz-good" in registry
    assert "zz-other" not in registry
    assert len(registry) == len(list(registry)) == len(registry.names())
    assert "zz-good" in repr(registry)


def test_info_says_where_a_plugin_is_and_imports_nothing(registry, install_plugin, tmp_path):
    install_plugin("demo-good", {"good": "demo_good:Good"}, GOOD, requires="mtenn-core>=0.1")
    record = registry.info("good")
    assert record == PluginRecord(
        name="good",
        target="demo_good:Good",
        distribution="demo-good",
        version="1.0",
        location=str(tmp_path),
        metadata=str(tmp_path / "demo_good-1.0.dist-info"),
        requires=("mtenn-core>=0.1",),
    )
    assert record.requires_core == ">=0.1"
    assert str(record) == "plugin 'good' (demo-good 1.0)"
    assert "demo_good" not in sys.modules


@pytest.mark.parametrize("name", ["My-Rule", "my_rule", "MY.RULE", "demo-good:my-rule"])
def test_names_compare_as_pep_503_names(registry, install_plugin, name):
    install_plugin("demo-good", {"my-rule": "demo_good:Good"}, GOOD)
    assert name in registry
    assert registry.get(name).__name__ == "Good"


def test_a_class_is_a_plugin(registry, install_plugin):
    install_plugin("demo-good", {"good": "demo_good:Good"}, GOOD)
    combination = registry.create("good")
    assert combination.combine(torch.tensor([1.0, 3.0])) == 2


def test_a_module_with_a_hook_is_a_plugin(registry, install_plugin):
    module = (
        GOOD
        + """
    from mtenn_core import hookimpl

    @hookimpl
    def mtenn_combination():
        return Good
"""
    )
    install_plugin("demo-module", {"a": "demo_module", "b": "demo_module"}, module)
    assert registry.get("a") is registry.get("b")


def test_unknown_names_suggest_the_closest(registry, install_plugin):
    install_plugin("demo-good", {"quantile": "demo_good:Good"}, GOOD)
    with pytest.raises(CombinationNotFoundError, match=r"unknown combination 'qauntile'; inst"):
        registry.get("qauntile")
    with pytest.raises(LookupError, match=r"Did you mean 'quantile'\?"):
        registry.create("Quantiles")


def test_nothing_installed_says_so():
    with pytest.raises(CombinationNotFoundError, match=r"no plugin is installed in .*no\.such"):
        Registry("no.such.group").get("max")


def test_a_plugin_that_is_installed_while_the_process_runs_is_found(registry, install_plugin):
    assert "late" not in registry
    install_plugin("demo-late", {"late": "demo_late:Good"}, GOOD)
    assert "late" in registry
    assert registry.get("late").__name__ == "Good"


def test_of_two_versions_in_one_folder_the_newer_counts(places):
    for version, target in (("1.0", "demo_twice:Old"), ("2.0", "demo_twice:Good")):
        write_distribution(places.site, "demo-twice", {"twice": target}, version=version)
    record = Registry().info("twice")
    assert (record.version, record.target) == ("2.0", "demo_twice:Good")


def test_an_upgrade_while_the_process_runs_wants_a_restart(registry, places):
    assert registry.get("healthy")
    info = places.site / "demo_healthy-1.0.dist-info"
    (info / "METADATA").write_text("Name: demo-healthy\nVersion: 2.0\n")
    registry.refresh()
    with pytest.warns(PluginWarning, match=r"2\.0.*already imported demo-healthy 1\.0.*Restart"):
        registry.get("healthy")


def test_the_path_is_scanned_once(registry, monkeypatch):
    module = importlib.import_module("mtenn_core._registry.lookup")
    scans, nothing = [], module.Scan(module.path_key(), (), ())
    monkeypatch.setattr(module, "scan", lambda group: scans.append(group) or nothing)
    for _ in range(3):
        registry.names()
        assert "other" not in registry
        with pytest.raises(CombinationNotFoundError):
            registry.get("other")
    assert scans == ["mtenn.combinations"]


def test_registered_combinations_are_found_and_validated(registry):
    registry.register("my-mean", Mean)
    assert registry.get("My_Mean") is Mean
    assert str(registry.info("my-mean")) == "plugin 'my-mean' (registered here)"
    with pytest.raises(CombinationConflictError, match="the name belongs to plugin 'my-mean'"):
        registry.register("my.mean", Mean)
    registry.unregister("my-mean")
    assert "my-mean" not in registry
    with pytest.raises(CombinationNotFoundError, match="was not registered in this process"):
        registry.unregister("my-mean")


@pytest.mark.parametrize("wrong", [object, Mean(), "mean", None])
def test_only_combination_classes_can_be_registered(registry, wrong):
    with pytest.raises(PluginSpecError):
        registry.register("wrong", wrong)
    assert "wrong" not in registry


def test_temporary_combinations_replace_and_go(registry, install_plugin):
    install_plugin("demo-good", {"good": "demo_good:Good"}, GOOD)
    installed = registry.get("good")
    with registry.temporary({"good": Mean, "new": Mean}):
        assert registry.get("good") is registry.get("new") is Mean
        other = type("Mean", (Mean,), {})  # of the same name
        with registry.temporary({"new": other}):
            assert registry.get("new") is other
        assert registry.get("new") is Mean
    assert registry.get("good") is installed
    assert "new" not in registry


def test_temporary_combinations_go_where_the_block_raises(registry):
    with pytest.raises(ZeroDivisionError), registry.temporary({"new": Mean}):
        raise ZeroDivisionError
    assert "new" not in registry


def test_create_validates_with_its_arguments(registry):
    with registry.temporary({"scaled": Scaled}):
        assert registry.create("scaled", 2.0).factor == 2.0
        with pytest.raises(GradientValidationError, match="your backward") as caught:
            registry.create("scaled", factor=-1.0)
        assert [record.id for record in caught.value.report.failures] == ["C1"]
        assert registry.create("scaled", -1.0, validate=False).factor == -1.0


def test_a_combination_that_failed_is_refused_each_time(registry):
    with registry.temporary({"scaled": Scaled}):
        for _ in range(2):
            with pytest.raises(GradientValidationError):
                registry.create("scaled", factor=-1.0)


def test_get_needs_examples_for_required_arguments(registry):
    with (
        registry.temporary({"scaled": Scaled}),
        pytest.raises(PluginSpecError, match=r"`examples` of Scaled .* found \{\}.*examples = \("),
    ):
        registry.get("scaled")


def test_get_validates_every_example(registry):
    class Declared(Scaled):
        examples = ({"factor": 1.0}, {"factor": -1.0})

    with registry.temporary({"scaled": Declared}):
        with pytest.raises(GradientValidationError):
            registry.get("scaled")
        assert registry.get("scaled", validate=False) is Declared


def test_errors_of_the_combination_itself_pass_through(registry):
    with registry.temporary({"scaled": Scaled}), pytest.raises(TypeError, match="factor"):
        registry.create("scaled")


def test_a_combination_is_validated_once_per_class_and_arguments(registry, monkeypatch):
    import mtenn_core.testing as testing

    calls, run = [], testing.check_combination
    monkeypatch.setattr(
        testing, "check_combination", lambda *a, **kw: calls.append(a) or run(*a, **kw)
    )
    with registry.temporary({"scaled": Scaled}):
        for arguments in [(1.0,), (1.0,), (True,), (2.0,)]:
            registry.create("scaled", *arguments)
        assert len(calls) == 3  # True == 1.0, and is another argument all the same
        for _ in range(2):  # a list has no hash
            registry.create("scaled", 1.0, offsets=[1])
        assert len(calls) == 5


def test_validation_leaves_no_trace(registry):
    class Random(Combination):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(()))
            self.register_buffer("calls", torch.zeros(()))

        def combine(self, predictions):
            self.calls += 1
            return self.weight * predictions.mean()

    registry.register("random", Random)
    torch.manual_seed(1)
    expected = torch.randn(2)
    torch.manual_seed(1)
    combination = registry.create("random")
    assert combination.weight == expected[0]
    assert torch.randn(()) == expected[1]
    assert combination.calls == 0
    assert combination.weight.dtype == torch.float32
    assert combination.weight.grad is None


def test_get_leaves_the_random_state_alone(registry):
    class Random(Mean):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(()))

    registry.register("random", Random)
    before = torch.get_rng_state()
    registry.get("random")
    assert torch.equal(torch.get_rng_state(), before)


LIGHT = {
    "import": "import mtenn_core",
    "names": "from mtenn_core import registry; registry.names(); registry.info('good')",
    "looks": "from mtenn_core import registry as r; 'x' in r, len(r), list(r), r.records()",
    "problems": "from mtenn_core import registry; registry.problems(); registry.refresh()",
    "list": "from mtenn_core._cli import main; main(['list'], standalone_mode=False)",
    "info": (
        "from mtenn_core._cli import main\n"
        "main(['info', 'good', '--no-import'], standalone_mode=False)"
    ),
}


@pytest.mark.parametrize("code", LIGHT.values(), ids=LIGHT)
def test_listing_leaves_torch_unimported(install_plugin, tmp_path, code):
    install_plugin("demo-good", {"good": "demo_good:Good"}, GOOD)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{code}\n"
        "assert 'torch' not in sys.modules and 'demo_good' not in sys.modules, sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_importing_the_core_leaves_the_metadata_finder_alone():
    code = "import sys, mtenn_core; assert 'importlib_metadata' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("requires", "specifier"),
    [
        ("mtenn-core<0.1; python_version<'3'", ""),
        ("mtenn-core<0.1; extra=='old'", ""),
        ("mtenn-core>=0.1\nRequires-Dist: Mtenn_Core<1", "<1,>=0.1"),
        ("mtenn-core[all]>=0.1", ">=0.1"),
    ],
)
def test_requirements_count_where_they_apply(registry, install_plugin, requires, specifier):
    install_plugin("demo-good", {"good": "demo_good:Good"}, GOOD, requires=requires)
    assert registry.info("good").requires_core == specifier
    assert registry.get("good").__name__ == "Good"


@pytest.mark.parametrize("examples", [(), {}, {"factor": 2.0}, "factor", None, (1.0,)])
def test_examples_that_are_none_are_no_validation(registry, examples):
    wrong = type("Wrong", (Mean,), {"examples": examples})
    with (
        registry.temporary({"wrong": wrong}),
        pytest.raises(
            PluginSpecError, match=r"Wrong\.examples must be a tuple of at least one dict"
        ),
    ):
        registry.get("wrong")


def test_an_argument_that_may_change_is_validated_each_time(registry):
    factor = torch.tensor(2.0)
    with registry.temporary({"scaled": Scaled}):
        registry.create("scaled", factor)
        factor.neg_()
        with pytest.raises(GradientValidationError):
            registry.create("scaled", factor)


def test_a_combination_that_exits_is_refused(registry):
    class Exits(Mean):
        def combine(self, predictions):
            sys.exit(0)

    with (
        registry.temporary({"exits": Exits}),
        pytest.raises(GradientValidationError, match="SystemExit: 0"),
    ):
        registry.get("exits")


def exits(*args, **kwargs):
    sys.exit(0)


class MeanExample(type(Mean)):
    examples = property(exits)


EXITS = {
    "domain": {"domain": property(exits)},
    "min_poses": {"min_poses": property(exits)},
    "stochastic": {"stochastic": property(exits)},
    "deepcopy": {"__deepcopy__": exits},
    "constructor": {"__init__": exits},
}


@pytest.mark.parametrize("attributes", EXITS.values(), ids=EXITS)
@pytest.mark.parametrize("method", ["get", "create"])
def test_a_plugin_that_exits_does_not_end_the_program(registry, attributes, method):
    combination = type("Exits", (Mean,), attributes)
    with (
        registry.temporary({"exits": combination}),
        pytest.raises(RegistryError, match=r"plugin 'exits'[\s\S]*SystemExit: 0") as caught,
    ):
        getattr(registry, method)("exits")
    assert caught.value.record.name == "exits"


def test_examples_that_exit_do_not_end_the_program(registry):
    combination = MeanExample("Exits", (Mean,), {})
    with (
        registry.temporary({"exits": combination}),
        pytest.raises(PluginSpecError, match=r"'exits'.* Exits\.examples failed with SystemExit"),
    ):
        registry.get("exits")


def test_an_interrupt_during_a_check_passes_through(registry):
    def interrupt(combination):
        raise KeyboardInterrupt

    combination = type("Interrupted", (Mean,), {"domain": property(interrupt)})
    with registry.temporary({"interrupted": combination}), pytest.raises(KeyboardInterrupt):
        registry.create("interrupted")


def test_an_error_of_the_constructor_is_the_callers(registry):
    with registry.temporary({"scaled": Scaled}), pytest.raises(TypeError, match="factor"):
        registry.create("scaled")


def test_a_qualified_name_is_the_installed_one_whatever_hides_it(registry, install_plugin):
    install_plugin("demo-good", {"good": "demo_good:Good"}, GOOD)
    with registry.temporary({"good": Mean}):
        assert registry.get("good") is Mean
        assert registry.get("demo-good:good").__name__ == "Good"


@pytest.mark.parametrize("name", ["a:b", "", " x ", "-a", "ä"])
def test_only_names_can_be_registered(registry, name):
    with pytest.raises(PluginSpecError, match="a name must contain only letters and digits"):
        registry.register(name, Mean)


def test_two_spellings_of_one_name_conflict(registry):
    with (
        pytest.raises(CombinationConflictError, match="a-b, a_b"),
        registry.temporary({"a-b": Mean, "a_b": Scaled}),
    ):
        pass


def test_contexts_may_end_in_any_order(registry):
    first, second = registry.temporary({"a": Mean}), registry.temporary({"b": Mean})
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert "a" not in registry
    assert "b" in registry
    second.__exit__(None, None, None)
    assert "b" not in registry


def test_one_name_may_be_replaced_twice(registry):
    other = type("Other", (Mean,), {})
    with registry.temporary({"new": Mean}):
        with registry.temporary({"new": other}):
            assert registry.get("new") is other
        assert registry.get("new") is Mean
    assert "new" not in registry


def test_temporary_combinations_are_forgotten(registry):
    dies = type("Dies", (Mean,), {})
    with registry.temporary({"dies": dies}):
        registry.get("dies")
    alive = weakref.ref(dies)
    del dies
    gc.collect()
    assert alive() is None


def test_a_name_is_a_string(registry):
    with pytest.raises(TypeError, match="expected the name of a combination; found None"):
        registry.get(None)
