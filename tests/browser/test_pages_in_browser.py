"""The pages of the documentation as a browser shows them; `tox run -e docs` builds them first."""

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from browsing import DESKTOP, PHONE

SITE = Path(__file__).parents[2] / "docs/_build/html"
PAGES = sorted(
    str(path.relative_to(SITE))
    for path in SITE.rglob("*.html")
    if path.name not in ("genindex.html", "py-modindex.html", "search.html")
)
# Of what is wider than the screen, the parts that do not scroll by themselves.
TOO_WIDE = """() => {
    const scrolls = e => e.closest("article") && (
        ["auto", "scroll"].includes(getComputedStyle(e).overflowX)
        || scrolls(e.parentElement));
    // What MathJax hides is for those who listen.
    return [...document.querySelectorAll("article *")]
        .filter(e => !e.closest("mjx-assistive-mml"))
        .filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !scrolls(e))
        .map(e => e.tagName + " " + e.textContent.slice(0, 60));
}"""
BROKEN_PICTURES = """() => [...document.images]
    .filter(image => !(image.complete && image.naturalWidth > 0)).map(image => image.src)"""
# Formulas that MathJax has not set, or could not read.
BROKEN_FORMULAS = """() => [
    ...[...document.querySelectorAll(".math")].filter(e => !e.querySelector("mjx-container")),
    ...document.querySelectorAll("mjx-merror, [data-mjx-error]"),
].map(e => e.textContent)"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address():
    handler = partial(Quiet, directory=str(SITE))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(
    scope="module",
    params=[(PHONE, "light"), (DESKTOP, "dark")],
    ids=["phone-light", "desktop-dark"],
)
def screen(request, browser):
    """A page on a screen, with what it asks for and complains of."""
    viewport, colours = request.param
    page = browser.new_context(viewport=viewport, color_scheme=colours).new_page()
    page.asked_for, page.complaints = [], []
    page.on("request", lambda asked: page.asked_for.append(asked.url))
    page.on("response", lambda r: r.ok or r.status == 304 or page.complaints.append(r.url))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    yield page
    page.context.close()


def show(screen, address, path):
    screen.asked_for.clear()
    screen.complaints.clear()
    screen.goto(f"{address}/{path}")
    screen.evaluate("() => window.MathJax?.startup?.promise")
    return screen


def test_the_pages_are_there():
    assert len(PAGES) > 20, "tox run -e docs builds them"


@pytest.mark.parametrize("path", PAGES)
def test_page_is_whole(screen, address, path):
    page = show(screen, address, path)
    assert page.complaints == []
    assert [url for url in page.asked_for if not url.startswith((address, "data:"))] == []
    assert page.evaluate(BROKEN_PICTURES) == []
    assert page.evaluate(BROKEN_FORMULAS) == []
    assert page.evaluate(TOO_WIDE) == []
    assert page.evaluate("document.documentElement.scrollWidth") == page.viewport_size["width"]


def test_formulas_are_set(screen, address):
    page = show(screen, address, "explanation/combinations.html")
    assert page.locator("mjx-container").count() > 100


def test_a_broken_formula_is_found(screen, address):
    page = show(screen, address, "explanation/combinations.html")
    page.evaluate(
        """() => {
            const formula = document.querySelector(".math");
            formula.textContent = "\\\\(\\\\frac{1}\\\\)";
            return MathJax.typesetPromise([formula]);
        }"""
    )
    assert page.evaluate(BROKEN_FORMULAS)


def test_what_is_too_wide_is_found(screen, address):
    page = show(screen, address, "index.html")
    page.evaluate("document.querySelector('article p').style.width = '3000px'")
    assert page.evaluate(TOO_WIDE)


def test_is_dark_where_that_is_wanted(screen, address):
    page = show(screen, address, "index.html")
    background = "getComputedStyle(document.body).backgroundColor"
    found = []
    for colours in ("light", "dark"):
        page.emulate_media(color_scheme=colours)
        found.append(page.evaluate(background))
    assert found == ["rgb(255, 255, 255)", "rgb(19, 20, 22)"]


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_a_drawing_has_the_colours_of_the_page(screen, address, colours):
    screen.emulate_media(color_scheme=colours)
    page = show(screen, address, "explanation/combinations.html")
    shown = page.evaluate(
        "[...document.querySelectorAll('article img')]"
        ".filter(image => image.getBoundingClientRect().width > 0).map(image => image.src)"
    )
    assert len(shown) == 3
    assert all(src.endswith("-dark.svg") == (colours == "dark") for src in shown)


def test_a_picture_without_a_dark_version_is_on_white(screen, address):
    screen.emulate_media(color_scheme="dark")
    page = show(screen, address, "examples/docking.html")
    backgrounds = page.evaluate(
        "[...document.querySelectorAll('article img')]"
        ".map(image => getComputedStyle(image).backgroundColor)"
    )
    assert backgrounds == ["rgb(255, 255, 255)"] * 2


def test_head_and_first_column_of_the_matrix_stay(screen, address):
    page = show(screen, address, "explanation/mistakes.html")
    box = page.locator(".table-wrapper").filter(has=page.locator("table.matrix"))
    box.scroll_into_view_if_needed()
    outer = box.bounding_box()
    assert outer["height"] < screen.viewport_size["height"]
    box.evaluate("e => e.scrollTo(200, 2000)")
    assert box.evaluate("e => [e.scrollLeft, e.scrollTop]") == [200, 2000]
    outer = box.bounding_box()
    head = page.locator("table.matrix thead th")
    for place, (edge, cell) in {
        "first head": ("both", head.first),
        "last head": ("y", head.last),
        "first column": ("x", page.locator("table.matrix tbody tr").nth(150).locator("td").first),
    }.items():
        inner = cell.bounding_box()
        for axis in ("x", "y") if edge == "both" else edge:
            assert inner[axis] == pytest.approx(outer[axis], abs=2), place
    # What lies under the corner does not show through.
    at = [outer["x"] + 10, outer["y"] + 10]
    top = page.evaluate("([x, y]) => document.elementFromPoint(x, y).closest('th')?.innerText", at)
    assert top == "mistake"
