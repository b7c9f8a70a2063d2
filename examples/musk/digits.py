"""Is there a nine? Gated attention over the features of images, in the memory of one image.

    python digits.py --help

README.md shows what it prints.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from digit_bags import (
    N_FEATURES,
    PLAIN,
    DigitNetwork,
    draw_bags,
    loss_gradients,
    new_model,
    train,
)
from digit_memory import peak_memory
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from mtenn_core import Combination, registry
from mtenn_core.errors import MtennError

MODES = ("graph", "recomputed")
SIZES = (8, 16, 64, 256)
TRAINING_IMAGES, TEST_IMAGES = slice(0, 1200), slice(1200, None)
N_TRAINING, N_TEST, BAG_SIZE = 200, 200, 10

console = Console(highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example and return its exit status."""
    options = _options(argv)
    torch.set_num_threads(1)
    try:
        figures = {
            "difference": show_differences(),
            "mebibytes": show_memory(options.sizes),
            "accuracy": show_accuracy(options.epochs),
        }
        if options.json:
            options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    except (MtennError, OSError) as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        return 1
    return 0


def gated_attention() -> Combination:
    """Return a new gated attention over the features of an image."""
    return registry.create("gated_attention", n_features=N_FEATURES, readout=True)


def show_differences() -> dict[str, dict[str, float]]:
    """Print and return the distance of each mode from plain autograd, in float64."""
    torch.manual_seed(0)
    network, combination = DigitNetwork().double(), gated_attention().double()
    _, drawn = draw_bags(2, 16, part=TRAINING_IMAGES, seed=0)
    bag = type(drawn)(drawn.conformers.double(), drawn.label)

    def with_seed(way: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
        torch.manual_seed(1)  # of the dropout
        return loss_gradients(network, combination, bag, way)

    plain_loss, plain = with_seed(PLAIN)
    table = _table("mode", "loss", "gradient", title=f"Distance from {PLAIN}")
    differences = {}
    for mode in MODES:
        loss, gradients = with_seed(mode)
        worst = max(
            ((g - p).abs().max() / p.abs().max()).item()
            for g, p in zip(gradients, plain, strict=True)
            if p.any()
        )
        differences[mode] = {"loss": abs(loss - plain_loss).item(), "gradient": worst}
        table.add_row(mode, *(f"{value:.1g}" for value in differences[mode].values()))
    console.print(table)
    console.print(
        "max |g - g_plain| / max |g_plain| of the worst parameter of the network and of the"
        " attention, in float64, with dropout.\n"
    )
    return differences


def show_memory(sizes: Sequence[int]) -> dict[str, dict[int, float | None]]:
    """Print and return the peak memory of one gradient, in MiB."""
    ways = (PLAIN, "recomputed")
    found: dict[str, dict[int, float | None]] = {way: {} for way in ways}
    runs = [(way, size) for way in ways for size in sizes]
    for way, size in track(runs, "measuring memory", console=console):
        n_bytes = peak_memory(way, size)
        found[way][size] = None if n_bytes is None else n_bytes / 2**20
    table = _table("images of a bag", *ways, title="Peak memory of one gradient (MiB)")
    for size in sizes:
        shown = (found[way][size] for way in ways)
        table.add_row(str(size), *("only on Linux" if m is None else f"{m:.1f}" for m in shown))
    console.print(table)
    console.print("Each number is what a process of its own needs beyond the model and the bag.\n")
    return found


def show_accuracy(epochs: int) -> float:
    """Train on bags of some images, print and return the accuracy on bags of other images."""
    torch.manual_seed(0)
    model = new_model(DigitNetwork(), gated_attention(), "recomputed")
    training = draw_bags(N_TRAINING, BAG_SIZE, part=TRAINING_IMAGES, seed=1)
    for _ in track(train(model, training, epochs=epochs), "training", epochs, console=console):
        pass
    model.eval()
    test = draw_bags(N_TEST, BAG_SIZE, part=TEST_IMAGES, seed=2)
    with torch.no_grad():
        hits = [(model(list(bag.conformers)).prediction > 0).item() == bag.label for bag in test]
    accuracy = sum(hits) / len(hits)
    error = (accuracy * (1 - accuracy) / len(hits)) ** 0.5
    console.print(
        f"Is there a nine among {BAG_SIZE} images? {accuracy:.3f} ± {error:.3f} of {len(hits)} bags"
        " of images that took no part in the training are right. ± is the binomial standard error."
    )
    return accuracy


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Gated attention over bags of images: gradients, memory, training."
    )
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=int,
        default=SIZES,
        metavar="N",
        help="of the bags whose memory is measured (default: 8 16 64 256)",
    )
    parser.add_argument(
        "--epochs", type=int, default=20, metavar="N", help="of training (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON too")
    return parser.parse_args(argv)


def _table(*headers: str, title: str) -> Table:
    table = Table(title=title)
    for index, header in enumerate(headers):
        table.add_column(header, justify="right" if index else "left")
    return table


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
