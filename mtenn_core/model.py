"""The multi-pose model: one pose model for every pose, one combination for every compound."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, SupportsIndex

import torch
from torch import Tensor

from mtenn_core._engine import checkpoint
from mtenn_core._engine.call import checked_call, total_sizes
from mtenn_core._engine.estimate import Estimate, estimate
from mtenn_core._engine.evaluation import check_finite, combine_compounds, inputs_like
from mtenn_core._engine.gradient_buffers import forget_memory
from mtenn_core._engine.mode import Collate, Options
from mtenn_core._engine.mode_table import MODES
from mtenn_core.combination import Combination

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup as Group

GradientMode = Literal["graph", "stored", "recomputed"]


class MultiPoseOutput(NamedTuple):
    """The predictions of a :class:`MultiPoseModel`; both tensors are differentiable.

    Attributes
    ----------
    prediction : the combined predictions, shape (); with ``sizes``, shape (n_compounds,)
    pose_predictions : shape (n_poses,), the poses of all compounds in their order
    """

    prediction: Tensor
    pose_predictions: Tensor


class MultiPoseModel(torch.nn.Module):
    """A model that predicts one number for a compound from many poses of it.

    Parameters
    ----------
    pose_model : maps a pose to one number, or with ``collate`` a batch of n poses to shape (n,)
    combination : its name in the registry, or an instance
    gradients : ``"graph"`` keeps the graphs of all poses until backward, as plain autograd does.
        ``"stored"`` runs pose by pose, keeps one gradient per pose and frees its graph. Its memory
        is one graph and n_poses gradients; on a CPU it is kept for the next step until
        :meth:`~torch.nn.Module.eval`. ``"recomputed"`` keeps only the predictions, and runs poses
        with nonzero weight again in backward, one chunk at a time. Its memory is the graph of one
        chunk, and about 1 kB for each operation of each pose. All modes give the same numbers,
        with two exceptions: poses of one batch that influence each other (BatchNorm in training),
        since ``"stored"`` never batches them; and nonlinear backward hooks of the pose model (for
        example, clip), since in ``"stored"`` they run before the weighting. While ``"stored"`` or
        a backward of ``"recomputed"`` runs, no other thread may use the pose model.
    collate : makes a batch of a list of poses (``torch.stack``, PyG's ``Batch.from_data_list``);
        without it the pose model gets one pose at a time
    chunk_size : poses in a batch, with ``collate``; by default all poses of a call in ``"graph"``,
        and one in the other modes. If ``fully_shard`` has sharded parts of the pose model, every
        rank must run equally many batches: give each rank as many poses, or a ``chunk_size`` above
        the number of poses.
    skip_below : skip poses in backward whose weight in the loss is at most this fraction of the
        largest. The gradient is then off by at most Σ ‖v_i ∂ŷ_i/∂θ‖ over the skipped poses, where
        v_i is the derivative of the loss with respect to ŷ_i. 0 skips poses whose weight is exactly
        zero. None skips no pose: hooks on tensors of the pose model then get a gradient of zeros,
        where they otherwise get None
    check_finite : raise on a NaN or infinite prediction, and name its pose. False passes it to the
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
        poses : one entry per pose, of any type that the pose model or ``collate`` takes
        sizes : the number of poses of each compound, which follow one another in ``poses``; without
            it, all poses belong to one compound
        pose_inputs : for each name in the combination's ``pose_inputs``, n_poses numbers
        collated : True if ``poses`` is one batch already, as a ``DataLoader`` makes it; the pose
            model then gets it unchanged
        group : the processes that share the poses of each compound. ``poses``, ``sizes`` and
            ``pose_inputs`` are the part of this process, and only predictions are exchanged. All
            processes get the same output, with the poses of a compound in the order of the ranks.
            Gradients must be averaged over the group, as ``DistributedDataParallel`` and
            ``fully_shard`` do.

        Returns
        -------
        MultiPoseOutput, in the unit of the pose model. Half-precision predictions come as float32.

        Raises
        ------
        PredictionError : no pose, sizes or pose inputs that do not fit, or a prediction that is not
            one finite number; the message names the pose and the compound
        GradientError : the mode would lose a gradient of the pose model; the message names it
        ChangedBeforeBackwardError : in backward of ``"recomputed"``, if poses cannot be run again
            under the same conditions
        """
        run = self._predict
        if torch.compiler.is_compiling():
            # torch.compile would trace it in pieces, and different ones for each run of a pose. A
            # pose model that is compiled itself stays compiled.
            run = torch.compiler.disable(run)
        return run(poses, sizes, pose_inputs, collated, group)

    def _predict(
        self,
        poses: Iterable[Any],
        sizes: Sequence[int] | None,
        pose_inputs: Mapping[str, Any] | None,
        collated: bool,
        group: Group | None,
    ) -> MultiPoseOutput:
        """Return the output of :meth:`forward`: check the call, run all poses, combine them."""
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
        inputs = inputs_like(predictions, call.inputs)
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

    def estimate(
        self,
        poses: Iterable[Any],
        sizes: Sequence[int] | None = None,
        pose_inputs: Mapping[str, Any] | None = None,
        *,
        collated: bool = False,
    ) -> Estimate:
        """Return the estimated cost of a training step on these poses in each mode.

        It runs each pose once and keeps nothing: buffers and random states stay unchanged. The
        backwards are those of a loss on only the combined prediction.

        Parameters
        ----------
        poses, sizes, pose_inputs, collated : as for ``forward``
        """
        return estimate(self._options(), poses, sizes, pose_inputs, collated)

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode; the latter frees the memory that ``"stored"`` keeps."""
        if not mode:
            forget_memory(self.pose_model)
        return super().train(mode)

    def extra_repr(self) -> str:
        """Return the options, for ``repr``."""
        return f"gradients={self.gradients!r}, chunk_size={self.chunk_size}"

    def get_extra_state(self) -> Tensor:
        """Return the combination's identity for a checkpoint, as JSON in a tensor of bytes."""
        return checkpoint.identity_tensor(self.combination)

    def set_extra_state(self, state: Any) -> None:
        """Raise a ``CheckpointError`` if the checkpoint was made with another combination."""
        checkpoint.check(state, self.combination)

    def _options(self) -> Options:
        """Return the options, checked each time, since they can be set."""
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
