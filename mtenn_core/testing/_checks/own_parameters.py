"""C3: the gradients of a combination's own parameters, such as a learnable temperature."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from mtenn_core._engine.tensor_search import tensors_in
from mtenn_core.combination import Combination
from mtenn_core.testing._checks.check import check
from mtenn_core.testing._checks.derivatives import (
    compare_at,
    compare_weights,
    directions_for,
    probes_of,
)
from mtenn_core.testing._checks.many_poses import SPREAD, has_pairs_of_poses, loops_over_poses
from mtenn_core.testing._checks.whole_model import (
    BOTH,
    loss_of_both,
    loss_of_prediction,
    modes_of,
    outputs_of,
)
from mtenn_core.testing._outcomes import Fail, Metrics, Skip
from mtenn_core.testing._probe.comparison import Comparison, judge, narrowed
from mtenn_core.testing._probe.finite_differences import (
    FLOAT64,
    Estimate,
    directional_derivatives,
    resolution,
)
from mtenn_core.testing._probe.instances import own_parameter
from mtenn_core.testing._probe.kinks import kink_cause
from mtenn_core.testing._probe.one_number import as_written
from mtenn_core.testing._probe.poses import Poses
from mtenn_core.testing._probe.probes import LARGEST_STEP
from mtenn_core.testing._probe.subject import Subject
from mtenn_core.testing._probe.underflow import underflowing_weights


@check("C3", "its own parameters have a correct gradient", "gate")
def own_parameters(subject: Subject) -> Metrics:
    """Compare the gradients of parameters of the combination, such as a learnable temperature.

    Thorough checks repeat this with other values of the parameters, with more poses, with a weight
    of 0, and in a model whose loss also uses the pose predictions.
    """
    _check_no_hidden_parameters(subject.combination)
    own = {n: p for n, p in subject.combination.named_parameters() if p.requires_grad}
    if not own:
        raise Skip("it has no parameters of its own")
    few = [subject.probes.poses(3, 0.0, spread) for spread in (1.0, 0.1, 1e-3)]
    comparisons = _of_own_parameters(subject, list(own), few)
    if subject.thorough:
        comparisons += _of_own_parameters(subject, list(own), _more_poses(subject), n_directions=1)
        comparisons += _own_parameters_in_a_model(subject, list(own))
        with torch.no_grad():
            for param in own.values():
                # Stay near the old values and keep the sign, because other values may be invalid.
                factor = 1 + 0.3 * subject.probes.randn(*param.shape).tanh()
                param.copy_(torch.where(param == 0, 0.1 * (factor - 1), factor * param))
        few = [subject.probes.poses(3, 0.0, spread) for spread in (1.0, 0.1, 1e-3)]
        comparisons += _of_own_parameters(subject, list(own), few)
        more, cause = compare_weights(subject, probes_of(subject)[:6])
        if any(comparison.wrong for comparison in more):
            where = "right with the initial parameters, wrong with others"
            judge(more, f"{where}; {cause}".rstrip("; "))
    # A pair of zeros does not count, because the value need not depend on every parameter.
    counted = [c for c in comparisons if c.analytic or c.derivative]
    return judge(counted, _cause_in_own_parameters(subject, comparisons))


def _cause_in_own_parameters(subject: Subject, comparisons: list[Comparison]) -> str:
    wrong = [c for c in comparisons if c.wrong]
    if not wrong:
        return ""
    if cause := kink_cause(subject, wrong):
        return cause
    names = ", ".join(sorted({c.unit.split(",")[0] for c in wrong}))
    zero = all(c.analytic == 0 for c in wrong)
    finite = all(math.isfinite(c.analytic) for c in wrong)
    which = "detached, or not used" if zero else "wrong" if finite else "not a finite number"
    cause = f"the gradient of {names} is {which}"
    right = [c for c in comparisons if not c.wrong]
    if right and not finite:
        return f"{cause}: is it 0 · ln 0 where a weight is 0, or a division by such a weight?"
    if right and all(BOTH in c.unit for c in wrong):
        return f"{cause}, but only if the loss also uses the pose predictions"
    fewest = min(len(c.predictions) for c in wrong)
    most = max((len(c.predictions) for c in right), default=0)
    return f"{cause}, but only above {most} poses" if 0 < most < fewest else cause


def _more_poses(subject: Subject) -> list[Poses]:
    """Return more than a handful of poses, and poses of which one has a population of 0."""
    is_slow = loops_over_poses(subject) or has_pairs_of_poses(subject)
    numbers = () if is_slow else (257, 1025)
    return [
        subject.probes.poses(9, 0.0, 0.3),
        subject.probes.poses(20, 0.0, 0.3),
        subject.probes.poses(130, 0.0, 0.02),
        *(subject.probes.poses(n_poses, 0.0, SPREAD) for n_poses in numbers),
        *underflowing_weights(subject),
    ]


def _of_own_parameters(
    subject: Subject, names: list[str], points: list[Poses], n_directions: int | None = None
) -> list[Comparison]:
    comparisons = []
    # A parameter may have no effect at a probe.
    eps = resolution(subject.values(torch.stack([subject.probes.poses(3).row() for _ in range(4)])))
    for poses in points:
        for name in names:
            param = own_parameter(subject.combination, name)
            directions = directions_for(subject, param.numel())[:n_directions]
            fd = _derivatives_of_parameter(subject, name, poses, directions, eps)
            gradient_at = partial(subject.gradient_of_parameter, name)
            unit, shape = f"{name!r}, entry", tuple(param.shape)
            found = compare_at(gradient_at, fd, directions, poses, unit, shape)
            wrong = next((each for each in found if each.wrong), None)
            if wrong is not None and subject.probes.columns is not None:
                along = partial(_compare_along, subject, name, wrong, eps)
                found.append(narrowed(wrong, along))
            comparisons += found
    return comparisons


def _compare_along(
    subject: Subject, name: str, wrong: Comparison, eps: float, directions: Tensor
) -> list[Comparison]:
    """Repeat a comparison along other directions."""
    fd = _derivatives_of_parameter(subject, name, wrong.poses, directions, eps)
    gradient_at = partial(subject.gradient_of_parameter, name)
    return compare_at(gradient_at, fd, directions, wrong.poses, wrong.unit, wrong.shape)


def _derivatives_of_parameter(
    subject: Subject,
    name: str,
    poses: Poses,
    directions: Tensor,
    eps: float = FLOAT64,
    function: Callable[[Tensor], Tensor] = lambda values: values,
) -> Estimate:
    """Return the derivatives of a function of the value with respect to an own parameter."""
    param = own_parameter(subject.combination, name)
    return directional_derivatives(
        lambda settings: function(subject.values_of_parameter(name, poses, settings)),
        param.detach().reshape(1, -1).repeat(len(directions), 1),
        directions,
        torch.full((len(directions),), LARGEST_STEP),
        eps,
    )


def _own_parameters_in_a_model(subject: Subject, names: list[str]) -> list[Comparison]:
    """Compare the gradients of a loss of the combined prediction and of the pose predictions."""
    poses = subject.probes.poses(5, 0.0, 0.3)
    comparisons = []
    for name in names:
        directions = directions_for(subject, own_parameter(subject.combination, name).numel())[:1]
        fd = _derivatives_of_parameter(
            subject,
            name,
            poses,
            directions,
            function=loss_of_prediction,  # the rest does not depend on this parameter
        )
        for mode in modes_of(subject):
            gradient_of = partial(_gradient_in_a_model, subject, name, mode)
            unit = f"{name!r}, gradients={mode!r}{BOTH}, entry"
            comparisons += compare_at(gradient_of, fd, directions, poses, unit)
    return comparisons


def _gradient_in_a_model(subject: Subject, name: str, mode: str, poses: Poses) -> Tensor:
    """Return the flattened gradient of an own parameter, as an optimizer sees it."""
    param = own_parameter(subject.combination, name)
    param.grad = None
    with as_written(subject.combination):
        loss_of_both(*outputs_of(subject, _Factor(), poses.predictions, poses, mode)).backward()
    gradient, param.grad = param.grad, None
    return (torch.zeros_like(param) if gradient is None else gradient).reshape(-1)


class _Factor(torch.nn.Module):
    """A pose model that returns the pose, which is a number, times a factor of 1."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, pose: Tensor) -> Tensor:
        return pose * self.factor


def _check_no_hidden_parameters(combination: Combination) -> None:
    known = {id(param) for param in combination.parameters()}
    for module in combination.modules():
        values = {name: value for name, value in vars(module).items() if name != "_arguments"}
        for index, tensor in tensors_in(list(values.values())):
            if tensor.requires_grad and tensor.is_leaf and id(tensor) not in known:
                raise Fail(
                    f"{list(values)[index]!r} requires a gradient, so it must be in parameters();"
                    " it is missing there. An optimizer trains only what is in parameters()",
                    cause="use a torch.nn.Parameter, or a ParameterList for several of them",
                )
