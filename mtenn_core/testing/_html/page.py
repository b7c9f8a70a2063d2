"""Reports as one HTML page that loads no other files."""

from __future__ import annotations

import itertools
import math
import platform
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.resources import files
from typing import Any

import torch

from mtenn_core import __version__
from mtenn_core.errors import MtennError
from mtenn_core.testing._report import Record, Report

# Each status also has a sign, because not everybody can distinguish the colors.
SIGNS = {
    "pass": "✓",
    "fail": "✗",
    "error": "!",
    "inconclusive": "?",
    "advice": "→",
    "skip": "–",
    "xfail": "✓",
    "xpass": "?",
}


def render(reports: Sequence[Report]) -> str:
    """Return a page with the results of the checks and plots of the gradients.

    Styles and plots are part of the page. The page can be encoded as UTF-8, although the text of a
    plugin may contain other characters.

    Parameters
    ----------
    reports : the reports, in the order on the page

    Raises
    ------
    MtennError : matplotlib or Jinja2 is not installed
    """
    jinja2, plots = _import_optional()
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(FILTERS)
    source = files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8")
    page = environment.from_string(source).render(
        reports=reports,
        plots=[plots(report.curves, f"report-{n}") for n, report in enumerate(reports, 1)],
        signs=SIGNS,
        made_with={
            "mtenn-core": __version__,
            "torch": torch.__version__,
            "Python": platform.python_version(),
        },
        date=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )
    return str(page.encode(errors="backslashreplace").decode())


def _import_optional() -> tuple[Any, Any]:
    """Import the packages that only this page needs."""
    try:
        import jinja2

        from mtenn_core.testing._html.plots import plots
    except ImportError as error:
        raise MtennError(
            f"an HTML report needs matplotlib and Jinja2; found: {error}. Install them with:"
            ' pip install "mtenn-core[html]"'
        ) from error
    return jinja2, plots


def _groups(report: Report) -> list[tuple[str, list[Record], bool]]:
    """Return groups of records, failures first: heading, records, and True to unfold the group."""

    def with_status(*statuses: str) -> list[Record]:
        return [r for r in report.records if r.status in statuses]

    groups = [
        ("Failed", report.failures, True),
        ("Passed with advice", report.advice, True),
        ("Expected to fail", with_status("xfail", "xpass"), True),
        ("Passed", with_status("pass"), False),
        ("Does not apply", with_status("skip"), False),
    ]
    return [group for group in groups if group[1]]


def _fact_text(value: Any, name: str) -> str:
    """Return a declared fact as text. In a report from JSON, infinite ends of a domain are None."""
    if name == "domain":
        ends = zip((-math.inf, math.inf), value, strict=True)
        return " to ".join(_value_text(default if end is None else end) for default, end in ends)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return _value_text(value)


def _metrics_text(metrics: Mapping[str, Any]) -> str:
    return "; ".join(f"{name}: {_value_text(value)}" for name, value in metrics.items())


def _value_text(value: Any) -> str:
    """Return a value as text, with three digits of each float."""
    if value is None:
        return "no number"
    if isinstance(value, float):
        return f"{value:.3g}".replace("inf", "∞").replace("-", "−")
    if isinstance(value, list | tuple):
        return ", ".join(map(_value_text, value)) or "none"
    return str(value)


def _arguments_text(combination: str) -> str:
    """Return the ``repr`` of a combination in one line, without the modules that it contains."""
    lines = combination.split("\n")
    if len(lines) == 1:
        return combination
    own = itertools.takewhile(lambda line: not re.match(r"\s*\(\w+\): ", line), lines)
    return " ".join(map(str.strip, own)).removesuffix(" )").replace("( ", "(") + ")"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}" if seconds >= 0.01 else f"{1e3 * seconds:.1f}"


FILTERS = {
    "arguments": _arguments_text,
    "fact": _fact_text,
    "groups": _groups,
    "metrics": _metrics_text,
    "milliseconds": _milliseconds,
}
