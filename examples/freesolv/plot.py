"""The figure: predicted against measured ΔG, and the pose weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from conformers import Molecule
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from training import Predictions, measured, rmse

FLEXIBLE = 3  # rotatable bonds
WIDEST = 3.0  # kcal/mol, 5 kT: what lies further above the lowest conformer has no weight to see
COLOURS = ("#0072B2", "#D55E00", "#009E73")  # Okabe and Ito: distinct for colour-blind readers too
GREY = "#767676"


def save_figure(path: Path, test: Sequence[Molecule], results: Mapping[str, Predictions]) -> None:
    """Draw a column for each combination, and save the figure.

    Parameters
    ----------
    path : the file; its suffix decides the format
    test : the molecules that were predicted
    results : by the combination's name, the predictions of its trained model for ``test``
    """
    target = measured(test)
    everything = torch.cat([target, *(predictions.combined for predictions in results.values())])
    limits = everything.min().item() - 1, everything.max().item() + 1

    figure = Figure(figsize=(4.2 * len(results), 8.6), layout="constrained")
    accuracy, weights = figure.subplots(2, len(results), sharey="row", squeeze=False)
    for column, (name, predictions) in enumerate(results.items()):
        colour = COLOURS[column % len(COLOURS)]
        accuracy[column].set_title(name, fontweight="bold", fontsize="x-large")
        accuracy[column].set(xlim=limits, ylim=limits)
        _draw_accuracy(accuracy[column], target, predictions.combined, colour)
        _draw_weights(weights[column], _flexible(test, predictions), colour)
    accuracy[0].set_ylabel("predicted ΔG of hydration (kcal/mol)")
    weights[0].set_ylabel("pose weight, ∂ΔG(molecule) / ∂ΔG(conformer)")
    figure.savefig(path, dpi=150)


def _flexible(test: Sequence[Molecule], predictions: Predictions) -> list[tuple[Tensor, Tensor]]:
    """Return pose predictions and weights of the molecules with enough rotatable bonds."""
    triples = zip(test, predictions.poses, predictions.weights, strict=True)
    return [
        (poses, weights) for molecule, poses, weights in triples if molecule.n_rotatable >= FLEXIBLE
    ]


def _draw_accuracy(axes: Axes, target: Tensor, predicted: Tensor, colour: str) -> None:
    axes.set_box_aspect(1)
    axes.axline((0, 0), slope=1, color=GREY, linewidth=1)
    axes.scatter(target, predicted, s=20, color=colour, alpha=0.6, linewidth=0)
    axes.set_xlabel("measured ΔG of hydration (kcal/mol)")
    _write(
        axes, f"{len(target)} test molecules\nRMSE {rmse(predicted, target):.2f} kcal/mol", x=0.04
    )


def _draw_weights(axes: Axes, flexible: Sequence[tuple[Tensor, Tensor]], colour: str) -> None:
    axes.set_box_aspect(1)
    axes.axhline(0, color=GREY, linewidth=1)
    n_beyond = 0
    for poses, of_poses in flexible:
        ordered, order = poses.sort()
        above_lowest, weights = ordered - ordered[0], of_poses[order]
        axes.plot(above_lowest, weights, color=colour, alpha=0.25, linewidth=0.8)
        axes.scatter(above_lowest, weights, s=20, color=colour, alpha=0.6, linewidth=0)
        n_beyond += int((above_lowest > WIDEST).sum())
    axes.set_xlim(-0.03 * WIDEST, WIDEST)
    axes.set_xlabel("ΔG above molecule's lowest conformer (kcal/mol)")
    _write(
        axes,
        f"{len(flexible)} test molecules with {FLEXIBLE} or\nmore rotatable bonds, one line each\n"
        f"({n_beyond} conformers beyond {WIDEST:g} kcal/mol)",
        x=0.96,
    )


def _write(axes: Axes, text: str, *, x: float) -> None:
    """Write text in the upper corner nearer to ``x``, a fraction of the width."""
    side = "left" if x < 0.5 else "right"
    axes.text(x, 0.96, text, transform=axes.transAxes, va="top", ha=side, multialignment=side)
