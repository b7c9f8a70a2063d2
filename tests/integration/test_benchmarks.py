"""The benchmarks compare what they say: two versions, or two ways to the same numbers."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def against(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("against")


@pytest.fixture
def cell(against):
    case = against.Case(2, n_parameters=100, pose_model="vector")
    return against.Cell(case, "graph")


class SlowingWorkers:
    """Two workers on a machine on which each turn takes 0.5 seconds more than the one before."""

    def __init__(self) -> None:
        self.seconds = 0.5

    def send(self, *_: object) -> None:
        pass

    def receive(self) -> None:
        pass

    def ask(self, *_: object) -> float:
        self.seconds += 0.5
        return self.seconds


def test_the_order_of_turns_cancels_a_drift(against, cell):
    workers = SlowingWorkers()
    against.add_times(cell, workers, workers, seconds=0.0)
    assert (cell.other[:2], cell.this[:2]) == ([1.0, 2.5], [1.5, 2.0])
    assert against.time_cells(cell) == ["1.000", "0.000", "1.500"]


def test_times_are_compared_by_the_median_round_and_the_fastest_turns(against, cell):
    cell.other, cell.this = [2.0, 2.0, 4.0, 4.0, 1.0, 1.0], [1.0, 1.0, 3.0, 3.0, 2.0, 2.0]
    median, _, fastest = against.time_cells(cell)
    assert (median, fastest) == ("0.750", "1.000")


@pytest.mark.parametrize(
    ("memory", "shown"),
    [
        pytest.param((4_000_000, 3_000_000), ["0.750", "3.0"], id="measured"),
        pytest.param((None, 3_000_000), ["–", "–"], id="failed"),
        pytest.param((), ["–", "–"], id="not measured"),
    ],
)
def test_memory_is_shown_as_a_ratio_and_in_megabytes(against, cell, memory, shown):
    cell.memory = memory
    assert against.memory_cells(cell) == shown


def test_the_package_must_come_from_the_checkout(against, tmp_path):
    with pytest.raises(SystemExit, match="mtenn_core must come from "):
        importlib.import_module("engine_process").check_package(tmp_path)


@pytest.mark.slow("two processes import torch")
def test_two_checkouts_run_in_two_processes(against, cell, tmp_path):
    shutil.copytree(ROOT / "mtenn_core", tmp_path / "mtenn_core")
    with closing(against.Worker(tmp_path)) as other, closing(against.Worker(ROOT)) as this:
        against.add_times(cell, other, this, seconds=0.0)
    assert len(cell.other) == len(cell.this) == 2 * against.MIN_ROUNDS
    assert min(cell.other + cell.this) > 0.0


def test_a_worker_without_its_own_package_is_an_error(against, tmp_path):
    with (
        closing(against.Worker(tmp_path)) as worker,
        pytest.raises(SystemExit, match=r"The process that measures .* failed\."),
    ):
        worker.ask("set_up")


@pytest.mark.parametrize("what", ["5", "1 to 20"])
@pytest.mark.parametrize("name", ["min", "boltzmann", "learnable", "mean"])
def test_segment_sums_by_hand_give_the_gradients_of_the_model(monkeypatch, what, name):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    compounds = importlib.import_module("compounds")
    case = compounds.Case(what, 30, name)
    assert len(case.ways) == 3
    case.check()


@pytest.fixture
def embeddings(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("embeddings")


@pytest.mark.parametrize("what", ["5", "1 to 20"])
def test_attention_by_hand_and_in_a_loop_give_the_gradients_of_the_model(embeddings, what):
    case = embeddings.ManyCompounds(what, 30)
    assert len(case.ways) == 4
    case.check()


def test_embeddings_and_tasks_have_the_gradients_of_plain_autograd(embeddings):
    tasks = embeddings.Case(3, 6, 100_000, n_columns=4)
    attention = embeddings.Case(3, 6, 100_000, "attention", n_columns=embeddings.K)
    for case, modes in ((tasks, embeddings.MODES), (attention, ("graph", "recomputed"))):
        ways = (embeddings.PLAIN, *modes)
        differences = importlib.import_module("engine_process").differences
        found = differences(embeddings.Setup(case), ways, "float64")
        assert list(found) == list(ways)
        assert max(found.values()) < embeddings.PRECISION["float64"]


def test_the_memory_of_embeddings_is_shown_with_its_limit(embeddings, monkeypatch):
    monkeypatch.setattr(embeddings, "sizes_of", lambda case: (40_000_000, 5_000_000))
    few, many = embeddings.embedding_cases(quick=True)
    results = {
        ("peak", few, ("recomputed",)): 51_000_000,
        ("peak", few, ("plain autograd",)): 700_000_000,
        ("peak", many, ("recomputed",)): 53_400_000,
    }
    columns = [
        list(column.cells) for column in embeddings.memory_table(results, [few, many]).columns
    ]
    assert columns[3:6] == [["51.0", "53.4", "0.050"], ["50.0", "50.0", ""], ["1.02", "1.07", ""]]
    assert columns[-1] == ["700.0", "–, needs about 2570.0", ""]


@pytest.fixture
def screening(monkeypatch) -> Iterator[ModuleType]:
    """Yield the benchmark, which imports the examples' modules by their bare names."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield importlib.import_module("screening")
    for name in ("screening", "scoring", "conformers", "pose_model"):
        sys.modules.pop(name, None)


def test_all_ways_to_score_run_the_same_poses(screening):
    molecules = [screening.Measurement(smiles, smiles, 0.0, 0.0) for smiles in ("CCO", "CCCO")]
    batch = list(screening.with_poses(molecules))
    pose_model = screening.ConformerSchNet(mean=0.0, std=1.0)
    model = screening.MultiPoseModel(pose_model, "mean", collate=screening.collate).eval()
    with torch.inference_mode():
        found = {name: way() for name, way in screening.make_ways(model, batch).items()}
    alone = found.pop(screening.BARE)
    assert len(alone) == 2 * screening.N_CONFORMERS
    assert torch.equal(found.pop(screening.BARE + screening.WITH_COLLATE), alone)
    assert [name for name, *_ in found.pop(screening.ROWS)] == ["CCO", "CCCO"]
    assert len(found) == 2
    assert all(torch.equal(out.pose_predictions, alone) for out in found.values())


@pytest.fixture
def tables(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("tables")


@pytest.mark.parametrize("order", ["by compound", "shuffled"])
def test_both_ways_read_the_same_compounds(tables, order, tmp_path):
    path, out = tmp_path / "poses.csv", tmp_path / "out.csv"
    tables.write_table(path, 500, 20, order)
    found = {}
    for way in tables.WAYS:
        tables.RUN[way](path, out)
        found[way] = {line.split(",")[0] for line in out.read_text().splitlines()[1:]}
    assert len(found["polars"]) == 20
    assert found["polars"] == found["mtenn combine"]


@pytest.mark.slow("six new processes import torch")
def test_the_quick_benchmark_of_tables_prints_both_orders(tables, capsys):
    tables.main(["--quick"])
    printed = capsys.readouterr().out
    assert "20,000 rows, 400 compounds" in printed
    assert all(order in printed for order in tables.ORDERS)
