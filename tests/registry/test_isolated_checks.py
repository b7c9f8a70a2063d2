import os
import time
from pathlib import Path
from textwrap import dedent, indent

import pytest

from mtenn_core._process.child import Child, ChildDiedError
from mtenn_core._registry import isolated_checks, registry
from mtenn_core._registry.isolated_checks import check_isolated
from mtenn_core._registry.isolated_imports import import_isolated
from mtenn_core._registry.targets import make_combinations
from mtenn_core.errors import CombinationNotFoundError, MtennError, TargetError
from mtenn_core.testing import check_combination
from mtenn_core.testing._target import Target

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs process groups")

MEMORY_LIMIT = 512

ALIKE = pytest.mark.slow("a new interpreter, for a case that is like another one here")


@pytest.fixture
def write(tmp_path):
    """Write a file with a mean that runs some code first, and return how to name it."""

    def write(code: str = "", name: str = "plugin.py") -> Target:
        (tmp_path / name).write_text(
            dedent("""
                import ctypes, os, pathlib, subprocess, time
                import torch
                from mtenn_core import Combination

                here = pathlib.Path(__file__).parent

                def once():
                    if (here / "once").exists():
                        return False
                    (here / "once").touch()
                    return True

                class Mean(Combination):
                    domain = (0.0, float("inf"))

                    def __init__(self, name="", scale=1.0):
                        super().__init__()

                    def combine(self, predictions):
                        self.run()
                        return predictions.mean()

                    def run(self):
                        pass
            """)
            + indent(dedent(code) or "pass", 8 * " ")
        )
        return Target(f"{tmp_path / name}:Mean")

    return write


def check(target, **options):
    """Return the one report of a target."""
    ((_, report),) = check_isolated(target, **{"memory_limit": MEMORY_LIMIT} | options)
    return report


INTERPRETERS = {
    "nothing": (None, "found None"),
    "empty": ("", "found ''"),
    "missing": ("/no/such/python", "found '/no/such/python'"),
    "ends": ("exit 0", r"must be a Python interpreter .*; exited with 0 before it was done"),
    "talks": ("echo usage: app; exit 2", r"; exited with 2 before it was done\n  usage: app"),
    "waits": ("exec sleep 60", r"must be a Python interpreter .*; it was silent for 0.2 s"),
}


@pytest.mark.parametrize(("program", "message"), INTERPRETERS.values(), ids=INTERPRETERS)
def test_a_program_that_is_no_python_is_not_blamed_on_the_plugin(
    write, places, monkeypatch, tmp_path, program, message
):
    if program and not program.startswith("/"):
        script = tmp_path / "app"
        script.write_text(f"#!/bin/sh\n{program}\n")
        script.chmod(0o755)
        program = str(script)
    monkeypatch.setattr("sys.executable", program)
    monkeypatch.setattr("mtenn_core._process.child.START_TIMEOUT", 0.2)
    with pytest.raises(MtennError, match=f"(?s)no check ran, .* does not start: .*{message}"):
        check(write())
    with pytest.raises(ChildDiedError, match=f"(?s){message}"):
        list(import_isolated([registry.info("healthy")], 30.0))


def test_a_frozen_application_does_not_start_itself_again(write, monkeypatch):
    monkeypatch.setattr("sys.frozen", True, raising=False)
    monkeypatch.setattr("subprocess.Popen", None)
    with pytest.raises(MtennError, match=r"does not start: sys\.executable must be a Python"):
        check(write())


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ends(pid: int) -> bool:
    """Whether a process that was killed is gone; a signal takes its time."""
    until = time.monotonic() + 30
    while is_running(pid) and time.monotonic() < until:
        time.sleep(0.05)
    return not is_running(pid)


def test_results_equal_those_of_a_check_in_this_process(write):
    target = write()
    ((name, this, made),) = make_combinations(target, registry)
    here = check_combination(made, name=name, target=this)
    records = []
    ((arguments, there),) = check_isolated(target, on_record=records.append)
    assert arguments == "name='', scale=1.0"
    assert [(r.id, r.status) for r in there.records] == [(r.id, r.status) for r in here.records]
    assert records == there.records
    assert (there.combination, there.level, there.n_expected) == (
        here.combination,
        here.level,
        here.n_expected,
    )
    assert there.facts["domain"] == [0.0, float("inf")]
    assert there.curves == here.curves


@pytest.mark.parametrize(
    ("code", "reason", "printed"),
    [
        pytest.param("ctypes.string_at(0)", "killed by SIGSEGV", "plugin.py", id="segfault"),
        pytest.param("os.abort()", "killed by SIGABRT", "plugin.py", id="abort", marks=ALIKE),
        pytest.param(
            "os.kill(os.getpid(), 9)", "killed by SIGKILL", "limit is 512 MiB", id="SIGKILL"
        ),
        pytest.param(
            "print('words'); os._exit(3)", "exited with 3 before it was done", "words", id="exit 3"
        ),
        pytest.param(
            "os._exit(0)",
            "exited with 0 before it was done",
            "",
            id="exit 0",
            marks=ALIKE,
        ),
        pytest.param(
            "os.closerange(3, 99)", "exited with 1 before", "Bad file", id="every file closed"
        ),
    ],
)
def test_a_crash_is_an_error_of_the_running_check(write, code, reason, printed):
    report = check(write(code), only=["A2"])
    (record,) = report.failures
    assert (record.id, record.status) == ("A2", "error")
    assert record.reason.startswith(reason)
    assert printed in record.reason
    assert record.repro.endswith("plugin.py:Mean --isolated --only A2 --seed 0")
    assert not report.passed


def test_all_steps_together_have_a_time_limit(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "demo_steps.py").write_text(
        dedent("""
            import time

            def main(job, send):
                send("ready", True)
                for _ in range(100):
                    time.sleep(0.1)
                    send("step", None)
        """)
    )
    kinds = []
    with (
        Child("demo_steps", None, time_limit=1.0, step_time_limit=30.0) as child,
        pytest.raises(ChildDiedError, match="the total time limit was reached"),
    ):
        kinds += (kind for kind, _ in child.messages())
    assert {*kinds} == {"ready", "step"}
    assert child.seconds > 1.0


@pytest.mark.slow("it waits for the time limit several times")
def test_a_hang_is_stopped_and_its_line_is_shown(write):
    report = check(write("while True: pass"), only=["A2", "A3", "B1"], time_limit=4)
    assert report.records[0].reason.startswith("did not end within 2 s")
    assert "plugin.py" in report.records[0].reason
    assert len(report.records) < 3  # half of the time each
    assert not report.passed


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("torch.ones(2**28)", id="one tensor", marks=ALIKE),
        pytest.param("hoard = [bytearray(2**20) for _ in range(2**20)]", id="bit by bit"),
    ],
)
def test_an_allocation_beyond_the_limit_is_an_error_that_names_the_limit(write, code):
    (record,) = check(write(code), only=["A2"]).records
    assert record.status == "error"
    assert f"the limit is {MEMORY_LIMIT} MiB" in record.reason
    assert "--isolated" in record.repro


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("once() and (os.close(1), os.close(2))", id="closes its output"),
        pytest.param("print('flood ' * 10**6)", id="floods its output", marks=ALIKE),
        pytest.param(
            """
            for number in range(3, 64):
                try:
                    os.write(number, b'[garbage\\n["done", null]\\n[garbage')
                except OSError:
                    pass
            """,
            id="writes to every file",
            marks=ALIKE,
        ),
        # Once: with a fork in each of n calls, there would be 2^n processes.
        pytest.param("once() and os.fork()", id="a fork that goes on with the checks"),
    ],
)
def test_a_plugin_cannot_disturb_the_pipes_of_its_process(write, code):
    report = check(write(code), only=["A2", "A3"])
    assert report.passed, report
    assert [record.id for record in report.records] == ["A2", "A3"]


def test_the_checks_after_a_death_run_in_a_new_process(write):
    report = check(write("once() and os._exit(3)"), only=["A2", "A3", "C1"])
    assert [record.status for record in report.records] == ["error", "pass", "pass"]


def test_one_hang_leaves_time_for_other_checks(write):
    report = check(write("once() and time.sleep(600)"), only=["A2", "A3"], time_limit=8)
    assert [record.status for record in report.records] == ["error", "pass"]


def test_after_several_deaths_the_remaining_checks_do_not_run(write, monkeypatch):
    monkeypatch.setattr(isolated_checks, "MAX_DEATHS", 2)
    report = check(write("os._exit(3)"), only=["A2", "A3", "C1"])
    assert [record.status for record in report.records] == ["error", "error"]
    assert "the remaining checks did not run" in report.records[-1].reason
    assert report.verdict == "ran 2 of 3 checks, 2 failed"


@ALIKE
def test_every_example_is_checked_although_one_crashes(write, tmp_path):
    write("os._exit(3) if self.name == 'bad' else None")
    file = tmp_path / "plugin.py"
    file.write_text(
        file.read_text().replace("super().__init__()", "super().__init__(); self.name = name")
        + "\n    examples = ({}, {'name': 'bad'}, {'scale': 2.0})\n"
    )
    checked = list(check_isolated(Target(f"{file}:Mean"), only=["A2"]))
    assert [report.passed for _, report in checked] == [True, False, True]
    assert [arguments for arguments, _ in checked] == [
        "name='', scale=1.0",
        "name='bad', scale=1.0",
        "name='', scale=2.0",
    ]
    assert "--arg name=bad --isolated" in checked[1][1].records[0].repro


def test_a_plugin_that_dies_while_it_is_imported_has_a_report(tmp_path):
    (tmp_path / "dies.py").write_text("print('importing'); import os; os._exit(7)")
    report = check(Target(f"{tmp_path}/dies.py:Mean"))
    (record,) = report.records
    assert (record.id, record.status) == ("import", "error")
    assert record.reason.startswith("exited with 7 before it was done")
    assert "importing" in record.reason
    assert not report.passed


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("no-such-name", CombinationNotFoundError),
        pytest.param("no_such_module:Class", TargetError, marks=ALIKE),
    ],
)
def test_errors_of_loading_are_the_same_as_in_this_process(path, error):
    with pytest.raises(error, match=r"no.such"):
        list(check_isolated(Target(path)))


def test_arguments_do_not_change_on_their_way_to_the_child(write):
    target = Target(write().path, {"name": "1", "scale": float("inf")})
    assert check(target, only=["A2"]).combination == "Mean(name='1', scale=inf)"


@ALIKE
def test_a_module_is_found_from_where_the_shell_is(write, tmp_path, monkeypatch):
    write()
    (tmp_path / "random.py").write_text("raise RuntimeError('not the one of Python')")
    monkeypatch.chdir(tmp_path)
    assert check(Target("plugin:Mean"), only=["A2"]).passed


def test_a_name_is_found_on_the_path_of_this_process(write, install_plugin, tmp_path):
    write()
    module = (tmp_path / "plugin.py").read_text()
    install_plugin("demo-isolated", {"isolated": "demo_isolated:Mean"}, module)
    report = check(Target("demo-isolated:isolated"), only=["A2"])
    assert report.name == "plugin 'isolated' (demo-isolated 1.0)"
    assert report.passed


def test_no_process_that_a_plugin_starts_survives(write, tmp_path):
    target = write("""
        if once():
            process = subprocess.Popen(["sleep", "600"])
            (here / "pid").write_text(str(process.pid))
    """)
    assert check(target, only=["A2"]).passed
    assert ends(int((tmp_path / "pid").read_text()))


def test_an_interrupt_ends_the_child(write, tmp_path):
    def interrupt(record):
        raise KeyboardInterrupt

    target = write("if once(): (here / 'pid').write_text(str(os.getpid()))")
    with pytest.raises(KeyboardInterrupt):
        check(target, only=["A2", "A3"], on_record=interrupt)
    assert ends(int((tmp_path / "pid").read_text()))


def test_a_platform_without_process_groups_says_so(monkeypatch):
    reports = check_isolated(Target("max"))
    with monkeypatch.context() as patched:
        patched.setattr(os, "name", "nt")
        with pytest.raises(MtennError, match="POSIX"):
            next(reports)
