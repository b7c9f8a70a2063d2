"""Compare a training step's time and memory with those of another version of ``mtenn_core``.

    git worktree add --detach ../before COMMIT
    python benchmarks/against.py ../before [--quick] [--json FILE]

Each figure is this checkout's, divided by the other's. So 0.9 means that this checkout takes 10 %
less. Both versions run the cases of this checkout, with the installed plugins.

Times: there is one process for each version. In a round they take turns: other, this, this, other.
Each has one thread, and the times are CPU times. A ratio is the median over the rounds; ± is its
standard error. The other ratio is that of the fastest turns. If the two differ, the machine was
noisy. Other programs change CPU times too: equal versions give 0.98 to 1.02 only if no more
programs run than the machine has cores.

Memory: as in ``engine.py``, with one fresh process for each version, and the megabytes of this
checkout. The figures of equal versions differ by up to 0.2 MB, so the tiny pose models have none.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import quantiles

from engine import BIG, SMALL, console, new_table
from engine_cases import MODES, PLAIN, Case
from engine_process import Worker, measure
from rich.console import Console
from rich.progress import track
from rich.table import Table

THIS = Path(__file__).parents[1]
# Atoms and poses. 32 big poses would take minutes more and 5 GB, and 8 show the same.
SIZES = ((SMALL, 32), (BIG, 8))
TURN = 0.02  # seconds, at least; a turn has at least one step
MIN_ROUNDS = 5


@dataclass
class Cell:
    """The figures of a case and a mode.

    Attributes
    ----------
    other, this : CPU seconds of a step, one figure for each turn, two for each round
    memory : bytes of the other version and of this one
    """

    case: Case
    mode: str
    other: list[float] = field(default_factory=list)
    this: list[float] = field(default_factory=list)
    memory: tuple[int | None, ...] = ()


def main() -> None:
    """Measure and print."""
    options = parse()
    cells = [Cell(case, mode) for case in all_cases(options.quick) for mode in MODES]
    sized = [cell for cell in cells if cell.case.pose_model == "pairs"]
    if options.quick:
        sized = [cell for cell in sized if cell.case.weights == "dense"]
    with closing(Worker(options.checkout)) as other, closing(Worker(THIS)) as this:
        jobs = [partial(add_times, cell, other, this, options.seconds) for cell in cells]
        jobs += [partial(add_memory, cell, options.checkout) for cell in sized]
        for job in track(jobs, "measuring", console=Console(stderr=True), transient=True):
            job()
            if options.json:
                found = json.dumps([asdict(cell) for cell in cells], indent=1)
                options.json.write_text(found + "\n", encoding="utf-8")
    console.print(f"[bold]A training step[/] of {THIS} / of {options.checkout}")
    console.print(table(cells))


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="a folder with another mtenn_core")
    parser.add_argument("--quick", action="store_true", help="leave out the slow figures")
    parser.add_argument("--seconds", type=float, help="to take times of a mode; default 4, or 2")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the raw figures")
    options = parser.parse_args()
    options.checkout = options.checkout.resolve()
    options.seconds = options.seconds or (2.0 if options.quick else 4.0)
    return options


def all_cases(quick: bool) -> Iterator[Case]:
    """Yield the cases: with the mean all poses count, and with the minimum one does."""
    for weights in ("dense", "sharp"):
        for n_tensors, n_parameters in ((4, 1000), (40, 10_000)):
            yield Case(
                32,
                n_parameters=n_parameters,
                weights=weights,
                pose_model="vector",
                n_tensors=n_tensors,
            )
        for n_atoms, n_poses in SIZES[:1] if quick else SIZES:
            yield Case(n_poses, n_atoms, weights=weights)


def add_times(cell: Cell, other: Worker, this: Worker, seconds: float) -> None:
    """Measure the times of a cell in rounds."""
    if cell.mode == MODES[0]:
        for worker in (other, this):
            worker.send("set_up", asdict(cell.case), (PLAIN, *MODES))
        for worker in (other, this):
            worker.receive()
    turns = [(other, cell.other), (this, cell.this)]
    begin = time.perf_counter()
    while len(cell.this) < 2 * MIN_ROUNDS or time.perf_counter() - begin < seconds:
        for worker, taken in (*turns, *reversed(turns)):  # a steady drift of the machine cancels
            taken.append(worker.ask("seconds", cell.mode, TURN))


def add_memory(cell: Cell, checkout: Path) -> None:
    """Measure the memory of both versions at the same time."""
    ask = partial(measure, "peak", cell.case, (cell.mode,), threads=1)
    with ThreadPoolExecutor() as pool:
        cell.memory = tuple(pool.map(lambda folder: ask(checkout=folder), (checkout, THIS)))


def table(cells: Sequence[Cell]) -> Table:
    """Return all ratios, one row for each cell."""
    found = new_table("", "mode", "time", "±", "fastest", "memory", "MB")
    for cell in cells:
        tensors = f", {cell.case.n_tensors} tensors" if cell.case.pose_model == "vector" else ""
        name = f"{cell.case}{tensors}" if cell.mode == MODES[0] else ""
        found.add_row(name, cell.mode, *time_cells(cell), *memory_cells(cell))
    return found


def time_cells(cell: Cell) -> list[str]:
    """Return the median ratio of the rounds, its standard error, and that of the fastest turns."""
    rounds = [a / b for a, b in zip(of_rounds(cell.this), of_rounds(cell.other), strict=True)]
    low, middle, high = quantiles(rounds, n=4, method="inclusive")
    # Of a normal distribution: its median's error is 1.25 σ / √n, and 1.35 σ is between quartiles.
    error = 1.25 / 1.35 * (high - low) / math.sqrt(len(rounds))
    fastest = min(cell.this) / min(cell.other)
    return [f"{figure:.3f}" for figure in (middle, error, fastest)]


def of_rounds(turns: list[float]) -> list[float]:
    """Return the sum of the two turns of each round."""
    return [sum(pair) for pair in zip(turns[::2], turns[1::2], strict=True)]


def memory_cells(cell: Cell) -> list[str]:
    """Return the ratio, and the megabytes of this version."""
    if not cell.memory or None in cell.memory:
        return ["–", "–"]
    other, this = cell.memory
    return [f"{this / other:.3f}", f"{this / 1e6:.1f}"]


if __name__ == "__main__":
    main()
