"""Musk or not: five combinations on molecules whose conformers are the poses.

    python demo.py --help

README.md shows what it prints.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import Any

import results
import torch
from bags import DATASETS, N_FOLDS, Bag, BagsNotFoundError, read_bags
from plot import save_figure
from results import PUBLISHED, Accuracy, Fold, Hits
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from training import EPOCHS, RULES, held_out, run_fold

from mtenn_core.errors import MtennError

REPEATS = 5

console = Console(highlight=False)
bags_of: Callable[[str], list[Bag]] = cache(read_bags)
rules = {rule.name: rule for rule in RULES}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example and return its exit status."""
    options = _options(argv)
    torch.set_num_threads(1)
    start = time.perf_counter()
    try:
        accuracies = run(options)
        if options.json:
            _write_figures(options.json, accuracies)
    except (BagsNotFoundError, MtennError, OSError) as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        return 1
    console.print(f"{time.perf_counter() - start:.0f} s in {options.processes} processes.")
    return 0


def run(options: argparse.Namespace) -> dict[tuple[str, str], Accuracy]:
    """Do everything in order, print it, and return the accuracies by dataset and rule."""
    options.output.mkdir(parents=True, exist_ok=True)
    show_bags(options.datasets)
    wanted = [
        Fold(dataset, rule, repeat, fold, options.epochs)
        for dataset in options.datasets
        for rule in options.rules
        for repeat in range(options.repeats)
        for fold in range(N_FOLDS)
    ]
    path = options.output / "folds.json"
    found = results.read(path)
    missing = [fold for fold in wanted if fold not in found]
    if len(missing) < len(wanted):
        console.print(f"{len(wanted) - len(missing)} folds are in {escape(str(path))} already.")
    for fold, hits in progress(run_folds(missing, options.processes), len(missing)):
        found[fold] = hits
        results.write(path, found)
    accuracies = results.accuracies(found, wanted)
    show_accuracies(accuracies, options.repeats)
    figure = options.output / "musk.png"
    save_figure(figure, accuracies)
    console.print(f"Figure: {escape(str(figure))}", soft_wrap=True)
    return accuracies


def show_bags(datasets: Sequence[str]) -> None:
    """Print the number of molecules and conformers of each dataset."""
    for dataset in datasets:
        bags = bags_of(dataset)
        sizes = [len(bag.conformers) for bag in bags]
        console.print(
            f"{dataset.upper()}: {len(bags)} molecules, {sum(bag.label for bag in bags)} of them"
            f" musk; {sum(sizes)} conformers, {min(sizes)} to {max(sizes)} of a molecule."
        )


def run_folds(folds: Sequence[Fold], n_processes: int) -> Iterator[tuple[Fold, Hits]]:
    """Run folds in several processes, and yield each one with its result when it ends."""
    if n_processes == 1:
        yield from ((fold, hits_of(fold)) for fold in folds)
        return
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(n_processes, context, initializer=_begin) as pool:
        running = {pool.submit(hits_of, fold): fold for fold in folds}
        try:
            for done in as_completed(running):
                yield running[done], done.result()
        finally:  # an error, or Ctrl-C: do not wait for the other folds
            pool.shutdown(wait=False, cancel_futures=True)


def hits_of(fold: Fold) -> Hits:
    """Run one fold."""
    bags = bags_of(fold.dataset)
    n_bags = len(held_out(bags, fold.repeat, fold.fold))
    rule = rules[fold.rule]
    return Hits(run_fold(bags, rule, fold.repeat, fold.fold, epochs=fold.epochs), n_bags)


def show_accuracies(accuracies: dict[tuple[str, str], Accuracy], repeats: int) -> None:
    """Print the accuracies next to the published ones."""
    table = Table(title=f"Accuracy, {repeats} × {N_FOLDS}-fold cross-validation")
    for index, header in enumerate(("dataset", "rule", "measured", "published", "difference")):
        table.add_column(header, justify="right" if index > 1 else "left")
    for (dataset, rule), found in accuracies.items():
        published = Accuracy(*PUBLISHED.get((dataset, rule), (math.nan, math.nan)))
        difference = found.value - published.value
        shown = "" if math.isnan(difference) else f"{difference:+.3f}".replace("-", "−")
        table.add_row(dataset.upper(), rule, _shown(found), _shown(published), shown)
    console.print(table)
    console.print(
        "Measured: ± is the standard error over the repeats, which differ in the split and the"
        " initial weights. It does not include the choice of the molecules. Published: Ilse,"
        " Tomczak and Welling (2018), table 1, with the ± of that table."
    )


def progress(steps: Iterator[tuple[Fold, Hits]], total: int) -> Iterator[tuple[Fold, Hits]]:
    """Iterate with a progress bar; a file or a pipe gets only its last line."""
    columns = (
        TextColumn("{task.description:26}"),
        BarColumn(None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bar:
        yield from bar.track(steps, total=total, description="folds")


def _begin() -> None:
    """Prepare a process that runs folds."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    # The matrices are small, and processes that each take all cores wait for each other.
    torch.set_num_threads(1)


def _write_figures(path: Path, accuracies: dict[tuple[str, str], Accuracy]) -> None:
    figures: dict[str, dict[str, Any]] = {}
    for (dataset, rule), found in accuracies.items():
        error = None if math.isnan(found.error) else found.error
        figures.setdefault(dataset, {})[rule] = {"accuracy": found.value, "error": error}
    path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _shown(accuracy: Accuracy) -> str:
    if math.isnan(accuracy.value):
        return "–"
    error = "" if math.isnan(accuracy.error) else f" ± {accuracy.error:.3f}"
    return f"{accuracy.value:.3f}{error}"


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Combinations on MUSK1 and MUSK2, compared with published accuracies."
    )
    parser.add_argument(
        "--datasets", nargs="+", choices=DATASETS, default=DATASETS, help="(default: all)"
    )
    parser.add_argument(
        "--rules", nargs="+", choices=tuple(rules), default=tuple(rules), help="(default: all)"
    )
    number = _at_least(1)
    parser.add_argument(
        "--repeats",
        type=number,
        default=REPEATS,
        metavar="N",
        help="of the cross-validation, each with another split (default: %(default)s)",
    )
    parser.add_argument(
        "--epochs", type=number, default=EPOCHS, metavar="N", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--processes",
        type=number,
        default=2,
        metavar="N",
        help="folds that run at the same time, each on one core (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("musk_example"),
        metavar="DIR",
        help="folder of the figure and of folds.json, made if it does not exist. Folds in that"
        " file do not run again (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON too")
    return parser.parse_args(argv)


def _at_least(lowest: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if int(text) < lowest:
            raise argparse.ArgumentTypeError(f"must be at least {lowest}; found {text}")
        return int(text)

    return number


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
