"""The pages that need plugins: as tests/test_docs.py, which says how a page is run."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

# By its path, since no folder of tests is a package.
_SPEC = importlib.util.spec_from_file_location(
    "how_pages_are_run", Path(__file__).parents[1] / "test_docs.py"
)
docs = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(docs)
package = docs.package


@pytest.mark.parametrize("page", docs.PAGES_WITH_PLUGINS, ids=docs.name)
def test_page_shows_what_the_code_gives(page, package):
    docs.run_page(page, package)
