"""The figures: scores against measurements, pose weights against RMSD, pictures of poses."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from agreement import pearson
from combine import Combined
from dock import Docked
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread
from numpy.typing import NDArray
from rdkit import Chem
from rdkit.Chem.Draw.rdMolDraw2D import MolDraw2DCairo
from rdkit.Geometry import Point3D

NEAR = 2.0  # Å, the field's custom for a pose that is right
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # Okabe and Ito
GREY = "#767676"
REFERENCE, POSE = (0.45, 0.45, 0.45), (0.84, 0.37, 0.0)  # red, green and blue; of the pictures
PICTURES = 8
PIXELS = 560, 400  # of a picture


def save_scores(path: Path, docked: Sequence[Docked], results: Mapping[str, Combined]) -> None:
    """Draw a column for each combination: scores above, pose weights below."""
    measured = np.array([ligand.ligand.delta_g for ligand in docked])
    every = [measured, *(result.scores.numpy() for result in results.values())]
    limits = np.concatenate(every).min() - 0.7, np.concatenate(every).max() + 1.3

    figure = Figure(figsize=(max(3.3 * len(results), 6.6), 7.6), layout="constrained")
    above, below = figure.subplots(2, len(results), sharey="row", squeeze=False)
    for column, (name, result) in enumerate(results.items()):
        colour = COLOURS[column % len(COLOURS)]
        above[column].set_title(name, fontweight="bold", fontsize="x-large")
        above[column].set(xlim=limits, ylim=limits)
        _draw_scores(above[column], measured, result.scores.numpy(), colour)
        _draw_weights(below[column], docked, result, colour)
    below[0].text(
        NEAR / 2,
        0.97,
        f"within {NEAR:g} Å",
        transform=below[0].get_xaxis_transform(),
        rotation=90,
        color=GREY,
        va="top",
        ha="center",
    )
    above[0].set_ylabel("combined Vina energy (kcal/mol)")
    below[0].set_ylabel("pose weight, ∂(combined) / ∂(pose energy)")
    figure.savefig(path, dpi=110)


def _draw_scores(
    axes: Axes, measured: NDArray[np.float64], scores: NDArray[np.float64], colour: str
) -> None:
    axes.set_box_aspect(1)
    axes.axline((0, 0), slope=1, color=GREY, linewidth=1)
    axes.scatter(measured, scores, s=26, color=colour, alpha=0.7, linewidth=0)
    axes.set_xlabel("measured ΔG (kcal/mol)")
    shown = f"{len(measured)} ligands, Pearson r = {pearson(scores, measured):.2f}"
    axes.text(0.04, 0.96, shown.replace("-", "−"), transform=axes.transAxes, va="top")


def _draw_weights(axes: Axes, docked: Sequence[Docked], result: Combined, colour: str) -> None:
    axes.set_box_aspect(1)
    axes.axhline(0, color=GREY, linewidth=1)
    axes.axvspan(0, NEAR, color=GREY, alpha=0.15, linewidth=0)
    rmsds = np.concatenate([ligand.rmsds for ligand in docked])
    weights = np.concatenate([weights.numpy() for weights in result.weights])
    axes.scatter(rmsds, weights, s=26, color=colour, alpha=0.5, linewidth=0)
    axes.set_xlim(0, None)
    axes.set_xlabel("RMSD to the reference pose (Å)")


def save_poses(path: Path, docked: Sequence[Docked], weights: Mapping[str, Sequence[float]]) -> int:
    """Draw the lowest pose of each ligand over its reference, and return how many are drawn.

    At most ``PICTURES``, spread evenly from the smallest RMSD to the largest.

    Parameters
    ----------
    weights : for each combination name, the weight of each ligand's lowest pose
    """
    order = sorted(range(len(docked)), key=lambda index: docked[index].rmsds[0])
    chosen = np.unique(
        np.linspace(0, len(order) - 1, min(PICTURES, len(order))).round().astype(int)
    )
    columns = min(4, len(chosen))
    rows = -(-len(chosen) // columns)
    figure = Figure(figsize=(2.9 * columns, 2.8 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, place in zip(grid, chosen, strict=False):
        index = order[place]
        _draw_pose(axes, docked[index], {name: of[index] for name, of in weights.items()})
    figure.suptitle(
        "Lowest pose (orange) over reference pose (grey), as seen in the protein", fontsize=11
    )
    figure.savefig(path, dpi=80)
    return len(chosen)


def _draw_pose(axes: Axes, ligand: Docked, weights: Mapping[str, float]) -> None:
    axes.imshow(imread(io.BytesIO(picture(ligand))))
    shown = ", ".join(f"{name}\N{NO-BREAK SPACE}{weight:.2f}" for name, weight in weights.items())
    axes.set_title(
        f"{ligand.ligand.name}: {ligand.rmsds[0]:.1f} Å, {ligand.energies[0]:.1f} kcal/mol\n"
        + textwrap.fill(f"weight of it: {shown}", 40),
        fontsize=8,
    )


def picture(ligand: Docked) -> bytes:
    """Return a PNG of the lowest pose over the reference, in the plane of largest spread."""
    reference, pose = Chem.RemoveHs(ligand.ligand.reference), Chem.RemoveHs(ligand.poses[0])
    both = Chem.CombineMols(reference, pose)
    positions = both.GetConformer().GetPositions()
    centred = positions - positions.mean(axis=0)
    axes = np.linalg.svd(centred, full_matrices=False)[2]
    for index, (x, y, _) in enumerate(centred @ axes.T):
        both.GetConformer().SetAtomPosition(index, Point3D(x, y, 0))
    return _drawn(both, reference.GetNumAtoms(), reference.GetNumBonds())


def _drawn(both: Chem.Mol, n_atoms: int, n_bonds: int) -> bytes:
    """Draw two molecules together: the first ``n_atoms`` atoms in grey, the others in orange."""
    atom_colours = {i: REFERENCE if i < n_atoms else POSE for i in range(both.GetNumAtoms())}
    bond_colours = {i: REFERENCE if i < n_bonds else POSE for i in range(both.GetNumBonds())}
    drawer = MolDraw2DCairo(*PIXELS)
    options = drawer.drawOptions()
    options.noAtomLabels = True  # two molecules' labels lie on top of each other
    options.prepareMolsBeforeDrawing = False  # which would lay the molecule out anew
    options.fillHighlights = True
    options.highlightRadius = 0.2
    options.highlightBondWidthMultiplier = 10
    drawer.DrawMolecule(
        both,
        highlightAtoms=[*atom_colours],
        highlightBonds=[*bond_colours],
        highlightAtomColors=atom_colours,
        highlightBondColors=bond_colours,
    )
    drawer.FinishDrawing()
    return drawer.GetDrawingText()
