"""Draw the pictures of the pages from the registered combinations.

    python docs/figures.py [FOLDER]

The committed ones are in docs/images. ``modes.svg`` there is not drawn here: it is measured, the
``trade_off.svg`` of ``python benchmarks/engine.py --trade-off --threads 1 --plots FOLDER``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import matplotlib.style
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from mtenn_core import Combination, MultiPoseModel, propagated_error, registry

KT = 0.593  # kcal/mol at 298 K
FOLDER = Path(__file__).parent / "images"
# Okabe and Ito's colours; each line has a style of its own, too.
BLUE, ORANGE, GREEN, BLACK = "#0072B2", "#D55E00", "#009E73", "#000000"
STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "white",  # on dark pages too
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Arial", "sans-serif"],
    "font.size": 10,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "svg.fonttype": "none",  # text as text: small, and to be searched
    "svg.hashsalt": "mtenn",
}
# What matplotlib would say of itself and of the day.
METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def main(folder: Path = FOLDER) -> list[Path]:
    """Draw all pictures into a folder and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.style.context(STYLE, after_reset=True):
        return [save(draw, folder) for draw in PICTURES]


def save(draw: Callable[[Figure], None], folder: Path) -> Path:
    """Draw one picture, with the name of what draws it, and return its path."""
    figure = Figure(figsize=(7.2, 3.4))
    draw(figure)
    path = folder / f"{draw.__name__.replace('_', '-')}.svg"
    figure.savefig(path, metadata=METADATA)
    return path


def number_of_poses(figure: Figure) -> None:
    """Draw the value for equal poses: without ``normalize``, min falls by kT ln M."""
    axes = figure.subplots()
    numbers = [1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 300, 500, 1000]
    # Three of them agree: the wider lines are drawn first, and show behind the others.
    for label, combination, colour, line, width in (
        ("min", minimum(1 / KT), BLUE, "o-", 2),
        ("mean", registry.create("mean"), "#B0B0B0", "-", 9),
        ("boltzmann", registry.create("boltzmann", kT=KT), GREEN, "-", 5),
        ("min, normalize=True", minimum(1 / KT, normalize=True), BLACK, "--", 1.5),
    ):
        values = [combination.combine(doubles([-8.0] * n)).item() for n in numbers]
        axes.plot(numbers, values, line, color=colour, label=label, linewidth=width, markersize=5)
    axes.set(xscale="log", xlabel="number of poses, all at -8 kcal/mol")
    axes.set_ylabel("combined prediction (kcal/mol)")
    axes.legend()


def not_monotone(figure: Figure) -> None:
    """Draw the Boltzmann mean of two poses: if one rises, it rises and then falls."""
    value_axes, weight_axes = figure.subplots(1, 2)
    rising = torch.linspace(0, 6, 61, dtype=torch.float64)
    for label, combination, colour, line in (
        ("boltzmann", registry.create("boltzmann"), GREEN, "-"),
        ("min, normalize=True", minimum(1.0, normalize=True), ORANGE, "--"),
    ):
        pairs = [doubles([0.0, x]) for x in rising.tolist()]
        values = [combination.combine(pair).item() for pair in pairs]
        weights = [combination.pose_weights(pair)[1].item() for pair in pairs]
        value_axes.plot(rising, values, line, color=colour, label=label)
        weight_axes.plot(rising, weights, line, color=colour)
    value_axes.set_ylabel("combined prediction (kT)")
    value_axes.legend()
    weight_axes.axhline(0, color=BLACK, linewidth=1)
    weight_axes.set_ylabel("weight of the upper pose")
    for axes in (value_axes, weight_axes):
        axes.set_xlabel("upper pose, the lower one at 0 (kT)")


def sharp_scales(figure: Figure) -> None:
    """Draw the weights of poses above the best one, which vanish for a sharp scale."""
    axes = figure.subplots()
    above = [0.0, 0.1, 0.5, 2.0]
    scales = torch.logspace(-1, 3, 81, dtype=torch.float64)
    weights = torch.stack([minimum(t).pose_weights(doubles(above)) for t in scales.tolist()])
    styles = ((BLUE, "-"), (ORANGE, "--"), (GREEN, "-."), (BLACK, ":"))
    for number, (colour, line) in enumerate(styles):
        label = f"{above[number]:g} kcal/mol above" if number else "best pose"
        axes.plot(scales, weights[:, number], line, color=colour, label=label)
    physical(axes)
    axes.set(xscale="log", yscale="log", ylim=(1e-8, 3))
    axes.set_xlabel("pred_scale (mol/kcal)")
    axes.set_ylabel("pose weight")
    axes.legend(loc="lower left")


def error_bars(figure: Figure) -> None:
    """Draw first-order errors and random draws, of ten compounds and by the error of a pose."""
    compound_axes, error_axes = figure.subplots(1, 2)
    combination = minimum(1.0, normalize=True)
    model = MultiPoseModel(torch.nn.Identity(), combination)
    random = torch.Generator().manual_seed(0)
    sizes = [6] * 10
    poses = -12 + 1.5 * torch.randn(sum(sizes), generator=random, dtype=torch.float64)
    noise = torch.randn(5_000, len(poses), generator=random, dtype=torch.float64)
    out = model(poses, sizes=sizes)
    drawn = combine_rows(combination, (poses + noise).reshape(-1, 6)).reshape(-1, len(sizes))
    first_order = propagated_error(
        model.pose_weights(out.pose_predictions, sizes), [1.0] * len(poses), sizes
    )
    order = out.prediction.argsort()
    ranks = torch.arange(1.0, len(sizes) + 1)
    for centers, errors, colour, marker, shift, label in (
        (out.prediction, first_order, BLUE, "o", -0.12, "first order"),
        (drawn.mean(0), drawn.std(0), ORANGE, "s", 0.12, "random draws"),
    ):
        compound_axes.errorbar(
            ranks + shift, centers[order], errors[order], color=colour, fmt=marker, label=label
        )
    compound_axes.set(xlabel="compound", ylabel="combined prediction (kT)")
    compound_axes.legend()

    sizes_of_errors = torch.logspace(-1, 0.5, 16, dtype=torch.float64)
    equal = doubles([0.0] * 4)
    draws = torch.stack([combine_rows(combination, sd * noise[:, :4]) for sd in sizes_of_errors])
    first_order = sizes_of_errors * propagated_error(combination.pose_weights(equal), [1.0] * 4)
    for values, colour, line, label in (
        (first_order, BLUE, "-", "first order"),
        (draws.std(1), ORANGE, "--", "random draws"),
        (-draws.mean(1), BLACK, ":", "fall of their mean"),
    ):
        error_axes.plot(sizes_of_errors, values, line, color=colour, label=label)
    error_axes.set(xscale="log", xlabel="error of each of four equal poses (kT)")
    error_axes.set_ylabel("error of the prediction (kT)")
    error_axes.legend()


def combine_rows(combination: Combination, rows: Tensor) -> Tensor:
    """Return the combined prediction of each row."""
    return torch.func.vmap(combination.combine)(rows)


def physical(axes: Axes) -> None:
    """Mark where the scale is one over kT."""
    axes.axvline(1 / KT, color="#767676", linewidth=1)
    axes.annotate(
        "1/kT at 298 K", (1 / KT, 1.0), (4, 4), textcoords="offset points", color="#595959"
    )


def minimum(scale: float, *, normalize: bool = False) -> Combination:
    """Return the smooth minimum."""
    return registry.create("min", pred_scale=scale, normalize=normalize)


def doubles(numbers: list[float]) -> Tensor:
    """Return a tensor in float64."""
    return torch.tensor(numbers, dtype=torch.float64)


PICTURES = (number_of_poses, not_monotone, sharp_scales, error_bars)

if __name__ == "__main__":
    for written in main(*map(Path, sys.argv[1:])):
        print(written)
