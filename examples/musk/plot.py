"""The figure: measured accuracies next to published ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from results import PUBLISHED, Accuracy

OURS, THEIRS = "#0072B2", "#E69F00"  # Okabe and Ito
WIDTH = 0.4  # of a bar


def save_figure(path: Path, accuracies: Mapping[tuple[str, str], Accuracy]) -> None:
    """Draw a plot for each dataset, with a bar for each rule, and save the figure.

    Parameters
    ----------
    path : the file; its suffix decides the format
    accuracies : by dataset and rule
    """
    datasets = list(dict.fromkeys(dataset for dataset, _ in accuracies))
    figure = Figure(figsize=(5.4 * len(datasets), 4.6), layout="constrained")
    plots = figure.subplots(1, len(datasets), sharey=True, squeeze=False)[0]
    for axes, dataset in zip(plots, datasets, strict=True):
        of = {rule: found for (name, rule), found in accuracies.items() if name == dataset}
        axes.set_title(dataset.upper(), fontweight="bold")
        _draw(axes, dataset, of)
    # The axis begins at the accuracy of a coin toss.
    plots[0].set(ylim=(0.5, 1.0), ylabel="accuracy, 10-fold cross-validation")
    figure.legend(*plots[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=110)


def _draw(axes: Axes, dataset: str, accuracies: Mapping[str, Accuracy]) -> None:
    published = {
        place: PUBLISHED[dataset, rule]
        for place, rule in enumerate(accuracies)
        if (dataset, rule) in PUBLISHED
    }
    places = [place - WIDTH / 2 * (place in published) for place in range(len(accuracies))]
    values, errors = zip(*accuracies.values(), strict=True)
    axes.bar(places, values, WIDTH, yerr=errors, capsize=4, color=OURS, label="measured")
    if published:
        values, errors = zip(*published.values(), strict=True)
        places = [place + WIDTH / 2 for place in published]
        label = "published (Ilse, Tomczak, Welling 2018)"
        axes.bar(places, values, WIDTH, yerr=errors, capsize=4, color=THEIRS, label=label)
    labels = [rule.replace("_attention", "\nattention") for rule in accuracies]
    axes.set_xticks(range(len(accuracies)), labels)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
