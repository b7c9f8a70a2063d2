"""Combined predictions without each of the poses, which the jackknife needs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mtenn_core._engine.compound_index import compound_of_pose
from mtenn_core._engine.compounds import combine_without_gradients
from mtenn_core._engine.evaluation import PoseInputs
from mtenn_core.combination import Combination

# The largest number of predictions that are combined together, unless one set has more.
LARGEST_BATCH = 1_000_000


def predictions_without_each_pose(
    combination: Combination,
    predictions: Tensor,
    inputs: PoseInputs,
    sizes: list[int],
    chosen: Tensor,
) -> Tensor:
    """Return the combined predictions without each of the chosen poses, in their order.

    Parameters
    ----------
    predictions, inputs : the numbers of all poses, shape (n_poses,)
    chosen : the places of the chosen poses, shape (n_chosen,)
    """
    values = [predictions.new_zeros(0)]
    for places, n_poses in _batches_of_sets(sizes, chosen):
        places = places.to(predictions.device)
        own = predictions[places], {name: numbers[places] for name, numbers in inputs.items()}
        values.append(combine_without_gradients(combination, *own, n_poses))
    return torch.cat(values)


def _batches_of_sets(sizes: list[int], chosen: Tensor) -> Iterator[tuple[Tensor, list[int]]]:
    """Yield batches of sets. A set has all poses of a compound except one chosen pose.

    Yields
    ------
    places : the places of the poses of all sets, one set after the other
    n_poses : the number of poses of each set
    """
    in_call = torch.tensor(sizes, device="cpu")
    compounds = compound_of_pose(sizes)[chosen]
    starts = (in_call.cumsum(0) - in_call)[compounds]
    n_poses = in_call[compounds] - 1
    ends = n_poses.cumsum(0)
    first = 0
    while first < len(chosen):
        before = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(torch.searchsorted(ends, before + LARGEST_BATCH, right=True)))
        own, total = n_poses[first:last], int(ends[last - 1]) - before
        sets = first + torch.repeat_interleave(own, output_size=total)
        places = torch.arange(before, before + total, device="cpu")
        places += (starts - ends + n_poses)[sets]
        places += places >= chosen[sets]  # jump over the pose
        yield places, own.tolist()
        first = last
