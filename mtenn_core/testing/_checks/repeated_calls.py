"""A5 and A6: the same call gives the same numbers, also after other calls."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from mtenn_core._engine.declarations import overrides
from mtenn_core._engine.evaluation import combined_prediction, value_of_forward
from mtenn_core.combination import Combination
from mtenn_core.testing._checks.arguments import alternatives
from mtenn_core.testing._checks.check import check
from mtenn_core.testing._outcomes import Fail, Metrics
from mtenn_core.testing._probe.comparison import equal_with_nan
from mtenn_core.testing._probe.operations import OperationCount
from mtenn_core.testing._probe.poses import Poses
from mtenn_core.testing._probe.subject import Subject
from mtenn_core.testing._probe.training_step import Step, gradients_of

N_THREADS = 8
_GO = -3.7  # a gradient of the loss


@check("A5", "the same call gives the same numbers")
def repeatable(subject: Subject) -> Metrics:
    """Run forward twice, and backward twice with ``retain_graph``. All bits must be equal."""
    step = subject.probes.step(spread=1e-3)
    first, second = _same_value_twice(subject, step)
    go = torch.tensor(_GO, dtype=first.dtype)  # 1 would hide a multiplication in place
    for value in (first, second):
        # Do not pass this tensor as grad_outputs: torch would import sympy to compare the shapes,
        # which takes a second.
        value.register_hook(lambda _: go)
    once = gradients_of(first, step.params, retain_graph=True)
    if go != _GO:
        raise Fail(
            "backward must leave grad_output unchanged, because other parts of a graph may use it;"
            f" found {go.item():g} instead of {_GO:g} after backward",
            cause="grad_output is changed in place (mul_, /=): compute a new tensor,"
            " grad_output * number",
        )
    twice = gradients_of(first, step.params, retain_graph=True)
    again = gradients_of(second, step.params)
    for name, gradient in once.items():
        if not equal_with_nan(gradient, again[name]):
            raise Fail(
                f"parameter {name!r}: the same call must give the same gradient; found two"
                " different gradients",
                cause="random numbers or a counter in backward, or state that the first call left",
            )
        if not equal_with_nan(gradient, twice[name]):
            raise Fail(
                f"parameter {name!r}: a second backward (retain_graph=True) must give the same"
                " gradient; found a different gradient",
                cause="backward changes the saved tensors of forward in place",
            )
    # Dropout may leave all numbers of a few poses as they are, but not those of many.
    _same_value_twice(subject, subject.probes.step({"w": (2,)}, 20, 1e-3))
    return {}


def _same_value_twice(subject: Subject, step: Step) -> tuple[Tensor, Tensor]:
    """Return the values of two calls with the same arguments, which must be equal."""
    first, second = subject.call(step), subject.call(step)
    if not equal_with_nan(first, second):
        raise Fail(
            f"the same call must give the same value; found {first.item():.17g} and then"
            f" {second.item():.17g}",
            cause="random numbers that do not come from torch's global random state: the checks"
            " cannot replay them"
            if subject.combination.stochastic
            else "random numbers (declare stochastic = True), or state that the first call left",
        )
    return first, second


_SHARED = "a cache, or state that a call leaves on self, the class or the module"


@check("A6", "calls do not affect one another")
def isolated(subject: Subject) -> Metrics:
    """Check two calls at the same time, two instances, and threads."""
    step = subject.probes.step(spread=1e-3)
    before = _value_and_gradients(subject, step)
    others: list[tuple[str, Combination]] = [("a copy", subject.copy(torch.float64))]
    others += [
        (f"an instance with another {n!r}", Subject(c, subject.seed).combination)
        for n, c in itertools.islice(alternatives(subject), 1)
        if (c.pose_inputs, c.pose_columns)
        == (subject.combination.pose_inputs, subject.combination.pose_columns)
    ]
    for what, combination in (("a second call", subject.combination), *others):
        for n_poses, spread in ((5, 1.0), (3, 1e-3)):
            _check_two_live_calls(subject, what, combination, n_poses, spread)
        if not all(map(equal_with_nan, before, _value_and_gradients(subject, step))):
            raise Fail(f"{what} must not change the numbers; found a change", cause=_SHARED)
    _check_weights_without_state(subject)
    _check_pose_inputs_without_state(subject)
    _check_reused_memory(subject)
    _check_many_calls(subject)
    buffers = dict(subject.combination.named_buffers())
    if not (subject.combination.stochastic or buffers):
        _check_threads(subject)
    return {}


def _check_weights_without_state(subject: Subject) -> None:
    """Check that ``pose_weights`` does not depend on an earlier call of ``combine``."""
    if not overrides(type(subject.combination), "pose_weights"):
        return
    n_poses = subject.probes.n_poses(3)
    one, two = subject.probes.poses(n_poses), subject.probes.poses(n_poses)
    expected = subject.weights(one)
    with subject.restored_state(), torch.no_grad():
        if overrides(type(subject.combination), "combine"):
            subject.combination.combine(two.predictions, **two.inputs)
        found = subject.combination.pose_weights(one.predictions, **one.inputs)
    if not equal_with_nan(expected, found):
        raise Fail(
            "pose_weights(y) must not depend on an earlier call of combine; found other weights"
            " after combine(other predictions)",
            cause="pose_weights uses state that combine leaves on self: compute it from y",
        )


def _check_pose_inputs_without_state(subject: Subject) -> None:
    """Check that the value does not depend on the pose inputs of an earlier call."""
    step = subject.probes.step(spread=1e-3)
    for name in step.poses.inputs:
        numbers = subject.probes.poses(len(step.poses)).inputs[name]
        other = replace(step, poses=step.poses.with_input(name, numbers))
        expected = subject.call(other, combination=subject.copy(torch.float64))
        subject.call(step)
        found = subject.call(other)
        if not equal_with_nan(expected, found):
            raise Fail(
                f"{other.poses}: expected the value {expected.item():.17g}; found"
                f" {found.item():.17g} after a call with another {name!r}",
                cause=_SHARED,
            )


def _check_reused_memory(subject: Subject) -> None:
    """Check that a call sees new numbers that the caller wrote into the memory of the old ones."""
    step = subject.probes.step(spread=1e-3)
    batch = step.poses.predictions.clone()
    memory = {name: gradients.clone() for name, gradients in step.gradients.items()}
    for _ in range(2):
        value = subject.call(step, combination=subject.copy(torch.float64))
        expected = [value, *gradients_of(value, step.params).values()]
        grad_dict = {name: list(step.by_pose(each)) for name, each in memory.items()}
        value = subject.call(step, pred_list=list(batch), grad_dict=grad_dict)
        found = [value, *gradients_of(value, step.params).values()]
        # Views may be added in another order than tensors with memory of their own.
        if not all(torch.allclose(*pair, rtol=1e-9) for pair in zip(expected, found, strict=True)):
            raise Fail(
                "a call must use the numbers that it gets; found the results of the last call,"
                " although the caller wrote new numbers into the same memory",
                cause="a cache finds its entries by the address or the identity of a tensor"
                " (data_ptr, id)",
            )
        other = subject.probes.step(spread=1e-3)
        step = Step(other.poses, other.gradients, step.params)
        batch.copy_(step.poses.predictions)
        for name, gradients in memory.items():
            gradients.copy_(step.gradients[name])


# A combination with many operations takes fewer steps. A limit on time would depend on the machine.
MOST_STEPS = 400
MOST_OPERATIONS = 32_000


def _check_many_calls(subject: Subject) -> None:
    """Check that hundreds of training steps, and validations between them, change no numbers."""
    n_poses = subject.probes.n_poses(3)
    probe = subject.probes.poses(n_poses, 0.0, 1e-3)
    with subject.restored_state():
        first = _value_and_weights(subject, probe)
    # Not in the call before: under a dispatch mode, torch computes the derivative of prod in
    # another way, with other roundoff.
    with subject.restored_state(), OperationCount() as operations:
        _value_and_weights(subject, probe)
        _validate(subject, n_poses)
    n_steps = max(1, min(MOST_STEPS, MOST_OPERATIONS // operations.count))
    changing = subject.combination.stochastic or any(True for _ in subject.combination.buffers())
    found = []
    with subject.restored_state():
        for _ in range(n_steps):
            found.append(_value_and_weights(subject, probe))
            _validate(subject, n_poses)
    if changing:  # random numbers, or statistics of the calls, which are restored
        found = []
    with subject.restored_state():
        found.append(_value_and_weights(subject, probe))
    new = subject.probes.poses(n_poses, 0.0, 1e-3)
    fresh = Subject(subject.original, subject.seed)
    with fresh.restored_state():
        first_of_new = _value_and_weights(fresh, new)
    with subject.restored_state():
        of_new = _value_and_weights(subject, new)
    if not equal_with_nan(first_of_new, of_new):
        found.append(of_new)
    for i, numbers in enumerate(found):
        if not equal_with_nan(first, numbers):
            when = n_steps if changing else i
            raise Fail(
                f"{n_steps} training steps must not change the numbers of later calls; found other"
                f" numbers after {when}",
                cause="calls are counted, or a cache is full. The numbers may depend only on the"
                " arguments",
            )


def _validate(subject: Subject, n_poses: int) -> None:
    """Call the combination with two sets of new predictions. This costs less than training."""
    with torch.no_grad():
        for _ in range(2):
            _forward(subject, subject.probes.poses(n_poses, 0.0, 1e-3))


def _value_and_weights(subject: Subject, poses: Poses) -> Tensor:
    """Return the value and the pose weights of a training step as one vector."""
    value, variable = _forward(subject, poses)
    (weights,) = torch.autograd.grad(value, variable)
    return torch.cat([value.detach().reshape(1), weights.flatten()])


def _forward(subject: Subject, poses: Poses) -> tuple[Tensor, Tensor]:
    """Return the value, and the tensor whose gradient is the vector of the weights."""
    y = poses.predictions.clone()
    if not subject.full_depth:
        # The clone is no leaf, as in a model.
        y.requires_grad_()
        return combined_prediction(subject.combination, y.clone(), poses.inputs), y
    unit_vectors = torch.eye(len(y), dtype=y.dtype)
    param = torch.zeros_like(y, requires_grad=True)
    given = list(y), {"w": list(unit_vectors)}, ["w"], param
    return value_of_forward(subject.combination, *given, **poses.inputs), param


def _check_two_live_calls(
    subject: Subject, what: str, other: Combination, n_poses: int, spread: float
) -> None:
    one = subject.probes.step(spread=spread)
    two = subject.probes.step(n_poses=max(n_poses, other.min_poses), spread=spread)
    first_gradients = subject.gradients(one)
    expected = {name: gradient.clone() for name, gradient in first_gradients.items()}
    for other_first in (False, True):
        value = subject.call(one)
        meanwhile = subject.call(two, combination=other)
        if other_first:
            gradients_of(meanwhile, two.params)
        found = gradients_of(value, one.params)
        for name, gradient in expected.items():
            if not equal_with_nan(gradient, found[name]):
                raise Fail(
                    f"parameter {name!r}: {what} between forward and backward must not change the"
                    " gradient; found a change",
                    cause="state on self, the class or the module, which the last call overwrites:"
                    " keep it on ctx",
                )
    gradients_of(subject.call(two, combination=other), two.params)
    if any(not equal_with_nan(first_gradients[name], expected[name]) for name in first_gradients):
        raise Fail(
            f"{what} must not change gradients that backward returned earlier; found a change",
            cause="every backward writes to the same buffer: return a new tensor",
        )
    if not equal_with_nan(subject.call(one), value):
        raise Fail(
            f"{what} must not change the value; found a change",
            cause=_SHARED,
        )


def _check_threads(subject: Subject) -> None:
    steps = [subject.probes.step() for _ in range(N_THREADS)]
    alone = [_value_and_gradients(subject, step) for step in steps]
    with ThreadPoolExecutor(N_THREADS) as pool:
        found = list(pool.map(partial(_value_and_gradients, subject), 5 * steps))
    for one, other in zip(5 * alone, found, strict=True):
        if not all(map(equal_with_nan, one, other)):
            raise Fail(
                f"calls in {N_THREADS} threads must give the same numbers as calls one by one;"
                " found other numbers",
                cause="the threads share state",
            )


def _value_and_gradients(subject: Subject, step: Step) -> list[Tensor]:
    value = subject.call(step)
    return [value.detach(), *gradients_of(value, step.params).values()]
