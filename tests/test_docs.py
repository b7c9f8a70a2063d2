"""Every example on the pages runs, and every output shown is what the code gives.

A page runs from top to bottom in one namespace. What its fenced blocks mean:

``python``
    is executed; as a doctest, outputs included, if it starts with ``>>>``. A script, with a line
    ``if __name__ == "__main__":``, is only written.
``text``
    is what the ``python`` block before it prints.
``console``
    ``$ mtenn …`` is run and prints the lines below it; so are ``$ torchrun`` and ``$ python
    FILE``, which must pass. ``$ pytest`` must pass, ``$ pip install .`` or ``./folder`` installs
    the page's own package (without an index), and other commands are not run. Only ``mtenn``,
    ``torchrun``, ``python`` and ``cat`` may show output. ``$ cat FILE`` shows a file: one that
    ``mtenn`` has written, or the reader's own.
``sh``, ``bash``
    are not run: the README's set-up is what runs the tests.
``{…}``
    is for Sphinx, see tests/site.

A ``python``, ``toml``, ``yaml`` or ``markdown`` block that begins with a comment such as ``#
demo/module.py`` or ``<!-- demo/README.md -->`` is a file of the page's own package.

What the pages say of the conformance suite is held to the suite itself.
"""

from __future__ import annotations

import doctest
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import warnings
from contextlib import chdir, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
from click.testing import CliRunner, Result
from conftest import forget_modules_in
from tiers import slow

import mtenn_core
from mtenn_core import Policy, registry
from mtenn_core._cli import main
from mtenn_core.errors import RegistryError
from mtenn_core.testing import CHECKS
from mtenn_core.testing._checks.values import PROPERTIES, TESTED_ELSEWHERE
from mtenn_core.testing._report import Status

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
# These are run in the environment that has the plugins: integration/test_docs_with_plugins.py.
PAGES_WITH_PLUGINS = [
    README,
    ROOT / "packaging/description.md",
    ROOT / "docs/explanation/combinations.md",
    ROOT / "docs/explanation/gradients-per-pose.md",
    ROOT / "docs/how-to/choose-a-combination.md",
    ROOT / "docs/how-to/combine-a-table.md",
    ROOT / "docs/how-to/configure.md",
    ROOT / "docs/how-to/error-bars.md",
    ROOT / "docs/how-to/export-a-model.md",
    ROOT / "docs/how-to/from-sdf-to-model.md",
    ROOT / "docs/how-to/move-from-mtenn.md",
    ROOT / "docs/how-to/predict-several-numbers.md",
    ROOT / "docs/how-to/score-a-library.md",
    ROOT / "docs/how-to/train.md",
    ROOT / "docs/how-to/train-on-several-machines.md",
    ROOT / "docs/reference/json.md",
    ROOT / "docs/tutorial/train-a-model.md",
    *sorted(ROOT.glob("plugins/*/README.md")),
]
LONG_PAGES = (
    "configure.md",
    "score-a-library.md",
    "train-on-several-machines.md",
    "your-own-combination.md",
)
IMAGES = ROOT / "docs/images"
# Written by `tox run -e bank`, which measures what it says.
MISTAKES = ROOT / "docs/explanation/mistakes.md"
PAGES = sorted({*ROOT.glob("docs/**/*.md")} - {*PAGES_WITH_PLUGINS, MISTAKES})
MANAGE = ROOT / "docs/how-to/manage-plugins.md"
CONFORMANCE = ROOT / "docs/explanation/conformance.md"
FIX = ROOT / "docs/how-to/fix-a-failing-check.md"

# Of these, nothing can be an output.
COMMANDS_AND_FILES = ("sh", "bash", "toml", "yaml", "markdown")
# A directive may have an argument behind its name.
FENCE = re.compile(
    r"^```(?P<language>[^\s`]*)(?: [^\n`]*)?\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL
)
FILE_NAME = re.compile(r"(?:#|<!--) ([\w./-]+\.(?:py|toml|yaml|md))(?: -->)?\n")
SCRIPT = 'if __name__ == "__main__":'
ROW = re.compile(r"^\|(.+)\|$", re.MULTILINE)
SOURCE = re.compile(r'\b(?:src|srcset)="([^"]+)"')
LINK = re.compile(r"\[[^\]]+\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)")
# Of `MultiPoseModel.estimate`: what the machine has, where it can be asked.
FREE_MEMORY = re.compile(r"; [\d.]+ [kMGT]?B free")
# An error bar, say. It is made of roundoff, which differs from one processor to the next.
MAGNITUDE = re.compile(r"\d(?:\.\d)?e[+-]\d\d")


class Block(NamedTuple):
    language: str
    body: str
    line: int  # of the page, where the body begins


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = [
        Block(m["language"], m["body"], text.count("\n", 0, m.start("body")) + 1)
        for m in FENCE.finditer(text)
    ]
    fences = sum(line.lstrip().startswith(("```", "~~~")) for line in text.splitlines())
    assert fences == 2 * len(found), f"{page.name}: a fence is indented, open or not of ```"
    return found


def run_page(page: Path, folder: Path) -> None:
    """Run a page; ``folder`` takes the files of its package."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed: str | None = None
    for block in blocks(page):
        where = f"{page.name}, line {block.line}"
        write_file(block, folder)
        if block.language == "python" and SCRIPT in block.body:
            printed = None
            continue
        if block.language == "python":
            with chdir(folder):  # a page may write a file, and a command read it
                printed = run_python(block, namespace, where)
            continue
        if block.language == "text":
            assert printed is not None, f"{where}: an output that follows no python block"
            assert_same_output(block.body, printed, where)
        elif block.language == "console":
            run_console(block, folder, where)
        else:
            known = block.language in COMMANDS_AND_FILES or block.language.startswith("{")
            assert known, f"{where}: what is a block of {block.language or 'no language'!r}?"
        printed = None


def write_file(block: Block, folder: Path) -> None:
    match = FILE_NAME.match(block.body)
    if match is None:
        return
    path = folder / match[1]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(block.body, encoding="utf-8")


def run_python(block: Block, namespace: dict[str, Any], where: str) -> str:
    """Execute a block and return what it prints."""
    output = io.StringIO()
    if block.body.startswith(">>>"):
        test = doctest.DocTestParser().get_doctest(block.body, namespace, where, where, 0)
        result = doctest.DocTestRunner().run(test, out=output.write, clear_globs=False)
        assert not result.failed, output.getvalue()
        namespace.update(test.globs)  # a DocTest works on a copy
        return ""
    code = compile("\n" * (block.line - 1) + block.body, where, "exec")
    with redirect_stdout(output):
        exec(code, namespace)
    return output.getvalue()


def run_console(block: Block, folder: Path, where: str) -> None:
    """Run the commands of a block."""
    assert block.body.startswith("$ "), f"{where}: begin with a command, '$ …'"
    for part in re.split(r"^\$ ", block.body, flags=re.MULTILINE)[1:]:
        command, _, shown = part.partition("\n")
        program, *arguments = shlex.split(command)
        where_it_is = f"{where}: {command}"
        if program == "mtenn":
            check_mtenn(arguments, shown, folder, where_it_is)
        elif program in ("python", "torchrun"):
            if program == "python":
                module, *arguments = arguments
                given = run_module(module.removesuffix(".py"), arguments, folder, where_it_is)
            else:
                given = run_module("torch.distributed.run", arguments, folder, where_it_is)
            if shown.strip():
                assert_same_output(shown, given, where_it_is)
        elif program == "cat" and shown.strip():
            check_file(folder / arguments[0], shown, where_it_is)
        elif shown.strip():
            raise AssertionError(f"{where_it_is}: nothing checks this output")
        elif program == "pytest":
            run_module("pytest", ["-p", "no:cacheprovider", *arguments], folder, where_it_is)
        elif program == "pip" and (path := local_project(arguments)):
            install(folder / path, folder)


def check_mtenn(arguments: list[str], shown: str, folder: Path, where: str) -> None:
    done = run_mtenn(arguments, folder)
    if not shown.strip():
        assert done.exit_code == 0, f"{where}\n{done.output}"
        return
    given = done.stdout
    if arguments == ["list"]:  # the environment may have other plugins
        wanted = [line.split() for line in shown.splitlines()]
        given = "\n".join(line for line in given.splitlines() if line.split() in wanted)
    assert_same_output(without_times(shown), without_times(given), where)


def check_file(path: Path, shown: str, where: str) -> None:
    """Hold a file to what the page shows of it. A new one is the reader's, who types it in."""
    if not path.exists():
        path.write_text(shown, encoding="utf-8")
    assert_same_output(shown, path.read_text(encoding="utf-8"), where)


def run_mtenn(arguments: list[str], folder: Path) -> Result:
    """Run the command in this process, since a new one imports torch again."""
    before = set(sys.modules)
    registry.refresh()
    # No line is folded, whatever the terminal: tox passes its width on.
    with chdir(folder), warnings.catch_warnings():
        warnings.resetwarnings()
        done = CliRunner(env={"COLUMNS": "1000"}).invoke(main, arguments)
    forget_modules_in(folder, before)
    return done


def run_module(module: str, arguments: list[str], folder: Path, where: str) -> str:
    """Run ``python -m module`` in ``folder`` and return what it prints on standard output."""
    path = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    fixed = {"PYTHONPATH": os.pathsep.join(path), "PYTHONIOENCODING": "utf-8", "COLUMNS": "1000"}
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=folder,
        env=os.environ | fixed,
        capture_output=True,
        encoding="utf-8",
        timeout=600,  # against what hangs; a conformance suite takes a while on a busy machine
        check=False,
    )
    assert done.returncode == 0, f"{where}\n{done.stdout}{done.stderr}"
    return done.stdout


def local_project(arguments: list[str]) -> str | None:
    """Return the folder that ``pip install`` is to install, if it is one."""
    match arguments:
        case ["install", "." as path]:
            return path
        case ["install", path] if path.startswith("./"):
            return path
    return None


def install(project: Path, site: Path) -> None:
    """Do what pip would: copy the packages, and make metadata of pyproject.toml."""
    if project != site:
        for package in project.glob("*/__init__.py"):
            shutil.copytree(package.parent, site / package.parent.name)
    write_metadata(project / "pyproject.toml", site)
    registry.refresh()


def write_metadata(pyproject: Path, site: Path) -> None:
    """Write the metadata that pip would make of pyproject.toml."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    requires = [f"Requires-Dist: {requirement}" for requirement in project["dependencies"]]
    head = ["Metadata-Version: 2.1", f"Name: {project['name']}", f"Version: {project['version']}"]
    (info / "METADATA").write_text("\n".join([*head, *requires, ""]))
    lines = []
    for group, entry_points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in entry_points.items())]
    (info / "entry_points.txt").write_text("\n".join([*lines, ""]))


def without_times(table: str) -> str:
    """Drop the last column of ``mtenn check``, milliseconds."""
    row = r"^( \w\d+q? +(?:pass|fail|skip) .*?) +\d+ *$"
    return re.sub(row, r"\1", table, flags=re.MULTILINE)


def assert_same_output(shown: str, given: str, where: str) -> None:
    """Hold the output on a page to the real one, blanks between words aside."""
    shown_words, given_words = words(shown), words(given)
    same = len(shown_words) == len(given_words) and all(map(same_word, shown_words, given_words))
    assert same, f"{where}: the page shows\n{shown}\nand the code gives\n{given}"


def words(text: str) -> list[str]:
    text = FREE_MEMORY.sub("", text)
    return [word for line in text.splitlines() for word in [*line.split(), "\n"] if line.strip()]


def same_word(shown: str, given: str) -> bool:
    if MAGNITUDE.fullmatch(shown) and MAGNITUDE.fullmatch(given):
        return 1 / 4 <= float(shown) / float(given) <= 4
    return shown == given


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Yield a folder to import from; what a page leaves in the process is taken back."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    forget_modules_in(tmp_path, before)
    registry.policy = Policy()
    for record in registry.records():
        if record.distribution is None:
            registry.unregister(record.name)
    registry.refresh()


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def to_run(pages: list[Path]) -> list[Any]:
    """Return values of a parameter."""
    short = [page for page in pages if page.name not in LONG_PAGES]
    long = [page for page in pages if page.name in LONG_PAGES]
    return short + slow(*long, reason="as long as all other pages together")


@pytest.mark.parametrize("page", to_run(PAGES), ids=name)
def test_page_shows_what_the_code_gives(page, package):
    run_page(page, package)


def table(page: Path, head: str) -> list[list[str]]:
    """Return the cells of the tables whose first column has this head, without backticks."""
    found = []
    for part in page.read_text(encoding="utf-8").split("\n\n"):
        rows = [[cell.strip(" `") for cell in row.split("|")] for row in ROW.findall(part)]
        if rows and rows[0][0] == head:
            found += rows[2:]
    return found


def test_the_catalogue_is_that_of_the_suite():
    shown = [tuple(row[:3]) for row in table(CONFORMANCE, "id")]
    assert sorted(shown) == sorted((check.id, check.level, check.title) for check in CHECKS)


def test_every_check_has_a_remedy():
    assert sorted(row[0] for row in table(FIX, "id")) == sorted(check.id for check in CHECKS)


def test_the_errors_are_those_of_the_registry():
    errors = {RegistryError.__name__, *(error.__name__ for error in RegistryError.__subclasses__())}
    assert {row[0] for row in table(MANAGE, "error")} == errors


def test_the_properties_are_those_that_are_tested():
    assert {row[0] for row in table(CONFORMANCE, "property")} == {*PROPERTIES, *TESTED_ELSEWHERE}


def test_the_statuses_are_those_of_a_record():
    assert tuple(row[0] for row in table(CONFORMANCE, "status")) == get_args(Status)


LINKING_PAGES = [*ROOT.glob("*.md"), ROOT / "packaging/RELEASE.md"]


@pytest.mark.parametrize("page", [*LINKING_PAGES, *sorted(ROOT.glob("docs/**/*.md"))], ids=name)
def test_links_lead_somewhere(page):
    for path, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        target = (page.parent / path) if path else page
        assert target.is_file(), f"{page.name}: {path}"
        if anchor:
            titles = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"\W+", "-", title.lower()) for title in titles]
    for path in SOURCE.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / path).is_file(), f"{page.name}: {path}"


@pytest.mark.parametrize("image", sorted(IMAGES.iterdir()), ids=name)
def test_every_picture_is_small_and_on_a_page(image):
    assert image.stat().st_size < {".svg": 60_000, ".png": 200_000}[image.suffix]
    light = image.with_stem(image.stem.removesuffix("-dark")).name
    pages = [*ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*/README.md")]
    assert any(f"images/{light})" in page.read_text(encoding="utf-8") for page in pages)


@pytest.mark.parametrize("image", sorted(IMAGES.glob("*.svg")), ids=name)
def test_every_drawing_is_there_for_light_and_dark_pages(image):
    stem = image.stem.removesuffix("-dark")
    light, dark = (IMAGES / f"{stem}{part}.svg" for part in ("", "-dark"))
    assert "fill: #ffffff" in light.read_text(encoding="utf-8")
    assert "#ffffff" not in dark.read_text(encoding="utf-8")


def test_the_readme_is_short_and_in_order():
    text = README.read_text(encoding="utf-8")
    assert text.count("\n") <= 200
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == [
        "Install",
        "Train",
        "Which combination",
        "Write your own",
        "Check it",
        "The repository",
    ]


FAKES = {
    "output": ("```python\nprint(1)\n```\n```text\n2\n```\n", "page shows"),
    "digit": ("```python\nprint(0.25)\n```\n```text\n0.26\n```\n", "page shows"),
    "magnitude": ("```python\nprint('1.0e-03')\n```\n```text\n1.0e-02\n```\n", "page shows"),
    "doctest": ("```python\n>>> 1 + 1\n3\n```\n", "Expected:"),
    "no source": ("```text\n2\n```\n", "follows no python block"),
    "second output": ("```python\nprint(1)\n```\n```text\n1\n```\n```text\n2\n```\n", "follows no"),
    "command": ("```console\n$ pip install .\nall went well\n```\n", "nothing checks this output"),
    "list": ("```console\n$ mtenn list\n nothing nowhere 1.0 no:Where\n```\n", "page shows"),
    "torchrun": ("```console\n$ torchrun --standalone absent.py\n```\n", "absent.py"),
    "exit": ("```console\n$ mtenn check nothing\n```\n", "unknown combination"),
    "language": ("```\n2\n```\n", "what is a block of"),
    "indented": ("- item\n\n  ```text\n  2\n  ```\n", "a fence is indented"),
}


@pytest.mark.parametrize(("text", "message"), FAKES.values(), ids=FAKES)
def test_page_with_another_output_is_refused(text, message, package):
    page = package / "page.md"
    page.write_text(text)
    with pytest.raises(AssertionError, match=message):
        run_page(page, package)


def test_warning_on_a_page_is_an_error(package):
    page = package / "page.md"
    page.write_text("```python\nimport warnings\nwarnings.warn('old')\n```\n")
    with pytest.raises(UserWarning, match="old"):
        run_page(page, package)


def test_the_citation_is_that_of_the_latest_version():
    fact = re.compile(r"^([\w-]+): (.+)$", re.MULTILINE)
    cited = dict(fact.findall((ROOT / "CITATION.cff").read_text(encoding="utf-8")))
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    version, date = re.search(r"^## (\S+) \((.+)\)$", changes, re.MULTILINE).groups()
    assert cited["version"] == version == mtenn_core.__version__
    assert cited.get("date-released", "unreleased") == date
