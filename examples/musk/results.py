"""Results of folds, in a file that grows with each fold, and accuracies over repeats."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

# Ilse, Tomczak and Welling (2018), arXiv 1802.04712, table 1.
PUBLISHED = {
    ("musk1", "attention"): (0.892, 0.040),
    ("musk1", "gated_attention"): (0.900, 0.050),
    ("musk2", "attention"): (0.858, 0.048),
    ("musk2", "gated_attention"): (0.863, 0.042),
}


@dataclass(frozen=True, order=True)
class Fold:
    """A fold that is to be run.

    Attributes
    ----------
    repeat : the seed of the split
    fold : the index of the fold whose bags are predicted
    """

    dataset: str
    rule: str
    repeat: int
    fold: int
    epochs: int


@dataclass(frozen=True)
class Hits:
    """The result of a fold: the number of bags whose class was predicted, and of all its bags."""

    n_correct: int
    n_bags: int


class Accuracy(NamedTuple):
    """The mean accuracy over repeats, and its standard error, which is NaN for one repeat."""

    value: float
    error: float


def read(path: Path) -> dict[Fold, Hits]:
    """Return the results in a file; none if there is no such file."""
    if not path.exists():
        return {}
    records = json.loads(path.read_text(encoding="utf-8"))
    return {Fold(**record["fold"]): Hits(**record["hits"]) for record in records}


def write(path: Path, results: dict[Fold, Hits]) -> None:
    """Write results into a file. If the process stops meanwhile, the file is the old one."""
    records = [{"fold": asdict(fold), "hits": asdict(results[fold])} for fold in sorted(results)]
    new = path.with_suffix(".new")
    new.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    new.replace(path)


def accuracies(
    results: dict[Fold, Hits], wanted: Iterable[Fold]
) -> dict[tuple[str, str], Accuracy]:
    """Return the accuracy for each dataset and rule, from the folds that are wanted."""
    hits: dict[tuple[str, str], dict[int, list[Hits]]] = {}
    for fold in wanted:
        repeats = hits.setdefault((fold.dataset, fold.rule), {})
        repeats.setdefault(fold.repeat, []).append(results[fold])
    return {key: _accuracy([_share(found) for found in of.values()]) for key, of in hits.items()}


def _share(hits: Sequence[Hits]) -> float:
    """Return the share of all bags of a repeat whose class was predicted."""
    return sum(hit.n_correct for hit in hits) / sum(hit.n_bags for hit in hits)


def _accuracy(shares: Sequence[float]) -> Accuracy:
    error = stdev(shares) / math.sqrt(len(shares)) if len(shares) > 1 else math.nan
    return Accuracy(mean(shares), error)
