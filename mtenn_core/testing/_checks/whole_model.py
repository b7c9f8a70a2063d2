"""C2: the gradients of a whole model, a small network with the combination."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from mtenn_core._engine.declarations import overrides
from mtenn_core._engine.stored import MOST_COLUMNS
from mtenn_core.model import MultiPoseModel, MultiPoseOutput
from mtenn_core.testing._checks.check import check
from mtenn_core.testing._outcomes import Metrics
from mtenn_core.testing._probe.comparison import Comparison, compare, judge
from mtenn_core.testing._probe.finite_differences import (
    Estimate,
    directional_derivatives,
)
from mtenn_core.testing._probe.kinks import KINK, at_kink
from mtenn_core.testing._probe.one_number import as_written, times
from mtenn_core.testing._probe.poses import Poses
from mtenn_core.testing._probe.probes import LARGEST_STEP
from mtenn_core.testing._probe.subject import Subject

N_FEATURES = 2
# "stored" takes at most so many numbers for each pose.
# A loss of the combined prediction, shape (), and of the pose predictions, shape (n_poses,).
Loss = Callable[[Tensor, Tensor], Tensor]


@check("C2", "a whole model trains correctly with it")
def end_to_end(subject: Subject) -> Metrics:
    """Compare the gradients of a small network with nonlinear losses, for each parameter.

    The modes are stored gradients and, if the combination has ``combine``, autograd. One loss uses
    only the combined prediction. The other also uses the predictions of the poses.
    """
    poses = subject.probes.poses(4, 0.0, 0.5)
    means = poses.predictions.view(len(poses), -1)
    features = torch.cat([subject.probes.randn(len(poses), N_FEATURES), means], dim=1)
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
        (loss_of_prediction, "", fd),
        (loss_of_both, BOTH, both),
    )
    for (loss, of_what, numerical), mode in itertools.product(losses, modes_of(subject)):
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


def modes_of(subject: Subject) -> list[str]:
    first = "stored" if subject.probes.shape(1)[-1] <= MOST_COLUMNS else "recomputed"
    return [first, "graph"] if overrides(type(subject.combination), "combine") else [first]


def _cause_in_a_model(
    subject: Subject, poses: Poses, wrong: list[str], wrong_with_both: list[str]
) -> str:
    if not (wrong or wrong_with_both):
        return ""
    if at_kink(subject, poses):
        return KINK
    if wrong:
        return f"the gradient of {_listed(wrong)} is wrong"
    return (
        f"the gradient of {_listed(wrong_with_both)} is wrong, but only if the loss also uses the"
        " pose predictions: does a hook change their gradient?"
    )


def _listed(names: list[str]) -> str:
    return ", ".join(dict.fromkeys(names))


class _Network(torch.nn.Module):
    """A network that predicts m_i + size · tanh(…) for a pose with two features and a mean m_i.

    With columns, m_i and the prediction have one entry for each column.
    """

    def __init__(self, subject: Subject, means: Tensor) -> None:
        super().__init__()
        self.shape = means.shape[1:]
        n_columns = self.shape.numel()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(N_FEATURES, 3),
            torch.nn.Tanh(),
            torch.nn.Linear(3, n_columns),
            torch.nn.Tanh(),
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
        numbers, features = pose[..., N_FEATURES:], pose[..., :N_FEATURES]
        return (numbers + self.size * self.net(features)).view(pose.shape[:-1] + self.shape)


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
    return loss_of_prediction(subject.values(rows))


def loss_of_prediction(value: Tensor, predictions: Tensor | None = None) -> Tensor:
    return -3.7 * value + 0.5 * value.square()


def _loss_of_poses(predictions: Tensor) -> Tensor:
    factors = torch.linspace(0.5, -1.0, predictions.numel(), dtype=predictions.dtype)
    return (predictions.flatten() - 0.6).square() @ factors


def loss_of_both(value: Tensor, predictions: Tensor) -> Tensor:
    return loss_of_prediction(value) + _loss_of_poses(predictions)


def _gradient_of_loss_of_poses(network: _Network, features: Tensor) -> Tensor:
    # This loss does not use the combination, so the gradient of autograd is right.
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
    with as_written(subject.combination):
        value = loss(*outputs_of(subject, network, features, poses, mode))
        gradients = torch.autograd.grad(value, params)
    return torch.cat([gradient.flatten() for gradient in gradients])


def outputs_of(
    subject: Subject, pose_model: torch.nn.Module, features: Tensor, poses: Poses, mode: str
) -> MultiPoseOutput:
    model = MultiPoseModel(pose_model, subject.combination, gradients=mode)  # type: ignore[arg-type]
    with subject.restored_state():
        out = model(list(features), pose_inputs=poses.copied_inputs())
    return out._replace(prediction=times(out.prediction, subject.factors or []))


def _by_parameter(subject: Subject, network: _Network) -> Tensor:
    """Return one random direction within each parameter, shape (n_params, n_entries)."""
    blocks = [subject.probes.randn(1, p.numel()).sign() for p in network.parameters()]
    return torch.block_diag(*blocks)
