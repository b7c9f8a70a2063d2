"""Dependencies point one way: a module imports only from its own layer and from lower ones.

This reads the source, so that it also sees imports inside of functions.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import mtenn_core

ROOT = Path(mtenn_core.__file__).parent
# From the bottom to the top. A layer is a list of modules or packages, without `mtenn_core.`; the
# longest name that fits decides.
LAYERS = (
    ("errors", "errors"),
    ("torch", "_torch_internals"),
    ("process", "_process"),
    ("contract", "hookspecs gradients combination"),
    ("engine", "_engine"),
    ("model", "model uncertainty"),
    ("testing: probes", "testing._outcomes testing._report testing._probe"),
    ("testing: checks", "testing._checks"),
    ("testing", "_pytest_plugin testing"),
    ("registry", "_registry"),
    ("tables", "_tables"),
    ("command line", "_cli __main__"),
)
LAYER_OF = {
    f"mtenn_core.{name}": number
    for number, (_, names) in enumerate(LAYERS)
    for name in names.split()
}
# The package itself offers the public names of all layers, and imports each only when it is used.
PUBLIC = "mtenn_core"
# Imports that point up, with the reason of each.
EXCEPTIONS = {
    (
        "mtenn_core.model",
        "mtenn_core._registry",
    ): "a model may be given the name of a combination, and looks it up when it is made",
    (
        "mtenn_core._engine.checkpoint",
        "mtenn_core._registry",
    ): "a checkpoint stores the plugin and version of its combination",
    (
        "mtenn_core.combination",
        "mtenn_core._engine.columns",
    ): "forward of the base class takes a gradient for each number of a pose",
    (
        "mtenn_core.combination",
        "mtenn_core._engine.declarations",
    ): "the repr of a combination shows the arguments of its constructor",
    (
        "mtenn_core.combination",
        "mtenn_core._engine.evaluation",
    ): "the default pose_weights and forward of the base class are the engine's",
    (
        "mtenn_core.combination",
        "mtenn_core._engine.mtenn_adapter",
    ): "as_mtenn_combination is public here, next to the class that it takes",
    (
        "mtenn_core.gradients",
        "mtenn_core._engine.known_gradients",
    ): "attach_gradients is public here, and its autograd function is the engine's",
}


class Import(NamedTuple):
    importer: str
    imported: str
    line: int


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, root: Path) -> Iterator[Import]:
    """Yield the imports of a module from this package, those for type checkers aside."""
    importer = module_name(path, root)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in walk_without_type_checking(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            names = [imported_module(node.module, alias.name, root) for alias in node.names]
        else:
            continue
        for name in dict.fromkeys(names):
            if name.split(".")[0] == root.name:
                yield Import(importer, name, node.lineno)


def imported_module(module: str, name: str, root: Path) -> str:
    """Return the module that `from module import name` imports."""
    if is_module(f"{module}.{name}", root):
        return f"{module}.{name}"
    # A public name comes from the module that the package imports when the name is used.
    return mtenn_core._MODULE_OF.get(name, PUBLIC) if module == PUBLIC else module


def walk_without_type_checking(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from walk_without_type_checking(child)


def is_module(name: str, root: Path) -> bool:
    path = root.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def layer_of(module: str) -> int | None:
    """Return the number of the layer, or None for the public face of the package."""
    parts = module.split(".")
    for length in range(len(parts), 1, -1):
        if (name := ".".join(parts[:length])) in LAYER_OF:
            return LAYER_OF[name]
    assert module == PUBLIC, f"{module} is in no layer"
    return None


def points_up(found: Import) -> bool:
    importer, imported = layer_of(found.importer), layer_of(found.imported)
    return importer is not None and imported is not None and imported > importer


ALL_IMPORTS = [found for path in sorted(ROOT.rglob("*.py")) for found in imports_of(path, ROOT)]


@pytest.mark.parametrize("module", sorted({found.importer for found in ALL_IMPORTS}))
def test_imports_point_down(module):
    found = [each for each in ALL_IMPORTS if each.importer == module and points_up(each)]
    wrong = [each for each in found if (each.importer, each.imported) not in EXCEPTIONS]
    assert not wrong, "\n".join(f"{w.importer}:{w.line} imports {w.imported}" for w in wrong)


@pytest.mark.parametrize("pair", EXCEPTIONS, ids=" imports ".join)
def test_an_exception_is_needed(pair):
    assert pair in {(each.importer, each.imported) for each in ALL_IMPORTS if points_up(each)}


def test_processes_know_nothing_of_combinations():
    own = "mtenn_core._process"
    known = own, "mtenn_core._torch_internals"
    inside = [i for i in ALL_IMPORTS if i.importer.startswith(own)]
    assert inside
    assert all(each.imported.startswith(known) for each in inside)


FAKES = {
    "at module level": "from mtenn_core._registry import registry\n",
    "inside of a function": "def f():\n    import mtenn_core._registry.lookup\n",
    "of a module as a name": "from mtenn_core import _registry\n",
    "of a public name": "from mtenn_core import registry\n",
    "of the model": "def f():\n    from mtenn_core import MultiPoseModel\n",
    "inside of a method": "class A:\n    def f(self):\n        from mtenn_core import _registry\n",
}


@pytest.mark.parametrize("code", FAKES.values(), ids=FAKES)
def test_an_import_that_points_up_is_found(tmp_path, code):
    root = tmp_path / "mtenn_core"
    for package in (root, root / "_process", root / "_registry"):
        package.mkdir()
        (package / "__init__.py").touch()
    module = root / "_process" / "child.py"
    module.write_text(code)
    (found,) = imports_of(module, root)
    assert points_up(found)


def test_an_import_for_type_checkers_is_no_import(tmp_path):
    module = tmp_path / "mtenn_core" / "errors.py"
    module.parent.mkdir()
    module.write_text("if TYPE_CHECKING:\n    from mtenn_core._registry import PluginRecord\n")
    assert not list(imports_of(module, module.parent))
