"""Figures of the engine benchmark: growth, and time against memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from engine_cases import BASELINES, CHECKPOINT, GUIDE, MODES, PLAIN, Case
from matplotlib.ticker import LogLocator, NullFormatter

if TYPE_CHECKING:
    from engine import Results
    from matplotlib.axes import Axes

GRAPH, STORED, RECOMPUTED = MODES
# Okabe and Ito's colours, and a marker each, so that colour is not all that tells them apart.
STYLES = {
    PLAIN: ("#000000", "o"),
    CHECKPOINT: ("#56B4E9", "v"),
    GUIDE: ("#E69F00", "s"),
    GRAPH: ("#0072B2", "D"),
    STORED: ("#D55E00", "^"),
    RECOMPUTED: ("#009E73", "P"),
}
AXES: dict[str, Callable[[Case], float]] = {
    "poses": lambda case: case.n_poses,
    "parameters": lambda case: case.n_parameters,
    "compounds": lambda case: case.n_compounds,
}


def save_plots(results: Results, families: dict[str, list[Case]], folder: Path) -> list[Path]:
    """Write one figure for each family of cases, and one of time against memory for each case.

    Parameters
    ----------
    families : cases that differ only in ``"poses"``, ``"parameters"`` or ``"compounds"``, and
        under ``"trade-off"`` cases that are shown one by one
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for what, cases in families.items():
        if what in AXES and len(cases) > 1:
            paths.append(save(growth(results, what, cases), folder / f"growth_{what}.svg"))
    if cases := families.get("trade-off"):
        paths.append(save(trade_off(results, cases), folder / "trade_off.svg"))
    return paths


def save(figure: plt.Figure, path: Path) -> Path:
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text as text: small, to be searched
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path


def growth(results: Results, what: str, cases: Sequence[Case]) -> plt.Figure:
    """Draw time and memory of a step, on two axes side by side."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for way in STYLES:
        seconds = {case: results.seconds(case, way) for case in cases}
        sizes = {case: results.get("peak", case, way) for case in cases}
        line(left, what, way, seconds)
        line(right, what, way, {c: s and s / 1e6 for c, s in sizes.items()})
    for axes, label in ((left, "time of a step / s"), (right, "peak memory of a step / MB")):
        reference(axes)
        axes.set(xscale="log", yscale="log", xlabel=f"number of {what}", ylabel=label)
        axes.grid(which="major", alpha=0.3)
    left.legend(frameon=False)
    figure.suptitle(f"from {cases[0]} to {cases[-1]}", fontsize=10)
    return figure


def line(axes: Axes, what: str, way: str, values: dict[Case, float | None]) -> None:
    colour, marker = STYLES[way]
    known = {case: value for case, value in values.items() if value}
    if not known:
        return
    x = [AXES[what](case) for case in known]
    axes.plot(x, list(known.values()), color=colour, marker=marker, markersize=5, label=way)


def reference(axes: Axes) -> None:
    """Draw a line of slope 1 below the curves."""
    points = [point for drawn in axes.lines for point in zip(*drawn.get_data(), strict=True)]
    if not points:
        return
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    start = 0.6 * min(y for x, y in points if x == first)
    axes.plot([first, last], [start, start * last / first], ":", color="grey", label="slope 1")


def trade_off(results: Results, cases: Sequence[Case]) -> plt.Figure:
    """Draw time against memory: one axes for each case, one point for each way."""
    size = (4.2 * len(cases), 4.4)
    figure, all_axes = plt.subplots(
        1, len(cases), figsize=size, layout="constrained", squeeze=False
    )
    for axes, case in zip(all_axes[0], cases, strict=True):
        for way in (*BASELINES, *MODES):
            seconds, found = results.seconds(case, way), results.get("peak", case, way)
            if seconds and found:
                colour, marker = STYLES[way]
                axes.plot(found / 1e6, seconds, marker, color=colour, markersize=8, label=way)
        axes.set(xscale="log", xlabel="peak memory of a step / MB", ylabel="time of a step / s")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.margins(x=0.1)
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        axes.set_title(str(case), fontsize=9)
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure
