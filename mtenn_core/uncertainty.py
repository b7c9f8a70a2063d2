"""Error bars of combined predictions, and the effective number of poses.

The three functions answer different questions. :func:`effective_poses` says from how many poses a
prediction comes. :func:`propagated_error` is the error that the pose model's errors cause.
:func:`jackknife_error` is the error of a random sample of poses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtenn_core._engine.call import Sizes, as_tensor, checked_poses, checked_sizes, given_sizes
from mtenn_core._engine.compounds import combine_compounds, combine_full_depth
from mtenn_core._engine.declarations import overrides
from mtenn_core._engine.evaluation import PoseGradients, PoseInputs, noted_sizes
from mtenn_core._engine.precision import at_least_float32
from mtenn_core.combination import Combination
from mtenn_core.errors import PredictionError

# The leave-one-out sets that are combined together have at most so many predictions.
LARGEST_BATCH = 1_000_000


def effective_poses(
    pose_weights: Tensor,
    sizes: Sequence[int] | Tensor | None = None,
    *,
    ptr: Sequence[int] | Tensor | None = None,
) -> Tensor:
    """Return the effective number of poses of each compound, (Σ w_i)² / Σ w_i².

    This is Kish's effective sample size [1]_. If the weights sum to 1, it is 1 / Σ w_i². Then
    independent errors of one size s give the combined prediction the error s / √effective_poses.
    For M equal weights it is M, and for one nonzero weight it is 1.

    Negative weights, as the Boltzmann mean has them, count with their sign. The result is then
    below 1 if the combination makes errors larger. It is 0 if the weights sum to 0, and NaN if all
    of them are 0.

    Parameters
    ----------
    pose_weights : shape (n_poses,), from :meth:`mtenn_core.MultiPoseModel.pose_weights`. Their sum
        has no effect.
    sizes, ptr : the number of poses of each compound, or the offsets of the compounds, as for
        :meth:`mtenn_core.MultiPoseModel.forward`. Without them, there is one compound.

    Returns
    -------
    shape (); with ``sizes`` or ``ptr``, shape (n_compounds,). Float32 at least.

    Raises
    ------
    PredictionError : the arguments do not fit together, or a weight is NaN or infinite

    References
    ----------
    .. [1] L. Kish, Survey Sampling, Wiley, 1965.
    """
    compounds = _compounds(pose_weights, sizes, ptr)
    weights = _checked_weights(pose_weights, compounds)
    # Weights of 1e-30 would vanish when they are squared.
    weights = weights / compounds.largest(weights.abs())[compounds.of_pose]
    return compounds.shaped(compounds.sum(weights).square() / compounds.sum(weights.square()))


def propagated_error(
    pose_weights: Tensor,
    errors: Any,
    sizes: Sequence[int] | Tensor | None = None,
    *,
    ptr: Sequence[int] | Tensor | None = None,
) -> Tensor:
    """Return the standard deviation of each combined prediction, to first order: √(wᵀ Σ w).

    Σ is the covariance of the pose predictions. First order means that the weights do not change
    within the errors. This holds if the errors are small compared with kT, or with 1 / pred_scale.
    For larger errors, the result is

    - too small if poses tie, because the errors decide which one is the best;
    - too large if one pose has nearly all of the weight, because errors put another in its place;
    - not the only effect: errors also shift the combined prediction. The smooth minimum falls by
      about Σ w_i (1 - w_i) s_i² / 2kT for independent errors s_i.

    For example, the minimum of four equal poses (``normalize=True``), in units of kT:

    ===================  =====  =====  =====  =====
    error of each pose    0.1    0.3    1      3
    first order           0.05   0.15   0.50   1.50
    100,000 draws         0.05   0.15   0.56   1.98
    fall of their mean    0.00   0.03   0.34   1.99
    ===================  =====  =====  =====  =====

    Parameters
    ----------
    pose_weights : shape (n_poses,), from :meth:`mtenn_core.MultiPoseModel.pose_weights`
    errors : one of

        - standard deviations of independent errors, shape (n_poses,): a tensor, a list, an array or
          a column of a table;
        - the covariance of all pose predictions, shape (n_poses, n_poses). Covariances between
          poses of different compounds have no effect.
        - one covariance for each compound, a list of matrices of shape (size, size).

    sizes, ptr : as for :func:`effective_poses`

    Returns
    -------
    shape (); with ``sizes`` or ``ptr``, shape (n_compounds,). In the unit of ``errors``, float32 at
    least, and differentiable with respect to ``errors``.

    Raises
    ------
    PredictionError : the arguments do not fit together; or a standard deviation or variance is
        negative, NaN or infinite; or a covariance is not symmetric or not positive semidefinite.
        The message names the pose and the compound.
    """
    compounds = _compounds(pose_weights, sizes, ptr)
    weights = _checked_weights(pose_weights, compounds)
    blocks = _blocks(errors, compounds)
    if blocks is None:
        deviations = _checked_deviations(errors, compounds).to(weights)
        variances = compounds.sum((weights * deviations).square())
    else:
        variances = _variances(weights, blocks, compounds)
    return compounds.shaped(_root(variances))


def jackknife_error(
    combination: Combination,
    pose_predictions: Tensor,
    sizes: Sequence[int] | Tensor | None = None,
    pose_inputs: Mapping[str, Any] | None = None,
    *,
    ptr: Sequence[int] | Tensor | None = None,
) -> Tensor:
    """Return the jackknife error of each combined prediction over its poses.

    With θ_(i), the combined prediction without pose i, and their mean θ̄, it is
    √((M - 1)/M Σ (θ_(i) - θ̄)²) [1]_. It estimates how much the prediction would change with another
    sample of poses. This holds if the poses are a random sample, such as independent frames of a
    simulation. It says nothing about the pose model's errors. If the prediction comes from a few of
    many poses (see :func:`effective_poses`), it does not show the bias of an exponential average:
    the sample may lack the lowest poses.

    M poses take M (M - 1) predictions. They are combined in batches of at most a million.

    Parameters
    ----------
    combination : for example ``model.combination``
    pose_predictions : shape (n_poses,), as from a call of a :class:`mtenn_core.MultiPoseModel`
    sizes, pose_inputs, ptr : the arguments of that call

    Returns
    -------
    shape (); with ``sizes`` or ``ptr``, shape (n_compounds,). Without a graph, in the unit of
    ``pose_predictions``, float32 at least. NaN for a compound with one pose, or with no more poses
    than the combination's ``min_poses``.

    Raises
    ------
    PredictionError : the arguments do not fit together, or a prediction is NaN or infinite

    References
    ----------
    .. [1] B. Efron and C. Stein, The jackknife estimate of variance, Ann. Stat. 9, 586 (1981).
    """
    if not isinstance(combination, Combination):
        raise TypeError(
            "combination must be an instance of Combination, such as model.combination; found"
            f" {combination!r}"
        )
    own_sizes, inputs = checked_poses(
        combination, pose_predictions, given_sizes(sizes, ptr), pose_inputs
    )
    several = sizes is not None or ptr is not None
    of_pose = _compound_of_pose(own_sizes).to(pose_predictions.device)
    compounds = _Compounds(own_sizes, several, of_pose)
    compounds.check("the prediction", pose_predictions, ~pose_predictions.isfinite())
    wide = at_least_float32(pose_predictions.dtype)
    with torch.no_grad():
        n_poses = torch.tensor(own_sizes, device=pose_predictions.device)
        left = torch.full_like(pose_predictions, torch.nan, dtype=wide)
        enough = (n_poses > max(1, combination.min_poses))[compounds.of_pose]
        left[enough] = _without_each_pose(
            combination,
            pose_predictions.detach().to(wide),
            {name: numbers.to(wide) for name, numbers in inputs.items()},
            own_sizes,
            enough.cpu().nonzero().flatten(),
        )
        mean = compounds.sum(left) / n_poses
        squares = compounds.sum((left - mean[compounds.of_pose]).square())
        return compounds.shaped(_root(squares * (n_poses - 1) / n_poses))


class _Compounds(NamedTuple):
    """The compounds of a call.

    Attributes
    ----------
    sizes : the number of poses of each compound
    several : False if the call has one compound and its result the shape ()
    of_pose : the compound of each pose, shape (n_poses,)
    """

    sizes: list[int]
    several: bool
    of_pose: Tensor

    def sum(self, numbers: Tensor) -> Tensor:
        """Return the sum over each compound's poses, shape (n_compounds,)."""
        return numbers.new_zeros(len(self.sizes)).index_add(0, self.of_pose, numbers)

    def largest(self, numbers: Tensor) -> Tensor:
        """Return the largest of each compound's numbers, shape (n_compounds,)."""
        start = numbers.new_zeros(len(self.sizes))
        return start.scatter_reduce(0, self.of_pose, numbers, "amax", include_self=False)

    def shaped(self, numbers: Tensor) -> Tensor:
        """Return numbers of compounds in the shape of the call's result."""
        return numbers if self.several else numbers.reshape(())

    def check(self, what: str, numbers: Tensor, wrong: Tensor, rule: str = "finite") -> None:
        """Raise an error that names the first pose whose number is wrong, if there is one.

        Parameters
        ----------
        numbers, wrong : shape (n_poses,)
        """
        if wrong.any():
            pose = int(wrong.nonzero()[0])
            raise self.error(pose, f"{what} must be {rule}; found {numbers[pose].item()}")

    def error(self, pose: int, message: str) -> PredictionError:
        """Return an error that names a pose."""
        compound = int(self.of_pose[pose])
        within = pose - sum(self.sizes[:compound])
        where = f" (pose {within} of compound {compound})" if self.several else ""
        return PredictionError(f"pose {pose}{where}: {message}", pose=pose, compound=compound)


def _compounds(pose_weights: Tensor, sizes: Sizes, ptr: Sizes) -> _Compounds:
    """Return the compounds to which weights belong. Raise an error if they do not fit."""
    is_vector = isinstance(pose_weights, Tensor) and pose_weights.dim() == 1
    if not (is_vector and pose_weights.is_floating_point()):
        is_tensor = isinstance(pose_weights, Tensor)
        found = tuple(pose_weights.shape) if is_tensor else type(pose_weights)
        raise PredictionError(
            "pose_weights must be a vector of floating-point numbers, one per pose, as"
            f" MultiPoseModel.pose_weights returns it; found {found}"
        )
    several = sizes is not None or ptr is not None
    own_sizes = checked_sizes(len(pose_weights), given_sizes(sizes, ptr))
    of_call = noted_sizes(pose_weights)
    if of_call is not None and of_call != own_sizes:
        raise PredictionError(
            f"these are the weights of {len(of_call)} compounds. Pass the sizes of that call."
        )
    if 0 in own_sizes:
        compound = own_sizes.index(0)
        raise PredictionError(
            f"compound {compound}: expected at least one pose; found none", compound=compound
        )
    of_pose = _compound_of_pose(own_sizes).to(pose_weights.device)
    return _Compounds(own_sizes, several, of_pose)


def _compound_of_pose(sizes: list[int]) -> Tensor:
    """Return the compound of each pose, shape (n_poses,), on the CPU."""
    # The default device may be another one.
    repeats = torch.tensor(sizes, device="cpu")
    return torch.repeat_interleave(repeats, output_size=sum(sizes))


def _checked_weights(pose_weights: Tensor, compounds: _Compounds) -> Tensor:
    """Return pose weights in float32 at least."""
    compounds.check("its weight", pose_weights, ~pose_weights.isfinite())
    return pose_weights.to(at_least_float32(pose_weights.dtype))


def _root(variances: Tensor) -> Tensor:
    """Return the square root, with derivative 0 at 0, where that of the root is infinite."""
    positive = variances > 0
    roots = torch.where(positive, variances, 1.0).sqrt()
    return torch.where(positive, roots, variances * 0.0)  # NaN stays NaN


def _checked_deviations(errors: Any, compounds: _Compounds) -> Tensor:
    """Return standard deviations, shape (n_poses,)."""
    deviations = _numbers(errors)
    if deviations.shape != compounds.of_pose.shape:
        n_poses = len(compounds.of_pose)
        raise PredictionError(
            f"errors must be standard deviations, shape ({n_poses},), or a covariance, shape"
            f" ({n_poses}, {n_poses}), or a list with one covariance for each compound; found shape"
            f" {tuple(deviations.shape)}"
        )
    wrong = ~deviations.isfinite() | (deviations < 0)
    compounds.check("its standard deviation", deviations, wrong, "finite and not negative")
    return deviations


def _numbers(errors: Any) -> Tensor:
    """Return errors as a tensor of floating-point numbers."""
    try:
        numbers = errors if isinstance(errors, Tensor) else as_tensor(errors)
    except (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError) as error:
        raise PredictionError(f"errors: {error}") from error
    if numbers.is_complex():
        raise PredictionError(f"errors must be real numbers; found {numbers.dtype}")
    return numbers if numbers.is_floating_point() else numbers.to(torch.float64)


def _blocks(errors: Any, compounds: _Compounds) -> list[Tensor] | None:
    """Return the covariance of each compound's poses, or None for standard deviations."""
    sizes = compounds.sizes
    if not (isinstance(errors, list | tuple) and any(getattr(e, "ndim", 0) == 2 for e in errors)):
        errors = _numbers(errors)
        if errors.dim() == 2:
            n_poses = len(compounds.of_pose)
            if errors.shape != (n_poses, n_poses):
                raise PredictionError(
                    f"a covariance of all poses must have the shape {(n_poses, n_poses)}; found"
                    f" {tuple(errors.shape)}"
                )
            ends = accumulate(sizes)
            return [
                errors[end - size : end, end - size : end]
                for size, end in zip(sizes, ends, strict=True)
            ]
        if errors.dim() != 3:
            return None
    if len(errors) != len(sizes):
        raise PredictionError(
            f"expected one covariance for each of {len(sizes)} compounds; found {len(errors)}"
        )
    return [_checked_shape(_numbers(block), compounds, i) for i, block in enumerate(errors)]


def _checked_shape(block: Tensor, compounds: _Compounds, compound: int) -> Tensor:
    size = compounds.sizes[compound]
    if block.shape != (size, size):
        raise PredictionError(
            f"compound {compound}: a covariance of {size} pose(s) must have the shape"
            f" {(size, size)}; found {tuple(block.shape)}",
            compound=compound,
        )
    return block


def _variances(weights: Tensor, blocks: list[Tensor], compounds: _Compounds) -> Tensor:
    """Return wᵀ Σ w of each compound, shape (n_compounds,). Equal sizes are computed together."""
    of_size: dict[int, list[int]] = {}
    for compound, size in enumerate(compounds.sizes):
        of_size.setdefault(size, []).append(compound)
    own_weights = weights.split(compounds.sizes)
    variances = weights.new_zeros(len(compounds.sizes))
    for chosen in of_size.values():
        stacked = torch.stack([blocks[i] for i in chosen])
        _check_covariances(stacked, chosen, compounds)
        w = torch.stack([own_weights[i] for i in chosen])
        # A product of matrices would run in half precision under autocast.
        products = ((stacked.to(weights) * w.unsqueeze(1)).sum(-1) * w).sum(-1)
        places = torch.tensor(chosen, device=weights.device)
        variances = variances.index_add(0, places, products)
    # Roundoff may leave a variance of zero below zero.
    return variances.clamp(min=0.0)


def _check_covariances(stacked: Tensor, numbers: list[int], compounds: _Compounds) -> None:
    """Raise an error that names the first compound whose covariance is none, if there is one.

    Parameters
    ----------
    stacked : covariances of equal size, shape (n, size, size)
    numbers : their compounds
    """
    # Covariances may come from float32, so they are symmetric and definite only to its precision.
    eps = max(torch.finfo(dtype).eps for dtype in (torch.float32, stacked.dtype))
    tolerance = stacked.shape[-1] * eps
    covariances = stacked.detach().to(torch.float64)
    _check_entries(covariances, numbers, compounds, tolerance)
    eigenvalues = torch.linalg.eigvalsh(covariances)
    wrong = eigenvalues[:, 0] < -tolerance * eigenvalues[:, -1].abs()
    if wrong.any():
        found = int(wrong.nonzero()[0])
        raise PredictionError(
            f"compound {numbers[found]}: the covariance must be positive semidefinite; found the"
            f" eigenvalue {eigenvalues[found, 0].item():.3g}. A combination of these pose"
            " predictions would have a negative variance.",
            compound=numbers[found],
        )


def _check_entries(
    covariances: Tensor, numbers: list[int], compounds: _Compounds, tolerance: float
) -> None:
    """Raise an error that names the first pose with a wrong variance or covariance."""

    def error(where: Tensor, message: str) -> PredictionError:
        compound, i, *_ = where.tolist()
        first = sum(compounds.sizes[: numbers[compound]])
        return compounds.error(first + i, message)

    wrong = ~covariances.isfinite()
    if wrong.any():
        where = wrong.nonzero()[0]
        found = covariances[tuple(where)].item()
        raise error(where, f"its covariances must be finite; found {found}")
    variances = covariances.diagonal(dim1=-2, dim2=-1)
    if (variances < 0).any():
        where = (variances < 0).nonzero()[0]
        found = variances[tuple(where)].item()
        raise error(where, f"its variance must not be negative; found {found}")
    largest = covariances.abs().amax(dim=(-2, -1), keepdim=True)
    wrong = (covariances - covariances.mT).abs() > tolerance * largest
    if wrong.any():
        where = wrong.nonzero()[0]
        k, i, j = where.tolist()
        one, other = covariances[k, i, j].item(), covariances[k, j, i].item()
        raise error(
            where,
            f"a covariance must be symmetric; found {one} in row {i} and column {j}, and {other}"
            f" in row {j} and column {i}",
        )


def _without_each_pose(
    combination: Combination,
    predictions: Tensor,
    inputs: PoseInputs,
    sizes: list[int],
    chosen: Tensor,
) -> Tensor:
    """Return the combined predictions without each of the chosen poses, in their order.

    Parameters
    ----------
    predictions, inputs : the numbers of all poses, shape (n_poses,)
    chosen : places of poses, shape (n_chosen,)
    """
    values = [predictions.new_zeros(0)]
    for places, n_poses in _leave_one_out(sizes, chosen):
        places = places.to(predictions.device)
        own = predictions[places], {name: numbers[places] for name, numbers in inputs.items()}
        values.append(_combine(combination, *own, n_poses))
    return torch.cat(values)


def _leave_one_out(sizes: list[int], chosen: Tensor) -> Iterator[tuple[Tensor, list[int]]]:
    """Yield batches of sets, each of which is a compound without one of the chosen poses.

    Yields
    ------
    places : the places of the poses of all sets, one set after the other
    n_poses : the number of poses of each set
    """
    in_call = torch.tensor(sizes, device="cpu")
    compounds = _compound_of_pose(sizes)[chosen]
    starts = (in_call.cumsum(0) - in_call)[compounds]
    n_poses = in_call[compounds] - 1
    ends = n_poses.cumsum(0)
    first = 0
    while first < len(chosen):
        before = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(torch.searchsorted(ends, before + LARGEST_BATCH, right=True)))
        own, total = n_poses[first:last], int(ends[last - 1]) - before
        sets = first + torch.repeat_interleave(own, output_size=total)
        places = torch.arange(before, before + total, device="cpu")
        places += (starts - ends + n_poses)[sets]
        places += places >= chosen[sets]  # jump over the pose
        yield places, own.tolist()
        first = last


def _combine(
    combination: Combination, predictions: Tensor, inputs: PoseInputs, sizes: list[int]
) -> Tensor:
    """Return the combined prediction of each compound, shape (n_compounds,)."""
    if overrides(type(combination), "combine"):
        return combine_compounds(combination, predictions, inputs, sizes, closed_form=True)
    # It defines only forward, which gets no parameters here.
    no_gradients = [PoseGradients({}, dict)] * len(sizes)
    return combine_full_depth(combination, predictions, inputs, sizes, no_gradients)
