"""Single runs of the suite, in a module that other processes can import, unlike ``__main__``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from bank import make_right, make_wrong
from mtenn_core import Combination
from mtenn_core.testing import check_combination
from mtenn_core.testing._probe.subject import Subject


def failed_by_wrong(name: str) -> list[str]:
    """Return the checks that a wrong combination fails at the scale 1 with seed 0."""
    return failed_ids(partial(make_wrong, name=name, t=1.0), 0)


def caught_by_own_check(name: str, check: str, t: float, seed: int) -> bool:
    return bool(failed_ids(partial(make_wrong, name=name, t=t), seed, only=[check]))


def failed_by_right(name: str, seed: int) -> list[str]:
    """Return the checks that a right combination fails at the level full."""
    return failed_ids(partial(make_right, name=name), seed, level="full")


def failed_ids(
    make: Callable[[], Combination],
    seed: int,
    level: str = "quality",
    only: list[str] | None = None,
) -> list[str]:
    """Return the checks that a combination fails."""
    report = check_combination(make, level=level, seed=seed, only=only)
    return [record.id for record in report.failures]


def gradcheck_catches(name: str) -> bool:
    """Return True if torch's gradcheck, with its defaults, fails for a loss on three poses."""
    torch.manual_seed(0)
    try:
        combination = make_wrong(name, 1.0).double()
        poses = Subject(combination, 0).probes.poses(3)
    except Exception:
        return True
    n_columns = poses.predictions[0].numel()
    features = torch.randn(3, n_columns, 4, dtype=torch.float64)
    theta = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def combined(theta: torch.Tensor) -> torch.Tensor:
        predictions = torch.tanh(features @ theta.detach())
        gradients = (1 - predictions**2)[..., None] * features
        shape = poses.predictions.shape[1:]
        pred_list = [prediction.view(shape) for prediction in predictions]
        grad_dict = {"theta": [gradient.view(*shape, 4) for gradient in gradients]}
        return combination(pred_list, grad_dict, ["theta"], theta, **poses.copied_inputs())

    try:
        return not torch.autograd.gradcheck(combined, (theta,), raise_exception=False)
    except Exception:
        return True
