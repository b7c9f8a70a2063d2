"""The multi-pose model: one pose model for every pose, one combination for every compound."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from mtenn_core._stored import StoredGradients
from mtenn_core.combination import (
    Combination,
    check_n_poses,
    check_scalar,
    combined_prediction,
    overrides,
)
from mtenn_core.errors import PredictionError
from mtenn_core.gradients import at_least_float32

GradientMode = Literal["graph", "stored"]
Collate = Callable[[list[Any]], Any]


class MultiPoseOutput(NamedTuple):
    """What a :class:`MultiPoseModel` predicts; both tensors are differentiable.

    Attributes
    ----------
    prediction : the combined predictions, shape (); with ``sizes``, shape (n_compounds,)
    pose_predictions : shape (n_poses,), the poses of all compounds in their order
    """

    prediction: Tensor
    pose_predictions: Tensor


class MultiPoseModel(torch.nn.Module):
    """Predicts one number for a compound from many poses of it.

    Parameters
    ----------
    pose_model : maps a pose to one number, or with ``collate`` a batch of n poses to shape (n,)
    combination : its name in the registry, or an instance
    gradients : ``"graph"`` keeps the graphs of all poses until backward, as plain autograd does.
        ``"stored"`` runs pose by pose, keeps one gradient per pose and frees its graph: the memory
        is one graph and n_poses gradients. The numbers are the same, unless poses of one batch
        influence each other (BatchNorm in training): ``"stored"`` never batches them. While it
        runs, no other thread may use the pose model.
    collate : makes a batch of a list of poses (``torch.stack``, PyG's ``Batch.from_data_list``);
        without it the pose model gets one pose at a time
    chunk_size : poses in a batch, with ``collate``; all poses of a call by default
    check_finite : raise on a NaN or infinite prediction, and name its pose. False hands it to the
        combination, and spares a GPU the wait.

    Raises
    ------
    ValueError : an option that does not exist, or two that exclude each other
    CombinationNotFoundError, GradientValidationError : see :meth:`mtenn_core.Registry.create`
    """

    def __init__(
        self,
        pose_model: torch.nn.Module,
        combination: str | Combination,
        *,
        gradients: GradientMode = "graph",
        collate: Collate | None = None,
        chunk_size: int | None = None,
        check_finite: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(pose_model, torch.nn.Module):
            raise TypeError(f"pose_model must be a torch.nn.Module; found {pose_model!r}")
        self.pose_model = pose_model
        self.combination = _combination(combination)
        self.gradients = gradients
        self.collate = collate
        self.chunk_size = chunk_size
        self.check_finite = check_finite
        self._check_options()

    def _check_options(self) -> None:
        modes = get_args(GradientMode)
        if self.gradients not in modes:
            raise ValueError(f"gradients must be one of {modes}; found {self.gradients!r}")
        if self.gradients == "graph" and not overrides(type(self.combination), "combine"):
            raise ValueError(
                f"{type(self.combination).__name__} defines forward alone, which works on stored"
                " gradients: use gradients='stored', or give it a combine(predictions)"
            )
        if self.chunk_size is None:
            return
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1; found {self.chunk_size}")
        if self.chunk_size > 1 and self.collate is None:
            raise ValueError("chunk_size > 1 needs collate, which makes one batch of several poses")
        if self.chunk_size > 1 and self.gradients == "stored":
            raise ValueError(
                "gradients='stored' runs pose by pose, so that each pose has a gradient of its own:"
                f" chunk_size must be 1 or None; found {self.chunk_size}"
            )

    def extra_repr(self) -> str:
        """Return the options, for ``repr``."""
        return f"gradients={self.gradients!r}, chunk_size={self.chunk_size}"

    def forward(self, poses: Iterable[Any], sizes: Sequence[int] | None = None) -> MultiPoseOutput:
        """Predict for one compound, or for several.

        Parameters
        ----------
        poses : whatever the pose model or ``collate`` takes, one entry per pose
        sizes : the number of poses of each compound, which follow one another in ``poses``; without
            it, all poses belong to one compound

        Returns
        -------
        MultiPoseOutput, in the unit of the pose model. Half-precision predictions come as float32.

        Raises
        ------
        PredictionError : no pose, sizes that do not fit, a prediction that is not one finite
            number; it names the pose and the compound
        GradientError : the pose model has a gradient that the mode would lose; it names it
        """
        try:
            poses = list(poses)
        except TypeError:
            raise PredictionError(
                f"poses must be a sequence, one entry per pose; found {type(poses).__name__}"
            ) from None
        n_poses = self._check_sizes(len(poses), sizes)
        stored = None
        if self.gradients == "stored" and torch.is_grad_enabled():
            stored = StoredGradients(self.pose_model, poses, self._predict_pose)
        pose_predictions = stored.attach() if stored else self._predict(poses)
        if self.check_finite:
            _check_finite(pose_predictions, n_poses)
        if self.gradients == "stored" and overrides(type(self.combination), "forward"):
            combined = self._combine_at_full_depth(pose_predictions, n_poses, stored)
        else:
            # "graph" is the reference for the closed form, and does not use it.
            combined = [
                combined_prediction(self.combination, predictions, closed_form=stored is not None)
                for predictions in pose_predictions.split(n_poses)
            ]
        prediction = combined[0] if sizes is None else torch.stack(combined)
        return MultiPoseOutput(prediction, pose_predictions)

    def _check_sizes(self, n_poses: int, sizes: Sequence[int] | None) -> list[int]:
        """Return the number of poses of each compound."""
        if not n_poses:
            raise PredictionError("expected at least one pose; found none")
        if sizes is None:
            check_n_poses(self.combination, n_poses)
            return [n_poses]
        try:
            sizes = [operator.index(size) for size in sizes]
        except TypeError:
            raise PredictionError(
                f"sizes must be whole numbers, one per compound; found {sizes!r}"
            ) from None
        for compound, size in enumerate(sizes):
            check_n_poses(self.combination, size, compound)
        if sum(sizes) != n_poses:
            raise PredictionError(
                f"sizes must add up to the number of poses: {len(sizes)} compounds with"
                f" {sum(sizes)} poses in all; found {n_poses} poses"
            )
        return sizes

    def _predict(self, poses: list[Any]) -> Tensor:
        """Return the predictions of all poses, shape (n_poses,), with their graphs."""
        whole = self.collate is not None and self.gradients == "graph"
        step = self.chunk_size or (len(poses) if whole else 1)
        chunks = [
            self._predict_chunk(self.pose_model, poses[start : start + step], start)
            for start in range(0, len(poses), step)
        ]
        return torch.cat(chunks)

    def _predict_pose(self, pose_model: torch.nn.Module, pose: Any, index: int) -> Tensor:
        return self._predict_chunk(pose_model, [pose], index).reshape(())

    def _predict_chunk(self, pose_model: torch.nn.Module, poses: list[Any], first: int) -> Tensor:
        predictions = pose_model(poses[0] if self.collate is None else self.collate(poses))
        _check_numbers(predictions, len(poses), first)
        return predictions.to(at_least_float32(predictions.dtype)).reshape(len(poses))

    def _combine_at_full_depth(
        self, predictions: Tensor, n_poses: list[int], stored: StoredGradients | None
    ) -> list[Tensor]:
        """Combine with the combination's own ``forward``, one compound at a time."""
        params = stored.params if stored else {}
        combined, start = [], 0
        for size in n_poses:
            poses = slice(start, start + size)
            pred_list = list(predictions[poses].detach())
            grad_dict = stored.grad_dict(poses) if stored else {}
            value = self.combination(pred_list, grad_dict, list(params), *params.values())
            combined.append(check_scalar(self.combination, value))
            start += size
        return combined


def _combination(combination: str | Combination) -> Combination:
    if isinstance(combination, str):
        from mtenn_core._registry import registry

        return registry.create(combination)
    if not isinstance(combination, Combination):
        raise TypeError(
            "combination must be a name in the registry or an instance of Combination;"
            f" found {combination!r}"
        )
    return combination


def _check_numbers(predictions: object, n_poses: int, first: int) -> None:
    """Raise unless a pose model's output is one floating-point number for each of its poses."""
    who = f"pose {first}" if n_poses == 1 else f"poses {first} to {first + n_poses - 1}"
    rule = "one number" if n_poses == 1 else f"{n_poses} numbers, one per pose,"
    if not isinstance(predictions, Tensor):
        raise PredictionError(
            f"{who}: the pose model must return {rule} in a tensor;"
            f" found {type(predictions).__name__}",
            pose=first,
        )
    shapes = ((n_poses,), (n_poses, 1))
    fits = predictions.numel() == 1 if n_poses == 1 else predictions.shape in shapes
    if not (fits and predictions.is_floating_point()):
        raise PredictionError(
            f"{who}: the pose model must return {rule} in floating point;"
            f" found shape {tuple(predictions.shape)}, {predictions.dtype}",
            pose=first,
        )


def _check_finite(predictions: Tensor, n_poses: list[int]) -> None:
    """Raise on the first prediction that is NaN or infinite, and name its pose."""
    finite = torch.isfinite(predictions.detach())
    if finite.all():
        return
    pose = int((~finite).nonzero()[0])
    within, compound = pose, 0
    while within >= n_poses[compound]:
        within -= n_poses[compound]
        compound += 1
    who = f"pose {pose}" + (f" (pose {within} of compound {compound})" if len(n_poses) > 1 else "")
    raise PredictionError(
        f"{who}: the prediction is {predictions[pose].item()}, and it would spoil the gradient of"
        " every other pose; leave the pose out, or pass check_finite=False to combine it anyway",
        pose=pose,
        compound=compound,
    )
