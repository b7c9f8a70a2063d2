"""The example with an SDF file: its data, its script as a reader runs it, and its page."""

import csv
import runpy
import sys
from pathlib import Path

import matplotlib
import pytest
import torch

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "examples" / "sdf"
PAGE = ROOT / "docs" / "how-to" / "from-sdf-to-model.md"
SCRIPT = FOLDER / "train.py"
N_MOLECULES, N_NEW = 20, 4


@pytest.fixture(scope="module")
def make_data():
    """The function that writes the files."""
    path = list(sys.path)
    try:
        yield runpy.run_path(str(FOLDER / "make_data.py"))["main"]
    finally:
        sys.path[:] = path
        sys.modules.pop("conformers", None)


@pytest.fixture(scope="module")
def files(make_data, tmp_path_factory):
    """A folder with the data, and with all that the script writes from them."""
    folder = tmp_path_factory.mktemp("sdf")
    assert make_data([str(folder), "--molecules", str(N_MOLECULES)]) == 0
    return folder


@pytest.fixture
def run(files, monkeypatch):
    """Run the script in the folder of the data, and return its names."""
    backend = matplotlib.get_backend()
    monkeypatch.chdir(files)
    matplotlib.use("agg")
    yield lambda: runpy.run_path(str(SCRIPT))
    matplotlib.pyplot.close("all")
    matplotlib.use(backend)


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_script_has_at_most_60_lines_besides_blank_ones():
    assert sum(map(bool, map(str.strip, SCRIPT.read_text(encoding="utf-8").splitlines()))) <= 60


def test_the_page_shows_the_script_of_the_example():
    block = PAGE.read_text(encoding="utf-8").partition("# train.py\n")[2].partition("```")[0]
    assert block == SCRIPT.read_text(encoding="utf-8")


def test_the_script_goes_from_files_to_a_model_that_comes_back(files, run, capsys):
    names = run()
    printed = capsys.readouterr().out
    assert "left out, no poses or no ΔG: []\n" in printed
    assert "train: RMSE" in printed
    assert "test: RMSE" in printed
    assert (files / "predicted.png").read_bytes().startswith(b"\x89PNG")
    scores = rows(files / "scores.csv")
    assert [row["name"] for row in scores] == [r["name"] for r in rows(files / "new_measured.csv")]
    assert len(scores) == N_NEW
    for row, expected in zip(scores, names["out"].prediction, strict=True):
        assert float(row["dG"]) == pytest.approx(expected.item(), abs=0.0051)  # two decimals
    best = min(scores, key=lambda row: float(row["dG"]))["name"]
    assert f"best: {best} with weights" in printed
    # Trained, and not the start: the reloaded combination has the learned kT.
    kT = names["again"].combination.kT
    assert torch.equal(kT, names["model"].combination.kT)
    assert kT.item() != pytest.approx(0.593, rel=1e-4)
    # 16 molecules can be learned by heart; ΔG of FreeSolv has a standard deviation of 3.8.
    trained = (names["predicted"] - names["y"])[names["n_test"] :]
    assert trained.square().mean().sqrt() < 1.0


def test_the_scale_of_the_features_comes_from_the_training_compounds_only(run):
    names = run()
    training = torch.cat(names["poses"][names["n_test"] :])
    assert torch.equal(names["again"].pose_model.mean, training.mean(0))


def test_compounds_without_poses_or_measurement_are_named(files, run, capsys):
    table = files / "measured.csv"
    before = table.read_text(encoding="utf-8")
    lines = before.splitlines()
    left_out = rows(table)[-1]["name"]
    try:
        table.write_text("\n".join([*lines[:-1], "007,-3.0", ""]), encoding="utf-8")
        names = run()
    finally:
        table.write_text(before, encoding="utf-8")
    assert str(sorted(["007", left_out])) in capsys.readouterr().out
    assert len(names["y"]) == N_MOLECULES - N_NEW - 1


def test_files_of_the_reader_are_not_overwritten(make_data, tmp_path, capsys):
    (tmp_path / "new.sdf").write_text("mine")
    assert make_data([str(tmp_path)]) == 0
    assert "new.sdf exists: nothing is written" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["new.sdf"]
