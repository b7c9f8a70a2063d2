"""The page as text; tests/browser has it as a browser shows it."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import matplotlib
import pytest
import torch
from tiers import slow

from mtenn_core import Combination
from mtenn_core.errors import MtennError
from mtenn_core.testing import Record, Report, _runner, check_combination
from mtenn_core.testing._catalogue import chosen_checks
from mtenn_core.testing._html.curves import curves
from mtenn_core.testing._html.page import render
from mtenn_core.testing._probe.subject import Subject
from mtenn_core.testing._runner import _run

EVIL = "</pre><script>alert('&')</script><img src=x onerror=alert(1)>"

PLOTS = "plots take most of the time of a page"


class SmoothMax(Combination):
    def __init__(self, t=1.0):
        super().__init__()
        self.t = t

    def combine(self, predictions):
        return torch.logsumexp(self.t * predictions, dim=0) / self.t


class Off(SmoothMax):
    def pose_weights(self, predictions):
        return 1.001 * torch.softmax(self.t * predictions, dim=0)


class NoNumber(SmoothMax):
    def pose_weights(self, predictions):
        return predictions * math.nan


class Overflowing(SmoothMax):
    def combine(self, predictions):
        return torch.log(torch.exp(self.t * predictions).sum()) / self.t


class Huge(SmoothMax):
    def combine(self, predictions):
        return 1e300 * super().combine(predictions)


class Constant(Combination):
    def combine(self, predictions):
        return 0 * predictions.sum()


class Raising(Combination):
    def combine(self, predictions):
        raise RuntimeError("not today")


class ManyPoses(SmoothMax):
    min_poses = 9


class Positive(SmoothMax):
    domain = (0.0, math.inf)
    properties = frozenset({"permutation_invariant"})


def drawings(source):
    return re.findall(r"<svg.*?</svg>", source, flags=re.DOTALL)


class Page(HTMLParser):
    """What is on a page; fails if an element is not closed where it has to be."""

    VOID = ("meta",)

    def __init__(self, source):
        super().__init__()
        self.elements, self.text, self._open = [], "", []
        self.feed(source)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attrs for found, attrs in self.elements if found == tag]


def checked(combination):
    """Return the report of two checks, which are fast, with curves."""
    report = check_combination(combination, only=["C1", "D3"])
    report.curves.update(curves(lambda: Subject(combination, 0, thorough=True)))
    return report


def from_json(report):
    return Report.from_json(json.loads(json.dumps(report.to_json(), allow_nan=False)))


@pytest.fixture(scope="module")
def right():
    return checked(Positive(t=2.0))


@pytest.fixture(scope="module")
def off():
    return checked(Off())


@pytest.fixture
def plain(right):
    """A report without curves: plots take most of the time of a page."""
    return replace(right, curves={})


def record(status, **changes):
    plain = {"id": "C1", "title": "it holds", "level": "full"}
    plain |= {"seed": 7, "duration": 0.0123, "repro": "mtenn check it --only C1"}
    return Record(status=status, **plain | changes)


def test_the_page_shows_the_combination_the_level_and_the_versions(plain):
    text = Page(render([plain])).text
    for shown in (plain.name, plain.combination, plain.verdict, "0 to ∞", "permutation_invariant"):
        assert shown in text
    for shown in (f"torch {torch.__version__}", "Python 3.", "mtenn-core ", plain.suite_version):
        assert shown in text


def test_a_failure_is_unfolded_and_has_both_numbers_and_the_line_for_the_shell(off):
    page = Page(render([replace(off, curves={})]))
    assert off.failures[0].reason in page.text
    assert off.failures[0].repro in page.text
    assert ["open" in details for details in page.all("details")] == [True, False]


@pytest.mark.parametrize(
    "status", ["pass", "fail", "error", "inconclusive", "advice", "skip", "xfail", "xpass"]
)
def test_every_status_is_a_word_and_a_sign(plain, status):
    text = Page(render([replace(plain, records=[record(status, reason="so it is")])])).text
    assert re.search(rf"[✓✗!?→–] {status}\b", text)
    assert "so it is" in text


def test_failures_come_first(plain):
    records = [record("pass", id="A1"), record("fail", id="A2"), record("skip", id="A3")]
    text = Page(render([replace(plain, records=records)])).text
    assert text.index("A2") < text.index("A1") < text.index("A3")


@pytest.mark.parametrize(
    "change",
    [
        {"name": EVIL},
        {"combination": EVIL},
        {"level": EVIL},
        {"suite_version": EVIL},
        {"facts": {"properties": [EVIL], EVIL: True}},
        *(
            {"records": [record("fail", **{field: EVIL})]}
            for field in ("id", "title", "level", "reason", "cause", "repro")
        ),
        {"records": [record("fail", metrics={EVIL: EVIL})]},
    ],
    ids=str,
)
def test_the_text_of_a_plugin_is_not_markup(right, change):
    evil = replace(right, curves={}, **change)
    for reports in ([evil], [evil, evil]):
        page = Page(render(reports))
        assert EVIL in page.text
        assert not page.all("script")
        assert not page.all("img")


def test_text_that_is_not_unicode_can_be_written(plain):
    assert "\\ud800" in render([replace(plain, combination="\ud800")])


@pytest.mark.parametrize(
    "combination",
    [
        NoNumber(),
        Huge(),
        Constant(),
        ManyPoses(),
        *slow(SmoothMax(1000.0), Positive(), Overflowing(300.0), reason=PLOTS),
    ],
    ids=repr,
)
def test_any_numbers_can_be_drawn(combination):
    page = Page(render([checked(combination)]))
    assert len(page.all("svg")) == len(page.all("figcaption")) == 3
    assert all(svg["aria-label"] for svg in page.all("svg"))


@pytest.mark.parametrize(
    "combination", [NoNumber(), *slow(Overflowing(300.0), reason=PLOTS)], ids=repr
)
def test_a_report_from_json_has_the_same_plots(combination):
    report = checked(combination)
    assert drawings(render([from_json(report)])) == drawings(render([report]))


def test_metrics_are_short_and_may_be_infinite(plain):
    metrics = {"error": 1.23456e-7, "largest": math.inf, "lost": None, "ways": ["a", "b"], "n": 3}
    text = Page(render([replace(plain, records=[record("pass", metrics=metrics)])])).text
    assert "error: 1.23e−07; largest: ∞; lost: no number; ways: a, b; n: 3" in text


def test_the_domain_is_the_same_from_json(plain):
    assert "0 to ∞" in Page(render([from_json(plain)])).text


def test_plots_say_what_is_to_be_seen(off):
    weights, steps, _ = (svg["aria-label"] for svg in Page(render([off])).all("svg"))
    largest = float(re.search(r"Largest difference: (\S+),", weights)[1])
    assert 1e-4 < largest < 1e-3
    smallest = float(re.search(r"Smallest: (\S+),", steps)[1])
    assert 1e-5 < smallest < 1e-3
    assert "are not numbers" in render([checked(NoNumber())])


class WrongForManyPoses(SmoothMax):
    def pose_weights(self, predictions):
        weights = torch.softmax(self.t * predictions, dim=0)
        return weights if len(weights) < 5 else weights.flip(0)


class WrongColumn(Combination):
    pose_columns = ("affinity", "confidence")

    def combine(self, predictions):
        affinity, confidence = predictions.unbind(1)
        return (torch.softmax(confidence, 0) * affinity).sum()

    def pose_weights(self, predictions):
        affinity, confidence = predictions.unbind(1)
        p = torch.softmax(confidence, 0)
        return torch.stack([p, 1.01 * p * (affinity - (p * affinity).sum())], 1)


def curves_at_failure(combination):
    """Return the failed record of C1, and curves with the poses at which it failed."""
    failed = []
    subject = lambda: Subject(combination, 0, thorough=True)  # noqa: E731
    record = _run(chosen_checks("full", ["C1"])[0], subject, 0, "again", failed)
    return record, curves(subject, *failed)


def test_the_probe_that_failed_is_plotted_with_its_worst_weight():
    record, found = curves_at_failure(WrongForManyPoses())
    *usual, failed = found["weights"]
    assert "failed" not in usual[0]
    off = [abs(b - d) for b, d in zip(failed["backward"], failed["finite_difference"], strict=True)]
    worst = max(range(len(off)), key=off.__getitem__)
    assert off[worst] > 0.1
    assert f"of {len(off)}, predictions [{failed['predictions'][0]:.9g}" in record.reason
    for name in ("steps", "scan"):
        assert found[name]["entry"] == f"pose {worst}"
        assert found[name]["predictions"] == failed["predictions"]
    # The other probes have three poses, for which the weights are right.
    assert max(found["steps"]["error"]) > 0.1
    report = replace(check_combination(WrongForManyPoses(), only=["C1"]), curves=found)
    assert "failed probe" in drawings(render([report]))[0]


def test_a_whole_suite_plots_the_probe_that_failed(monkeypatch):
    monkeypatch.setattr(_runner, "chosen_checks", lambda level, only: chosen_checks("full", ["C1"]))
    found = check_combination(WrongForManyPoses()).curves
    assert [group.get("failed", False) for group in found["weights"]] == [False, False, True]


def test_a_right_combination_has_no_failed_probe(right):
    assert not any("failed" in group for group in right.curves["weights"])


def test_entries_of_vectors_are_labelled_with_pose_and_column():
    _, found = curves_at_failure(WrongColumn())
    assert re.fullmatch(r"pose \d, column 1 \(confidence\)", found["steps"]["entry"])
    report = replace(check_combination(WrongColumn(), only=["C1"]), curves=found)
    weights, steps, scan = drawings(render([report]))
    for drawing in (steps, scan):
        assert "column 1 (confidence)" in drawing
    labels = re.findall(r"<!--(.*?)-->|<text[^>]*>([^<]*)</text>", weights, flags=re.DOTALL)
    shown = " ".join(map("".join, labels))
    assert "column, pose, by the spread" in shown
    assert "pose 5" not in render([report])


def test_what_passed_is_folded(right):
    page = Page(render([replace(right, curves={}, records=[record("pass")])]))
    assert [details.get("open", "folded") for details in page.all("details")] == ["folded"]


def test_the_table_of_several_reports_has_only_arguments_of_the_constructor():
    class WithNetwork(SmoothMax):
        def __init__(self, t=1.0, name="a"):
            super().__init__(t)
            self.network = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh())

    report = check_combination(WithNetwork(2.0), only=["A2"])
    assert "Linear" in report.combination
    (code,) = {*re.findall(r"<code>(.*?)</code>", render([report, report]), flags=re.DOTALL)}
    assert code == "WithNetwork(t=2.0, name=&#39;a&#39;)"


def test_without_curves_there_are_no_plots(right):
    for curves_ in ({}, {"weights": [], "steps": {}, "scan": {}}):
        page = Page(render([replace(right, curves=curves_)]))
        assert not page.all("svg")
        assert "No plots" in page.text
    assert "not today" in Page(render([checked(Raising())])).text


def test_several_reports_have_a_table_that_links_to_each(right, off):
    page = Page(render([right, off, off]))
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(set(ids)) == len(ids)
    links = [attrs["href"] for attrs in page.all("a")]
    assert links == ["#report-1", "#report-2", "#report-3"]
    referred = {attrs["xlink:href"][1:] for attrs in page.all("use")}
    referred |= set(re.findall(r"url\(#(\w+)\)", str(page.elements)))
    assert referred | {link[1:] for link in links} <= set(ids)
    assert "1 of 3 combinations passed" in page.text


def test_a_page_may_have_no_reports():
    assert "0 of 0 combinations passed" in Page(render([])).text


def test_the_page_loads_no_files(right, off):
    source = render([right, off])
    page = Page(source)
    assert "://" not in source
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "link", "img", "iframe"})
    assert not re.search(r"@import|url\((?!#)|src=", source)


def test_settings_of_matplotlib_have_no_effect_and_do_not_change(right):
    with matplotlib.rc_context({"text.usetex": True, "svg.fonttype": "path", "font.size": 40}):
        before = dict(matplotlib.rcParams)
        odd, after = drawings(render([right])), dict(matplotlib.rcParams)
    assert after == before
    assert odd == drawings(render([right]))


def test_imports_matplotlib_when_it_draws_and_never_pyplot():
    code = """
import sys
from mtenn_core.testing import check_combination
from mtenn_core.testing._html.page import render
assert "matplotlib" not in sys.modules
render([])
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("missing", ["matplotlib", "jinja2"])
def test_an_error_names_the_packages_to_install(right, monkeypatch, missing):
    monkeypatch.delitem(sys.modules, "mtenn_core.testing._html.plots", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MtennError, match=rf'{missing}.* pip install "mtenn-core\[html\]"'):
        render([right])
