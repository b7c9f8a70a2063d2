"""``mtenn new``: the package passes its own tox, then it is installed, checked and uninstalled."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mtenn_core._cli.new import MAX_LENGTH

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path):
    """Run python elsewhere: in the repository's root it would import the source tree."""

    def run(*command, cwd=tmp_path, env=None):
        done = subprocess.run(
            [sys.executable, "-m", *command],
            capture_output=True,
            encoding="utf-8",
            cwd=cwd,
            env=env,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture
def offers_the_core(tmp_path, run):
    """Return an environment where pip finds the core, which is on no index, and the pinned rest."""
    wheels = tmp_path / "wheels"
    run("pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(wheels), str(ROOT))
    # Those of the tox that runs this test would tell the other tox where to work.
    env = {key: value for key, value in os.environ.items() if not key.startswith("TOX_")}
    others = env.get("PIP_FIND_LINKS", "").split()
    return env | {
        "PIP_FIND_LINKS": " ".join([wheels.as_uri(), *others]),
        "PIP_CONSTRAINT": str(ROOT / "constraints.txt"),
    }


@pytest.fixture
def package(tmp_path, run):
    """What ``mtenn new my-rule`` has written."""
    run("mtenn_core", "new", "my-rule")
    folder = tmp_path / "mtenn-my-rule"
    yield folder
    run("pip", "uninstall", "-q", "-y", "mtenn-my-rule")
    shutil.rmtree(folder / ".tox", ignore_errors=True)  # it has a torch of its own


def test_its_tox_passes_at_once_and_it_is_installed_and_checked(package, offers_the_core, run):
    output = run("tox", "run", "--colored", "no", cwd=package, env=offers_the_core)
    assert re.findall(r"^  (\w+): OK", output, re.MULTILINE) == ["lint", "test"]
    assert "conformance: 1 combination, " in output

    run("pip", "install", "-q", "--no-build-isolation", str(package), env=offers_the_core)
    (record,) = [
        r for r in json.loads(run("mtenn_core", "list", "--json")) if r["name"] == "my-rule"
    ]
    assert record["distribution"] == "mtenn-my-rule"
    assert record["target"] == "mtenn_my_rule:MyRuleCombination"
    assert "passed" in run("mtenn_core", "check", "my-rule")


@pytest.mark.parametrize("name", ["x", "my-rule", "n" * MAX_LENGTH])
def test_its_style_is_clean_however_long_the_name_is(name, tmp_path, run):
    run("mtenn_core", "new", name)
    folder = tmp_path / f"mtenn-{name}"
    run("ruff", "check", "--no-cache", str(folder))
    run("ruff", "format", "--no-cache", "--check", str(folder))
