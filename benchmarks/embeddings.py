"""Measure poses that predict several numbers: embeddings with gated attention, and tasks.

    python benchmarks/embeddings.py [--quick] [--threads 1] [--memory GB] [--seconds 10]

Embeddings: poses of 110 atoms have 64 numbers each (with ``--quick``: 60 atoms, and up to 64
poses). The limit is 1.3 · (G + 2 P + M · k numbers), for the graph of one pose, its parameters and
the embeddings of M poses. "Per pose" is the growth of the peak from the fewest to the most poses.
The loss and all gradients are compared with those of plain autograd, in float32 and, for a small
case, in float64.

Tasks: each mode with 1, 4 and 16 numbers per pose, and the mean of each.

Times and memory are measured as in ``engine.py``, but the threshold of the allocator is 16 kB and
not 64 kB. The graphs that wait for their second run consist of small blocks. These lie between the
holes that blocks below the threshold leave, and the holes grow with the number of poses.

Many compounds are measured as in ``compounds.py``: gated attention over 64 numbers of each pose,
from a linear pose model. "By hand" is the same step on one padded batch, with a mask for ragged
compounds. "Loop" combines one compound at a time.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import compounds
import torch
from engine import console, new_table
from engine_cases import FORWARD, MODES, PLAIN, Case, GatedAttention, Setup
from engine_process import NO_HOLES, measure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from mtenn_core import MultiPoseModel

GRAPH, STORED, RECOMPUTED = MODES
K = 64
N_POSES = (16, 64, 256)
LIMIT = 1.3
EMBEDDING_WAYS = (PLAIN, RECOMPUTED)
TASKS = (1, 4, 16)
SMALL = Case(5, 20, 100_000, "attention", n_columns=K)
# The largest differences from plain autograd.
PRECISION = {"float32": 1e-5, "float64": 1e-10}
MANY = (("5", 1000), ("1 to 20", 1000))
REPEATS = 15

# The figures of a measurement, by its name, case and ways.
Key = tuple[str, Case, tuple[str, ...]]
Results = dict[Key, Any]


def main() -> None:
    """Measure and print."""
    options = parse()
    torch.set_num_threads(options.threads)
    fits = partial(fits_into, 1e9 * options.memory)
    cases = list(embedding_cases(options.quick))
    jobs = [*embedding_jobs(cases, fits), *task_jobs()]
    results: Results = {}
    for key in track(jobs, "measuring", console=Console(stderr=True), transient=True):
        what, case, ways = key
        given = {
            "times": {"seconds": options.seconds},
            "differences": {"dtype": dtype_of(case)},
            "peak": {"allocator": NO_HOLES},
        }
        results[key] = measure(what, case, ways, threads=options.threads, **given.get(what, {}))
    console.print(f"{options.threads} thread(s), torch {torch.__version__}, k = {K}")
    for title, table in {
        f"Embeddings[/]: peak memory of {RECOMPUTED}, MB": memory_table(results, cases),
        f"Embeddings[/]: {RECOMPUTED} compared with plain autograd": plain_table(results, cases),
        "Tasks[/]: time and memory as multiples of plain autograd's": task_table(results),
        "Many compounds[/]: ratios to the padded batch by hand": many_table(options.repeats),
    }.items():
        console.print(f"\n[bold]{title}")
        console.print(table)


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller poses, and up to 64")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", type=float, metavar="GB", help="default: half of what is free")
    parser.add_argument("--seconds", type=float, default=10.0, help="to take times of a case")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="of many compounds")
    options = parser.parse_args()
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    options.memory = options.memory or free / 2e9
    return options


# What is measured


def embedding_cases(quick: bool) -> Iterator[Case]:
    """Yield the cases with embeddings, from few poses to many."""
    for n_poses in N_POSES[:2] if quick else N_POSES:
        yield Case(n_poses, 60 if quick else 110, 1_500_000, "attention", n_columns=K)


def task_cases() -> Iterator[Case]:
    """Yield the cases with tasks."""
    for n_tasks in TASKS:
        yield Case(8, 40, 300_000, n_columns=n_tasks)


def embedding_jobs(cases: list[Case], fits: Callable[[Case], bool]) -> Iterator[Key]:
    """Yield what is measured with embeddings; plain autograd only where it fits into memory."""
    for case in cases:
        yield "peak", case, (RECOMPUTED,)
        if fits(case):
            yield "peak", case, (PLAIN,)
    yield "times", cases[0], (*EMBEDDING_WAYS, FORWARD)
    for case in (cases[0], SMALL):
        yield "differences", case, EMBEDDING_WAYS


def task_jobs() -> Iterator[Key]:
    """Yield what is measured with tasks."""
    for case in task_cases():
        yield "times", case, (PLAIN, *MODES)
        for way in (PLAIN, *MODES):
            yield "peak", case, (way,)


def dtype_of(case: Case) -> str:
    """Return the dtype in which gradients are compared."""
    return "float64" if case == SMALL else "float32"


def fits_into(n_bytes: float, case: Case) -> bool:
    """Return whether the graphs of all poses fit into memory."""
    return plain_bytes(case) <= n_bytes


def plain_bytes(case: Case) -> int:
    """Return about how many bytes plain autograd takes."""
    graph, parameters = sizes_of(case)
    return case.n_poses * graph + 2 * parameters


def sizes_of(case: Case) -> tuple[int, int]:
    """Return G and P: the bytes of the graph of one pose, and of all parameters."""
    return _sizes_of(case.n_atoms, case.n_parameters)


@cache
def _sizes_of(n_atoms: int, n_parameters: int) -> tuple[int, int]:
    setup = Setup(Case(1, n_atoms, n_parameters, "attention", n_columns=K))
    return setup.graph_bytes(), sum(p.nbytes for p in setup.params)


def least_bytes(case: Case) -> int:
    """Return G + 2 P + M · k numbers."""
    graph, parameters = sizes_of(case)
    return graph + 2 * parameters + 4 * case.n_poses * K


# What is printed


def memory_table(results: Results, cases: list[Case]) -> Table:
    """Return the peaks, with their limit."""
    table = new_table("", "G", "P", "peak", "G + 2 P + M k", "ratio", "limit", PLAIN)
    for case in cases:
        peak, plain = (results.get(("peak", case, (way,))) for way in (RECOMPUTED, PLAIN))
        least = least_bytes(case)
        table.add_row(
            str(case),
            *(megabytes(size) for size in (*sizes_of(case), peak, least)),
            f"{peak / least:.2f}" if peak else "–",
            f"≤ {LIMIT}",
            megabytes(plain) if plain else f"–, needs about {megabytes(plain_bytes(case))}",
        )
    peaks = [results["peak", case, (RECOMPUTED,)] for case in (cases[0], cases[-1])]
    if None not in peaks:
        growth = (peaks[1] - peaks[0]) / (cases[-1].n_poses - cases[0].n_poses)
        table.add_row("per pose", "", "", f"{growth / 1e6:.3f}")
    return table


def megabytes(size: int | None) -> str:
    """Return bytes as megabytes."""
    return "–" if size is None else f"{size / 1e6:.1f}"


def plain_table(results: Results, cases: list[Case]) -> Table:
    """Return times and differences."""
    table = new_table("figure", "measured", "limit")
    times = results["times", cases[0], (*EMBEDDING_WAYS, FORWARD)]
    if times:
        for way in (RECOMPUTED, FORWARD):
            table.add_row(f"time of {way} / plain's: {cases[0]}", ratio(times, way), "")
    for case in (cases[0], SMALL):
        found, dtype = results["differences", case, EMBEDDING_WAYS], dtype_of(case)
        if found:
            name = f"largest difference of loss and gradients, {dtype}: {case}"
            table.add_row(name, f"{found[RECOMPUTED]:.1e}", f"≤ {PRECISION[dtype]:.0e}")
    return table


def ratio(times: dict[str, list[float]], way: str) -> str:
    """Return the median ratio of the rounds to plain autograd, and that of the fastest steps."""
    rounds = torch.tensor(times[way]) / torch.tensor(times[PLAIN])
    return f"{rounds.quantile(0.5):.2f} ({min(times[way]) / min(times[PLAIN]):.2f})"


def task_table(results: Results) -> Table:
    """Return the modes' times and peaks, as multiples of plain autograd's."""
    table = new_table("", "plain, ms", *MODES, "plain, MB", *MODES)
    for case in task_cases():
        times = results["times", case, (PLAIN, *MODES)]
        plain, *peaks = (results["peak", case, (way,)] for way in (PLAIN, *MODES))
        table.add_row(
            str(case),
            f"{1e3 * min(times[PLAIN]):.0f}" if times else "–",
            *(ratio(times, mode) if times else "–" for mode in MODES),
            megabytes(plain),
            *(f"{peak / plain:.2f}" if peak and plain else "–" for peak in peaks),
        )
    return table


# Many compounds


class Embedding(torch.nn.Linear):
    """A linear pose model for a batch of poses, with an embedding of each."""

    def __init__(self) -> None:
        super().__init__(compounds.N_FEATURES, K)


class ManyCompounds(compounds.Case):
    """Poses of many compounds, and the ways to combine their embeddings.

    Parameters
    ----------
    what, n_compounds : see :class:`compounds.Case`
    """

    def __init__(self, what: str, n_compounds: int) -> None:
        torch.manual_seed(0)
        low, high = (5, 5) if what == "5" else (1, 20)
        sizes = torch.randint(low, high + 1, (n_compounds,))
        poses = torch.randn(int(sizes.sum()), compounds.N_FEATURES)
        self.target = torch.randn(n_compounds)
        self.pose_model, rule = Embedding(), GatedAttention(K)
        self.params = [*self.pose_model.parameters(), *rule.parameters()]

        def by_hand() -> Tensor:
            return attention_by_hand(rule, self.pose_model(poses), sizes)

        def loop() -> Tensor:
            parts = self.pose_model(poses).split(sizes.tolist())
            return torch.stack(list(map(rule.combine, parts)))

        self.ways = {"by hand": by_hand, "loop": loop}
        for mode in (GRAPH, RECOMPUTED):
            model = MultiPoseModel(self.pose_model, rule, gradients=mode)
            self.ways[mode] = partial(self._by_model, model, poses, sizes)

    @staticmethod
    def _by_model(model: MultiPoseModel, poses: Tensor, sizes: Tensor) -> Tensor:
        return model(poses, sizes, collated=True).prediction


def attention_by_hand(rule: GatedAttention, embeddings: Tensor, sizes: Tensor) -> Tensor:
    """Return the numbers of all compounds from one padded batch, shape (n_compounds,)."""
    most = int(sizes.max())
    if bool((sizes == most).all()):
        batch = embeddings.view(len(sizes), most, -1)
        scores = rule.scores(batch)
    else:
        mask = torch.arange(most) < sizes[:, None]
        places = mask.flatten().nonzero().flatten()
        batch = embeddings.new_zeros(mask.numel(), K).index_copy(0, places, embeddings)
        batch = batch.view(len(sizes), most, K)
        scores = rule.scores(batch).masked_fill(~mask[..., None], -torch.inf)
    pooled = (torch.softmax(scores, dim=1) * batch).sum(dim=1)
    return rule.readout(pooled).squeeze(-1)


def many_table(repeats: int) -> Table:
    """Return the times of a training step and of a prediction, as ratios to those by hand."""
    ways = ("loop", GRAPH, RECOMPUTED)
    table = new_table("", "poses", "compounds", "hand, ms", *ways)
    for what, n_compounds in MANY:
        found = compounds.measure(ManyCompounds(what, n_compounds), repeats)
        for step, taken in zip(("training", "prediction"), found, strict=True):
            by_hand = taken["by hand"]
            ratios = [f"{taken[way] / by_hand:.1f}" for way in ways]
            table.add_row(step, what, str(n_compounds), f"{1e3 * by_hand:.2f}", *ratios)
    return table


if __name__ == "__main__":
    main()
