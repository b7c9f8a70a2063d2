"""A picture of combined predictions with error bars, and of the weights of their poses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mtenn_core._tables.combining import Combined
from mtenn_core._tables.grouping import Compounds

# More compounds than this are a line with a band, and have no names.
MAX_NAMED = 40
# So many compounds show the weights of their poses.
N_SHOWN = 10
BLUE, GREY = "#2a6f97", "#8d99ae"


def draw(path: Path, compounds: Compounds, combined: Combined, title: str) -> None:
    """Draw the combined predictions of a table, one number for each compound.

    Parameters
    ----------
    title : the combination and its arguments
    """
    order = combined.predictions.argsort(stable=True).tolist()
    is_named = len(order) <= MAX_NAMED
    height = max(3.2, 0.24 * (len(order) if is_named else N_SHOWN) + 1.2)
    figure = Figure(figsize=(10, height), layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(title)
    if is_named:
        _named_values(left, compounds, combined, order)
    else:
        _many_values(left, combined, order)
    _weights(right, compounds, combined, order[:N_SHOWN])
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "mtenn"}):
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def _named_values(axes: Axes, compounds: Compounds, combined: Combined, order: list[int]) -> None:
    values = combined.predictions[order].numpy()
    errors = None if combined.errors is None else combined.errors[order].numpy()
    places = np.arange(len(order))
    axes.errorbar(values, places, xerr=errors, fmt="o", color=BLUE, ecolor=GREY, capsize=2)
    axes.set_yticks(places, [_short(compounds.names[i]) for i in order])
    axes.set_ylim(len(order) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("combined prediction" + (" ± error" if errors is not None else ""))
    axes.set_title(f"{len(order)} compounds, lowest first")


def _many_values(axes: Axes, combined: Combined, order: list[int]) -> None:
    values = combined.predictions[order].numpy()
    ranks = np.arange(1, len(order) + 1)
    if combined.errors is not None:
        errors = combined.errors[order].numpy()
        axes.fill_between(ranks, values - errors, values + errors, color=GREY, alpha=0.4, lw=0)
    axes.plot(ranks, values, color=BLUE)
    axes.grid(alpha=0.3)
    axes.set_xlabel("rank, lowest first")
    axes.set_ylabel("combined prediction" + (" ± error" if combined.errors is not None else ""))
    axes.set_title(f"{len(order):,} compounds")


def _weights(axes: Axes, compounds: Compounds, combined: Combined, order: list[int]) -> None:
    assert combined.weights is not None
    starts = np.concatenate([[0], np.cumsum(compounds.sizes)])
    for place, compound in enumerate(order):
        own = combined.weights[starts[compound] : starts[compound + 1]].numpy()
        axes.hlines(place, min(0.0, own.min()), own.max(), color=GREY, lw=1)
        axes.plot(own, np.full(len(own), place), "o", color=BLUE, alpha=0.6, ms=5)
        if combined.effective is not None:
            text = f"{combined.effective[compound]:.1f} of {compounds.sizes[compound]}"
            axes.annotate(
                text, (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=8
            )
    axes.axvline(0, color="black", lw=0.8)
    axes.set_yticks(range(len(order)), [_short(compounds.names[i]) for i in order])
    axes.set_ylim(len(order) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("weight of a pose")
    axes.set_title("pose weights" + (f", {N_SHOWN} lowest" if len(order) == N_SHOWN else ""))
    axes.annotate(
        "effective\nposes", (1.01, 1.01), xycoords="axes fraction", va="bottom", fontsize=8
    )


def _short(name: str) -> str:
    """Return a name for an axis. "$" would start a formula."""
    short = name if len(name) <= 24 else f"{name[:23]}…"
    return short.replace("$", r"\$")
