"""Score compounds batch by batch, and append one row for each of them to a file."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from mtenn_core import MultiPoseModel
from mtenn_core.errors import PredictionError

COLUMNS = ("name", "prediction", "n_poses", "best_pose", "weight", "problem")
Compound = tuple[str, Sequence[Any]]  # a name of one line that no other compound has, and poses
Row = tuple[str | int, ...]


def batches(compounds: Iterable[Compound], max_poses: int) -> Iterator[list[Compound]]:
    """Yield batches of at most ``max_poses`` poses.

    All poses of a compound are in one batch. A compound with more poses is a batch of its own.
    """
    batch: list[Compound] = []
    n_poses = 0
    for name, poses in compounds:
        if batch and n_poses + len(poses) > max_poses:
            yield batch
            batch, n_poses = [], 0
        batch.append((name, poses))
        n_poses += len(poses)
    if batch:
        yield batch


@torch.inference_mode()
def score(model: MultiPoseModel, batch: Sequence[Compound]) -> list[Row]:
    """Return a row for each compound. Compounds without a prediction come first."""
    left, rows = list(batch), []
    while left:
        sizes = [len(poses) for _, poses in left]
        try:
            out = model([pose for _, poses in left for pose in poses], sizes)
        except PredictionError as error:
            if error.compound is None:  # an error of the program
                raise
            problem = "too few poses"
            if error.pose is not None:
                problem = f"pose {error.pose - sum(sizes[: error.compound])} is NaN or infinite"
            name, poses = left.pop(error.compound)  # the others run again
            rows.append((name, "", len(poses), "", "", problem))
            continue
        weights = iter(model.pose_weights(out.pose_predictions, sizes).tolist())
        for (name, poses), prediction in zip(left, out.prediction.tolist(), strict=True):
            own = list(islice(weights, len(poses)))
            best = max(range(len(own)), key=own.__getitem__)
            rows.append((name, f"{prediction:.5g}", len(poses), best, f"{own[best]:.3f}", ""))
        break
    return rows


def append_scores(
    path: Path, model: MultiPoseModel, compounds: Iterable[Compound], max_poses: int
) -> Iterator[list[Row]]:
    """Write the rows of each batch to the end of a file, and then yield them."""
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        if path.name == "0.csv" and file.tell() == 0:  # one header for all parts together
            writer.writerow(COLUMNS)
        for batch in batches(compounds, max_poses):
            rows = score(model, batch)
            writer.writerows(rows)
            file.flush()
            yield rows


def names_done(folder: Path, rank: int, n_ranks: int) -> set[str]:
    """Return the names in all parts of the scores: 0.csv, 1.csv and so on.

    A stopped run may leave half a row at the end of a part. One of the processes cuts it off.
    """
    names = set()
    for part in folder.glob("*.csv"):
        end = 0
        with part.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    names.add(next(csv.reader([line.decode()]))[0])
                    end += len(line)
        if int(part.stem) % n_ranks == rank:
            with part.open("rb+") as file:
                file.truncate(end)
    return names
