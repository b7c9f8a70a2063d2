"""CONTRIBUTING.md shows every module of the core, as its docstring describes it."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- tree -->\n", "<!-- end of tree -->"


def summary(module: Path) -> str:
    docstring = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0].replace("``", "")


def tree(folder: Path, indent: str = "") -> Iterator[str]:
    """Yield a line for each module, those of a folder before its folders."""
    init = folder / "__init__.py"
    yield f"{indent}{folder.name + '/':<{32 - len(indent)}}{summary(init)}"
    indent += "  "
    for module in sorted(folder.glob("*.py")):
        if module != init:
            yield f"{indent}{module.name:<{32 - len(indent)}}{summary(module)}"
    for package in sorted(path.parent for path in folder.glob("*/__init__.py")):
        yield from tree(package, indent)


def test_the_tree_is_that_of_the_core():
    lines = "\n".join(line.rstrip() for line in tree(ROOT / "mtenn_core"))
    shown = CONTRIBUTING.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert shown == f"```text\n{lines}\n```\n"


def test_the_lowest_versions_are_those_that_the_pyproject_files_allow():
    floors = {}
    for path in [ROOT / "pyproject.toml", *(ROOT / "plugins").glob("*/pyproject.toml")]:
        project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
        extras = project.get("optional-dependencies", {}).values()
        for line in [*project["dependencies"], *(line for extra in extras for line in extra)]:
            requirement = Requirement(line)
            if requirement.name.startswith("mtenn"):
                continue
            (floor,) = (s.version for s in requirement.specifier if s.operator == ">=")
            assert floors.setdefault(requirement.name, floor) == floor
    lines = (ROOT / "lowest.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    for name, floor in floors.items():
        assert Version(pins[name]) == Version(floor), name
