"""C4: derivatives with respect to pose inputs, which another network may have predicted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from mtenn_core._engine.declarations import overrides
from mtenn_core._engine.evaluation import PoseInputs, combined_prediction
from mtenn_core._engine.stored import MOST_COLUMNS
from mtenn_core.testing._checks.check import check
from mtenn_core.testing._checks.derivatives import directions_for
from mtenn_core.testing._checks.many_poses import has_pairs_of_poses, loops_over_poses
from mtenn_core.testing._checks.numbers_of_columns import again_with_more_columns
from mtenn_core.testing._checks.whole_model import outputs_of
from mtenn_core.testing._outcomes import Metrics, Skip
from mtenn_core.testing._probe.comparison import Comparison, compare, judge
from mtenn_core.testing._probe.finite_differences import Estimate, climb, extrapolate
from mtenn_core.testing._probe.poses import Poses
from mtenn_core.testing._probe.probes import GRID
from mtenn_core.testing._probe.subject import Subject
from mtenn_core.testing._probe.training_step import Step

# Each row is (poses, base, spread). The spread is also that of the pose inputs.
PROBES = ((3, 0.0, 0.5), (3, -8.0, 1e-3))
MORE_PROBES = (
    (3, 0.0, 1.0),
    (3, 0.0, 0.05),
    (1, 0.0, 1.0),
    (2, 0.0, 1.0),
    (3, 0.0, 30.0),
    (4, -8.0, 2.0),
    (6, 0.0, 0.3),
    (7, 7.0, 1.0),
    (33, 0.0, 0.3),
    # Pose inputs in other units, such as kJ/mol, and predictions of one sign.
    (3, 0.0, 1e2),
    (3, 0.0, 1e4),
    (3, -30.0, 8.0),
    (3, 100.0, 10.0),
)
# Some mistakes show only above a certain number of poses. A loop in Python is slow for hundreds.
MANY_POSES, MOST_IN_A_LOOP = 300, 65
# Gradient of the loss. With 1, a backward that ignores it would not show.
GO = -3.7

MODES_OF_COMBINE = ("graph", "stored", "recomputed")

# The combined prediction, from poses and from the pose inputs with their graphs.
Value = Callable[[Poses, PoseInputs], Tensor]


class _Found(NamedTuple):
    """The comparisons of one pose input at one probe, in one mode."""

    name: str
    mode: str
    comparisons: list[Comparison]


@check("C4", "pose inputs have a correct derivative, or an error", "gate")
@again_with_more_columns
def input_derivatives(subject: Subject) -> Metrics:
    """Compare the derivatives with respect to each pose input that is no label.

    A pose input may be learned. Then training needs this derivative in each mode, and a missing one
    is silent. Thorough checks use more poses, and also a whole model in each mode.
    """
    names = subject.probes.real_inputs()
    if not names:
        raise Skip("it has no pose inputs, or all of them are labels")
    probes = PROBES + MORE_PROBES if subject.thorough else PROBES
    points = [_on_grid(subject.probes.poses(*probe)) for probe in probes]
    if subject.thorough:
        points.append(_on_grid(subject.probes.poses(_many_poses(subject), 0.0, 0.3)))
    found, refused = [], set()
    for name, poses, directions, numerical in _estimates(subject, points, names):
        for mode, value in _modes(subject).items():
            try:
                comparisons = _compare(subject, name, poses, directions, numerical, mode, value)
            except Exception:  # the value needed no error, so it is for the learned input
                refused.add(name)
                continue
            found.append(_Found(name, mode, comparisons))
    everything = [c for each in found for c in each.comparisons]
    metrics = judge(_decisive(everything), _cause(subject, found))
    return metrics | ({"refused with a graph": sorted(refused)} if refused else {})


def _many_poses(subject: Subject) -> int:
    is_slow = loops_over_poses(subject) or has_pairs_of_poses(subject)
    return MOST_IN_A_LOOP if is_slow else MANY_POSES


def _on_grid(poses: Poses) -> Poses:
    """Return poses whose numbers ± steps are exact."""
    return poses.map(lambda numbers: torch.round(numbers * GRID) / GRID)


def _estimates(
    subject: Subject, points: list[Poses], names: list[str]
) -> Iterator[tuple[str, Poses, Tensor, Estimate]]:
    """Yield each pose input at each probe, with directions and the derivatives along them."""
    cases, ladders = [], []
    for n_poses in dict.fromkeys(map(len, points)):
        group = [poses for poses in points if len(poses) == n_poses]
        along = directions_for(subject, n_poses)[: 1 if n_poses >= MOST_IN_A_LOOP else None]
        own = [(name, poses) for name in names for poses in group]
        steps = torch.tensor([_first_step(subject, *case) for case in own])
        ladders.append(
            climb(
                subject.values,
                torch.stack([poses.row() for _, poses in own]).repeat_interleave(len(along), dim=0),
                torch.cat([_moving(name, poses, along) for name, poses in own]),
                steps.repeat_interleave(len(along)),
            )
        )
        cases += [(name, poses, along) for name, poses in own]
    sizes = [len(along) for *_, along in cases]
    by_case = (column.split(sizes) for column in extrapolate(ladders))
    for case, derivatives, errors in zip(cases, *by_case, strict=True):
        yield *case, Estimate(derivatives, errors)


def _first_step(subject: Subject, name: str, poses: Poses) -> float:
    step = subject.probes.first_step_of_input(name, poses.inputs[name])
    if subject.combination.smooth:
        return step
    return min(step, subject.probes.first_step(poses.predictions))


def _moving(name: str, poses: Poses, directions: Tensor) -> Tensor:
    """Return directions in which only one pose input of a row moves, see :meth:`Poses.row`."""
    parts = {
        other: directions.new_zeros(len(directions), numbers.numel())
        for other, numbers in poses.named().items()
    }
    return torch.cat([*(parts | {name: directions}).values()], dim=1)


def _modes(subject: Subject) -> dict[str, Value]:
    """Return, for each mode with a derivative of its own, the combined prediction in that mode."""
    combination = subject.combination
    modes: dict[str, Value] = {}
    if overrides(type(combination), "combine"):
        modes["graph"] = lambda poses, inputs: combined_prediction(
            combination, poses.predictions, inputs, closed_form=False
        )
    if subject.full_depth:
        modes["stored"] = lambda poses, inputs: subject.call(
            Step(poses, {}, {}), pose_inputs=inputs
        )
    elif overrides(type(combination), "pose_weights"):
        modes["stored"] = lambda poses, inputs: combined_prediction(
            combination, poses.predictions, inputs
        )
    if subject.thorough:
        in_model: tuple[str, ...] = MODES_OF_COMBINE if "graph" in modes else ("stored",)
        if subject.probes.shape(1)[-1] > MOST_COLUMNS:
            in_model = tuple(mode for mode in in_model if mode != "stored")
        modes |= {f"{mode} in a model": _in_a_model(subject, mode) for mode in in_model}
    return modes


def _in_a_model(subject: Subject, mode: str) -> Value:
    def value(poses: Poses, inputs: PoseInputs) -> Tensor:
        features = poses.predictions.detach()
        given = replace(poses, inputs=inputs)
        return outputs_of(subject, _Factor(), features, given, mode).prediction

    return value


class _Factor(torch.nn.Module):
    """A pose model that returns the pose, which is a number, times a factor of 1."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, pose: Tensor) -> Tensor:
        return pose * self.factor


def _compare(
    subject: Subject,
    name: str,
    poses: Poses,
    directions: Tensor,
    numerical: Estimate,
    mode: str,
    value: Value,
) -> list[Comparison]:
    def gradient_at(numbers: Tensor) -> Tensor:
        with subject.restored_state(), torch.inference_mode(False), torch.enable_grad():
            y = poses.predictions.detach().clone().requires_grad_()
            leaf = numbers.detach().clone().requires_grad_()
            # With y and the leaf, a change in place would raise an error. A4 reports such a change.
            inputs = poses.copied_inputs() | {name: leaf.clone()}
            found = value(poses.at(y.clone()), inputs)
            if not found.requires_grad:
                return torch.zeros_like(leaf)
            (gradient,) = torch.autograd.grad(GO * found, leaf, materialize_grads=True)
            return gradient / GO

    unit = f"pose input {name!r}, gradients={mode!r}, pose"
    numbers = poses.inputs[name]
    found = compare(gradient_at, numerical, directions, numbers, unit, poses.inputs)
    return [replace(each, predictions=poses.predictions) for each in found]


def _decisive(comparisons: list[Comparison]) -> list[Comparison]:
    """Return the comparisons that decide; all if none of them does.

    The value need not depend on an input at every probe, as that of a selection by a score. Then
    both numbers are 0, and a relative error says nothing.
    """
    decisive = [c for c in comparisons if c.conclusive or c.wrong]
    nonzero = [c for c in comparisons if c.analytic or abs(c.derivative) > 10 * c.error]
    return decisive or nonzero


def _cause(subject: Subject, found: list[_Found]) -> str:
    """Return the likely cause, from the first pose input with a wrong derivative."""
    wrong = [each for each in found if any(c.wrong for c in each.comparisons)]
    if not wrong:
        return ""
    name = wrong[0].name
    wrong = [each for each in wrong if each.name == name]
    of_name = {each.mode for each in found if each.name == name}
    modes = {each.mode for each in wrong}
    where = "" if modes == of_name else f", in {', '.join(sorted(modes))}"
    entries = [c for each in wrong for c in each.comparisons if c.wrong]
    derivative = f"the derivative with respect to {name!r} is"
    if all(c.analytic == 0 for c in entries):
        return f"{derivative} zero or None{where}: {_detached(subject)}"
    return f"{derivative} {_mistake(name, wrong, entries)}{where}"


def _detached(subject: Subject) -> str:
    if subject.full_depth:
        return (
            "pass it to `apply` of the autograd function as an argument of its own, and return its"
            " derivative from backward. If you want no learned input, raise an error in forward if"
            " it requires a gradient"
        )
    return (
        "combine detaches it, uses it under no_grad, or passes it to an autograd function that"
        " returns None for it. If you want no learned input, raise an error if it requires a"
        " gradient"
    )


def _mistake(name: str, wrong: list[_Found], entries: list[Comparison]) -> str:
    if not all(math.isfinite(c.analytic) for c in entries):
        return "not a finite number"
    probe = max(wrong, key=lambda each: len(each.comparisons))
    ours = torch.tensor([c.analytic for c in probe.comparisons])
    right = torch.tensor([c.derivative for c in probe.comparisons])
    numbers = probe.comparisons[0].inputs[name]
    scale = 1e-4 * float(right.abs().max())

    def is_ours(other: Tensor) -> bool:
        return torch.allclose(ours, other.to(ours), rtol=0, atol=scale)

    factor = float(ours @ right / (right @ right))
    # Any number is a multiple of one other number.
    if is_ours(factor * right) and (right.abs() > scale).sum() > 1:
        if math.isclose(factor * GO, 1.0, rel_tol=1e-4):
            return "wrong: backward does not multiply it by grad_output"
        return f"wrong by a constant factor of {factor:.6g}"
    if torch.allclose(ours.sort().values, right.sort().values, rtol=0, atol=scale):
        return "that of another pose"
    if len(right) == len(numbers) and is_ours(numbers * right):
        return f"that with respect to ln {name}"
    return "wrong"
