"""Compute the numbers in the plots of a report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mtenn_core.testing._probe.finite_differences import (
    central_differences,
    directional_derivatives,
)
from mtenn_core.testing._probe.poses import Poses
from mtenn_core.testing._probe.subject import Subject

SPREADS = (1.0, 0.01)
N_SCANNED, SCANNED_PER_WEIGHT = 41, 3
# More weights than these take too long, and cannot be told apart in a plot.
MANY = 40


def curves(make: Callable[[], Subject], failed: Poses | None = None) -> dict[str, Any]:
    """Return the numbers for the plots of a combination.

    Parameters
    ----------
    make : returns a new subject
    failed : poses with wrong weights, to plot them too; None if there are none

    Returns
    -------
    ``weights``: pose weights from backward and from finite differences, for several spreads;
    ``steps``: |central difference - weight from backward| for each step size, for one pose;
    ``scan``: the value and the weight of one pose while its prediction changes, the others fixed.
    With columns, each number of a pose has its own weight, step and scan.
    With ``failed``, ``weights`` ends with these poses, and the others show their worst weight.
    The result is empty if the combination raises an error
    """
    try:
        subject = make()
        points = [subject.probes.poses(3, 0.0, spread) for spread in SPREADS]
        weights = [_weights(subject, poses) for poses in points]
        # Use the smallest spread. With a large one, a sharp combination has weights of 0 or 1.
        entry = _largest(weights[-1]["backward"])
        steps, scan = (points[-1], entry), (points[0], 0)
        if failed is not None and failed.predictions.numel() <= MANY:
            weights.append(_weights(subject, failed) | {"failed": True})
            off = torch.tensor(weights[-1]["backward"]) - torch.tensor(
                weights[-1]["finite_difference"]
            )
            steps = scan = failed, _largest(off.nan_to_num(torch.inf).tolist())
        return {
            "weights": weights,
            "steps": _steps(subject, *steps),
            "scan": _scan(subject, *scan),
        }
    except KeyboardInterrupt:
        raise
    except BaseException:  # the records contain the error
        return {}


def _largest(numbers: list[float]) -> int:
    """Return the index of the number of largest size."""
    return int(torch.tensor(numbers).abs().argmax())


def _entry_name(poses: Poses, entry: int) -> str:
    """Return the pose of one entry of the predictions in words, and its column if it has one."""
    if poses.predictions.dim() == 1:
        return f"pose {entry}"
    pose, column = divmod(entry, poses.predictions.shape[1])
    name = f" ({poses.column_names[column]})" if poses.column_names else ""
    return f"pose {pose}, column {column}{name}"


def _weights(subject: Subject, poses: Poses) -> dict[str, Any]:
    y = poses.predictions.flatten()
    axes = torch.eye(len(y), dtype=y.dtype)
    steps = torch.full((len(y),), subject.probes.first_step(y))
    fd = directional_derivatives(subject.values, poses.row().expand(len(y), -1), axes, steps)
    return {
        "predictions": y.tolist(),
        "backward": subject.weights(poses).flatten().tolist(),
        "finite_difference": fd.derivative.tolist(),
        "error": fd.error.tolist(),
        "n_columns": poses.predictions.shape[1] if poses.predictions.dim() > 1 else None,
    }


def _steps(subject: Subject, poses: Poses, entry: int) -> dict[str, Any]:
    y, weights = poses.predictions.flatten(), subject.weights(poses).flatten()
    axis = torch.eye(len(y), dtype=y.dtype)[entry]
    first_step = subject.probes.first_step(y)
    steps, differences = central_differences(subject.values, poses.row(), axis, first_step)
    return {
        "predictions": y.tolist(),
        "entry": _entry_name(poses, entry),
        "step": steps.tolist(),
        "error": (differences - weights[entry]).abs().tolist(),
    }


def _scan(subject: Subject, poses: Poses, entry: int) -> dict[str, Any]:
    y = poses.predictions.flatten()
    low, high = subject.combination.domain
    margin = 1.5 * float(y.max() - y.min() + 1)
    low, high = max(low, float(y.min()) - margin), min(high, float(y.max()) + margin)
    # The ends do not belong to the domain.
    along = torch.linspace(low, high, N_SCANNED + 2, dtype=y.dtype)[1:-1]
    rows = y.expand(len(along), -1).clone()
    rows[:, entry] = along
    points = [poses.at(row.view_as(poses.predictions)) for row in rows]
    return {
        "predictions": y.tolist(),
        "entry": _entry_name(poses, entry),
        "prediction": along.tolist(),
        "value": subject.values(torch.stack([point.row() for point in points])).tolist(),
        "backward": [
            float(subject.weights(point).flatten()[entry]) for point in points[::SCANNED_PER_WEIGHT]
        ],
        "backward_at": along[::SCANNED_PER_WEIGHT].tolist(),
    }
