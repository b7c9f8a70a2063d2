"""CONTRIBUTING.md shows every module of the core, as its docstring describes it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

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
