"""Score a library of molecules in bounded memory, in one process or under torchrun.

    python score.py --help

README.md shows what it writes.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from rdkit import Chem
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from scoring import Compound, append_scores, names_done

from mtenn_core import MultiPoseModel, registry
from mtenn_core.errors import MtennError

sys.path.append(str(Path(__file__).parents[1] / "freesolv"))
from conformers import TableNotFoundError, collate, embed, graphs, read_measurements
from pose_model import ConformerSchNet

KT = 0.593  # kcal/mol at 298 K


def main(argv: Sequence[str] | None = None) -> int:
    """Score the molecules that have no row yet, and return the exit status."""
    options = _options(argv)
    torch.set_num_threads(options.threads)
    # torchrun sets both. The processes need no communication.
    rank, n_ranks = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
    start = time.perf_counter()
    figures = {"rank": rank, "scored": 0, "without prediction": 0}
    try:
        model = load_model(options.checkpoint)
        options.output.mkdir(parents=True, exist_ok=True)
        done = names_done(options.output, rank, n_ranks)
        mine = islice(read_library(options.library), rank, None, n_ranks)
        todo = ((name, smiles) for name, smiles in mine if name not in done)
        compounds = with_poses(todo, options.conformers)
        path = options.output / f"{rank}.csv"
        console = Console(stderr=True)
        columns = TextColumn("compounds"), MofNCompleteColumn(), TimeElapsedColumn()
        hidden = rank > 0 or not console.is_terminal
        with Progress(*columns, console=console, disable=hidden, auto_refresh=False) as progress:
            task = progress.add_task("compounds", total=None)
            for rows in append_scores(path, model, compounds, options.batch_poses):
                n_broken = sum(bool(problem) for *_, problem in rows)
                figures["scored"] += len(rows) - n_broken
                figures["without prediction"] += n_broken
                progress.update(task, advance=len(rows), refresh=True)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except (MtennError, TableNotFoundError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return _print({**figures, "seconds": round(time.perf_counter() - start, 2)}, options.json)


def read_library(library: str) -> Iterator[tuple[str, str]]:
    """Yield name and SMILES of each molecule, one line of the file at a time."""
    if library == "freesolv":
        yield from ((row.name, row.smiles) for row in read_measurements())
        return
    with open(library, encoding="utf-8") as lines:
        for line in filter(str.strip, lines):
            smiles, *name = line.split(maxsplit=1)
            yield (name[0].strip() if name else smiles), smiles


def with_poses(molecules: Iterator[tuple[str, str]], n_conformers: int) -> Iterator[Compound]:
    """Yield name and conformers of each molecule, or no conformers if RDKit fails."""
    for name, smiles in molecules:
        readable = Chem.MolFromSmiles(smiles) is not None
        # RDKit would catch a Ctrl-C and go on, and this molecule would have no conformers.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        poses = graphs(embed(smiles, n_conformers, threads=1)) if readable else ()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        yield name, poses


def load_model(checkpoint: Path | None) -> MultiPoseModel:
    """Return the demo's model in evaluation mode. Without a checkpoint, it is not trained."""
    torch.manual_seed(0)
    pose_model = ConformerSchNet(mean=-3.8, std=3.8)  # kcal/mol, of FreeSolv
    model = MultiPoseModel(pose_model, registry.create("boltzmann", kT=KT), collate=collate)
    if checkpoint is not None:
        model.load_state_dict(torch.load(checkpoint, weights_only=True))
    return model.eval()


def _print(figures: dict[str, float], as_json: bool) -> int:
    text = ", ".join(f"{name}: {number}" for name, number in figures.items())
    try:
        print(json.dumps(figures) if as_json else text, flush=True)
    except BrokenPipeError:  # nobody reads; Python would flush again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--library", default="freesolv", help="file with 'SMILES name' lines (default: FreeSolv)")
    add("--output", type=Path, default=Path("scores"), help="folder (default: %(default)s)")
    add("--checkpoint", type=Path, help="state dict of the model (default: not trained)")
    add("--conformers", type=int, default=5, help="poses of a molecule (default: %(default)s)")
    add("--batch-poses", type=int, default=256, help="poses of a call (default: %(default)s)")
    add("--threads", type=int, default=1, help="of a process (default: %(default)s)")
    add("--json", action="store_true", help="print the summary as JSON")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
