"""How Sphinx builds these pages: `tox run -e docs` writes docs/_build/html."""

from __future__ import annotations

import re
import zlib
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.transforms import SphinxTransform

import mtenn_core

HERE = Path(__file__).parent

project = "mtenn-core"
author = "the mtenn-core developers"
copyright = author
version = release = mtenn_core.__version__

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx_click",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx-mathjax-offline",
]
exclude_patterns = ["_build"]
# Quotes and ellipses, but no dashes: the help of a command names options, such as --json.
smartquotes_action = "qe"
nitpicky = True
# Types of what is not public, and names of types that only a type checker sees.
nitpick_ignore = [
    ("py:class", name)
    for name in (
        "Collate",
        "Expected",
        "GradientMode",
        "Group",
        "Level",
        "Source",
        "Tensor",
        "mtenn_core.testing._probe.subject.Subject",
        "mtenn_core.testing._target.Target",
    )
]

myst_enable_extensions = ["attrs_inline", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
# Nobody who reads the pages is seen by somebody else's server.
mathjax_path = "mathjax/tex-chtml.js"

numpydoc_xref_param_type = False
numpydoc_show_class_members = False
numpydoc_validation_checks = {"GL08"}  # no docstring
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
# A longer signature has one argument a line.
python_maximum_signature_line_length = 88

copybutton_prompt_text = "$ "

html_theme = "furo"
html_title = f"mtenn-core {version}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_show_copyright = False


def inventory(name: str, address: str) -> tuple[str, str]:
    """Return a project for intersphinx, with the names that these pages use of it.

    Its whole inventory would have to be fetched, and then a build could fail for what somebody else
    changed. A line of ``inventories/NAME.txt`` is what an inventory has: name, role, priority, the
    page (``$`` stands for the name) and what to show.
    """
    lines = (HERE / "inventories" / f"{name}.txt").read_bytes()
    head = f"# Sphinx inventory version 2\n# Project: {name}\n# Version: \n# zlib\n"
    path = HERE / "_build" / f"{name}.inv"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(head.encode() + zlib.compress(lines))
    return address, str(path)


intersphinx_mapping = {
    "python": inventory("python", "https://docs.python.org/3/"),
    "torch": inventory("torch", "https://docs.pytorch.org/docs/stable/"),
    "pluggy": inventory("pluggy", "https://pluggy.readthedocs.io/en/stable/"),
    "pytest": inventory("pytest", "https://docs.pytest.org/en/stable/"),
}


def describe(app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Hand numpydoc what follows ``name :`` as the description, not as a type.

    Types are in the annotations, and a description begins where numpydoc expects one. Join the
    lines of a result without a name, because numpydoc would show each line as a result.
    """
    text = re.sub(
        r"(?<=^Returns\n-------\n)(\S.*\n?)+",
        lambda results: re.sub(r"\n(?=\S)(?![\w*][\w*, ]* : )", " ", results[0]),
        "\n".join(lines),
        flags=re.MULTILINE,
    )
    lines[:] = [
        part
        for line in text.split("\n")
        for part in re.sub(r"^([\w*][\w*, ]*) : (?=\S)", "\\1\n    ", line).split("\n")
    ]


def name_factories(
    app: Any, what: str, name: str, value: Any, options: Any, signature: str | None, returns: Any
) -> tuple[str | None, Any]:
    """Replace the default of a dataclass field that a function makes, which Sphinx cannot parse."""
    return signature and signature.replace("<factory>", "..."), returns


class DarkPictures(SphinxTransform):
    """Show a picture's dark version on dark pages, and put a picture that has none on white."""

    default_priority = 500

    def apply(self, **kwargs: Any) -> None:
        """Put NAME-dark.svg next to NAME.svg; the classes of the theme hide one of them."""
        folder = Path(self.env.doc2path(self.env.docname)).parent
        for light in [*self.document.findall(nodes.image)]:
            path = Path(light["uri"])
            dark = path.with_stem(f"{path.stem}-dark")
            if (folder / dark).is_file():
                copy = light.copy()
                copy["uri"] = dark.as_posix()
                light["classes"].append("only-light")
                copy["classes"].append("only-dark")
                light.parent.insert(light.parent.index(light) + 1, copy)
            else:
                light["classes"].append("on-white")


class Together(SphinxTransform):
    """Keep a short piece of code on one line, and a formula with the punctuation after it."""

    default_priority = 500

    def apply(self, **kwargs: Any) -> None:
        """Give both the class ``together``. A browser may break after a hyphen or a formula."""
        for code in self.document.findall(nodes.literal):
            if len(code.astext()) <= 24:
                code["classes"].append("together")
        for formula in [*self.document.findall(nodes.math)]:
            text = formula.next_node(nodes.Text, descend=False, siblings=True)
            mark = text and re.match(r"[.,;:?)]+", text)
            if mark and text is formula.parent[formula.parent.index(formula) + 1]:
                text.parent[text.parent.index(formula) + 1] = nodes.Text(text[mark.end() :])
                together = nodes.inline(classes=["together"])
                formula.replace_self(together)
                together += [formula, nodes.Text(mark[0])]


class Tables(SphinxTransform):
    """Name the tables and cells that the style sheet has rules for."""

    default_priority = 500

    def apply(self, **kwargs: Any) -> None:
        """Add the classes ``matrix``, for a table of many columns, and ``prose``, for a cell."""
        for group in self.document.findall(nodes.tgroup):
            if group["cols"] > 12:
                group.parent["classes"].append("matrix")
                continue
            for cell in group.findall(nodes.entry):
                if len(cell.astext()) > 40:
                    cell["classes"].append("prose")


def number_citations(app: Any, doctree: nodes.document, name: str) -> None:
    """Show the number that a docstring has for a reference, without numpydoc's prefix."""
    for text in [*doctree.findall(nodes.Text)]:
        number = re.fullmatch(r"\[R[0-9a-f]+-(\d+)\]", text.astext())
        if number:
            text.parent.replace(text, nodes.Text(f"[{number[1]}]"))


def setup(app: Any) -> None:
    """Connect what is here; before numpydoc, which has the priority 500."""
    app.add_transform(DarkPictures)
    app.add_transform(Together)
    app.add_transform(Tables)
    app.connect("doctree-resolved", number_citations)
    app.connect("autodoc-process-docstring", describe, priority=400)
    app.connect("autodoc-process-signature", name_factories)
