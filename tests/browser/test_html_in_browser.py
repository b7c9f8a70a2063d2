"""The page as a browser shows it."""

import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from browsing import DESKTOP, PHONE

from mtenn_core import Combination
from mtenn_core.testing import Report, check_combination
from mtenn_core.testing._html.page import render

EVIL = "</pre><script>document.title = 'owned'</script><img src=x onerror='document.title = 1'>"
# Pairs of texts that lie on one another by more than a pixel, and texts that leave their picture.
MISPLACED_TEXTS = """() => [...document.querySelectorAll("svg")].flatMap(svg => {
    const outer = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll("text")].map(
        text => ({words: text.textContent, box: text.getBoundingClientRect()}));
    const outside = texts.filter(({box}) => box.left < outer.left - 1 || box.top < outer.top - 1
        || box.right > outer.right + 1 || box.bottom > outer.bottom + 1);
    const overlapping = texts.flatMap((a, i) => texts.slice(i + 1).filter(b =>
        Math.min(a.box.right, b.box.right) - Math.max(a.box.left, b.box.left) > 1
        && Math.min(a.box.bottom, b.box.bottom) - Math.max(a.box.top, b.box.top) > 1
    ).map(b => [a.words, b.words]));
    return [...outside.map(({words}) => words), ...overlapping];
})"""


class SmoothMax(Combination):
    def combine(self, predictions):
        return torch.logsumexp(predictions, dim=0)


class Off(SmoothMax):
    def pose_weights(self, predictions):
        return 1.001 * torch.softmax(predictions, dim=0)


class Overflowing(Combination):
    def combine(self, predictions):
        return torch.log(torch.exp(300 * predictions).sum()) / 300


class ManyPoses(SmoothMax):
    min_poses = 9


COMBINATIONS = (SmoothMax, Off, Overflowing, ManyPoses)


@pytest.fixture(scope="module")
def reports():
    return [check_combination(make, name=make.__name__) for make in COMBINATIONS]


@pytest.fixture(scope="module")
def url(reports, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    evil = Report(EVIL, EVIL, {"properties": [EVIL]}, n_expected=1)
    path.write_text(render([*reports, evil]), encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def show(browser, url):
    """Show the page, everything unfolded, and write down what it asks for and complains of."""
    contexts = []

    def show(viewport=DESKTOP, colours="light"):
        contexts.append(browser.new_context(viewport=viewport, color_scheme=colours))
        page = contexts[-1].new_page()
        page.requested, page.complaints = [], []
        page.on("request", lambda request: page.requested.append(request.url))
        page.on("console", lambda message: page.complaints.append(message.text))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.goto(url)
        page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
        return page

    yield show
    for context in contexts:
        context.close()


def test_loads_and_runs_nothing(show, url, reports):
    page = show()
    assert page.requested == [url]
    assert page.complaints == []
    n_passed = sum(report.passed for report in reports)
    assert page.title() == f"{n_passed} of 5 combinations passed"


@pytest.mark.parametrize("viewport", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_fits_the_screen(show, viewport):
    width = show(viewport).evaluate("document.documentElement.scrollWidth")
    assert width == viewport["width"]


@pytest.mark.parametrize("viewport", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_no_text_of_a_plot_covers_another(show, viewport):
    page = show(viewport)
    assert page.locator("svg").count() == 3 * len(COMBINATIONS)
    assert page.evaluate(MISPLACED_TEXTS) == []


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_is_accessible(show, colours):
    """Contrast of texts, heads of tables, descriptions of pictures, order of headings, and more."""
    results = Axe().run(show(colours=colours))
    assert results.violations_count == 0, results.generate_report()


def test_is_dark_where_that_is_wanted_but_not_on_paper(show):
    page = show(colours="dark")
    assert lightness(page, "body", "backgroundColor") < 50
    assert lightness(page, "svg text", "fill") > 200
    page.emulate_media(media="print")
    assert lightness(page, "body", "backgroundColor") == 255
    assert lightness(page, "svg text", "fill") < 50


def lightness(page, selector, attribute):
    colour = page.locator(selector).first.evaluate(f"e => getComputedStyle(e).{attribute}")
    return sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(","))) / 3


def test_a_click_selects_the_whole_line_for_the_shell(show, reports):
    page = show(PHONE)
    page.locator("#report-2 pre.again").first.click()
    assert page.evaluate("getSelection().toString()").strip() == reports[1].failures[0].repro


def test_the_table_leads_to_each_report(show):
    page = show(PHONE)
    page.get_by_role("link", name="ManyPoses").click()
    assert page.locator("#report-4 h2").evaluate("e => e.getBoundingClientRect().top") < 100
