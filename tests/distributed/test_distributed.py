"""DistributedDataParallel, fully_shard and shared poses: two processes run all cases once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from packaging.version import Version

import mtenn_core

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

if Version(torch.__version__) < Version("2.7"):
    reason = "torch 2.6 may hang when it destroys the group of a case; its fully_shard needs a GPU"
    pytest.skip(reason, allow_module_level=True)

from filelock import FileLock  # which torch depends on

from distributed.on_two_ranks import CASES

SCRIPT = Path(__file__).with_name("on_two_ranks.py")
N_RANKS = 2
# Seconds: all cases take 20, and one that hangs fails after 10 more.
TIMEOUT = 180


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory):
    """Return the folder with the log of both processes and, for each rank, the failed cases."""
    folder = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):  # the workers of pytest-xdist share one run
        folder = folder.parent
    folder /= "distributed"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            run_on_two_ranks(folder)
    return folder


def run_on_two_ranks(folder: Path) -> None:
    options = ["--standalone", "--nproc-per-node", str(N_RANKS)]
    command = [sys.executable, "-m", "torch.distributed.run", *options, str(SCRIPT), str(folder)]
    tested = str(Path(mtenn_core.__file__).parents[1])  # may be on the path of this process alone
    path = os.pathsep.join([tested, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=env)
        try:
            process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            process.terminate()  # and torchrun its processes
            process.wait(TIMEOUT)


@pytest.fixture(scope="module")
def failures_of_ranks(folder):
    files = [folder / f"rank{rank}.json" for rank in range(N_RANKS)]
    return [json.loads(file.read_text()) if file.exists() else {} for file in files]


@pytest.mark.parametrize("case", CASES)
def test_on_two_ranks(case, failures_of_ranks, folder):
    for rank, failures in enumerate(failures_of_ranks):
        if case not in failures:
            log = (folder / "log").read_text()[-4000:]
            pytest.fail(f"rank {rank} did not come to the end of it:\n{log}", pytrace=False)
        if failures[case]:
            pytest.fail(f"rank {rank}: {failures[case]}", pytrace=False)
