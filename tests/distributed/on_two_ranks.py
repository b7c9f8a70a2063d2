"""The tests that need two processes: run by ``torchrun``, reported to ``test_distributed.py``.

Each case runs on both ranks, in a process group of its own so that one that fails leaves nothing to
the next, and compares with plain autograd in one process.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Collection, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mtenn_core import Combination, MultiPoseModel
from mtenn_core._engine.mode_table import MODES
from mtenn_core.errors import CheckpointError, GradientError, PredictionError

# Sums of a few hundred float64 products, in another order: some 1e-15 of the largest.
EXACT = {"rtol": 1e-10, "atol": 1e-13}
# Poses of each compound, by rank; as many poses in all, which nested fully_shard needs.
SIZES = [[4, 1], [1, 1, 3]]
# Above what a case takes, and soon enough that one that hangs does not hold up the others.
TIMEOUT = timedelta(seconds=10)

# Where to write: see test_distributed.py.
REPORT = Path(sys.argv[1]) if __name__ == "__main__" else Path()
COUNTER = itertools.count()
CASES: dict[str, Callable[[], None]] = {}


def case(**options: Collection[object]):
    """Let a function be run on both ranks, once for each combination of options."""

    def register(function):
        for values in itertools.product(*options.values()):
            ids = "-".join(getattr(value, "__name__", str(value)) for value in values)
            name = function.__name__ + f"[{ids}]" * bool(ids)
            CASES[name] = partial(function, **dict(zip(options, values, strict=True)))
        return function

    return register


class Learnable(Combination):
    """A soft minimum with a temperature that trains, and its derivative in closed form."""

    def __init__(self, kT: float = 0.7, shift: float = 0.0) -> None:
        super().__init__()
        self.shift = shift
        # fully_shard takes no parameter of shape ().
        self.kT = torch.nn.Parameter(torch.tensor([kT], dtype=torch.float64))

    def combine(self, predictions: Tensor) -> Tensor:
        minimum = -(self.kT * torch.logsumexp(-predictions / self.kT, dim=0)).squeeze()
        return minimum + self.shift

    def pose_weights(self, predictions: Tensor) -> Tensor:
        return torch.softmax(-predictions / self.kT, dim=0)


class Minimum(Combination):
    """Sharp: all weights but one are exactly zero."""

    def combine(self, predictions: Tensor) -> Tensor:
        return predictions.min()


class Docked(Combination):
    """Needs a further number per pose."""

    pose_inputs = ("docking_score",)

    def combine(self, predictions: Tensor, docking_score: Tensor) -> Tensor:
        return (torch.softmax(-docking_score, dim=0) * predictions).sum()


class FullDepth(Combination):
    def forward(self, pred_list, grad_dict, param_names, *model_params):
        return Learnable()(pred_list, grad_dict, param_names, *model_params)


class Noisy(Combination):
    stochastic = True

    def combine(self, predictions: Tensor) -> Tensor:
        return (predictions * torch.rand_like(predictions)).mean()


class Attention(Combination):
    """Pools embeddings, with parameters of its own, and returns a vector."""

    pose_columns = 3

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.score = torch.nn.Linear(3, 1, dtype=torch.float64)

    def combine(self, predictions: Tensor) -> Tensor:
        return torch.softmax(self.score(predictions).squeeze(-1), dim=0) @ predictions


class AnyAttention(Combination):
    pose_columns = "any"

    def combine(self, predictions: Tensor) -> Tensor:
        return (predictions[:, 0].softmax(0) @ predictions).sum()


class Confident(Combination):
    """Weights the first column by the second, with its derivative in closed form."""

    pose_columns = ("affinity", "confidence")

    def combine(self, predictions: Tensor) -> Tensor:
        affinities, confidences = predictions.unbind(-1)
        return (torch.softmax(confidences, dim=0) * affinities).sum()

    def pose_weights(self, predictions: Tensor) -> Tensor:
        affinities, confidences = predictions.unbind(-1)
        p = torch.softmax(confidences, dim=0)
        return torch.stack([p, p * (affinities - (p * affinities).sum())], dim=-1)


def new_pose_model(*, frozen: bool = False, n_columns: int = 1) -> torch.nn.Sequential:
    """Return the same on all ranks: it maps a pose of 4 numbers to ``n_columns`` numbers."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(4, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, n_columns)]
    tanh = torch.nn.Tanh()
    model = torch.nn.Sequential(layers[0], tanh, layers[1], tanh, layers[2]).double()
    model[:4].requires_grad_(not frozen)
    return model


def new_poses(n_poses: Sequence[int], seed: int = 1) -> list[Tensor]:
    """Return the poses of each rank."""
    generator = torch.Generator().manual_seed(seed)
    # One row each: Linear returns a view for less, of which fully_shard warns.
    return [3 * torch.randn(n, 1, 4, dtype=torch.float64, generator=generator) for n in n_poses]


def loss_of(prediction: Tensor, pose_predictions: Tensor) -> Tensor:
    return prediction.square().sum() + 0.1 * pose_predictions.sin().sum()


def combined_loss(prediction: Tensor, pose_predictions: Tensor) -> Tensor:
    return prediction.square().sum()


def plain_output(model, poses, sizes, **inputs):
    """Combined and pose predictions by plain autograd, in one process."""
    y = torch.cat([model.pose_model(pose) for pose in poses])
    if model.tasks is None and model.combination.pose_columns is None:
        y = y.flatten()
    split = {name: values.split(sizes) for name, values in inputs.items()}
    combined = []
    for i, part in enumerate(y.split(sizes)):
        combine = partial(model.combination.combine, **{n: parts[i] for n, parts in split.items()})
        tasks = [combine(part)] if model.tasks is None else map(combine, part.unbind(1))
        combined.append(torch.stack(list(tasks)).squeeze(0))
    return torch.stack(combined), y


def plain_gradients(model, poses_of_ranks, loss=loss_of, sizes=SIZES):
    """Return by name the mean over ranks of the gradients of each rank's loss."""
    model = copy.deepcopy(model)
    model.zero_grad()
    for poses, of_rank in zip(poses_of_ranks, sizes, strict=True):
        (loss(*plain_output(model, poses, of_rank)) / len(poses_of_ranks)).backward()
    return gradients(model)


def whole(tensor: Tensor | None) -> Tensor | None:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(model):
    model = getattr(model, "module", model)
    return {name: whole(param.grad) for name, param in model.named_parameters()}


def parameters(model):
    model = getattr(model, "module", model)
    return {name: whole(param.detach()) for name, param in model.named_parameters()}


def check_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if tensor is None:
            assert found[name] is None, f"{name} has a gradient"
        else:
            torch.testing.assert_close(found[name], tensor, **EXACT, msg=f"{name}: {{}}".format)


def check_raises(error, match, call):
    """Check that it raises the same on all ranks."""
    try:
        call()
    except error as raised:
        found = f"{type(raised).__name__}: {raised}"
    else:
        raise AssertionError(f"did not raise {error.__name__}")
    assert match in found, found
    of_ranks = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, found)
    assert len(set(of_ranks)) == 1, of_ranks


# DistributedDataParallel, each rank with compounds of its own.


def plain_ddp(model):
    return DistributedDataParallel(model)


def ddp_that_finds_unused(model):
    return DistributedDataParallel(model, find_unused_parameters=True)


def ddp_with_static_graph(model):
    return DistributedDataParallel(model, static_graph=True)


def ddp_with_small_buckets(model):
    return DistributedDataParallel(model, bucket_cap_mb=1e-4, gradient_as_bucket_view=True)


DDP = [plain_ddp, ddp_that_finds_unused, ddp_with_static_graph, ddp_with_small_buckets]


@case(mode=MODES, wrap=DDP)
def ddp_averages_the_gradients_of_plain_autograd(mode, wrap):
    rank = dist.get_rank()
    model = MultiPoseModel(new_pose_model(), Learnable(), gradients=mode)
    wrapped = wrap(model)
    for seed in (1, 2):
        poses = new_poses(map(sum, SIZES), seed)
        expected = plain_gradients(model, poses)
        wrapped.zero_grad()
        loss_of(*wrapped(poses[rank], SIZES[rank])).backward()
        check_same(gradients(wrapped), expected)


@case(mode=MODES, wrap=DDP)
def ddp_averages_the_gradients_of_poses_with_several_numbers(mode, wrap):
    rank, poses = dist.get_rank(), new_poses(map(sum, SIZES))
    for combination, tasks in [(Attention(), None), (Learnable(), 3)]:
        pose_model = new_pose_model(n_columns=3)
        model = MultiPoseModel(pose_model, combination, gradients=mode, tasks=tasks)
        expected = plain_gradients(model, poses)
        wrapped = wrap(model)
        loss_of(*wrapped(poses[rank], SIZES[rank])).backward()
        check_same(gradients(wrapped), expected)


@case(mode=MODES)
def ddp_accumulates_under_no_sync(mode):
    rank = dist.get_rank()
    model = MultiPoseModel(new_pose_model(), Learnable(), gradients=mode)
    first, second = (new_poses(map(sum, SIZES), seed) for seed in (1, 2))
    expected = plain_gradients(model, first)
    for name, gradient in plain_gradients(model, second).items():
        expected[name] += gradient
    wrapped = DistributedDataParallel(model)
    with wrapped.no_sync():
        loss_of(*wrapped(first[rank], SIZES[rank])).backward()
    loss_of(*wrapped(second[rank], SIZES[rank])).backward()
    check_same(gradients(wrapped), expected)


@case(mode=MODES, wrap=DDP)
def a_rank_whose_poses_all_have_weight_zero_keeps_ddp_in_step(mode, wrap):
    rank, poses = dist.get_rank(), new_poses(map(sum, SIZES))
    model = MultiPoseModel(new_pose_model(), Learnable(), gradients=mode)
    expected = plain_gradients(model, poses[:1], sizes=SIZES[:1])
    wrapped = wrap(model)
    (2 * (1 - rank) * loss_of(*wrapped(poses[rank], SIZES[rank]))).div(2).backward()
    check_same(gradients(wrapped), {name: grad / 2 for name, grad in expected.items()})


@case(mode=MODES, chunk_size=[1, 2])
def ranks_that_leave_out_different_poses_agree_under_ddp(mode, chunk_size):
    if mode == "stored":
        chunk_size = 1
    rank, poses = dist.get_rank(), new_poses(map(sum, SIZES))
    options = {"collate": torch.cat, "chunk_size": chunk_size, "gradients": mode}
    model = MultiPoseModel(new_pose_model(), Minimum(), **options)
    expected = plain_gradients(model, poses, combined_loss)
    wrapped = DistributedDataParallel(model)
    combined_loss(*wrapped(poses[rank], SIZES[rank])).backward()
    check_same(gradients(wrapped), expected)


# Fully sharded, each rank with compounds of its own.


def root(model):
    return fully_shard(model)


def nested(model):
    for layer in model.pose_model:
        if any(True for _ in layer.parameters()):
            fully_shard(layer)
    return fully_shard(model)


def combination_and_root(model):
    fully_shard(model.combination)
    return fully_shard(model)


def first_layer(model):
    fully_shard(model.pose_model[0])
    return fully_shard(model)


def pose_model_and_root(model):
    fully_shard(model.pose_model)
    return fully_shard(model)


def pose_model_alone(model):
    fully_shard(model.pose_model)
    return model


def resharded_root(model):
    return fully_shard(model, reshard_after_forward=True)


LAYOUTS = [root, resharded_root, nested, first_layer, pose_model_and_root]
SHARDED_INSIDE = [nested, first_layer, pose_model_and_root, pose_model_alone]
NOT_STORED = ["graph", "recomputed"]


def check_sharded(mode, shard, combination, loss, tasks=None, **options):
    rank, poses = dist.get_rank(), new_poses(map(sum, SIZES))
    model = MultiPoseModel(new_pose_model(**options), combination, gradients=mode, tasks=tasks)
    expected = plain_gradients(model, poses, loss)
    sharded = shard(model)
    loss(*sharded(poses[rank], SIZES[rank])).backward()
    check_same(gradients(sharded), expected)


@case(mode=NOT_STORED, shard=LAYOUTS)
def fully_shard_averages_the_gradients_of_plain_autograd(mode, shard):
    check_sharded(mode, shard, Learnable(), loss_of)


@case(mode=NOT_STORED, shard=LAYOUTS)
def poses_with_several_numbers_may_be_sharded(mode, shard):
    check_sharded(mode, shard, Attention(), loss_of, n_columns=3)
    check_sharded(mode, shard, Learnable(), loss_of, tasks=3, n_columns=3)


@case(mode=NOT_STORED, shard=LAYOUTS)
def ranks_that_leave_out_different_poses_agree_under_fully_shard(mode, shard):
    check_sharded(mode, shard, Minimum(), combined_loss)


@case(mode=NOT_STORED)
def frozen_layers_that_are_sharded_run_again_in_step(mode):
    check_sharded(mode, nested, Minimum(), combined_loss, frozen=True)


@case(mode=NOT_STORED, shard=LAYOUTS)
def a_rank_whose_poses_all_have_weight_zero_keeps_fully_shard_in_step(mode, shard):
    rank, poses = dist.get_rank(), new_poses(map(sum, SIZES))
    model = MultiPoseModel(new_pose_model(), Learnable(), gradients=mode)
    expected = plain_gradients(model, poses[:1], sizes=SIZES[:1])
    sharded = shard(model)
    ((1 - rank) * loss_of(*sharded(poses[rank], SIZES[rank]))).backward()
    check_same(gradients(sharded), {name: grad / 2 for name, grad in expected.items()})


@case(mode=NOT_STORED, shard=LAYOUTS)
def training_under_fully_shard_is_plain_training(mode, shard):
    rank = dist.get_rank()
    model = MultiPoseModel(new_pose_model(), Learnable(), gradients=mode)
    plain = copy.deepcopy(model)
    sharded = shard(model)
    optimizers = [torch.optim.AdamW(each.parameters(), lr=1e-2) for each in (plain, sharded)]
    for seed in (1, 2, 3):
        poses = new_poses(map(sum, SIZES), seed)
        with torch.no_grad():  # evaluation in between leaves the root's parameters unsharded
            sharded(poses[rank], SIZES[rank])
        for param, gradient in zip(
            plain.parameters(), plain_gradients(plain, poses).values(), strict=True
        ):
            param.grad = gradient
        loss_of(*sharded(poses[rank], SIZES[rank])).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    check_same(parameters(sharded), parameters(plain))


@case(mode=NOT_STORED)
def ranks_with_different_numbers_of_poses_fit_in_one_batch_each(mode):
    """Nested fully_shard wants as many runs of a layer on each rank."""
    rank, sizes = dist.get_rank(), [[4, 1], [2]]
    poses = new_poses(map(sum, sizes))
    options = {"collate": torch.cat, "chunk_size": 5, "gradients": mode}
    model = MultiPoseModel(new_pose_model(), Learnable(), **options)
    expected = plain_gradients(model, poses, sizes=sizes)
    sharded = nested(model)
    loss_of(*sharded(poses[rank], sizes[rank])).backward()
    check_same(gradients(sharded), expected)


@case(evaluated=[False, True], shard=SHARDED_INSIDE)
def stored_refuses_a_sharded_pose_model(evaluated, shard):
    rank, poses = dist.get_rank(), new_poses(map(sum, SIZES))
    model = shard(MultiPoseModel(new_pose_model(), Learnable(), gradients="stored"))
    if evaluated:
        with torch.no_grad():
            model(poses[rank], SIZES[rank])
    check_raises(GradientError, "Use gradients='recomputed' or 'graph'", lambda: model(poses[rank]))


@case(evaluated=[False, True], shard=[root, resharded_root])
def stored_works_where_the_multi_pose_model_is_sharded_as_one(evaluated, shard):
    rank, poses = dist.get_rank(), new_poses(map(sum, SIZES))
    model = MultiPoseModel(new_pose_model(), Learnable(), gradients="stored")
    expected = plain_gradients(model, poses)
    sharded = shard(model)
    if evaluated:
        with torch.no_grad():
            sharded(poses[rank], SIZES[rank])
    loss_of(*sharded(poses[rank], SIZES[rank])).backward()
    check_same(gradients(sharded), expected)


# FullyShardedDataParallel, which fully_shard replaces.


def sharded_as_before(model, *, inside: bool, **options):
    wrap = partial(FullyShardedDataParallel, device_id=torch.device("cpu"), **options)
    if not inside:
        return wrap(model)
    model.pose_model = wrap(model.pose_model)
    return model


@case(mode=NOT_STORED, inside=[False, True], use_orig_params=[False, True])
def fully_sharded_data_parallel_trains_as_plain_autograd(mode, inside, use_orig_params):
    rank, poses = dist.get_rank(), new_poses(map(sum, SIZES))
    model = MultiPoseModel(new_pose_model(), Minimum(), gradients=mode)
    plain = copy.deepcopy(model)
    expected = plain_gradients(model, poses, combined_loss)
    sharded = sharded_as_before(model, inside=inside, use_orig_params=use_orig_params)
    combined_loss(*sharded(poses[rank], SIZES[rank])).backward()
    # A step of length 1, since the gradients themselves are flat and in parts.
    torch.optim.SGD(sharded.parameters(), lr=1.0).step()
    with FullyShardedDataParallel.summon_full_params(sharded):
        steps = [
            before - after
            for before, after in zip(plain.parameters(), sharded.parameters(), strict=True)
        ]
    check_same(dict(zip(expected, steps, strict=True)), expected)


@case(inside=[False, True], use_orig_params=[False, True])
def stored_refuses_fully_sharded_data_parallel(inside, use_orig_params):
    rank, poses = dist.get_rank(), new_poses(map(sum, SIZES))
    model = MultiPoseModel(new_pose_model(), Learnable(), gradients="stored")
    model = sharded_as_before(model, inside=inside, use_orig_params=use_orig_params)
    check_raises(GradientError, "'graph'", lambda: model(poses[rank], SIZES[rank]))


# Poses of one compound shared over ranks: the compounds are the same, the first has two poses of
# five on rank 0, the second none there, the third none on rank 1.

SHARES = [[2, 0, 3], [3, 2, 0]]


def shared_data():
    """Return the poses and docking scores of each rank, and both as one process has them."""
    poses = new_poses(map(sum, SHARES))
    scores = [of_rank[:, 0, 0] for of_rank in new_poses(map(sum, SHARES), seed=5)]
    together = []
    for of_ranks in (poses, scores):
        split = [list(own.split(share)) for own, share in zip(of_ranks, SHARES, strict=True)]
        together.append(torch.cat([torch.cat(parts) for parts in zip(*split, strict=True)]))
    return poses, scores, together


def check_shared(mode, combination, loss, wrap=DistributedDataParallel, n_columns=1, **options):
    rank, total = dist.get_rank(), [sum(parts) for parts in zip(*SHARES, strict=True)]
    poses, scores, (all_poses, all_scores) = shared_data()
    pose_model = new_pose_model(n_columns=n_columns)
    model = MultiPoseModel(pose_model, combination, gradients=mode, **options)
    needed = combination.pose_inputs
    reference = copy.deepcopy(model)
    expected = plain_output(reference, all_poses, total, **dict.fromkeys(needed, all_scores))
    loss(*expected).backward()
    wrapped = wrap(model)
    inputs = dict.fromkeys(needed, scores[rank].tolist())
    out = wrapped(poses[rank], SHARES[rank], inputs, group=dist.group.WORLD)
    check_same(out._asdict(), dict(zip(out._fields, expected, strict=True)))
    loss(*out).backward()
    check_same(gradients(wrapped), gradients(reference))


@case(mode=MODES, combination=[Learnable, Minimum, Docked], loss=[loss_of, combined_loss])
def shared_poses_give_what_one_process_gives(mode, combination, loss):
    check_shared(mode, combination(), loss)


@case(mode=MODES)
def learned_inputs_of_shared_poses_get_their_gradient(mode):
    rank, total = dist.get_rank(), [sum(parts) for parts in zip(*SHARES, strict=True)]
    poses, scores, (all_poses, _) = shared_data()
    leaves = [of_rank.clone().requires_grad_() for of_rank in scores]
    split = [own.split(share) for own, share in zip(leaves, SHARES, strict=True)]
    all_scores = torch.cat([torch.cat(parts) for parts in zip(*split, strict=True)])
    expected = plain_output(
        MultiPoseModel(new_pose_model(), Docked()), all_poses, total, docking_score=all_scores
    )
    loss_of(*expected).backward()
    own = scores[rank].clone().requires_grad_()
    model = MultiPoseModel(new_pose_model(), Docked(), gradients=mode)
    loss_of(
        *model(poses[rank], SHARES[rank], {"docking_score": own}, group=dist.group.WORLD)
    ).backward()
    # Each rank has the loss of all poses, and gets the gradient of the sum over the ranks.
    check_same({"score": own.grad}, {"score": dist.get_world_size() * leaves[rank].grad})


@case(mode=NOT_STORED, wrap=DDP)
def shared_poses_run_in_batches(mode, wrap):
    check_shared(mode, Learnable(), loss_of, wrap, collate=torch.cat, chunk_size=2)


@case(mode=MODES, loss=[loss_of, combined_loss])
def shared_poses_may_have_several_numbers(mode, loss):
    check_shared(mode, Attention(), loss, n_columns=3)
    check_shared(mode, Confident(), loss, n_columns=2)
    check_shared(mode, Learnable(), loss, n_columns=3, tasks=3)


@case(mode=MODES)
def a_stochastic_combination_of_shared_poses_draws_the_same_numbers_on_all_ranks(mode):
    rank, world = dist.get_rank(), dist.group.WORLD
    poses, *_ = shared_data()
    model = MultiPoseModel(new_pose_model(), Noisy(), gradients=mode)
    torch.manual_seed(rank)  # as after different work
    state = torch.random.get_rng_state()
    first, second = (model(poses[rank], SHARES[rank], group=world) for _ in range(2))
    assert not torch.equal(first.prediction, second.prediction)
    of_ranks = [torch.empty_like(first.prediction) for _ in range(2)]
    dist.all_gather(of_ranks, first.prediction.detach())
    assert torch.equal(*of_ranks)
    assert torch.equal(state, torch.random.get_rng_state()) == (rank == 1)


@case(mode=NOT_STORED, shard=[root, nested])
def poses_with_several_numbers_may_be_shared_and_sharded(mode, shard):
    check_shared(mode, Attention(), loss_of, shard, n_columns=3)


@case(mode=NOT_STORED, shard=[root, nested])
def shared_poses_may_be_sharded_too(mode, shard):
    check_shared(mode, Docked(), loss_of, shard)


@case(mode=NOT_STORED)
def shared_poses_may_come_as_one_batch(mode):
    rank, total = dist.get_rank(), [sum(parts) for parts in zip(*SHARES, strict=True)]
    shares = [[2, 0, 3], [1, 2, 0]]  # as many poses on each rank would hide a mix-up
    total = [sum(parts) for parts in zip(*shares, strict=True)]
    poses = new_poses(map(sum, shares))
    model = MultiPoseModel(new_pose_model(), Learnable(), gradients=mode, collate=torch.cat)
    reference = copy.deepcopy(model)
    order = torch.cat([poses[0][:2], poses[1], poses[0][2:]])
    expected = plain_output(reference, order, total)
    loss_of(*expected).backward()
    wrapped = DistributedDataParallel(model)
    out = wrapped(torch.cat(list(poses[rank])), shares[rank], collated=True, group=dist.group.WORLD)
    check_same(out._asdict(), dict(zip(out._fields, expected, strict=True)))
    loss_of(*out).backward()
    check_same(gradients(wrapped), gradients(reference))


@case(mode=MODES)
def a_rank_of_a_smaller_group_is_its_rank_in_that_group(mode):
    # new_group is collective: every process makes both groups.
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    model = MultiPoseModel(new_pose_model(), Learnable(), gradients=mode)
    reference = copy.deepcopy(model)
    (poses,) = new_poses([3])
    expected = plain_output(reference, poses, [3])
    loss_of(*expected).backward()
    loss_of(*model(poses, [3], group=groups[dist.get_rank()])).backward()
    check_same(gradients(model), gradients(reference))


@case(mode=MODES)
def shared_poses_of_one_compound_need_no_sizes(mode):
    rank, n_poses = dist.get_rank(), [2, 5]
    poses = new_poses(n_poses)
    model = MultiPoseModel(new_pose_model(), Learnable(), gradients=mode)
    prediction, pose_predictions = plain_output(model, torch.cat(poses), [sum(n_poses)])
    for no_grad in (torch.no_grad(), torch.inference_mode()):
        with no_grad:
            out = model(poses[rank], group=dist.group.WORLD)
        assert not out.prediction.requires_grad
        check_same(
            out._asdict(), {"prediction": prediction[0], "pose_predictions": pose_predictions}
        )


class Receptor(torch.nn.Module):
    """Embeds a pocket, shape (n, 4), in 4 numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 4)).double()
        self.n_runs = 0

    def forward(self, pocket: Tensor) -> Tensor:
        self.n_runs += 1
        return torch.tanh(self.layers(pocket)).mean(0)


class Docking(torch.nn.Module):
    """Scores a pose, or a batch of poses, in an embedded pocket."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = new_pose_model()

    def forward(self, pose: Tensor, pocket: Tensor | list[Tensor]) -> Tensor:
        return self.inner(pose * (torch.stack(pocket) if isinstance(pocket, list) else pocket))


def check_shared_part(mode, combination, wrap, loss=loss_of, **options):
    """Compare with one process. Each rank lacks the poses of one compound."""
    rank, total = dist.get_rank(), [sum(parts) for parts in zip(*SHARES, strict=True)]
    poses, _, (all_poses, _) = shared_data()
    pockets = [pocket[:, 0] for pocket in new_poses([3, 4, 5], seed=7)]
    model = MultiPoseModel(Docking(), combination, shared=Receptor(), gradients=mode, **options)
    reference = MultiPoseModel(Docking(), copy.deepcopy(combination), shared=Receptor())
    embedded = [reference.shared(pocket) for pocket in pockets]
    of_poses = [out for out, size in zip(embedded, total, strict=True) for _ in range(size)]
    runs = zip(all_poses, of_poses, strict=True)
    predictions = torch.cat([reference.pose_model(*run).reshape(1) for run in runs])
    combined = [reference.combination.combine(part) for part in predictions.split(total)]
    expected = torch.stack(combined), predictions
    loss(*expected).backward()
    wrapped = wrap(model)
    out = wrapped(poses[rank], SHARES[rank], shared_inputs=pockets, group=dist.group.WORLD)
    assert model.shared.n_runs == sum(size > 0 for size in SHARES[rank])
    check_same(out._asdict(), dict(zip(out._fields, expected, strict=True)))
    loss(*out).backward()
    check_same(gradients(wrapped), gradients(reference))


@case(mode=MODES, combination=[Learnable, Minimum], loss=[loss_of, combined_loss])
def a_shared_part_gets_what_one_process_gives(mode, combination, loss):
    check_shared_part(mode, combination(), plain_ddp, loss)


@case(mode=MODES, wrap=DDP)
def a_shared_part_works_in_each_ddp(mode, wrap):
    check_shared_part(mode, Learnable(), wrap)


@case(mode=NOT_STORED)
def a_shared_part_works_with_batches(mode):
    check_shared_part(mode, Learnable(), plain_ddp, collate=torch.cat, chunk_size=2)


@case(mode=MODES)
def a_shared_part_may_be_sharded_with_the_model(mode):
    check_shared_part(mode, Learnable(), root)


@case()
def full_depth_combinations_refuse_to_share_the_gradients_of_a_compound():
    model = MultiPoseModel(new_pose_model(), FullDepth(), gradients="stored")
    poses = new_poses([3, 2])
    share = partial(model, poses[dist.get_rank()], group=dist.group.WORLD)
    check_raises(ValueError, "needs all gradients of a compound in one process", share)
    with torch.no_grad():
        expected = model(torch.cat(poses)).prediction
        check_same({"prediction": share().prediction}, {"prediction": expected})


@case()
def shared_poses_have_second_derivatives_in_graph():
    rank, n_poses = dist.get_rank(), [2, 4]
    poses = new_poses(n_poses)
    model = MultiPoseModel(new_pose_model(), Learnable())

    def penalty_gradient(poses, **options):
        poses = poses.clone().requires_grad_()
        prediction = model(poses, **options).prediction / (2 if options else 1)
        (forces,) = torch.autograd.grad(prediction, poses, create_graph=True)
        return torch.autograd.grad(forces.square().sum(), poses)[0]

    found = penalty_gradient(poses[rank], group=dist.group.WORLD)
    expected = penalty_gradient(torch.cat(poses)).split(n_poses)[rank]
    check_same({"of poses": found}, {"of poses": expected})


# Each is the call of rank 1, and what both ranks raise.
BAD = {
    "no pose": ({"poses": []}, "rank 1 of the group: expected at least one pose; found none"),
    "no list": ({"poses": 3}, "rank 1 of the group: poses must be a sequence"),
    "no pose of any compound": ({"poses": [], "sizes": [0, 0]}, "rank 1 of the group: expected at"),
    "other compounds": ({"sizes": [1, 1, 1]}, "ranks have [2, 3] entries"),
    "sizes that do not add up": ({"sizes": [1, 1]}, "rank 1 of the group: sizes must add up"),
    "no sizes": ({"sizes": None}, "ranks have [2, 1] entries"),
    "a NaN": ({"poses": torch.full((3, 1, 4), torch.nan).double()}, "pose 2 (pose 2 of compound"),
    "no score": ({"pose_inputs": {}}, "rank 1 of the group: Docked needs pose_inputs"),
    "short scores": ({"pose_inputs": {"docking_score": [1.0]}}, "rank 1 of the group: pose_inputs"),
    "a NaN score": ({"pose_inputs": {"docking_score": [1.0, 2.0, torch.nan]}}, "pose 5 (pose 1 of"),
}


@case(what=list(BAD), mode=MODES)
def bad_input_on_one_rank_is_the_same_error_on_all(what, mode):
    change, match = BAD[what]
    scores = {"docking_score": [0.1, 0.2, 0.3]}
    call = {"poses": new_poses([3])[0], "sizes": [2, 1], "pose_inputs": scores}
    if dist.get_rank() == 1:
        call |= change
    model = MultiPoseModel(new_pose_model(), Docked(), gradients=mode)
    check_raises(PredictionError, match, lambda: model(**call, group=dist.group.WORLD))


@case(mode=["graph", "recomputed"])
def ranks_with_different_numbers_of_columns_raise_the_same_error(mode):
    model = MultiPoseModel(
        new_pose_model(n_columns=2 + dist.get_rank()), AnyAttention(), gradients=mode
    )
    (poses, _) = new_poses([3, 3])
    call = partial(model, poses, [2, 1], group=dist.group.WORLD)
    check_raises(PredictionError, "rank 1 of the group: the pose model must return", call)


@case()
def a_compound_without_pose_on_any_rank_is_an_error_on_all():
    model = MultiPoseModel(new_pose_model(), Learnable())
    (poses, _) = new_poses([3, 3])
    call = partial(model, poses, [3, 0], group=dist.group.WORLD)
    check_raises(PredictionError, "compound 1: Learnable needs at least 1 pose(s)", call)


# Checkpoints.


def minimum():
    return Minimum()


def shifted():
    return Learnable(0.7, shift=1.0)


def save(model) -> str:
    """Return the folder that all ranks have written their part to."""
    folder = str(REPORT / f"checkpoint{next(COUNTER)}")
    dcp.save(get_model_state_dict(model), checkpoint_id=folder)
    return folder


def load(model, folder: str) -> None:
    state = get_model_state_dict(model)
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state)


@case(wrap=[plain_ddp, root, nested, combination_and_root])
def a_distributed_checkpoint_knows_its_combination(wrap):
    """The start value of the learned temperature may differ."""
    model = wrap(MultiPoseModel(new_pose_model(), Learnable(0.7)))
    assert get_model_state_dict(model)["_extra_state"].dtype == torch.int32
    other = MultiPoseModel(new_pose_model(), Learnable(0.875))
    for param in other.parameters():
        torch.nn.init.zeros_(param)
    other = wrap(other)
    load(other, save(model))
    check_same(parameters(other), parameters(model))


@case(wrap=[plain_ddp, root, nested], other=[minimum, shifted])
def a_distributed_checkpoint_of_another_combination_is_refused(wrap, other):
    """Its name and arguments take other numbers of bytes."""
    folder = save(wrap(MultiPoseModel(new_pose_model(), Learnable(0.7))))
    model = wrap(MultiPoseModel(new_pose_model(), other()))
    check_raises(CheckpointError, "the checkpoint is of", partial(load, model, folder))


@case(shard=[root, nested])
def a_whole_checkpoint_is_read_by_rank_0_alone(shard):
    model = shard(MultiPoseModel(new_pose_model(), Learnable(0.7)))
    whole_state = StateDictOptions(full_state_dict=True, cpu_offload=True)
    from_rank_0 = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    for shift, match in ((0.0, None), (1.0, "the checkpoint is of")):
        state = get_model_state_dict(model, options=whole_state)
        other = shard(MultiPoseModel(new_pose_model(), Learnable(0.875, shift)))
        read = partial(set_model_state_dict, other, state, options=from_rank_0)
        if match is None:
            read()
        else:
            check_raises(CheckpointError, match, read)


def main(wanted: Sequence[str]) -> None:
    """Run all cases, or those that are named, and write down what failed, case by case."""
    warnings.simplefilter("error")
    rank = int(os.environ["RANK"])
    store = dist.TCPStore(  # which torchrun itself holds
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=60),
    )
    failures = {}
    for name in wanted or CASES:
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore(f"case {name}", store),
            rank=rank,
            world_size=int(os.environ["WORLD_SIZE"]),
            timeout=TIMEOUT,
        )
        print(f"rank {rank}: {name}", file=sys.stderr, flush=True)
        try:
            CASES[name]()
            failures[name] = ""
        except Exception:
            failures[name] = traceback.format_exc()
        dist.destroy_process_group()  # and whoever waits for this rank has an error
        # After each, so that a crash leaves the rest to be read.
        (REPORT / f"rank{rank}.json").write_text(json.dumps(failures))


if __name__ == "__main__":
    main(sys.argv[2:])
