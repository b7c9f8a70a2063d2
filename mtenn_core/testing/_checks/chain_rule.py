"""B: backward returns go · Σ_i w_i g_i, to roundoff.

The weights w_i themselves come from backward, with unit vectors for the gradients g_i of the poses.
These checks only test linear algebra. The checks C test that w_i is the derivative of the value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from mtenn_core.testing._checks.check import check
from mtenn_core.testing._outcomes import Fail, Metrics
from mtenn_core.testing._probe.comparison import ratio, sensitivity
from mtenn_core.testing._probe.finite_differences import resolution
from mtenn_core.testing._probe.likely_causes import cause_in_chain_rule
from mtenn_core.testing._probe.subject import Subject
from mtenn_core.testing._probe.training_step import Step, gradients_of

# Gradients of the loss. With only 1 and 0, an abs, square, sign or clamp would not show.
GRAD_OUTPUTS = (1.0, -3.7, 0.25, 1e3, -1e-6, 0.0)
# GradScaler starts with a scale of 65,536 and raises it. A mean over many numbers divides the loss.
LARGE_SCALES = (65536.0, -(2.0**24))
SMALL_SCALES = (1e-8, -1e-12)
# For gradients of own parameters: a power of two changes no digit, also of a sum in float32.
LARGE_POWERS = (2.0**16, -(2.0**24))
SMALL_POWERS = (2.0**-27, -(2.0**-40))
GradDict = dict[str, list[Tensor]]


@check("B1", "backward follows the chain rule", "gate")
def chain_rule(subject: Subject) -> Metrics:
    """Compare backward with the chain rule, for random gradients of the poses and of the loss.

    The gate leaves out the scales of GradScaler and parameters of three and four dimensions.
    """
    step = subject.probes.step()
    worst = check_chain_rule(subject, step, GRAD_OUTPUTS)
    if subject.thorough:
        worst = max(worst, _check_loss_scales(subject, step), _check_kernels(subject))
    return {"largest error in tolerances": worst}


def _check_loss_scales(subject: Subject, step: Step) -> float:
    """Check gradients of the loss of any size. The step has passed with ordinary ones."""
    with _cause("grad_output is changed if it is large: a clamp, a cast to float16, or a scale"):
        worst = check_chain_rule(subject, step, LARGE_SCALES)
        _check_own_gradients(subject, LARGE_POWERS)
    with _cause("grad_output is changed if it is small: a threshold, or a cast to float16"):
        worst = max(worst, check_chain_rule(subject, step, SMALL_SCALES))
        _check_own_gradients(subject, SMALL_POWERS)
    for go in (math.inf, math.nan):
        found = gradients_of(subject.call(step) * go, step.params)
        _check_not_finite(go, "parameter", found)
        for near in _own_steps(subject):
            usual, found = _own_gradients(subject, near, 1.0), _own_gradients(subject, near, go)
            _check_not_finite(go, "own parameter", {n: g[usual[n] != 0] for n, g in found.items()})
    return worst


def _check_not_finite(go: float, what: str, gradients: dict[str, Tensor]) -> None:
    for name, gradient in gradients.items():
        if gradient.isfinite().any():
            raise Fail(
                f"{what} {name!r}, gradient of the loss {go}: expected infinite or NaN"
                " gradients, because GradScaler then skips the step; found finite"
                " ones",
                cause="grad_output is changed if it is not finite (nan_to_num, clamp, where)",
            )


def _own_steps(subject: Subject) -> list[Step]:
    """Return steps to compare gradients of own parameters; none if there are no such gradients."""
    if not _own(subject):
        return []
    # If a combination is sharp, the gradient may be 0 for predictions that are far apart.
    return [subject.probes.step({"w": (2,)}, spread=spread) for spread in (1.0, 1e-3)]


def _own(subject: Subject) -> dict[str, Tensor]:
    return {n: p for n, p in subject.combination.named_parameters() if p.requires_grad}


def _own_gradients(subject: Subject, step: Step, go: float) -> dict[str, Tensor]:
    """Return the gradients of the combination's own parameters for a gradient of the loss."""
    return gradients_of(subject.call(step) * go, _own(subject))


def _check_own_gradients(subject: Subject, grad_outputs: Sequence[float]) -> None:
    """Check that gradients of own parameters are proportional to the gradient of the loss.

    C3 checks them for a usual gradient of the loss.
    """
    for step in _own_steps(subject):
        usual = _own_gradients(subject, step, 1.0)
        for go in grad_outputs:
            for name, found in _own_gradients(subject, step, go).items():
                if torch.allclose(found, go * usual[name], rtol=1e-9, atol=0, equal_nan=True):
                    continue
                error = (found - go * usual[name]).abs()
                at = int(error.nan_to_num(math.inf).argmax())
                raise Fail(
                    f"own parameter {name!r}, entry {at}, gradient of the loss {go:g}:\n"
                    f"    your backward        {found.flatten()[at]:.10g}\n"
                    f"    {go:g} · that for 1    {go * usual[name].flatten()[at]:.10g}"
                )


def _check_kernels(subject: Subject) -> float:
    """Check parameters of three and four dimensions. Those of up to two have passed."""
    step = kernels(subject)
    with _cause(
        "right for vectors and matrices, wrong for kernels of convolutions: the poses are axis 0,"
        " and all other axes must stay as they are (.T reverses all axes)"
    ):
        return check_chain_rule(subject, step, (-3.7,))


def kernels(subject: Subject) -> Step:
    """Return a step with parameters of three and four dimensions, as convolutions have them.

    As for matrices, a sum over a wrong axis also has the right shape.
    """
    n = min(subject.probes.n_poses(3), 6)  # n**4 numbers for each pose
    return subject.probes.step({"cube": (n, n, n), "square": (n, n, n, n), "deep": (n, 1, 2, 2)})


@contextmanager
def _cause(cause: str) -> Iterator[None]:
    """Give a failure in the block this cause."""
    try:
        yield
    except Fail as failure:
        raise Fail(str(failure), cause=cause, **failure.metrics) from None


@check("B2", "the layout of the gradients does not matter")
def layout_of_gradients(subject: Subject) -> Metrics:
    """Pass transposed, strided, offset and expanded gradients, and views of one buffer."""
    worst = 0.0
    for layout in (_transposed, _strided, _offset, _of_one_buffer):
        step = subject.probes.step()
        worst = max(worst, check_chain_rule(subject, step, (1.0,), layout=layout))
    with _cause("gradients of kernels are read in the order of their memory, not by their indices"):
        for layout in (_transposed, _channels_last):
            worst = max(worst, check_chain_rule(subject, kernels(subject), (1.0,), layout=layout))
    step = subject.probes.step()
    for equal in (
        {n: g[..., :1].expand_as(g) if g.dim() > 1 else g for n, g in step.gradients.items()},
        {n: g[:1].expand_as(g) for n, g in step.gradients.items()},
    ):
        same = replace(step, gradients=equal)
        worst = max(worst, check_chain_rule(subject, same, (1.0,), layout=_as_it_is))
    return {"largest error in tolerances": worst}


def _as_it_is(gradients: Tensor) -> list[Tensor]:
    return list(gradients)


def _transposed(gradients: Tensor) -> list[Tensor]:
    if gradients.dim() < 3:
        return list(gradients.clone())
    axes = range(gradients.dim() - 2, -1, -1)
    return [gradient.permute(*axes).contiguous().permute(*axes) for gradient in gradients]


def _channels_last(gradients: Tensor) -> list[Tensor]:
    return [gradient.movedim(1, -1).contiguous().movedim(-1, 1) for gradient in gradients]


def _strided(gradients: Tensor) -> list[Tensor]:
    return [torch.stack([g, torch.full_like(g, torch.nan)], dim=-1)[..., 0] for g in gradients]


def _offset(gradients: Tensor) -> list[Tensor]:
    padded = [torch.cat([g.new_full((5,), torch.nan), g.flatten()]) for g in gradients]
    return [flat[5:].view(gradients.shape[1:]) for flat in padded]


def _of_one_buffer(gradients: Tensor) -> list[Tensor]:
    flat = gradients.reshape(len(gradients), -1)
    rows, size = torch.cat([flat, flat], dim=1), flat.shape[1]
    return [row[size:].view(gradients.shape[1:]) for row in rows]


def check_chain_rule(
    subject: Subject,
    step: Step,
    grad_outputs: Sequence[float],
    layout: Callable[[Tensor], list[Tensor]] = lambda gradients: list(gradients.clone()),
) -> float:
    """Compare backward with go · Σ_i w_i g_i and return the largest error / tolerance.

    Parameters
    ----------
    grad_outputs : gradients of the loss with respect to the combined prediction
    layout : turns gradients of shape (n_poses, *shape) into a list for ``grad_dict``. With columns,
        ``shape`` starts with their number

    Raises
    ------
    Fail : backward differs
    """
    weights = subject.weights(step.poses).flatten()
    # The resolution comes from values, because weights may be exact in every dtype. For example, a
    # mean of four poses has weights of 1/4.
    probes = [subject.probes.poses(len(step.poses)).row() for _ in range(8)]
    eps = resolution(subject.values(torch.stack(probes)))
    worst = 0.0
    for go in grad_outputs:
        grad_dict = {name: layout(step.by_pose(each)) for name, each in step.gradients.items()}
        value = subject.call(step, grad_dict=grad_dict)
        params = list(step.params.values())
        found = torch.autograd.grad(value * go, params, allow_unused=True)
        for name, gradient in zip(step.params, found, strict=True):
            if gradient is None and go == 0:
                continue
            if gradient is None:
                raise Fail(f"parameter {name!r}: backward returned no gradient")
            worst = max(worst, _check_parameter(subject, step, name, go, gradient, weights, eps))
    return worst


def _check_parameter(
    subject: Subject,
    step: Step,
    name: str,
    go: float,
    found: Tensor,
    weights: Tensor,
    eps: float,
) -> float:
    """Compare the gradient of one parameter, and return error / tolerance."""
    gradients = step.gradients[name]
    terms = go * weights.view(-1, *[1] * found.dim()) * gradients
    expected = terms.sum(0)
    tolerance = 64 * len(weights) * eps * terms.abs().sum(0)
    error = (found - expected).abs()
    if not (error <= tolerance).all():
        weights_at = step.poses.fixed(subject.weights)
        slack = sensitivity(weights_at, step.poses.predictions, weights).abs().amax(0)
        tolerance += 8 * abs(go) * torch.tensordot(slack, gradients.abs(), dims=1)
    if not (error <= tolerance).all():
        at = int((error - tolerance).nan_to_num(torch.inf).argmax())
        raise Fail(
            f"parameter {name!r}, entry {at}, {len(step.poses)} poses, gradient of the loss"
            f" {go:g}:\n"
            f"    your backward      {found.flatten()[at]:.17g}\n"
            f"    go · Σ w_i g_i     {expected.flatten()[at]:.17g} ± {tolerance.flatten()[at]:.1e}",
            cause=cause_in_chain_rule(step, name, go, found, weights),
        )
    return max(map(ratio, error.flatten().tolist(), tolerance.flatten().tolist()))
