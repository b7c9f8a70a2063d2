"""B3: many poses, numbers of poses around the powers of two, and the growth of the work."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mtenn_core._torch_internals import DispatchMode
from mtenn_core.testing._checks.chain_rule import check_chain_rule
from mtenn_core.testing._checks.check import check
from mtenn_core.testing._checks.derivatives import compare_weights, directions_for
from mtenn_core.testing._outcomes import Fail, Metrics
from mtenn_core.testing._probe.comparison import judge
from mtenn_core.testing._probe.finite_differences import ULPS, resolution
from mtenn_core.testing._probe.kinks import KINK, at_kink
from mtenn_core.testing._probe.operations import is_in_place, tensors_of
from mtenn_core.testing._probe.poses import Poses
from mtenn_core.testing._probe.subject import Subject
from mtenn_core.testing._probe.training_step import Step, gradients_of

# Buffers, chunks and tables often have a power of two as their size.
NUMBERS_OF_POSES = (
    *(2**k + more for k in range(3, 9) for more in (-1, 0, 1)),
    *(512, 513, 1024, 1025, 2048),
)
# A forward of its own is slow for more poses, because it gets a list of tensors.
MOST_FOR_FORWARD = 1025
# So is a loop over the poses in Python.
MOST_IN_A_LOOP = 513
# No weight is negligible for a scale of up to 1000 per unit.
SPREAD = 3e-3
# With this step, a central difference is right to five digits for a scale of up to 1000 per unit.
SCREENING_STEP = 2.0**-17


@check("B3", "a thousand poses work, and the cost grows linearly")
def many_poses(subject: Subject) -> Metrics:
    """Check derivative and chain rule for many poses, and how the work grows with their number."""
    step = subject.probes.step({"w": (3,), "b": ()}, few_if_wide(subject, 1000))
    worst = check_chain_rule(subject, step, (1.0,))
    comparisons, cause = compare_weights(subject, [subject.probes.poses(300)])
    if any(comparison.wrong for comparison in comparisons):
        judge(comparisons, cause or "if C1 passes: right for few poses, wrong for many")
    _check_numbers_of_poses(subject)
    growth = _growth_of_work(subject)
    if growth > 8:
        raise Fail(
            f"for four times as many poses, the work on their gradients must be at most 8 times as"
            f" much; found {growth:.1f} times",
            cause="each pose reads all gradients again, or a matrix of n_poses × n_poses multiplies"
            " them: one weighted sum is enough",
            growth=growth,
        )
    return {"largest error in tolerances": worst, "growth of work, poses × 4": growth}


def few_if_wide(subject: Subject, n_poses: int) -> int:
    """Return fewer poses if each has several numbers: the gradient of each number is a tensor."""
    return max(32, n_poses // subject.probes.shape(1)[-1])


def _check_numbers_of_poses(subject: Subject) -> None:
    """Check the weights of many numbers of poses, and the chain rule of a ``forward``."""
    eps = resolution(subject.values(torch.stack([subject.probes.poses(9).row() for _ in range(4)])))
    shapes: dict[str, tuple[int, ...]] = {"w": (3,), "b": ()}
    most = MOST_FOR_FORWARD if subject.full_depth else max(NUMBERS_OF_POSES)
    if loops_over_poses(subject) or (subject.probes.columns and has_pairs_of_poses(subject)):
        most = MOST_IN_A_LOOP
    for n_poses in NUMBERS_OF_POSES:
        if not subject.combination.min_poses <= n_poses <= most:
            continue
        step = subject.probes.step(shapes, n_poses, SPREAD)
        weights = subject.weights(step.poses)
        if _differs_from_value(subject, step.poses, weights, eps):
            comparisons, cause = compare_weights(subject, [step.poses])
            if any(comparison.wrong for comparison in comparisons):
                judge(comparisons, _cause_of_many(subject, step.poses, cause))
        # The core adds up the gradients, unless the class has a forward of its own.
        if subject.full_depth and n_poses <= 257 and _differs_from_sum(subject, step, weights):
            check_chain_rule(subject, step, (1.0,))


def _cause_of_many(subject: Subject, poses: Poses, cause: str) -> str:
    # Many predictions are so close to one another that each step crosses a kink at ties.
    if cause == KINK or (
        subject.combination.smooth and at_kink(subject, poses[[*range(9)]].tied())
    ):
        return KINK
    only = f"if C1 passes: wrong only for {len(poses)} poses or more"
    return "; ".join(filter(None, [cause, only]))


def _differs_from_value(subject: Subject, poses: Poses, weights: Tensor, eps: float) -> bool:
    """Return whether weights differ from one central difference, which has no error bar."""
    y = poses.predictions
    direction = directions_for(subject, y.numel())[0].view_as(y)
    step = min(SCREENING_STEP, subject.probes.first_step(y))
    up, down = (subject.value(poses.at(y + sign * step * direction)) for sign in (1, -1))
    found = float(weights.flatten() @ direction.flatten())
    expected = float(up - down) / (2 * step)
    noise = ULPS * eps * max(float(y.abs().amax()), abs(float(up))) / step
    size = max(float(weights.abs().amax()), abs(expected))
    return not abs(found - expected) <= 1e-4 * size + noise


def _differs_from_sum(subject: Subject, step: Step, weights: Tensor) -> bool:
    """Return whether backward differs from Σ_i w_i g_i in the first few digits."""
    for name, found in subject.gradients(step).items():
        gradients = step.gradients[name]
        error = (found - torch.tensordot(weights, gradients, 1)).abs()
        if not (error <= 1e-4 * torch.tensordot(weights.abs(), gradients.abs(), 1)).all():
            return True
    return False


def _growth_of_work(subject: Subject) -> float:
    """Return the factor by which the work grows for four times as many poses."""
    work_of_few, n_of_few = _work(subject, 32)
    work_of_many, n_of_many = _work(subject, 128)
    growth = work_of_many / max(work_of_few, 1)
    # The core leaves out poses with a weight of zero, of which there may be many by chance.
    return min(growth, growth * 4 * max(n_of_few, 1) / max(n_of_many, 1))


def loops_over_poses(subject: Subject) -> bool:
    """Return True if the value takes at least one more operation for each further pose."""
    few, many = (_work_of_value(subject, n_poses) for n_poses in (32, 128))
    return many.operations - few.operations >= 128 - 32


def has_pairs_of_poses(subject: Subject) -> bool:
    """Return True if the work of the value grows with the square of the number of poses."""
    few, many = (_work_of_value(subject, n_poses) for n_poses in (32, 128))
    return many.elements > 8 * few.elements


def _work_of_value(subject: Subject, n_poses: int) -> _Work:
    poses = subject.probes.poses(n_poses)
    with _Work() as work:
        subject.value(poses)
    return work


class _Work(DispatchMode):
    """Counts operations, and the elements that they make or read. Views do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = tensors_of(args)
        storages = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        outputs = tensors_of(result)
        views = all(tensor.untyped_storage().data_ptr() in storages for tensor in outputs)
        if not views or is_in_place(func):
            self.operations += 1
            self.elements += sum(tensor.numel() for tensor in (*inputs, *outputs))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            self.elements += inputs[0].numel() * inputs[1].shape[-1]
        return result


def _work(subject: Subject, n_poses: int) -> tuple[int, int]:
    """Return the additional elements for 256 more entries, and the poses with nonzero weight."""
    poses = subject.probes.poses(n_poses)
    counts = []
    for size in (16, 272):
        step = replace(subject.probes.step({"w": (size,)}, n_poses), poses=poses)
        pred_list, grad_dict = step.pred_list(), step.grad_dict()
        with _Work() as work:
            gradients_of(subject.call(step, pred_list=pred_list, grad_dict=grad_dict), step.params)
        counts.append(work.elements)
    return counts[1] - counts[0], int(subject.weights(poses).count_nonzero())
