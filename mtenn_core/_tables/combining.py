"""Combine the poses of all compounds of a table, in batches of bounded size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from mtenn_core._engine.columns import columns_of
from mtenn_core._engine.compounds import combine_without_gradients, weights_of_compounds
from mtenn_core._engine.evaluation import check_kinds, check_n_poses
from mtenn_core._tables.grouping import Compounds
from mtenn_core.combination import Combination
from mtenn_core.errors import MtennError, PredictionError
from mtenn_core.uncertainty import effective_poses, propagated_error

# The largest number of poses in a batch, unless one compound has more.
LARGEST_BATCH = 2**20


class Chosen(NamedTuple):
    """The columns of the table that a combination takes.

    Attributes
    ----------
    predictions : the columns of the predictions, in the order of the combination's columns
    inputs : the column of each pose input
    deviations : the columns with the standard deviations of the predictions, or none
    """

    predictions: tuple[str, ...]
    inputs: dict[str, str]
    deviations: tuple[str, ...]


class Combined(NamedTuple):
    """The results for all compounds.

    Attributes
    ----------
    predictions : shape (n_compounds,), or (n_compounds, n_results)
    weights : shape (n_poses,), or (n_poses, n_columns). None if a prediction is a vector
    errors : shape (n_compounds,). None without deviations
    effective : the effective number of poses. None if a pose has several weights, or none
    """

    predictions: Tensor
    weights: Tensor | None
    errors: Tensor | None
    effective: Tensor | None


class CompoundError(MtennError):
    """A compound cannot be combined; ``pose`` is one of its poses, counted over all compounds."""

    def __init__(self, message: str, pose: int) -> None:
        super().__init__(message)
        self.pose = pose


def check_choice(combination: Combination, chosen: Chosen) -> None:
    """Raise an error if a combination does not take these columns."""
    who = type(combination).__name__
    declared = combination.pose_columns
    columns = None if declared is None else columns_of(declared)
    n_wanted = 1 if columns is None else columns.number
    found = len(chosen.predictions)
    if n_wanted is not None and found != n_wanted:
        named = f" ({', '.join(columns.names)})" if columns is not None and columns.names else ""
        raise PredictionError(
            f"{who} takes {n_wanted} number(s) per pose{named}; found --column {found} time(s)."
            f" Give one --column for each, in this order"
        )
    names = tuple(combination.pose_inputs)
    if missing := [name for name in names if name not in chosen.inputs]:
        raise PredictionError(
            f"{who} needs the pose input {missing[0]!r}. Name its column with --pose-input"
            f" {missing[0]} or --pose-input {missing[0]}=COLUMN"
        )
    if unknown := [name for name in chosen.inputs if name not in names]:
        raise PredictionError(
            f"{who} takes no pose input {unknown[0]!r}; its pose inputs are"
            f" {', '.join(names) or 'none'}"
        )
    if chosen.deviations and len(chosen.deviations) != found:
        raise PredictionError(
            "each --column needs its own --error-column; found"
            f" {found} and {len(chosen.deviations)}"
        )


def combined(
    combination: Combination,
    compounds: Compounds,
    chosen: Chosen,
    on_poses: Callable[[int], object],
) -> Combined:
    """Return the combined predictions of all compounds, in float64 and without gradients.

    Parameters
    ----------
    on_poses : gets the number of poses of each batch that is done

    Raises
    ------
    CompoundError : a compound has too few poses, an input of the wrong kind, or a combined
        prediction that is not finite
    """
    parts: list[Combined] = []
    with torch.no_grad(), _one_thread():
        for first_compound, first_pose, sizes in batches(compounds.sizes):
            try:
                own = _batch(combination, compounds, chosen, first_pose, sizes)
            except PredictionError as problem:
                raise _named(problem, first_compound, first_pose, sizes) from problem
            parts.append(own)
            on_poses(sum(sizes))
    return Combined(
        torch.cat([own.predictions for own in parts]),
        _joined([own.weights for own in parts]),
        _joined([own.errors for own in parts]),
        _joined([own.effective for own in parts]),
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch use one thread.

    Each operation takes the compounds of one size, often too few for several threads: these would
    wait for one another longer than they work.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def batches(sizes: Sequence[int]) -> Iterator[tuple[int, int, list[int]]]:
    """Yield batches of compounds with at most ``LARGEST_BATCH`` poses.

    Yields
    ------
    the first compound, its first pose, and the number of poses of each compound
    """
    first_compound = first_pose = n_poses = 0
    for compound, size in enumerate(sizes):
        if n_poses and n_poses + size > LARGEST_BATCH:
            yield first_compound, first_pose, list(sizes[first_compound:compound])
            first_compound, first_pose, n_poses = compound, first_pose + n_poses, 0
        n_poses += size
    yield first_compound, first_pose, list(sizes[first_compound:])


def _batch(
    combination: Combination, compounds: Compounds, chosen: Chosen, first: int, sizes: list[int]
) -> Combined:
    n_poses = sum(sizes)

    def column(name: str) -> Tensor:
        return compounds.numbers[name][first : first + n_poses]

    predictions = _together([column(name) for name in chosen.predictions], combination)
    inputs = {name: column(chosen.inputs[name]) for name in combination.pose_inputs}
    for compound, size in enumerate(sizes):
        if size < combination.min_poses:
            check_n_poses(combination, size, compound)
    check_kinds(combination, inputs, sizes)
    # Each function gets its own numbers, because a combination might write to them.
    values = combine_without_gradients(combination, predictions.clone(), inputs, sizes)
    _check_finite(combination, values)
    if values.dim() > 1:
        return Combined(values, None, None, None)
    weights = weights_of_compounds(combination, predictions, inputs, sizes)
    errors = None
    if chosen.deviations:
        deviations = _together([column(name) for name in chosen.deviations], combination)
        per_pose = [size * len(chosen.deviations) for size in sizes]
        errors = propagated_error(weights.flatten(), deviations.flatten(), per_pose)
        if not errors.isfinite().all():
            compound = int((~errors.isfinite()).nonzero()[0])
            message = f"the error is {errors[compound]}. The deviations are too large"
            raise PredictionError(message, compound=compound)
    effective = effective_poses(weights, sizes) if weights.dim() == 1 else None
    return Combined(values, weights, errors, effective)


def _together(columns: list[Tensor], combination: Combination) -> Tensor:
    """Return columns in the shape that a combination takes."""
    return columns[0] if combination.pose_columns is None else torch.stack(columns, dim=1)


def _check_finite(combination: Combination, values: Tensor) -> None:
    wrong = ~values.isfinite()
    if wrong.any():
        compound = int(wrong.nonzero()[0, 0])
        low, high = combination.domain
        between = f". It takes predictions between {low} and {high}"
        raise PredictionError(
            f"{type(combination).__name__} gives {values[compound].tolist()}"
            f"{between if (low, high) != (-math.inf, math.inf) else ''}",
            compound=compound,
        )


def _named(
    problem: PredictionError, first_compound: int, first_pose: int, sizes: list[int]
) -> CompoundError | PredictionError:
    """Return the error with the pose's place among all poses of the table."""
    if problem.pose is not None:
        return CompoundError(str(problem).partition(": ")[2], first_pose + problem.pose)
    if problem.compound is not None:
        message = str(problem).removeprefix(f"compound {problem.compound}: ")
        return CompoundError(message, first_pose + sum(sizes[: problem.compound]))
    return problem


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None
