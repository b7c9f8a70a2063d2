"""The trimmed mean of the plugins against scipy."""

from __future__ import annotations

import pytest
import torch

from mtenn_core import registry

stats = pytest.importorskip(
    "scipy.stats", reason="tox's environment integration installs scipy", exc_type=ImportError
)


@pytest.mark.parametrize("proportion", [0.0, 0.1, 0.25, 0.29, 0.4, 0.49])
@pytest.mark.parametrize("n_poses", [1, 3, 10, 100])
def test_trimmed_means_are_those_of_scipy(proportion, n_poses):
    y = torch.randn(n_poses, dtype=torch.float64)
    value = registry.create("trimmed_mean", proportion=proportion).combine(y).item()
    # Sums of up to 100 numbers in another order.
    assert value == pytest.approx(stats.trim_mean(y.numpy(), proportion), rel=1e-12, abs=1e-13)
