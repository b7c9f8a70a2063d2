"""The multi-pose model: one pose model for every pose, one combination for every compound."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

from mtenn_core._engine import checkpoint
from mtenn_core._engine.estimate import Estimate, estimate
from mtenn_core._engine.gradient_buffers import forget_memory
from mtenn_core._engine.mode import Collate, Options
from mtenn_core._engine.mode_table import checked_mode
from mtenn_core._engine.prediction import predict
from mtenn_core.combination import Combination

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup as Group

GradientMode = Literal["graph", "stored", "recomputed"]


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
        is one graph and n_poses gradients, and on a CPU is kept for the next step until
        :meth:`~torch.nn.Module.eval`. ``"recomputed"`` keeps no more than the predictions, and runs
        poses again in backward, a chunk at a time and only those whose weight is not zero: the
        memory is one chunk's graph, and of each pose the bare graph, about 1 kB for each operation.
        The numbers are the same, unless poses of one batch influence each other (BatchNorm in
        training), since ``"stored"`` never batches them; or unless hooks of the pose model do to
        gradients what is not linear (clip them), since in ``"stored"`` they come before the
        weights. While ``"stored"`` or a backward of ``"recomputed"`` runs, no other thread may use
        the pose model.
    collate : makes a batch of a list of poses (``torch.stack``, PyG's ``Batch.from_data_list``);
        without it the pose model gets one pose at a time
    chunk_size : poses in a batch, with ``collate``; by default all poses of a call in ``"graph"``,
        and one in the other modes. Where parts of the pose model have been through ``fully_shard``,
        every rank must run as many batches as the others: give each rank as many poses, or a
        ``chunk_size`` above that.
    skip_below : leave poses out of backward whose weight in the loss is at most this fraction of
        the largest. The gradient is then off by at most Σ ‖v_i ∂ŷ_i/∂θ‖ over those left out, with
        v_i the derivative of the loss with respect to ŷ_i. 0 leaves out those whose weight is
        exactly zero. None leaves out none: a hook on a tensor of the pose model is otherwise handed
        None instead of a gradient of zeros
    check_finite : raise on a NaN or infinite prediction, and name its pose. False hands it to the
        combination, and forward does not wait for a GPU.

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
        skip_below: float | None = 0.0,
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
        self.skip_below = skip_below
        self.check_finite = check_finite
        checked_mode(self._options())

    def forward(
        self,
        poses: Iterable[Any],
        sizes: Sequence[int] | None = None,
        pose_inputs: Mapping[str, Any] | None = None,
        *,
        collated: bool = False,
        group: Group | None = None,
    ) -> MultiPoseOutput:
        """Predict for one compound, or for several.

        Parameters
        ----------
        poses : whatever the pose model or ``collate`` takes, one entry per pose
        sizes : the number of poses of each compound, which follow one another in ``poses``; without
            it, all poses belong to one compound
        pose_inputs : for each name in the combination's ``pose_inputs``, n_poses numbers
        collated : whether ``poses`` is one batch already, as a ``DataLoader`` makes it; the pose
            model then gets it as it is
        group : of processes that share the poses of each compound: ``poses``, ``sizes`` and
            ``pose_inputs`` are this process's part, and only predictions are exchanged. All get
            the same output, the poses of a compound in the order of the ranks; gradients are to be
            averaged over the group, as ``DistributedDataParallel`` and ``fully_shard`` do.

        Returns
        -------
        MultiPoseOutput, in the unit of the pose model. Half-precision predictions come as float32.

        Raises
        ------
        PredictionError : no pose, sizes or pose inputs that do not fit, a prediction that is not
            one finite number; it names the pose and the compound
        GradientError : the pose model has a gradient that the mode would lose; it names it
        ChangedBeforeBackwardError : in backward of ``"recomputed"``, where poses cannot be run
            again as they were
        """
        run = self._predict
        if torch.compiler.is_compiling():
            # torch.compile would trace it in pieces, and different ones for each run of a pose. A
            # pose model that is compiled itself stays compiled.
            run = torch.compiler.disable(run)
        return run(poses, sizes, pose_inputs, collated, group)

    def estimate(
        self,
        poses: Iterable[Any],
        sizes: Sequence[int] | None = None,
        pose_inputs: Mapping[str, Any] | None = None,
        *,
        collated: bool = False,
    ) -> Estimate:
        """Return what a training step on these poses would cost in each mode.

        Each pose is run once, and nothing is kept: buffers and random states stay as they are. The
        backwards are those of a loss on the combined prediction alone.

        Parameters
        ----------
        poses, sizes, pose_inputs, collated : as for ``forward``
        """
        return estimate(self._options(), poses, sizes, pose_inputs, collated)

    def train(self, mode: bool = True) -> Self:
        """Set training mode, or end it and give back the memory that ``"stored"`` keeps."""
        if not mode:
            forget_memory(self.pose_model)
        return super().train(mode)

    def extra_repr(self) -> str:
        """Return the options, for ``repr``."""
        return f"gradients={self.gradients!r}, chunk_size={self.chunk_size}"

    def get_extra_state(self) -> Tensor:
        """Return what a checkpoint says of the combination, as JSON in a tensor of bytes."""
        return checkpoint.identity_tensor(self.combination)

    def set_extra_state(self, state: Any) -> None:
        """Raise a ``CheckpointError`` if a checkpoint is of another combination than this one."""
        checkpoint.check(state, self.combination)

    def _predict(self, *call: Any) -> MultiPoseOutput:
        return MultiPoseOutput(*predict(self._options(), *call))

    def _options(self) -> Options:
        return Options(
            self.pose_model,
            self.combination,
            self.gradients,
            self.collate,
            self.chunk_size,
            self.skip_below,
            self.check_finite,
        )


def _combination(combination: str | Combination) -> Combination:
    """Return the combination of a name in the registry, or the instance that is given."""
    if isinstance(combination, str):
        # The registry comes after the model in the order of imports.
        from mtenn_core._registry import registry

        return registry.create(combination)
    if not isinstance(combination, Combination):
        raise TypeError(
            "combination must be a name in the registry or an instance of Combination;"
            f" found {combination!r}"
        )
    return combination
