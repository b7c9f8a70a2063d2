"""Measure time and memory of a multi-pose model's training step, and of its alternatives.

    python benchmarks/engine.py [--quick | --trade-off | --allocators] [--preload LIBRARY]
        [--memory GB] [--plots FOLDER] [--json FILE]

The ways are each mode of ``MultiPoseModel``, plain autograd over all poses,
``torch.utils.checkpoint`` for each pose, and the guide's class with a loop that stores a gradient
for each pose. The benchmark checks that all ways compute the same gradients. A step is forward and
backward, without an optimizer.

Times: the ways take turns in one fresh process for each case. A ratio is the median over the
rounds. The ratio of the fastest steps is in brackets. If the two differ, the machine was noisy.
With ``--threads 1`` they are CPU times, which other programs hardly change.

Memory: the highest resident size in a step, minus the size before it. There is a fresh process for
each way. A small step first loads all libraries, and the allocator is pinned. The figure is the
median of three processes. With ``--quick`` it is one process, because processes differ by only
0.1 MB or 1 %, whichever is more.

With ``--allocators``, the allocator is not pinned. Some steps of each way run in fresh processes:
with glibc's defaults, fixed thresholds, and another allocator (``--preload``). Peaks with the
defaults depend on the order of the allocations, and differ by a third from process to process.

G, the graph of a pose, is the sum of the storages that its graph saves, without parameters. F is a
forward without a graph, unless the table says that it has one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import median

import torch
from engine_cases import (
    BARE,
    BASELINES,
    BUILT,
    CHECKPOINT,
    CHUNKED,
    COPY,
    FORWARD,
    GUIDE,
    MODES,
    ONE_BATCH,
    PLAIN,
    POCKET_ATOMS,
    Case,
    Setup,
)
from engine_process import DEFAULTS, SETTINGS, measure
from rich.console import Console
from rich.progress import track
from rich.table import Table

GRAPH, STORED, RECOMPUTED = MODES
SMALL, BIG = 20, 150  # atoms
SHOWN, ALLOCATORS = "trade-off", "allocators"
TIMED = (*BASELINES, *MODES, BARE, FORWARD)
MOLECULES = Case(320, n_compounds=64, pose_model="molecules")
MOLECULE_WAYS = (PLAIN, ONE_BATCH, GRAPH, CHUNKED)
# Each compound has a pocket, which plain autograd and the modes embed once for all poses.
DOCKING = [
    Case(64, 40, 300_000, weights, n_compounds=2, pose_model="docking")
    for weights in ("sharp", "dense")
]
DOCKING_WAYS = (PLAIN, *MODES)
OVERHEAD_OF = (*MODES, CHECKPOINT)
OVERHEAD_WAYS = (*OVERHEAD_OF, BARE, BUILT, COPY)
console = Console(highlight=False, width=int(os.environ.get("COLUMNS", 130)))


@dataclass(frozen=True)
class Job:
    """The measurement of one fresh process."""

    what: str
    case: Case
    ways: tuple[str, ...]
    allocator: str = ""


class Results:
    """All measured figures, by job."""

    def __init__(self) -> None:
        self.raw: list[dict[str, object]] = []
        self._found: dict[tuple[str, Case, str, str], object] = {}

    def add(self, job: Job, found: object) -> None:
        """Keep the figures of a job; there are none if its process was killed."""
        self.raw.append({**asdict(job), "found": found})
        if found is None:
            return
        if job.what == "training" or not isinstance(found, dict):
            found = {job.ways[0]: found}
        for way, figure in found.items():
            self._found[job.what, job.case, way, job.allocator] = figure

    def get(self, what: str, case: Case, way: str, allocator: str = "") -> object:
        """Return a figure, or None."""
        return self._found.get((what, case, way, allocator))

    def seconds(self, case: Case, way: str) -> float | None:
        """Return the median time of a step."""
        taken = self.get("times", case, way)
        return median(taken) if taken else None

    def ratio(self, case: Case, formula: Callable[..., float], *ways: str) -> Ratio | None:
        """Return the value of a formula of the times of some ways."""
        times = [self.get("times", case, way) for way in ways]
        if not all(times):
            return None
        return Ratio(median(map(formula, *times)), formula(*map(min, times)))


@dataclass(frozen=True)
class Ratio:
    """The median ratio over the rounds, and the ratio of the fastest steps."""

    median: float
    fastest: float

    def __str__(self) -> str:
        digits = 2 if abs(self.median) < 20 else 0
        return f"{self.median:.{digits}f} ({self.fastest:.{digits}f})"


def main() -> None:
    """Measure and print."""
    options = parse()
    torch.set_num_threads(options.threads)
    results = Results()
    before = os.getloadavg()[0]
    jobs = list(dict.fromkeys(options.jobs()))
    if options.preload and options.jobs is allocator_jobs:
        jobs += [replace(j, allocator=options.preload) for j in jobs if j.allocator == DEFAULTS]
    jobs = [job for job in (fitting(job, options.memory) for job in jobs) if job.ways]
    stopped = False
    try:
        for job in track(jobs, "measuring", console=Console(stderr=True), transient=True):
            results.add(job, found(job, options))
            if options.json:
                options.json.write_text(json.dumps(results.raw, indent=1) + "\n", encoding="utf-8")
    except KeyboardInterrupt:  # all takes hours, and what has been measured is worth a look
        stopped, jobs = True, jobs[: len(results.raw)]
    console.print(
        f"{options.threads} threads, torch {torch.__version__}; load of the machine"
        f" {before:.1f} before, {os.getloadavg()[0]:.1f} after; cases above"
        f" {options.memory:.0f} GB are left out" + ("; stopped, a part of it" if stopped else "")
    )
    report(results, jobs, options.memory)
    if options.plots:
        from engine_plots import save_plots

        save_plots(results, families(jobs), options.plots)
    if stopped:
        sys.exit(130)


def found(job: Job, options: argparse.Namespace) -> object:
    """Return the figures of a job; a peak is the median of three processes (one with --quick)."""
    ask = partial(measure, job.what, job.case, job.ways, threads=options.threads)
    if job.what == "times":
        return ask(seconds=options.seconds)
    if job.what == "training":
        return training(
            [ask(allocator=job.allocator, n_steps=options.steps) for _ in range(options.processes)]
        )
    if job.what != "peak":
        return ask()
    sizes = [ask() for _ in range(1 if options.quick else 3)]
    return None if None in sizes else int(median(sizes))


def training(found: list[dict[str, float] | None]) -> dict[str, float] | None:
    """Return the medians of the figures of several processes."""
    if None in found:
        return None
    return {figure: median(one[figure] for one in found) for figure in ("peak", "seconds")}


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group()
    parser.set_defaults(jobs=full_jobs)
    for flag, jobs, what in (
        ("quick", quick_jobs, "targets"),
        (SHOWN, trade_off_jobs, "picture"),
        (ALLOCATORS, allocator_jobs, "allocators"),
    ):
        text = f"the cases of the {what} alone"
        which.add_argument(f"--{flag}", dest="jobs", action="store_const", const=jobs, help=text)
    parser.add_argument("--preload", metavar="LIBRARY", help="an allocator, for --allocators")
    parser.add_argument("--processes", type=int, default=1, help="of --allocators, for each figure")
    parser.add_argument("--steps", type=int, default=5, help="of --allocators, in each process")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", type=float, metavar="GB", help="default: half of what is free")
    parser.add_argument("--seconds", type=float, help="to take times of a case; default 15, or 2")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="needs matplotlib")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the raw figures")
    options = parser.parse_args()
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    options.memory = options.memory or free / 2e9
    options.quick = options.jobs is not full_jobs
    options.seconds = options.seconds or (2.0 if options.quick else 15.0)
    return options


# What is measured


def quick_jobs() -> Iterator[Job]:
    """Yield the cases of the targets."""
    yield from jobs_of(Case(32, BIG, 3_000_000, "sharp"))
    dense = Case(32, BIG, 3_000_000, "dense")
    yield Job("times", dense, (PLAIN, STORED, RECOMPUTED, BARE, FORWARD))
    for mode in (STORED, RECOMPUTED):
        yield Job("peak", dense, (mode,))
    yield Job("estimated", dense, MODES)
    yield from jobs_of(Case(128, SMALL, 3_000_000, "sharp"))
    yield Job("times", MOLECULES, MOLECULE_WAYS)
    yield from docking_jobs()
    for case in overheads(((4, 1000), (40, 10_000), (40, 1_000_000))):
        yield Job("times", case, OVERHEAD_WAYS)
    for mode in MODES:
        yield Job("thousand_steps", Case(8, pose_model="vector"), (mode,))
    for case in growth_in_poses((1, 10, 100)):
        yield from jobs_of(case, MODES)


def trade_off_jobs() -> Iterator[Job]:
    """Yield the cases of the picture in docs/explanation/gradients-per-pose.md."""
    for case in trade_off_cases()[:2]:
        yield Job("times", case, (*BASELINES, *MODES))
        for way in (*BASELINES, *MODES):
            yield Job("peak", case, (way,))


def allocator_jobs() -> Iterator[Job]:
    """Yield the cases whose memory is measured as users have it."""
    for n_poses, n_atoms in ((16, 120), (32, BIG), (72, BIG)):
        case = Case(n_poses, n_atoms, 3_000_000, "sharp")
        for allocator in SETTINGS:
            for way in (PLAIN, *MODES, CHECKPOINT):
                yield Job("training", case, (way,), allocator)


def full_jobs() -> Iterator[Job]:
    """Yield the other cases, and then the whole matrix."""
    yield Job("times", MOLECULES, MOLECULE_WAYS)
    yield from docking_jobs()
    for case in overheads(((4, 1000), (10, 3000), (40, 10_000), (100, 30_000), (40, 1_000_000))):
        yield Job("times", case, OVERHEAD_WAYS)
    for mode in MODES:
        yield Job("thousand_steps", Case(8, pose_model="vector"), (mode,))
        yield Job("thousand_steps", Case(4, SMALL, 100_000), (mode,))
    for case in (
        *growth_in_poses((1, 3, 10, 32, 100, 320, 1000)),
        *growth_in_parameters(),
        *growth_in_compounds(),
    ):
        yield from jobs_of(case)
    for case in sorted(matrix(), key=lambda case: case.n_poses * case.n_atoms):
        yield from jobs_of(case)


def docking_jobs() -> Iterator[Job]:
    """Yield the jobs of the cases with a shared pocket."""
    for case in DOCKING:
        yield Job("times", case, DOCKING_WAYS)
        for way in DOCKING_WAYS:
            yield Job("peak", case, (way,))
        yield Job("estimated", case, MODES)


def matrix() -> Iterator[Case]:
    """Yield poses × atoms × parameters × weights."""
    for n_atoms in (SMALL, BIG):
        for n_parameters in (100_000, 3_000_000, 30_000_000):
            for n_poses in (1, 8, 32, 128):
                for weights in ("sharp", "dense"):
                    yield Case(n_poses, n_atoms, n_parameters, weights)


def overheads(sizes: Iterable[tuple[int, int]]) -> Iterator[Case]:
    """Yield cases with tiny pose models, for several numbers of tensors and parameters."""
    for n_tensors, n_parameters in sizes:
        for weights in ("dense", "sharp"):
            yield Case(
                100,
                n_parameters=n_parameters,
                weights=weights,
                pose_model="vector",
                n_tensors=n_tensors,
            )


def growth_in_poses(numbers: Iterable[int]) -> list[Case]:
    return [Case(n) for n in numbers]


def growth_in_parameters() -> list[Case]:
    return [Case(8, n_parameters=n) for n in (100_000, 1_000_000, 10_000_000, 30_000_000)]


def growth_in_compounds() -> list[Case]:
    return [Case(4 * n, n_compounds=n) for n in (1, 8, 64, 250)]


def trade_off_cases() -> list[Case]:
    big = [Case(32, BIG, 3_000_000, weights) for weights in ("sharp", "dense")]
    return [*big, Case(128, SMALL, 3_000_000, "sharp")]


def families(jobs: list[Job]) -> dict[str, list[Case]]:
    """Return the groups of cases that are drawn together."""
    timed = set(of(jobs, MODES))
    grown = {
        "poses": growth_in_poses((1, 3, 10, 32, 100, 320, 1000)),
        "parameters": growth_in_parameters(),
        "compounds": growth_in_compounds(),
    }
    grown[SHOWN] = trade_off_cases()
    return {what: [case for case in cases if case in timed] for what, cases in grown.items()}


def jobs_of(case: Case, ways: tuple[str, ...] = TIMED) -> Iterator[Job]:
    """Yield the jobs that measure time and memory of a case."""
    yield Job("times", case, (*ways, *(w for w in (BARE, FORWARD) if w not in ways)))
    for way in ways:
        if way in (*BASELINES, *MODES):
            yield Job("peak", case, (way,))
    yield Job("estimated", case, MODES)


def fitting(job: Job, gigabytes: float) -> Job:
    """Return the job without the ways that would not fit into memory."""
    if job.what == "estimated":  # no more than one graph at a time
        return job
    ways = tuple(way for way in job.ways if needed(job.case, way) <= 1e9 * gigabytes)
    return replace(job, ways=ways)


def needed(case: Case, way: str) -> float:
    """Return about how many bytes a way will take."""
    per_graph = graph_bytes(case) if case.pose_model in ("pairs", "docking") else 0
    graphs = case.n_poses if way in (PLAIN, GRAPH) else 1
    # The guide's way holds all gradients of the biggest parameter three times: stored, weighted,
    # stacked.
    gradients = {GUIDE: 3 * case.n_poses, STORED: case.n_poses + 2}.get(way, 2)
    return graphs * per_graph + gradients * case.n_bytes


def graph_bytes(case: Case) -> int:
    """Return G, the bytes that the graph of one pose keeps alive."""
    return _graph_bytes(case.n_atoms, case.n_parameters)


@cache
def _graph_bytes(n_atoms: int, n_parameters: int) -> int:
    return Setup(Case(1, n_atoms, n_parameters)).graph_bytes()


# What is printed


def report(results: Results, jobs: list[Job], gigabytes: float) -> None:
    """Print all tables."""
    timed = set(of(jobs, (PLAIN,)))
    cases = [case for case in matrix() if case in timed]
    families_of_growth = (of_one for what, of_one in families(jobs).items() if what != SHOWN)
    grown = list(dict.fromkeys(case for of_one in families_of_growth for case in of_one))
    tables = {
        "A training step[/]: time, as a multiple of plain autograd's": times_table(
            results, cases, gigabytes
        ),
        "A training step[/]: peak memory, MB (as a multiple of G + 2 P)": memory_table(
            results, cases, gigabytes
        ),
        "MultiPoseModel.estimate[/]: expected memory / measured peak": estimate_table(
            results, jobs, gigabytes
        ),
        "What the modes add[/]: times; F and B of the pose model alone": additions_table(
            results, cases
        ),
        f"Small molecules[/] with PyG's SchNet: {MOLECULES}": molecules_table(results),
        f"Docking[/] in a pocket of {POCKET_ATOMS} atoms, the shared part: time and peak memory, as"
        " multiples of plain autograd's": docking_table(results, gigabytes),
        "Beyond forwards with their graphs, and backwards[/]: µs per pose": overhead_table(
            results, list(of(jobs, (COPY,)))
        ),
        "1,000 steps[/]: resident size, MB": thousand_table(results, jobs),
        "Growth[/]: ms of a step per pose, and peak memory in MB": growth_table(
            results, grown, gigabytes
        ),
        "Allocators[/]: peak memory of some steps and CPU time of the last; multiples of plain"
        " autograd's with the same allocator": allocator_table(results, jobs),
        "Targets[/]": targets_table(results),
    }
    for title, table in tables.items():
        if table.row_count:
            console.print(f"\n[bold]{title}")
            console.print(table)


def of(jobs: list[Job], ways: Iterable[str]) -> Iterator[Case]:
    """Yield the cases in which any of these ways was timed."""
    for job in jobs:
        timed = job.what == "times" and job.case.pose_model not in ("molecules", "docking")
        if timed and set(ways) & set(job.ways):
            yield job.case


def new_table(*columns: str) -> Table:
    table = Table(*columns, box=None, header_style="bold", pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def times_table(results: Results, cases: list[Case], gigabytes: float) -> Table:
    """Return seconds of plain autograd, and the other ways as multiples of it or in seconds."""
    table = new_table("", "weights ≠ 0", "plain, s", *(way for way in TIMED if way != PLAIN))
    for case in cases:
        cells = [results.get("times", case, "n_weights"), results.seconds(case, PLAIN)]
        row = ["–" if cells[0] is None else f"{cells[0]}"]
        row.append(left_out(case, PLAIN, gigabytes) if cells[1] is None else f"{cells[1]:.3f}")
        for way in TIMED:
            if way != PLAIN:
                row.append(time_cell(results, case, way, gigabytes))
        table.add_row(str(case), *row)
    return table


def time_cell(results: Results, case: Case, way: str, gigabytes: float) -> str:
    ratio, seconds = results.ratio(case, over, way, PLAIN), results.seconds(case, way)
    if ratio:
        return str(ratio)
    return left_out(case, way, gigabytes) if seconds is None else f"{seconds:.2f} s"


def left_out(case: Case, way: str, gigabytes: float) -> str:
    """Return the reason for a missing figure, if it is the memory."""
    needs = needed(case, way) / 1e9
    return f"–, needs about {needs:.0f} GB" if needs > gigabytes else "–"


def over(one: float, other: float) -> float:
    return one / other


def memory_table(results: Results, cases: list[Case], gigabytes: float) -> Table:
    table = new_table("", "G", "P", *BASELINES, *MODES)
    for case in cases:
        sizes = graph_bytes(case), case.n_bytes
        cells = [memory_cell(results, case, way, gigabytes) for way in (*BASELINES, *MODES)]
        table.add_row(str(case), *(f"{size / 1e6:.1f}" for size in sizes), *cells)
    return table


def memory_cell(results: Results, case: Case, way: str, gigabytes: float) -> str:
    found = results.get("peak", case, way)
    if found is None:
        return left_out(case, way, gigabytes)
    return f"{found / 1e6:.0f} ({found / least_bytes(case):.2f})"


def estimate_table(results: Results, jobs: list[Job], gigabytes: float) -> Table:
    """Return the estimated memory of a step, with the gradient and the gradient to be added."""
    table = new_table("", *MODES)
    for case in [job.case for job in jobs if job.what == "estimated"]:
        cells = []
        for mode in MODES:
            expected, found = (results.get(what, case, mode) for what in ("estimated", "peak"))
            cell = left_out(case, mode, gigabytes)
            cells.append(f"{expected / found:.2f}" if expected and found else cell)
        table.add_row(str(case), *cells)
    return table


def least_bytes(case: Case) -> float:
    """Return G + 2 P: one graph, a sum of gradients, and the gradient to be added."""
    return graph_bytes(case) + 2 * case.n_bytes


def additions_table(results: Results, cases: list[Case]) -> Table:
    """Compare recomputation with its least cost, and stored gradients with discarded ones."""
    columns = ("F, ms", "F + B, ms", "recomputed / plain", "1 + F/(F+B)", "stored / thrown away")
    table = new_table("", *columns)
    for case in cases:
        cells = [results.seconds(case, FORWARD), results.seconds(case, BARE)]
        row = ["–" if taken is None else f"{1e3 * taken / case.n_poses:.2f}" for taken in cells]
        ratios = (
            results.ratio(case, over, RECOMPUTED, PLAIN),
            expected(results, case) if case.weights == "dense" else "",
            results.ratio(case, over, STORED, BARE),
        )
        table.add_row(str(case), *row, *("–" if r is None else str(r) for r in ratios))
    return table


def expected(results: Results, case: Case) -> Ratio | None:
    """Return 1 + F/(F + B), the least cost of running all poses again."""
    return results.ratio(case, lambda forward, both: 1 + forward / both, FORWARD, BARE)


def molecules_table(results: Results) -> Table:
    table = new_table("", "ms", "loop over poses / this", "this / plain, one batch")
    for way in MOLECULE_WAYS:
        seconds = results.seconds(MOLECULES, way)
        if seconds is None:
            continue
        ratios = (
            results.ratio(MOLECULES, over, PLAIN, way),
            results.ratio(MOLECULES, over, way, ONE_BATCH),
        )
        name = {PLAIN: "loop over poses", GRAPH: "graph, collate=Batch.from_data_list"}.get(
            way, way
        )
        cells = ("–" if ratio is None else str(ratio) for ratio in ratios)
        table.add_row(name, f"{1e3 * seconds:.0f}", *cells)
    return table


def docking_table(results: Results, gigabytes: float) -> Table:
    table = new_table("", "weights ≠ 0", "plain, s", *MODES, "plain, MB", *MODES)
    for case in DOCKING:
        n_weights, seconds = results.get("times", case, "n_weights"), results.seconds(case, PLAIN)
        if seconds is None:
            continue
        times = [time_cell(results, case, mode, gigabytes) for mode in MODES]
        plain = results.get("peak", case, PLAIN)
        sizes = [results.get("peak", case, mode) for mode in MODES]
        memory = [f"{size / plain:.3f}" if size and plain else "–" for size in sizes]
        in_all = f"{plain / 1e6:.0f}" if plain else "–"
        table.add_row(str(case), f"{n_weights}", f"{seconds:.3f}", *times, in_all, *memory)
    return table


def overhead_table(results: Results, cases: list[Case]) -> Table:
    table = new_table(
        "", "F, with graph", "F + B", "one copy of P", *OVERHEAD_OF, "aim of the modes"
    )
    for case in cases:
        own, copy = (results.seconds(case, way) for way in (BARE, COPY))
        if own is None or copy is None:
            continue
        built = results.seconds(case, BUILT)
        row = [
            *(f"{1e6 * taken / case.n_poses:.0f}" for taken in (built, own)),
            f"{1e6 * copy:.1f}",
        ]
        row += [str(overhead(results, case, way)) for way in OVERHEAD_OF]
        name = f"{case.n_poses} poses, {case.n_tensors} tensors, {case.millions}, {case.weights}"
        table.add_row(name, *row, f"{allowed(results, case):.0f}")
    return table


def overhead(results: Results, case: Case, way: str) -> Ratio:
    """Return µs per pose beyond the pose model's own forwards and backwards.

    A forward makes its graph. A pose with weight zero needs a backward only in ``stored`` and with
    ``checkpoint``. The other poses need a second forward in ``recomputed``.
    """
    share = results.get("times", case, "n_weights") / case.n_poses

    def beyond(taken: float, both: float, forward: float) -> float:
        own = {
            GRAPH: forward + share * (both - forward),
            STORED: both,
            RECOMPUTED: forward + share * both,
            CHECKPOINT: forward + both,
        }
        return 1e6 * (taken - own[way]) / case.n_poses

    return results.ratio(case, beyond, way, BARE, BUILT)


def allowed(results: Results, case: Case) -> float:
    """Return the limit in µs per pose: 50, plus 2 for each tensor, plus three copies of P."""
    return 50 + 2 * case.n_tensors + 3e6 * results.seconds(case, COPY)


def thousand_table(results: Results, jobs: list[Job]) -> Table:
    table = new_table("", "mode", "after 100 steps", "after 1,000", "more")
    for job in jobs:
        found = results.get(job.what, job.case, job.ways[0])
        if job.what == "thousand_steps" and found:
            early, late = (size / 1e6 for size in found)
            cells = (f"{early:.1f}", f"{late:.1f}", f"{late - early:+.1f}")
            table.add_row(str(job.case), job.ways[0], *cells)
    return table


def growth_table(results: Results, cases: list[Case], gigabytes: float) -> Table:
    ways = (PLAIN, *MODES)
    table = new_table("", *(f"{way}, {unit}" for way in ways for unit in ("ms", "MB")))
    for case in cases:
        row = []
        for way in ways:
            seconds, size = results.seconds(case, way), results.get("peak", case, way)
            nothing = left_out(case, way, gigabytes)
            row.append(nothing if seconds is None else f"{1e3 * seconds / case.n_poses:.2f}")
            row.append("" if size is None else f"{size / 1e6:.1f}")
        table.add_row(str(case), *row)
    return table


def allocator_table(results: Results, jobs: list[Job]) -> Table:
    """Return peaks and times of the ways, relative to plain autograd with the same allocator."""
    ways = (*MODES, CHECKPOINT)
    table = new_table("", "allocator", "plain, MB", *ways, "plain, s", *ways)
    rows = dict.fromkeys((job.case, job.allocator) for job in jobs if job.what == "training")
    for case, allocator in rows:
        cells = []
        for figure, unit in (("peak", 1e6), ("seconds", 1.0)):
            found = [results.get("training", case, way, allocator) for way in (PLAIN, *ways)]
            plain, *others = [one and one[figure] / unit for one in found]
            cells.append(f"{plain:.{0 if figure == 'peak' else 2}f}" if plain else "–")
            cells += [f"{one / plain:.2f}" if one and plain else "–" for one in others]
        table.add_row(str(case), Path(allocator).name, *cells)
    return table


def targets_table(results: Results) -> Table:
    table = new_table("figure", "measured", "aim")
    for figure, found, aim in targets(results):
        if found is not None:
            table.add_row(figure, str(found), aim)
    return table


def targets(results: Results) -> Iterator[tuple[str, object, str]]:
    """Yield the name, the measured value and the aim of each figure."""
    sharp, dense = (Case(32, BIG, 3_000_000, weights) for weights in ("sharp", "dense"))
    many = Case(128, SMALL, 3_000_000, "sharp")
    time = results.ratio(sharp, over, RECOMPUTED, PLAIN)
    yield f"recomputed, time / plain's: {sharp}", time, "≤ 0.55"
    for case in (sharp, dense):
        size = results.get("peak", case, RECOMPUTED)
        multiple = None if size is None else f"{size / least_bytes(case):.2f}"
        yield f"recomputed, memory / (G + 2 P): {case}", multiple, "≤ 1.25"
    aim = expected(results, dense)
    time = results.ratio(dense, over, RECOMPUTED, PLAIN)
    upper = (
        "1 + F/(F+B) + 0.1"
        if aim is None
        else f"≤ {aim.median + 0.1:.2f} ({aim.fastest + 0.1:.2f})"
    )
    yield f"recomputed, time / plain's: {dense}", time, upper
    sizes = [results.get("peak", many, way) for way in (GUIDE, RECOMPUTED)]
    times = f"{sizes[0] / sizes[1]:.0f} ×" if all(sizes) else None
    yield f"recomputed, memory below the guide's: {many}", times, "≥ 40 ×"
    for case in (sharp, dense, many):
        yield (
            f"stored, time / gradients thrown away: {case}",
            results.ratio(case, over, STORED, BARE),
            "≤ 1.15",
        )
    for way in (GRAPH, CHUNKED):
        yield (
            f"small molecules: loop over poses / {way}",
            results.ratio(MOLECULES, over, PLAIN, way),
            "≥ 5",
        )
    yield (
        "small molecules: graph / plain, one batch",
        results.ratio(MOLECULES, over, GRAPH, ONE_BATCH),
        "≤ 1.15",
    )
    for case in overheads(((4, 1000), (40, 10_000), (40, 1_000_000))):
        for mode in MODES if results.seconds(case, BARE) else ():
            what = f"{case.n_tensors} tensors, {case.millions}, {case.weights}"
            found = overhead(results, case, mode)
            yield (
                f"{mode}, µs per pose of its own: {what}",
                found,
                f"≤ {allowed(results, case):.0f}",
            )


if __name__ == "__main__":
    main()
