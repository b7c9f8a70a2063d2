"""Put pose energies together with every registered combination."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from dock import Docked
from torch import Tensor

from mtenn_core import Combination, MultiPoseModel, registry

KT = 0.593  # kcal/mol at 298 K
# Arguments of a combination that takes them: the unit of the energies, and that ligands with more
# poses have no lower score for it.
ARGUMENTS: dict[str, Any] = {"kT": KT, "pred_scale": 1 / KT, "normalize": True}


@dataclass(frozen=True)
class Combined:
    """The scores and pose weights of one combination.

    Attributes
    ----------
    arguments : arguments of the combination
    scores : in kcal/mol, shape (n_ligands,)
    weights : ∂(score)/∂(pose energy), dimensionless, for each ligand of shape (n_poses,)
    """

    arguments: dict[str, Any]
    scores: Tensor
    weights: tuple[Tensor, ...]


class PoseEnergies(torch.nn.Module):
    """A pose model that looks up poses in a table of energies, which is its parameter.

    The gradient of a combined score with respect to this parameter is the pose weights, at every
    depth of the combination.
    """

    def __init__(self, energies: Tensor) -> None:
        super().__init__()
        self.energies = torch.nn.Parameter(energies)

    def forward(self, index: Tensor) -> Tensor:
        """Return the energy of the pose with this index, shape (), in kcal/mol."""
        return self.energies[index]


def arguments_of(combination: type[Combination]) -> dict[str, Any]:
    """Return the members of ``ARGUMENTS`` that a combination takes."""
    taken = inspect.signature(combination.__init__).parameters
    return {name: value for name, value in ARGUMENTS.items() if name in taken}


def combine(combination: Combination, docked: Sequence[Docked]) -> tuple[Tensor, list[Tensor]]:
    """Return the scores, shape (n_ligands,), and the pose weights of each ligand.

    The gradients are ``"stored"``, because a combination that overrides ``forward`` needs that.
    """
    sizes = [len(ligand.energies) for ligand in docked]
    energies = [energy for ligand in docked for energy in ligand.energies]
    table = PoseEnergies(torch.tensor(energies, dtype=torch.float64))
    model = MultiPoseModel(table, combination, gradients="stored")
    scores = model(list(torch.arange(len(energies))), sizes=sizes).prediction
    (weights,) = torch.autograd.grad(scores.sum(), table.energies)
    return scores.detach(), list(weights.split(sizes))


def combine_all(docked: Sequence[Docked]) -> tuple[dict[str, Combined], dict[str, str]]:
    """Return the results of all combinations of one number per pose, and why others failed."""
    results, refused = {}, {}
    for name in registry.names():
        try:
            cls = registry.get(name)
            if cls.pose_columns is not None:
                continue  # it takes several numbers per pose, and Vina gives one
            arguments = arguments_of(cls)
            combination = registry.create(name, **arguments)
            _check_domain(combination, docked)
            scores, weights = combine(combination, docked)
            if not all(numbers.isfinite().all() for numbers in [scores, *weights]):
                raise ValueError("gives scores or pose weights that are not finite")
            results[name] = Combined(arguments, scores, tuple(weights))
        # Somebody else's code, and energies it was not made for: the others go on.
        except Exception as error:
            refused[name] = str(error).partition("\n")[0] or type(error).__name__
    return results, refused


def _check_domain(combination: Combination, docked: Sequence[Docked]) -> None:
    low, high = combination.domain
    if not all(low < energy < high for ligand in docked for energy in ligand.energies):
        raise ValueError(
            f"takes numbers between {low:g} and {high:g}, and pose energies lie outside"
        )
