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


def curves(make: Callable[[], Subject]) -> dict[str, Any]:
    """Return the numbers for the plots of a combination.

    Parameters
    ----------
    make : returns a new subject

    Returns
    -------
    ``weights``: pose weights from backward and from finite differences, for several spreads;
    ``steps``: |central difference - weight from backward| for each step size, for one pose;
    ``scan``: the value and the weight of one pose while its prediction changes, the others fixed.
    With columns, each number of a pose counts as one of n_poses · n_columns poses.
    The result is empty if the combination raises an error
    """
    try:
        subject = make()
        points = [subject.probes.poses(3, 0.0, spread) for spread in SPREADS]
        return {
            "weights": [_weights(subject, poses) for poses in points],
            # Use the smallest spread. With a large one, a sharp combination has weights of 0 or 1.
            "steps": _steps(subject, points[-1]),
            "scan": _scan(subject, points[0]),
        }
    except KeyboardInterrupt:
        raise
    except BaseException:  # the records contain the error
        return {}


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
    }


def _steps(subject: Subject, poses: Poses) -> dict[str, Any]:
    y, weights = poses.predictions.flatten(), subject.weights(poses).flatten()
    pose = int(weights.abs().argmax())
    axis = torch.eye(len(y), dtype=y.dtype)[pose]
    first_step = subject.probes.first_step(y)
    steps, differences = central_differences(subject.values, poses.row(), axis, first_step)
    return {
        "predictions": y.tolist(),
        "pose": pose,
        "step": steps.tolist(),
        "error": (differences - weights[pose]).abs().tolist(),
    }


def _scan(subject: Subject, poses: Poses) -> dict[str, Any]:
    y = poses.predictions.flatten()
    low, high = subject.combination.domain
    margin = 1.5 * float(y.max() - y.min() + 1)
    low, high = max(low, float(y.min()) - margin), min(high, float(y.max()) + margin)
    # The ends do not belong to the domain.
    along = torch.linspace(low, high, N_SCANNED + 2, dtype=y.dtype)[1:-1]
    shape = poses.predictions.shape
    points = [poses.at(torch.cat([moved[None], y[1:]]).view(shape)) for moved in along]
    return {
        "predictions": y.tolist(),
        "pose": 0,
        "prediction": along.tolist(),
        "value": subject.values(torch.stack([point.row() for point in points])).tolist(),
        "backward": [
            float(subject.weights(point).flatten()[0]) for point in points[::SCANNED_PER_WEIGHT]
        ],
        "backward_at": along[::SCANNED_PER_WEIGHT].tolist(),
    }
