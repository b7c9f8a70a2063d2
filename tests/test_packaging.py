"""The distributions agree on licence, versions, the extra ``plugins`` and conda recipes."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import mtenn_core

ROOT = Path(__file__).parents[1]
WRITER = ROOT / "packaging/conda/write_recipes.py"
# By its path, since it is a script.
_SPEC = importlib.util.spec_from_file_location("write_recipes", WRITER)
conda = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(conda)

FOLDERS = {"mtenn-core": ROOT, **{path.name: path for path in ROOT.glob("plugins/mtenn-*")}}
PLUGINS = sorted(FOLDERS.keys() - {"mtenn-core"})
# An index shows a description without the repository around it.
RELATIVE_LINK = re.compile(r"\]\((?!https?://)[^)]*\)|<(?:img|a|source)\b[^>]*>")


def project(distribution: str) -> dict[str, Any]:
    pyproject = FOLDERS[distribution] / "pyproject.toml"
    return tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]


def description(distribution: str) -> str:
    return (FOLDERS[distribution] / project(distribution)["readme"]).read_text(encoding="utf-8")


def test_the_extra_has_every_plugin_of_this_version():
    listed = map(Requirement, project("mtenn-core")["optional-dependencies"]["plugins"])
    allowed = {requirement.name: requirement.specifier for requirement in listed}
    assert sorted(allowed) == PLUGINS
    for plugin in PLUGINS:
        assert project(plugin)["version"] in allowed[plugin]


@pytest.mark.parametrize("section", ["all", "testenv:alone", "testenv:dist", "testenv:wheels"])
def test_tox_names_every_plugin_and_no_other(section):
    tox = ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini", encoding="utf-8")
    named = re.findall(r"mtenn-(?!core)[a-z]+", " ".join(tox[section].values()))
    assert sorted(set(named)) == PLUGINS


@pytest.mark.parametrize("plugin", PLUGINS)
def test_a_plugin_allows_this_core(plugin):
    required = {r.name: r.specifier for r in map(Requirement, project(plugin)["dependencies"])}
    assert mtenn_core.__version__ in required["mtenn-core"]
    core = {r.name: r.specifier for r in map(Requirement, project("mtenn-core")["dependencies"])}
    assert required["torch"] == core["torch"]


@pytest.mark.parametrize("plugin", PLUGINS)
def test_a_plugin_has_the_licence_of_the_core(plugin):
    # A copy, since a source distribution takes the file from its own folder.
    assert not (FOLDERS[plugin] / "LICENSE").is_symlink()
    assert (FOLDERS[plugin] / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    for key in ("license", "license-files", "authors", "requires-python"):
        assert project(plugin)[key] == project("mtenn-core")[key]


@pytest.mark.parametrize("distribution", FOLDERS)
def test_the_description_links_to_no_file_of_this_repository(distribution):
    assert RELATIVE_LINK.findall(description(distribution)) == []


@pytest.mark.parametrize("plugin", PLUGINS)
def test_the_description_of_the_core_lists_what_a_plugin_offers(plugin):
    (row,) = re.findall(rf"^\| `{plugin}` \| (.+) \|$", description("mtenn-core"), re.MULTILINE)
    offered = project(plugin)["entry-points"]["mtenn.combinations"]
    assert sorted(re.findall(r"`(\w+)`", row)) == sorted(offered)


@pytest.mark.parametrize("distribution", FOLDERS)
def test_the_conda_recipe_is_what_its_script_writes(distribution):
    path = WRITER.parent / distribution / "recipe.yaml"
    written = conda.recipe(FOLDERS[distribution])
    assert path.read_text(encoding="utf-8") == written, f"{path}: run {WRITER.name} again"


def test_no_conda_recipe_is_left_over():
    assert {path.parent.name for path in WRITER.parent.glob("*/recipe.yaml")} == set(FOLDERS)


@pytest.mark.parametrize("distribution", FOLDERS)
def test_the_conda_recipe_requires_the_same(distribution):
    text = (WRITER.parent / distribution / "recipe.yaml").read_text(encoding="utf-8")
    run = text.partition("\n  run:\n")[2].partition("\n\n")[0].partition("\n  run_constraints")[0]
    required = [Requirement(line.removeprefix("    - ")) for line in run.splitlines()[1:]]
    assert {(r.name, r.specifier) for r in required} == {
        ("pytorch" if r.name == "torch" else canonicalize_name(r.name), r.specifier)
        for r in map(Requirement, project(distribution)["dependencies"])
    }
    (version,) = re.findall(r'^  version: "(.+)"$', text, re.MULTILINE)
    assert version == project(distribution).get("version", mtenn_core.__version__)


def test_the_lowest_versions_are_those_that_the_pyproject_files_allow():
    floors = {}
    for distribution in FOLDERS:
        table = project(distribution)
        extras = table.get("optional-dependencies", {}).values()
        for line in [*table["dependencies"], *(line for extra in extras for line in extra)]:
            requirement = Requirement(line)
            if requirement.name.startswith("mtenn"):
                continue
            (floor,) = (s.version for s in requirement.specifier if s.operator == ">=")
            assert floors.setdefault(requirement.name, floor) == floor
    lines = (ROOT / "lowest.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    for name, floor in floors.items():
        assert Version(pins[name]) == Version(floor), name
