"""Hydration free energies from conformers: find, validate, train with and compare plugins.

    python demo.py --help

README.md shows what it prints.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from conformers import (
    Molecule,
    TableNotFoundError,
    embed,
    graphs,
    read_measurements,
    with_conformers,
)
from gradients import MODES, PLAIN, largest_differences, step_seconds
from memory import peak_memory
from plot import save_figure
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor
from training import (
    BATCH_SIZE,
    COMBINATIONS,
    KT,
    measured,
    n_steps,
    new_model,
    predict,
    rmse,
    rmse_error,
    split,
    training_steps,
)

from mtenn_core import Combination, MultiPoseModel, registry
from mtenn_core.errors import MtennError

N_CONFORMERS = 5
MANY_CONFORMERS = 64  # of the biggest molecule, for time and memory
FEWEST_MOLECULES = 10

T = TypeVar("T")
console = Console(highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and return its exit status."""
    options = _options(argv)
    torch.set_num_threads(options.threads)
    start = time.perf_counter()
    try:
        figures = run(options)
        figures["seconds"] = time.perf_counter() - start
        if options.json:
            options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    except (TableNotFoundError, MtennError, OSError) as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        return 1
    console.print(f"{figures['seconds']:.0f} s on {options.threads} threads, imports not counted.")
    return 0


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Do everything in order, print it, and return the figures."""
    options.output.mkdir(parents=True, exist_ok=True)
    combinations = show_plugins()

    molecules = make_molecules(options)
    train, test = split(molecules, seed=options.seed)
    console.print(f"{len(train)} molecules to train on, {len(test)} to test on.\n")

    models = {
        name: fit(name, combination, train, options) for name, combination in combinations.items()
    }
    # Of one conformer, each of the three combinations makes that conformer's own ΔG.
    single = fit("one conformer", combinations["mean"], first_conformers(train), options)
    predictions = {name: predict(model, test) for name, model in models.items()}

    predicted = {name: prediction.combined for name, prediction in predictions.items()}
    predicted["one conformer"] = predict(single, first_conformers(test)).combined
    predicted["GAFF, from the table"] = torch.tensor([m.measurement.gaff for m in test])
    predicted["predict the mean"] = measured(train).mean().expand(len(test))
    accuracy = show_accuracy(predicted, measured(test))

    differences = show_differences(models, train[:BATCH_SIZE])
    cost = show_cost(models["boltzmann"], molecules, options)

    path = options.output / "freesolv.png"
    save_figure(path, test, predictions)
    console.print(f"Figure: {escape(str(path))}", soft_wrap=True)
    return {"rmse": accuracy, "gradient_difference": differences, "cost": cost}


def show_plugins() -> dict[str, Combination]:
    """List and validate the combinations of one number per pose; return those to train with."""
    table = Table("name", "distribution", "version", "arguments", "validated in", title="Plugins")
    for name in registry.names():
        arguments = COMBINATIONS.get(name, {})
        shown = ", ".join(
            f"{key}={value:.3f}" if isinstance(value, float) else f"{key}={value}"
            for key, value in arguments.items()
        )
        start = time.perf_counter()
        try:
            if registry.get(name, validate=False).pose_columns is not None:
                continue  # it takes several numbers per pose
            registry.create(name, **arguments)
            verdict = f"{1000 * (time.perf_counter() - start):.0f} ms"
        except MtennError as error:
            verdict = f"[red]refused:[/] {escape(str(error))}"
        record = registry.info(name)
        table.add_row(name, record.distribution, record.version, shown, verdict)
    console.print(table)
    return {name: registry.create(name, **COMBINATIONS[name]) for name in COMBINATIONS}


def make_molecules(options: argparse.Namespace) -> list[Molecule]:
    """Embed the measured molecules; print which are left out because they have no conformer."""
    measurements = read_measurements()
    if options.molecules:
        n_molecules = min(options.molecules, len(measurements))
        measurements = random.Random(options.seed).sample(measurements, n_molecules)
    every = list(
        progress(
            "conformers",
            with_conformers(measurements, N_CONFORMERS, threads=options.threads),
            len(measurements),
        )
    )
    molecules = [molecule for molecule in every if molecule.conformers]
    left_out = [molecule.measurement.name for molecule in every if not molecule.conformers]
    if left_out:
        console.print(f"left out, no conformer found: {escape(', '.join(left_out))}")
    n_conformers = sum(len(molecule.conformers) for molecule in molecules)
    console.print(f"{len(molecules)} molecules, {n_conformers} conformers.")
    return molecules


def first_conformers(molecules: Iterable[Molecule]) -> list[Molecule]:
    """Return the molecules with only their first conformer."""
    return [replace(molecule, conformers=molecule.conformers[:1]) for molecule in molecules]


def fit(
    name: str, combination: Combination, train: Sequence[Molecule], options: argparse.Namespace
) -> MultiPoseModel:
    """Return a new model trained with ``combination``."""
    model = new_model(combination, train, seed=options.seed)
    steps = training_steps(model, train, epochs=options.epochs, seed=options.seed)
    for _ in progress(f"training, {name}", steps, n_steps(train, options.epochs)):
        pass
    return model


def show_accuracy(predicted: dict[str, Tensor], target: Tensor) -> dict[str, float]:
    """Print and return the test RMSE of each model, in kcal/mol."""
    errors = {name: rmse(prediction, target) for name, prediction in predicted.items()}
    *_, baseline = errors.values()
    table = _table("model", "RMSE (kcal/mol)", "over predict-the-mean", title="Test molecules")
    for name, prediction in predicted.items():
        spread = rmse_error(prediction, target)
        table.add_row(name, f"{errors[name]:.2f} ± {spread:.2f}", f"{errors[name] / baseline:.2f}")
    console.print(table)
    trained = [errors[name] for name in COMBINATIONS]
    console.print(
        "± is the standard error over the test molecules (bootstrap). The combinations are"
        f" {max(trained) - min(trained):.2f} kcal/mol apart, and another split moves each of them"
        " by more (see README.md): this ranks none of them.\n"
        "min is here the free-energy average of the conformers, boltzmann their"
        f" population-weighted mean, both at kT = {KT} kcal/mol.\n"
    )
    return errors


def show_differences(
    models: dict[str, MultiPoseModel], batch: Sequence[Molecule]
) -> dict[str, dict[str, float]]:
    """Print and return the distance from plain autograd's gradients, by model and mode."""
    title = f"Gradients beside {PLAIN}"
    table = _table("model", *(f"gradients={mode!r}" for mode in MODES), title=title)
    differences = {}
    for name, model in models.items():
        differences[name] = largest_differences(model, batch)
        table.add_row(name, *(f"{differences[name][mode]:.1g}" for mode in MODES))
    console.print(table)
    n_poses = sum(len(molecule.conformers) for molecule in batch)
    console.print(
        f"max |g - g_plain| / max |g_plain| of the worst parameter, in float64, on {len(batch)}"
        f" training molecules with {n_poses} conformers.\n"
    )
    return differences


def show_cost(
    model: MultiPoseModel, molecules: Sequence[Molecule], options: argparse.Namespace
) -> dict[str, dict[str, float | None]]:
    """Print and return time and peak memory of one gradient of one big molecule."""
    biggest = max(molecules, key=lambda molecule: len(molecule.conformers[0].z))
    smiles = biggest.measurement.smiles
    mol = embed(smiles, MANY_CONFORMERS, threads=options.threads)
    many = replace(biggest, conformers=graphs(mol))
    seconds = step_seconds(model.pose_model, model.combination, many)
    table = _table("gradient", "time (s)", "peak memory (MiB)", title="One big molecule")
    cost = {}
    for way in progress("measuring memory", iter((PLAIN, *MODES)), 1 + len(MODES)):
        n_bytes = peak_memory(way, smiles, MANY_CONFORMERS, threads=options.threads)
        mebibytes = None if n_bytes is None else n_bytes / 2**20
        cost[way] = {"seconds": seconds[way], "mebibytes": mebibytes}
        table.add_row(
            way, f"{seconds[way]:.2f}", "only on Linux" if mebibytes is None else f"{mebibytes:.0f}"
        )
    console.print(table)
    n_atoms = len(many.conformers[0].z)
    console.print(
        f"{escape(biggest.measurement.name)}, {n_atoms} atoms, {len(many.conformers)} conformers."
        " Memory is what a process of its own needs beyond the model and the conformers.\n"
    )
    return cost


def progress(description: str, steps: Iterable[T], total: int) -> Iterator[T]:
    """Iterate with a progress bar; a file or a pipe gets only its last line."""
    columns = (
        TextColumn("{task.description:<26}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bar:
        yield from bar.track(steps, total=total, description=description)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Hydration free energies from conformers.")
    parser.add_argument("--epochs", type=_at_least(1), default=20, metavar="N")
    parser.add_argument(
        "--seed",
        type=_at_least(0),
        default=0,
        metavar="N",
        help="of split, weights and batches (default: %(default)s)",
    )
    parser.add_argument(
        "--molecules",
        type=_at_least(FEWEST_MOLECULES),
        metavar="N",
        help=f"take N molecules at random, at least {FEWEST_MOLECULES}, for a quick trial",
    )
    parser.add_argument("--threads", type=_at_least(1), default=2, metavar="N")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("freesolv_demo"),
        metavar="DIR",
        help="folder of the figure, made if it does not exist (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON too")
    return parser.parse_args(argv)


def _at_least(lowest: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if int(text) < lowest:
            raise argparse.ArgumentTypeError(f"must be at least {lowest}; found {text}")
        return int(text)

    return number


def _table(*headers: str, title: str) -> Table:
    """Return a table of figures: the first column to the left, the others to the right."""
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
