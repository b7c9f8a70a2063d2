"""A made-up data set that resembles docking, so that nothing has to be downloaded.

It has a pocket of fixed atoms, compounds of a few atoms each, and several poses of each compound.
The energy of a pose is a sum of Morse terms over pairs of a ligand atom and a pocket atom. The ΔG
of a compound is the energy of its best pose, plus noise. The best pose is known, as if from a
crystal structure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

N_TYPES = 4
N_POCKET_ATOMS = 24
POCKET_RADIUS = 5.0  # Å
CONTACT = 2.5  # Å, where a Morse term is lowest
STEEPNESS = 1.0  # 1/Å
DEEPEST = 0.3  # kcal/mol, of one pair of atoms
NOISE = 0.3  # kcal/mol


class Pose(NamedTuple):
    """Atoms of a ligand in the pocket.

    Attributes
    ----------
    types : shape (n_atoms,)
    positions : shape (n_atoms, 3), in Å
    """

    types: Tensor
    positions: Tensor


class Compound(NamedTuple):
    """Poses of one compound, its ΔG in kcal/mol, and the index of the pose in the crystal."""

    poses: list[Pose]
    delta_g: float
    crystal: int


class PoseBatch(NamedTuple):
    """Several poses in one; ``owner`` is the pose of each atom, shape (n_atoms,)."""

    types: Tensor
    positions: Tensor
    owner: Tensor
    n_poses: int


class CompoundBatch(NamedTuple):
    """The inputs of a :class:`MultiPoseModel` for several compounds, and their targets.

    Attributes
    ----------
    poses : the poses of all compounds, one after another
    sizes : the number of poses of each compound
    delta_g : in kcal/mol, shape (n_compounds,)
    crystal : for each compound the index of one of its poses
    """

    poses: list[Pose]
    sizes: list[int]
    delta_g: Tensor
    crystal: list[int]


def pocket() -> Tensor:
    """Return the pocket's atoms, spread evenly over a hemisphere, shape (N_POCKET_ATOMS, 3)."""
    index = torch.arange(N_POCKET_ATOMS) + 0.5
    angle, height = index * torch.pi * (5**0.5 - 1), -index / N_POCKET_ATOMS
    width = (1 - height.square()).sqrt()
    return POCKET_RADIUS * torch.stack([width * angle.cos(), width * angle.sin(), height], dim=1)


def make_compounds(n_compounds: int, *, seed: int) -> list[Compound]:
    """Return compounds of 4 to 8 atoms, in 4 to 12 poses each."""
    random = torch.Generator().manual_seed(seed)
    return [_compound(random) for _ in range(n_compounds)]


def _compound(random: torch.Generator) -> Compound:
    n_atoms, n_poses = (int(torch.randint(4, end, (), generator=random)) for end in (9, 13))
    types = torch.randint(N_TYPES, (n_atoms,), generator=random)
    steps = torch.randn(n_atoms, 3, generator=random)
    ligand = (1.5 * steps / steps.norm(dim=1, keepdim=True)).cumsum(0)  # bonds of 1.5 Å
    poses = [Pose(types, _placed(ligand, random)) for _ in range(n_poses)]
    energies = torch.stack([energy(pose) for pose in poses])
    noise = NOISE * torch.randn((), generator=random)
    return Compound(poses, (energies.amin() + noise).item(), int(energies.argmin()))


def _placed(ligand: Tensor, random: torch.Generator) -> Tensor:
    """Return a randomly rotated ligand, a few Å from the bottom of the pocket."""
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=random))[0]
    shift = torch.randn(3, generator=random) - torch.tensor([0.0, 0.0, 1.5])
    return (ligand - ligand.mean(0)) @ rotation + shift


def energy(pose: Pose) -> Tensor:
    """Return the energy of a pose in kcal/mol, shape (): Σ D ((1 - e^(-a(r - r0)))² - 1)."""
    depth = DEEPEST * (1 + pose.types) / N_TYPES
    # Bounded: two atoms in one place would outweigh everything.
    wall = torch.exp(-STEEPNESS * (torch.cdist(pose.positions, pocket()) - CONTACT)).clamp(max=3)
    return (depth[:, None] * ((1 - wall).square() - 1)).sum()


def collate_poses(poses: Sequence[Pose]) -> PoseBatch:
    """Make one batch of several poses, for the pose model."""
    n_atoms = torch.tensor([len(pose.types) for pose in poses])
    owner = torch.arange(len(poses)).repeat_interleave(n_atoms)
    types, positions = (torch.cat(parts) for parts in zip(*poses, strict=True))
    return PoseBatch(types, positions, owner.to(types.device), len(poses))


def collate_compounds(compounds: Sequence[Compound]) -> CompoundBatch:
    """Make one batch of several compounds, for the ``DataLoader``."""
    return CompoundBatch(
        poses=[pose for compound in compounds for pose in compound.poses],
        sizes=[len(compound.poses) for compound in compounds],
        delta_g=torch.tensor([compound.delta_g for compound in compounds]),
        crystal=[compound.crystal for compound in compounds],
    )


class PocketModel(torch.nn.Module):
    """ΔG of each pose of a batch, in kcal/mol: a sum over pairs of ligand and pocket atoms."""

    pocket: Tensor
    centres: Tensor

    def __init__(self, n_features: int = 32) -> None:
        super().__init__()
        self.register_buffer("pocket", pocket())
        self.register_buffer("centres", torch.linspace(1, 8, 15))  # Å
        self.of_type = torch.nn.Embedding(N_TYPES, n_features)
        self.of_distance = torch.nn.Linear(len(self.centres), n_features)
        self.of_pair = torch.nn.Sequential(
            torch.nn.Linear(n_features, n_features), torch.nn.SiLU(), torch.nn.Linear(n_features, 1)
        )

    def forward(self, batch: PoseBatch) -> Tensor:
        """Return shape (n_poses,)."""
        distance = torch.cdist(batch.positions, self.pocket)
        near = torch.exp(-2 * (distance[..., None] - self.centres).square())
        features = self.of_distance(near) * self.of_type(batch.types)[:, None]
        of_atoms = self.of_pair(features).sum(dim=(1, 2))
        return of_atoms.new_zeros(batch.n_poses).index_add(0, batch.owner, of_atoms)
