"""``mtenn new``: the package passes its own tox, then it is installed and checked."""

import json
import re
import shutil
import sys

import pytest

from mtenn_core._cli.new import MAX_LENGTH


@pytest.fixture
def package(tmp_path, mtenn):
    """Return the package that ``mtenn new my-rule`` writes."""
    mtenn("new", "my-rule")
    folder = tmp_path / "mtenn-my-rule"
    yield folder
    shutil.rmtree(folder / ".tox", ignore_errors=True)  # it has a torch of its own


@pytest.mark.slow("it installs torch")
def test_its_tox_passes_at_once(package, offers_the_core, run):
    command = ("-m", "tox", "run", "--colored", "no")
    output = run(*command, of=sys.executable, cwd=package, env=offers_the_core)
    assert re.findall(r"^  (\w+): OK", output, re.MULTILINE) == ["lint", "test"]
    assert "conformance: 1 combination, " in output


def test_it_is_installed_and_checked(package, offers_the_core, pip, mtenn):
    pip("install", "-q", "--no-build-isolation", str(package), env=offers_the_core)
    (record,) = [r for r in json.loads(mtenn("list", "--json")) if r["name"] == "my-rule"]
    assert record["distribution"] == "mtenn-my-rule"
    assert record["target"] == "mtenn_my_rule:MyRuleCombination"
    assert "passed" in mtenn("check", "my-rule")


@pytest.mark.parametrize("name", ["x", "my-rule", "n" * MAX_LENGTH])
def test_its_style_is_clean_however_long_the_name_is(name, tmp_path, run, mtenn):
    mtenn("new", name)
    folder = tmp_path / f"mtenn-{name}"
    run("-m", "ruff", "check", "--no-cache", str(folder))
    run("-m", "ruff", "format", "--no-cache", "--check", str(folder))
