"""Reports as one HTML page that needs nothing beside itself."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.resources import files
from typing import Any

import torch

from mtenn_core import __version__
from mtenn_core.errors import MtennError
from mtenn_core.testing._report import Record, Report

# A sign of its own for each status: colour alone does not reach everybody.
SIGNS = {
    "pass": "✓",
    "fail": "✗",
    "error": "!",
    "inconclusive": "?",
    "skip": "–",
    "xfail": "✓",
    "xpass": "?",
}


def render(reports: Sequence[Report]) -> str:
    """Return a page that shows what the checks found, with plots of the gradients.

    It loads nothing: styles and plots are part of it. It encodes to UTF-8, whatever a plugin says
    of itself.

    Parameters
    ----------
    reports : in the order in which to show them

    Raises
    ------
    MtennError : matplotlib or Jinja2 is not installed
    """
    jinja2, plots = _extra()
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


def _extra() -> tuple[Any, Any]:
    """Import what only this page needs."""
    try:
        import jinja2

        from mtenn_core.testing._html.plots import plots
    except ImportError as error:
        raise MtennError(
            f"an HTML report needs matplotlib and Jinja2: {error}; install them with"
            ' pip install "mtenn-core[html]"'
        ) from error
    return jinja2, plots


def _groups(report: Report) -> list[tuple[str, list[Record], bool]]:
    """Return the records under headings, what failed first, and whether to unfold them."""
    rest = [record for record in report.records if not record.failed]
    groups = [
        ("Failed", report.failures, True),
        ("Expected to fail", [r for r in rest if r.status in ("xfail", "xpass")], True),
        ("Passed", [r for r in rest if r.status == "pass"], not report.failures),
        ("Does not apply", [r for r in rest if r.status == "skip"], False),
    ]
    return [group for group in groups if group[1]]


def _fact(value: Any, name: str) -> str:
    """Return a declared fact as text; in a report from JSON, infinite ends of a domain are None."""
    if name == "domain":
        ends = zip((-math.inf, math.inf), value, strict=True)
        return " to ".join(_shown(default if end is None else end) for default, end in ends)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return _shown(value)


def _metrics(metrics: Mapping[str, Any]) -> str:
    return "; ".join(f"{name}: {_shown(value)}" for name, value in metrics.items())


def _shown(value: Any) -> str:
    """Return three digits of a float, or of each in a list."""
    if value is None:
        return "no number"
    if isinstance(value, float):
        return f"{value:.3g}".replace("inf", "∞").replace("-", "−")
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value)) or "none"
    return str(value)


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}" if seconds >= 0.01 else f"{1e3 * seconds:.1f}"


FILTERS = {"fact": _fact, "groups": _groups, "metrics": _metrics, "milliseconds": _milliseconds}
