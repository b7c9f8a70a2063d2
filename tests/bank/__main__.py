"""What the suite makes of the bank and the zoo: ``python -m bank``, with ``tests`` on the path.

Writes the matrix of mistakes and checks, with what ``torch.autograd.gradcheck`` catches next to it,
and runs the right combinations for false alarms.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import click
import torch
from rich.console import Console
from rich.progress import track

from bank import RIGHT, RIGHT_VECTORS, WRONG, WRONG_VECTORS
from bank.runs import caught_by_own_check, failed_by_right, failed_by_wrong, gradcheck_catches
from mtenn_core.testing import CHECKS, SUITE_VERSION

T = TypeVar("T")
CONSOLE = Console(stderr=True)
IDS = [check.id for check in CHECKS]


@click.command()
@click.option("--matrix", type=click.Path(path_type=Path), help="Write the matrix to this file.")
@click.option("--runs", default=1400, show_default=True, help="Runs of right combinations.")
@click.option("--scales", default="1,10,1000", show_default=True, help="Of the wrong ones.")
@click.option("--seeds", default=4, show_default=True, help="Of the probes, for the wrong ones.")
@click.option("--vectors", is_flag=True, help="Only rules that take several numbers per pose.")
def main(matrix: Path | None, runs: int, scales: str, seeds: int, vectors: bool) -> None:
    """Run the suite on what is wrong and on what is right."""
    if vectors and matrix is not None:
        raise click.UsageError("the matrix has all combinations: leave out --vectors")
    ts = [float(t) for t in scales.split(",")]
    bank, zoo = (WRONG_VECTORS, RIGHT_VECTORS) if vectors else (WRONG, RIGHT)
    wrong = [(wrong.name,) for wrong in bank]
    own_checks = [(w.name, w.check, t, seed) for w in bank for t in ts for seed in range(seeds)]
    right = [(right.name, seed) for seed in range(-(-runs // len(zoo))) for right in zoo]
    # Not forked: torch has threads by now, which a forked process lacks.
    with ProcessPoolExecutor(
        mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:

        def each(function: Callable[..., T], tasks: list[Any], what: str) -> list[tuple[Any, T]]:
            """Return the tasks, each with its result."""
            results = pool.map(function, *zip(*tasks, strict=True), chunksize=4)
            results = track(results, what, total=len(tasks), console=CONSOLE)
            return list(zip(tasks, results, strict=True))

        rows = {name: ids for (name,), ids in each(failed_by_wrong, wrong, "wrong combinations")}
        caught = each(caught_by_own_check, own_checks, f"× {len(ts)} scales × {seeds} seeds")
        gradcheck = [n for (n,), seen in each(gradcheck_catches, wrong, "gradcheck") if seen]
        failures = each(failed_by_right, right, "right combinations")
    missed = [(name, t, seed) for (name, _, t, seed), is_caught in caught if not is_caught]
    alarms = [(name, seed, ids) for (name, seed), ids in failures if ids]
    text = summary(rows, missed, len(own_checks), gradcheck, alarms, right)
    print(text)
    if matrix is not None:
        matrix.write_text(page(text, rows, gradcheck), encoding="utf-8")
    sys.exit(bool(missed or alarms or not all(rows.values())))


def summary(rows, missed, tried, gradcheck, alarms, right) -> str:
    """Return the figures, one to a line."""
    caught = sum(bool(ids) for ids in rows.values())
    alone = {ids[0] for ids in rows.values() if len(ids) == 1}
    names = [name for name, _ in right]
    of_vectors = [each.name for each in RIGHT_VECTORS]
    n_vectors = sum(name in of_vectors for name in names)
    lines = [
        f"suite {SUITE_VERSION}: {len(CHECKS)} checks",
        f"wrong combinations caught: {caught} of {len(rows)}",
        f"missed by their own check: {len(missed)} of {tried} (mistake, scale, seed)",
        *(f"    {name}, t = {t:g}, seed {seed}" for name, t, seed in missed),
        f"caught by torch.autograd.gradcheck with its defaults: {len(gradcheck)} of {len(rows)}",
        f"checks with a mistake that they alone catch: {len(alone)} of {len(CHECKS)}",
        *(f"    not {id}" for id in IDS if id not in alone),
        f"false alarms in {len(names)} runs of {len({*names})} right combinations: {len(alarms)}",
        f"    {n_vectors} of these runs are of {len(of_vectors)} rules for vectors",
        *(f"    {name}, seed {seed}: {', '.join(ids)}" for name, seed, ids in alarms),
    ]
    return "\n".join(lines)


def page(text: str, rows: dict[str, list[str]], gradcheck: list[str]) -> str:
    """Return the matrix as a page of Markdown."""
    head = ["mistake", "gradcheck", *IDS]
    lines = [
        "# Mistakes and the checks that catch them",
        "",
        "`tox run -e bank` makes this page. Each row is a wrong combination of `tests/bank`, at",
        "scale 1 and seed 0. A ● is a check that fails. `gradcheck` is `torch.autograd.gradcheck`",
        "with its defaults, on three poses. [Conformance](conformance.md) explains the checks.",
        "",
        "```text",
        text,
        "```",
        "",
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
    ]
    for name, ids in rows.items():
        cells = ["●" if name in gradcheck else "", *("●" if id in ids else "" for id in IDS)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
