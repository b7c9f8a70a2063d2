"""Bad plugins and environments: each harms itself alone, and the message says what to do.

Each row of the table is installed for real, as metadata and modules in folders on the path, beside
a healthy plugin, which must resolve whatever the other does.
"""

import json
import os
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from installed import GOOD, Places, write_distribution
from tiers import slow

from mtenn_core import Policy, Registry, registry
from mtenn_core._process.settings import changed, process_state
from mtenn_core._registry.isolated_imports import import_isolated
from mtenn_core._registry.pins import pin
from mtenn_core.errors import (
    CombinationConflictError,
    CombinationNotFoundError,
    GradientValidationError,
    PluginIncompatibleError,
    PluginLoadError,
    PluginPinError,
    PluginSpecError,
    PluginWarning,
    RegistryError,
)

UNINSTALL = "pip uninstall demo-bad"


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes
    ----------
    install : writes it into the folders
    error : what asking for the name raises; None if it resolves
    words : what the message must contain, the remedy among them
    state : of torch, "restored" or "reported" (and left); empty if it is not touched
    problem : the kind that shows without an import
    name : to ask for
    """

    install: Callable[[Places], object]
    error: type[Exception] | None = None
    words: tuple[str, ...] = ()
    state: str = ""
    problem: str = ""
    name: str = "bad"


def module(code, target="demo_bad:Good", **options):
    """Return what installs a plugin with this code in front of a class that is right."""
    return lambda at: write_distribution(
        at.site, "demo-bad", {"bad": target}, f"{dedent(code)}\n{dedent(GOOD)}", **options
    )


def hook(body, decorator="from mtenn_core import hookimpl", signature="mtenn_combination()"):
    """Return what installs a module with a hook of its own."""
    code = f"{dedent(GOOD)}\n{decorator}\n@hookimpl\ndef {signature}:\n    {body}\n"
    return lambda at: write_distribution(at.site, "demo-bad", {"bad": "demo_bad"}, code)


def entry(target):
    return lambda at: write_distribution(at.site, "demo-bad", {"bad": target})


def entry_points(content, **options):
    return lambda at: write_distribution(at.site, "demo-bad", content, **options)


def metadata(content):
    return lambda at: write_distribution(
        at.site, "demo-bad", {"bad": "demo_bad:Good"}, metadata=content
    )


def both(*installs):
    return lambda at: [install(at) for install in installs]


def another(distribution="demo-other", entry_points=None, folder="site", **options):
    entry_points = entry_points or {"bad": "demo_other:Good"}
    return lambda at: write_distribution(getattr(at, folder), distribution, entry_points, **options)


def entry_points_are_a_folder(at):
    info = write_distribution(at.site, "demo-bad", {})
    (info / "entry_points.txt").unlink()
    (info / "entry_points.txt").mkdir()


def one_folder_twice(at):
    write_distribution(at.site, "demo-bad", {"bad": "demo_bad:Good"})
    (at.site.parent / "link").symlink_to(at.site)
    sys.path.insert(0, str(at.site.parent / "link"))


def odd_path(at):
    write_distribution(at.site, "demo-bad", {"bad": "demo_bad:Good"})
    sys.path[:0] = [at.site, 3, "/nowhere/at/all", str(at.site / "demo_bad.py")]


def two_eggs(at):
    """As ``setup.py install`` made them: folders on the path, with the metadata inside."""
    for name in ("demo-bad", "demo-worse"):
        egg = at.site / f"{name.replace('-', '_')}-1.0-py3.egg"
        info = write_distribution(egg, name, {name[5:]: f"{name.replace('-', '_')}:Good"}, egg=True)
        info.rename(egg / "EGG-INFO")
        sys.path.insert(0, str(egg))


def leftover_of_pip(at):
    """pip renames what it replaces; on Windows it may have to leave it."""
    info = write_distribution(at.site, "demo-bad", {"bad": "demo_old:Good"})
    info.rename(at.site / "~emo_bad-1.0.dist-info")
    write_distribution(at.site, "demo-bad", BAD)


def empty_folder_of_metadata(at):
    write_distribution(at.site, "demo-bad", BAD)
    (at.site / "demo_bad-1.1.dist-info").mkdir()


class Finder:
    def find_spec(self, name, path=None, target=None):
        return None

    def find_distributions(self, context=None):
        raise ValueError("demo finder")


def a_finder_that_raises(at):
    write_distribution(at.site, "demo-bad", BAD)
    sys.meta_path.insert(0, Finder())


def removed_since(at):
    write_distribution(at.site, "demo-bad", {"bad": "demo_bad:Good"})
    (at.site / "demo_bad.py").unlink()


BAD = {"bad": "demo_bad:Good"}
FILE = r"{}/\w+/(demo_bad\.py:\d|\w*demo_bad\S*-info\b)"  # or the folder of the metadata
REMEDY = "pip (install|uninstall)|Delete|Tell (its|the) author|Ask for|Repair or uninstall"
HOOK_FAILED = "its hook mtenn_combination failed with"
MUST_RETURN = "its hook mtenn_combination must return a subclass of mtenn_core.Combination; found"
CASES = {
    # What the module does when it is imported.
    "a dependency is missing": Case(
        module("import a_package_that_is_not_there"),
        PluginLoadError,
        ("ModuleNotFoundError: No module named 'a_package_that_is_not_there'", UNINSTALL),
    ),
    "ImportError": Case(
        module("from os import no_such_name"),
        PluginLoadError,
        ("ImportError: cannot import name 'no_such_name'", "demo_bad.py:1", UNINSTALL),
    ),
    "SyntaxError": Case(
        module("def ("), PluginLoadError, ("SyntaxError", "demo_bad.py:1", UNINSTALL)
    ),
    "sys.exit(0)": Case(
        module("import sys; sys.exit(0)"),
        PluginLoadError,
        ("SystemExit: 0", "demo_bad.py:1", UNINSTALL),
    ),
    "BaseException": Case(
        module("class Panic(BaseException): pass\nraise Panic('rust')"),
        PluginLoadError,
        ("Panic: rust", "demo_bad.py:2", UNINSTALL),
    ),
    "endless recursion": Case(
        module("def f(): f()\nf()"), PluginLoadError, ("RecursionError", UNINSTALL)
    ),
    "any error": Case(
        module("1 / 0"), PluginLoadError, ("ZeroDivisionError", "demo_bad.py:1", UNINSTALL)
    ),
    "asks the registry for a healthy plugin": Case(
        module("from mtenn_core import Registry\nassert Registry().get('healthy')")
    ),
    "asks the registry for itself": Case(
        module("from mtenn_core import Registry\nRegistry().get('bad')"),
        PluginLoadError,
        ("partially initialized module 'demo_bad'", "(raised in ", "demo_bad.py:2)", UNINSTALL),
    ),
    "writes warnings": Case(
        module("import warnings\nwarnings.simplefilter('ignore')\nwarnings.warn('old')")
    ),
    "prints": Case(module("print('hello')")),
    # What its entry point says.
    "missing module": Case(
        entry("demo_gone:Good"), PluginLoadError, ("No module named 'demo_gone'", UNINSTALL)
    ),
    "missing attribute": Case(
        entry("demo_bad:Goood"),
        PluginLoadError,
        ("no attribute 'Goood'. Did you mean 'Good'?", UNINSTALL),
    ),
    "missing attribute of an attribute": Case(
        entry("demo_bad:Good.Inner"), PluginLoadError, ("no attribute 'Inner'", UNINSTALL)
    ),
    "no attribute behind the colon": Case(
        entry("demo_bad:"), PluginLoadError, ("'module:attribute'", UNINSTALL), "", "does not load"
    ),
    "no module name": Case(
        entry("demo bad:Good"),
        PluginLoadError,
        ("'module:attribute'", UNINSTALL),
        "",
        "does not load",
    ),
    "no target": Case(
        entry(""), PluginLoadError, ("'module:attribute'", UNINSTALL), "", "does not load"
    ),
    "extras": Case(entry("demo_bad:Good [fast]")),
    # What its metadata say.
    "two colons in a target": Case(
        entry("demo_bad:Good:X"),
        PluginLoadError,
        ("'module:attribute'", UNINSTALL),
        "",
        "does not load",
    ),
    "a line without an equals sign": Case(
        entry_points("[mtenn.combinations]\nno equals sign\nbad = demo_bad:Good\n"),
        problem="malformed",
    ),
    "a line without a name": Case(
        entry_points("[mtenn.combinations]\n= demo_bad:Good\nbad = demo_bad:Good\n"),
        problem="malformed",
    ),
    "a line without an equals sign in an unrelated distribution": Case(
        entry_points("[console_scripts]\nno equals sign\n"),
        CombinationNotFoundError,
        ("unknown combination 'bad'; installed: ", "see `mtenn doctor`"),
        "",
        "malformed",
    ),
    "a comment that only some parsers know, in an unrelated distribution": Case(
        entry_points("[console_scripts]\n; old\n[a b]\n# more\nc = d:e\n"),
        CombinationNotFoundError,
        problem="malformed",
    ),
    "entry points before any group": Case(
        entry_points("bad = demo_bad:Good\n[mtenn.combinations]\n"), CombinationNotFoundError
    ),
    "entry points that are no UTF-8": Case(
        entry_points(b"[mtenn.combinations]\nb\xff = x:Y\nbad = demo_bad:Good\n"),
        problem="malformed",
    ),
    "entry points with a byte order mark": Case(
        entry_points("\ufeff[mtenn.combinations]\nbad = demo_bad:Good\n")
    ),
    "entry points are a folder": Case(entry_points_are_a_folder, CombinationNotFoundError),
    "one name for two classes of one distribution": Case(
        entry_points("[mtenn.combinations]\nbad = demo_bad:Good\nbad = demo_bad:Other\n"),
        CombinationConflictError,
        ("'demo-bad:bad'", "demo_bad:Other"),
        "",
        "conflict",
    ),
    "one entry point twice": Case(
        entry_points("[mtenn.combinations]\nbad = demo_bad:Good\nbad = demo_bad:Good\n")
    ),
    "no METADATA": Case(metadata(""), problem="no metadata"),
    "METADATA that is no text": Case(metadata(b"\xff\xfe\x00"), problem="no metadata"),
    "METADATA without a version": Case(metadata("Name: demo-bad\n"), problem="no metadata"),
    "METADATA with the name of another": Case(
        metadata("Name: demo-healthy\nVersion: 1.0\n"), problem="no metadata"
    ),
    "a name that looks like that of another distribution": Case(
        entry_points("[mtenn.combinations]\ndemo-healthy:healthy = demo_bad:Good\n"),
        CombinationNotFoundError,
        problem="malformed",
    ),
    "a requirement that no parser ends with": Case(
        module("", requires="mtenn-core; python_version ~= 'abc'"),
        PluginIncompatibleError,
        ("its requirement on mtenn-core cannot be parsed", UNINSTALL),
        "",
        "incompatible",
    ),
    "made for an older core": Case(
        module("", requires="mtenn-core<0.1"),
        PluginIncompatibleError,
        ("requires mtenn-core<0.1; found mtenn-core", "--upgrade"),
        "",
        "incompatible",
    ),
    "a requirement that cannot be read": Case(
        module("", requires="mtenn-core >>> 1"),
        PluginIncompatibleError,
        ("its requirement on mtenn-core cannot be parsed", UNINSTALL),
        "",
        "incompatible",
    ),
    "1000 names in one distribution": Case(
        entry_points(
            "[mtenn.combinations]\nbad = demo_bad:Good\n"
            + "".join(f"n{i} = demo_bad:Good\n" for i in range(999))
        )
    ),
    "unicode names": Case(
        lambda at: write_distribution(at.site, "demo-bad", {"größe": "demo_bad:Good"}),
        name="GRÖSSE".replace("SS", "ß"),
    ),
    # What its hook does.
    "the hook raises": Case(
        hook("raise ValueError('no licence')"),
        PluginSpecError,
        (f"{HOOK_FAILED} ValueError: no licence", "demo_bad.py:", UNINSTALL),
    ),
    "the hook exits": Case(
        hook("raise SystemExit"), PluginSpecError, (f"{HOOK_FAILED} SystemExit", UNINSTALL)
    ),
    "the hook wants an argument": Case(
        hook("return Good", signature="mtenn_combination(name)"),
        PluginSpecError,
        (HOOK_FAILED, "name", UNINSTALL),
    ),
    "the hook returns None": Case(
        hook("return None"), PluginSpecError, (f"{MUST_RETURN} None", UNINSTALL)
    ),
    "the hook returns a list": Case(
        hook("return [Good]"), PluginSpecError, (f"{MUST_RETURN} [<class", UNINSTALL)
    ),
    "the hook returns what cannot be printed": Case(
        hook("class A: __repr__ = None\n    return A()"),
        PluginSpecError,
        ("found a A that cannot be printed", UNINSTALL),
    ),
    "the hook returns a million numbers": Case(
        hook("return list(range(10**6))"), PluginSpecError, ("[0, 1, 2, 3", "…", UNINSTALL)
    ),
    "an error that cannot be printed": Case(
        module("class E(Exception):\n    __str__ = None\nraise E"),
        PluginLoadError,
        ("E: (it cannot be printed)", "demo_bad.py:3", UNINSTALL),
    ),
    "the hook returns a number": Case(
        hook("return 3"), PluginSpecError, (f"{MUST_RETURN} 3", UNINSTALL)
    ),
    "the hook returns an instance": Case(
        hook("return Good()"), PluginSpecError, (f"{MUST_RETURN} Good()", UNINSTALL)
    ),
    "the hook returns a class that is no Combination": Case(
        hook("return dict"), PluginSpecError, (f"{MUST_RETURN} <class 'dict'>", UNINSTALL)
    ),
    "the marker of another project": Case(
        hook("return Good", "import pluggy; hookimpl = pluggy.HookimplMarker('other')"),
        PluginSpecError,
        ("must implement the hook", "marker of another project", "mtenn_core.hookimpl"),
    ),
    "a misspelt hook": Case(
        hook("return Good", signature="mtenn_combinations()"),
        PluginSpecError,
        ("must implement the hook", "found no such hook, but mtenn_combinations", UNINSTALL),
    ),
    "no hook": Case(
        module("Bad = object()", "demo_bad:Bad"),
        PluginSpecError,
        ("must implement the hook mtenn_combination; found no such hook. Write", UNINSTALL),
    ),
    "an object that raises at every look": Case(
        module(
            """
            class Raises:
                def __getattr__(self, name): raise ValueError(name)
                def __dir__(self): raise ValueError("dir")
            Bad = Raises()
            """,
            "demo_bad:Bad",
        ),
        PluginSpecError,
        (f"{HOOK_FAILED} ValueError", UNINSTALL),
    ),
    "the entry point is an instance": Case(
        lambda at: write_distribution(
            at.site, "demo-bad", {"bad": "demo_bad:good"}, f"{dedent(GOOD)}\ngood = Good()\n"
        ),
        PluginSpecError,
        ("found an instance, whose arguments would be lost. Name the class, Good", UNINSTALL),
    ),
    # What its class does.
    "a class without a value": Case(
        lambda at: write_distribution(
            at.site,
            "demo-bad",
            BAD,
            "from mtenn_core import Combination\nclass Good(Combination): pass\n",
        ),
        PluginSpecError,
        ("must be valid arguments; found {}", "it must define combine(predictions)"),
    ),
    "a gradient that is wrong": Case(
        lambda at: write_distribution(
            at.site,
            "demo-bad",
            BAD,
            f"{dedent(GOOD)}\n    def pose_weights(self, p): return p * 0 + 1\n",
        ),
        GradientValidationError,
        ("your backward", "validate=False"),
    ),
    # Who else is there.
    "two distributions with one name": Case(
        both(module(""), another()),
        CombinationConflictError,
        ("'demo-bad:bad'", "'demo-other:bad'", "demo-other 1.0", "prefer"),
        "",
        "conflict",
    ),
    "names that differ by case and - and _": Case(
        both(
            lambda at: write_distribution(at.site, "demo-bad", {"bad-one": "demo_bad:Good"}),
            another(entry_points={"Bad_One": "demo_other:Good"}),
        ),
        CombinationConflictError,
        ("'demo-bad:bad-one'", "'demo-other:Bad_One'", "prefer"),
        "",
        "conflict",
        "bad.one",
    ),
    "two spellings in one distribution": Case(
        lambda at: write_distribution(
            at.site, "demo-bad", {"bad-one": "demo_bad:Good", "bad_one": "demo_bad:Other"}
        ),
        CombinationConflictError,
        ("'demo-bad:bad-one'", "'demo-bad:bad_one'"),
        "",
        "conflict",
        "bad-one",
    ),
    "one of two spellings in one distribution": Case(
        lambda at: write_distribution(
            at.site, "demo-bad", {"bad-one": "demo_bad:Other", "bad_one": "demo_bad:Good"}
        ),
        problem="conflict",
        name="demo-bad:bad_one",
    ),
    "one distribution twice on the path": Case(
        both(module(""), another("demo-bad", BAD, "front")),
    ),
    "one folder twice on the path": Case(one_folder_twice),
    "a copy in front that lacks the name": Case(
        both(module(""), another("demo-bad", {"other": "demo_bad:Good"}, "front", version="0.9")),
        CombinationNotFoundError,
        ("cannot be reached", "demo_bad-0.9.dist-info comes first", "Delete it"),
        "",
        "shadowed",
    ),
    "a copy in front that offers nothing": Case(
        both(module(""), another("demo-bad", "[console_scripts]\n", "front", version="0.9")),
        CombinationNotFoundError,
        ("cannot be reached", "demo_bad-0.9.dist-info comes first", "Delete it"),
        "",
        "shadowed",
    ),
    "a stale egg-info in front": Case(
        both(
            module(""),
            another(
                "demo-bad", {"bad": "demo_old:Good"}, "front", version="0.1", egg=True, module=None
            ),
        ),
        PluginLoadError,
        ("No module named 'demo_old'", "demo_bad.egg-info hides", "1.0.dist-info", "Delete it"),
        problem="stale copy",
    ),
    "a stale egg-info beside it": Case(
        both(module(""), another("demo-bad", {"bad": "demo_old:Good"}, version="0.1", egg=True)),
        problem="stale copy",
    ),
    "an upgrade that was interrupted": Case(
        both(module(""), another("demo-bad", {"bad": "demo_old:Good"}, version="0.10")),
        problem="stale copy",
    ),
    "a leftover of pip": Case(leftover_of_pip, problem="leftover"),
    "a newer folder of metadata with nothing in it": Case(empty_folder_of_metadata),
    "a finder that raises": Case(a_finder_that_raises, problem="unreadable"),
    "eggs": Case(two_eggs),
    "the other egg": Case(two_eggs, name="demo-worse:worse"),
    "odd entries in sys.path": Case(odd_path),
    "its files were deleted": Case(
        removed_since, PluginLoadError, ("No module named 'demo_bad'", UNINSTALL)
    ),
    # What it leaves behind.
    "default dtype": Case(
        module("import torch; torch.set_default_dtype(torch.float64)"), state="restored"
    ),
    "a setting, and warnings silenced": Case(
        module(
            "import torch, warnings; torch.set_default_dtype(torch.float64)\n"
            "warnings.simplefilter('ignore')"
        ),
        state="restored",
    ),
    "number of threads": Case(
        module("import torch; torch.set_num_threads(torch.get_num_threads() + 1)"),
        state="restored",
    ),
    "grad mode": Case(module("import torch; torch.set_grad_enabled(False)"), state="restored"),
    "default device": Case(
        module("import torch; torch.set_default_device('meta')"), state="restored"
    ),
    "deterministic mode": Case(
        module("import torch; torch.use_deterministic_algorithms(True)"), state="restored"
    ),
    "precision of float32": Case(
        module("import torch; torch.set_float32_matmul_precision('medium')"), state="restored"
    ),
    "deterministic mode, a warning": Case(
        module("import torch; torch.use_deterministic_algorithms(True, warn_only=True)"),
        state="restored",
    ),
    "seeds": Case(
        module("import random, torch; torch.manual_seed(1); random.seed(1)"),
        state="restored, silently",
    ),
    "a setting, and then an error": Case(
        module("import torch; torch.set_default_dtype(torch.float64); 1 / 0"),
        PluginLoadError,
        ("ZeroDivisionError", UNINSTALL),
        state="restored, silently",
    ),
    "torch patched": Case(
        module("import torch; torch.erfinv = lambda x: x"),
        state="reported",
    ),
    "torch patched with torch's own": Case(
        module("import torch; torch.erfinv = torch.erf"),
        state="reported",
    ),
    "torch patched, and wrapped to look like it": Case(
        module(
            "import functools, torch\n"
            "torch.erfinv = functools.wraps(torch.manual_seed)(lambda x: x)"
        ),
        state="reported",
    ),
}


@pytest.fixture
def unpatched(monkeypatch):
    # A worker of pytest-xdist has another thread, which threading counts at times. With other
    # threads, fewer random states are restored.
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    monkeypatch.setattr(torch, "erfinv", torch.erfinv)
    yield
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, Finder)]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.usefixtures("unpatched")
def test_a_bad_plugin_does_not_affect_other_plugins(places, case):
    case.install(places)
    registry = Registry()
    before = process_state()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert "healthy" in registry.names()
        if case.error is None:
            assert registry.get(case.name).__name__ == "Good"
        else:
            with pytest.raises(case.error) as caught:
                registry.get(case.name)
            check_message(str(caught.value), case, places)
            record = caught.value.record  # nobody's, where the name is unknown
            assert record is None or record.distribution == "demo-bad"
            assert (record is None) == str(caught.value).startswith("unknown combination")
        assert registry.get("healthy").__module__ == "demo_healthy"
    if case.problem == "incompatible":
        assert "demo_bad" not in sys.modules
    assert not changed(before, process_state())
    told = [str(w.message) for w in warned if issubclass(w.category, PluginWarning)]
    words = {"restored": "The old values were restored", "reported": "replaced torch.erfinv"}.get(
        case.state
    )
    assert len(told) == (words is not None), told
    assert words is None or (words in told[0] and "demo-bad 1.0" in told[0])
    problems = [problem for problem in registry.problems() if "emo" in problem.message]
    assert (case.problem in [p.kind for p in problems]) if case.problem else not problems
    for problem in problems:
        assert re.search(REMEDY, problem.message)
        assert str(places.site.parent) in problem.message or "finder" in problem.message


def check_message(message, case, places):
    for word in case.words:
        assert word in message
    if not message.startswith("unknown combination"):  # which is nobody's
        assert re.search(r"\bdemo-bad (1\.0|0\.1)\b", message)
        assert re.search(FILE.format(re.escape(str(places.site.parent))), message)


# Kinds of problems that a plugin has when it is imported in a process of its own, and a word.
APART = {
    "segfault": ("import os; os.kill(os.getpid(), 11)", "crashes", "killed by SIGSEGV"),
    "exit": ("import os; os._exit(3)", "crashes", "exited with 3 before it was done"),
    "prints": ("print('hello')", "prints", "'hello'"),
    "traces": (
        "import torch; torch.set_default_dtype(torch.float64)",
        "leaves traces",
        "changed torch's default dtype",
    ),
    "error": ("1 / 0", "does not load", "ZeroDivisionError"),
    "hook": (
        "from mtenn_core import hookimpl\n@hookimpl\ndef mtenn_combination(): return dict",
        "no combination",
        "must return a subclass of mtenn_core.Combination; found <class 'dict'>",
    ),
}
INTERPRETERS = "several new interpreters"
posix = pytest.mark.skipif(os.name != "posix", reason="needs process groups")


@posix
def test_an_isolated_import_reports_a_crash_and_continues(places):
    for name, (code, _, _) in APART.items():
        target = f"demo_{name}" if name == "hook" else f"demo_{name}:Good"
        code = f"{code}\n{dedent(GOOD)}"
        write_distribution(places.site, f"demo-{name}", {name: target}, code)
    records = [r for r in Registry().records() if str(r.distribution).startswith("demo-")]
    found = {record.name: problems for record, problems in import_isolated(records, 60.0)}
    assert found.pop("healthy") == []
    assert set(found) == set(APART)
    for name, (_, kind, word) in APART.items():
        (problem,) = found[name]
        assert problem.kind == kind
        assert word in problem.message
        assert f"demo-{name} 1.0" in problem.message
        if kind == "crashes":
            assert f"pip uninstall demo-{name}" in problem.message


@posix
def test_an_import_without_end_is_ended(places):
    module("import time; time.sleep(600)")(places)
    ((_, (problem,)),) = import_isolated([Registry().info("bad")], 2.0)
    assert problem.kind == "crashes"
    assert "did not end within 2 s" in problem.message
    assert "demo_bad.py" in problem.message  # where it hangs
    assert UNINSTALL in problem.message


@posix
def test_a_slow_import_does_not_delay_other_plugins(places):
    module("import time; time.sleep(4)")(places)
    registry = Registry()
    assert "bad" in registry.names()
    assert registry.get("healthy").__name__ == "Good"
    assert "demo_bad" not in sys.modules
    ((_, (problem,)),) = import_isolated([registry.info("bad")], 60.0)
    assert problem.kind == "slow"
    (seconds,) = re.findall(r"\(demo-bad 1\.0\): its import takes ([\d.]+) s", problem.message)
    assert float(seconds) >= 4


IN_FORWARD = {
    "segfault": ("import os; os.kill(os.getpid(), 11)", "killed by SIGSEGV"),
    "hang": ("import time; time.sleep(600)", "did not end within 2 s"),
    "memory": ("import torch; torch.ones(2**40)", "not enough memory"),
}


@posix
@pytest.mark.parametrize("case", IN_FORWARD)
def test_an_isolated_check_reports_why_its_process_ended(places, case):
    code, word = IN_FORWARD[case]
    wrong = f"{dedent(GOOD)}\n    def forward(self, *args):\n        {code}\n"
    write_distribution(places.site, "demo-bad", BAD, wrong)
    (report,) = Registry().check(
        "bad",
        isolated=True,
        only=["A2"],
        time_limit=4.0 if case == "hang" else 60.0,
        memory_limit=1024,
    )
    assert not report.passed
    assert word in report.failures[0].reason
    assert "demo-bad 1.0" in str(report)
    (report,) = Registry().check("healthy", only=["A2"])
    assert report.passed


@posix
def test_an_isolated_check_names_the_plugin_whose_import_crashed(places, monkeypatch):
    registry.refresh()
    module("import os; os.kill(os.getpid(), 11)")(places)
    (report,) = registry.check("BAD", isolated=True)
    for words in ("demo-bad 1.0", "killed by SIGSEGV", "demo_bad.py", UNINSTALL):
        assert words in str(report)
    (failure,) = report.failures
    assert failure.repro == "mtenn check demo-bad:bad --isolated"
    registry.refresh()


def test_a_registered_combination_cannot_be_checked_in_isolation(places):
    registry = Registry()
    registry.register("here", registry.get("healthy"))
    assert registry.check("here", only=["A2"])[0].passed
    with pytest.raises(RegistryError, match=r"'here' .* only this process knows it"):
        registry.check("here", isolated=True)


@pytest.mark.parametrize(
    "command", ["check bad --level gate", "list", "info bad", *slow("doctor", reason=INTERPRETERS)]
)
def test_json_stays_valid_where_a_plugin_prints(places, command):
    noise = "import os, warnings\nprint('hello')\nos.system('echo hi')\nwarnings.warn('old')"
    module(noise)(places)
    path = os.pathsep.join([str(places.site), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "mtenn_core", *command.split(), "--json"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        check=False,
    )
    assert json.loads(done.stdout), done.stderr


STOPS_TORCH = {
    "no equals sign": b"[console_scripts]\nno equals sign\n",
    "no UTF-8": b"[console_scripts]\nb\xff = x:Y\n",
    "nothing of ours": b"[console_scripts]\n; old\n[mtenn.combinations]\nbad = demo_bad:Good\n",
}


@pytest.fixture
def run_python(places):
    """Run Python in a new process, where torch is not imported and may look for backends."""
    path = os.pathsep.join([str(places.site), os.environ.get("PYTHONPATH", "")])
    environment = {k: v for k, v in os.environ.items() if k != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    return lambda *arguments: subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=environment | {"PYTHONPATH": path},
        check=False,
    )


@pytest.mark.parametrize(
    "case",
    ["no equals sign", *slow("no UTF-8", "nothing of ours", reason=INTERPRETERS)],
)
def test_the_command_works_although_a_file_stops_torch(places, run_python, case):
    entry_points(STOPS_TORCH[case])(places)
    done = run_python("-m", "mtenn_core", "check", "healthy", "--level", "gate")
    assert done.returncode == 0, done.stderr
    assert "demo_bad-1.0.dist-info: each line of entry_points.txt must be" in done.stderr
    done = run_python("-m", "mtenn_core", "doctor", "--json")
    problems = [p for p in json.loads(done.stdout)["problems"] if "demo" in p["message"]]
    assert [problem["kind"] for problem in problems] == ["malformed"]


@posix
def test_a_check_in_isolation_works_although_a_file_stops_torch(places, run_python):
    entry_points(STOPS_TORCH["no UTF-8"])(places)
    done = run_python("-m", "mtenn_core", "check", "healthy", "--only", "A2", "--isolated")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning: ") == 1


def test_the_registry_does_not_change_the_error_of_torch(places, run_python):
    entry_points(STOPS_TORCH["no UTF-8"])(places)
    alone = run_python("-c", "import torch")
    assert alone.returncode == 1
    for code in ("registry.names(); import torch", "registry.get('healthy')"):
        done = run_python("-c", f"from mtenn_core import registry; {code}")
        assert done.returncode == 1
        # The error of torch, which blames no plugin.
        assert done.stderr.splitlines()[-1] == alone.stderr.splitlines()[-1]


@posix
def test_no_plugin_is_blamed_if_python_does_not_start(places, tmp_path):
    folder = tmp_path / "broken"
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "__init__.py").write_text("raise ImportError('libcudart')")
    path = os.pathsep.join([str(folder), str(places.site), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "mtenn_core", "doctor", "--json"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        check=False,
    )
    (problem,) = json.loads(done.stdout)["problems"]
    assert problem["kind"] == "does not start"
    assert "libcudart" in problem["message"]
    assert "pip uninstall" not in problem["message"]


@posix
@pytest.mark.slow("a thousand plugins")
def test_doctor_takes_a_thousand_names(places):
    names = {f"a-rather-long-name-for-a-rule-{i}": "demo_bad:Good" for i in range(1000)}
    write_distribution(places.site, "demo-bad", names)
    registry = Registry(policy=Policy(allowed=("demo-bad",)))
    found = list(import_isolated(registry.records(), 60.0))
    assert len(found) == 1000
    assert not any(problems for _, problems in found)


@posix
@pytest.mark.slow(INTERPRETERS)
def test_a_distribution_is_skipped_after_several_deaths(places):
    names = {f"n{i}": "demo_bad:Good" for i in range(9)}
    write_distribution(places.site, "demo-bad", names, "import os; os._exit(3)")
    registry = Registry(policy=Policy(allowed=("demo-bad",)))
    found = list(import_isolated(registry.records(), 60.0))
    assert [len(problems) for _, problems in found] == [1, 1, 1]
    assert "6 more plugins of this distribution were not imported" in found[-1][1][0].message


@posix
def test_a_folder_with_a_colon_reaches_the_child(places, tmp_path):
    folder = tmp_path / "a:b"
    write_distribution(folder, "demo-colon", {"colon": "demo_colon:Good"})
    sys.path[:0] = [str(folder), Path("no text")]
    registry = Registry(policy=Policy(allowed=("colon",)))
    assert [problems for _, problems in import_isolated(registry.records(), 60.0)] == [[]]


def test_a_plugin_may_ask_the_registry_that_imports_it(places):
    registry.refresh()
    write_distribution(
        places.site,
        "demo-itself",
        {"itself": "demo_itself:Good"},
        "from mtenn_core import registry\nregistry.get('itself')\n",
    )
    module(
        """
        from mtenn_core import registry
        assert registry.get('healthy') and 'bad' in registry
        registry.refresh()
        """
    )(places)
    assert registry.get("bad").__name__ == "Good"
    with pytest.raises(PluginLoadError, match="partially initialized module 'demo_itself'"):
        registry.get("itself")
    registry.refresh()


def test_changes_during_two_imports_are_not_blamed_on_one_plugin(places):
    inner = "import torch; torch.set_default_dtype(torch.float64)"
    write_distribution(
        places.site, "demo-inner", {"inner": "demo_inner:Good"}, f"{inner}\n{dedent(GOOD)}"
    )
    module(
        """
        import torch
        from mtenn_core import Registry
        torch.use_deterministic_algorithms(True)
        Registry().get('inner', validate=False)
        assert torch.are_deterministic_algorithms_enabled()  # this import is not over
        """
    )(places)
    with pytest.warns(
        PluginWarning, match="or another plugin that was imported at the same time"
    ) as told:
        Registry().get("bad")
    assert len(told) == 1, [str(warning.message) for warning in told]
    assert torch.get_default_dtype() == torch.float32
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_errors_that_are_not_the_plugins_fault_pass_through(places, error):
    module(f"raise {error.__name__}")(places)
    with pytest.raises(error):
        Registry().get("bad")


def test_a_plugin_that_was_repaired_loads(places):
    module("1 / 0")(places)
    registry = Registry()
    with pytest.raises(PluginLoadError):
        registry.get("bad")
    (places.site / "demo_bad.py").write_text(dedent(GOOD))
    assert registry.get("bad").__name__ == "Good"


def pipe(path):
    os.mkfifo(path)


def endless_device(path):
    path.symlink_to("/dev/zero")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("make", [pipe, endless_device])
@pytest.mark.parametrize("name", ["entry_points.txt", "METADATA", "RECORD", "direct_url.json"])
def test_a_pipe_or_a_device_in_the_place_of_a_file_does_not_hang_a_query(places, make, name):
    entry_points = {"pinned": "demo_pin:Good"}
    info = write_distribution(places.site, "demo-pin", entry_points, record=True)
    (info / name).unlink(missing_ok=True)
    make(info / name)
    registry = Registry()
    assert "healthy" in registry.names()
    messages = [problem.message for problem in registry.problems()]
    if name == "entry_points.txt":
        assert any(
            f"{info}: entry_points.txt must be a regular file; found a pipe" in message
            for message in messages
        )
        assert "pinned" not in registry
    if name == "METADATA":
        assert any("contain no name or no version" in message for message in messages)
    if name == "RECORD":
        with pytest.raises(PluginPinError, match="has no RECORD with hashes"):
            pin(registry.info("pinned"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("file", ["/dev/zero", "demo_pipe"])
def test_an_endless_file_in_a_record_has_changed(places, file):
    info = write_distribution(places.site, "demo-pin", {"pinned": "demo_pin:Good"}, record=True)
    os.mkfifo(places.site / "demo_pipe")
    with (info / "RECORD").open("a") as record:
        record.write(f"{file},sha256=abc,1\n")
    with pytest.raises(PluginPinError, match=f"{file} has changed since it was installed"):
        pin(Registry().info("pinned"))


def test_an_egg_with_a_pipe_for_its_requirements_does_not_hang_a_query(places):
    info = write_distribution(places.site, "demo-egg", {"egg": "demo_egg:Good"}, egg=True)
    os.mkfifo(info / "requires.txt")
    assert Registry().info("egg").requires == ()
