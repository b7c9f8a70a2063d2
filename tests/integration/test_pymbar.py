"""The smooth minimum of the plugins and its errors against exponential averaging in pymbar."""

from __future__ import annotations

import math

import pytest
import torch

from mtenn_core import effective_poses, jackknife_error, propagated_error, registry

pytest.importorskip("pymbar", reason="tox's environment integration installs pymbar")
from pymbar.other_estimators import exp

KT = 0.593
N_POSES = 500
# Sums of 500 float64 numbers in another order.
EXACT = {"rel": 1e-10}


@pytest.fixture
def y():
    return -7 + 0.5 * KT * torch.randn(N_POSES, dtype=torch.float64)


@pytest.fixture
def minimum():
    return registry.create("min", pred_scale=1 / KT, normalize=True)


@pytest.fixture
def expected(y):
    return exp((y / KT).numpy())


def test_the_normalized_minimum_is_exponential_averaging(y, minimum, expected):
    assert minimum.combine(y).item() == pytest.approx(KT * expected["Delta_f"], **EXACT)


def test_its_error_comes_from_the_effective_poses(y, minimum, expected):
    n = effective_poses(minimum.pose_weights(y)).item()
    assert KT * math.sqrt(1 / n - 1 / N_POSES) == pytest.approx(KT * expected["dDelta_f"], **EXACT)


def test_its_error_is_a_propagated_error(y, minimum, expected):
    """It is that of samples of size kT whose mean is known."""
    centred = KT**2 * (torch.eye(N_POSES, dtype=torch.float64) - 1 / N_POSES)
    found = propagated_error(minimum.pose_weights(y), centred)
    assert found.item() == pytest.approx(KT * expected["dDelta_f"], **EXACT)


def test_its_error_is_the_jackknife_for_many_poses(y, minimum, expected):
    weights = minimum.pose_weights(y)
    # tests/test_uncertainty.py derives this tolerance.
    tolerance = weights.max().item() + 1 / N_POSES
    assert tolerance < 0.03
    found = jackknife_error(minimum, y).item()
    assert found == pytest.approx(KT * expected["dDelta_f"], rel=tolerance)


def test_its_error_is_zero_in_both_ways_for_equal_poses(minimum):
    y = torch.full((N_POSES,), -7.0, dtype=torch.float64)
    assert exp((y / KT).numpy())["dDelta_f"] == pytest.approx(0.0, abs=1e-12)
    assert jackknife_error(minimum, y).item() == pytest.approx(0.0, abs=1e-12)
