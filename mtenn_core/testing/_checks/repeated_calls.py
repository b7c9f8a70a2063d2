"""A5 to A7: the same call gives the same numbers, after other calls and in every mode."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from mtenn_core._engine.declarations import overrides
from mtenn_core._engine.evaluation import combined_prediction, first_of_pair
from mtenn_core.combination import Combination
from mtenn_core.testing._checks.arguments import alternatives
from mtenn_core.testing._checks.check import check
from mtenn_core.testing._outcomes import Fail, Metrics
from mtenn_core.testing._probe.comparison import equal_with_nan
from mtenn_core.testing._probe.poses import Poses
from mtenn_core.testing._probe.subject import Subject
from mtenn_core.testing._probe.torch_internals import OperationCount, pretended
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
    """Check that a call reads new numbers, if the caller wrote them over those of the last call."""
    step = subject.probes.step(spread=1e-3)
    batch = step.poses.predictions.clone()
    memory = {name: gradients.clone() for name, gradients in step.gradients.items()}
    for _ in range(2):
        value = subject.call(step, combination=subject.copy(torch.float64))
        expected = [value, *gradients_of(value, step.params).values()]
        grad_dict = {name: list(gradients) for name, gradients in memory.items()}
        value = subject.call(step, pred_list=list(batch), grad_dict=grad_dict)
        found = [value, *gradients_of(value, step.params).values()]
        # Views may be added in another order than tensors with memory of their own.
        if not all(torch.allclose(*pair, rtol=1e-9) for pair in zip(expected, found, strict=True)):
            raise Fail(
                "a call must read the numbers that it gets; found those of the last call, whose"
                " memory holds new numbers by now",
                cause="a cache finds its entries by the address or the identity of a tensor"
                " (data_ptr, id)",
            )
        other = subject.probes.step(spread=1e-3)
        step = Step(other.poses, other.gradients, step.params)
        batch.copy_(step.poses.predictions)
        for name, gradients in memory.items():
            gradients.copy_(step.gradients[name])


# Fewer for a combination that runs many operations: the time would depend on the machine.
MOST_STEPS = 400
MOST_OPERATIONS = 32_000


def _check_many_calls(subject: Subject) -> None:
    """Check that hundreds of training steps, and validations between them, change no numbers."""
    n_poses = subject.probes.n_poses(3)
    probe = subject.probes.poses(n_poses, 0.0, 1e-3)
    with subject.restored_state(), OperationCount() as operations:
        first = _value_and_weights(subject, probe)
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
                cause="calls are counted, or collected in a cache that is full: the numbers may"
                " depend only on the arguments",
            )


def _validate(subject: Subject, n_poses: int) -> None:
    """Call the combination with two sets of new predictions. This costs less than a training."""
    with torch.no_grad():
        for _ in range(2):
            _forward(subject, subject.probes.poses(n_poses, 0.0, 1e-3))


def _value_and_weights(subject: Subject, poses: Poses) -> Tensor:
    """Return the value and the pose weights of a training step, shape (1 + n_poses,)."""
    value, variable = _forward(subject, poses)
    (weights,) = torch.autograd.grad(value, variable)
    return torch.cat([value.detach().reshape(1), weights])


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
    return first_of_pair(subject.combination(*given, **poses.inputs)), param


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
    # The first calls of new instances; with a large spread, a sharp rule would be a hard maximum.
    near = subject.probes.step(spread=1e-3)
    _check_eval(subject, near)
    _check_after_validation(subject, near)
    step = subject.probes.step()
    value = subject.call(step)
    nothing = Step(step.poses, {}, {})
    with torch.no_grad():
        found = {"under no_grad": subject.call(step), "and no parameters": subject.call(nothing)}
    with torch.inference_mode():
        found["under inference_mode"] = subject.call(step).clone()
    found["with no parameters"] = subject.call(nothing)
    for what, other in found.items():
        if not equal_with_nan(value, other):
            raise Fail(
                f"{what}: expected the value {value.item():.17g}; found {other.item():.17g}",
            )
    _check_frozen(subject, step)
    _check_frozen_rows(subject)
    _check_unused(subject, step)
    _check_without_elements(subject)
    _check_frozen_own(subject, near)
    _check_compiled(subject, near)
    return {}


def _numbers(subject: Subject, step: Step, combination: Combination) -> dict[str, Tensor]:
    """Return the value, and the gradients of the trained parameters of model and combination.

    If the value has no graph, there are no gradients.
    """
    value = subject.call(step, combination=combination)
    numbers = {"the value": value.detach()}
    if not value.requires_grad:
        return numbers
    params = {f"the gradient of parameter {name!r}": p for name, p in step.params.items()}
    own = dict(combination.named_parameters())
    params |= {f"the gradient of its own parameter {name!r}": p for name, p in own.items()}
    return numbers | gradients_of(value, params)


# Parts of messages of torch. Other errors come from the combination, and name its line.
_ERRORS_OF_AUTOGRAD = (
    "nference tensor",
    "does not require grad",
    "invalid gradient",
    "number of g",
)


def _check_same(
    expected: dict[str, Tensor], make: Callable[[], dict[str, Tensor]], when: str, cause: str
) -> None:
    """Check the numbers that ``make`` returns. Frozen parameters have none."""
    try:
        found = make()
    except RuntimeError as error:
        if not any(part in str(error) for part in _ERRORS_OF_AUTOGRAD):
            raise
        raise Fail(f"training must work {when}; found {error}", cause=cause) from None
    for what, numbers in found.items():
        # The order of a sum may differ, such as that of a gradient with fewer terms.
        if not torch.allclose(numbers, expected[what], rtol=1e-9, atol=1e-12, equal_nan=True):
            raise Fail(f"{what} must not change {when}; found a change", cause=cause)
    if len(found) == 1 and len(expected) > 1:
        raise Fail(
            f"{when}: the output must require a gradient; found that it does not", cause=cause
        )


def _check_frozen_rows(subject: Subject) -> None:
    """Freeze several parameters in a row, the first, the last, and all but one."""
    # Equal shapes, because autograd would notice a wrong one.
    step = subject.probes.step({f"w{i}": (2,) for i in range(6)})
    expected = _numbers(subject, step, subject.combination)
    for frozen in ((1, 2), (0, 1, 2), (3, 4, 5), (0, 2, 3), (0, 1, 2, 3, 4), (1, 2, 3, 4, 5)):
        names = [f"w{i}" for i in frozen]
        found = partial(_numbers, subject, _with_frozen(step, names), subject.combination)
        cause = (
            "frozen parameters are left out or counted, so other parameters get wrong gradients:"
            " return one gradient for each of *model_params"
        )
        _check_same(expected, found, f"if {', '.join(names)} of w0 to w5 are frozen", cause)


def _with_frozen(step: Step, names: Collection[str]) -> Step:
    params = {n: p.detach().requires_grad_(n not in names) for n, p in step.params.items()}
    return replace(step, params=params)


def _check_frozen_own(subject: Subject, step: Step) -> None:
    """Freeze each of the combination's own parameters, all of them, and all of the model's."""
    own = [name for name, p in subject.combination.named_parameters() if p.requires_grad]
    if not own:
        return
    expected = _numbers(subject, step, subject.copy(torch.float64))
    for frozen in [[name] for name in own[:4]] + [own][: len(own) > 1]:
        combination = subject.copy(torch.float64)
        for name in frozen:
            combination.get_parameter(name).requires_grad_(False)
        found = partial(_numbers, subject, step, combination)
        cause = (
            "a frozen parameter of the combination is left out of what backward returns, or its"
            " requires_grad decides about more than its own gradient"
        )
        _check_same(expected, found, f"if its own {', '.join(frozen)} is frozen", cause)
    frozen_model = _with_frozen(step, step.params)
    found = partial(_numbers, subject, frozen_model, subject.copy(torch.float64))
    cause = "its own gradient is computed only if a parameter of the model is trained, too"
    _check_same(expected, found, "if all parameters of the model are frozen", cause)


def _check_after_validation(subject: Subject, step: Step) -> None:
    """Check a call without gradients, and training with an instance whose first call it was."""
    expected = _numbers(subject, step, subject.copy(torch.float64))
    for name, mode in (("no_grad", torch.no_grad), ("inference_mode", torch.inference_mode)):
        combination = subject.copy(torch.float64)
        if any(True for _ in combination.buffers()):
            combination.eval()  # running statistics stay as they are
        before = [buffer.clone() for buffer in combination.buffers()]
        with mode():
            value = subject.call(step, combination=combination)
        if value.requires_grad:
            raise Fail(
                f"under {name}: the output must not require a gradient; found that it does",
                cause="forward switches the grad mode on (enable_grad, set_grad_enabled)",
            )
        combination.train()
        if not all(map(equal_with_nan, before, combination.buffers())):
            continue
        cause = (
            f"a tensor that was made under {name} is kept for later calls (a cache, a lazy"
            " attribute), and backward cannot use it: make it in __init__, or in each call"
        )
        when = f"if the first call is under {name} and the next one trains"
        _check_same(expected, partial(_numbers, subject, step, combination), when, cause)


def _check_eval(subject: Subject, step: Step) -> None:
    """Check the numbers in eval mode and after it.

    In eval mode, random numbers may be missing, and running statistics, which training changes,
    may be used in another way. Nothing else may depend on the mode.
    """
    combination = subject.copy(torch.float64).train()
    before = [buffer.clone() for buffer in combination.buffers()]
    expected = _numbers(subject, step, combination)
    statistics = not all(map(equal_with_nan, before, combination.buffers()))
    combination = subject.copy(torch.float64).train().eval()
    if not (statistics or subject.combination.stochastic):
        cause = (
            "the combination asks self.training, or has another value or derivative in eval():"
            " only random numbers (declare stochastic) and running statistics (a buffer) may"
        )
        found = partial(_numbers, subject, step, combination)
        _check_same(expected, found, "in eval()", cause)
        combination.train()
        _check_same(expected, found, *_RETURN)
    combination = subject.copy(torch.float64).train().eval().train()
    _check_same(expected, partial(_numbers, subject, step, combination), *_RETURN)


_RETURN = (
    "after eval() and train() again",
    "train() and eval() change more than self.training, or a call in eval mode leaves state",
)


def _check_compiled(subject: Subject, step: Step) -> None:
    """Check that the numbers are the same for code that asks whether torch compiles it.

    Nothing is compiled.
    """
    expected = _numbers(subject, step, subject.combination)
    for what in ("torch.compile", "torch.export", "torch.jit.trace"):
        try:
            with pretended(what):
                found = _numbers(subject, step, subject.combination)
        except Exception:  # it may refuse to be compiled
            continue
        cause = (
            f"the combination asks whether it runs under {what} (is_compiling, is_exporting,"
            " is_tracing) and then computes something else"
        )
        _check_same(expected, found.copy, f"under {what}", cause)


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
