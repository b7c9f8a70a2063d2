"""The tables that notebooks show are valid HTML, and say what the text says."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser

import pytest
from installed import write_distribution

from mtenn_core import Combination, Estimate, ModeCost, MultiPoseModel, Policy, Registry
from mtenn_core._process.html_table import html_table
from mtenn_core.testing import Record, Report

HOSTILE = "<script>alert('1')</script> & \"quoted\" \x1b[31m \u202e"
HOSTILE_AS_SHOWN = "<script>alert('1')</script> & \"quoted\" \\x1b[31m \\u202e"


class Document(HTMLParser):
    """The tags, texts and rows of HTML. Every tag that is opened must be closed, in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.paragraphs: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.open.append(tag)
        assert "color" not in str(attributes).replace("color: inherit", "")
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "p":
            self.paragraphs.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open[-1] == "p":
            self.paragraphs[-1] += text
        else:
            assert self.open[-1] in ("td", "th"), f"{text!r} is in no cell"
            self.rows[-1][-1] += text

    @property
    def words(self) -> list[str]:
        """All words of the paragraphs and cells."""
        cells = [cell for row in self.rows for cell in row]
        return " ".join([*self.paragraphs, *cells]).split()


def shown(value: object) -> Document:
    document = Document(value._repr_html_())
    assert document.tags <= {"div", "p", "table", "thead", "tbody", "tr", "th", "td"}
    return document


class Mean(Combination):
    def combine(self, predictions):
        return predictions.mean()


def test_text_is_escaped_and_control_characters_are_visible():
    document = Document(html_table(HOSTILE, [HOSTILE], [[HOSTILE]], [HOSTILE]))
    assert "script" not in document.tags
    assert document.paragraphs == [HOSTILE_AS_SHOWN] * 2
    assert document.rows == [[HOSTILE_AS_SHOWN]] * 2


def test_an_estimate_has_the_words_of_its_text(pose_model, poses):
    estimate = MultiPoseModel(pose_model, Mean()).estimate(poses)
    document = shown(estimate)
    assert document.words == str(estimate).split()
    assert [row[0] for row in document.rows] == ["gradients", "graph", "stored", "recomputed"]


def test_the_text_of_an_estimate_is_aligned():
    modes = (ModeCost("graph", 1, 1, 2_000_000), ModeCost("stored", 12, 12, 300))
    estimate = Estimate(3, 2, 1500, 80, None, modes, "stored")
    assert str(estimate).splitlines() == [
        "3 poses, 2 with a weight that is not zero; the graph of one: 1.5 kB; parameters: 80 B",
        "gradients     forwards  backwards    memory",
        "graph                1          1      2 MB",
        "stored              12         12     300 B  <- take this",
    ]


FAILED = Record("C1", "a title", "full", "fail", "found\n  1, not 2", "a <cause>", repro="again -c")
PASSED = [Record(each, "a title", "full", "pass") for each in ("A1", "A2")]
ADVICE = Record("D4", "precision", "full", "advice", "a hazard", "convert", is_advice=True)
SKIPPED = Record("C3", "a title", "full", "skip", "it has none")


@pytest.mark.parametrize(
    "records",
    [[], PASSED, [*PASSED, SKIPPED], [*PASSED, FAILED], [FAILED, ADVICE, SKIPPED, *PASSED]],
    ids=["no record", "passed", "passed and skipped", "failed", "all"],
)
def test_a_report_has_the_words_of_its_text(records):
    report = Report("mean", "Mean()", records=records, n_expected=len(records))
    document = shown(report)
    head = ["status", "check"] if document.rows else []
    assert sorted(document.words) == sorted([*head, *str(report).split()])


def test_a_report_from_hostile_code_is_escaped():
    record = Record("C1", "a title", "full", "error", HOSTILE, repro=HOSTILE)
    document = shown(Report(HOSTILE, HOSTILE, records=[record], n_expected=1))
    assert document.paragraphs[0].startswith(f"{HOSTILE_AS_SHOWN}, {HOSTILE_AS_SHOWN}: failed")
    assert document.rows[1][2].count(HOSTILE_AS_SHOWN) == 2


def test_a_registry_lists_its_combinations_and_imports_none(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    write_distribution(
        tmp_path, "notebook-demo", {"rule": "notebook_demo:Good"}, "raise SystemExit"
    )
    registry = Registry()
    registry.register("own", Mean)
    document = shown(registry)
    assert document.rows[0] == ["name", "distribution", "version", "class"]
    assert ["rule", "notebook-demo", "1.0", "notebook_demo:Good"] in document.rows
    target = f"{Mean.__module__}:{Mean.__qualname__}"
    assert ["own", "registered here", "", target] in document.rows
    assert [row[0] for row in document.rows[1:]] == registry.names()
    assert "notebook_demo" not in sys.modules


@pytest.mark.parametrize("strict", [False, True])
def test_a_registry_lists_its_problems(strict, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("notebook-one", "notebook-two"):
        write_distribution(tmp_path, name, {"same": "notebook_one:Good"})
    registry = Registry(policy=Policy(strict=strict))
    (problem,) = (each for each in registry.problems() if "'same'" in each.message)
    assert f"{problem.kind}: {problem.message}" in shown(registry).paragraphs


def test_an_empty_registry_and_a_malformed_setting_are_shown(monkeypatch):
    registry = Registry("no.such.group")
    assert shown(registry).words == ["Registry('no.such.group'):", "no", "combinations"]
    monkeypatch.setenv("MTENN_STRICT", "<perhaps>")
    title, error = shown(Registry(policy=Policy())).paragraphs
    assert title == "Registry('mtenn.combinations')"
    assert re.search(r"MTENN_STRICT.*<perhaps>", error)
