"""What the suite makes of the bank and the zoo: ``python -m bank``, with ``tests`` on the path.

Writes the matrix of mistakes and checks, with what ``torch.autograd.gradcheck`` catches beside it,
and runs the right combinations for false alarms.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import track

from bank import RIGHT, WRONG, make_right, make_wrong
from mtenn_core import Combination
from mtenn_core.testing import CHECKS, SUITE_VERSION, Report, check_combination

CONSOLE = Console(stderr=True)
IDS = [check.id for check in CHECKS]


@click.command()
@click.option("--matrix", type=click.Path(path_type=Path), help="Write the matrix to this file.")
@click.option("--runs", default=1000, show_default=True, help="Runs of right combinations.")
@click.option("--scales", default="1,10,1000", show_default=True, help="Of the wrong ones.")
@click.option("--seeds", default=4, show_default=True, help="Of the probes, for the wrong ones.")
def main(matrix: Path | None, runs: int, scales: str, seeds: int) -> None:
    """Run the suite on what is wrong and on what is right."""
    torch.set_num_threads(1)
    ts = [float(t) for t in scales.split(",")]
    rows = {}
    for wrong in track(WRONG, "wrong combinations", console=CONSOLE):
        rows[wrong.name] = failed_ids(partial(make_wrong, name=wrong.name, t=1.0), seed=0)
    missed = [
        (wrong.name, t, seed)
        for wrong in track(WRONG, f"× {len(ts)} scales × {seeds} seeds", console=CONSOLE)
        for t in ts
        for seed in range(seeds)
        if not failed_ids(partial(make_wrong, name=wrong.name, t=t), seed, only=[wrong.check])
    ]
    gradcheck = [
        w.name
        for w in track(WRONG, "gradcheck", console=CONSOLE)
        if gradcheck_catches(lambda w=w: make_wrong(w.name, 1.0))
    ]
    alarms = [
        (right.name, seed, ids)
        for seed in track(range(-(-runs // len(RIGHT))), "right combinations", console=CONSOLE)
        for right in RIGHT
        if (ids := failed_ids(partial(make_right, name=right.name), seed, level="full"))
    ]
    tried = len(WRONG) * len(ts) * seeds
    text = summary(rows, missed, tried, gradcheck, alarms, runs)
    print(text)
    if matrix is not None:
        matrix.write_text(page(text, rows, gradcheck), encoding="utf-8")
    sys.exit(bool(missed or alarms or not all(rows.values())))


def failed_ids(
    make: Callable[[], Combination],
    seed: int,
    level: str = "quality",
    only: list[str] | None = None,
) -> list[str]:
    """Return the checks that a combination fails."""
    report: Report = check_combination(make, level=level, seed=seed, only=only)
    return [record.id for record in report.failures]


def gradcheck_catches(make: Callable[[], Combination]) -> bool:
    """Whether torch's gradcheck, as it comes, finds anything wrong with a loss on three poses."""
    torch.manual_seed(0)
    features = torch.randn(3, 4, dtype=torch.float64)
    theta = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def combined(theta: torch.Tensor) -> torch.Tensor:
        predictions = torch.tanh(features @ theta.detach())
        gradients = (1 - predictions**2)[:, None] * features
        return combination(list(predictions), {"theta": list(gradients)}, ["theta"], theta)

    try:
        combination = make().double()
        return not torch.autograd.gradcheck(combined, (theta,), raise_exception=False)
    except Exception:
        return True


def summary(rows, missed, tried, gradcheck, alarms, runs) -> str:
    """Return the figures, one to a line."""
    caught = sum(bool(ids) for ids in rows.values())
    alone = {ids[0] for ids in rows.values() if len(ids) == 1}
    n_runs = -(-runs // len(RIGHT)) * len(RIGHT)
    lines = [
        f"suite {SUITE_VERSION}: {len(CHECKS)} checks",
        f"wrong combinations caught: {caught} of {len(WRONG)}",
        f"missed by their own check: {len(missed)} of {tried} (mistake, scale, seed)",
        *(f"    {name}, t = {t:g}, seed {seed}" for name, t, seed in missed),
        f"caught by torch.autograd.gradcheck with its defaults: {len(gradcheck)} of {len(WRONG)}",
        f"checks with a mistake that they alone catch: {len(alone)} of {len(CHECKS)}",
        *(f"    not {id}" for id in IDS if id not in alone),
        f"false alarms in {n_runs} runs of {len(RIGHT)} right combinations: {len(alarms)}",
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


main()
