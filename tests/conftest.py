"""Fixtures of all tests: a small model in float64, poses, and plugins made on the fly."""

from __future__ import annotations

import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def pose_model():
    """Maps a pose of 4 numbers to one number."""
    return torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
    ).double()


@pytest.fixture
def poses():
    return torch.randn(7, 4, dtype=torch.float64)


@pytest.fixture
def install_plugin(tmp_path, monkeypatch):
    """Write a distribution, its metadata and its module, into a folder on the path."""
    monkeypatch.syspath_prepend(tmp_path)
    made = []

    def install(
        distribution: str, entry_points: dict[str, str], module: str = "", requires: str = ""
    ) -> Path:
        name = distribution.replace("-", "_")
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        requirement = f"Requires-Dist: {requires}\n" if requires else ""
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n{requirement}"
        )
        lines = [f"{key} = {value}" for key, value in entry_points.items()]
        (info / "entry_points.txt").write_text("\n".join(["[mtenn.combinations]", *lines, ""]))
        path = tmp_path / f"{name}.py"
        path.write_text(dedent(module))
        made.append(name)
        return path

    yield install
    for name in made:
        sys.modules.pop(name, None)
