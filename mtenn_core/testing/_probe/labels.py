"""Pose inputs that are labels, such as the number of a cluster or of a chain.

No declaration is needed. For a label, random fractions have no effect, because no two of them are
equal, or they raise an error, because they are no indices. Small integers work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mtenn_core.testing._probe.poses import Poses

# The first of these that works is used. Tables may have two rows, and labels may start at 1.
CHOICES: tuple[tuple[float, ...], ...] = ((0, 1, 2), (0, 1), (1, 2, 3), (1, 2), (-1, 0, 1))
# The checks use pose inputs of these sizes.
SIZES = (1.0, 30.0, 1e4)
N_POSES = 6
N_DRAWS = 6

Labels = Mapping[str, tuple[float, ...]]


def random_labels(choice: Sequence[float], n_poses: int, generator: torch.Generator) -> Tensor:
    """Return labels in random order, shape (n_poses,), float64.

    All labels are equally frequent. Fewer poses than labels get the first labels, so that no label
    below the highest one is missing.
    """
    each = torch.tensor(choice, dtype=torch.float64).repeat(-(-n_poses // len(choice)))[:n_poses]
    return each[torch.randperm(n_poses, generator=generator)]


def find_labels(
    names: Sequence[str], value: Callable[[Poses], Tensor], predictions: Tensor, seed: int
) -> Labels:
    """Return the pose inputs that are labels, with the labels to use for each.

    Parameters
    ----------
    value : returns the combination's value
    predictions : shape (n_poses,), valid predictions for the combination
    """
    trial = _Trial(names, value, predictions, torch.Generator().manual_seed(seed))
    if trial.works({}):
        fractions_matter = {name: trial.has_effect(name, {}) for name in names}
    else:
        fractions_matter = dict.fromkeys(names, False)
    if all(fractions_matter.values()):
        return {}
    suspects = [name for name, matter in fractions_matter.items() if not matter]
    for choice in CHOICES:
        labels = dict.fromkeys(suspects, choice)
        if trial.works(labels):
            break
    else:
        return {}
    for name in suspects:
        fewer = {other: choice for other in labels if other != name}
        if trial.works(fewer) and (
            trial.has_effect(name, fewer) or not trial.has_effect(name, labels)
        ):
            labels = fewer
    return labels


class _Trial:
    """Calls of a combination with random pose inputs."""

    def __init__(
        self,
        names: Sequence[str],
        value: Callable[[Poses], Tensor],
        predictions: Tensor,
        generator: torch.Generator,
    ) -> None:
        self.names, self.value, self.predictions = names, value, predictions
        self._generator = generator

    def _input(self, name: str, labels: Labels, size: float) -> Tensor:
        n_poses = len(self.predictions)
        if name in labels:
            return random_labels(labels[name], n_poses, self._generator)
        return size * torch.randn(n_poses, dtype=torch.float64, generator=self._generator)

    def _poses(self, labels: Labels, size: float = 1.0) -> Poses:
        return Poses(
            self.predictions, {name: self._input(name, labels, size) for name in self.names}
        )

    def works(self, labels: Labels) -> bool:
        """Return True if the combination raises no error for pose inputs of any size."""
        try:
            for size in SIZES:
                self.value(self._poses(labels, size))
        except Exception:
            return False
        return True

    def has_effect(self, name: str, labels: Labels) -> bool:
        """Return True if other numbers for a pose input change the value."""
        poses = self._poses(labels)
        before = self.value(poses)
        others = (self._input(name, labels, 1.0) for _ in range(N_DRAWS))
        return any(
            not torch.equal(before, self.value(poses.with_input(name, other))) for other in others
        )
