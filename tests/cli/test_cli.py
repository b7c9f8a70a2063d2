import json
import os
import re
import signal
import subprocess
import sys
import time
from textwrap import dedent

import pytest
from click.testing import CliRunner
from installed import write_distribution
from tiers import slow

from mtenn_core import registry
from mtenn_core._cli import check, main
from mtenn_core._registry import installed
from mtenn_core.errors import MtennError
from mtenn_core.testing import CHECKS, LEVELS

PLUGIN = """
    from mtenn_core import Combination

    print("imported")

    class Mean(Combination):
        def __init__(self, shift=0.0):
            super().__init__()
            self.shift = shift

        def combine(self, predictions):
            return predictions.mean() + self.shift

    class Wrong(Mean):
        smooth = False
        domain = (0.0, float("inf"))

        def pose_weights(self, predictions):
            return 1.001 * predictions.new_ones(len(predictions)) / len(predictions)
"""
GATE = ("--level", "gate")
INTERPRETERS = "each case starts new interpreters, and one like it is here"
posix = pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")


@pytest.fixture
def mtenn(install_plugin):
    install_plugin(
        "demo-rules",
        {"right": "demo_rules:Mean", "wrong": "demo_rules:Wrong", "gone": "demo_rules:Gone"},
        PLUGIN,
    )
    registry.refresh()
    yield lambda *args: CliRunner().invoke(main, args)
    registry.refresh()


@pytest.fixture
def shell(tmp_path):
    """Run a line in a shell where ``mtenn`` is this command, in a folder with plugin.py."""
    (tmp_path / "plugin.py").write_text(dedent(PLUGIN))

    def run(line):
        line = f'set -o pipefail; mtenn() {{ "{sys.executable}" -m mtenn_core "$@"; }}; {line}'
        return subprocess.run(
            ["bash", "-c", line], capture_output=True, text=True, cwd=tmp_path, timeout=300
        )

    return run


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
    for command in ("list", "check"):
        elsewhere = type(registry)("no.such.group")
        monkeypatch.setattr(f"mtenn_core._cli.{command}.registry", elsewhere)
    result = CliRunner().invoke(main, ["list"])
    assert result.exit_code == 0
    assert "no combination is installed" in result.output
    result = CliRunner().invoke(main, ["check", "--all"])
    assert result.exit_code == 1
    assert "no combination is installed" in result.stderr


def test_info_shows_one(mtenn):
    result = mtenn("info", "Right")
    assert result.exit_code == 0
    assert "demo-rules" in result.output
    assert json.loads(mtenn("info", "right", "--json").output)["target"] == "demo_rules:Mean"


def test_info_says_what_to_pin(places):
    registry.refresh()
    write_distribution(places.site, "demo-pin", {"pinned": "demo_pin:Good"}, record=True)
    invoke = CliRunner().invoke
    found = json.loads(invoke(main, ["info", "pinned", "--json"]).stdout)
    assert found["pin"].startswith("demo-pin==1.0 RECORD=sha256:")
    assert found["metadata"] == str(places.site / "demo_pin-1.0.dist-info")
    assert found["pin"] in invoke(main, ["info", "pinned"]).stdout
    assert json.loads(invoke(main, ["info", "healthy", "--json"]).stdout)["pin"] is None


def test_info_says_what_is_wrong(places):
    requires = "mtenn-core<0.1"
    write_distribution(places.site, "demo-old", {"old": "demo_old:Good"}, requires=requires)
    registry.refresh()
    result = CliRunner().invoke(main, ["info", "old"])
    assert result.exit_code == 0
    assert "problems      plugin 'old' (demo-old 1.0)" in result.stdout
    assert "--upgrade" in result.stdout


def test_list_prints_pins_that_the_registry_takes(places, monkeypatch, tmp_path):
    registry.refresh()
    write_distribution(places.site, "demo-pin", {"a": "demo_pin:Good", "b": "x:Y"}, record=True)
    monkeypatch.setenv("MTENN_PLUGINS", "demo-pin")
    result = CliRunner().invoke(main, ["list", "--pins"])
    assert result.exit_code == 0, result.output
    (tmp_path / "pins.txt").write_text(result.stdout)
    assert len(result.stdout.splitlines()) == 1
    monkeypatch.setenv("MTENN_PINS", str(tmp_path / "pins.txt"))
    assert registry.get("a").__name__ == "Good"

    monkeypatch.setenv("MTENN_PLUGINS", "demo-pin healthy")
    result = CliRunner().invoke(main, ["list", "--pins"])
    assert result.exit_code == 1
    assert len(result.stdout.splitlines()) == 1  # what can be pinned is
    assert "demo-healthy" in result.stderr
    assert "cannot be pinned" in result.stderr
    assert CliRunner().invoke(main, ["list", "--pins", "--json"]).exit_code == 2


def test_a_strict_job_may_write_its_own_pins(places, monkeypatch, tmp_path):
    pins = tmp_path / "pins.txt"
    pins.touch()  # as the shell does in `mtenn list --pins > pins.txt`
    monkeypatch.setenv("MTENN_PLUGINS", "demo-pin")
    monkeypatch.setenv("MTENN_PINS", str(pins))
    monkeypatch.setenv("MTENN_STRICT", "1")
    write_distribution(places.site, "demo-pin", {"a": "demo_pin:Good"}, record=True)
    registry.refresh()
    result = CliRunner().invoke(main, ["list", "--pins"])
    assert (result.exit_code, result.stderr) == (0, "")
    pins.write_text(result.stdout)
    assert CliRunner().invoke(main, ["list"]).exit_code == 0
    assert registry.get("a").__name__ == "Good"

    monkeypatch.setenv("MTENN_PLUGINS", "demo-pin nowhere")
    pins.write_text("")
    result = CliRunner().invoke(main, ["list", "--pins"])
    assert result.exit_code == 1
    assert result.stdout.startswith("demo-pin==1.0 RECORD=sha256:")
    assert "error: MTENN_PLUGINS=demo-pin nowhere contains 'nowhere'" in result.stderr


ENDS_THE_PROCESS = """
    from mtenn_core import Combination

    class Panic(BaseException):
        def __str__(self):
            raise SystemExit(0)

    class Base(Combination):
        def combine(self, predictions):
            return predictions.mean()

    class InRepr(Base):
        def __repr__(self):
            raise SystemExit(0)

        def combine(self, predictions):
            return predictions.mean().detach()

    class InCombine(Base):
        def combine(self, predictions):
            raise Panic

    class InInit(Base):
        def __init__(self):
            raise Panic

    class Argument:
        def __repr__(self):
            raise Panic

    class InArgument(Base):
        examples = ({"argument": Argument()},)

        def __init__(self, argument):
            super().__init__()

    class InFacts(Base):
        @property
        def domain(self):
            raise SystemExit(0)
"""


@pytest.mark.parametrize("isolated", [(), *slow(("--isolated",), reason=INTERPRETERS)])
def test_what_ends_a_process_is_a_result_and_the_others_are_checked(install_plugin, isolated):
    names = ("InArgument", "InCombine", "InFacts", "InInit", "InRepr", "ok")
    targets = {name.lower(): f"demo_rules:{name}" for name in names}
    install_plugin("demo-rules", targets | {"ok": "demo_rules:Base"}, ENDS_THE_PROCESS)
    registry.refresh()
    qualified = [f"demo-rules:{name.lower()}" for name in names]
    result = CliRunner().invoke(main, ["check", *qualified, "--json", "--only", "A2", *isolated])
    assert result.exit_code == 1, result.output
    passed = [report["passed"] for report in json.loads(result.stdout)]
    assert passed == [True, False, False, False, False, True]
    for text in ("SystemExit", "Panic: (it cannot be printed)", "its repr raises SystemExit: 0"):
        assert text in result.stdout


HOSTILE = """
    import warnings
    from mtenn_core import Combination, hookimpl

    TEXT = "\\x1b]0;title\\x07 \\u202e \\x1b[2J"

    class Loud(Combination):
        def __init__(self, text=TEXT):
            super().__init__()

        def __repr__(self):
            return f"Loud({TEXT})"

        def combine(self, predictions):
            raise ValueError(TEXT)

    class Warns(Loud):
        def __init__(self):
            super().__init__()
            warnings.warn(TEXT)

        def combine(self, predictions):
            return predictions.mean()

    class Hook(Loud):
        @classmethod
        @hookimpl
        def mtenn_combination(cls):
            raise ValueError(TEXT)
"""


@pytest.mark.parametrize(
    "command",
    [
        "list --all",
        "info other",
        "doctor --no-import",
        "check loud --only A1",
        "check warns --only A1",
        "check hook",
        "check --all --only A1",
        "check loud --only A1 --isolated",
    ],
)
def test_nothing_from_a_plugin_controls_the_terminal(
    install_plugin, monkeypatch, tmp_path, command
):
    names = {"loud": "demo_rules:Loud", "warns": "demo_rules:Warns", "hook": "demo_rules:Hook"}
    install_plugin("demo-rules", names, HOSTILE)
    monkeypatch.setenv("MTENN_PLUGINS", "demo-rules,bad\x1b[2J\u202e")
    write_distribution(
        tmp_path,
        "demo-title",
        {"title\x1b[2J\u202e": "demo_title:Good\x1b[2J", "other": "demo title\u202e"},
        version="1.0\x1b[2J\u202e",
        requires="mtenn-core>\x1b[2J\u202e",
    )
    registry.refresh()
    result = CliRunner().invoke(main, command.split())
    output = result.stdout + result.stderr
    assert isinstance(result.exception, SystemExit | None)
    assert "\x1b" not in output
    assert "\u202e" not in output
    assert "\\x1b[2J" in output


@pytest.mark.parametrize("charset", ["ascii", "cp1252"])
@pytest.mark.parametrize("command", ["info greek", "check greek --only A1", "list --all"])
def test_a_terminal_without_unicode_gets_escape_sequences(
    places, monkeypatch, tmp_path, charset, command
):
    module = """
        from mtenn_core import Combination

        class Good(Combination):
            def __repr__(self):
                return "Good(1 ± 2, Δ)"

            def combine(self, predictions):
                return predictions.mean()
    """
    # Another version of demo-healthy would stay loaded in the registry of the process.
    write_distribution(
        places.front, "demo-greek", {"greek": "demo_greek:Good"}, module, version="1.0Δ"
    )
    registry.refresh()
    result = CliRunner(charset=charset).invoke(main, command.split())
    assert result.exit_code == 0, result.exception
    assert "\\u0394" in result.stdout
    if "check" in command:
        assert ("\\xb1" in result.stdout) == (charset == "ascii")


def test_list_shows_what_is_disabled_or_shadowed_if_asked(places, monkeypatch):
    write_distribution(places.front, "demo-healthy", {"other": "demo_healthy:Good"}, version="0.9")
    registry.refresh()
    monkeypatch.setenv("MTENN_DISABLE_PLUGINS", "other")
    monkeypatch.setenv("COLUMNS", "500")
    result = CliRunner().invoke(main, ["list"])
    assert "demo-healthy" not in result.stdout
    assert result.stderr == "1 problem: see `mtenn doctor`\n"
    result = CliRunner().invoke(main, ["list", "--all"])
    assert "disabled: MTENN_DISABLE_PLUGINS=other contains it" in result.stdout
    assert re.search(
        r"healthy +demo-healthy +1\.0 .*shadowed: .*front.* comes first", result.stdout
    )
    records = json.loads(CliRunner().invoke(main, ["list", "--all", "--json"]).stdout)
    statuses = {r["name"]: r["status"] for r in records if r["distribution"] == "demo-healthy"}
    assert statuses == {"healthy": "shadowed", "other": "disabled"}


def test_list_says_where_nothing_may_be_used(places, monkeypatch):
    monkeypatch.setenv("MTENN_PLUGINS", "")
    result = CliRunner().invoke(main, ["list"])
    assert result.exit_code == 0
    assert "no combination may be used" in result.stdout


def test_a_warning_about_plugins_is_one_line(places, monkeypatch):
    monkeypatch.setenv("MTENN_PLUGINS", "healthy helthy")
    registry.refresh()
    result = CliRunner().invoke(main, ["list"])
    assert result.stderr.splitlines() == [
        "warning: MTENN_PLUGINS=healthy helthy contains 'helthy', which matches no plugin or"
        " distribution. Did you mean 'healthy'?",
        "1 problem: see `mtenn doctor`",
    ]


@posix
def test_doctor_finds_what_is_wrong_and_exits_with_one(places, monkeypatch):
    monkeypatch.setenv("MTENN_PLUGINS", "healthy demo-bad helthy")
    monkeypatch.setenv("MTENN_STRICT", "1")  # which would stop anybody else
    monkeypatch.setenv("COLUMNS", "500")
    lines = "[mtenn.combinations]\nno equals sign\nzero = demo_bad:Good\n= x\n"
    write_distribution(places.site, "demo-bad", lines, "1 / 0")
    registry.refresh()
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 1
    for words in (
        r"malformed +demo-bad 1\.0: expected .* in line 2 of .*entry_points\.txt; found 'no equals",
        r"malformed +demo-bad 1\.0: expected .* in line 4",
        r"unknown setting +MTENN_PLUGINS=.*'helthy'.*Did you mean 'healthy'",
        r"does not load +plugin 'zero' \(demo-bad 1\.0\).*ZeroDivisionError.*demo_bad\.py:1",
        r"combinations: 2; problems: 4",
    ):
        assert re.search(words, result.stdout), result.stdout
    found = json.loads(CliRunner().invoke(main, ["doctor", "--json", "--no-import"]).stdout)
    assert found["combinations"] == 2
    assert [problem["kind"] for problem in found["problems"]] == [
        "malformed",
        "malformed",
        "unknown setting",
    ]


@pytest.mark.parametrize(
    ("command", "allowed"), [("check healthy --level gate", "healthy"), ("doctor", "")]
)
def test_a_command_scans_the_path_once(places, monkeypatch, command, allowed):
    monkeypatch.setenv("MTENN_PLUGINS", allowed)
    groups, find_copies = [], installed._find_copies

    def record_and_find(path, group, problems):
        groups.append(group)
        return find_copies(path, group, problems)

    monkeypatch.setattr(installed, "_find_copies", record_and_find)
    registry.refresh()
    result = CliRunner().invoke(main, command.split())
    assert result.exit_code == 0, result.output
    assert groups == [registry.group]


def test_a_strict_policy_says_why_another_plugin_was_imported(places, monkeypatch):
    write_distribution(places.site, "demo-bad", {"zz": "demo_bad:Good"}, "1 / 0")
    monkeypatch.setenv("MTENN_STRICT", "1")
    monkeypatch.setenv("MTENN_PLUGINS", "healthy zz")
    registry.refresh()
    result = CliRunner().invoke(main, ["check", "healthy", *GATE])
    assert result.exit_code == 1
    assert "ZeroDivisionError" in result.stderr
    assert "because the policy is strict" in result.stderr


@pytest.mark.parametrize("command", ["list", "doctor", "check --all"])
def test_an_invalid_setting_is_an_error(monkeypatch, command):
    monkeypatch.setenv("MTENN_STRICT", "perhaps")
    result = CliRunner().invoke(main, command.split())
    assert result.exit_code == 1
    assert result.stderr == "error: MTENN_STRICT must be 1 or 0; found 'perhaps'\n"


@posix
def test_doctor_finds_no_problem_with_right_plugins(places, monkeypatch):
    monkeypatch.setenv("MTENN_PLUGINS", "healthy")
    registry.refresh()
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 0, result.output
    assert result.stdout == "combinations: 1; problems: none\n"


def test_check_of_a_right_combination_exits_with_zero(mtenn):
    result = mtenn("check", "right")
    assert result.exit_code == 0, result.output
    assert "passed" in result.output
    (report,) = json.loads(mtenn("check", "right", "--json", "--seed", "3", *GATE).stdout)
    assert report["passed"] is True
    assert {record["seed"] for record in report["records"]} == {3}


def test_check_of_a_wrong_combination_exits_with_one_and_shows_both_numbers(mtenn):
    result = mtenn("check", "wrong", *GATE)
    assert result.exit_code == 1
    assert "your backward" in result.stdout
    assert "finite difference" in result.stdout
    assert "likely cause: " in result.stdout
    assert "again: mtenn check demo-rules:wrong --only C1 --seed 0\n" in result.stdout
    assert json.loads(mtenn("check", "wrong", "--json", *GATE).stdout)[0]["passed"] is False


@pytest.mark.parametrize("isolated", [(), ("--isolated",)], ids=["here", "isolated"])
def test_check_shows_the_facts_that_were_declared(mtenn, isolated):
    output = mtenn("check", "right", "wrong", "--only", "A2", *isolated).stdout
    assert output.count("declares: ") == 1
    assert "declares: domain=(0, inf), smooth=False" in output


ADVISED = """
    import torch
    from mtenn_core import Combination

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(pred_list, grad_dict, param_names, *model_params):
            return torch.stack(pred_list).mean()

        @staticmethod
        def setup_context(ctx, inputs, output):
            _, ctx.grad_dict, ctx.names, *_ = inputs

        @staticmethod
        def backward(ctx, grad_output):
            sums = [grad_output * torch.stack(ctx.grad_dict[name]).mean(0) for name in ctx.names]
            return None, None, None, *sums

    class Advised(Combination):
        def forward(self, *args):
            return Function.apply(*args)
"""


@pytest.fixture
def advised(install_plugin):
    install_plugin("demo-advice", {"advised": "demo_advice:Advised"}, ADVISED)
    registry.refresh()
    yield lambda *args: CliRunner().invoke(main, ["check", *args])
    registry.refresh()


@pytest.mark.parametrize("isolated", [(), ("--isolated",)], ids=["here", "isolated"])
def test_check_shows_advice_below_the_table_and_exits_with_zero(advised, isolated):
    result = advised("advised", "--only", "A10", "--only", "A2", *isolated)
    assert result.exit_code == 0, result.output
    assert "passed 2 of 2 checks, 1 of them with advice" in result.stdout
    table, _, below = result.stdout.partition("\n\n")
    assert "advice" in table
    assert "gradient penalty" not in table
    assert below.startswith("advice       A10  double backward is right or an error\n")
    assert "gradient penalty" in below
    assert "to do: decorate backward with torch.autograd.function.once_differentiable\n" in below
    assert "again: " not in result.stdout


def test_check_at_the_level_quality_fails_on_advice(advised):
    result = advised("advised", "--only", "A10", "--level", "quality")
    assert result.exit_code == 1
    assert "again: mtenn check demo-advice:advised --only A10 --seed 0 --level quality" in (
        result.stdout
    )


def test_the_summary_of_several_combinations_counts_advice(advised):
    result = advised("advised", "demo_advice:Advised", "--only", "A10")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("passed 1 of 1 checks, 1 of them with advice") == 4


def test_check_of_several_ends_with_a_line_for_each(mtenn):
    result = mtenn("check", "right", "gone", "nothing", "wrong", *GATE)
    assert result.exit_code == 1
    *_, header, right, gone, nothing, wrong = result.stdout.rstrip().splitlines()
    assert header.split() == ["name", "arguments", "verdict"]
    assert "right" in right
    assert "shift=0.0" in right
    assert "passed " in right
    assert "error: PluginLoadError" in gone
    assert "error: CombinationNotFoundError" in nothing
    assert "failed 1 of" in wrong
    assert "has no attribute 'Gone'" in result.stderr
    outcomes = json.loads(mtenn("check", "right", "gone", "--json", *GATE).stdout)
    assert [outcome["passed"] for outcome in outcomes] == [True, False]
    assert outcomes[1]["error"]["type"] == "PluginLoadError"


def test_check_all_goes_on_where_one_does_not_load(mtenn):
    result = mtenn("check", "--all", "--json", *GATE)
    assert result.exit_code == 1
    passed = {outcome["name"]: outcome["passed"] for outcome in json.loads(result.stdout)}
    assert len(passed) >= len(registry.records())
    assert passed["plugin 'right' (demo-rules 1.0)"] is True
    assert passed["plugin 'wrong' (demo-rules 1.0)"] is False
    assert passed["demo-rules:gone"] is False


def test_check_takes_a_class_in_a_file_and_arguments(mtenn, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    result = mtenn("check", "demo_rules.py:Mean", "--arg", "shift=2", *GATE)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("demo_rules.py:Mean, Mean(shift=2): passed ")


def test_check_runs_the_checks_that_were_asked_for(mtenn):
    (report,) = json.loads(mtenn("check", "right", "--only", "c1", "--only", "A2", "--json").stdout)
    assert [record["id"] for record in report["records"]] == ["A2", "C1"]
    for level in LEVELS:
        at_most = LEVELS[: LEVELS.index(level) + 1]
        (report,) = json.loads(mtenn("check", "right", "--level", level, "--json").stdout)
        n_checks = sum(check.level in at_most for check in CHECKS)
        assert len(report["records"]) == report["n_expected"] == n_checks


def test_the_levels_are_those_of_the_checks():
    assert check.LEVELS == LEVELS


def test_an_isolated_check_survives_a_crash(mtenn, tmp_path):
    (tmp_path / "ends.py").write_text("import os; os._exit(3)")
    result = mtenn("check", f"{tmp_path}/ends.py:Class", "right", "--isolated", "--only", "A2")
    assert result.exit_code == 1
    assert "exited with 3 before it was done" in result.stdout
    assert "passed 1 of 1 checks" in result.stdout


def test_an_unexpected_error_shows_its_line_and_other_targets_continue(mtenn, monkeypatch):
    def raises_at_first(*args, only, **options):
        monkeypatch.undo()
        raise ZeroDivisionError("not meant")

    monkeypatch.setattr("mtenn_core._registry.isolated_checks.check_combination", raises_at_first)
    result = mtenn("check", "wrong", "right", "--only", "A2")
    assert result.exit_code == 1
    assert "error: wrong: ZeroDivisionError: not meant\nraised in " in result.stderr
    assert "passed 1 of 1 checks" in result.stdout


def test_check_writes_a_page(mtenn, tmp_path, monkeypatch):
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    page = tmp_path / "page.html"
    result = mtenn("check", "right", "gone", "--html", str(page), *GATE)
    assert result.exit_code == 1
    assert "passed " in result.stdout
    assert "demo-rules" in page.read_text(encoding="utf-8")
    assert "has no attribute" in page.read_text(encoding="utf-8")


def test_a_page_that_cannot_be_made_is_an_error_before_any_check(mtenn, tmp_path, monkeypatch):
    def render(reports):
        raise MtennError("pip install it")

    monkeypatch.setattr("mtenn_core.testing._html.page.render", render)
    result = mtenn("check", "right", "--html", str(tmp_path / "page.html"))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == "error: pip install it\n"
    missing = mtenn("check", "right", "--html", str(tmp_path / "no-folder" / "page.html"))
    assert missing.exit_code == 2
    assert "cannot write into the folder" in missing.stderr


def test_check_takes_a_class_of_a_module_named_like_its_distribution(mtenn):
    result = mtenn("check", "demo_rules:Mean", *GATE)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("demo_rules:Mean, Mean(shift=0.0): passed ")


def test_check_of_a_name_that_a_distribution_lacks_is_no_module(mtenn):
    result = mtenn("check", "demo-rules:rihgt")
    assert result.exit_code == 1
    assert "unknown combination 'demo-rules:rihgt'" in result.stderr
    assert "Did you mean 'demo-rules:right'?" in result.stderr


@pytest.mark.parametrize("args", [("info", "rihgt"), ("check", "gone")], ids=["info", "check"])
def test_errors_exit_with_one(mtenn, args):
    result = mtenn(*args)
    assert result.exit_code == 1
    assert result.stderr.count("error: ") == 1


def test_errors_go_to_json(mtenn):
    result = mtenn("info", "rihgt", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["type"] == "CombinationNotFoundError"
    result = mtenn("check", "gone", "--json")
    assert result.exit_code == 1
    (outcome,) = json.loads(result.stdout)
    assert outcome["error"]["type"] == "PluginLoadError"


def test_the_output_of_a_plugin_is_not_in_the_report(mtenn):
    result = mtenn("check", "right", "--json", *GATE)
    assert "imported" in result.stderr
    assert "imported" not in result.stdout


@posix
def test_nothing_that_a_plugin_starts_or_leaves_behind_is_in_the_report(shell, tmp_path):
    with (tmp_path / "plugin.py").open("a") as file:
        file.write("import atexit, ctypes, os\n")
        file.write("os.system('echo from a shell')\n")
        file.write("ctypes.CDLL(None).puts(b'from C, which writes at the exit')\n")
        file.write("atexit.register(print, 'from Python at the exit')\n")
    result = shell("mtenn check plugin.py:Mean --only A2 --json")
    assert json.loads(result.stdout)[0]["passed"]
    for place in ("from a shell", "from C", "from Python"):
        assert place in result.stderr


def test_names_are_never_cut_off(mtenn, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    output = "".join(mtenn("list").output.split())
    assert "…" not in output
    assert "right" in output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("chekc",), "No such command 'chekc'"),
        (("info",), r"Missing argument 'NAME\|FILE'"),
        (("check",), "expected a combination or --all; found neither"),
        (("check", "right", "--all"), "or --all; found both"),
        (("check", "right", "wrong", "--arg", "shift=1"), "--arg applies to one combination"),
        (("check", "--all", "--arg", "shift=1"), "--arg applies to one combination"),
        (("check", "right", "--arg", "shift"), "expected name=value"),
        (
            ("check", "right", "--only", "C1", "--only", "Z9"),
            "no check has the id Z9; known ids: .*C1",
        ),
        (("check", "right", "--level", "all"), "'all' is not one of 'gate', 'full', 'quality'"),
        (("check", "right", "--seed", "9" * 30), "--seed"),
        (("check", "right", "--time-limit", "9"), "--time-limit needs --isolated"),
        (("check", "right", "--memory-limit", "9"), "--memory-limit needs --isolated"),
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_two_and_says_what_is_right(mtenn, args, message):
    result = mtenn(*args)
    assert result.exit_code == 2
    assert re.search(message, " ".join(result.stderr.split()))


def test_the_module_runs_as_the_command():
    result = subprocess.run(
        [sys.executable, "-m", "mtenn_core", "--version"], capture_output=True, text=True
    )
    assert result.stdout.startswith("mtenn-core ")


def test_help_of_check_needs_no_torch():
    code = (
        "import sys; from mtenn_core._cli import main;"
        "main(['check', '--help'], standalone_mode=False); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@posix
@pytest.mark.parametrize(
    "command", ["list", *slow("check plugin.py:Mean --only A2", reason=INTERPRETERS)]
)
@pytest.mark.parametrize(
    ("output", "returncodes", "said"),
    [
        # A pipe may take everything before it closes.
        pytest.param("| true", {0, 141}, "", id="closed pipe"),
        pytest.param(
            "2>&1 | true",
            {0, 141},
            "",
            id="both in a closed pipe",
            marks=pytest.mark.slow("both of its halves are tested"),
        ),
        pytest.param(">&-", {0}, "", id="closed"),
        pytest.param(">/dev/full", {1}, "No space left on device", id="full disk"),
    ],
)
def test_output_that_goes_nowhere_is_no_traceback(shell, command, output, returncodes, said):
    if "full" in output and not os.path.exists("/dev/full"):
        pytest.skip("this platform has no /dev/full")
    result = shell(f"mtenn {command} {output}")
    assert result.returncode in returncodes, result.stderr
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert "Exception ignored" not in result.stderr


@posix
@pytest.mark.parametrize(
    "isolated",
    [
        pytest.param((), id="here"),
        pytest.param(("--isolated",), id="isolated", marks=pytest.mark.slow(INTERPRETERS)),
    ],
)
def test_an_interrupt_shows_what_was_finished_and_exits_with_130(tmp_path, isolated):
    (tmp_path / "plugin.py").write_text(
        dedent(PLUGIN)
        + dedent("""
            import pathlib, time

            class Hangs(Mean):
                def combine(self, predictions):
                    pathlib.Path("hangs").touch()
                    time.sleep(600)
        """)
    )
    command = [sys.executable, "-m", "mtenn_core", "check", "plugin.py:Mean", "plugin.py:Hangs"]
    process = subprocess.Popen(
        [*command, "--only", "A2", *isolated],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        # A shell starts what it runs in the background with interrupts ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    until = time.monotonic() + 120
    while not (tmp_path / "hangs").exists() and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "passed 1 of 1 checks" in stdout
    assert "plugin.py:Hangs: ran 0 of 1 checks" in stdout
    assert stderr.endswith("interrupted\n")
    assert "Traceback" not in stderr
