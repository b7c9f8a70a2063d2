"""Split the molecules, train a multi-pose model on some of them, predict the others."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from conformers import Conformer, Molecule, collate
from pose_model import ConformerSchNet
from torch import Tensor

from mtenn_core import Combination, MultiPoseModel

KT = 0.593  # kcal/mol at 298 K
# Names in the registry, and arguments. The first is the free-energy average of the conformers,
# -kT ln (1/n Σ exp(-y_i/kT)); without ``normalize`` it would shift by -kT ln n.
COMBINATIONS: dict[str, dict[str, Any]] = {
    "min": {"pred_scale": 1 / KT, "normalize": True},
    "boltzmann": {"kT": KT},
    "mean": {},
}

# Chosen by cross-validation among the training molecules of seed 0; its test set took no part.
BATCH_SIZE = 32  # molecules, each with all its conformers
LEARNING_RATE = 0.01
MAX_GRADIENT_NORM = 0.3
TEST_FRACTION = 0.2


@dataclass(frozen=True)
class Predictions:
    """The predictions of a trained model for some molecules, in kcal/mol.

    Attributes
    ----------
    combined : shape (n_molecules,)
    poses : for each molecule, shape (n_conformers,)
    weights : for each molecule, the pose weights, shape (n_conformers,), dimensionless
    """

    combined: Tensor
    poses: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]


def split(molecules: Sequence[Molecule], *, seed: int) -> tuple[list[Molecule], list[Molecule]]:
    """Return training molecules and test molecules, drawn at random by ``seed``."""
    order = torch.randperm(len(molecules), generator=torch.Generator().manual_seed(seed)).tolist()
    n_test = round(TEST_FRACTION * len(molecules))
    return [molecules[i] for i in order[n_test:]], [molecules[i] for i in order[:n_test]]


def measured(molecules: Sequence[Molecule]) -> Tensor:
    """Return measured ΔG in kcal/mol, shape (n_molecules,)."""
    return torch.tensor([molecule.measurement.measured for molecule in molecules])


def new_model(combination: Combination, train: Sequence[Molecule], *, seed: int) -> MultiPoseModel:
    """Return a new model; one ``seed`` gives the same initial weights for any combination."""
    torch.manual_seed(seed)
    std, mean = torch.std_mean(measured(train))
    pose_model = ConformerSchNet(mean.item(), std.item())
    return MultiPoseModel(pose_model, combination, gradients="graph", collate=collate)


def poses_and_sizes(molecules: Sequence[Molecule]) -> tuple[list[Conformer], list[int]]:
    """Return all conformers in one list, and their number for each molecule."""
    poses = [conformer for molecule in molecules for conformer in molecule.conformers]
    return poses, [len(molecule.conformers) for molecule in molecules]


def n_steps(train: Sequence[Molecule], epochs: int) -> int:
    """Return the number of steps of :func:`training_steps`."""
    return epochs * math.ceil(len(train) / BATCH_SIZE)


def training_steps(
    model: MultiPoseModel, train: Sequence[Molecule], *, epochs: int, seed: int
) -> Iterator[float]:
    """Train, and yield each batch's mean squared error, in units of the variance of ``train``."""
    target = measured(train)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=n_steps(train, epochs)
    )
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(train), generator=order).split(BATCH_SIZE):
            poses, sizes = poses_and_sizes([train[i] for i in batch])
            error = model(poses, sizes=sizes).prediction - target[batch]
            loss = (error / model.pose_model.std).square().mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
            optimizer.step()
            schedule.step()
            yield loss.item()


@torch.no_grad()
def predict(model: MultiPoseModel, molecules: Sequence[Molecule]) -> Predictions:
    """Predict molecules in one call."""
    poses, sizes = poses_and_sizes(molecules)
    out = model(poses, sizes=sizes)
    weights = model.pose_weights(out.pose_predictions, sizes)
    return Predictions(out.prediction, out.pose_predictions.split(sizes), weights.split(sizes))


def rmse(predicted: Tensor, target: Tensor) -> float:
    """Return the root mean square error of two tensors, shape (n_molecules,), in their unit."""
    return (predicted - target).square().mean().sqrt().item()


def rmse_error(predicted: Tensor, target: Tensor, *, draws: int = 2000) -> float:
    """Return the standard error of :func:`rmse`, by the bootstrap over molecules."""
    squares = (predicted - target).square()
    chosen = torch.randint(
        len(squares), (draws, len(squares)), generator=torch.Generator().manual_seed(0)
    )
    return squares[chosen].mean(dim=1).sqrt().std().item()
