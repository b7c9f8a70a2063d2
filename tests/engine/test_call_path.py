"""A call is readable: it does not jump back and forth between the modules of the core."""

import itertools
import sys

import pytest
import torch
from torch import Tensor

from mtenn_core import Combination, MultiPoseModel
from mtenn_core._engine.mode_table import MODES


class SmoothMinimum(Combination):
    def combine(self, predictions: Tensor) -> Tensor:
        return -torch.logsumexp(-predictions, dim=0)

    def pose_weights(self, predictions: Tensor) -> Tensor:
        return torch.softmax(-predictions, dim=0)


def modules_visited(call) -> list[str]:
    """Return the modules of the core that ``call`` goes through, each time it changes between them.

    Every call of a Python function, and every return from one, is in some module.
    """
    visited: list[str] = []

    def note(frame, event, _):
        module = frame.f_globals.get("__name__", "")
        in_core = module.startswith("mtenn_core.") and event in ("call", "return")
        if in_core and visited[-1:] != [module]:
            visited.append(module)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return visited


@pytest.mark.parametrize("gradients", MODES)
def test_a_forward_of_five_poses_moves_between_few_modules(pose_model, poses, gradients):
    model = MultiPoseModel(pose_model, SmoothMinimum(), gradients=gradients)
    for _ in range(3):  # the first call imports, and the first three compare all poses
        model(poses[:5]).prediction.backward()
    visited = modules_visited(lambda: model(poses[:5]))
    moves = [f"{a} -> {b}" for a, b in itertools.pairwise(visited)]
    assert 5 < len(moves) <= 25, "\n".join(moves)
