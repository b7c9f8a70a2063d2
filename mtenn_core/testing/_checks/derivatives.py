"""C: comparisons of derivatives with finite differences."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from mtenn_core._engine.declarations import constructor_arguments, overrides
from mtenn_core._engine.tensor_search import tensors_in
from mtenn_core.combination import Combination
from mtenn_core.model import MultiPoseModel, MultiPoseOutput
from mtenn_core.testing._checks.check import check
from mtenn_core.testing._outcomes import Fail, Metrics, Skip
from mtenn_core.testing._probe.comparison import Comparison, compare, judge
from mtenn_core.testing._probe.finite_differences import (
    FLOAT64,
    Estimate,
    central_differences,
    climb,
    directional_derivatives,
    extrapolate,
    resolution,
)
from mtenn_core.testing._probe.kinks import KINK, at_kink, kink_cause
from mtenn_core.testing._probe.likely_causes import NOT_FINITE, Point, cause_in_weights
from mtenn_core.testing._probe.poses import Poses
from mtenn_core.testing._probe.probes import LARGEST_STEP
from mtenn_core.testing._probe.subject import Subject
from mtenn_core.testing._probe.underflow import underflowing_weights

# Each row is (poses, base, spread). If a combination is sharp, all weights are 0 or 1 unless the
# spread is small.
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
    (33, 0.0, 0.3),  # some mistakes show only above a certain number of poses
)

# These rows cover ΔG in kT and in kcal/mol, pIC50, predictions of one sign, and up to 20 poses.
MORE_PROBES = (
    (3, -8.0, 2.0),
    (3, -30.0, 8.0),
    (3, 7.0, 1.5),
    (3, 0.0, 1e-4),
    (3, 100.0, 10.0),
    (3, -100.0, 3.0),
    (3, -1e3, 100.0),
    (3, 0.0, 5.0),
    (2, -8.0, 0.3),
    (2, 7.0, 1e-3),
    (4, 0.0, 1.0),
    (4, -8.0, 0.01),
    (5, -8.0, 2.0),
    (7, 0.0, 0.3),
    (8, -8.0, 2.0),
    (11, 7.0, 1.0),
    (20, -8.0, 2.0),
    (20, 0.0, 0.01),
)


@check("C1", "pose weights are the derivative of the value", "gate")
def pose_weights(subject: Subject) -> Metrics:
    """Compare all weights of a few poses, for predictions of many sizes and spreads.

    Thorough checks add poses of which one has a weight that underflows.
    """
    points = _probes(subject)
    if subject.thorough:
        points += underflowing_weights(subject)
    return judge(*compare_weights(subject, points), partial(step_table, subject))


def _probes(subject: Subject) -> list[Poses]:
    probes = PROBES + MORE_PROBES if subject.thorough else PROBES
    points = [subject.probes.poses(n, base, spread) for n, base, spread in probes]
    if subject.thorough:
        poses = subject.probes.poses(4)
        ascending = poses.predictions.argsort().tolist()
        points += [poses[ascending], poses[ascending[::-1]]]
        if subject.combination.smooth:
            points += [poses[[0, *range(len(poses) - 1)]], poses.tied()]
    return points


def compare_weights(subject: Subject, points: list[Poses]) -> tuple[list[Comparison], str]:
    """Return the comparisons at some probes, and the likely cause if weights are wrong."""
    comparisons, known = [], []
    for poses, directions, numerical in _derivatives(subject, points):
        found = _compare(subject.weights, numerical, directions, poses, "pose")
        if subject.two_derivatives:
            unit = "autograd of combine, pose"
            found += _compare(subject.autograd_weights, numerical, directions, poses, unit)
        comparisons += found
        known.append((found, numerical))
    if not any(comparison.wrong for comparison in comparisons):
        return comparisons, ""
    return comparisons, _cause(subject, known)


def _compare(
    weights_of: Callable[[Poses], Tensor],
    fd: Estimate,
    directions: Tensor,
    poses: Poses,
    unit: str,
) -> list[Comparison]:
    weights_at = poses.fixed(weights_of)
    return compare(weights_at, fd, directions, poses.predictions, unit, poses.inputs)


def _derivatives(subject: Subject, points: list[Poses]) -> Iterator[tuple[Poses, Tensor, Estimate]]:
    """Yield poses with their directions, and the derivatives along these directions.

    Probes with equal numbers of poses are evaluated together.
    """
    groups: dict[int, list[Poses]] = {}
    for poses in points:
        groups.setdefault(len(poses), []).append(poses)
    directions = {n_poses: directions_for(subject, n_poses) for n_poses in groups}
    ladders = []
    for n_poses, group in groups.items():
        along = directions[n_poses]
        steps = torch.tensor([subject.probes.first_step(poses.predictions) for poses in group])
        ladders.append(
            climb(
                subject.values,
                torch.stack([poses.row() for poses in group]).repeat_interleave(len(along), dim=0),
                along.repeat(len(group), 1),
                steps.repeat_interleave(len(along)),
            )
        )
    sizes = [len(directions[n_poses]) for n_poses, group in groups.items() for _ in group]
    by_point = (column.split(sizes) for column in extrapolate(ladders))
    ordered = [poses for group in groups.values() for poses in group]
    for poses, derivatives, errors in zip(ordered, *by_point, strict=True):
        yield poses, directions[len(poses)], Estimate(derivatives, errors)


def _cause(subject: Subject, known: list[tuple[list[Comparison], Estimate]]) -> str:
    """Return the likely cause, from the probes at which all weights were compared."""
    if any(not math.isfinite(c.analytic) for comparisons, _ in known for c in comparisons):
        return NOT_FINITE
    if cause := kink_cause(subject, [c for comparisons, _ in known for c in comparisons]):
        return cause
    points = []
    for comparisons, numerical in known:
        poses = comparisons[0].poses
        if len(numerical.derivative) != len(poses):
            continue
        ours = [c for c in comparisons if c.unit == "pose"]
        if not any(c.wrong for c in comparisons if c.unit == "pose") and any(
            c.wrong for c in comparisons
        ):
            return (
                "autograd cannot differentiate all of combine (a part is detached, or does not use"
                " the predictions), but gradients='graph' needs this derivative"
            )
        found = torch.tensor([c.analytic for c in ours], dtype=torch.float64)
        tolerance = max(c.tolerance for c in ours)
        if math.isfinite(tolerance):
            wrong = any(c.wrong for c in ours)
            points.append(Point(poses, found, numerical.derivative, tolerance, wrong))
    return cause_in_weights(points, subject.weights, scales_of(subject.combination))


def scales_of(combination: Combination) -> dict[str, float]:
    """Return the arguments and attributes of a combination that are numbers, except 1 and 0."""
    found: dict[str, object] = dict(vars(combination)) | dict(constructor_arguments(combination))
    found |= {name: p.item() for name, p in combination.named_parameters() if p.numel() == 1}
    for name in dir(type(combination)):
        if not name.startswith("_"):
            found.setdefault(name, getattr(type(combination), name))
    return {
        name.lstrip("_"): float(value)
        for name, value in found.items()
        if isinstance(value, int | float)
        and not isinstance(value, bool)
        and name != "min_poses"
        and math.isfinite(value)
        and value not in (0, 1)
    }


# A loss of the combined prediction, shape (), and of the pose predictions, shape (n_poses,).
Loss = Callable[[Tensor, Tensor], Tensor]


@check("C2", "a whole model trains correctly with it")
def end_to_end(subject: Subject) -> Metrics:
    """Compare the gradients of a small network with nonlinear losses, for each parameter.

    The modes are stored gradients and, if the combination has ``combine``, autograd. One loss uses
    only the combined prediction. The other also uses the predictions of the poses.
    """
    poses = subject.probes.poses(4, 0.0, 0.5)
    features = torch.cat([subject.probes.randn(len(poses), 2), poses.predictions[:, None]], dim=1)
    network = _Network(subject, poses.predictions)
    names = [name for name, _ in network.named_parameters()]
    theta = torch.cat([p.detach().flatten() for p in network.parameters()])
    directions = _by_parameter(subject, network)
    comparisons: list[Comparison] = []
    wrong: dict[str, list[str]] = {}
    fd = directional_derivatives(
        partial(_losses, subject, network, poses, features),
        theta.repeat(len(directions), 1),
        directions,
        torch.full((len(directions),), LARGEST_STEP),
    )
    of_poses = directions @ _gradient_of_loss_of_poses(network, features)
    both = Estimate(fd.derivative + of_poses, fd.error)
    losses: tuple[tuple[Loss, str, Estimate], ...] = (
        (_loss_of_prediction, "", fd),
        (_loss_of_both, BOTH, both),
    )
    for (loss, of_what, numerical), mode in itertools.product(losses, _modes(subject)):
        gradient_at = partial(_gradient, subject, network, poses, features, loss, mode)
        found = compare(gradient_at, numerical, directions, theta, "")
        for comparison, name in zip(found, names, strict=True):
            unit = f"gradients={mode!r}{of_what}, a random direction of parameter {name!r}"
            comparisons.append(replace(comparison, unit=unit, of_predictions=False))
        wrong.setdefault(of_what, []).extend(
            name for c, name in zip(found, names, strict=True) if c.wrong
        )
    return judge(comparisons, _cause_in_a_model(subject, poses, wrong[""], wrong[BOTH]))


BOTH = ", a loss of the combined prediction and of the pose predictions"


def _modes(subject: Subject) -> list[str]:
    return ["stored", "graph"] if overrides(type(subject.combination), "combine") else ["stored"]


def _cause_in_a_model(
    subject: Subject, poses: Poses, wrong: list[str], wrong_with_both: list[str]
) -> str:
    if not (wrong or wrong_with_both):
        return ""
    if at_kink(subject, poses):
        return KINK
    if wrong:
        return f"the gradient of {_listed(wrong)} is off"
    return (
        f"the gradient of {_listed(wrong_with_both)} is off, but only if the loss also uses the"
        " pose predictions: does a hook change their gradient?"
    )


def _listed(names: list[str]) -> str:
    return ", ".join(dict.fromkeys(names))


class _Network(torch.nn.Module):
    """A network that predicts m_i + size · tanh(…) for a pose with two features and a mean m_i."""

    def __init__(self, subject: Subject, means: Tensor) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1), torch.nn.Tanh()
        ).double()
        for param in self.parameters():
            param.data.copy_(torch.round(subject.probes.randn(*param.shape) * 2**10) / 2**10)
        # Predictions must stay in the domain. If the value has kinks, the order of poses must not
        # change.
        room = (
            subject.probes.first_step(means)
            if subject.bounded or not subject.combination.smooth
            else 1
        )
        self.size = min(0.5, room / 2)

    def forward(self, pose: Tensor) -> Tensor:
        return pose[..., -1] + self.size * self.net(pose[..., :-1])[..., 0]


def _losses(
    subject: Subject,
    network: _Network,
    poses: Poses,
    features: Tensor,
    thetas: Tensor,
) -> Tensor:
    shapes = {name: p.shape for name, p in network.named_parameters()}

    def row(theta: Tensor) -> Tensor:
        parts = theta.split([shape.numel() for shape in shapes.values()])
        params = {n: part.view(s) for (n, s), part in zip(shapes.items(), parts, strict=True)}
        return poses.at(torch.func.functional_call(network, params, (features,))).row()

    with torch.no_grad():
        rows = torch.func.vmap(row)(thetas)
    return _loss_of_prediction(subject.values(rows))


def _loss_of_prediction(value: Tensor, predictions: Tensor | None = None) -> Tensor:
    return -3.7 * value + 0.5 * value.square()


def _loss_of_poses(predictions: Tensor) -> Tensor:
    of_pose = torch.linspace(0.5, -1.0, len(predictions), dtype=predictions.dtype)
    return (predictions - 0.6).square() @ of_pose


def _loss_of_both(value: Tensor, predictions: Tensor) -> Tensor:
    return _loss_of_prediction(value) + _loss_of_poses(predictions)


def _gradient_of_loss_of_poses(network: _Network, features: Tensor) -> Tensor:
    # The combination has no part in it, so that autograd is right.
    gradients = torch.autograd.grad(_loss_of_poses(network(features)), list(network.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])


def _gradient(
    subject: Subject,
    network: _Network,
    poses: Poses,
    features: Tensor,
    loss: Loss,
    mode: str,
    theta: Tensor,
) -> Tensor:
    params = list(network.parameters())
    torch.nn.utils.vector_to_parameters(theta, params)
    value = loss(*_outputs(subject, network, features, poses, mode))
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, params)])


def _outputs(
    subject: Subject, pose_model: torch.nn.Module, features: Tensor, poses: Poses, mode: str
) -> MultiPoseOutput:
    model = MultiPoseModel(pose_model, subject.combination, gradients=mode)  # type: ignore[arg-type]
    with subject.restored_state():
        return model(list(features), pose_inputs=poses.copied_inputs())


def _by_parameter(subject: Subject, network: _Network) -> Tensor:
    """Return one random direction within each parameter, shape (n_params, n_entries)."""
    blocks = [subject.probes.randn(1, p.numel()).sign() for p in network.parameters()]
    return torch.block_diag(*blocks)


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
        more, cause = compare_weights(subject, _probes(subject)[:6])
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
    return [
        subject.probes.poses(9, 0.0, 0.3),
        subject.probes.poses(20, 0.0, 0.3),
        subject.probes.poses(130, 0.0, 0.02),
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
            param = subject.combination.get_parameter(name)
            directions = directions_for(subject, param.numel())[:n_directions]
            fd = _derivatives_of_parameter(subject, name, poses, directions, eps)
            gradient_at = partial(subject.gradient_of_parameter, name)
            comparisons += _compare(gradient_at, fd, directions, poses, f"{name!r}, entry")
    return comparisons


def _derivatives_of_parameter(
    subject: Subject,
    name: str,
    poses: Poses,
    directions: Tensor,
    eps: float = FLOAT64,
    function: Callable[[Tensor], Tensor] = lambda values: values,
) -> Estimate:
    """Return the derivatives of a function of the value with respect to an own parameter."""
    param = subject.combination.get_parameter(name)
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
        directions = directions_for(subject, subject.combination.get_parameter(name).numel())[:1]
        fd = _derivatives_of_parameter(
            subject,
            name,
            poses,
            directions,
            function=_loss_of_prediction,  # the rest does not depend on this parameter
        )
        for mode in _modes(subject):
            gradient_of = partial(_gradient_in_a_model, subject, name, mode)
            unit = f"{name!r}, gradients={mode!r}{BOTH}, entry"
            comparisons += _compare(gradient_of, fd, directions, poses, unit)
    return comparisons


def _gradient_in_a_model(subject: Subject, name: str, mode: str, poses: Poses) -> Tensor:
    """Return the flattened gradient of an own parameter, as an optimizer sees it."""
    param = subject.combination.get_parameter(name)
    param.grad = None
    _loss_of_both(*_outputs(subject, _Factor(), poses.predictions, poses, mode)).backward()
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


def directions_for(subject: Subject, n: int) -> Tensor:
    """Return all axes for few inputs, else two random directions: shape (n_directions, n)."""
    if n <= (6 if subject.thorough else 4):
        return torch.eye(n, dtype=torch.float64)
    # The entries are ±1/2 and ±1, so that steps along the directions are exact.
    return subject.probes.randn(2, n).sign() * (3 + subject.probes.randn(2, n).sign()) / 4


def step_table(subject: Subject, comparison: Comparison) -> str:
    """Return a table of step sizes and |central difference - weight|, as text."""
    first_step = subject.probes.first_step(comparison.predictions)
    steps, differences = central_differences(
        subject.values, comparison.poses.row(), comparison.direction, first_step
    )
    errors = (differences - comparison.analytic).abs()
    columns = [(f"{steps[k]:.0e}", f"{errors[k]:.0e}") for k in range(0, len(steps), 4)]
    rows = ("  ".join(column) for column in zip(*columns, strict=True))
    names = ("step size", "|error|  ")
    return "\n".join(f"    {name}  {row}" for name, row in zip(names, rows, strict=True))
