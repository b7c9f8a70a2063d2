"""The public names and their signatures are those of ``public_interface.txt``.

``python tests/test_public_interface.py`` records them as they are now.
"""

from __future__ import annotations

import collections
import difflib
import functools
import importlib
import importlib.util
import inspect
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mtenn_core
import mtenn_core.errors
import mtenn_core.testing

ROOT = Path(__file__).parents[1]
RECORD = Path(__file__).with_name("public_interface.txt")

# Documented under these paths, besides what ``__all__`` has.
MODULES = {
    "mtenn_core": mtenn_core.__all__,
    "mtenn_core.testing": mtenn_core.testing.__all__,
    "mtenn_core.errors": [
        name for name, value in vars(mtenn_core.errors).items() if inspect.isclass(value)
    ],
    "mtenn_core.gradients": [
        "attach_gradients",
        "check_gradients",
        "join_grad_dict",
        "split_grad_dict",
        "stack_predictions",
    ],
    "mtenn_core.combination": ["Combination", "as_mtenn_combination"],
    "mtenn_core.model": ["MultiPoseModel", "MultiPoseOutput"],
    "mtenn_core.uncertainty": ["effective_poses", "jackknife_error", "propagated_error"],
    "mtenn_core.hookspecs": ["hookimpl", "mtenn_combination"],
}
# Of these, other packages and Python itself call what has underscores.
SPECIAL = {"__init__", "__contains__", "__iter__", "__len__", "__str__"}
TEST_OF_A_CHECK = re.compile(r"^(test_[a-d]\d+q?_).*")
NAME_IN_A_LINE = re.compile(r"^(?:\w+ )?([\w.…]+)(?=\(|:| =| is |$).*")


class _Text(str):
    """An annotation that is shown without quotes."""

    def __repr__(self) -> str:
        return str(self)


def test_public_names_and_signatures_are_as_recorded():
    recorded = RECORD.read_text(encoding="utf-8").splitlines()
    found = list(interface())
    differing = [
        line
        for line in difflib.unified_diff(recorded, found, "recorded", "found", n=0, lineterm="")
        if not line.startswith("@@")
    ]
    assert not differing, (
        "the public interface has changed:\n"
        + "\n".join(differing)
        + "\n\nIf that is wanted: run `python tests/test_public_interface.py`, and say so in"
        " CHANGELOG.md"
    )


def test_every_recorded_line_is_of_one_name():
    """Two lines of one name could hide what changed."""
    lines = RECORD.read_text(encoding="utf-8").splitlines()
    names = collections.Counter(NAME_IN_A_LINE.sub(r"\1", line) for line in lines)
    assert not [name for name, count in names.items() if count > 1]


def interface() -> Iterator[str]:
    """Yield a line for each public name."""
    shown: dict[int, str] = {}
    for module_name, names in MODULES.items():
        module = importlib.import_module(module_name)
        for name in sorted(names):
            value = getattr(module, name)
            path = f"{module_name}.{name}"
            if id(value) in shown:
                yield f"{path} is {shown[id(value)]}"
                continue
            shown[id(value)] = path
            yield from _lines(path, value, shown)
    for file in sorted(ROOT.glob("plugins/*/mtenn_*/__init__.py")):
        module = _module_in(file)
        for name, value in vars(module).items():
            is_own = inspect.isclass(value) and value.__module__ == module.__name__
            if is_own and not name.startswith("_"):
                path = f"{module.__name__}.{name}"
                shown[id(value)] = path
                yield from _lines(path, value, shown)


def _module_in(file: Path) -> types.ModuleType:
    """Return a plugin's module, which need not be installed."""
    spec = importlib.util.spec_from_file_location(file.parent.name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _lines(path: str, value: Any, shown: dict[int, str]) -> Iterator[str]:
    if inspect.isclass(value):
        bases = ", ".join(base.__name__ for base in value.__bases__)
        yield f"class {path}({bases})"
        yield from sorted(_members(path, value, shown))
    elif callable(value) and hasattr(value, "__name__"):
        yield f"{path}{_signature(value)}"
    else:
        yield f"{path}: {type(value).__name__}"


def _members(path: str, owner: type, shown: dict[int, str]) -> Iterator[str]:
    """Yield a line for each public attribute of a class and of its private bases."""
    names = set()
    for base in owner.__mro__:
        private = base.__module__.startswith("mtenn_") and id(base) not in shown
        if base is owner or private:
            annotations = vars(base).get("__annotations__", {})
            for name in {*vars(base), *annotations} - names:
                if not name.startswith("_") or name in SPECIAL:
                    names.add(name)
                    yield _member(path, name, vars(base).get(name, _ABSENT), annotations)


_ABSENT = object()


def _member(path: str, name: str, raw: Any, annotations: dict[str, Any]) -> str:
    # The title of a check is prose, and its test is named after it.
    path = f"{path}." + TEST_OF_A_CHECK.sub(r"\1…", name)
    if isinstance(raw, staticmethod | classmethod):
        return f"{type(raw).__name__} {path}{_signature(raw.__func__)}"
    if isinstance(raw, property):
        return f"property {path}{_signature(raw.fget)}"
    if isinstance(raw, functools.cached_property):
        return f"property {path}{_signature(raw.func)}"
    if inspect.isfunction(raw):
        return f"{path}{_signature(raw)}"
    annotation = annotations.get(name, "")
    text = f"{path}: {getattr(annotation, '__forward_arg__', annotation)}" if annotation else path
    return text if raw is _ABSENT or _is_slot(raw) else f"{text} = {_value(raw)}"


def _is_slot(value: object) -> bool:
    """Return whether a class's attribute stands for one of its instances."""
    return inspect.isdatadescriptor(value) or type(value).__name__ == "_tuplegetter"


def _value(value: Any) -> str:
    if isinstance(value, frozenset | set):
        return "{" + ", ".join(map(repr, sorted(value))) + "}"
    return repr(value)


def _signature(function: Any) -> str:
    signature = inspect.signature(function)

    def shown(annotation: Any) -> Any:
        return _Text(annotation) if isinstance(annotation, str) else annotation

    parameters = [
        parameter.replace(annotation=shown(parameter.annotation))
        for parameter in signature.parameters.values()
    ]
    returned = shown(signature.return_annotation)
    text = str(signature.replace(parameters=parameters, return_annotation=returned))
    return re.sub(r" at 0x[0-9a-f]+", "", text)


if __name__ == "__main__":
    RECORD.write_text("".join(f"{line}\n" for line in interface()), encoding="utf-8")
