"""Draw the pictures of the pages from the registered combinations, for light and dark pages.

    python docs/figures.py [FOLDER]

The committed ones are in docs/images. ``modes.svg`` there is not drawn here: it is measured, the
``trade_off.svg`` of ``python benchmarks/engine.py --trade-off --threads 1 --plots FOLDER``. This
script writes the dark version of it, too.
"""

from __future__ import annotations

import itertools
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import matplotlib.style
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Arc, FancyArrowPatch, FancyBboxPatch
from torch import Tensor

from mtenn_core import Combination, MultiPoseModel, propagated_error, registry

KT = 0.593  # kcal/mol at 298 K
FOLDER = Path(__file__).parent / "images"
MEASURED = FOLDER / "modes.svg"
# Okabe and Ito's colours; each line has a style of its own, too.
BLUE, ORANGE, GREEN, BLACK = "#0072B2", "#D55E00", "#009E73", "#000000"
STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "white",  # for dark viewers that show the light picture
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
# The tints of boxes in the overview.
GREY_TINT, BLUE_TINT, GREEN_TINT = "#F1F3F5", "#E3F0F9", "#E2F4EE"
# The colour on a dark page for each colour on a white one.
DARK = {
    "#ffffff": "none",
    "#000000": "#e6e6e6",
    "#595959": "#b8b8b8",
    "#767676": "#9a9a9a",
    "#cccccc": "#5a5a5a",
    "#0072b2": "#5aa9ff",
    "#56b4e9": "#a5e0ff",
    "#d55e00": "#ff8f4d",
    "#e69f00": "#ffcf5c",
    "#009e73": "#35cf9f",
    "#b0b0b0": "#b0b0b0",
    GREY_TINT.lower(): "#25282d",
    BLUE_TINT.lower(): "#12293d",
    GREEN_TINT.lower(): "#10302a",
}


def main(folder: Path = FOLDER) -> list[Path]:
    """Draw all pictures into a folder and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.style.context(STYLE, after_reset=True):
        drawn = [save(draw, folder) for draw in PICTURES]
    return drawn + [save_dark(path, folder) for path in (*drawn, MEASURED)]


def save(draw: Callable[[Figure], None], folder: Path) -> Path:
    """Draw one picture, with the name of what draws it, and return its path."""
    # No wider: a phone shrinks a picture, and the words in it, to 3.7 inches.
    figure = Figure(figsize=(5.1, 3.4))
    draw(figure)
    path = folder / f"{draw.__name__.replace('_', '-')}.svg"
    figure.savefig(path, metadata=METADATA)
    return path


def save_dark(light: Path, folder: Path) -> Path:
    """Write a picture again, in colours for a dark page and without a background."""
    path = folder / f"{light.stem}-dark.svg"
    path.write_text(dark(light.read_text(encoding="utf-8")), encoding="utf-8")
    return path


def dark(svg: str) -> str:
    """Replace the colours of a picture. A colour without a dark version raises KeyError."""
    svg = re.sub("#[0-9a-fA-F]{6}(?![0-9a-fA-F])", lambda found: DARK[found[0].lower()], svg)
    # What has no colour of its own (matplotlib's black text) takes that of the whole picture.
    return re.sub(r"(<style [^>]*>)", rf"\1svg{{fill: {DARK[BLACK]}}}", svg, count=1)


def overview(figure: Figure) -> None:
    """Draw one compound: the way of its poses to one ΔG, and the way of the gradient back."""
    figure.set_size_inches(5.1, 4.5)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 510), ylim=(0, 450))
    axes.axis("off")
    combination = minimum(1 / KT)
    predictions = doubles([-8.9, -8.5, -7.6])
    combined = combination.combine(predictions).item()
    weights = combination.pose_weights(predictions).tolist()

    titles = ((46, "poses"), (158, "one network"), (290, "a ΔG per pose"), (440, "a combination"))
    for x, title in titles:
        axes.text(x, 424, title, ha="center", fontsize=11, fontweight="bold")
    box(axes, (104, 152), (108, 256), BLUE_TINT, BLUE)
    network(axes, 158, 288)
    axes.text(158, 174, "parameters θ", ha="center")
    box(axes, (378, 152), (124, 256), GREEN_TINT, GREEN)
    for y, name in ((366, "mean"), (323, "boltzmann"), (237, "median"), (194, "your own")):
        axes.text(440, y, name, ha="center", va="center", fontsize=12, color="#595959")
    axes.text(440, 280, "min", ha="center", va="center", fontsize=18, fontweight="bold")
    box(axes, (378, 36), (124, 76), GREY_TINT, "#767676")
    number(axes, 440, 85, f"ΔG = {combined:.1f}", BLUE, fontsize=13, fontweight="bold")
    axes.text(440, 57, "kcal/mol", ha="center", va="center", fontsize=12)
    arrow(axes, (432, 150), (432, 114), BLUE)
    arrow(axes, (448, 114), (448, 150), ORANGE, "--")
    for index, (y, prediction, weight) in enumerate(
        zip((372, 280, 188), predictions.tolist(), weights, strict=True)
    ):
        sub = "₁₂₃"[index]
        box(axes, (8, y - 36), (76, 72), GREY_TINT, "#767676")
        pose(axes, 46, y, (25, 150, 265)[index])
        arrow(axes, (85, y), (103, y), BLUE)
        box(axes, (232, y - 30), (116, 60), GREY_TINT, "#767676")
        number(axes, 290, y + 13, f"ŷ{sub} = {prediction:.1f}", BLUE, fontsize=13)
        number(axes, 290, y - 13, f"w{sub} = {weight:.2f}", ORANGE, fontsize=13)
        for start, end in ((213, 231), (349, 377)):
            arrow(axes, (start, y + 8), (end, y + 8), BLUE)
            arrow(axes, (end, y - 8), (start, y - 8), ORANGE, "--")

    arrow(axes, (10, 110), (44, 110), BLUE)
    arrow(axes, (44, 55), (10, 55), ORANGE, "--")
    for y, words in (
        (110, "forward: the same network"),
        (88, "scores each pose"),
        (55, "backward: ∂ΔG/∂θ = Σ wᵢ · ∂ŷᵢ/∂θ"),
        (33, "with pose weights wᵢ = ∂ΔG/∂ŷᵢ"),
    ):
        axes.text(54, y, words, va="center", fontsize=12)


def box(
    axes: Axes, corner: tuple[float, float], size: tuple[float, float], fill: str, edge: str
) -> None:
    """Draw a rounded box, from its lower left corner."""
    style = "round,pad=0,rounding_size=8"
    axes.add_patch(FancyBboxPatch(corner, *size, style, facecolor=fill, edgecolor=edge))


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, line: str = "-"
) -> None:
    """Draw a straight arrow."""
    head = "-|>,head_length=4,head_width=2.5"
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle=head,
            color=colour,
            linestyle=line,
            linewidth=1.6,
            shrinkA=0,
            shrinkB=0,
        )
    )


def number(axes: Axes, x: float, y: float, text: str, colour: str, **style: object) -> None:
    """Write a number, with a minus sign instead of a hyphen."""
    axes.text(x, y, text.replace("-", "−"), color=colour, ha="center", va="center", **style)


def network(axes: Axes, x: float, y: float) -> None:
    """Draw the nodes and edges of a small network."""
    layers = [
        [(x + dx, y + dy) for dy in heights]
        for dx, heights in ((-30, (-40, 0, 40)), (0, (-60, -20, 20, 60)), (30, (0,)))
    ]
    for left, right in itertools.pairwise(layers):
        for a in left:
            for b in right:
                axes.plot(*zip(a, b, strict=True), color=BLUE, linewidth=0.6, alpha=0.6)
    for layer in layers:
        axes.plot(*zip(*layer, strict=True), "o", color=BLUE, markersize=7)


def pose(axes: Axes, x: float, y: float, turn: float) -> None:
    """Draw a molecule in a pocket, turned by some degrees."""
    axes.add_patch(Arc((x, y), 62, 58, theta1=150, theta2=390, color="#767676", linewidth=3))

    def at(radius: float, angle: float) -> tuple[float, float]:
        angle = math.radians(angle + turn)
        return x + radius * math.cos(angle), y + radius * math.sin(angle)

    ring = [at(9, 60 * corner) for corner in range(7)]
    axes.plot(*zip(*ring, strict=True), color=BLACK, linewidth=1.8)
    for bond in ((at(9, 0), at(19, 8)), (at(9, 180), at(17, 180), at(22, 205))):
        axes.plot(*zip(*bond, strict=True), color=BLACK, linewidth=1.8)
    axes.plot(*at(19, 8), "o", color=ORANGE, markersize=5)


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
    figure.set_size_inches(5.1, 5.6)
    value_axes, weight_axes = figure.subplots(2, 1)
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
    figure.legend(loc="outside upper center", ncols=2)


def error_bars(figure: Figure) -> None:
    """Draw first-order errors and random draws, of ten compounds and by the error of a pose."""
    figure.set_size_inches(5.1, 5.6)
    compound_axes, error_axes = figure.subplots(2, 1)
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


PICTURES = (overview, number_of_poses, not_monotone, sharp_scales, error_bars)

if __name__ == "__main__":
    for written in main(*map(Path, sys.argv[1:])):
        print(written)
