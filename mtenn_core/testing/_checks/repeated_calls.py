"""A5 to A7: the same call gives the same numbers, after other calls and in every mode."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from mtenn_core._engine.declarations import overrides
from mtenn_core.combination import Combination
from mtenn_core.testing._checks.arguments import alternatives
from mtenn_core.testing._checks.check import check
from mtenn_core.testing._outcomes import Fail, Metrics
from mtenn_core.testing._probe.comparison import equal_with_nan
from mtenn_core.testing._probe.subject import Subject
from mtenn_core.testing._probe.training_step import Step, gradients_of

N_THREADS = 8
_GO = -3.7  # a gradient of the loss


@check("A5", "the same call gives the same numbers")
def repeatable(subject: Subject) -> Metrics:
    """Run forward twice, and backward twice with ``retain_graph``. All bits must be equal."""
    step = subject.probes.step(spread=1e-3)
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
    return {}


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
        if c.pose_inputs == subject.combination.pose_inputs
    ]
    for what, combination in (("a second call", subject.combination), *others):
        for n_poses, spread in ((5, 1.0), (3, 1e-3)):
            _check_two_live_calls(subject, what, combination, n_poses, spread)
        if not all(map(equal_with_nan, before, _value_and_gradients(subject, step))):
            raise Fail(f"{what} must not change the numbers; found a change", cause=_SHARED)
    _check_weights_without_state(subject)
    _check_pose_inputs_without_state(subject)
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


@check("A7", "it works without gradients, and with frozen and unused parameters")
def modes(subject: Subject) -> Metrics:
    """Call without gradients, without parameters, and with frozen and unused parameters."""
    step = subject.probes.step()
    value = subject.call(step)
    nothing = Step(step.poses, {}, {})
    with torch.no_grad():
        found = {"under no_grad": subject.call(step), "and no parameters": subject.call(nothing)}
        if found["under no_grad"].requires_grad:
            raise Fail(
                "under no_grad: the output must not require a gradient; found that it does",
                cause="forward switches the grad mode on (enable_grad, set_grad_enabled)",
            )
    with torch.inference_mode():
        found["under inference_mode"] = subject.call(step).clone()
    found["with no parameters"] = subject.call(nothing)
    for what, other in found.items():
        if not equal_with_nan(value, other):
            raise Fail(
                f"{what}: expected the value {value.item():.17g}; found {other.item():.17g}",
            )
    _check_frozen(subject, step)
    _check_unused(subject, step)
    _check_without_elements(subject)
    return {}


def _check_without_elements(subject: Subject) -> None:
    step = subject.probes.step({"w": (2,), "empty": (0, 2)})
    if subject.gradients(step)["empty"].shape != (0, 2):
        raise Fail("a parameter without elements: its gradient must have the same shape, (0, 2)")


def _check_frozen(subject: Subject, step: Step) -> None:
    expected = subject.gradients(step)
    params = {n: p.detach().requires_grad_(n != "w2") for n, p in step.params.items()}
    found = subject.gradients(Step(step.poses, step.gradients, params))
    for name, gradient in found.items():
        if not torch.allclose(gradient, expected[name], rtol=1e-12, atol=0):
            raise Fail(
                f"parameter {name!r}: the gradient must not change if 'w2' is frozen; found a"
                " change",
                cause="frozen parameters are left out, so other parameters get wrong gradients",
            )


def _check_unused(subject: Subject, step: Step) -> None:
    zero = {n: torch.zeros_like(g) if n == "w2" else g for n, g in step.gradients.items()}
    value = subject.call(replace(step, gradients=zero))
    (found,) = torch.autograd.grad(value, step.params["w2"], allow_unused=True)
    if found is None or not (found == 0).all():
        raise Fail(
            "parameter 'w2', unused by every pose: expected a gradient of 0; found"
            f" {found if found is None else found.flatten()[0].item()}",
            cause="return zeros, not None"
            if found is None
            else "a division by the size of the gradient, or a further term (weight decay)",
        )
