"""Somebody else's package, with the class of the field's guide, from pip install to uninstall."""

import json
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
USE = """
    import json
    import torch
    from click.testing import CliRunner
    from mtenn_core import MultiPoseModel, registry
    from mtenn_core._cli import main

    def mtenn(*command):
        done = CliRunner().invoke(main, [*command, "--json"])
        return done.exit_code, json.loads(done.stdout)

    def not_passed(code, reports):
        (report,) = reports
        statuses = {r["id"]: r["status"] for r in report["records"]}
        return code, {id: s for id, s in statuses.items() if s not in ("pass", "skip")}

    found = {"list": mtenn("list")[1]}
    found["gate"] = not_passed(*mtenn("check", "guide-lse", "--level", "gate"))
    found["check"] = not_passed(*mtenn("check", "guide-lse"))

    torch.manual_seed(0)
    poses, target = torch.randn(20, 5, 4), torch.randn(20)
    layers = torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)
    pose_model = torch.nn.Sequential(*layers)
    model = MultiPoseModel(pose_model, "guide-lse", gradients="stored")
    assert type(model.combination) is registry.get("guide_lse")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    found["losses"] = []
    for epoch in range(15):
        optimizer.zero_grad()
        total = 0.0
        for compound, y in zip(poses, target):
            out = model(compound)
            loss = (out.prediction - y) ** 2 / len(poses)
            loss.backward()
            total += loss.item()
        optimizer.step()
        found["losses"].append(total)
    last = torch.cat([pose_model(pose) for pose in poses[0]])
    torch.testing.assert_close(model(poses[0]).prediction, torch.logsumexp(last, 0))
    print(json.dumps(found))
"""


@pytest.fixture
def package(tmp_path):
    """A distribution of its own, outside of this repository."""
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "pyproject.toml").write_text(dedent(PYPROJECT))
    (folder / "guide_lse.py").write_text(GUIDE.read_text())
    return folder


def test_it_is_installed_listed_validated_trained_with_and_uninstalled(package, run, pip):
    # Requirements are resolved, and met by what is installed: nothing is fetched.
    pip("install", "-q", "--no-build-isolation", str(package))
    found = json.loads(run("-c", dedent(USE)))

    (record,) = [r for r in found["list"] if r["name"] == "guide-lse"]
    assert (record["distribution"], record["version"]) == (NAME, "1.2.3")
    assert record["target"] == "guide_lse:GuideCombination"
    assert found["gate"] == [0, {}]
    # As the guide has it, a second derivative is silently a part of the Hessian.
    assert found["check"] == [0, {"D4": "advice", "A10": "advice"}]
    first, *_, last = found["losses"]
    assert last < first / 2

    pip("uninstall", "-q", "-y", NAME)
    records = json.loads(run("-m", "mtenn_core", "list", "--json"))
    assert "guide-lse" not in [record["name"] for record in records]
    (missing,) = json.loads(run("-m", "mtenn_core", "check", "guide-lse", "--json", expect=1))
    assert "unknown combination" in missing["error"]["message"]
