"""Time ``mtenn combine`` over a large table, and compare it with a mean by polars.

    python benchmarks/tables.py [--quick] [--rows 10000000] [--compounds 200000] [--repeats 5]

Both read the same file and take turns. "polars" is its own group-by mean: it scans the file,
averages the scores of each compound, and no more. "mtenn combine" is the command in this process,
once torch and polars are imported, as polars is: it validates the combination, checks each line and
each value, combines the poses, derives weights and effective poses, and writes the results. The
ratio is that of the fastest turns. The peaks of memory are those of new processes, less the memory
of one that only imports. The limit of the ratio is 5.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import polars
from click.testing import CliRunner
from rich.console import Console
from rich.table import Table

from mtenn_core._cli import main as mtenn

LIMIT = 5.0
ORDERS = ("by compound", "shuffled")
WAYS = ("polars", "mtenn combine")
MIB = 2**20


def write_table(path: Path, n_rows: int, n_compounds: int, order: str) -> None:
    """Write a CSV file with random scores of three decimals, as from docking."""
    generator = np.random.default_rng(0)
    compounds = np.concatenate(
        [np.arange(n_compounds), generator.integers(0, n_compounds, n_rows - n_compounds)]
    )
    compounds.sort()
    if order == "shuffled":
        generator.shuffle(compounds)
    frame = polars.DataFrame(
        {
            "compound": polars.Series(compounds).cast(polars.String).str.zfill(9),
            "pose": np.arange(n_rows) % 100,
            "score": generator.normal(-7.0, 1.0, n_rows).round(3),
        }
    )
    names = polars.concat_str(polars.lit("ZINC"), "compound").alias("compound")
    frame.with_columns(names).write_csv(path)


def by_polars(path: Path, out: Path) -> None:
    """Write the mean score of each compound."""
    scan = polars.scan_csv(path).group_by("compound").agg(polars.col("score").mean())
    scan.collect().write_csv(out)


def by_mtenn(path: Path, out: Path) -> None:
    """Write the Boltzmann mean of each compound, and all that the command finds out besides."""
    columns = ["--by", "compound", "--column", "score", "--out", str(out), "--force"]
    command = ["combine", str(path), "boltzmann", "--arg", "kT=0.593", *columns]
    result = CliRunner().invoke(mtenn, command)
    if result.exit_code:
        raise SystemExit(result.output)


RUN: dict[str, Callable[[Path, Path], None]] = {"polars": by_polars, "mtenn combine": by_mtenn}


def times(path: Path, out: Path, repeats: int) -> dict[str, list[float]]:
    """Return the wall times of both ways, which take turns, in seconds."""
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(repeats + 1):
        for way in WAYS:
            start = time.perf_counter()
            RUN[way](path, out)
            if turn:  # the first turn warms up
                found[way].append(time.perf_counter() - start)
    return found


def peak_memory(way: str, path: Path, out: Path) -> int:
    """Return the peak memory of a new process, in bytes."""
    command = [sys.executable, __file__, "--peak-of", way, "--table", str(path), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout)


def print_own_peak(way: str, path: Path, out: Path) -> None:
    """Run one way, or only the imports, and print this process's peak memory in bytes."""
    import torch  # noqa: F401 - part of the memory before the work

    if way in RUN:
        RUN[way](path, out)
    # getrusage does not work here: on Linux, a child's ru_maxrss starts at its parent's peak.
    status = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (line.split()[1] for line in status if line.startswith("VmHWM"))
    print(1024 * int(peak))


def measure(order: str, options: argparse.Namespace, folder: Path) -> list[str]:
    """Return the cells of a row: times, ratio, and peaks of memory per row of the table."""
    path, out = folder / "poses.csv", folder / "out.csv"
    write_table(path, options.rows, options.compounds, order)
    found = times(path, out, options.repeats)
    fastest = {way: min(taken) for way, taken in found.items()}
    median = {way: statistics.median(taken) for way, taken in found.items()}
    before = peak_memory("imports", path, out)
    peaks = [peak_memory(way, path, out) - before for way in WAYS]
    return [
        order,
        f"{path.stat().st_size / 1e6:.0f}",
        *(f"{fastest[way]:.2f}" for way in WAYS),
        f"{fastest[WAYS[1]] / fastest[WAYS[0]]:.2f}",
        f"{median[WAYS[1]] / median[WAYS[0]]:.2f}",
        f"≤ {LIMIT:g}",
        *(f"{peak / MIB:.0f}" for peak in peaks),
        f"{peaks[1] / options.rows:.0f}",
    ]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--compounds", type=int, default=200_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="20,000 rows and two turns")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--table", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quick:
        options.rows, options.compounds, options.repeats = 20_000, 400, 2
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    options = parse(arguments)
    if options.peak_of:
        print_own_peak(options.peak_of, options.table, options.out)
        return
    titles = ("rows are", "MB", "polars, s", "mtenn, s", "ratio", "of medians", "limit")
    memory = ("polars, MiB", "mtenn, MiB", "bytes a row")
    table = Table(*titles, *memory, box=None, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    for order in ORDERS:
        with tempfile.TemporaryDirectory() as folder:
            table.add_row(*measure(order, options, Path(folder)))
    console = Console(highlight=False, width=120)
    console.print(
        f"{options.rows:,} rows, {options.compounds:,} compounds, polars {polars.__version__} with"
        f" {polars.thread_pool_size()} threads; the fastest of {options.repeats} turns"
    )
    console.print(table)


if __name__ == "__main__":
    main()
