"""Every shipped combination on two processes, in every mode, dropout on, against plain autograd."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mtenn_core import MultiPoseModel, registry
from mtenn_core._engine.mode_table import MODES

COMBINATIONS = {
    "mean": {},
    "max": {},
    "min": {"pred_scale": 1000.0},
    "boltzmann": {"kT": 0.593, "learnable": True},
    "attention": {"n_features": 3, "n_hidden": 5, "learnable": True},
    "gated_attention": {"n_features": 3, "n_hidden": 5, "dropout": 0.3, "readout": True},
    "confidence_weighted": {"temperature": 0.5, "learnable": True},
    "min, learnable": {"pred_scale": 1.7, "normalize": True, "learnable": True},
    "top_k_mean": {"k": 2},
}
N_COLUMNS = {"attention": 3, "gated_attention": 3, "confidence_weighted": 2}
WRAPS = [DistributedDataParallel, fully_shard]
# By rank: the poses of compounds of its own, and its share of the poses of the same compounds.
SIZES = {"spread": [[1, 5, 3], [4, 2]], "shared": [[2, 0, 3], [3, 2, 1]]}


@pytest.mark.slow("tests/distributed runs the same code with combinations of the core's tests")
def test_gradients_equal_plain_autograd():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc-per-node", "2", str(Path(__file__))],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    n_cases = len(SIZES) * len(COMBINATIONS) * len(MODES) * len(WRAPS)
    assert done.stdout.split() == [str(n_cases)] * 2


def loss_of(prediction, pose_predictions):
    return (prediction + 3.0).square().sum() + (pose_predictions - 1.0).cos().sum()


def loss_of_compounds(rule, parts):
    return loss_of(torch.stack([rule.combine(part) for part in parts]), torch.cat(list(parts)))


def by_plain_autograd(pose_model, rule, poses, how):
    """Return the mean over ranks of the gradients of each one's loss."""
    of_ranks, losses = [], []
    for rank, (own, sizes) in enumerate(zip(poses, SIZES[how], strict=True)):
        torch.manual_seed(rank)  # dropout
        predictions = torch.stack([pose_model(pose) for pose in own])
        if rule.pose_columns is None:
            predictions = predictions.squeeze(1)
        of_ranks.append(predictions.split(sizes))
        if how == "spread":
            losses.append(loss_of_compounds(rule, of_ranks[-1]))
    if how == "shared":  # all ranks have the same loss, on all poses of a compound
        together = [torch.cat(parts) for parts in zip(*of_ranks, strict=True)]
        losses = [loss_of_compounds(rule, together)]
    return torch.autograd.grad(
        sum(losses) / len(losses), [*pose_model.parameters(), *rule.parameters()]
    )


def check(how, name, mode, wrap):
    rank = dist.get_rank()
    torch.manual_seed(7)
    arguments = dict(COMBINATIONS[name])
    if how == "shared":  # each rank would draw its own dropout of the combination
        arguments.pop("dropout", None)
    rule = registry.create(name.split(",")[0], **arguments).double()
    n_columns = N_COLUMNS.get(name, 1)
    layers = [torch.nn.Linear(4, 8), torch.nn.SiLU(), torch.nn.Dropout(0.5)]
    pose_model = torch.nn.Sequential(*layers, torch.nn.Linear(8, n_columns)).double()
    poses = [torch.randn(sum(sizes), 4, dtype=torch.float64) for sizes in SIZES[how]]
    expected = by_plain_autograd(copy.deepcopy(pose_model), copy.deepcopy(rule), poses, how)
    model = wrap(MultiPoseModel(pose_model, rule, gradients=mode))
    torch.manual_seed(rank)
    group = dist.group.WORLD if how == "shared" else None
    loss_of(*model(poses[rank], SIZES[how][rank], group=group)).backward()
    if rank == 0:
        assert type(rule).__name__ in repr(model)  # of one process alone, and sharded
    for param, gradient in zip(model.parameters(), expected, strict=True):
        found = param.grad.full_tensor() if isinstance(param.grad, DTensor) else param.grad
        # Relative to the largest entry: single entries may cancel to nothing.
        error = (found - gradient).abs().max() / gradient.abs().max()
        assert error <= 1e-10, f"{how}, {name}, {mode}, {wrap.__name__}: {error:.1e}"


def main():
    cases = list(product(SIZES, COMBINATIONS, MODES, WRAPS))
    for case in cases:
        check(*case)
    # With the line's end in one write: both ranks write into one pipe.
    print(f"{len(cases)}\n", end="", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()  # a model that is left keeps gloo's threads, and they may crash Python's exit
    dist.destroy_process_group()
