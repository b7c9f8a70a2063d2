"""Time one combined gradient of M poses and P parameters in many tensors; all gradients are stored.

    python benchmarks/combine.py [--poses 50] [--parameters 2000000] [--tensors 120]

Prints medians of one run, and their ratios. Only forward and backward of the combination are timed.
The gradients of the poses are the same for all ways, and are not timed.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from guide import GuideCombination
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from mtenn_core import Combination, attach_gradients
from mtenn_core._engine.stored import StoredGradients
from mtenn_core.combination import combined_prediction

GUIDE = "guide's class"


class SmoothMaximum(Combination):
    """The guide's combination at depth 2: only value and weights, no gradient arithmetic."""

    def combine(self, predictions: Tensor) -> Tensor:
        """Return ln Σ exp(ŷ_i)."""
        return torch.logsumexp(predictions, dim=0)

    def pose_weights(self, predictions: Tensor) -> Tensor:
        """Return softmax(ŷ)."""
        return torch.softmax(predictions, dim=0)


class Weighted(torch.nn.Module):
    """A pose model of given size with a cheap gradient, which is the scaled pose."""

    def __init__(self, n_parameters: int, n_tensors: int) -> None:
        super().__init__()
        sizes = [n_parameters // n_tensors] * n_tensors
        self.weights = torch.nn.ParameterList(torch.randn(size) for size in sizes)

    def forward(self, pose: Tensor) -> Tensor:
        """Return one number for a pose, shape ()."""
        return sum((pose * weight).mean() for weight in self.weights)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--poses", type=int, default=50)
    parser.add_argument("--parameters", type=int, default=2_000_000)
    parser.add_argument("--tensors", type=int, default=120)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    model = Weighted(options.parameters, options.tensors)
    poses = list(torch.randn(options.poses, 1))
    stored = StoredGradients(model, poses, lambda pose, _: model(pose).reshape(1))
    names, params = list(stored.params), list(stored.params.values())
    grad_dict = stored.grad_dict(slice(None))
    pred_list = list(stored.predictions)
    guide, smooth_maximum = GuideCombination(), SmoothMaximum()

    def by_guide() -> list[Tensor]:
        return gradient(guide(pred_list, grad_dict, names, *params))

    def by_buffer() -> list[Tensor]:
        return gradient(combined_prediction(smooth_maximum, stored.attach()))

    def by_lists() -> list[Tensor]:
        attached = attach_gradients(pred_list, grad_dict, names, *params)
        return gradient(combined_prediction(smooth_maximum, attached))

    def gradient(value: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(value, params))

    for ours in (by_buffer(), by_lists()):
        for expected, found in zip(by_guide(), ours, strict=True):
            torch.testing.assert_close(found, expected)

    (buffer,) = stored._buffers
    weights = torch.softmax(stored.predictions, dim=0)
    ways = {
        GUIDE: by_guide,
        "stored (its own buffer)": by_buffer,
        "lists of gradients": by_lists,
        "one torch.mv": lambda: torch.mv(buffer.t(), weights),
        "reading the memory once": lambda: buffer.sum(),
    }
    seconds = measure(ways, options.repeats)
    table = Table("", "ms", "guide's / this", "this / torch.mv", box=None, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    for way, time_taken in seconds.items():
        table.add_row(
            way,
            f"{1e3 * time_taken:.1f}",
            f"{seconds[GUIDE] / time_taken:.1f}",
            f"{time_taken / seconds['one torch.mv']:.2f}",
        )
    console = Console(highlight=False)
    console.print(
        f"{options.poses} poses, {sum(p.numel() for p in params)} parameters in {len(params)}"
        f" tensors, {torch.get_num_threads()} threads, torch {torch.__version__}; medians of"
        f" {options.repeats}, interleaved"
    )
    console.print(table)


def measure(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the median time of each way, in seconds. They take turns, so that noise hits all."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in track(range(repeats), "measuring", transient=True):
        for way, run in ways.items():
            start = time.perf_counter()
            run()
            times[way].append(time.perf_counter() - start)
    return {way: statistics.median(taken) for way, taken in times.items()}


if __name__ == "__main__":
    main()
