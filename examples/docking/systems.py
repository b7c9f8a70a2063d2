"""Ligands with measured ΔG and the protein of each, from the installed openmmforcefields."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
from rdkit import Chem

FOLDER = "openmmforcefields/data/perses_jacs_systems"
MEASURED = "r_user_dG.exp"  # kcal/mol
# Ligands and protein, by target.
FILES = {
    "bace": ("Bace_ligands_shifted.sdf", "Bace_protein.pdb"),
    "cdk2": ("CDK2_ligands_shifted.sdf", "CDK2_protein.pdb"),
    "jnk1": ("Jnk1_ligands.sdf", "Jnk1_protein.pdb"),
    "mcl1": ("MCL1_ligands.sdf", "MCL1_protein.pdb"),
    "p38a": ("p38_ligands_shifted.sdf", "p38_protein.pdb"),
    "ptp1b": ("PTP1B_ligands.sdf", "PTP1B_protein.pdb"),
    "thrombin": ("Thrombin_ligands.sdf", "Thrombin_protein.pdb"),
    "tyk2": ("Tyk2_ligands_shifted.sdf", "Tyk2_protein.pdb"),
}
MARGIN = 4.0  # Å, of the box around the reference poses


class DataNotFoundError(Exception):
    """The data are not installed, or damaged; the message has the command that installs them."""


@dataclass(frozen=True)
class Ligand:
    """A ligand with its measured ΔG in kcal/mol and its reference pose, hydrogens included."""

    name: str
    delta_g: float
    reference: Chem.Mol

    @property
    def file_name(self) -> str:
        """The name, with only letters, digits, dots and dashes; other characters are replaced."""
        return re.sub(r"[^\w.-]+", "_", self.name)

    @property
    def n_heavy(self) -> int:
        """Number of atoms except hydrogen."""
        return self.reference.GetNumHeavyAtoms()


@dataclass(frozen=True)
class Box:
    """The box of the search for poses: centre and edges, three numbers each, in Å."""

    center: tuple[float, ...]
    size: tuple[float, ...]


@dataclass(frozen=True)
class System:
    """A target: its protein in PDB format, its ligands, the box around their poses.

    Attributes
    ----------
    unread : the place in the file and the title of each ligand that could not be read
    """

    target: str
    protein: str
    ligands: tuple[Ligand, ...]
    unread: tuple[str, ...]
    box: Box


def load_system(target: str) -> System:
    """Read one of the targets in ``FILES`` from the installed wheel, which is never imported."""
    ligand_file, protein_file = (_installed(f"{FOLDER}/{target}/{name}") for name in FILES[target])
    ligands, unread = read_ligands(ligand_file)
    if not ligands:
        raise DataNotFoundError(f"no ligand with a {MEASURED} in {ligand_file}")
    box = box_around([ligand.reference for ligand in ligands])
    return System(target, protein_file.read_text(encoding="utf-8"), ligands, unread, box)


def read_ligands(path: Path) -> tuple[tuple[Ligand, ...], tuple[str, ...]]:
    """Return the ligands of an SDF file, and the names of entries without structure or ΔG."""
    ligands, unread = [], []
    supplier = Chem.SDMolSupplier(str(path), removeHs=False)
    for index, mol in enumerate(supplier):
        try:
            ligands.append(Ligand(mol.GetProp("_Name"), float(mol.GetProp(MEASURED)), mol))
        except (AttributeError, KeyError, ValueError):  # AttributeError: mol is None
            title = supplier.GetItemText(index).partition("\n")[0].strip()
            unread.append(title or f"number {index + 1}")
    return tuple(ligands), tuple(unread)


def box_around(mols: Sequence[Chem.Mol], margin: float = MARGIN) -> Box:
    """Return the box of all atoms of ``mols``, with ``margin`` Å more on each side."""
    positions = np.concatenate([mol.GetConformer().GetPositions() for mol in mols])
    low, high = positions.min(axis=0) - margin, positions.max(axis=0) + margin
    center, size = (low + high) / 2, high - low
    return Box(tuple(center.round(3).tolist()), tuple(size.round(3).tolist()))


def _installed(name: str) -> Path:
    # Importing the package would take OpenMM and more. These are plain files.
    hint = "run: pip install --no-deps openmmforcefields"
    try:
        path = Path(str(distribution("openmmforcefields").locate_file(name)))
    except PackageNotFoundError:
        raise DataNotFoundError(
            f"the data come with openmmforcefields, which is not installed; {hint}"
        ) from None
    if not path.is_file():
        raise DataNotFoundError(
            f"the installed openmmforcefields has no file {name}; {hint}==0.15.1"
        )
    return path
