"""Time the scoring of a library against the bare pose model, and measure its memory.

    python benchmarks/screening.py [--threads 1] [--repeats 9] [--json FILE]

The pose model is the SchNet of the FreeSolv demo, and the library FreeSolv with 5 conformers of
each molecule, or 1 to 5 in turn. All ways run the same batches without gradients. Each of them
takes turns with the pose model alone, and the ratio is the median over these pairs. Times are CPU
time, which depends less on what else runs on the machine.
"""

import argparse
import itertools
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mtenn_core import MultiPoseModel, registry

sys.path.append(str(Path(__file__).parents[1] / "examples/screening"))
sys.path.append(str(Path(__file__).parents[1] / "examples/freesolv"))
from conformers import Measurement, collate, read_measurements, with_conformers
from pose_model import ConformerSchNet
from scoring import Compound, append_scores, batches, score

N_CONFORMERS = 5
TIMED_MOLECULES = 128
MAX_POSES = (40, 256)
# All batches are equal. Otherwise, the peak would be that of the largest batch so far.
MEMORY_MOLECULES = 12
MEMORY_BATCHES = (1, 10, 100, 1000)
PROCESS = Path("/proc/self")
LIMIT = 1.1
BARE, MODEL = "pose model alone", "MultiPoseModel"
WITH_COLLATE = " + collate"
ROWS = "score() of example"
COMPARED = {MODEL: BARE, MODEL + WITH_COLLATE: BARE + WITH_COLLATE, ROWS: BARE + WITH_COLLATE}


Way = Callable[[], object]


def with_poses(measurements: Iterable[Measurement], *, ragged: bool = False) -> Iterator[Compound]:
    """Yield names and conformers, which are made when they are needed.

    Parameters
    ----------
    ragged : the molecules have 1 to ``N_CONFORMERS`` conformers in turn, instead of all of them
    """
    molecules = with_conformers(measurements, N_CONFORMERS, threads=1)
    for number, molecule in enumerate(molecules):
        n_poses = 1 + number % N_CONFORMERS if ragged else N_CONFORMERS
        yield molecule.measurement.name, molecule.conformers[:n_poses]


def make_ways(model: MultiPoseModel, batch: list[Compound]) -> dict[str, Way]:
    """Return functions that run the same batch of compounds in different ways."""
    poses = [pose for _, own in batch for pose in own]
    sizes = torch.tensor([len(own) for _, own in batch])
    collated = collate(poses)
    return {
        BARE: lambda: model.pose_model(collated),
        MODEL: lambda: model(collated, sizes, collated=True),
        BARE + WITH_COLLATE: lambda: model.pose_model(collate(poses)),
        MODEL + WITH_COLLATE: lambda: model(poses, sizes),
        ROWS: lambda: score(model, batch),
    }


@torch.inference_mode()
def add_pairs(ways: dict[str, Way], pairs: dict[str, list[tuple[float, float]]]) -> None:
    """Time each way next to the pose model alone. Record both CPU times."""
    for name in COMPARED:
        for names in ((COMPARED[name], name), (name, COMPARED[name])):
            seconds = {}
            for one in names:
                start = time.process_time()
                ways[one]()
                seconds[one] = time.process_time() - start
            pairs[name].append((seconds[name], seconds[COMPARED[name]]))


def timed_pairs(
    model: MultiPoseModel, max_poses: int, repeats: int, *, ragged: bool
) -> dict[str, list[tuple[float, float]]]:
    """Return pairs of CPU times for each way: its own, and that of the pose model alone."""
    compounds = with_poses(read_measurements()[:TIMED_MOLECULES], ragged=ragged)
    ways = [make_ways(model, batch) for batch in batches(compounds, max_poses)]
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in COMPARED}
    add_pairs(ways[0], {name: [] for name in COMPARED})  # warm up
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for of_batch in progress.track(ways * repeats, description="measuring time"):
            add_pairs(of_batch, pairs)
    return pairs


def memory_of(model: MultiPoseModel) -> list[tuple[int, float, float]]:
    """Return for some numbers of batches the peak and the present memory, in MB above the start."""
    if not (PROCESS / "clear_refs").exists():
        return []
    chosen = read_measurements()[::50][:MEMORY_MOLECULES]
    of_batch = list(with_poses(chosen))
    compounds = itertools.chain.from_iterable(itertools.repeat(of_batch))
    found = []
    with TemporaryDirectory() as folder:
        path = Path(folder) / "0.csv"
        written = append_scores(path, model, compounds, MEMORY_MOLECULES * N_CONFORMERS)
        (PROCESS / "clear_refs").write_text("5")  # the peak starts again from here
        before = resident_bytes("VmRSS")
        for number, _ in enumerate(itertools.islice(written, MEMORY_BATCHES[-1]), start=1):
            if number in MEMORY_BATCHES:
                peak, now = (resident_bytes(field) - before for field in ("VmHWM", "VmRSS"))
                found.append((number, peak / 1e6, now / 1e6))
    return found


def resident_bytes(field: str) -> int:
    """Return VmRSS (now) or VmHWM (peak) of this process."""
    status = (PROCESS / "status").read_text()
    (kibibytes,) = re.findall(rf"^{field}:\s+(\d+) kB$", status, flags=re.MULTILINE)
    return 1024 * int(kibibytes)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    combination = registry.create("boltzmann", kT=0.593)
    pose_model = ConformerSchNet(mean=-3.8, std=3.8)
    model = MultiPoseModel(pose_model, combination, collate=collate).eval()
    console = Console(highlight=False)
    memory = memory_of(model)
    console.print(
        f"SchNet, {TIMED_MOLECULES} molecules,"
        f" {options.threads} thread(s), torch {torch.__version__}.\nMedians over batches and"
        f" {options.repeats} repeats: CPU time of a batch, and its ratio to the pose model alone."
    )
    table = new_table("poses", "in a batch", "", "alone, ms", "ms", "ratio", "limit")
    figures: dict[str, object] = {"memory": memory}
    for ragged, max_poses in itertools.product((False, True), MAX_POSES):
        poses = f"1 to {N_CONFORMERS}" if ragged else str(N_CONFORMERS)
        found = timed_pairs(model, max_poses, options.repeats, ragged=ragged)
        for name, pairs in found.items():
            own, alone = (1e3 * statistics.median(column) for column in zip(*pairs, strict=True))
            ratio = statistics.median(own / alone for own, alone in pairs)
            figures[f"{name}, {poses} poses, {max_poses} in a batch"] = ratio
            limit = f"≤ {LIMIT}" if name != ROWS else ""
            cells = f"{alone:.1f}", f"{own:.1f}", f"{ratio:.3f}"
            table.add_row(poses, str(max_poses), name, *cells, limit)
    console.print(table)
    console.print(f"\nMemory while a library is scored, {MEMORY_MOLECULES} molecules in a batch:")
    table = new_table("batches", "peak, MB", "now, MB")
    for number, peak, now in memory:
        table.add_row(str(number), f"{peak:.1f}", f"{now:.1f}")
    console.print(table if memory else "only on Linux")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def new_table(*titles: str) -> Table:
    """Return an empty table whose columns of numbers are on the right."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for title in titles:
        table.add_column(title, justify="right" if title else "left")
    return table


if __name__ == "__main__":
    main()
