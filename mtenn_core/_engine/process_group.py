"""Share the poses of a compound among several processes that exchange only predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from mtenn_core._engine.call import Call
from mtenn_core.errors import PredictionError

Group = dist.ProcessGroup


def exchange_sizes(arguments: Callable[[], Call], group: Group) -> tuple[Call, list[list[int]]]:
    """Return the call of this process, and for each rank the number of poses of each compound.

    Parameters
    ----------
    arguments : returns the checked call of this process, or raises an error

    Raises
    ------
    PredictionError : the call of some rank is wrong. All ranks raise the same error; otherwise they
        would wait for the rank that raised.
    """
    own: Call | PredictionError
    try:
        own = arguments()
    except PredictionError as error:
        own = error
    except Exception as error:  # from an iterator of poses, for example
        own = PredictionError(f"{type(error).__name__}: {error}")
    share = own if isinstance(own, PredictionError) else own.sizes
    shares: list[list[int] | PredictionError] = [[]] * dist.get_world_size(group)
    dist.all_gather_object(shares, share, group)
    sizes = _checked_shares(shares)
    assert not isinstance(own, PredictionError)
    return own, sizes


def _checked_shares(shares: list[list[int] | PredictionError]) -> list[list[int]]:
    sizes = []
    for rank, share in enumerate(shares):
        if isinstance(share, PredictionError):
            raise PredictionError(f"rank {rank} of the group: {share}")
        if not sum(share):
            raise PredictionError(
                f"rank {rank} of the group: expected at least one pose; found none. Leave the rank"
                " out of the group."
            )
        sizes.append(share)
    if len({len(share) for share in sizes}) > 1:
        raise PredictionError(
            "the ranks of a group share the poses of the same compounds. On each rank, sizes must"
            " have one entry per compound; the entry is 0 if the rank has no pose of the compound."
            f" The ranks have {[len(share) for share in sizes]} entries."
        )
    return sizes


def gather_poses(own: Tensor, shares: Sequence[Sequence[int]], group: Group) -> list[Tensor]:
    """Return the numbers of all ranks, sorted by compound and then by rank.

    The function is differentiable. A rank gets the gradient of the sum over all ranks' losses.

    Parameters
    ----------
    own : the numbers of this rank, shape (n_poses,) or (n_poses, n_columns)
    shares : the second result of :func:`exchange_sizes`

    Returns
    -------
    one tensor for each compound and rank

    Raises
    ------
    PredictionError : the ranks have different numbers of columns. All ranks raise the same error.
    """
    _check_same_columns(own, group)
    longest = max(map(sum, shares))
    # gloo and nccl need tensors of the same shape on all ranks.
    padding = (0, 0) * (own.dim() - 1) + (0, longest - len(own))  # the last dimension is first
    gathered = _GatherRanks.apply(pad(own, padding), group)
    parts = [
        of_rank[: sum(share)].split(list(share))
        for of_rank, share in zip(gathered, shares, strict=True)
    ]
    return [part[compound] for compound in range(len(shares[0])) for part in parts]


def _check_same_columns(own: Tensor, group: Group) -> None:
    if own.dim() == 1:
        return
    n_columns = [0] * dist.get_world_size(group)
    dist.all_gather_object(n_columns, own.shape[1], group)
    for rank, found in enumerate(n_columns):
        if found != n_columns[0]:
            raise PredictionError(
                f"rank {rank} of the group: the pose model must return the same number of columns"
                f" on all ranks. It returned {n_columns[0]} on rank 0; found {found}. Build the"
                " same pose model on each rank."
            )


@contextmanager
def same_random_numbers(device: torch.device, group: Group) -> Iterator[None]:
    """Draw the same random numbers on all ranks within a block.

    They are those of the first rank, whose random state goes on. The states of the other ranks do
    not change.
    """
    first = dist.get_global_rank(group, 0)
    seed = torch.zeros(1, dtype=torch.int64, device=device)
    if dist.get_rank(group) == 0:
        seed.random_()
    dist.broadcast(seed, first, group)
    # manual_seed seeds all devices, so the states of all are put back.
    kind = "cuda" if device.type == "cpu" else device.type
    devices = list(range(getattr(torch, kind).device_count()))
    with torch.random.fork_rng(devices, device_type=kind):
        torch.manual_seed(int(seed))
        yield


# torch.distributed.nn.functional has both Functions, but it is deprecated since torch 2.13.
class _GatherRanks(torch.autograd.Function):
    """Gather the tensors of all ranks, shape (n_ranks, …)."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: Group) -> Tensor:
        ctx.group = group
        gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, own.contiguous(), group)
        return torch.stack(gathered)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return _SumOverRanks.apply(grad_output, ctx.group), None


class _SumOverRanks(torch.autograd.Function):
    """Sum the ranks' tensors, shape (n_ranks, …), and return this rank's row."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Group) -> Tensor:
        ctx.group = group
        # A row has only a few numbers, so all_reduce is fast enough. gloo may lack reduce_scatter.
        total = rows.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total[dist.get_rank(group)].clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return _GatherRanks.apply(grad_output, ctx.group), None
