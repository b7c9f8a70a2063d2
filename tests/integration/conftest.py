"""Fixtures of the tests that install something: an environment to change, and its python."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """Return the python of a new environment that sees all packages of this one.

    Tests run side by side, so none of them may install anything into the environment they share.
    """
    folder = tmp_path / "environment"
    venv.create(folder, symlinks=sys.platform != "win32")
    paths = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", "venv", paths))
    # addsitedir also reads the .pth files in the folder.
    ours = sysconfig.get_path("purelib")
    (site / "outer.pth").write_text(f"import site; site.addsitedir({ours!r})\n")
    return Path(sysconfig.get_path("scripts", "venv", paths)) / Path(sys.executable).name


@pytest.fixture
def run(tmp_path: Path, python: Path) -> Callable[..., str]:
    """Run that python outside of the repository, where it would import the source tree."""

    def run(*command: str, of: Path | str = python, cwd=tmp_path, env=None, expect: int = 0) -> str:
        done = subprocess.run(
            [str(of), *command], capture_output=True, encoding="utf-8", cwd=cwd, env=env
        )
        assert done.returncode == expect, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture
def pip(run: Callable[..., str], python: Path) -> Callable[..., str]:
    """Run this environment's pip on the new one."""

    def pip(*command: str, **options) -> str:
        return run("-m", "pip", "--python", str(python), *command, of=sys.executable, **options)

    return pip


@pytest.fixture
def mtenn(run: Callable[..., str]) -> Callable[..., str]:
    """Run the command ``mtenn`` in the new environment."""
    return lambda *command, **options: run("-m", "mtenn_core", *command, **options)


@pytest.fixture(scope="session")
def offers_the_core(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return an environment where pip finds the core, which is on no index, and the pinned rest."""
    wheels = tmp_path_factory.mktemp("wheels")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(wheels), str(ROOT)], check=True)
    # The variables of the tox that runs this test would tell another tox where to work.
    env = {key: value for key, value in os.environ.items() if not key.startswith("TOX_")}
    others = env.get("PIP_FIND_LINKS", "").split()
    return env | {
        "PIP_FIND_LINKS": " ".join([wheels.as_uri(), *others]),
        "PIP_CONSTRAINT": str(ROOT / "constraints.txt"),
    }
