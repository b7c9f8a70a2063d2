"""The multi-pose model: one pose model for every pose, one combination for every compound."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, SupportsIndex

import torch
from torch import Tensor

from mtenn_core._engine import checkpoint
from mtenn_core._engine.call import checked_call, inputs_like, total_sizes
from mtenn_core._engine.estimate import Estimate, estimate
from mtenn_core._engine.evaluation import check_finite, combine_compounds
from mtenn_core._engine.gradient_buffers import forget_memory
from mtenn_core._engine.mode import Collate, Options
from mtenn_core._engine.mode_table import MODES
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
        options = self._options()
        MODES[options.gradients].check_options(options)

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
        options = self._options()
        MODES[options.gradients].check_options(options)
        return estimate(options, poses, sizes, pose_inputs, collated)

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

    def _predict(
        self,
        poses: Iterable[Any],
        sizes: Sequence[int] | None,
        pose_inputs: Mapping[str, Any] | None,
        collated: bool,
        group: Group | None,
    ) -> MultiPoseOutput:
        options = self._options()
        mode = MODES[options.gradients]
        mode.check_options(options)
        chunk_size = mode.chunk_size(options)
        arguments = partial(checked_call, options, chunk_size, poses, sizes, pose_inputs, collated)
        if group is None:
            call = arguments()
            shares = [call.sizes]
        else:
            # Its import takes time, and few need it.
            from mtenn_core._engine.process_group import exchange_sizes, gather_poses

            mode.check_group(options)
            call, shares = exchange_sizes(arguments, group)
        n_poses = total_sizes(options.combination, shares, sizes)
        predictions, gradients = mode.predict(options, call)
        inputs = inputs_like(predictions, call.inputs) if call.inputs else {}
        if group is not None:
            predictions = torch.cat(gather_poses(predictions, shares, group))
            inputs = {n: torch.cat(gather_poses(i, shares, group)) for n, i in inputs.items()}
        if options.check_finite:
            check_finite(predictions, inputs, n_poses)
        combined = combine_compounds(
            options.combination,
            predictions,
            inputs,
            n_poses,
            gradients,
            closed_form=mode.uses_closed_form,
        )
        return MultiPoseOutput(combined[0] if sizes is None else torch.stack(combined), predictions)

    def _options(self) -> Options:
        """Return the options, checked in each call, since they can be set."""
        options = Options(
            self.pose_model,
            self.combination,
            self.gradients,
            self.collate,
            self.chunk_size,
            self.skip_below,
            self.check_finite,
        )
        _check_options(options)
        return options


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


def _check_options(options: Options) -> None:
    """Raise a ValueError or TypeError for an option that does not exist in any mode."""
    if options.gradients not in tuple(MODES):
        raise ValueError(f"gradients must be one of {tuple(MODES)}; found {options.gradients!r}")
    skip_below, collate, chunk_size = options.skip_below, options.collate, options.chunk_size
    skip = 0 if skip_below is None else skip_below
    if not (isinstance(skip, int | float) and 0 <= skip < 1):
        raise ValueError(
            "skip_below must be a number that is at least 0 and below 1, or None; found"
            f" {skip_below!r}"
        )
    if not (collate is None or callable(collate)):
        raise TypeError(
            "collate must be a function that makes a batch of a list of poses, such as torch.stack;"
            f" found {collate!r}"
        )
    if chunk_size is not None:
        if not isinstance(chunk_size, SupportsIndex) or chunk_size < 1:
            raise ValueError(
                "chunk_size must be a whole number of poses, at least 1, or None; found"
                f" {chunk_size!r}"
            )
        if chunk_size > 1 and collate is None:
            raise ValueError("chunk_size > 1 needs collate, which makes one batch of several poses")
