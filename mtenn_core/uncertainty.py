"""Error bars of combined predictions, and the effective number of poses.

The three functions answer different questions. :func:`effective_poses` says from how many poses a
prediction comes. :func:`propagated_error` is the error that the pose model's errors cause.
:func:`jackknife_error` is the error of a random sample of poses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mtenn_core._engine.call import Sizes, checked_poses, checked_sizes, given_sizes
from mtenn_core._engine.compound_index import CompoundIndex, compound_of_pose
from mtenn_core._engine.covariance import (
    checked_deviations,
    covariance_blocks,
    weighted_variances,
)
from mtenn_core._engine.declarations import checked_instance
from mtenn_core._engine.evaluation import noted_sizes
from mtenn_core._engine.leave_one_out import predictions_without_each_pose
from mtenn_core._engine.precision import at_least_float32
from mtenn_core.combination import Combination
from mtenn_core.errors import PredictionError


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
    - too large if one pose has nearly all of the weight, because errors put another in its place.

    Errors also shift the combined prediction. The smooth minimum falls by about
    Σ w_i (1 - w_i) s_i² / 2kT for independent errors s_i.

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
    dtype = weights.dtype
    if weights.device.type != "mps":  # it has no float64
        # Squares of energies in joules underflow in float32.
        weights = weights.to(torch.float64)
    blocks = covariance_blocks(errors, compounds)
    if blocks is None:
        deviations = checked_deviations(errors, compounds).to(weights)
        variances = compounds.sum((weights * deviations).square())
    else:
        variances = weighted_variances(weights, blocks, compounds)
    return compounds.shaped(_root(variances)).to(dtype)


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
    ValueError : ``combination`` is stochastic, or takes several numbers per pose

    References
    ----------
    .. [1] B. Efron and C. Stein, The jackknife estimate of variance, Ann. Stat. 9, 586 (1981).
    """
    checked_instance(
        combination, "combination must be an instance of Combination, such as model.combination"
    )
    if combination.stochastic:
        raise ValueError(
            f"{type(combination).__name__} is stochastic. The jackknife would show its random"
            " numbers, and not the effect of the poses."
        )
    if combination.pose_columns is not None:
        raise ValueError(
            f"{type(combination).__name__} takes several numbers per pose, and jackknife_error only"
            f" combinations of one number; found pose_columns = {combination.pose_columns!r}"
        )
    own_sizes, inputs = checked_poses(
        (combination,), None, pose_predictions, given_sizes(sizes, ptr), pose_inputs
    )
    several = sizes is not None or ptr is not None
    of_pose = compound_of_pose(own_sizes).to(pose_predictions.device)
    compounds = CompoundIndex(own_sizes, several, of_pose)
    compounds.check("the prediction", pose_predictions, ~pose_predictions.isfinite())
    wide = at_least_float32(pose_predictions.dtype)
    with torch.no_grad():
        n_poses = torch.tensor(own_sizes, device=pose_predictions.device)
        left = torch.full_like(pose_predictions, torch.nan, dtype=wide)
        enough = (n_poses > max(1, combination.min_poses))[compounds.of_pose]
        left[enough] = predictions_without_each_pose(
            combination,
            pose_predictions.detach().to(wide),
            {name: numbers.to(wide) for name, numbers in inputs.items()},
            own_sizes,
            enough.cpu().nonzero().flatten(),
        )
        mean = compounds.sum(left) / n_poses
        squares = compounds.sum((left - mean[compounds.of_pose]).square())
        return compounds.shaped(_root(squares * (n_poses - 1) / n_poses))


def _compounds(pose_weights: Tensor, sizes: Sizes, ptr: Sizes) -> CompoundIndex:
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
            "sizes must be those of the call that made these pose weights, for"
            f" {len(of_call)} compounds; found other sizes, or none. Pass the sizes of that call."
        )
    if 0 in own_sizes:
        compound = own_sizes.index(0)
        raise PredictionError(
            f"compound {compound}: expected at least one pose; found none", compound=compound
        )
    of_pose = compound_of_pose(own_sizes).to(pose_weights.device)
    return CompoundIndex(own_sizes, several, of_pose)


def _checked_weights(pose_weights: Tensor, compounds: CompoundIndex) -> Tensor:
    """Return pose weights in float32 at least."""
    compounds.check("its weight", pose_weights, ~pose_weights.isfinite())
    return pose_weights.to(at_least_float32(pose_weights.dtype))


def _root(variances: Tensor) -> Tensor:
    """Return the square roots. At 0, the derivative is 0 instead of infinite."""
    positive = variances > 0
    roots = torch.where(positive, variances, 1.0).sqrt()
    return torch.where(positive, roots, variances * 0.0)  # NaN stays NaN
