"""Plots of a report as inline SVG, drawn by matplotlib."""

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
# Draws numbers of a report; returns title, finding and reading, as Plot has them.
Draw = Callable[[Figure, Any], tuple[str, str, str]]

# Colours that stand for the page's own, which differ between light and dark.
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
    "svg.fonttype": "none",  # text as text, to be searched and copied
    "xtick.color": INK,
    "ytick.color": INK,
}
SIZE = (4.0, 3.3)  # inches; about as wide as the screen of a phone
# On a logarithmic axis zero has to be somewhere, too: it is drawn as the least that is.
LEAST, MOST = 1e-17, 1e17
# Always in view, so that right and wrong gradients do not look alike on different scales.
USUAL = np.array([1e-13, 0.1])
# What matplotlib would say of itself in each picture.
METADATA = ("Creator", "Date", "Format", "Type")
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class Plot(NamedTuple):
    """A picture with its words.

    Attributes
    ----------
    svg : an element, to be put into a page that has the colours of ``VARIABLES``
    finding : what is to be seen, as a sentence; may be empty
    reading : how to read it
    """

    title: str
    svg: Markup
    finding: str
    reading: str


def plots(curves: dict[str, Any], prefix: str) -> list[Plot]:
    """Draw the numbers of a report (:mod:`mtenn_core.testing._html.curves`).

    Parameters
    ----------
    prefix : what the ids in these plots have and those of other reports on the page have not
    """
    # As matplotlib comes, whatever its user has set; pyplot would add windows and global state.
    with matplotlib.style.context(STYLE, after_reset=True):
        return [
            _plot(draw, curves[name], f"{prefix}-{name}")
            for name, draw in DRAWN.items()
            if curves.get(name)
        ]


def _plot(draw: Draw, curve: Any, salt: str) -> Plot:
    figure = Figure(figsize=SIZE)
    title, finding, reading = draw(figure, curve)
    return Plot(title, _svg(figure, f"{title}. {finding}", salt), finding, reading)


def _draw_weights(figure: Figure, groups: list[dict[str, Any]]) -> tuple[str, str, str]:
    backward, differences, errors = (
        np.concatenate([_array(group[key]) for group in groups])
        for key in ("backward", "finite_difference", "error")
    )
    places = _places(groups)
    top, bottom = _panels(figure)
    top.bar(places, differences, color=DIFFERENCES, alpha=0.4, label="finite difference")
    # Against an uncertainty of more than 1 no weight would be seen.
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
        _largest(off, errors),
        "Above, each dot belongs on the end of its bar. Below is how far off it is, and as a bar"
        " the uncertainty of the finite difference: a dot far above its bar is a wrong weight.",
    )


def _draw_differences(axes: Axes, places: Numbers, off: Numbers, errors: Numbers) -> None:
    shown, bars = _visible(off), _visible(errors)
    _logarithmic(axes, "y", np.concatenate([shown, bars, USUAL]), n_ticks=4)
    floor = axes.get_ylim()[0]
    axes.bar(places, bars - floor, bottom=floor, color=DIFFERENCES, alpha=0.4)
    axes.plot(places, shown, "o", color=BACKWARD, markersize=5)
    axes.set_ylabel("|difference|")


def _draw_steps(figure: Figure, curve: dict[str, Any]) -> tuple[str, str, str]:
    steps, errors = _array(curve["step"]), _array(curve["error"])
    axes = figure.subplots()
    _logarithmic(axes, "x", steps)
    _logarithmic(axes, "y", np.concatenate([_visible(errors), USUAL]))
    axes.plot(steps, _visible(errors), "o-", color=BACKWARD, markersize=3.5, linewidth=1.2)
    axes.set(xlabel="step (kT)", ylabel="|finite difference − backward|")
    finding = "None of the differences is a number."
    if np.isfinite(errors).any():
        best = int(np.nanargmin(errors))
        finding = f"Smallest: {_short(errors[best])}, with a step of {_short(steps[best])} kT."
    return (
        f"Error over step, pose {curve['pose']}",
        finding,
        "A V is right: the error falls with the step until roundoff lifts it again; where the value"
        " is linear, there is roundoff alone. A flat floor high up is a wrong gradient, as high as"
        " it is wrong.",
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
    bottom.set(xlabel=f"prediction of pose {curve['pose']} (kT)", ylabel="slope")
    return (
        f"Value over the prediction of pose {curve['pose']}",
        _missing(np.concatenate([values, slopes])),
        "The other poses stay where they are. Each stroke belongs along the curve, and each dot on"
        " the line below.",
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
    """Show what is flat but for roundoff as flat."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    if high - low < (least := 1e-3 * (right - left)):
        axes.set_ylim(low - least, high + least)


def _tangents(axes: Axes, x: Numbers, y: Numbers, slopes: Numbers) -> LineCollection:
    """Return short strokes of equal length on the screen."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    aspect = (high - low) / (right - left)
    dx = 0.03 * (right - left) / np.hypot(1, slopes / aspect)
    segments = np.stack([x - dx, y - slopes * dx, x + dx, y + slopes * dx], axis=1)
    return LineCollection(
        list(segments.reshape(-1, 2, 2)), colors=BACKWARD, linewidths=2, label="slope of backward"
    )


def _places(groups: Sequence[dict[str, Any]]) -> Numbers:
    """Return where on the axis each pose is, with a gap between the groups."""
    sizes = [len(group["backward"]) for group in groups]
    gaps = np.repeat(np.arange(len(sizes)), sizes)
    return np.arange(sum(sizes)) + 1.0 * gaps


def _label_poses(axes: Axes, places: Numbers, groups: Sequence[dict[str, Any]]) -> None:
    labels = []
    for group in groups:
        n_poses = len(group["backward"])
        names = [str(pose) if n_poses <= 6 else "" for pose in range(n_poses)]
        names[n_poses // 2] += f"\nspread {np.ptp(_array(group['predictions'])):.1g} kT"
        labels += names
    axes.set_xticks(places, labels)
    axes.tick_params(axis="x", length=0)
    axes.set_xlabel("pose, by the spread of the predictions")


def _largest(off: Numbers, errors: Numbers) -> str:
    missing = _missing(off)
    if not np.isfinite(off).any():
        return missing
    worst = int(np.nanargmax(off))
    found = f"Largest difference: {_short(off[worst])}, uncertain by {_short(errors[worst])}."
    return f"{found} {missing}".rstrip()


def _missing(numbers: Numbers) -> str:
    n_missing = int(np.isnan(numbers).sum())
    return f"{n_missing} of {len(numbers)} are no numbers (×)." if n_missing else ""


def _short(number: float) -> str:
    if math.isnan(number):
        return "an unknown amount"
    return f"{number:.1e}" if number else "0"


def _array(numbers: Sequence[float | None]) -> Numbers:
    """Return the numbers with NaN for what is none, as null in JSON, or not finite."""
    array = np.array(numbers, dtype=np.float64)
    return np.where(np.isfinite(array), array, np.nan).clip(-MOST, MOST)


def _visible(numbers: Numbers) -> Numbers:
    return numbers.clip(LEAST, MOST)


def _logarithmic(axes: Axes, which: Literal["x", "y"], numbers: Numbers, n_ticks: int = 7) -> None:
    """Give an axis a tick at each power of ten, or every few, and limits around the numbers."""
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
    """Return the figure as an element of a page, with ids that no other ``salt`` gives."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(METADATA))
    drawing = buffer.getvalue().partition("</defs>")[2]  # after the header and a style for all
    # Only markers and clip paths are referred to; the others' ids are the same in every figure.
    drawing = re.sub(r'<g id="[^"]*"', "<g", drawing)
    for colour, variable in VARIABLES.items():
        drawing = drawing.replace(colour, variable)
    width, height = (72 * inches for inches in figure.get_size_inches())
    opening = '<svg role="img" aria-label="{}" viewBox="0 0 {:g} {:g}">'
    return Markup(opening).format(description, width, height) + Markup(drawing)
