"""The catalogue: each check is a function of the combination under test.

The gradient of a combined prediction is go · Σ_i w_i g_i, with go the gradient of the loss, w_i the
pose weights and g_i the gradients of the poses. So w is read off backward, with unit vectors for
g_i, and held against finite differences of the value alone (C); that backward is this sum for any
go and g_i is linear algebra, which is held to roundoff (A, B).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from mtenn_core.testing._check import Check, Metrics, Verdict
from mtenn_core.testing._comparison import compare, judge, ratio, sensitivity
from mtenn_core.testing._finite_differences import (
    Estimate,
    directional_derivatives,
    resolution,
)
from mtenn_core.testing._subject import LARGEST_STEP, Subject

# A loss hands backward any number; 1 and 0 alone would not show abs, square, sign or clamp of it.
GRAD_OUTPUTS = (1.0, -3.7, 0.25, 1e3, -1e-6)
# Shapes of parameters that a wrong sum over poses would mix up, for three poses.
SHAPES = {
    "w1": (3,),
    "w10": (3, 3),
    "w2": (3, 3),
    "scalar": (),
    "one": (1,),
    "column": (3, 1),
    "rows": (2, 3),
}
# (poses, base, spread): at a sharp scale, the weights are all 0 or 1 unless the spread is small.
PROBES = (
    (3, 0.0, 1.0),
    (3, 0.0, 0.1),
    (3, 0.0, 0.01),
    (3, 0.0, 1e-3),
    (3, 10.0, 1e-3),
    (3, -1e4, 1.0),
    (3, 1e4, 0.01),
    (1, 0.0, 1.0),
    (2, 0.0, 1.0),
    (6, 0.0, 1.0),
    (6, 0.0, 1e-3),
    (6, 0.0, 30.0),
)


def output_is_a_scalar(subject: Subject) -> Metrics:
    """A2: shape (), dtype of the predictions, attached to the parameters."""
    for n_poses in sorted({subject.n_poses(n) for n in (1, 2, 3)}):
        for shape in ((), (1,)):
            pred_list = [p.reshape(shape) for p in subject.predictions(n_poses)]
            param = torch.zeros(2, dtype=torch.float64, requires_grad=True)
            found = subject.call(pred_list, {"p": subject.randn(n_poses, 2)}, {"p": param})
            where = f"{n_poses} pose(s) of shape {shape}"
            if not isinstance(found, Tensor) or found.shape != ():
                what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise Verdict("fail", f"{where}: expected a tensor of shape (); found {what}")
            if found.dtype != torch.float64:
                raise Verdict(
                    "fail", f"{where}: expected torch.float64, as predicted; found {found.dtype}"
                )
            if not found.requires_grad:
                raise Verdict(
                    "fail", f"{where}: the output has no gradient; is it detached in combine?"
                )
    return {}


def backward_returns_one_gradient_per_parameter(subject: Subject) -> Metrics:
    """A1: what backward returns, before autograd sums it to shape or casts it."""
    if not subject.full_depth:
        raise Verdict("skip", "it has no forward of its own")
    predictions, gradients, params = _training_step(subject)
    output = subject.call(list(predictions), gradients, params)
    if not isinstance(output.grad_fn, torch.autograd.function.BackwardCFunction):
        raise Verdict("skip", "the output is not that of an autograd.Function")
    with torch.no_grad():  # as in an ordinary backward
        returned = output.grad_fn.apply(torch.ones((), dtype=torch.float64))
    returned = returned if isinstance(returned, tuple) else (returned,)
    if len(returned) < len(params):
        raise Verdict(
            "fail", f"expected {len(params)} gradients, one per parameter; found {len(returned)}"
        )
    for (name, param), gradient in zip(params.items(), returned[-len(params) :], strict=True):
        expected = (tuple(param.shape), param.dtype)
        found = (tuple(gradient.shape), gradient.dtype) if isinstance(gradient, Tensor) else None
        if found != expected:
            raise Verdict(
                "fail", f"parameter {name!r}: backward must return {expected}; found {found}"
            )
    return {}


def backward_is_the_chain_rule(subject: Subject) -> Metrics:
    """B1: go · Σ_i w_i g_i for random g_i and go."""
    predictions, gradients, params = _training_step(subject)
    worst = _hold_to_chain_rule(subject, predictions, gradients, params, GRAD_OUTPUTS)
    return {"largest error in tolerances": worst}


def gradients_are_in_the_order_of_param_names(subject: Subject) -> Metrics:
    """A3: ``param_names`` and the keys of ``grad_dict`` are ordered independently."""
    # All of one shape: autograd itself would notice another.
    predictions, gradients, params = _training_step(subject, dict.fromkeys(SHAPES, (3,)))
    names = list(params)
    shuffled = {names[i]: params[names[i]] for i in subject.permutation(len(names))}
    worst = _hold_to_chain_rule(subject, predictions, gradients, shuffled, (1.0,))
    return {"largest error in tolerances": worst}


def pose_weights_are_the_derivative(subject: Subject) -> Metrics:
    """C1: the weights that backward uses, against finite differences of the value."""
    probes: dict[int, list[Tensor]] = {}
    for n, base, spread in PROBES:
        predictions = subject.predictions(subject.n_poses(n), base, spread)
        probes.setdefault(len(predictions), []).append(predictions)
    comparisons = []
    for n_poses, points in probes.items():
        directions = _directions(subject, n_poses)
        steps = torch.tensor([subject.first_step(y) for y in points])
        fd = directional_derivatives(
            subject.values,
            torch.stack(points).repeat_interleave(len(directions), dim=0),
            directions.repeat(len(points), 1),
            steps.repeat_interleave(len(directions)),
        )
        by_point = (column.view(len(points), -1) for column in fd)
        for y, derivatives, errors in zip(points, *by_point, strict=True):
            numerical = Estimate(derivatives, errors)
            comparisons += compare(subject.weights, numerical, directions, y, "pose")
            if subject.two_derivatives:
                unit = "autograd of combine, pose"
                comparisons += compare(subject.autograd_weights, numerical, directions, y, unit)
    return judge(comparisons)


def own_parameters_have_their_gradient(subject: Subject) -> Metrics:
    """C3: gradients of the combination's own parameters, a learnable temperature say."""
    own = {n: p for n, p in subject.combination.named_parameters() if p.requires_grad}
    if not own:
        raise Verdict("skip", "it has no parameters of its own")
    comparisons = []
    for spread in (1.0, 0.1):
        y = subject.predictions(subject.n_poses(3), 0.0, spread)
        for name, param in own.items():
            directions = _directions(subject, param.numel())
            fd = directional_derivatives(
                partial(subject.values_of_parameter, name, y),
                param.detach().reshape(1, -1).repeat(len(directions), 1),
                directions,
                torch.full((len(directions),), LARGEST_STEP),
            )
            gradient_at = partial(subject.gradient_of_parameter, name)
            comparisons += compare(gradient_at, fd, directions, y, f"{name!r}, entry")
    # A parameter may play no part in a value, and nobody says that it does.
    return judge([one for one in comparisons if one.analytic or one.derivative])


CHECKS = (
    Check("A2", "the output is a scalar with a gradient", "gate", output_is_a_scalar),
    Check(
        "A1",
        "backward returns one gradient per parameter",
        "gate",
        backward_returns_one_gradient_per_parameter,
    ),
    Check("B1", "backward is the chain rule", "gate", backward_is_the_chain_rule),
    Check(
        "A3",
        "gradients are in the order of param_names",
        "gate",
        gradients_are_in_the_order_of_param_names,
    ),
    Check(
        "C1",
        "pose weights are the derivative of the value",
        "gate",
        pose_weights_are_the_derivative,
    ),
    Check(
        "C3",
        "own parameters have their gradient",
        "gate",
        own_parameters_have_their_gradient,
    ),
)


def _training_step(
    subject: Subject, shapes: Mapping[str, tuple[int, ...]] = SHAPES
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Return random predictions, pose gradients and parameters."""
    n_poses = subject.n_poses(3)
    params = {name: subject.randn(*shape).requires_grad_() for name, shape in shapes.items()}
    gradients = {name: subject.randn(n_poses, *shape) for name, shape in shapes.items()}
    return subject.predictions(n_poses), gradients, params


def _hold_to_chain_rule(
    subject: Subject,
    predictions: Tensor,
    gradients: dict[str, Tensor],
    params: dict[str, Tensor],
    grad_outputs: tuple[float, ...],
) -> float:
    weights = subject.weights(predictions)
    # Of values, not of the weights: those of a mean of four are the same number in every dtype.
    probes = [subject.predictions(len(predictions)) for _ in range(8)]
    eps = resolution(subject.values(torch.stack(probes)))
    worst = 0.0
    for go in grad_outputs:
        value = subject.call(list(predictions), gradients, params)
        found = torch.autograd.grad(value * go, list(params.values()), allow_unused=True)
        for name, gradient in zip(params, found, strict=True):
            if gradient is None:
                raise Verdict("fail", f"parameter {name!r}: backward returned no gradient")
            terms = go * weights.view(-1, *[1] * params[name].dim()) * gradients[name]
            tolerance = 64 * len(weights) * eps * terms.abs().sum(0)
            error = (gradient - terms.sum(0)).abs()
            if not (error <= tolerance).all():
                slack = sensitivity(subject.weights, predictions, weights).abs().amax(0)
                tolerance += 8 * abs(go) * torch.tensordot(slack, gradients[name].abs(), dims=1)
            if not (error <= tolerance).all():
                _fail_chain_rule(name, go, gradient, terms.sum(0), tolerance, gradients, weights)
            worst = max(worst, *map(ratio, error.flatten().tolist(), tolerance.flatten().tolist()))
    return worst


def _fail_chain_rule(
    name: str,
    go: float,
    found: Tensor,
    expected: Tensor,
    tolerance: Tensor,
    gradients: dict[str, Tensor],
    weights: Tensor,
) -> None:
    at = int(((found - expected).abs() - tolerance).nan_to_num(torch.inf).argmax())
    lines = [
        f"parameter {name!r}, entry {at}, gradient of the loss {go:g}:",
        f"    your backward      {found.flatten()[at]:.17g}",
        f"    go · Σ w_i g_i     {expected.flatten()[at]:.17g} ± {tolerance.flatten()[at]:.1e}",
    ]
    for other, theirs in gradients.items():
        sums = go * torch.tensordot(weights, theirs, dims=1)
        if other != name and sums.shape == found.shape and torch.allclose(found, sums):
            lines.append(f"it is the gradient of {other!r}: is the order that of param_names?")
    if go != 1 and torch.allclose(found * go, expected):
        lines.append("it is right for a loss gradient of 1: is grad_output multiplied in?")
    raise Verdict("fail", "\n".join(lines))


def _directions(subject: Subject, n: int) -> Tensor:
    """Return every axis for few inputs, else two random directions; shape (n_directions, n)."""
    if n <= 4:
        return torch.eye(n, dtype=torch.float64)
    # Entries ±1/2 and ±1: steps along them are exact.
    return subject.randn(2, n).sign() * (3 + subject.randn(2, n).sign()) / 4
