"""Docked poses of ligands with measured ΔG, put together by every registered combination.

    python demo.py --help

README.md shows what it prints.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from agreement import (
    DRAWS,
    LEVEL,
    Estimate,
    Numbers,
    bootstrap,
    fitted_to_the_others,
    kendall,
    mean_of_the_others,
    pearson,
    rmse,
    spearman,
)
from combine import Combined, combine_all
from dock import Docked, Failed, ReceptorError, Search, Store, dock_all, prepare_receptor
from figures import NEAR, save_poses, save_scores
from rdkit import Chem
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from systems import FILES, DataNotFoundError, Ligand, System, load_system

from mtenn_core.errors import MtennError

MEAN = "mean of the others"
SIZE = "heavy atoms"
CORRELATIONS = {"Pearson r": pearson, "Spearman ρ": spearman, "Kendall τ": kendall}
console = Console(highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and return its exit status."""
    options = _options(argv)
    start = time.perf_counter()
    try:
        report = run(options)
        report["seconds"] = time.perf_counter() - start
        if options.json:
            options.json.write_text(json.dumps(_plain(report), indent=2) + "\n", encoding="utf-8")
    except (DataNotFoundError, ReceptorError, MtennError, OSError) as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        return 1
    console.print(f"{report['seconds']:.0f} s.")
    return 0


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Do everything in order, print it, and return the figures."""
    system = load_system(options.target)
    folder = options.output / system.target
    folder.mkdir(parents=True, exist_ok=True)
    docked, how = dock_ligands(system, folder, options)

    results, refused = combine_all(docked)
    for name, reason in refused.items():
        console.print(f"[red]left out:[/] {escape(name)}: {escape(reason)}", soft_wrap=True)
    measured = np.array([ligand.ligand.delta_g for ligand in docked])
    agreement = show_correlations(scores_of(docked, results), measured)
    errors = show_errors(scores_of(docked, results), measured)
    poses = show_poses(docked, results)

    files = write_files(folder, system, docked, results)
    console.print("\nFiles:")
    for path in files:
        console.print(f"  {escape(str(path))}", soft_wrap=True)
    return {
        "target": system.target,
        **how,
        "ligands": [_ligand_record(ligand) for ligand in docked],
        "combinations": {name: _combined_record(result) for name, result in results.items()},
        "refused": refused,
        "correlation": agreement,
        "rmse": errors,
        "poses": poses,
        "files": [str(path) for path in files],
    }


def dock_ligands(
    system: System, folder: Path, options: argparse.Namespace
) -> tuple[list[Docked], dict[str, Any]]:
    """Return the ligands with poses, in the order of the data, and how they were obtained."""
    store = Store(
        folder / "poses", system, Search(options.exhaustiveness, options.poses, options.seed)
    )
    ligands = system.ligands[: options.ligands]
    kept = [poses for ligand in ligands if (poses := store.load(ligand)) is not None]
    names = {poses.ligand.name for poses in kept}
    missing = [ligand for ligand in ligands if ligand.name not in names]
    outcomes = list(_docking(missing, store, folder, options.processes)) if missing else []

    failed = dict.fromkeys(system.unread, "cannot be read from the data")
    failed |= {each.ligand.name: each.reason for each in outcomes if isinstance(each, Failed)}
    for name, reason in failed.items():
        console.print(f"[red]left out:[/] {escape(name)}: {escape(reason)}", soft_wrap=True)
    docked = kept + [each for each in outcomes if isinstance(each, Docked)]
    if not docked:
        raise DataNotFoundError(f"{system.target}: not one ligand could be docked")
    place = {ligand.name: index for index, ligand in enumerate(ligands)}
    docked.sort(key=lambda each: place[each.ligand.name])
    console.print(
        f"{system.target}: {len(docked)} ligands, {sum(len(each.poses) for each in docked)} poses;"
        f" {len(kept)} ligands were docked before.\n"
    )
    return docked, {"docked": len(docked) - len(kept), "kept": len(kept), "failed": failed}


def _docking(
    ligands: Sequence[Ligand], store: Store, folder: Path, processes: int
) -> Iterator[Docked | Failed]:
    """Dock ligands, with a progress bar; a file or a pipe gets only its last line."""
    receptor = folder / "receptor.pdbqt"
    with console.status("preparing the protein"):
        left_out = prepare_receptor(store.system, receptor)
    if left_out:
        console.print(f"residues left out of the protein: {', '.join(left_out)}")
    columns = (
        TextColumn("{task.description:<26}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bar:
        outcomes = dock_all(ligands, store, receptor, processes=processes)
        yield from bar.track(
            outcomes, total=len(ligands), description=f"docking, {store.system.target}"
        )


def scores_of(docked: Sequence[Docked], results: Mapping[str, Combined]) -> dict[str, Numbers]:
    """Return scores by name, shape (n_ligands,) each; lower means stronger binding.

    They are in kcal/mol, except the number of heavy atoms, which is negated.
    """
    scores = {name: result.scores.numpy() for name, result in results.items()}
    scores[SIZE] = np.array([-float(ligand.ligand.n_heavy) for ligand in docked])
    return scores


def show_correlations(
    scores: Mapping[str, Numbers], measured: Numbers
) -> dict[str, dict[str, Estimate]]:
    """Print and return the correlations of scores and measured ΔG."""
    table = _table("score", *CORRELATIONS, title="Agreement with measured ΔG")
    found = {}
    for name, score in scores.items():
        found[name] = {
            title: bootstrap(statistic, score, measured)
            for title, statistic in CORRELATIONS.items()
        }
        table.add_row(escape(name), *map(_shown, found[name].values()))
    console.print(table)
    return found


def show_errors(scores: Mapping[str, Numbers], measured: Numbers) -> dict[str, dict[str, Estimate]]:
    """Print and return the errors, in kcal/mol, of the scores and of fitted lines."""
    table = _table("score", "as it is", "line fitted to the others", title="RMSE (kcal/mol)")
    found = {}
    for name, score in scores.items():
        fitted = fitted_to_the_others(score, measured)
        found[name] = {"fitted": bootstrap(rmse, fitted, measured)}
        if name != SIZE:  # which is in no kcal/mol
            found[name]["raw"] = bootstrap(rmse, score, measured)
        as_it_is = _shown(found[name]["raw"]) if "raw" in found[name] else "–"
        table.add_row(escape(name), as_it_is, _shown(found[name]["fitted"]))
    found[MEAN] = {"fitted": bootstrap(rmse, mean_of_the_others(measured), measured)}
    table.add_row(MEAN, "–", _shown(found[MEAN]["fitted"]))
    console.print(table)
    console.print(
        f"In brackets: {LEVEL} % intervals over ligands (bootstrap, {DRAWS} draws), for each score"
        " by itself. Each line is fitted without the ligand it predicts, and so is the mean.\n"
    )
    return found


def show_poses(docked: Sequence[Docked], results: Mapping[str, Combined]) -> dict[str, Any]:
    """Print and return how often poses are near the reference, and the weight of such poses."""
    near = [np.array(ligand.rmsds) <= NEAR for ligand in docked]
    counts = {
        "lowest": sum(bool(each[0]) for each in near),
        "any": sum(bool(each.any()) for each in near),
    }
    n = len(docked)
    console.print(
        f"Within {NEAR:g} Å of the reference pose: the lowest pose of {counts['lowest']} of {n}"
        f" ligands, any pose of {counts['any']}."
    )
    weight = {
        name: _mean_weight(result, [each if each.any() else None for each in near])
        for name, result in results.items()
    }
    if counts["any"]:
        shown = ", ".join(f"{name} {value:.2f}" for name, value in weight.items())
        console.print(f"Weight of such poses, where there are any: {escape(shown)}.")
    return {**counts, "weight": weight}


def _mean_weight(result: Combined, near: Sequence[Any]) -> float:
    """Return the summed weight of near poses, averaged over the ligands that have any."""
    sums = [
        float(weights.numpy()[each].sum())
        for weights, each in zip(result.weights, near, strict=True)
        if each is not None
    ]
    return float(np.mean(sums)) if sums else math.nan


def write_files(
    folder: Path, system: System, docked: Sequence[Docked], results: Mapping[str, Combined]
) -> list[Path]:
    """Write protein, reference poses and figures; return their paths and the poses' folder."""
    (folder / "protein.pdb").write_text(system.protein, encoding="utf-8")
    with Chem.SDWriter(str(folder / "reference.sdf")) as writer:
        for ligand in docked:
            writer.write(ligand.ligand.reference)
    if results:
        save_scores(folder / "docking.png", docked, results)
    lowest = {name: [float(w[0]) for w in result.weights] for name, result in results.items()}
    save_poses(folder / "poses.png", docked, lowest)
    figures = ["docking.png", "poses.png"] if results else ["poses.png"]
    return [folder / name for name in (*figures, "protein.pdb", "reference.sdf", "poses")]


def _ligand_record(ligand: Docked) -> dict[str, Any]:
    return {
        "name": ligand.ligand.name,
        "measured": ligand.ligand.delta_g,
        "heavy_atoms": ligand.ligand.n_heavy,
        "energies": ligand.energies,
        "rmsds": ligand.rmsds,
    }


def _combined_record(result: Combined) -> dict[str, Any]:
    weights = [weights.tolist() for weights in result.weights]
    return {"arguments": result.arguments, "scores": result.scores.tolist(), "weights": weights}


def _plain(record: Any) -> Any:
    """Return ``record`` in a form for JSON: no NaN, and estimates as dictionaries."""
    if isinstance(record, Estimate):
        return _plain(record._asdict())
    if isinstance(record, Mapping):
        return {key: _plain(value) for key, value in record.items()}
    if isinstance(record, list | tuple):
        return [_plain(value) for value in record]
    return None if isinstance(record, float) and not math.isfinite(record) else record


def _shown(estimate: Estimate) -> str:
    value, low, high = (f"{number:.2f}".replace("-", "−") for number in estimate)
    if math.isnan(estimate.value):
        return "–"
    return value if math.isnan(estimate.low) else f"{value} ({low}…{high})"


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Docked poses of ligands with measured ΔG, put together by every combination."
    )
    parser.add_argument(
        "--target", choices=sorted(FILES), default="tyk2", help="(default: %(default)s)"
    )
    number = _at_least(1)
    parser.add_argument("--ligands", type=number, metavar="N", help="the first N alone")
    parser.add_argument(
        "--poses", type=number, default=9, metavar="N", help="of each ligand (default: %(default)s)"
    )
    parser.add_argument(
        "--exhaustiveness",
        type=number,
        default=2,
        metavar="N",
        help="Vina's Monte Carlo runs per ligand (default: %(default)s; Vina's own: 8)",
    )
    # Vina takes a C int, and dock.py adds 1.
    seed = _at_least(0, 2**31 - 2)
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of the docking")
    parser.add_argument(
        "--processes",
        type=number,
        default=2,
        metavar="N",
        help="ligands docked at the same time, each on one core (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("docking_example"),
        metavar="DIR",
        help="folder of poses and figures, made if it does not exist (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON too")
    return parser.parse_args(argv)


def _at_least(lowest: int, highest: float = math.inf) -> Callable[[str], int]:
    def number(text: str) -> int:
        if int(text) < lowest:
            raise argparse.ArgumentTypeError(f"must be at least {lowest}; found {text}")
        if int(text) > highest:
            raise argparse.ArgumentTypeError(f"must be at most {highest}; found {text}")
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
