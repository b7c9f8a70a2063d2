"""A7: evaluation, calls without gradients, and frozen and unused parameters."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from mtenn_core.combination import Combination
from mtenn_core.testing._checks.check import check
from mtenn_core.testing._outcomes import Fail, Metrics
from mtenn_core.testing._probe.comparison import equal_with_nan
from mtenn_core.testing._probe.instances import own_parameter
from mtenn_core.testing._probe.operations import pretended
from mtenn_core.testing._probe.subject import Subject
from mtenn_core.testing._probe.training_step import Step, gradients_of


@check("A7", "it works without gradients, and with frozen and unused parameters")
def modes(subject: Subject) -> Metrics:
    """Call without gradients, without parameters, and with frozen and unused parameters."""
    # The spread is small, because a large one makes a sharp rule a hard maximum.
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
    """Compare the numbers that ``make`` returns. Frozen parameters have no gradient there."""
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
    """Freeze some parameters of the model: several in a row, the first, the last, all but one."""
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
    """Freeze each of the combination's own parameters, all of these, and all of the model's."""
    own = [name for name, p in subject.combination.named_parameters() if p.requires_grad]
    if not own:
        return
    expected = _numbers(subject, step, subject.copy(torch.float64))
    choices = [[name] for name in own[:4]]
    if len(own) > 1:
        choices.append(own)
    for frozen in choices:
        combination = subject.copy(torch.float64)
        for name in frozen:
            own_parameter(combination, name).requires_grad_(False)
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
    """Check a call without gradients, and then training with the same instance."""
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

    A stochastic combination may draw no random numbers in eval mode, and running statistics may be
    used in another way. Nothing else may depend on the mode.
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
        _check_same(expected, found, *_AFTER_EVAL)
    combination = subject.copy(torch.float64).train().eval().train()
    _check_same(expected, partial(_numbers, subject, step, combination), *_AFTER_EVAL)


_AFTER_EVAL = (
    "after eval() and train() again",
    "train() and eval() change more than self.training, or a call in eval mode leaves state",
)


def _check_compiled(subject: Subject, step: Step) -> None:
    """Check that code which asks whether torch compiles it gives the same numbers.

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
    found = subject.gradients(_with_frozen(step, ["w2"]))
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
