"""Completion in the shell. The scripts for the shells are click's."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from installed import write_distribution

from mtenn_core import registry
from mtenn_core._cli import main
from mtenn_core._cli.completion import check_titles
from mtenn_core.testing import CHECKS

NAMES = {"lowest": "demo_rules:A", "lower": "demo_rules:B", "highest": "demo_rules:C"}
CANNOT_BE_IMPORTED = "raise SystemExit('imported')"
MTENN = Path(sys.executable).with_name("mtenn")
BASH = """
source <(_MTENN_COMPLETE=bash_source mtenn)
COMP_WORDS=({line} '{incomplete}')
COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
compopt() {{ :; }}  # it works only while a user completes
_mtenn_completion mtenn
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
FISH = """
_MTENN_COMPLETE=fish_source mtenn | source
complete -C '{line} {incomplete}'
"""


@pytest.fixture
def rules(install_plugin):
    install_plugin("demo-rules", NAMES, CANNOT_BE_IMPORTED)
    registry.refresh()


def complete(line, incomplete):
    """Return the type and the value of each item, for the words in front and the unfinished one."""
    _, *words = line.split()
    shell = ShellComplete(main, {}, "mtenn", "_MTENN_COMPLETE")
    return [(item.type, item.value) for item in shell.get_completions(words, incomplete)]


@pytest.mark.parametrize("line", ["mtenn combine poses.csv", "mtenn info", "mtenn check highest"])
def test_names_of_combinations_are_completed_without_an_import(line, rules):
    plain = [value for kind, value in complete(line, "low") if kind == "plain"]
    assert plain == ["lower", "lowest"]


@pytest.mark.parametrize(
    "line", ["mtenn check", "mtenn info", "mtenn combine", "mtenn check --html"]
)
def test_files_are_completed_where_a_file_may_stand(line, rules):
    assert complete(line, "sub/x")[0] == ("file", "sub/x")


def test_a_malformed_setting_completes_nothing_and_is_no_error(rules, monkeypatch):
    monkeypatch.setenv("MTENN_PINS", "no/such/file")
    monkeypatch.setenv("MTENN_STRICT", "1")
    assert complete("mtenn combine poses.csv", "low") == []


def test_a_setting_that_names_no_plugin_gives_no_warning(rules, monkeypatch):
    monkeypatch.setenv("MTENN_DISABLE_PLUGINS", "no-such-plugin")
    assert complete("mtenn combine poses.csv", "low") == [("plain", "lower"), ("plain", "lowest")]


def test_the_ids_and_titles_in_the_source_are_those_of_the_checks():
    assert sorted(check_titles()) == sorted((check.id, check.title) for check in CHECKS)


def test_ids_of_checks_are_completed():
    assert complete("mtenn check --only", "A8") == [("plain", "A8"), ("plain", "A8q")]


def test_levels_are_completed():
    assert complete("mtenn check --level", "q") == [("plain", "quality")]


@pytest.mark.parametrize(
    "shell",
    [
        pytest.param(
            (shell, script),
            id=shell,
            marks=pytest.mark.skipif(
                not shutil.which(shell) or not MTENN.exists(), reason=f"needs {shell}"
            ),
        )
        for shell, script in {"bash": BASH, "fish": FISH}.items()
    ],
)
@pytest.mark.parametrize(
    ("line", "incomplete", "expected"),
    [
        ("mtenn", "in", ["info"]),
        ("mtenn info", "low", ["lower", "lowest"]),
        ("mtenn check --only", "A8", ["A8", "A8q"]),
    ],
    ids=["commands", "names", "ids"],
)
def test_a_shell_completes_without_torch_and_plugins(line, incomplete, expected, shell, tmp_path):
    program, script = shell
    write_distribution(tmp_path, "demo-rules", NAMES, CANNOT_BE_IMPORTED)
    (tmp_path / "torch.py").write_text(CANNOT_BE_IMPORTED)
    path = os.pathsep.join([str(MTENN.parent), os.environ["PATH"]])
    done = subprocess.run(
        [program, "-c", script.format(line=line, incomplete=incomplete)],
        cwd=tmp_path,  # fish also completes files of the working folder
        env=os.environ | {"PATH": path, "PYTHONPATH": str(tmp_path), "HOME": str(tmp_path)},
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    shown = [line.split("\t")[0] for line in done.stdout.splitlines()]
    assert [word for word in shown if word.startswith(incomplete)] == expected
    assert done.stderr == ""
