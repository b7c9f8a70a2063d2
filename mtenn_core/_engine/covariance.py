"""Standard deviations and covariances of pose predictions: their checks, and variances of sums."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from mtenn_core._engine.call import as_tensor
from mtenn_core._engine.compound_index import CompoundIndex
from mtenn_core.errors import PredictionError


def checked_deviations(errors: Any, compounds: CompoundIndex) -> Tensor:
    """Return standard deviations, shape (n_poses,). Raise an error if they are none."""
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


def covariance_blocks(errors: Any, compounds: CompoundIndex) -> list[Tensor] | None:
    """Return the covariance of each compound's poses, or None for standard deviations."""
    # The matrices of a list may differ in size, so they are no tensor.
    is_list = isinstance(errors, list | tuple) and any(getattr(e, "ndim", 0) == 2 for e in errors)
    if not is_list:
        errors = _numbers(errors)
        if errors.dim() == 2:
            return _blocks_on_diagonal(errors, compounds)
        if errors.dim() != 3:
            return None
    n_compounds = len(compounds.sizes)
    if len(errors) != n_compounds:
        raise PredictionError(
            f"expected one covariance for each of {n_compounds} compounds; found {len(errors)}"
        )
    return [_checked_shape(_numbers(block), compounds, i) for i, block in enumerate(errors)]


def _blocks_on_diagonal(covariance: Tensor, compounds: CompoundIndex) -> list[Tensor]:
    """Return the covariance of each compound's poses from the covariance of all poses."""
    n_poses = len(compounds.of_pose)
    if covariance.shape != (n_poses, n_poses):
        raise PredictionError(
            f"a covariance of all poses must have the shape {(n_poses, n_poses)}; found"
            f" {tuple(covariance.shape)}"
        )
    ends = accumulate(compounds.sizes)
    return [
        covariance[end - size : end, end - size : end]
        for size, end in zip(compounds.sizes, ends, strict=True)
    ]


def _checked_shape(block: Tensor, compounds: CompoundIndex, compound: int) -> Tensor:
    """Return the covariance of one compound. Raise an error if its shape is wrong."""
    size = compounds.sizes[compound]
    if block.shape != (size, size):
        raise PredictionError(
            f"compound {compound}: a covariance of {size} pose(s) must have the shape"
            f" {(size, size)}; found {tuple(block.shape)}",
            compound=compound,
        )
    return block


def weighted_variances(weights: Tensor, blocks: list[Tensor], compounds: CompoundIndex) -> Tensor:
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


def _check_covariances(stacked: Tensor, numbers: list[int], compounds: CompoundIndex) -> None:
    """Raise an error that names the first compound whose matrix is no covariance, if there is one.

    Parameters
    ----------
    stacked : covariances of equal size, shape (n, size, size)
    numbers : the compound of each covariance
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
    covariances: Tensor, numbers: list[int], compounds: CompoundIndex, tolerance: float
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
