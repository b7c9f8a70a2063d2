"""Compare the gradient modes with plain autograd: differences, time and memory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from copy import deepcopy
from statistics import median

import torch
from conformers import Conformer, Molecule, collate
from torch import Tensor
from training import measured, poses_and_sizes

from mtenn_core import Combination, MultiPoseModel

PLAIN = "plain autograd"
MODES = ("graph", "stored")


def combined(
    pose_model: torch.nn.Module,
    combination: Combination,
    poses: Sequence[Conformer],
    sizes: Sequence[int],
    way: str,
) -> Tensor:
    """Return combined predictions, shape (n_molecules,); a ``way`` is ``PLAIN`` or a mode."""
    if way == PLAIN:
        per_molecule = pose_model(collate(poses)).split(sizes)
        return torch.stack([combination.combine(predictions) for predictions in per_molecule])
    model = MultiPoseModel(pose_model, combination, gradients=way, collate=collate)
    return model(poses, sizes=sizes).prediction


def loss_gradients(
    pose_model: torch.nn.Module, combination: Combination, molecules: Sequence[Molecule], way: str
) -> list[Tensor]:
    """Return the gradient of the mean squared error, a tensor per parameter of ``pose_model``."""
    poses, sizes = poses_and_sizes(molecules)
    prediction = combined(pose_model, combination, poses, sizes, way)
    loss = torch.nn.functional.mse_loss(prediction, measured(molecules).to(prediction.dtype))
    return list(torch.autograd.grad(loss, list(pose_model.parameters())))


def largest_differences(model: MultiPoseModel, molecules: Sequence[Molecule]) -> dict[str, float]:
    """Return max |g - g_plain| / max |g_plain| of the worst parameter, for each mode."""
    # In float64: in float32 it would be the rounding of sums that were added in another order.
    pose_model = deepcopy(model.pose_model).double()
    combination = deepcopy(model.combination).double()
    plain = loss_gradients(pose_model, combination, molecules, PLAIN)

    def largest_difference(mode: str) -> float:
        gradients = loss_gradients(pose_model, combination, molecules, mode)
        differences = [
            (g - g_plain).abs().max() / g_plain.abs().max()
            for g, g_plain in zip(gradients, plain, strict=True)
        ]
        return torch.stack(differences).max().item()

    return {mode: largest_difference(mode) for mode in MODES}


def step_seconds(
    pose_model: torch.nn.Module, combination: Combination, molecule: Molecule, *, repeats: int = 7
) -> dict[str, float]:
    """Return the median wall time of prediction and gradient of one molecule, for each way."""
    ways = (PLAIN, *MODES)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats + 1):
        # In turns, so that a busy moment of the machine does not hit one way alone.
        for way in ways:
            start = time.perf_counter()
            loss_gradients(pose_model, combination, [molecule], way)
            seconds[way].append(time.perf_counter() - start)
    # The first round warms up.
    return {way: median(seconds[way][1:]) for way in ways}
