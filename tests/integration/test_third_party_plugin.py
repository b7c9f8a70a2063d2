"""Somebody else's package, with the class of the field's guide, from pip install to uninstall."""

import json
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

GUIDE = Path(__file__).parents[2] / "benchmarks" / "guide.py"
NAME = "mtenn-guide-for-tests"
PYPROJECT = f"""
    [build-system]
    requires = ["hatchling"]
    build-backend = "hatchling.build"

    [project]
    name = "{NAME}"
    version = "1.2.3"
    requires-python = ">=3.11"
    dependencies = ["mtenn-core>=0.1,<0.2", "torch"]

    [project.entry-points."mtenn.combinations"]
    guide-lse = "guide_lse:GuideCombination"

    [tool.hatch.build.targets.wheel]
    include = ["guide_lse.py"]
"""
TRAIN = """
    import torch
    from mtenn_core import MultiPoseModel, registry

    torch.manual_seed(0)
    poses, target = torch.randn(20, 5, 4), torch.randn(20)
    layers = torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)
    pose_model = torch.nn.Sequential(*layers)
    model = MultiPoseModel(pose_model, "guide-lse", gradients="stored")
    assert type(model.combination) is registry.get("guide_lse")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for epoch in range(15):
        optimizer.zero_grad()
        total = 0.0
        for compound, y in zip(poses, target):
            out = model(compound)
            loss = (out.prediction - y) ** 2 / len(poses)
            loss.backward()
            total += loss.item()
        optimizer.step()
        losses.append(total)
    last = torch.cat([pose_model(pose) for pose in poses[0]])
    torch.testing.assert_close(model(poses[0]).prediction, torch.logsumexp(last, 0))
    print(losses[0], losses[-1])
"""


@pytest.fixture
def run(tmp_path):
    """Run python elsewhere: in the repository's root it would import the source tree."""

    def run(*command, expect=0):
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == expect, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture
def mtenn(run):
    return lambda *args, **kwargs: run("-m", "mtenn_core", *args, **kwargs)


@pytest.fixture
def package(tmp_path, run):
    """A distribution of its own, outside of this repository."""
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "pyproject.toml").write_text(dedent(PYPROJECT))
    (folder / "guide_lse.py").write_text(GUIDE.read_text())
    yield folder
    run("-m", "pip", "uninstall", "-q", "-y", NAME)


def test_it_is_installed_listed_validated_trained_with_and_uninstalled(package, run, mtenn):
    assert "guide-lse" not in mtenn("list")

    # Requirements are resolved, and met by what is installed: nothing is fetched.
    run("-m", "pip", "install", "-q", "--no-build-isolation", str(package))
    (record,) = [r for r in json.loads(mtenn("list", "--json")) if r["name"] == "guide-lse"]
    assert (record["distribution"], record["version"]) == (NAME, "1.2.3")
    assert record["target"] == "guide_lse:GuideCombination"

    assert "passed" in mtenn("check", "guide-lse", "--level", "gate")
    # As the guide has it, a second derivative is silently a part of the Hessian.
    assert "A10" in mtenn("check", "guide-lse", expect=1)

    first, last = map(float, run("-c", dedent(TRAIN)).split())
    assert last < first / 2

    run("-m", "pip", "uninstall", "-q", "-y", NAME)
    assert "guide-lse" not in mtenn("list")
    assert (
        "unknown combination"
        in json.loads(mtenn("check", "guide-lse", "--json", expect=1))[0]["error"]["message"]
    )
