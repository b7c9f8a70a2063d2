"""Fixtures of all tests: a small model in float64, poses, and plugins made on the fly."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from installed import Places, write_distribution

from mtenn_core import registry

# Tests write modules, and write them again within the second that bytecode is told apart by.
sys.dont_write_bytecode = True


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
    before = set(sys.modules)

    def install(
        distribution: str, entry_points: dict[str, str], module: str = "", requires: str = ""
    ) -> Path:
        write_distribution(tmp_path, distribution, entry_points, module, requires=requires)
        return tmp_path / f"{distribution.replace('-', '_')}.py"

    yield install
    forget_modules_in(tmp_path, before)


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Two folders on the path, with a healthy plugin in one."""
    monkeypatch.setattr(sys, "path", sys.path.copy())
    before = set(sys.modules)
    found = Places(tmp_path / "site", tmp_path / "front")
    for folder in (found.site, found.front):
        folder.mkdir()
        sys.path.insert(0, str(folder))
    write_distribution(found.site, "demo-healthy", {"healthy": "demo_healthy:Good"})
    yield found
    forget_modules_in(tmp_path, before)


def forget_modules_in(folder: Path, before: set[str]) -> None:
    """Let the next import of a module in ``folder`` run it again, and the next query scan again."""
    registry.refresh()
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(folder)):
            del sys.modules[name]
