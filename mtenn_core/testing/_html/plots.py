"""Plots of a report as inline SVG, drawn with matplotlib."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import matplotlib
import matplotlib.style
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
# A function that draws numbers of a report, and returns title, finding and explanation (see Plot).
Draw = Callable[[Figure, Any], tuple[str, str, str]]

# Placeholders for the CSS variables of the page, which differ between light and dark mode.
INK, BACKWARD, DIFFERENCES = "#010101", "#010102", "#010103"
VARIABLES = {INK: "var(--ink)", BACKWARD: "var(--backward)", DIFFERENCES: "var(--differences)"}
STYLE = {
    "axes.edgecolor": INK,
    "axes.formatter.useoffset": False,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "savefig.transparent": True,
    "svg.fonttype": "none",  # text that can be searched and copied
    "xtick.color": INK,
    "ytick.color": INK,
}
SIZE = (4.0, 3.3)  # inches; about as wide as the screen of a phone
# Limits of a logarithmic axis. Zero is drawn at the lower limit.
LOWEST, HIGHEST = 1e-17, 1e17
# This range is always visible. Otherwise, roundoff and an error could look the same.
REFERENCE_RANGE = np.array([1e-13, 0.1])
# Fields that matplotlib would write into each picture.
METADATA = ("Creator", "Date", "Format", "Type")
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class Plot(NamedTuple):
    """A plot with its texts.

    Attributes
    ----------
    title : what the plot shows
    svg : an element for a page that defines the colors in ``VARIABLES``
    finding : the result as a sentence; may be empty
    explanation : how to read the plot
    """

    title: str
    svg: Markup
    finding: str
    explanation: str


def plots(curves: dict[str, Any], prefix: str) -> list[Plot]:
    """Draw the numbers of a report.

    Parameters
    ----------
    curves : see :func:`mtenn_core.testing._html.curves.curves`
    prefix : prefix of the ids in these plots, unique on the page
    """
    # after_reset: ignore the user's settings of matplotlib. This module does not import pyplot,
    # because pyplot would add windows and global state.
    with matplotlib.style.context(STYLE, after_reset=True):
        return [
            _plot(draw, curves[name], f"{prefix}-{name}")
            for name, draw in DRAWN.items()
            if curves.get(name)
        ]


def _plot(draw: Draw, curve: Any, salt: str) -> Plot:
    figure = Figure(figsize=SIZE)
    title, finding, explanation = draw(figure, curve)
    return Plot(title, _svg(figure, f"{title}. {finding}", salt), finding, explanation)


def _draw_weights(figure: Figure, groups: list[dict[str, Any]]) -> tuple[str, str, str]:
    backward, differences, errors = (
        np.concatenate([_array(group[key]) for group in groups])
        for key in ("backward", "finite_difference", "error")
    )
    places = _places(groups)
    top, bottom = _panels(figure)
    top.bar(places, differences, color=DIFFERENCES, alpha=0.4, label="finite difference")
    # The bars are limited, because larger bars would make the weights invisible.
    uncertainty = np.fmin(errors, 1)
    top.errorbar(places, differences, uncertainty, fmt="none", ecolor=DIFFERENCES, capsize=3)
    top.plot(places, backward, "o", color=BACKWARD, markersize=5, label="backward")
    top.axhline(0, color=INK, linewidth=0.8)
    top.set_ylabel("pose weight ∂h/∂ŷ")
    _mark_missing(top, places, backward)
    _legend(figure, top)
    off = np.abs(backward - differences)
    _draw_differences(bottom, places, off, errors)
    _label_poses(bottom, places, groups)
    return (
        "Pose weights",
        _largest_difference(off, errors),
        "In the upper plot, each dot should be at the end of its bar. The lower plot shows the"
        " difference as a dot, and the uncertainty of the finite difference as a bar. A dot far"
        " above its bar is a wrong weight.",
    )


def _draw_differences(axes: Axes, places: Numbers, off: Numbers, errors: Numbers) -> None:
    shown, bars = _visible(off), _visible(errors)
    _logarithmic(axes, "y", np.concatenate([shown, bars, REFERENCE_RANGE]), n_ticks=4)
    floor = axes.get_ylim()[0]
    axes.bar(places, bars - floor, bottom=floor, color=DIFFERENCES, alpha=0.4)
    axes.plot(places, shown, "o", color=BACKWARD, markersize=5)
    axes.set_ylabel("|difference|")


def _draw_steps(figure: Figure, curve: dict[str, Any]) -> tuple[str, str, str]:
    steps, errors = _array(curve["step"]), _array(curve["error"])
    axes = figure.subplots()
    _logarithmic(axes, "x", steps)
    _logarithmic(axes, "y", np.concatenate([_visible(errors), REFERENCE_RANGE]))
    axes.plot(steps, _visible(errors), "o-", color=BACKWARD, markersize=3.5, linewidth=1.2)
    axes.set(xlabel="step (kT)", ylabel="|finite difference − backward|")
    finding = "None of the differences is a number."
    if np.isfinite(errors).any():
        best = int(np.nanargmin(errors))
        finding = f"Smallest: {_short(errors[best])}, with a step of {_short(steps[best])} kT."
    return (
        f"Error over step, {curve['entry']}",
        finding,
        "A correct gradient gives a V: the error decreases with the step until roundoff increases"
        " it again. If the value is linear, there is only roundoff. A wrong gradient gives a flat"
        " line; its height is the error of the gradient.",
    )


def _draw_scan(figure: Figure, curve: dict[str, Any]) -> tuple[str, str, str]:
    along, values = _array(curve["prediction"]), _array(curve["value"])
    at, slopes = _array(curve["backward_at"]), _array(curve["backward"])
    top, bottom = _panels(figure)
    top.plot(along, values, color=DIFFERENCES, linewidth=1.2, label="value, its differences")
    _widen(top)
    top.add_collection(_tangents(top, at, np.interp(at, along, values), slopes))
    top.set_ylabel("value (kT)")
    _mark_missing(top, along, values)
    _legend(figure, top)
    bottom.axhline(0, color=INK, linewidth=0.5)
    middles = (along[1:] + along[:-1]) / 2
    bottom.plot(middles, np.diff(values) / np.diff(along), color=DIFFERENCES, linewidth=1.2)
    bottom.plot(at, slopes, "o", color=BACKWARD, markersize=3.5)
    _mark_missing(bottom, at, slopes)
    bottom.set(xlabel=f"prediction of {curve['entry']} (kT)", ylabel="slope")
    return (
        f"Value over the prediction of {curve['entry']}",
        _missing(np.concatenate([values, slopes])),
        "The other predictions are fixed. Each short line should be tangent to the curve, and each"
        " dot should be on the line in the lower plot.",
    )


DRAWN: dict[str, Draw] = {"weights": _draw_weights, "steps": _draw_steps, "scan": _draw_scan}


def _panels(figure: Figure) -> tuple[Axes, Axes]:
    top, bottom = figure.subplots(2, sharex=True, height_ratios=[3, 2])
    top.tick_params(axis="x", length=0)
    return top, bottom


def _legend(figure: Figure, axes: Axes) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=2)


def _mark_missing(axes: Axes, places: Numbers, values: Numbers) -> None:
    missing = places[np.isnan(values)]
    at_bottom = axes.get_xaxis_transform()
    heights = np.full(len(missing), 0.05)
    axes.plot(missing, heights, "x", color=BACKWARD, markersize=4, transform=at_bottom)


def _widen(axes: Axes) -> None:
    """Widen the y axis of a curve that is flat except for roundoff, so that it looks flat."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    if high - low < (margin := 1e-3 * (right - left)):
        axes.set_ylim(low - margin, high + margin)


def _tangents(axes: Axes, x: Numbers, y: Numbers, slopes: Numbers) -> LineCollection:
    """Return short tangents that have equal length on the screen."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    aspect = (high - low) / (right - left)
    dx = 0.03 * (right - left) / np.hypot(1, slopes / aspect)
    segments = np.stack([x - dx, y - slopes * dx, x + dx, y + slopes * dx], axis=1)
    return LineCollection(
        list(segments.reshape(-1, 2, 2)), colors=BACKWARD, linewidths=2, label="slope of backward"
    )


def _places(groups: Sequence[dict[str, Any]]) -> Numbers:
    """Return the x position of each pose, with a gap between the groups."""
    sizes = [len(group["backward"]) for group in groups]
    gaps = np.repeat(np.arange(len(sizes)), sizes)
    return np.arange(sum(sizes)) + 1.0 * gaps


def _label_poses(axes: Axes, places: Numbers, groups: Sequence[dict[str, Any]]) -> None:
    """Label each weight with its pose; with columns, in two lines, with its column and its pose."""
    labels: list[str] = []
    n_columns = groups[0]["n_columns"] or 1
    for group in groups:
        n_entries = len(group["backward"])
        few = n_entries <= 6 * n_columns
        poses = [
            str(entry // n_columns) if few and not entry % n_columns else ""
            for entry in range(n_entries)
        ]
        names = poses
        if groups[0]["n_columns"]:
            columns = [
                str(entry % n_columns) if n_entries <= 8 else "" for entry in range(n_entries)
            ]
            names = [f"{column}\n{pose}" for column, pose in zip(columns, poses, strict=True)]
        what = f"spread {np.ptp(_array(group['predictions'])):.1g} kT"
        names[n_entries // 2] += "\nfailed probe" if group.get("failed") else f"\n{what}"
        labels += names
    axes.set_xticks(places, labels)
    axes.tick_params(axis="x", length=0)
    above = "column, pose" if groups[0]["n_columns"] else "pose"
    axes.set_xlabel(f"{above}, by the spread of the predictions")


def _largest_difference(off: Numbers, errors: Numbers) -> str:
    missing = _missing(off)
    if not np.isfinite(off).any():
        return missing
    worst = int(np.nanargmax(off))
    largest = f"Largest difference: {_short(off[worst])}, uncertain by {_short(errors[worst])}."
    return f"{largest} {missing}".rstrip()


def _missing(numbers: Numbers) -> str:
    n_missing = int(np.isnan(numbers).sum())
    return f"{n_missing} of {len(numbers)} are not numbers (×)." if n_missing else ""


def _short(number: float) -> str:
    if math.isnan(number):
        return "an unknown amount"
    return f"{number:.1e}" if number else "0"


def _array(numbers: Sequence[float | None]) -> Numbers:
    """Return the numbers as an array. None (null in JSON) and infinite values become NaN."""
    array = np.array(numbers, dtype=np.float64)
    return np.where(np.isfinite(array), array, np.nan).clip(-HIGHEST, HIGHEST)


def _visible(numbers: Numbers) -> Numbers:
    return numbers.clip(LOWEST, HIGHEST)


def _logarithmic(axes: Axes, which: Literal["x", "y"], numbers: Numbers, n_ticks: int = 7) -> None:
    """Make an axis logarithmic, with ticks at powers of ten and limits around the numbers."""
    exponents = np.log10(numbers[np.isfinite(numbers)])
    low, high = (exponents.min(), exponents.max()) if len(exponents) else (-1.0, 0.0)
    limits = (10.0 ** math.floor(low - 0.3), 10.0 ** math.ceil(high + 0.3))
    axes.set(**{f"{which}scale": "log", f"{which}lim": limits})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(numticks=n_ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(_power))


def _power(value: float, _position: int) -> str:
    return "10" + f"{math.log10(value):.0f}".translate(SUPERSCRIPT)


def _svg(figure: Figure, description: str, salt: str) -> Markup:
    """Return the figure as an SVG element. Its ids depend on ``salt``."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(METADATA))
    # Remove the XML header and the first <defs>, because its style would apply to the whole page.
    drawing = buffer.getvalue().partition("</defs>")[2]
    # Remove the ids of groups. They are the same in every figure, and nothing refers to them.
    drawing = re.sub(r'<g id="[^"]*"', "<g", drawing)
    for color, variable in VARIABLES.items():
        drawing = drawing.replace(color, variable)
    width, height = (72 * inches for inches in figure.get_size_inches())
    opening = '<svg role="img" aria-label="{}" viewBox="0 0 {:g} {:g}">'
    return Markup(opening).format(description, width, height) + Markup(drawing)
