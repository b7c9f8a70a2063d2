"""Time the registry's lookup of a combination, and the full suite, in a fresh process.

    python benchmarks/gate.py [--repeats 5]

It times every installed combination and the guide's class, which is written at full depth. Torch is
imported before the clock starts. Prints medians of one run, next to the limit and the time of
torch's import.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from mtenn_core import registry

GUIDE = "guide's class (full depth)"
LIMIT_MS = {GUIDE: 400}
DEFAULT_LIMIT_MS = 100
FULL_LIMIT_MS = 3000
HANDED_OUT = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
start = time.perf_counter()
import torch
torch.set_num_threads(int(sys.argv[2]))
imported = time.perf_counter() - start
from mtenn_core import registry
if len(sys.argv) == 3:
    from guide import GuideCombination
    registry.register("guide", GuideCombination)
name = sys.argv[3] if len(sys.argv) > 3 else "guide"
start = time.perf_counter()
combination = registry.get(name)
taken = time.perf_counter() - start
from mtenn_core.testing import check_combination
checked = []
for level in ("gate", "full"):
    start = time.perf_counter()
    check_combination(combination(), level=level)
    checked.append(time.perf_counter() - start)
print(json.dumps([imported, taken, *checked, len(combination.examples)]))
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()

    ways = {name: [name] for name in registry.names()} | {GUIDE: []}
    runs: dict[str, list[list[float]]] = {way: [] for way in ways}
    for _ in track(range(options.repeats), "measuring", transient=True):
        for way, arguments in ways.items():
            runs[way].append(handed_out(options.threads, arguments))

    columns = ("", "examples", "get", "a gate", "limit", "full", "limit", "get / import torch")
    table = Table(*columns, box=None, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    for way, found in runs.items():
        imported, taken, gate, full, examples = map(statistics.median, zip(*found, strict=True))
        limits = LIMIT_MS.get(way, DEFAULT_LIMIT_MS), FULL_LIMIT_MS
        times = f"{1e3 * gate:.0f}", f"{limits[0]}", f"{1e3 * full:.0f}", f"{limits[1]}"
        ratio = f"{taken / imported:.2f}"
        table.add_row(way, f"{examples:.0f}", f"{1e3 * taken:.0f}", *times, ratio)
    console = Console(highlight=False)
    console.print(
        "ms in a fresh process. get: registry.get, with the plugin's import and the gate on each of"
        " its examples; then one gate more, and the full level with what it imports;"
        f" {options.threads} threads, medians of {options.repeats}"
    )
    console.print(table)


def handed_out(threads: int, arguments: list[str]) -> list[float]:
    """Return the seconds of torch's import, lookup, gate and full level, and n_examples."""
    command = [sys.executable, "-c", HANDED_OUT, str(Path(__file__).parent), str(threads)]
    done = subprocess.run([*command, *arguments], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
