"""Dock ligands with AutoDock Vina, several at a time, and keep their poses on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rdkit import Chem, RDLogger
from rdkit.Chem.rdDistGeom import EmbedMolecule, ETKDGv3
from rdkit.Chem.rdForceFieldHelpers import MMFFOptimizeMolecule
from rdkit.Chem.rdMolAlign import CalcRMS
from systems import Box, Ligand, System

# Tags of the SDF files.
ENERGY = "vina_energy (kcal/mol)"
RMSD = "rmsd to the reference pose (angstrom)"
ANY_ENERGY = 1000.0  # kcal/mol above the lowest: Vina would leave out poses 3 above it
PACKAGES = ("meeko", "rdkit", "vina")  # other versions may give other poses


class ReceptorError(Exception):
    """The protein cannot be prepared for docking; the message says why."""


class LigandError(Exception):
    """A ligand cannot be docked; the message says why."""


@dataclass(frozen=True)
class Search:
    """How Vina searches: Monte Carlo runs per ligand, poses kept, seed."""

    exhaustiveness: int
    n_poses: int
    seed: int


@dataclass(frozen=True)
class Docked:
    """A ligand and its poses, the lowest energy first.

    Attributes
    ----------
    poses : one molecule for each pose, in the protein's frame
    energies : Vina's energy of each pose, in kcal/mol
    rmsds : RMSD to the reference pose, in Å; in place, heavy atoms, corrected for symmetry
    reference_energy : Vina's energy of the reference pose after local minimisation, in kcal/mol
    """

    ligand: Ligand
    poses: tuple[Chem.Mol, ...]
    energies: tuple[float, ...]
    rmsds: tuple[float, ...]


@dataclass(frozen=True)
class Failed:
    """A ligand that could not be docked, and why."""

    ligand: Ligand
    reason: str


@dataclass(frozen=True)
class Store:
    """The folder with poses: for each ligand an SDF file, and a JSON file with its settings."""

    folder: Path
    system: System
    search: Search

    def path(self, ligand: Ligand) -> Path:
        """Return the SDF file of a ligand."""
        return self.folder / f"{ligand.file_name}.sdf"

    def made_with(self, ligand: Ligand) -> dict[str, Any]:
        """Return everything that the poses of a ligand depend on."""
        return {
            "target": self.system.target,
            "protein": _digest(self.system.protein),
            "ligand": _digest(Chem.MolToMolBlock(ligand.reference)),
            "box": {name: list(edges) for name, edges in asdict(self.system.box).items()},
            "search": asdict(self.search),
            "versions": {package: version(package) for package in PACKAGES},
        }

    def save(self, ligand: Ligand, text: str) -> Docked:
        """Write the poses of a ligand, and read them back."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(ligand)
        path.write_text(text, encoding="utf-8")
        record = {"made_with": self.made_with(ligand), "sha256": _digest(text)}
        path.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        return read_poses(ligand, text)

    def load(self, ligand: Ligand) -> Docked | None:
        """Return the kept poses, or None if they are missing, outdated or damaged."""
        path = self.path(ligand)
        try:
            text = path.read_text(encoding="utf-8")
            record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        except (OSError, ValueError):  # ValueError: neither UTF-8 nor JSON
            return None
        wanted = {"made_with": self.made_with(ligand), "sha256": _digest(text)}
        return read_poses(ligand, text) if record == wanted else None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def read_poses(ligand: Ligand, text: str) -> Docked:
    """Return the poses in the text of an SDF file that :func:`dock_ligand` wrote."""
    supplier = Chem.SDMolSupplier()
    supplier.SetData(text, removeHs=False)
    poses = tuple(supplier)
    energies, rmsds = (tuple(float(pose.GetProp(tag)) for pose in poses) for tag in (ENERGY, RMSD))
    return Docked(ligand, poses, energies, rmsds)


def prepare_receptor(system: System, path: Path) -> list[str]:
    """Write the protein as Vina's PDBQT file; return the residues that had to be left out."""
    # Here and below: meeko and Vina take a second to import, and what is kept needs neither.
    from meeko import MoleculePreparation, PDBQTWriterLegacy, Polymer, ResidueChemTemplates

    logging.getLogger("meeko").setLevel(logging.CRITICAL)  # it logs what is returned here
    templates = ResidueChemTemplates.create_from_defaults()
    known = {*templates.residue_templates, *templates.ambiguous}
    unknown = {line[17:20].strip() for line in _atoms(system.protein)} - known
    if unknown:  # for which meeko would ask a server
        raise ReceptorError(f"{system.target}: meeko has no template for {sorted(unknown)}")
    polymer = Polymer.from_pdb_string(
        system.protein, templates, MoleculePreparation(), allow_bad_res=True
    )
    rigid, _ = PDBQTWriterLegacy.write_from_polymer(polymer)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(rigid, encoding="utf-8")
    return [name.strip(":") for name in polymer.get_ignored_monomers()]


def _atoms(protein: str) -> list[str]:
    return [line for line in protein.splitlines() if line.startswith(("ATOM", "HETATM"))]


def dock_ligand(vina: Any, ligand: Ligand, search: Search) -> str:
    """Dock a ligand from a new conformer, and return its poses as an SDF file.

    Parameters
    ----------
    vina : Vina with the receptor and the maps of the box
    """
    from meeko import PDBQTMolecule, RDKitMolCreate

    vina.set_ligand_from_string(_pdbqt(fresh_conformer(ligand.reference)))
    vina.dock(exhaustiveness=search.exhaustiveness, n_poses=search.n_poses)
    energies = vina.energies(search.n_poses, ANY_ENERGY)[:, 0]
    text = vina.poses(search.n_poses, ANY_ENERGY)
    (mol,) = RDKitMolCreate.from_pdbqt_mol(PDBQTMolecule(text, skip_typing=True))
    mol.SetProp("_Name", ligand.name)
    return _sdf(mol, ligand, energies)


def fresh_conformer(mol: Chem.Mol) -> Chem.Mol:
    """Return a copy whose conformer is from ETKDGv3, minimised with MMFF94.

    Vina turns bonds, but does not change rings, angles and lengths. The reference conformer would
    give away part of the answer.
    """
    fresh = Chem.Mol(mol)
    parameters = ETKDGv3()
    parameters.randomSeed = 1
    if EmbedMolecule(fresh, parameters) != 0:
        raise LigandError("RDKit finds no conformer")
    if MMFFOptimizeMolecule(fresh) == -1:
        raise LigandError("MMFF94 has no parameters for it")
    return fresh


def _pdbqt(mol: Chem.Mol) -> str:
    """Return a molecule in Vina's format, with its rotatable bonds."""
    from meeko import MoleculePreparation, PDBQTWriterLegacy

    (setup,) = MoleculePreparation()(mol)
    text, fine, error = PDBQTWriterLegacy.write_string(setup)
    if not fine:
        raise LigandError(error.strip())
    return text


def _sdf(mol: Chem.Mol, ligand: Ligand, energies: Sequence[float]) -> str:
    """Return the conformers of ``mol`` as an SDF file, with energies and RMSDs."""
    heavy, reference = Chem.RemoveHs(mol), Chem.RemoveHs(ligand.reference)
    texts = []
    for index, energy in enumerate(energies):
        rmsd = CalcRMS(heavy, reference, prbId=index)  # in place: nothing is moved
        mol.SetProp(ENERGY, f"{energy:.3f}")
        mol.SetProp(RMSD, f"{rmsd:.3f}")
        texts.append(Chem.SDWriter.GetText(mol, confId=index))
    return "".join(texts)


_vina: Any = None  # of a docking process


def _begin(receptor: Path, box: Box, seed: int) -> None:
    """Load the receptor and make the maps of the box, once in each process."""
    global _vina
    from vina import Vina

    RDLogger.DisableLog("rdApp.*")
    # One core: ligands are docked side by side, and the poses do not depend on it.
    # Not 0, for which Vina draws a seed.
    _vina = Vina(cpu=1, seed=seed + 1, verbosity=0)
    _vina.set_receptor(str(receptor))
    _vina.compute_vina_maps(list(box.center), list(box.size))


def _dock(ligand: Ligand, search: Search) -> tuple[str, str]:
    """Return the poses as SDF and "", or "" and the reason why there are none."""
    try:
        return dock_ligand(_vina, ligand, search), ""
    except Exception as error:  # whatever it is: the other ligands have a right to be docked
        return "", f"{type(error).__name__}: {error}".strip().replace("\n", " ")


def dock_all(
    ligands: Sequence[Ligand], store: Store, receptor: Path, *, processes: int
) -> Iterator[Docked | Failed]:
    """Dock ligands in parallel and keep their poses, in the order in which they finish."""
    died = []
    with _pool(store, receptor, min(processes, len(ligands))) as start:
        futures = start(ligands)
        for future in as_completed(futures):
            outcome = _outcome(futures[future], future, store)
            if outcome is None:  # it, or another one beside it
                died.append(futures[future])
            else:
                yield outcome
    for ligand in died:
        with _pool(store, receptor, 1) as start:
            (future,) = start([ligand])
            yield _outcome(ligand, future, store) or Failed(ligand, "the docking process died")


def _outcome(ligand: Ligand, future: Future[Any], store: Store) -> Docked | Failed | None:
    try:
        text, reason = future.result()
    except BrokenProcessPool:
        return None
    return store.save(ligand, text) if text else Failed(ligand, reason)


@contextmanager
def _pool(store: Store, receptor: Path, processes: int) -> Iterator[Any]:
    """Yield a function that starts to dock a ligand; an exception ends the processes at once."""
    context = multiprocessing.get_context("spawn")  # fork would copy torch's threads, half alive
    arguments = receptor, store.system.box, store.search.seed
    executor = ProcessPoolExecutor(processes, context, _begin, arguments)

    def start(ligands: Sequence[Ligand]) -> dict[Future[Any], Ligand]:
        # Processes inherit that Ctrl-C is ignored: it is for this one, which ends them.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return {executor.submit(_dock, ligand, store.search): ligand for ligand in ligands}
        finally:
            signal.signal(signal.SIGINT, before)

    try:
        yield start
    except BaseException:
        executor.shutdown(wait=False, cancel_futures=True)
        # Vina sees no signal that Python handles until it is done with a ligand.
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    executor.shutdown()
