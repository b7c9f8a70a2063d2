"""The screening example: its batches, its rows, restarts, and one and two processes."""

import csv
import importlib
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mtenn_core import MultiPoseModel
from mtenn_core.errors import PredictionError

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "examples" / "screening"
PAGE = ROOT / "docs" / "how-to" / "score-a-library.md"
MODULES = ("scoring", "score", "conformers", "pose_model")
LIBRARY = """\
CCO ethanol
C1CC1(( unreadable
CCCCCO pentanol

CC(=O)O acid, acetic
O
CCN ethylamine
"""
NAMES = ["ethanol", "unreadable", "pentanol", "acid, acetic", "O", "ethylamine"]


@pytest.fixture(scope="module")
def example():
    """The example's modules, which import each other by their bare names as scripts do."""
    path = list(sys.path)
    sys.path.insert(0, str(FOLDER))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    finally:
        sys.path[:] = path
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture
def _same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def library(tmp_path):
    path = tmp_path / "library.smi"
    path.write_text(LIBRARY)
    return path


@pytest.fixture
def run(example, library, tmp_path, capsys, monkeypatch, _same_threads):
    """Run the script in this process; return its exit status and its summary."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments, folder="scores"):
        given = ["--library", str(library), "--output", str(tmp_path / folder), "--json"]
        code = example.score.main([*given, "--batch-poses", "8", *arguments])
        printed, errors = capsys.readouterr()
        return code, json.loads(printed) if printed else errors

    return run


def read_rows(*parts):
    """Return the rows of parts that are merged by concatenation, without the header."""
    text = "".join(part.read_text() for part in parts)
    return list(csv.DictReader(io.StringIO(text)))


class Plain(torch.nn.Module):
    """A pose is its own prediction."""

    def forward(self, poses):
        return poses


def plain_model():
    return MultiPoseModel(Plain(), "boltzmann", collate=torch.stack).eval()


def compound(name, *predictions):
    return name, list(torch.tensor(predictions))


def test_a_compound_is_never_cut_in_two(example):
    sizes = [3, 2, 9, 1, 1, 4, 0, 5]
    compounds = [(str(i), [None] * size) for i, size in enumerate(sizes)]
    found = [[len(poses) for _, poses in b] for b in example.scoring.batches(compounds, 5)]
    assert found == [[3, 2], [9], [1, 1], [4, 0], [5]]


def test_compounds_are_read_only_when_they_are_needed(example):
    n_read = 0

    def library():
        nonlocal n_read
        while True:
            n_read += 1
            yield str(n_read), [None, None]

    for number, batch in enumerate(example.scoring.batches(library(), 4), start=1):
        assert len(batch) == 2
        assert n_read == 2 * number + 1
        if number == 100:
            break


def test_a_row_has_what_the_combination_says(example):
    own, other = compound("a", 1.0, -2.0, 0.5), compound("b", 3.0)
    combination = plain_model().combination
    weights = combination.pose_weights(torch.stack(own[1]))
    expected = [
        ("a", f"{combination.combine(torch.stack(own[1])):.5g}", 3, 1, f"{weights[1]:.3f}", ""),
        ("b", "3", 1, 0, "1.000", ""),
    ]
    assert example.scoring.score(plain_model(), [own, other]) == expected


def test_broken_compounds_are_named_and_change_no_other_row(example):
    right = [compound("a", 1.0, -2.0), compound("b", 3.0, 3.5), compound("c", 0.0)]
    broken = [
        compound("no pose"),
        compound("NaN", 1.0, 2.0, math.nan),
        compound("infinite", math.inf),
    ]
    mixed = [broken[0], right[0], broken[1], right[1], right[2], broken[2]]
    rows = example.scoring.score(plain_model(), mixed)
    assert sorted(row for row in rows if row[-1]) == [
        ("NaN", "", 3, "", "", "pose 2 is NaN or infinite"),
        ("infinite", "", 1, "", "", "pose 0 is NaN or infinite"),
        ("no pose", "", 0, "", "", "too few poses"),
    ]
    assert [r for r in rows if not r[-1]] == example.scoring.score(plain_model(), right)
    assert [r[-1] for r in example.scoring.score(plain_model(), [broken[0]])] == ["too few poses"]


def test_an_error_of_the_program_is_not_taken_for_a_broken_compound(example):
    model = plain_model()
    model.pose_model = torch.nn.Linear(1, 2)
    with pytest.raises(PredictionError, match="2 numbers, one per pose"):
        example.scoring.score(model, [("a", list(torch.ones(2, 1)))])


def test_an_unfinished_row_is_cut_off_by_one_process(example, tmp_path):
    for rank in range(3):
        (tmp_path / f"{rank}.csv").write_bytes(b'a%d,1,\r\n"b, %d",2\r\nha' % (rank, rank))
    names = {f"a{i}" for i in range(3)} | {f"b, {i}" for i in range(3)}
    assert example.scoring.names_done(tmp_path, rank=0, n_ranks=2) == names
    ends = [(tmp_path / f"{rank}.csv").read_bytes()[-2:] for rank in range(3)]
    assert ends == [b"\r\n", b"ha", b"\r\n"]  # part 1 belongs to rank 1


def test_each_molecule_of_the_library_has_one_row(run, tmp_path):
    code, figures = run()
    assert code == 0
    assert (figures["scored"], figures["without prediction"]) == (5, 1)
    rows = {row["name"]: row for row in read_rows(tmp_path / "scores" / "0.csv")}
    assert sorted(rows) == sorted(NAMES)
    assert rows["unreadable"]["problem"] == "too few poses"
    assert rows["pentanol"]["n_poses"] == "5"
    assert 0 <= int(rows["pentanol"]["best_pose"]) < 5


def test_a_restart_scores_only_what_is_left(run, tmp_path):
    run()
    part = tmp_path / "scores" / "0.csv"
    complete = part.read_bytes()
    lines = complete.splitlines(keepends=True)
    part.write_bytes(b"".join(lines[:4]) + lines[4][:5])
    _, figures = run()
    assert figures["scored"] + figures["without prediction"] == len(NAMES) - 3
    # The header stays the first line. Another batch may change the last digits.
    assert part.read_bytes().splitlines()[0] == lines[0].strip()
    assert sorted(row["name"] for row in read_rows(part)) == sorted(NAMES)
    _, figures = run()
    assert figures["scored"] + figures["without prediction"] == 0


def test_an_interruption_keeps_the_rows(run, example, tmp_path, monkeypatch):
    score = example.scoring.score
    calls = []

    def interrupted(model, batch):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return score(model, batch)

    monkeypatch.setattr(example.scoring, "score", interrupted)
    code, errors = run()
    assert (code, errors) == (130, "interrupted; the same command goes on from here\n")
    assert [row["name"] for row in read_rows(tmp_path / "scores" / "0.csv")] == [
        "unreadable",
        "ethanol",
    ]
    monkeypatch.undo()
    assert run()[0] == 0
    assert len(read_rows(tmp_path / "scores" / "0.csv")) == len(NAMES)


def test_a_checkpoint_changes_the_predictions(run, example, tmp_path):
    model = example.score.load_model(None)
    model.pose_model.mean += 100.0
    torch.save(model.state_dict(), tmp_path / "model.pt")
    run(folder="old")
    run("--checkpoint", str(tmp_path / "model.pt"), folder="new")
    old, new = (read_rows(tmp_path / name / "0.csv") for name in ("old", "new"))
    for before, after in zip(old, new, strict=True):
        if not before["problem"]:
            # written with five digits
            assert float(after["prediction"]) == pytest.approx(
                float(before["prediction"]) + 100.0, abs=1e-2
            )


def test_a_missing_library_is_an_error_of_one_line(run, tmp_path):
    code, errors = run("--library", str(tmp_path / "absent.smi"))
    assert code == 1
    assert errors.startswith("error: [Errno 2]")
    assert errors.count("\n") == 1


def test_the_page_shows_the_file_of_the_example():
    block = PAGE.read_text(encoding="utf-8").partition("# scoring.py\n")[2].partition("```")[0]
    assert block == (FOLDER / "scoring.py").read_text(encoding="utf-8")


def arguments_of(library, folder):
    return [str(FOLDER / "score.py"), "--library", str(library), "--output", str(folder)]


@pytest.mark.slow("torchrun and its two processes import torch")
def test_two_processes_write_the_rows_of_one(run, library, tmp_path):
    run()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", *arguments_of(library, tmp_path / "two"), "--json"],
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    one = sorted(read_rows(tmp_path / "scores" / "0.csv"), key=lambda row: row["name"])
    parts = sorted((tmp_path / "two").iterdir())
    assert [part.name for part in parts] == ["0.csv", "1.csv"]
    assert [len(part.read_text().splitlines()) for part in parts] == [4, 3]  # one with the header
    for found, expected in zip(
        sorted(read_rows(*parts), key=lambda row: row["name"]), one, strict=True
    ):
        for column, value in expected.items():
            if column in ("prediction", "weight") and value:
                # float32, written with five and three digits; other batches, other roundoff
                assert float(found[column]) == pytest.approx(float(value), rel=2e-4, abs=1e-3)
            else:
                assert found[column] == value


@pytest.mark.slow("a process imports torch")
def test_a_closed_pipe_is_no_traceback(library, tmp_path):
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [sys.executable, *arguments_of(library, tmp_path / "scores")],
        stdout=write_end,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    os.close(write_end)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
    assert len(read_rows(tmp_path / "scores" / "0.csv")) == len(NAMES)


def ctrl_c(process):
    """Press Ctrl-C, again where RDKit has lost it: during the last conformer of a molecule."""
    for _ in range(20):
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=15)[1]
    process.kill()
    pytest.fail("Ctrl-C does not end the process")


@pytest.mark.slow("a process imports torch")
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for a child")
def test_ctrl_c_ends_a_process_without_a_traceback(tmp_path):
    library = tmp_path / "long.smi"
    library.write_text("".join(f"CCCCCCCCCC decane {i}\n" for i in range(100_000)))
    part = tmp_path / "scores" / "0.csv"
    command = [sys.executable, *arguments_of(library, tmp_path / "scores"), "--batch-poses", "10"]
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        # A process that was started in the background ignores it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        while process.poll() is None and not (part.exists() and part.stat().st_size > 100):
            time.sleep(0.05)
        errors = ctrl_c(process)
    assert process.returncode == 130
    # RDKit writes a line of its own, if it was making conformers.
    assert errors.endswith("interrupted; the same command goes on from here\n")
    assert "Traceback" not in errors
    assert read_rows(part)[-1]["problem"] == ""
