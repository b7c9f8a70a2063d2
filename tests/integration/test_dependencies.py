"""Every distribution declares what it imports, and a plugin needs nothing besides that."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
SOURCES = {
    "mtenn-core": ROOT / "mtenn_core",
    **{path.name: path / path.name.replace("-", "_") for path in ROOT.glob("plugins/mtenn-*")},
}
PLUGINS = sorted(SOURCES.keys() - {"mtenn-core"})
# Imported where they are there, and not required.
OPTIONAL = {
    "mtenn-core": {
        "jinja2",
        "markupsafe",
        "matplotlib",
        "numpy",
        "polars",
        "pytest",
        "safetensors",
    }
}

USE_IT = """
import importlib.abc
import json
import sys

allowed = set(json.loads(sys.argv[2]))


class OnlyTheAllowed(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if path is None and name not in allowed and name not in sys.stdlib_module_names:
            raise ModuleNotFoundError(f"No module named {name!r}: it is not declared", name=name)


sys.meta_path.insert(0, OnlyTheAllowed())

import torch
from mtenn_core import MultiPoseModel, Policy, Registry

registry = Registry(policy=Policy(allowed=[sys.argv[1]]))
for name in registry.names():
    for example in registry.get(name).examples:
        for gradients in ("graph", "stored", "recomputed"):
            combination = registry.create(name, **example)
            columns = combination.pose_columns or 1
            n_columns = columns if isinstance(columns, int) else len(columns)
            pose_model = torch.nn.Linear(3, n_columns)
            model = MultiPoseModel(pose_model, combination, gradients=gradients)
            model(torch.randn(4, 3)).prediction.sum().backward()
print(*registry.names())
"""


def imported_modules(package: Path) -> Iterator[str]:
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield node.module.partition(".")[0]


def required(distribution: str) -> set[str]:
    """Return the distributions that one requires without any extra."""
    requirements = map(Requirement, metadata.requires(distribution) or ())
    return {
        canonicalize_name(requirement.name)
        for requirement in requirements
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    }


def all_required(distribution: str) -> set[str]:
    """Return the distributions that one requires, those that they require, and so on."""
    found, new = set(), {distribution}
    while new:
        found |= new
        new = {name for each in new for name in required(each)} - found
    return found


def modules_of(distributions: set[str]) -> set[str]:
    return {
        module
        for module, owners in metadata.packages_distributions().items()
        if distributions & set(map(canonicalize_name, owners))
    }


@pytest.mark.parametrize("distribution", SOURCES)
def test_a_distribution_requires_what_it_imports_and_nothing_else(distribution):
    own = SOURCES[distribution].name
    imported = set(imported_modules(SOURCES[distribution])) - sys.stdlib_module_names
    declared = {re.sub("-", "_", name) for name in required(distribution)}
    assert imported - OPTIONAL.get(distribution, set()) - {own} == declared


@pytest.mark.parametrize("plugin", PLUGINS)
def test_a_plugin_works_with_the_core_and_what_it_requires(plugin):
    allowed = {SOURCES[plugin].name, "mtenn_core", *modules_of(all_required(plugin))}
    command = [sys.executable, "-W", "ignore", "-c", USE_IT, plugin, json.dumps(sorted(allowed))]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    offered = metadata.distribution(plugin).entry_points.select(group="mtenn.combinations")
    assert done.stdout.split() == sorted(point.name for point in offered)
