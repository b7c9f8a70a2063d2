"""The example with Lightning: it trains, resumes to the same numbers, and refuses a checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mtenn_core import registry

SCRIPT = Path(__file__).parents[3] / "examples" / "lightning" / "train.py"


# In a process of its own: Lightning sets seeds and warns, and warnings are errors here.
@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lightning")
    small = ["--compounds", "60", "--output", str(folder / "new"), "--json", "figures.json"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--threads", "1", *small],
        cwd=folder,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done, json.loads((folder / "figures.json").read_text()), folder / "new"


def test_the_loss_falls(ran):
    _, figures, _ = ran
    losses = figures["losses"]["at once"]
    assert len(losses) == 4
    assert losses[-1] < losses[0] / 2
    assert figures["test"]["rmse"] < figures["test"]["rmse of the mean"]


def test_a_resumed_run_is_the_one_that_was_never_stopped(ran):
    done, figures, folder = ran
    assert figures["losses"]["resumed"] == figures["losses"]["at once"]
    assert figures["same"]
    assert "the same, to the last digit" in done.stdout
    assert sorted(path.name for path in folder.iterdir()) == [
        "at-once.ckpt",
        "resumed.ckpt",
        "stopped.ckpt",
    ]


def test_a_checkpoint_of_another_combination_is_refused(ran):
    done, figures, _ = ran
    assert figures["refused"] in done.stdout
    assert "the checkpoint is of 'min' (mtenn-max" in figures["refused"]
    assert "and this model has 'boltzmann' (mtenn-boltzmann" in figures["refused"]


def test_the_combination_comes_back_from_a_checkpoint_of_lightning(ran):
    _, figures, folder = ran
    combination = registry.from_checkpoint(folder / "at-once.ckpt")
    assert type(combination).__name__ == "MinCombination"
    assert (
        f"'min' (mtenn-max 0.1.0) with pred_scale={combination.pred_scale}," in figures["refused"]
    )


def test_nothing_is_left_to_say(ran):
    done, _, _ = ran
    assert done.stderr == ""


def test_options_that_make_no_sense_are_refused():
    arguments = [sys.executable, str(SCRIPT), "--epochs", "2", "--stop-after", "2"]
    done = subprocess.run(arguments, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 2
    assert "--stop-after must be at least 1 and less than --epochs" in done.stderr
