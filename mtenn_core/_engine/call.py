"""Check the arguments of one call of a multi-pose model, and cut its poses into chunks."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtenn_core._engine.chunk import Chunk
from mtenn_core._engine.columns import Columns
from mtenn_core._engine.evaluation import check_n_poses, inputs_like, noted_sizes
from mtenn_core._engine.mode import Options
from mtenn_core.combination import Combination
from mtenn_core.errors import PredictionError

Sizes = Sequence[int] | Tensor | None


class Call(NamedTuple):
    """The checked arguments of a call, in one process.

    Attributes
    ----------
    poses : one entry per pose; with ``collated``, one batch of all poses
    sizes : the number of poses of each compound
    inputs : the pose inputs by name, shape (n_poses,)
    collated : True if ``poses`` is one batch
    chunks : the poses, cut into groups that run together
    shared_inputs, shared_outputs : the inputs of the shared part, and its outputs; one entry per
        compound. None without a shared part, or if it has not run.
    """

    poses: list[Any]
    sizes: list[int]
    inputs: dict[str, Tensor]
    collated: bool
    chunks: list[Chunk]
    shared_inputs: list[Any] | None = None
    shared_outputs: list[Any] | None = None


def checked_call(
    options: Options,
    chunk_size: int | None,
    poses: Iterable[Any],
    sizes: Sizes,
    pose_inputs: Mapping[str, Any] | None,
    shared_inputs: Sequence[Any] | None,
    collated: bool,
) -> Call:
    """Return the arguments of a call in one process. Raise an error if they do not fit together.

    Parameters
    ----------
    options : the options of the model
    chunk_size : the number of poses that run together; None for all poses
    poses, sizes, pose_inputs, shared_inputs, collated : see
        :meth:`mtenn_core.MultiPoseModel.forward`

    Raises
    ------
    PredictionError : two arguments disagree; the message describes the first disagreement
    """
    poses = [poses] if collated else _as_list(poses)
    own_sizes = checked_sizes(None if collated else len(poses), sizes)
    given = {} if pose_inputs is None else pose_inputs
    if not isinstance(given, Mapping):
        raise PredictionError(
            "pose_inputs must be a dict that has one number per pose for each name; found"
            f" {type(given).__name__}"
        )
    n_poses = sum(own_sizes)
    inputs = _checked_inputs(options.combinations, given, n_poses)
    if collated:
        chunks = [Chunk(options.pose_model, poses[0], 0, n_poses, None, options.columns)]
    else:
        chunks = _chunks(options, poses, chunk_size or n_poses)
    shared = _checked_shared(options, shared_inputs, len(own_sizes))
    return Call(poses, own_sizes, inputs, collated, chunks, shared)


def checked_poses(
    combinations: Sequence[Combination],
    columns: Columns | None,
    predictions: Tensor,
    sizes: Sizes,
    pose_inputs: Mapping[str, Any] | None,
) -> tuple[list[int], dict[str, Tensor]]:
    """Return the number of poses of each compound, and the pose inputs, for known predictions.

    Parameters
    ----------
    combinations, columns : see :class:`Options`
    predictions : shape (n_poses,), or (n_poses, n_columns)
    sizes, pose_inputs : see :meth:`mtenn_core.MultiPoseModel.pose_weights`

    Raises
    ------
    PredictionError : two arguments disagree
    """
    shape = tuple(predictions.shape) if isinstance(predictions, Tensor) else ()
    fits = len(shape) == 1
    if columns is not None:
        fits = len(shape) == 2 and 0 < shape[1] == (columns.number or shape[1])
    if not (fits and predictions.is_floating_point()):
        rule = "a vector of floating-point numbers, one per pose,"
        if columns is not None:
            rule = f"floating-point numbers, {columns.number or 'some'} per pose,"
        found = shape if isinstance(predictions, Tensor) else type(predictions)
        raise PredictionError(
            f"pose_predictions must be {rule} like the pose_predictions of a call; found {found}"
        )
    own_sizes = checked_sizes(len(predictions), sizes)
    of_call = noted_sizes(predictions)
    if of_call is not None and of_call != own_sizes:
        raise PredictionError(
            "sizes must be those of the call that made these pose predictions, for"
            f" {len(of_call)} compounds; found other sizes, or none. Pass the sizes of that call."
        )
    inputs = _checked_inputs(combinations, pose_inputs or {}, len(predictions))
    total_sizes(combinations, [own_sizes], sizes)
    return own_sizes, inputs_like(predictions, inputs)


def _chunks(options: Options, poses: list[Any], chunk_size: int) -> list[Chunk]:
    pose_model, collate, columns = options.pose_model, options.collate, options.columns
    if collate is None:
        return [
            Chunk(pose_model, pose, index, 1, None, columns) for index, pose in enumerate(poses)
        ]
    parts = [(poses[i : i + chunk_size], i) for i in range(0, len(poses), chunk_size)]
    return [Chunk(pose_model, part, first, len(part), collate, columns) for part, first in parts]


def total_sizes(
    combinations: Sequence[Combination], shares: Sequence[Sequence[int]], sizes: Sizes
) -> list[int]:
    """Return the number of poses of each compound, summed over all ranks.

    Parameters
    ----------
    shares : for each rank, the number of poses of each compound
    sizes : the argument of the call; None for one compound
    """
    totals = list(map(sum, zip(*shares, strict=True))) if len(shares) > 1 else list(shares[0])
    fewest = min(totals)
    for combination in combinations:
        if fewest < max(1, combination.min_poses):
            for compound, size in enumerate(totals):
                check_n_poses(combination, size, None if sizes is None else compound)
    return totals


def _as_list(poses: Iterable[Any]) -> list[Any]:
    # An object with keys is one dict, or one Data or Batch of PyG. Iteration over it would give
    # names or tensors instead of poses. Only a column of a table has keys, its labels, and gives
    # its values.
    is_column = hasattr(poses, "__array__") and getattr(poses, "ndim", None) == 1
    one_pose = isinstance(poses, str) or (hasattr(poses, "keys") and not is_column)
    if not one_pose and _has_order(poses):
        with contextlib.suppress(TypeError):
            return list(poses)
    raise PredictionError(
        f"poses must be a sequence with one entry per pose; found {type(poses).__name__}. Put a"
        " single pose into a list. Pass one batch of poses with collated=True."
    )


def _has_order(values: Iterable[Any]) -> bool:
    """Return False if iteration gives keys, names of columns or an arbitrary order."""
    return not (isinstance(values, Mapping | set | frozenset) or hasattr(values, "columns"))


def checked_sizes(n_poses: int | None, sizes: Sizes) -> list[int]:
    """Return the number of poses of each compound in one process.

    Parameters
    ----------
    n_poses : the number of poses; None if they come in one batch
    """
    if n_poses == 0:
        compound = None if sizes is None else 0
        raise PredictionError("expected at least one pose; found none", compound=compound)
    if sizes is None:
        if n_poses is None:
            raise PredictionError(
                "poses that come in one batch need the argument sizes: pass the number of poses"
                " of each compound"
            )
        return [n_poses]
    try:
        sizes = _whole_numbers(sizes)
    except TypeError:
        raise PredictionError(
            f"sizes must be whole numbers, one per compound; found {sizes!r}"
        ) from None
    if not sizes:
        raise PredictionError("sizes must name at least one compound; found none")
    if min(sizes) < 0:
        compound = next(i for i, size in enumerate(sizes) if size < 0)
        raise PredictionError(
            f"compound {compound}: a number of poses must not be negative; found {sizes[compound]}",
            compound=compound,
        )
    if n_poses is not None and sum(sizes) != n_poses:
        raise PredictionError(
            f"sizes must add up to the number of poses. They describe {len(sizes)} compounds with"
            f" {sum(sizes)} poses in all; found {n_poses} poses"
        )
    return sizes


def given_sizes(sizes: Sizes, ptr: Sizes) -> Sizes:
    """Return the number of poses of each compound from one of two arguments; None if there is none.

    Raises
    ------
    PredictionError : both are given, or ``ptr`` is no list of offsets
    """
    if ptr is None:
        return sizes
    if sizes is not None:
        raise PredictionError(
            "sizes and ptr both describe the compounds; found both. Pass only one of them."
        )
    return sizes_between(ptr)


def sizes_between(ptr: Sequence[int] | Tensor) -> list[int]:
    """Return the number of poses of each compound, from the offsets of their first poses.

    Parameters
    ----------
    ptr : shape (n_compounds + 1,); it begins with 0 and ends with the number of poses

    Raises
    ------
    PredictionError : ``ptr`` is no such list
    """
    try:
        offsets = _whole_numbers(ptr)
    except TypeError:
        offsets = []
    if offsets[:1] != [0] or sorted(offsets) != offsets or len(offsets) == 1:
        raise PredictionError(
            "ptr must be whole numbers that begin with 0 and never fall. Compound i has the poses"
            f" from ptr[i] to ptr[i + 1]; found {ptr!r}"
        )
    return list(map(operator.sub, offsets[1:], offsets))


def _whole_numbers(values: Any) -> list[int]:
    """Return a list, tensor or array of whole numbers as a list. Raise a TypeError for others."""
    if not _has_order(values):
        raise TypeError
    if isinstance(values, Tensor) and values.dtype == torch.int64 and values.dim() == 1:
        return values.tolist()
    return list(map(operator.index, values.tolist() if hasattr(values, "tolist") else values))


def _checked_inputs(
    combinations: Sequence[Combination], given: Mapping[str, Any], n_poses: int
) -> dict[str, Tensor]:
    """Return the pose inputs of all combinations, in the order in which these declare them."""
    who, names = type(combinations[0]).__name__, tuple(combinations[0].pose_inputs)
    if len(combinations) > 1:
        names = tuple({name: None for each in combinations for name in each.pose_inputs})
        takers = [each for each in combinations if each.pose_inputs] or combinations
        who = " or ".join({type(each).__name__: None for each in takers})
    for name in given:
        if name not in names:
            raise PredictionError(
                f"pose_inputs[{name!r}]: {who} takes no input of this name. Its pose_inputs are"
                f" {names}."
            )
    inputs = {}
    for name in names:
        if name not in given:
            raise PredictionError(
                f"{who} needs pose_inputs={{{name!r}: …}}, one number for each pose; found"
                f" {sorted(given)}"
            )
        inputs[name] = _numbers(name, given[name])
        if inputs[name].shape != (n_poses,):
            raise PredictionError(
                f"pose_inputs[{name!r}] must be one number for each pose, shape"
                f" {(n_poses,)}; found shape {tuple(inputs[name].shape)}"
            )
    return inputs


def _checked_shared(
    options: Options, given: Sequence[Any] | None, n_compounds: int
) -> list[Any] | None:
    """Return the inputs of the shared part, one per compound. None if there is no such part."""
    if options.shared is None:
        if given is not None:
            raise PredictionError(
                "shared_inputs are the inputs of a part that all poses of a compound share. This"
                " model has no such part. Make it with MultiPoseModel(..., shared=a module)."
            )
        return None
    rule = "shared_inputs must be a list with one input of the shared part for each of the"
    if isinstance(given, Tensor) or not isinstance(given, Sequence):
        raise PredictionError(
            f"{rule} {n_compounds} compounds; found {type(given).__name__}. Put the input of a"
            " single compound into a list."
        )
    if len(given) != n_compounds:
        raise PredictionError(f"{rule} {n_compounds} compounds; found {len(given)} inputs.")
    return list(given)


def _numbers(name: str, values: Any) -> Tensor:
    try:
        if not isinstance(values, Tensor):
            values = as_tensor(values)
    except (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError) as error:
        raise PredictionError(f"pose_inputs[{name!r}]: {error}") from error
    if values.is_complex():
        raise PredictionError(f"pose_inputs[{name!r}] must be real numbers; found {values.dtype}")
    return values


def as_tensor(values: Any) -> Tensor:
    """Return numbers as a tensor, in the order of their positions.

    torch would ask for ``values[0]``, ``values[1]`` and so on. In a column of a table, these are
    labels.
    """
    # torch reads tensors on a GPU from other libraries by itself.
    if not hasattr(values, "__cuda_array_interface__"):
        values = _by_position(values)
    if isinstance(values, list) and any(isinstance(value, Tensor) for value in values):
        # Stack the numbers, because torch.as_tensor would lose their graphs.
        return torch.stack([torch.as_tensor(value).reshape(()) for value in values])
    return torch.as_tensor(values, dtype=torch.float64)


def _by_position(values: Any) -> Any:
    """Return numbers as a list, or as an array that torch takes and that nobody else changes."""
    if hasattr(values, "filled"):  # a masked array, whose own array has numbers behind the mask
        return values.tolist()
    if hasattr(values, "__array__"):
        array = values.__array__()
        if array.dtype.kind == "O":
            return _by_position(array.tolist())
        if array.dtype.kind not in "biuf":
            raise TypeError(f"expected real numbers; found {array.dtype}")
        return array.astype("float64")
    if isinstance(values, str | bytes) or not (isinstance(values, Iterable) and _has_order(values)):
        return values  # torch takes a number, and refuses everything else
    return [_unwrapped(value) for value in values]


def _unwrapped(value: Any) -> Any:
    """Return an array with one number and no dimension as a number."""
    is_array = hasattr(value, "__array__") and not isinstance(value, Tensor)
    return value.item() if is_array and value.ndim == 0 else value
