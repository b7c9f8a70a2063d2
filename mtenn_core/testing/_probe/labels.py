"""Pose inputs that are labels, such as the number of a cluster or of a chain.

A combination may declare the kind of each input. If it does not, :func:`find_labels` tries: for a
label, random fractions have no effect, because no two of them are equal, or they raise an error,
because they are no indices. Small integers work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import count
from types import MappingProxyType

import torch
from torch import Tensor

from mtenn_core.combination import InputKind
from mtenn_core.testing._probe.finite_differences import ULPS, resolution
from mtenn_core.testing._probe.poses import Poses

# The first of these that works is used. Tables may have two rows, and labels may start at 1.
CHOICES: tuple[tuple[float, ...], ...] = ((0, 1, 2), (0, 1), (1, 2, 3), (1, 2), (-1, 0, 1))
# The checks use pose inputs of these sizes.
SIZES = (1.0, 30.0, 1e4)
N_DRAWS = 6

Labels = Mapping[str, tuple[float, ...]]


def n_poses_of_trials(min_poses: int) -> int:
    """Return a number of poses of which two or three labels cannot have equal shares.

    The mean of the means of equally large groups is the mean, so that the label has no effect.
    """
    return next(n for n in count(max(7, min_poses)) if n % 2 and n % 3)


def random_labels(choice: Sequence[float], n_poses: int, generator: torch.Generator) -> Tensor:
    """Return labels in random order, shape (n_poses,), float64.

    The labels are nearly equally frequent. If there are fewer poses than labels, they get the first
    labels, so that no label below the highest one is missing.
    """
    each = torch.tensor(choice, dtype=torch.float64).repeat(-(-n_poses // len(choice)))[:n_poses]
    return each[torch.randperm(n_poses, generator=generator)]


def random_positive(n_poses: int, generator: torch.Generator) -> Tensor:
    """Return numbers above 0 of sizes around 1, shape (n_poses,), float64."""
    return torch.randn(n_poses, dtype=torch.float64, generator=generator).exp()


def declared_labels(
    kinds: Mapping[str, InputKind],
    value: Callable[[Poses], Tensor],
    predictions: Tensor,
    seed: int,
    min_poses: int = 1,
) -> Labels:
    """Return the labels to use for each pose input that is declared as a label.

    A rule may refuse some labels: a table may have two rows, and ranks start at 1.

    Parameters
    ----------
    kinds : the declared kind of each pose input
    value, predictions, min_poses : see :func:`find_labels`
    """
    names = [name for name, kind in kinds.items() if kind == "label"]
    choices = [dict.fromkeys(names, choice) for choice in CHOICES if min(choice) >= 0]
    if not names:
        return {}
    generator = torch.Generator().manual_seed(seed)
    trial = _Trial(list(kinds), value, predictions, generator, min_poses, kinds)
    # Most rules take the first of the choices. Then there are no other trials.
    fits = (labels for labels in choices if trial.works(labels) and trial.is_finite(labels))
    return next(fits, None) or next(filter(trial.works, choices), choices[0])


def find_labels(
    names: Sequence[str],
    value: Callable[[Poses], Tensor],
    predictions: Tensor,
    seed: int,
    min_poses: int = 1,
) -> Labels:
    """Return the pose inputs that are labels, with the labels to use for each.

    Parameters
    ----------
    value : returns the combination's value
    predictions : shape (n_poses,) or (n_poses, n_columns), valid for the combination
    min_poses : smallest number of poses that the combination accepts
    """
    generator = torch.Generator().manual_seed(seed)
    trial = _Trial(names, value, predictions, generator, min_poses)
    if trial.works({}):
        fractions_matter = {name: trial.has_effect(name, {}) for name in names}
    else:
        fractions_matter = dict.fromkeys(names, False)
    if all(fractions_matter.values()):
        return {}
    suspects = [name for name, matters in fractions_matter.items() if not matters]
    choices = [dict.fromkeys(suspects, choice) for choice in CHOICES]
    working = [labels for labels in choices if trial.works(labels)]
    if not working:
        return {}
    labels = next(filter(trial.is_finite, working), working[0])
    for name in suspects:
        fewer = {other: choice for other, choice in labels.items() if other != name}
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
        min_poses: int,
        kinds: Mapping[str, InputKind] = MappingProxyType({}),
    ) -> None:
        self.names, self.value, self.predictions = names, value, predictions
        self.kinds = kinds
        self._generator = generator
        self._min_poses = min_poses

    def _input(self, name: str, labels: Labels, size: float, n_poses: int) -> Tensor:
        if name in labels:
            return random_labels(labels[name], n_poses, self._generator)
        if self.kinds.get(name) == "positive":
            return size * random_positive(n_poses, self._generator)
        return size * torch.randn(n_poses, dtype=torch.float64, generator=self._generator)

    def _poses(self, labels: Labels, size: float = 1.0, *, few: bool = False) -> Poses:
        y = self.predictions[: self._min_poses] if few else self.predictions
        return Poses(y, {name: self._input(name, labels, size, len(y)) for name in self.names})

    def works(self, labels: Labels) -> bool:
        """Return True if the combination raises no error for pose inputs of any size."""
        try:
            for size in SIZES:
                self.value(self._poses(labels, size))
        except Exception:
            return False
        return True

    def is_finite(self, labels: Labels) -> bool:
        """Return True if the values of several poses and of the fewest poses are finite.

        A weight is often divided by the sum of all weights, which is 0 if the only label is 0.
        """
        try:
            values = [self.value(self._poses(labels, few=few)) for few in (False, True)]
        except Exception:
            return False
        return all(bool(value.isfinite().all()) for value in values)

    def has_effect(self, name: str, labels: Labels) -> bool:
        """Return True if other numbers for a pose input change more than the last digits.

        The order of a sum may depend on the input, and changes the last digits.
        """
        poses = self._poses(labels)
        others = (self._input(name, labels, 1.0, len(poses)) for _ in range(N_DRAWS))
        values = torch.stack(
            [self.value(poses), *(self.value(poses.with_input(name, other)) for other in others)]
        )
        sizes = torch.cat([self.predictions.flatten(), values.nan_to_num(0, 0, 0).flatten()]).abs()
        roundoff = ULPS * resolution(values) * float(sizes.amax())
        same = torch.isclose(values, values[0], rtol=0, atol=roundoff, equal_nan=True)
        return not bool(same.all())
