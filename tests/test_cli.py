import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from mtenn_core import _cli, registry

PLUGIN = """
    from mtenn_core import Combination

    print("imported")

    class Mean(Combination):
        def combine(self, predictions):
            return predictions.mean()

    class Wrong(Mean):
        def pose_weights(self, predictions):
            return 1.001 * predictions.new_ones(len(predictions)) / len(predictions)
"""


@pytest.fixture
def mtenn(install_plugin):
    install_plugin(
        "demo-rules",
        {"right": "demo_rules:Mean", "wrong": "demo_rules:Wrong", "gone": "demo_rules:Gone"},
        PLUGIN,
    )
    registry.refresh()
    yield lambda *args: CliRunner().invoke(_cli.main, args)
    registry.refresh()


def test_list_shows_names_and_where_they_come_from(mtenn):
    result = mtenn("list")
    assert result.exit_code == 0
    for word in ("right", "wrong", "gone", "demo-rules", "1.0", "demo_rules:Mean"):
        assert word in result.output


def test_list_goes_to_json(mtenn):
    records = json.loads(mtenn("list", "--json").output)
    assert [r["name"] for r in records if r["distribution"] == "demo-rules"] == [
        "gone",
        "right",
        "wrong",
    ]


def test_an_empty_list_says_what_to_do(monkeypatch):
    monkeypatch.setattr(_cli, "registry", type(registry)("no.such.group"))
    result = CliRunner().invoke(_cli.main, ["list"])
    assert result.exit_code == 0
    assert "no combination is installed" in result.output


def test_info_shows_one(mtenn):
    result = mtenn("info", "Right")
    assert result.exit_code == 0
    assert "demo-rules" in result.output
    assert json.loads(mtenn("info", "right", "--json").output)["target"] == "demo_rules:Mean"


def test_check_of_what_is_right_exits_with_zero(mtenn):
    result = mtenn("check", "right")
    assert result.exit_code == 0, result.output
    assert "passed" in result.output
    (report,) = json.loads(mtenn("check", "right", "--json", "--seed", "3").stdout)
    assert report["passed"] is True
    assert {record["seed"] for record in report["records"]} == {3}


def test_check_of_what_is_wrong_exits_with_one_and_shows_both_numbers(mtenn):
    result = mtenn("check", "wrong")
    assert result.exit_code == 1
    assert "your backward" in result.output
    assert "finite difference" in result.output
    assert json.loads(mtenn("check", "wrong", "--json").stdout)[0]["passed"] is False


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (("info", "rihgt"), "CombinationNotFoundError"),
        (("check", "gone"), "PluginLoadError"),
    ],
)
def test_errors_exit_with_one_and_go_to_json(mtenn, args, error):
    result = mtenn(*args)
    assert result.exit_code == 1
    assert "error: " in result.stderr
    result = mtenn(*args, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["type"] == error


def test_what_a_plugin_prints_is_not_in_the_report(mtenn):
    result = mtenn("check", "right", "--json")
    assert "imported" in result.stderr
    assert "imported" not in result.stdout


def test_names_are_never_cut_off(mtenn, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    output = "".join(mtenn("list").output.split())
    assert "…" not in output
    assert "right" in output


def test_wrong_usage_exits_with_two(mtenn):
    assert mtenn("check", "right", "--seed", "9" * 30).exit_code == 2
    assert mtenn("chekc").exit_code == 2
    assert mtenn("info").exit_code == 2


def test_the_module_runs_as_the_command():
    result = subprocess.run(
        [sys.executable, "-m", "mtenn_core", "--version"], capture_output=True, text=True
    )
    assert result.stdout.startswith("mtenn-core ")


def test_a_pipe_that_closes_is_no_traceback():
    code = f"{sys.executable} -m mtenn_core list --json | true"
    result = subprocess.run(code, shell=True, capture_output=True, text=True)
    assert "Traceback" not in result.stderr
