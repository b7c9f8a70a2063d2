"""The built pages are whole: links and anchors lead somewhere, and everything public is on them.

`tox run -e docs` builds them first, into docs/_build/html.
"""

from __future__ import annotations

import importlib
import inspect
import re
import zlib
from functools import cache, cached_property
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import click
import pytest
import torch

from mtenn_core import Combination, MultiPoseModel, errors
from mtenn_core._cli import main
from mtenn_core._cli.commands import COMMANDS

ROOT = Path(__file__).parents[2]
SITE = ROOT / "docs/_build/html"
# Without the source code, which sphinx.ext.viewcode shows.
PAGES = sorted({*SITE.rglob("*.html")} - {*(SITE / "_modules").rglob("*.html")})
PUBLIC = (
    "mtenn_core",
    "mtenn_core.testing",
    "mtenn_mean",
    "mtenn_max",
    "mtenn_boltzmann",
    "mtenn_ordered",
    "mtenn_attention",
)
# Of torch.nn.Module: what a repr shows.
NOT_OURS = ("extra_repr",)
LOADED = {("script", "src"), ("img", "src"), ("link", "href"), ("source", "src")}


class Page(HTMLParser):
    """The addresses that a page leads to or loads, and the anchors that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        facts = dict(attributes)
        self.anchors |= {facts[key] for key in ("id", "name") if facts.get(key)}
        for key in ("href", "src"):
            if facts.get(key):
                self.addresses.append(facts[key])
                if (tag, key) in LOADED and facts.get("rel") not in ("next", "prev", "canonical"):
                    self.loaded.append(facts[key])


@cache
def page(path):
    return Page(path.read_text(encoding="utf-8"))


def name(path):
    return str(path.relative_to(SITE))


def is_external(address):
    return re.match(r"[a-z]+:|//", address) is not None


def broken(path):
    for address in page(path).addresses:
        if is_external(address):
            continue
        file, anchor = urldefrag(address)
        file = file.partition("?")[0]
        target = (path.parent / unquote(file)).resolve() if file else path
        if target.is_dir():
            target /= "index.html"
        is_there = target.is_file()
        if anchor and target.suffix == ".html" and is_there:
            is_there = unquote(anchor) in page(target).anchors
        if not is_there:
            yield address


def test_the_pages_are_there():
    assert len(PAGES) > 20, "tox run -e docs builds them"


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_of_a_page_lead_somewhere(path):
    assert list(broken(path)) == []


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_a_page_loads_nothing_from_elsewhere(path):
    assert [address for address in page(path).loaded if is_external(address)] == []


def test_a_broken_link_is_found(tmp_path):
    path = tmp_path / "page.html"
    path.write_text('<a href="#here" id="here"></a><a href="#gone"></a><img src="gone.png">')
    assert list(broken(path)) == ["#gone", "gone.png"]


@cache
def documented():
    """Return the names that pages describe, which other projects can link to."""
    content = (SITE / "objects.inv").read_bytes().split(b"\n", 4)[4]
    return {line.split(" ", 1)[0] for line in zlib.decompress(content).decode().splitlines()}


def public_names():
    """Yield what can be imported, and what can be called of it."""
    modules = [(module, importlib.import_module(module)) for module in PUBLIC]
    found = {
        f"{path}.{each}": getattr(module, each)
        for path, module in modules
        for each in getattr(module, "__all__", own_classes(module))
    }
    found |= {f"{errors.__name__}.{each}": getattr(errors, each) for each in own_classes(errors)}
    for path, value in found.items():
        yield path
        if inspect.isclass(value):
            yield from (f"{path}.{each}" for each in methods(value))


def own_classes(module):
    return [
        each
        for each, value in vars(module).items()
        if not each.startswith("_")
        and inspect.isclass(value)
        and value.__module__ == module.__name__
    ]


def methods(cls):
    described = (property, cached_property, classmethod, staticmethod)
    for each, value in vars(cls).items():
        is_method = inspect.isfunction(value) or isinstance(value, described)
        if is_method and not each.startswith(("_", "test_", "pytest_")) and each not in NOT_OURS:
            yield each


@pytest.mark.parametrize(
    "public", sorted(set(public_names()) | {"mtenn_core.hookspecs.mtenn_combination"})
)
def test_what_is_public_is_described(public):
    assert public in documented()


def signatures(path):
    """Return, by name, the signatures of the classes on a page, as a reader sees them."""
    found = re.findall(
        r'<dt class="sig sig-object py" id="([\w.]+)">(.*?)</dt>',
        path.read_text("utf-8"),
        re.DOTALL,
    )
    texts = ((name, re.sub(r"\s+", " ", unescape(re.sub("<[^>]*>", "", dt)))) for name, dt in found)
    return {name: text for name, text in texts if text.strip().startswith("class ")}


def classes_with_arguments():
    modules = [importlib.import_module(module) for module in PUBLIC if module != "mtenn_core"]
    combinations = [
        getattr(module, each)
        for module in modules
        for each in own_classes(module)
        if issubclass(getattr(module, each), Combination)
    ]
    for cls in [*combinations, MultiPoseModel]:
        if cls.__init__ is not torch.nn.Module.__init__:
            yield cls


@pytest.mark.parametrize("cls", [*classes_with_arguments()], ids=lambda cls: cls.__name__)
def test_a_page_shows_the_arguments_of_a_class(cls):
    is_model = cls is MultiPoseModel
    path = SITE / "reference" / ("model.html" if is_model else "combinations.html")
    prefix = "mtenn_core" if is_model else cls.__module__
    shown = signatures(path)[f"{prefix}.{cls.__name__}"]
    _, *arguments = inspect.signature(cls.__init__).parameters.values()
    assert arguments
    for argument in arguments:
        assert f"{argument.name}: " in shown
        if argument.default is not argument.empty:
            assert re.search(
                rf"\b{argument.name}: [^=]+ = {re.escape(repr(argument.default))}", shown
            )


def options():
    for command in COMMANDS:
        for parameter in main.get_command(click.Context(main), command).params:
            if isinstance(parameter, click.Option):
                yield command, max(parameter.opts, key=len)


@pytest.mark.parametrize(("command", "option"), [*options()])
def test_every_option_is_described(command, option):
    assert f"mtenn-{command}.{option}" in documented()


def test_every_command_has_a_heading():
    text = (SITE / "reference/command-line.html").read_text("utf-8")
    assert set(COMMANDS) <= set(re.findall(r"<h3>([\w-]+)<", text))


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_references_have_plain_numbers(path):
    """Numpydoc makes the number of a reference unique: [Ref8d7eeaa0bc-1]."""
    assert re.findall(r"\[R[0-9a-f]{6,}-\d+\]", path.read_text("utf-8")) == []


def test_every_setting_is_described():
    code = "".join(path.read_text("utf-8") for path in (ROOT / "mtenn_core").rglob("*.py"))
    page_text = (ROOT / "docs/how-to/manage-plugins.md").read_text("utf-8")
    assert set(re.findall(r"\bMTENN_[A-Z_]+\b", code)) <= set(
        re.findall(r"\bMTENN_[A-Z_]+\b", page_text)
    )


@pytest.mark.parametrize("folder", ["how-to", "examples", "explanation", "reference"])
def test_every_page_of_a_folder_is_on_its_list(folder):
    pages = {path.name for path in (ROOT / "docs" / folder).glob("*.md")} - {"index.md"}
    listed = re.findall(r"^- \[.+\]\(([\w-]+\.md)\)", index(folder), re.MULTILINE)
    assert sorted(listed) == sorted(pages)


def index(folder):
    return (ROOT / "docs" / folder / "index.md").read_text("utf-8")


def test_the_sidebar_has_its_captions_in_order():
    text = (SITE / "index.html").read_text("utf-8")
    captions = re.findall(r'<p class="caption"[^>]*><span class="caption-text">([^<]+)<', text)
    assert captions == ["Tutorial", "How-to", "Examples", "Explanation", "Reference", "Project"]


def test_the_first_page_has_the_sections_of_the_readme():
    sections = re.findall(r"^## (.+)$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE)
    assert sections.pop() == "The repository"
    anchors = {section.lower().replace(" ", "-") for section in sections}
    assert anchors <= page(SITE / "index.html").anchors


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*/README.md")), ids=str)
def test_an_example_shows_its_code(path):
    text = (SITE / f"examples/{path.parent.name}.html").read_text("utf-8")
    assert "The code" in text
    shown = re.sub(r"<[^>]+>", "", unescape(text))
    scripts = [script.read_text("utf-8") for script in path.parent.glob("*.py")]
    assert any(script.strip() in shown for script in scripts)


def test_every_schema_is_on_its_page():
    text = (ROOT / "docs/reference/json.md").read_text("utf-8")
    schemas = {path.name for path in (ROOT / "docs/reference/schemas").glob("*.json")}
    assert schemas == set(re.findall(r"\(schemas/(\w+\.json)\)", text))
