"""The pages and pictures that need plugins; tests/test_docs.py says how a page is run."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

# By its path, since no folder of tests is a package.
_SPEC = importlib.util.spec_from_file_location(
    "how_pages_are_run", Path(__file__).parents[1] / "test_docs.py"
)
docs = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(docs)
package = docs.package


@pytest.mark.parametrize("page", docs.to_run(docs.PAGES_WITH_PLUGINS), ids=docs.name)
def test_page_shows_what_the_code_gives(page, package):
    docs.run_page(page, package)


def test_pictures_are_what_their_script_draws(tmp_path):
    script = docs.ROOT / "docs/figures.py"
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True)
    drawn = sorted(tmp_path.iterdir())
    assert len(drawn) == 11
    for picture in drawn:
        committed = docs.IMAGES / picture.name
        assert texts(picture) == texts(committed), f"{committed}: run docs/figures.py again"


def texts(picture):
    """Return the words, numbers and colours of a picture, and not its curves.

    Curves may differ in their last digits.
    """
    svg = picture.read_text(encoding="utf-8")
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg), re.findall(r"#[0-9a-f]{6}\b", svg)
