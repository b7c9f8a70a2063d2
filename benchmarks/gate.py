"""CPU time of the gate and of the full level of the conformance suite, in fresh processes.

    python benchmarks/gate.py [--repeats 5] [--threads 1]

It measures every installed combination, the guide's class at full depth, and two combinations of
vectors: DeepSets with 8 numbers per pose, and gated attention with 64. Each figure is also given as
a multiple of the time that ``import torch`` takes in the same process: the ratio depends less on
the machine and on what else runs there. All are medians.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from mtenn_core import registry

# Classes in this folder, as (module, class).
CLASSES = {
    "guide's class (full depth)": ["guide", "GuideCombination"],
    "DeepSets, 8 columns": ["vectors", "DeepSets"],
    "gated attention, 64 columns": ["vectors", "GatedAttention"],
}
GATE_LIMIT_MS = 50
GATE_LIMIT_OF_VECTORS_MS = 400
FULL_LIMIT_S = 3
N_WARM = 5
MEASURE = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
start = time.process_time()
import torch
imported = time.process_time() - start
torch.set_num_threads(int(sys.argv[2]))
start = time.process_time()
from mtenn_core import registry
if len(sys.argv) == 5:
    combination = registry.get(sys.argv[4])
else:
    combination = getattr(__import__(sys.argv[4]), sys.argv[5])
    registry.register("own", combination)
    registry.get("own")
taken = time.process_time() - start
start = time.process_time()
from mtenn_core.testing import check_combination
for arguments in combination.examples[:2]:
    check_combination(combination(**arguments))
full = time.process_time() - start
warm = []
for _ in range(int(sys.argv[3])):
    start = time.process_time()
    check_combination(combination(**combination.examples[0]), level="gate")
    warm.append(time.process_time() - start)
print(json.dumps([imported, taken, full, sorted(warm)[len(warm) // 2], len(combination.examples)]))
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()

    names = {name: [name] for name in registry.names()} | CLASSES
    runs: dict[str, list[list[float]]] = {name: [] for name in names}
    for _ in track(range(options.repeats), "measuring", transient=True):
        for name, arguments in names.items():
            runs[name].append(measured(options.threads, arguments))

    columns = ("", "examples", "import torch", "get", "full level", "ratio", "gate, ms", "ratio")
    table = Table(*columns, box=None, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, found in runs.items():
        imported, taken, full, gate, examples = map(statistics.median, zip(*found, strict=True))
        table.add_row(
            name,
            f"{min(examples, 2):.0f}",
            f"{imported:.2f}",
            f"{taken:.2f}",
            f"{full:.2f}",
            f"{full / imported:.2f}",
            f"{1e3 * gate:.0f}",
            f"{gate / imported:.3f}",
        )
    console = Console(highlight=False)
    console.print(
        f"CPU seconds, {options.threads} thread(s). get: registry.get, which imports the plugin and"
        " runs the gate for each example. full level: check_combination for at most two examples,"
        f" with what it imports; at most {FULL_LIMIT_S}. gate: once more, warm; at most"
        f" {GATE_LIMIT_MS} ms, or {GATE_LIMIT_OF_VECTORS_MS} ms for vectors. ratio: to import"
        " torch."
    )
    console.print(table)


def measured(threads: int, arguments: list[str]) -> list[float]:
    """Return CPU seconds for import torch, get, full level and gate, and n_examples."""
    folder = str(Path(__file__).parent)
    command = [sys.executable, "-c", MEASURE, folder, str(threads), str(N_WARM), *arguments]
    # A second thread that waits for work counts as busy.
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
