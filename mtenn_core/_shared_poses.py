"""Poses of one compound on several processes, which exchange predictions alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
from torch import Tensor
from torch.nn.functional import pad

from mtenn_core.errors import PredictionError

Group = dist.ProcessGroup


def exchange_sizes(own_sizes: Callable[[], list[int]], group: Group) -> list[list[int]]:
    """Return for each rank the number of poses that it has of each compound.

    Parameters
    ----------
    own_sizes : returns those of this process, or raises; all have to know, since they would wait

    Raises
    ------
    PredictionError : on all ranks the same
    """
    own: list[int] | PredictionError
    try:
        own = own_sizes()
    except PredictionError as error:
        own = error
    shares: list[list[int] | PredictionError] = [[]] * dist.get_world_size(group)
    dist.all_gather_object(shares, own, group)
    sizes = []
    for rank, share in enumerate(shares):
        if isinstance(share, PredictionError):
            raise PredictionError(f"rank {rank} of the group: {share}")
        if not sum(share):
            raise PredictionError(
                f"rank {rank} of the group: expected at least one pose; found none: leave the rank"
                " out of the group"
            )
        sizes.append(share)
    if len({len(share) for share in sizes}) > 1:
        raise PredictionError(
            "the ranks of a group share the poses of the same compounds, and sizes must have one"
            f" entry for each, 0 if need be; found {[len(share) for share in sizes]} entries"
        )
    return sizes


def gather_poses(own: Tensor, shares: Sequence[Sequence[int]], group: Group) -> list[Tensor]:
    """Return the numbers of all ranks, those of a compound together, one tensor per rank and it.

    Differentiable: a rank gets the gradient of the sum over all ranks' losses.

    Parameters
    ----------
    own : shape (n_poses,), those of this rank
    shares : of :func:`exchange_sizes`
    """
    longest = max(map(sum, shares))
    # gloo and nccl exchange tensors of one shape.
    gathered = differentiable.all_gather(pad(own, (0, longest - len(own))), group)
    parts = [
        of_rank[: sum(share)].split(list(share))
        for of_rank, share in zip(gathered, shares, strict=True)
    ]
    return [part[compound] for compound in range(len(shares[0])) for part in parts]
