"""What is allowed, disabled, preferred and pinned decides before anything is imported."""

import contextlib
import importlib.util
import json
import sys
import types
import warnings
import zipfile
from pathlib import Path
from textwrap import dedent

import pytest
from installed import GOOD, write_distribution, write_record

from mtenn_core import Policy, Registry
from mtenn_core._registry.class_cache import ClassCache
from mtenn_core._registry.pins import pin
from mtenn_core.errors import (
    CombinationConflictError,
    CombinationDisabledError,
    PluginLoadError,
    PluginPinError,
    PluginWarning,
    RegistryError,
)

LEAVES_A_FILE = f"""
from pathlib import Path

Path(__file__).with_suffix(".imported").touch()
{dedent(GOOD)}
"""
NO_PINS = "demo-other==1.0 RECORD=sha256:" + "0" * 64 + "\n"


@pytest.fixture
def marked(places):
    """A plugin that leaves a file behind when it is imported; return where."""
    write_distribution(
        places.site, "demo-marked", {"marked": "demo_marked:Good"}, LEAVES_A_FILE, record=True
    )
    return places.site / "demo_marked.imported"


@pytest.fixture
def record(marked):
    return Registry().info("marked")


def test_without_a_policy_it_is_imported(marked):
    assert Registry().get("marked").__name__ == "Good"
    assert marked.exists()


FORBIDDEN = {
    "not allowed": ({"MTENN_PLUGINS": "healthy"}, Policy(allowed=("healthy",))),
    "nothing allowed": ({"MTENN_PLUGINS": ""}, Policy(allowed=())),
    "disabled by name": ({"MTENN_DISABLE_PLUGINS": "Marked"}, Policy(disabled=("Marked",))),
    "disabled by distribution": (
        {"MTENN_DISABLE_PLUGINS": "healthy, demo_marked"},
        Policy(disabled=("healthy", "demo_marked")),
    ),
    "disabled by both": (
        {"MTENN_DISABLE_PLUGINS": "demo-marked:marked"},
        Policy(disabled=("demo-marked:marked",)),
    ),
    "disabled and allowed": (
        {"MTENN_DISABLE_PLUGINS": "marked", "MTENN_PLUGINS": "marked"},
        Policy(allowed=("marked",), disabled=("marked",)),
    ),
}


@pytest.mark.parametrize("name", ["marked", "demo-marked:marked"])
@pytest.mark.parametrize("case", FORBIDDEN)
@pytest.mark.parametrize("by", ["environment", "argument"])
def test_a_plugin_that_is_not_allowed_is_not_imported(marked, monkeypatch, case, by, name):
    environment, policy = FORBIDDEN[case]
    registry = Registry()
    if by == "environment":
        for variable, value in environment.items():
            monkeypatch.setenv(variable, value)
    else:
        registry.policy = policy
    assert "marked" not in registry.names()
    assert "marked" not in registry
    source = "MTENN_" if by == "environment" else "the policy's `(allowed|disabled)`"
    with pytest.raises(CombinationDisabledError, match=rf"demo-marked 1\.0.*{source}") as caught:
        registry.get(name)
    assert caught.value.record.status == "disabled"
    with pytest.raises(LookupError):
        registry.create(name)
    assert [r.status for r in registry.records(everything=True) if r.name == "marked"] == [
        "disabled"
    ]
    assert not marked.exists()


@pytest.mark.parametrize("entry", ["marked", "demo-marked", "Demo.Marked:MARKED"])
def test_only_allowed_plugins_are_listed(marked, monkeypatch, entry):
    monkeypatch.setenv("MTENN_PLUGINS", entry)
    assert Registry().names() == ["marked"]
    assert Registry().get("marked").__name__ == "Good"


def test_arguments_beat_the_environment(marked, monkeypatch):
    monkeypatch.setenv("MTENN_PLUGINS", "")
    monkeypatch.setenv("MTENN_DISABLE_PLUGINS", "marked")
    monkeypatch.setenv("MTENN_STRICT", "1")
    registry = Registry(policy=Policy(allowed=("marked",), disabled=(), strict=False))
    assert registry.names() == ["marked"]


def test_the_environment_may_change_while_the_process_runs(marked, monkeypatch):
    registry = Registry()
    assert "marked" in registry
    monkeypatch.setenv("MTENN_DISABLE_PLUGINS", "marked")
    assert "marked" not in registry
    monkeypatch.delenv("MTENN_DISABLE_PLUGINS")
    assert "marked" in registry


@pytest.mark.parametrize("variable", ["MTENN_PLUGINS", "MTENN_DISABLE_PLUGINS"])
def test_an_unknown_entry_warns_and_suggests_the_closest_name(marked, monkeypatch, variable):
    monkeypatch.setenv(variable, "markd healthy" if variable == "MTENN_PLUGINS" else "markd")
    registry = Registry()
    with pytest.warns(PluginWarning, match=rf"{variable}=.*'markd'.*Did you mean 'marked'\?"):
        registry.names()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with registry.temporary({"other": registry.get("healthy")}):
            registry.names()  # once is enough
    assert "unknown setting" in [problem.kind for problem in registry.problems()]


def test_an_entry_may_be_installed_later(places):
    registry = Registry()
    registry.names()
    write_distribution(places.site, "demo-late", {"late": "demo_late:Good"})
    registry.policy = Policy(allowed=("late",))
    assert registry.names() == ["late"]  # without a warning


def test_registered_combinations_are_always_allowed(places):
    registry = Registry()
    good = registry.get("healthy")
    registry.policy = Policy(allowed=())
    registry.register("mine", good)
    assert registry.names() == ["mine"]
    assert registry.get("mine") is good


def test_entries_must_be_a_tuple():
    with pytest.raises(
        TypeError,
        match=r"allowed must be a tuple of entries; found 'max'. Write: allowed=\('max',\)",
    ):
        Policy(allowed="max")


def test_a_preference_settles_a_conflict(places):
    for distribution in ("demo-one", "demo-two"):
        target = f"{distribution.replace('-', '_')}:Good"
        write_distribution(places.site, distribution, {"rule": target}, LEAVES_A_FILE)
    registry = Registry()
    with pytest.raises(CombinationConflictError, match=r"prefer=\('demo-one:rule',\)"):
        registry.get("rule")
    assert not list(places.site.glob("*.imported"))
    for entry in ("demo-two", "demo-two:rule", "Demo_Two:Rule"):
        registry.policy = Policy(prefer=(entry,))
        assert registry.get("rule").__module__ == "demo_two"
        assert registry.problems() == []
    assert registry.get("demo-one:rule").__module__ == "demo_one"
    registry.policy = Policy(disabled=("demo-one",))
    assert registry.get("rule").__module__ == "demo_two"
    registry.policy = Policy(prefer=("demo-three",))
    with pytest.warns(PluginWarning, match="the policy's `prefer` contains 'demo-three'"):
        registry.names()


# Strict ------------------------------------------------------------------------------------------


def malformed(places):
    write_distribution(places.site, "demo-bad", "[mtenn.combinations]\nno equals sign\n")


def incompatible(places):
    write_distribution(places.site, "demo-bad", {"bad": "demo_bad:Good"}, requires="mtenn-core<0.1")


def conflicting(places):
    write_distribution(places.site, "demo-bad", {"healthy": "demo_bad:Good"})


@pytest.mark.parametrize("problem", [malformed, incompatible, conflicting])
def test_strict_stops_at_a_problem_before_any_import(places, marked, monkeypatch, problem):
    problem(places)
    assert Registry().names()
    monkeypatch.setenv("MTENN_STRICT", "1")
    registry = Registry()
    for look in (registry.names, lambda: registry.get("marked"), lambda: "marked" in registry):
        with pytest.raises(
            RegistryError,
            match=r"strict \(MTENN_STRICT\), and plugins have 1 problem(.|\n)*demo-bad",
        ):
            look()
    assert not marked.exists()
    assert registry.problems()  # can be looked at all the same


def test_strict_imports_all_plugins_before_it_returns_one(places, marked, monkeypatch):
    write_distribution(places.site, "demo-bad", {"zz-bad": "demo_bad:Good"}, "1 / 0")
    monkeypatch.setenv("MTENN_STRICT", "1")
    registry = Registry()
    assert "healthy" in registry.names()
    for _ in range(2):
        with pytest.raises(PluginLoadError, match=r"'zz-bad'.*ZeroDivisionError") as caught:
            registry.get("healthy")
        assert "MTENN_STRICT" in caught.value.__notes__[0]
    monkeypatch.setenv("MTENN_DISABLE_PLUGINS", "zz-bad")
    assert registry.get("healthy").__name__ == "Good"
    assert marked.exists()


def test_strict_checks_again_after_a_change_of_policy_or_installation(places):
    write_distribution(places.site, "demo-bad", {"bad": "demo_bad:Good"}, "1 / 0")
    registry = Registry(policy=Policy(strict=True, disabled=("bad",)))
    assert registry.get("healthy")
    registry.policy = Policy(strict=True)
    with pytest.raises(PluginLoadError, match="ZeroDivisionError"):
        registry.get("healthy")
    (places.site / "demo_bad.py").write_text(dedent(GOOD))
    assert registry.get("healthy")
    write_distribution(places.site, "demo-worse", {"worse": "demo_worse:Good"}, "1 / 0")
    registry.refresh()
    with pytest.raises(PluginLoadError, match="ZeroDivisionError"):
        registry.get("healthy")


def test_strict_goes_through_all_plugins_once_for_each_snapshot(places, marked, monkeypatch):
    registry = Registry(policy=Policy(strict=True))
    assert registry.get("healthy")
    asked, load = [], ClassCache.load

    def record_and_load(cache, record, policy):
        asked.append(record.name)
        return load(cache, record, policy)

    monkeypatch.setattr(ClassCache, "load", record_and_load)
    assert registry.get("healthy")
    assert registry.create("healthy")
    assert asked == ["healthy", "healthy"]
    registry.refresh()
    assert registry.get("healthy")
    assert "marked" in asked


def test_a_strict_registry_has_a_repr(places):
    malformed(places)
    assert "healthy" in repr(Registry(policy=Policy(strict=True)))


def test_a_registered_name_that_is_installed_later_can_be_taken_back(places):
    registry = Registry()
    registry.register("late", registry.get("healthy"))
    write_distribution(places.site, "demo-late", {"late": "demo_late:Good"})
    registry.refresh()
    with pytest.raises(CombinationConflictError, match=r"Ask for 'demo-late:late', or"):
        registry.get("late")
    assert registry.get("demo-late:late").__module__ == "demo_late"
    registry.unregister("late")
    assert registry.get("late").__module__ == "demo_late"


@pytest.mark.parametrize("value", ["0", "false", "No", "off", ""])
def test_strict_may_be_set_to_no(places, monkeypatch, value):
    malformed(places)
    monkeypatch.setenv("MTENN_STRICT", value)
    assert Registry().names()


def test_a_strict_setting_that_is_not_a_boolean_is_an_error(monkeypatch):
    monkeypatch.setenv("MTENN_STRICT", "perhaps")
    with pytest.raises(RegistryError, match="MTENN_STRICT must be 1 or 0; found 'perhaps'"):
        Registry().names()


# Pins --------------------------------------------------------------------------------------------


@pytest.fixture
def pins(tmp_path, monkeypatch):
    """Write a pins file that counts; return the function that does."""

    def write(text: str) -> Path:
        file = tmp_path / "pins.txt"
        file.write_text(text)
        monkeypatch.setenv("MTENN_PINS", str(file))
        return file

    return write


def test_a_pinned_plugin_is_returned(record, marked, pins):
    pins(f"# of today\n\n{NO_PINS}{pin(record)}  # mine\n")
    assert Registry().get("marked").__name__ == "Good"
    assert marked.exists()


def test_a_pin_may_be_an_argument(record, marked, tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text(pin(record))
    assert Registry(policy=Policy(pins=file)).get("marked").__name__ == "Good"
    file.write_text(NO_PINS)
    with pytest.raises(PluginPinError, match="not pinned"):
        Registry(policy=Policy(pins=str(file))).get("marked")


def without_a_line(record):
    return NO_PINS


def of_another_version(record):
    return pin(record).replace("==1.0", "==2.0")


def of_another_hash(record):
    return f"{pin(record)[:-4]}0000"


def no_pin(record):
    return "demo-marked==1.0\n"


PINNED_OTHERWISE = {
    without_a_line: "is not pinned in .*pins.txt. .*add the line: demo-marked==1.0 RECORD=sha256:",
    of_another_version: r"is pinned to 2\.0 in .*: pip install demo-marked==2\.0",
    of_another_hash: "differs from the build pinned in .*pins.txt: expected RECORD=sha256:",
    no_pin: r"pins.txt:1: a pin must have the form 'dist.*found 'demo-marked==1\.0'",
}


@pytest.mark.parametrize("text", PINNED_OTHERWISE)
def test_a_plugin_with_another_pin_is_not_imported(record, marked, pins, text):
    pins(text(record))
    registry = Registry()
    assert "marked" in registry.names()
    with pytest.raises(PluginPinError, match=PINNED_OTHERWISE[text]):
        registry.get("marked")
    assert not marked.exists()
    kinds = [p.kind for p in registry.problems() if "demo-marked" in p.message]
    assert kinds == ["not pinned"]


def test_a_missing_pins_file_allows_no_plugin(marked, monkeypatch, tmp_path):
    monkeypatch.setenv("MTENN_PINS", str(tmp_path / "nowhere.txt"))
    message = r"the pins file cannot be read .*nowhere.txt.*list --pins"
    with pytest.raises(PluginPinError, match=message):
        Registry().get("marked")
    assert not marked.exists()


def changed_file(info):
    (info.parent / "demo_marked.py").write_text("import os")


def changed_entry_points(info):
    (info / "entry_points.txt").write_text("[mtenn.combinations]\nmarked = demo_marked:Good \n")


def deleted_file(info):
    (info.parent / "demo_marked.py").unlink()


@pytest.mark.parametrize("change", [changed_file, changed_entry_points, deleted_file])
def test_a_file_that_changed_since_it_was_installed_is_not_imported(record, marked, pins, change):
    pins(pin(record))
    change(Path(record.metadata))
    with pytest.raises(PluginPinError, match="has changed since it was installed"):
        Registry().get("marked")
    assert not marked.exists()


def test_a_rebuild_with_a_record_of_its_own_is_not_imported(record, marked, pins):
    pins(pin(record))
    changed_file(Path(record.metadata))
    write_record(Path(record.metadata))
    with pytest.raises(PluginPinError, match="differs from the build pinned"):
        Registry().get("marked")
    assert not marked.exists()


@pytest.mark.parametrize("row", [",sha256=x,1", ".,sha256=x,1", "x.py,shake_128=abc,1", ",,", '"'])
def test_a_record_of_any_kind_is_read_or_refused(record, marked, pins, row):
    pins(pin(record))
    with (Path(record.metadata) / "RECORD").open("a") as file:
        file.write(f"{row}\n")
    registry = Registry()
    registry.problems()
    with contextlib.suppress(PluginPinError):
        registry.get("marked")


def test_a_distribution_without_version_cannot_be_pinned(places):
    write_distribution(
        places.site, "demo-bad", {"bad": "demo_bad:Good"}, metadata="Name: demo-bad\n", record=True
    )
    with pytest.raises(PluginPinError, match="its metadata contain no version"):
        pin(Registry().info("bad"))


def test_a_file_of_pins_may_begin_with_a_byte_order_mark(record, marked, tmp_path):
    (tmp_path / "pins.txt").write_text(pin(record), encoding="utf-8-sig")
    assert Registry(policy=Policy(pins=tmp_path / "pins.txt")).get("marked")
    (tmp_path / "pins.txt").write_text(pin(record), encoding="utf-16")
    with pytest.raises(PluginPinError, match="cannot be read as UTF-8"):
        Registry(policy=Policy(pins=tmp_path / "pins.txt")).get("marked")


class Finder:
    """Finds a module elsewhere, as an editable install does."""

    def __init__(self, file):
        self.file = file

    def find_spec(self, name, path=None, target=None):
        if name == "demo_marked":
            return importlib.util.spec_from_file_location(name, self.file)
        return None


def test_a_finder_in_front_does_not_get_round_a_pin(places, record, marked, pins, monkeypatch):
    pins(pin(record))
    in_front(places)
    monkeypatch.setattr(sys, "meta_path", [Finder(places.front / "demo_marked.py"), *sys.meta_path])
    sys.path.remove(str(places.front))
    with pytest.raises(PluginPinError, match="'demo_marked' would be imported from"):
        Registry().get("marked")
    monkeypatch.setitem(sys.modules, "demo_marked", types.ModuleType("demo_marked"))
    with pytest.raises(PluginPinError, match="'demo_marked' would be imported from None"):
        Registry().get("marked")


def test_a_pin_is_the_same_whoever_has_installed_it(record):
    before = pin(record)
    info = Path(record.metadata)
    (info / "INSTALLER").write_text("another\n")
    (info / "direct_url.json").write_text('{"url": "file:///home/me", "dir_info": {}}')
    write_record(info)
    with (info / "RECORD").open("a") as file:
        file.write("../../../bin/demo,sha256=x,1\n")
    assert pin(record) == before


def in_front(at):
    write_distribution(at.front, "demo-marked", "", LEAVES_A_FILE, version="0").rename(
        at.front / "x"
    )


def a_folder_beside_it(at):
    (at.site / "demo_marked").mkdir()
    (at.site / "demo_marked" / "__init__.py").write_text(dedent(GOOD))


@pytest.mark.parametrize("place", [in_front, a_folder_beside_it])
def test_a_pinned_name_is_not_imported_from_another_place(places, record, marked, pins, place):
    pins(pin(record))
    place(places)
    with pytest.raises(
        PluginPinError,
        match=r"'demo_marked' would be imported from .*not a file of this distribution",
    ):
        Registry().get("marked")
    assert not list(places.site.parent.glob("*/*.imported"))


def test_a_submodule_is_found_in_its_package(places, pins):
    info = write_distribution(places.site, "demo-deep", {"deep": "demo_deep.inner:Good"}, None)
    package = places.site / "demo_deep"
    package.mkdir()
    (package / "inner.py").write_text(dedent(GOOD))  # of a namespace
    write_record(info, "demo_deep/inner.py")
    pins(pin(Registry().info("deep")))
    assert Registry().get("deep").__module__ == "demo_deep.inner"
    (package / "inner").mkdir()
    (package / "inner" / "__init__.py").touch()
    sys.modules.pop("demo_deep.inner")
    with pytest.raises(PluginPinError, match=r"'demo_deep\.inner' would be imported from"):
        Registry().get("deep")


def test_pins_that_come_later_count(record, marked, pins):
    registry = Registry()
    assert registry.get("marked")
    pins(NO_PINS)
    with pytest.raises(PluginPinError, match="is not pinned"):
        registry.get("marked")


def test_pins_count_in_isolation(record, marked, tmp_path):
    (tmp_path / "none.txt").touch()
    registry = Registry(policy=Policy(pins=tmp_path / "none.txt"))
    with pytest.raises(PluginPinError, match="is not pinned"):
        registry.check("marked", isolated=True)
    assert not marked.exists()


def test_a_version_may_have_several_wheels(record, marked, pins):
    other = f"{pin(record)[:-4]}0000"
    for text in (f"{pin(record)}\n{other}", f"{other}\n{pin(record)}"):
        pins(text)
        assert Registry().get("marked").__name__ == "Good"


def test_pins_that_are_named_nowhere_are_an_error(monkeypatch):
    monkeypatch.setenv("MTENN_PINS", " ")
    with pytest.raises(RegistryError, match="MTENN_PINS must name a file; found an empty value"):
        Registry().names()


def test_a_file_of_pins_that_cannot_be_read_is_one_problem(places, marked, monkeypatch, tmp_path):
    monkeypatch.setenv("MTENN_PINS", str(tmp_path / "nowhere.txt"))
    problems = Registry().problems()
    assert [p.kind for p in problems if "nowhere.txt" in p.message] == ["not pinned"]


def test_an_editable_install_cannot_be_pinned(record, marked, pins):
    pins(pin(record))
    origin = {"url": "file:///home/me", "dir_info": {"editable": True}}
    (Path(record.metadata) / "direct_url.json").write_text(json.dumps(origin))
    with pytest.raises(PluginPinError, match="cannot be pinned: it is an editable install from"):
        Registry().get("marked")
    assert not marked.exists()


def test_a_wheel_on_the_path_cannot_be_pinned_and_must_be_installed(tmp_path, monkeypatch):
    wheel = tmp_path / "demo_zip-1.0-py3-none-any.whl"
    write_distribution(tmp_path / "demo", "demo-zip", {"zipped": "demo_zip:Good"}, record=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in (tmp_path / "demo").rglob("*"):
            archive.write(file, file.relative_to(tmp_path / "demo"))
    monkeypatch.syspath_prepend(wheel)
    record = Registry().info("zipped")
    with pytest.raises(
        PluginPinError, match=r"from inside of .*whl, .* it: pip install .*any\.whl$"
    ):
        pin(record)


def test_a_distribution_without_record_cannot_be_pinned(places, pins):
    pins("demo-healthy==1.0 RECORD=sha256:" + "0" * 64)
    with pytest.raises(PluginPinError, match="has no RECORD with hashes"):
        Registry().get("healthy")
