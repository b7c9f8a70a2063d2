"""Time the listing of installed combinations, and compare it with its alternatives.

    python benchmarks/registry.py [--repeats 7] [--sizes 50 300 1000]

Each figure is the median of fresh processes that see only made-up distributions. These have
METADATA and RECORD of usual size. Every third has entry points, and four have a combination. The
processes run with ``-S``, so that ``site-packages`` does not count. Their path has a folder of the
made-up distributions, and a folder of links to the installed packages, without their metadata.
Libraries that import plugins (pluggy, stevedore) find an ``object()`` in each plugin. After a first
round, bytecode and files are in the cache.

The figures are CPU time. For ``mtenn list`` they are wall time without the interpreter's start.
Imports before the clock starts have their own column. In ``scan alone`` they include
importlib_metadata. Three listings and an unknown name cause one scan, which is counted, not timed.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.progress import track
from rich.table import Table

import mtenn_core

GROUP = "mtenn.combinations"
N_PLUGINS = 4
FIRST, AGAIN, LIST = "first names()", "names() again", "mtenn list, wall"
TARGET_MS = {FIRST: "25", AGAIN: "0.1", LIST: "150"}
REGISTRY = "from mtenn_core import Registry; registry = Registry()"
STEVEDORE = "import stevedore", f"stevedore.ExtensionManager({GROUP!r}, invoke_on_load=False)", 1
LOAD = f"pluggy.PluginManager('x').load_setuptools_entrypoints({GROUP!r})"
# What is imported before the clock starts, what is timed, and how often; if often, after a first.
WAYS = {
    FIRST: (REGISTRY, "registry.names()", 1),
    "  scan alone": (f"{REGISTRY}; import importlib_metadata", "registry.names()", 1),
    AGAIN: (REGISTRY, "registry.names()", 1000),
    "unknown name": (REGISTRY, "'nothing' in registry", 1000),
    "importlib.metadata": (
        "import importlib.metadata",
        f"importlib.metadata.entry_points(group={GROUP!r})",
        1,
    ),
    "pluggy": ("import pluggy, importlib.metadata", LOAD, 1),
    # The second finds what the first has left on disk; nothing, if the interpreter is in /tmp.
    "stevedore": STEVEDORE,
    "  its disk cache": STEVEDORE,
}
TIMED = """
import json, sys, time
imports, call, calls = sys.argv[1], compile(sys.argv[2], "call", "exec"), int(sys.argv[3])
start = time.process_time()
exec(imports)
imported = time.process_time()
if calls > 1:
    exec(call)
begin = time.process_time()
for _ in range(calls):
    exec(call)
end = time.process_time()
print(json.dumps([1e3 * (imported - start), 1e3 * (end - begin) / calls]))
"""
COUNTED = """
import sys
from mtenn_core import Registry
class Counting:
    scans = 0
    def find_spec(self, *_): return None
    def find_distributions(self, _): Counting.scans += 1; return ()
sys.meta_path.append(Counting())
registry = Registry()
for _ in range(3):
    assert len(registry.names()) == int(sys.argv[1]), registry
assert "nothing" not in registry
assert Counting.scans == 1, f"{Counting.scans} scans"
"""
Runs = dict[tuple[str, int], list[list[float]]]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--sizes", type=int, nargs="+", default=[50, 300, 1000])
    options = parser.parse_args()

    runs: Runs = defaultdict(list)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        link_packages(folder / "packages")
        for size in options.sizes:
            install(folder / str(size), size)
            python(folder, size, "-c", COUNTED, str(N_PLUGINS))
            measure(folder, size, "first round")
        for repeat in track(range(options.repeats), "measuring", transient=True):
            for size in options.sizes:
                for way, taken in measure(folder, size, str(repeat)).items():
                    runs[way, size].append(taken)

    console = Console(highlight=False)
    console.print(
        "ms (and ratio to the registry's first names()) by the number of installed distributions,"
        f" medians of {options.repeats} fresh processes; target at 300. Three listings: one scan"
    )
    console.print(table(runs, options.sizes))


def table(runs: Runs, sizes: list[int]) -> Table:
    """Return the medians."""
    columns = ("", "imports", *map(str, sizes), "target")
    table = Table(*columns, box=None, header_style="bold", pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for way in (*WAYS, LIST):
        cells = []
        for size in sizes:
            taken, first = (median(call for _, call in runs[w, size]) for w in (way, FIRST))
            ratio = taken / first
            cells.append(f"{taken:.1f} ({ratio:.2f})" if ratio > 0.01 else f"{taken:.4f}")
        imports = median(before for size in sizes for before, _ in runs[way, size])
        table.add_row(way, f"{imports:.1f}", *cells, TARGET_MS.get(way, ""))
    return table


def measure(folder: Path, size: int, cache: str) -> dict[str, list[float]]:
    """Return the ms of the imports and of the call, for each way."""
    taken = {}
    for way, (*code, calls) in WAYS.items():
        taken[way] = json.loads(python(folder, size, "-c", TIMED, *code, str(calls), cache=cache))
    walls = []
    # Without -S the interpreter imports site at its start.
    for arguments in (("-c", "import site"), ("-m", "mtenn_core", "list")):
        start = time.perf_counter()
        python(folder, size, *arguments)
        walls.append(1e3 * (time.perf_counter() - start))
    return taken | {LIST: [0.0, walls[1] - walls[0]]}


def python(folder: Path, size: int, *arguments: str, cache: str = "") -> bytes:
    """Run code in a fresh process that sees only the made-up distributions; return its output."""
    unset = ("MTENN_", "PYTHON")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(unset)} | {
        "PYTHONPATH": os.pathsep.join([str(folder / str(size)), str(folder / "packages")]),
        "PYTHONPYCACHEPREFIX": str(folder / "bytecode"),
        "XDG_CACHE_HOME": str(folder / "caches" / cache),
    }
    # -P: the current folder is not searched.
    command = [sys.executable, "-S", "-P", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout


def link_packages(folder: Path) -> None:
    """Make installed packages importable from a folder without metadata."""
    folder.mkdir()
    (folder / "mtenn_core").symlink_to(Path(mtenn_core.__file__).parent)
    for installed in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for path in Path(installed).iterdir():
            link = folder / path.name
            if path.suffix not in (".dist-info", ".egg-info", ".pth") and not link.is_symlink():
                link.symlink_to(path)


def install(folder: Path, n_distributions: int) -> None:
    """Write distributions in the form that an installer leaves."""
    plugins = range(n_distributions)[:: n_distributions // N_PLUGINS][:N_PLUGINS]
    for i in range(n_distributions):
        package = folder / f"made_up_{i}"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("plugin = object()\n")
        information = folder / f"made_up_{i}-1.0.{i}.dist-info"
        information.mkdir()
        fields = [f"Metadata-Version: 2.4\nName: made-up-{i}\nVersion: 1.0.{i}\nSummary: Made up"]
        fields += [f"Classifier: Programming Language :: Python :: 3.{n}" for n in range(25)]
        fields += [f"Requires-Dist: needed-{n}>=1.{n}; extra == 'more'" for n in range(30)]
        readme = "A line of a README as there are many.\n" * 100
        metadata = "\n".join([*fields, "Requires-Dist: mtenn-core>=0.1", "", readme])
        (information / "METADATA").write_text(metadata)
        files = [f"made_up_{i}/file_{n}.py,sha256={'k' * 43},{n}\n" for n in range(40)]
        (information / "RECORD").write_text("".join(files))
        entry_points = f"[console_scripts]\nmade-up-{i} = made_up_{i}:plugin\n" * (i % 3 == 0)
        if i in plugins:
            entry_points += f"\n[{GROUP}]\nrule-{i} = made_up_{i}:plugin\n"
        if entry_points:
            (information / "entry_points.txt").write_text(entry_points)


if __name__ == "__main__":
    main()
