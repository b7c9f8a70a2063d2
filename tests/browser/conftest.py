"""A headless browser for all tests here."""

import os
import shutil

import pytest
from playwright.sync_api import sync_playwright

INSTALLED = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# No sandbox: root has none, and there is nothing but our own pages. No look-ups of its own either.
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


def browser_path():
    found = [os.environ.get("MTENN_TEST_BROWSER"), *map(shutil.which, INSTALLED)]
    path = next(filter(None, found), None)
    if path is None:
        pytest.fail(
            f"found none of {', '.join(INSTALLED)}: install one (Debian: apt-get install chromium),"
            " or set MTENN_TEST_BROWSER to the path of a Chromium"
        )
    return path


@pytest.fixture(scope="session")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path(), args=ARGUMENTS)
        yield browser
        browser.close()
