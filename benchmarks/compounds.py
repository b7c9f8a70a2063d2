"""Time a training step and a prediction for many compounds, and compare them with segment sums.

    python benchmarks/compounds.py [--threads 1] [--repeats 15] [--plot FILE]

The pose model is linear, so that combining takes most of the time. "By hand" is the same step with
``scatter_reduce`` and ``index_add``, as somebody would write it for one combination. All figures
are medians of one run, in which the ways take turns. They are CPU time, which depends less on what
else runs on the machine.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from mtenn_core import Combination, MultiPoseModel, registry

Segments = tuple[Tensor, int]  # the compound of each pose, and the number of compounds
Way = Callable[[], Tensor]

N_FEATURES = 16
GROWTH = (10, 30, 100, 300, 1000, 3000, 10_000)
# The largest ratio to "by hand": equal sizes and ragged ones, by number of compounds.
TRAINING_LIMITS = {("5", 1000): 5, ("5", 5000): 8, ("1 to 20", 1000): 40, ("1 to 20", 5000): 6}
PREDICTION_LIMIT = 6


def sum_by(index: Tensor, numbers: Tensor, n: int) -> Tensor:
    """Return the sum of each segment, shape (n,)."""
    return numbers.new_zeros(n).index_add(0, index, numbers)


def lowest_by(index: Tensor, numbers: Tensor, n: int) -> Tensor:
    """Return the lowest number of each segment, shape (n,), without a graph."""
    numbers = numbers.detach()
    return numbers.new_full((n,), torch.inf).scatter_reduce(0, index, numbers, "amin")


def minimum_by_hand(y: Tensor, segments: Segments, kT: Tensor | float) -> Tensor:
    """Return -ln Σ exp(-y) of each segment."""
    index, n = segments
    lowest = lowest_by(index, y, n)
    return lowest - sum_by(index, (lowest[index] - y).exp(), n).log()


def boltzmann_by_hand(y: Tensor, segments: Segments, kT: Tensor | float) -> Tensor:
    """Return the Boltzmann mean of each segment."""
    index, n = segments
    factors = ((lowest_by(index, y, n)[index] - y) / kT).exp()
    return sum_by(index, factors * y, n) / sum_by(index, factors, n)


def mean_by_hand(y: Tensor, segments: Segments, kT: Tensor | float) -> Tensor:
    """Return the mean of each segment."""
    index, n = segments
    return sum_by(index, y, n) / sum_by(index, torch.ones_like(y), n)


BY_HAND = {"min": minimum_by_hand, "boltzmann": boltzmann_by_hand, "mean": mean_by_hand}
COMBINATIONS: dict[str, tuple[str, dict[str, object]]] = {
    "min": ("min", {}),
    "boltzmann": ("boltzmann", {}),
    "learnable": ("boltzmann", {"learnable": True}),
    "mean": ("mean", {}),
}  # "learnable" is boltzmann with a kT that trains


class Linear(torch.nn.Module):
    """A linear pose model for a batch of poses."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(N_FEATURES, 1)

    def forward(self, batch: Tensor) -> Tensor:
        """Return one number per pose, shape (n_poses,)."""
        return self.linear(batch)[:, 0]


class Case:
    """Poses of many compounds, and the ways to combine them.

    Parameters
    ----------
    what : the poses of each compound: ``"5"``, or ``"1 to 20"`` at random
    n_compounds : number of compounds
    name : a key of ``COMBINATIONS``
    """

    def __init__(self, what: str, n_compounds: int, name: str) -> None:
        torch.manual_seed(0)
        plugin, arguments = COMBINATIONS[name]
        combination: Combination = registry.create(plugin, **arguments)
        low, high = (5, 5) if what == "5" else (1, 20)
        sizes = torch.randint(low, high + 1, (n_compounds,))
        segments = torch.arange(n_compounds).repeat_interleave(sizes), n_compounds
        poses = torch.randn(len(segments[0]), N_FEATURES)
        self.target = torch.randn(n_compounds)
        self.pose_model = Linear()
        self.params = [*self.pose_model.parameters(), *combination.parameters()]

        def by_hand() -> Tensor:
            kT = combination.kT if plugin == "boltzmann" else 1.0
            return BY_HAND[plugin](self.pose_model(poses), segments, kT)

        def by_model(model: MultiPoseModel) -> Tensor:
            return model(poses, sizes, collated=True).prediction

        self.ways: dict[str, Way] = {"by hand": by_hand}
        for mode in ("graph", "recomputed"):
            model = MultiPoseModel(self.pose_model, combination, gradients=mode)
            self.ways[mode] = lambda model=model: by_model(model)

    def check(self) -> None:
        """Raise an AssertionError if two ways give different numbers."""
        expected, *others = (self.gradients(way) for way in self.ways.values())
        for found in others:
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)

    def gradients(self, way: Way) -> list[Tensor]:
        """Return the value and the gradients of a training step."""
        prediction = way()
        loss = (prediction - self.target).square().mean()
        return [prediction.detach(), *torch.autograd.grad(loss, self.params)]

    def prediction(self, way: Way) -> Tensor:
        """Return the predictions without gradients."""
        with torch.no_grad():
            return way()


def measure(case: Case, repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """Return the median CPU time of a training step and of a prediction, in seconds, by way."""
    case.check()  # and warm up
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(repeats):
        for name, way in case.ways.items():
            for what, run in (("training", case.gradients), ("prediction", case.prediction)):
                start = time.process_time()
                run(way)
                times.setdefault((what, name), []).append(time.process_time() - start)
    medians = {key: statistics.median(taken) for key, taken in times.items()}
    return tuple(  # type: ignore[return-value]
        {name: medians[what, name] for name in case.ways} for what in ("training", "prediction")
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plot", type=Path, help="also plot growth, up to 10,000 compounds")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console(highlight=False)
    cases = [(what, n) for what in ("5", "1 to 20") for n in (100, 1000, 5000)]
    growth = [("5", n) for n in GROWTH] if options.plot else []
    wanted = [(*case, name) for case in dict.fromkeys(cases + growth) for name in COMBINATIONS]
    results = {}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for key in progress.track(wanted, description="measuring"):
            results[key] = measure(Case(*key), options.repeats)
    console.print(
        f"linear pose model, {options.threads} thread(s), torch {torch.__version__}; CPU time,"
        f" medians of {options.repeats}; ratios to the same step by hand"
    )
    console.print(table_of({key: results[key] for key in wanted if key[:2] in cases}))
    if options.plot:
        plot(results, options.plot)
        console.print(f"wrote {options.plot}")


def table_of(results: dict[tuple[str, int, str], tuple[dict[str, float], ...]]) -> Table:
    """Return the ratios as a table, with their limits."""
    titles = ("poses", "compounds", "", "hand, ms", "graph", "recomputed", "limit")
    table = Table(
        *titles, "prediction", "limit", box=None, header_style="bold", padding=(0, 1, 0, 0)
    )
    for column in table.columns[3:]:
        column.justify = "right"
    for (what, n, name), (training, prediction) in results.items():
        by_hand = training["by hand"]
        limit = TRAINING_LIMITS.get((what, n), "")
        table.add_row(
            what,
            str(n),
            name,
            f"{1e3 * by_hand:.2f}",
            *(f"{training[mode] / by_hand:.1f}" for mode in ("graph", "recomputed")),
            f"≤ {limit}" if limit else "",
            f"{prediction['graph'] / prediction['by hand']:.1f}",
            f"≤ {PREDICTION_LIMIT}" if what == "5" and n >= 1000 else "",
        )
    return table


def plot(results: dict[tuple[str, int, str], tuple[dict[str, float], ...]], path: Path) -> None:
    """Plot the time of a training step against the number of compounds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, all_axes = plt.subplots(1, len(COMBINATIONS), figsize=(12, 3.2), sharey=True)
    for axes, name in zip(all_axes, COMBINATIONS, strict=True):
        for way, marker in (("by hand", "o"), ("graph", "D"), ("recomputed", "P")):
            times = [1e3 * results["5", n, name][0][way] for n in GROWTH]
            axes.loglog(GROWTH, times, marker=marker, label=way)
        axes.set(title=name, xlabel="compounds with 5 poses")
        axes.grid(alpha=0.3)
    all_axes[0].set_ylabel("CPU time of a training step, ms")
    all_axes[0].legend(frameon=False)
    figure.tight_layout()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
