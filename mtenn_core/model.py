"""The multi-pose model: one pose model for every pose, one combination for every compound."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, SupportsIndex, get_args

import torch
from torch import Tensor

from mtenn_core._engine import checkpoint
from mtenn_core._engine.autograd_nodes import join_chunks, with_weight
from mtenn_core._engine.estimate import Estimate, estimate, measured
from mtenn_core._engine.recomputed import RecomputedGraphs
from mtenn_core._engine.stored import StoredGradients, forget_memory
from mtenn_core.combination import (
    Combination,
    PoseInputs,
    check_n_poses,
    combined_prediction,
    full_depth_prediction,
    overrides,
)
from mtenn_core.errors import PredictionError
from mtenn_core.gradients import at_least_float32

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup as Group

GradientMode = Literal["graph", "stored", "recomputed"]
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


class _Call(NamedTuple):
    """What one process was called with, checked.

    Attributes
    ----------
    poses : the poses, or one batch of them
    sizes : the number of poses of each compound
    inputs : of each pose, by name, shape (n_poses,)
    """

    poses: list[Any]
    sizes: list[int]
    inputs: dict[str, Tensor]


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
        skip = 0 if self.skip_below is None else self.skip_below
        if not (isinstance(skip, int | float) and 0 <= skip < 1):
            raise ValueError(
                "skip_below must be a number that is at least 0 and below 1, or None; found"
                f" {self.skip_below!r}"
            )
        if not (self.collate is None or callable(self.collate)):
            raise TypeError(
                "collate must be a function that makes a batch of a list of poses (torch.stack,"
                f" say); found {self.collate!r}"
            )
        if self.skip_below and self.gradients == "stored":
            raise ValueError(
                "gradients='stored' takes the gradient of a pose before its weight is known:"
                " skip_below is for 'recomputed' and 'graph'"
            )
        if self.chunk_size is None:
            return
        if not isinstance(self.chunk_size, SupportsIndex) or self.chunk_size < 1:
            raise ValueError(
                "chunk_size must be a whole number of poses, at least 1, or None; found"
                f" {self.chunk_size!r}"
            )
        if self.chunk_size > 1 and self.collate is None:
            raise ValueError("chunk_size > 1 needs collate, which makes one batch of several poses")
        if self.chunk_size > 1 and self.gradients == "stored":
            raise ValueError(
                "gradients='stored' runs pose by pose, so that each pose has a gradient of its own:"
                f" chunk_size must be 1 or None; found {self.chunk_size}"
            )

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
        return checkpoint.written(self.combination)

    def set_extra_state(self, state: Any) -> None:
        """Raise a ``CheckpointError`` if a checkpoint is of another combination than this one."""
        checkpoint.check(state, self.combination)

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
        run = self._run
        if torch.compiler.is_compiling():
            # It would be traced in pieces, other ones for each run of a pose. A pose model that is
            # compiled itself stays so.
            run = torch.compiler.disable(run)
        return run(poses, sizes, pose_inputs, collated, group)

    def _run(
        self,
        poses: Iterable[Any],
        sizes: Sequence[int] | None,
        pose_inputs: Mapping[str, Any] | None,
        collated: bool,
        group: Group | None,
    ) -> MultiPoseOutput:
        self._check_options()  # again, since they can be set
        self._check_depth(group)
        checked = partial(self._checked, poses, sizes, pose_inputs, collated)
        if group is None:
            call = checked()
            shares = [call.sizes]
        else:
            from mtenn_core._engine.process_group import exchange_sizes

            call, shares = exchange_sizes(checked, group)
        n_poses = self._n_poses(shares, sizes)
        predictions, stored = self._predict(call.poses, sum(call.sizes) if collated else None)
        inputs = _like(predictions, call.inputs)
        if group is not None:
            from mtenn_core._engine.process_group import gather_poses

            predictions = torch.cat(gather_poses(predictions, shares, group))
            inputs = {n: torch.cat(gather_poses(i, shares, group)) for n, i in inputs.items()}
        if self.check_finite:
            _check_finite(predictions, inputs, n_poses)
        combined, start = [], 0
        for part, own in zip(*self._by_compound(predictions, inputs, n_poses), strict=True):
            combined.append(self._combine(part, own, start, stored))
            start += len(part)
        prediction = combined[0] if sizes is None else torch.stack(combined)
        return MultiPoseOutput(prediction, predictions)

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
        poses, own_sizes, given = self._checked(poses, sizes, pose_inputs, collated)
        n_poses = self._n_poses([own_sizes], sizes)
        in_batch = sum(n_poses) if collated else None
        runs = [run for run, _ in self._runs(poses, in_batch)]
        predictions, graphs = measured(self.pose_model, runs)
        inputs = _like(predictions, given)
        weights = torch.cat(
            [
                self.combination.pose_weights(part, **own)
                for part, own in zip(*self._by_compound(predictions, inputs, n_poses), strict=True)
            ]
        )
        counts = with_weight(weights, self.skip_below)
        chunk_sizes = {
            mode: in_batch or self._chunk_size(len(poses), mode) for mode in self._modes(collated)
        }
        return estimate(self.pose_model, graphs, counts, chunk_sizes)

    def _modes(self, collated: bool) -> list[str]:
        """Return the modes that there are for a combination, and for poses in one batch."""
        modes = list(get_args(GradientMode))
        if not overrides(type(self.combination), "combine"):
            modes = ["stored"]
        if collated:
            modes = [mode for mode in modes if mode != "stored"]
        if not modes:
            raise ValueError(_NOT_IN_A_BATCH)
        return modes

    @property
    def _needs_gradients(self) -> bool:
        """Whether the combination is handed stored gradients, and not predictions alone."""
        return self.gradients == "stored" and overrides(type(self.combination), "forward")

    def _check_depth(self, group: Group | None) -> None:
        """Raise if a combination needs gradients that are in other processes."""
        if self._needs_gradients and group is not None and torch.is_grad_enabled():
            raise ValueError(
                f"{type(self.combination).__name__} overrides forward, which works on all gradients"
                " in one process, and group= leaves those of a compound on several: give it the"
                " whole compound, or write combine(predictions) and use gradients='recomputed'"
            )

    def _checked(
        self,
        poses: Iterable[Any],
        sizes: Sequence[int] | None,
        pose_inputs: Mapping[str, Any] | None,
        collated: bool,
    ) -> _Call:
        """Return what this process was called with, or raise if it does not fit together."""
        poses = [poses] if collated else _as_list(poses)
        own_sizes = _own_sizes(poses, sizes, collated)
        given = {} if pose_inputs is None else pose_inputs
        if not isinstance(given, Mapping):
            raise PredictionError(
                "pose_inputs must be a dict, for each name one number per pose; found"
                f" {type(given).__name__}"
            )
        return _Call(poses, own_sizes, self._inputs(given, sum(own_sizes)))

    def _n_poses(self, shares: list[list[int]], sizes: Sequence[int] | None) -> list[int]:
        """Return the number of poses of each compound, on all ranks together."""
        n_poses = [sum(of_ranks) for of_ranks in zip(*shares, strict=True)]
        for compound, size in enumerate(n_poses):
            check_n_poses(self.combination, size, None if sizes is None else compound)
        return n_poses

    def _inputs(self, given: Mapping[str, Any], n_poses: int) -> dict[str, Tensor]:
        """Return what the combination needs, beside predictions, for each pose."""
        who, names = type(self.combination).__name__, self.combination.pose_inputs
        for name in given:
            if name not in names:
                raise PredictionError(
                    f"pose_inputs[{name!r}]: {who} takes none of this name; its pose_inputs are"
                    f" {names}"
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

    def _predict(
        self, poses: list[Any], in_batch: int | None
    ) -> tuple[Tensor, StoredGradients | None]:
        """Return the predictions, differentiable, and the gradients where they are stored.

        Parameters
        ----------
        in_batch : the number of poses where ``poses`` is one batch
        """
        with_grad = torch.is_grad_enabled()
        if self.gradients == "stored" and with_grad:
            if in_batch is not None:
                raise ValueError(_NOT_IN_A_BATCH)
            stored = StoredGradients(self.pose_model, poses, self._predict_pose)
            return stored.attach(reuse=not self._needs_gradients), stored
        runs = self._runs(poses, in_batch)
        if self.gradients == "recomputed" and with_grad:
            graphs = RecomputedGraphs(self.pose_model, poses)
            predictions, chunks = zip(*(graphs.predict(*run) for run in runs), strict=True)
            return join_chunks(predictions, chunks, self.skip_below), None
        return join_chunks([run() for run, _ in runs], skip_below=self.skip_below), None

    def _runs(
        self, poses: list[Any], in_batch: int | None = None
    ) -> list[tuple[Callable[[], Tensor], int]]:
        """Return for each chunk a call that predicts it, and the index of its first pose."""
        step = self._chunk_size(len(poses), self.gradients)
        return [
            (partial(self._predict_chunk, poses[first : first + step], first, in_batch), first)
            for first in range(0, len(poses), step)
        ]

    def _chunk_size(self, n_poses: int, gradients: str) -> int:
        whole = self.collate is not None and gradients == "graph"
        return 1 if gradients == "stored" else self.chunk_size or (n_poses if whole else 1)

    def _predict_pose(self, pose: Any, index: int) -> Tensor:
        return self._predict_chunk([pose], index)

    def _predict_chunk(self, poses: list[Any], first: int, in_batch: int | None = None) -> Tensor:
        as_it_is = self.collate is None or in_batch is not None
        n_poses = len(poses) if in_batch is None else in_batch
        try:
            predictions = self.pose_model(poses[0] if as_it_is else self.collate(poses))  # type: ignore[misc]
        except Exception as error:
            error.add_note(f"raised by the pose model on {_named(n_poses, first)}")
            raise
        _check_numbers(predictions, n_poses, first)
        wide = predictions.to(at_least_float32(predictions.dtype))
        # reshape would add a node to the graph of every pose.
        return wide if wide.shape == (n_poses,) else wide.reshape(n_poses)

    def _by_compound(
        self, predictions: Tensor, inputs: PoseInputs, n_poses: list[int]
    ) -> tuple[Sequence[Tensor], list[PoseInputs]]:
        """Return the predictions of each compound, and its pose inputs."""
        split = {name: values.split(n_poses) for name, values in inputs.items()}
        own: list[PoseInputs] = [
            {name: parts[i] for name, parts in split.items()} for i in range(len(n_poses))
        ]
        return predictions.split(n_poses), own

    def _combine(
        self, predictions: Tensor, inputs: PoseInputs, first: int, stored: StoredGradients | None
    ) -> Tensor:
        """Return the prediction of one compound, shape (); ``first`` is the index of its pose."""
        if self._needs_gradients:
            params = stored.params if stored else {}
            poses = slice(first, first + len(predictions))
            return full_depth_prediction(
                self.combination,
                list(predictions.detach()),
                stored.grad_dict(poses) if stored else {},
                list(params),
                *params.values(),
                **inputs,
            )
        # "graph" is the reference for the closed form, and does not use it.
        closed_form = self.gradients != "graph"
        return combined_prediction(self.combination, predictions, inputs, closed_form=closed_form)


_NOT_IN_A_BATCH = (
    "gradients='stored' runs pose by pose: give it the poses, not one batch of them, or use"
    " gradients='recomputed'"
)


def _as_list(poses: Iterable[Any]) -> list[Any]:
    # A dict, or PyG's Data or Batch: it can be gone through, and gives no poses.
    if not (isinstance(poses, str) or hasattr(poses, "keys")):
        with contextlib.suppress(TypeError):
            return list(poses)
    raise PredictionError(
        f"poses must be a sequence, one entry per pose; found {type(poses).__name__}: put one pose"
        " into a list, and hand over one batch of poses with collated=True"
    )


def _like(predictions: Tensor, inputs: PoseInputs) -> dict[str, Tensor]:
    return {n: i.to(predictions.device, predictions.dtype) for n, i in inputs.items()}


def _numbers(name: str, values: Any) -> Tensor:
    try:
        if isinstance(values, list | tuple) and any(isinstance(v, Tensor) for v in values):
            values = torch.stack([torch.as_tensor(value).reshape(()) for value in values])
        if not isinstance(values, Tensor):
            values = torch.as_tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PredictionError(f"pose_inputs[{name!r}]: {error}") from error
    if values.is_complex():
        raise PredictionError(f"pose_inputs[{name!r}] must be real numbers; found {values.dtype}")
    return values


def _own_sizes(poses: list[Any], sizes: Sequence[int] | None, collated: bool) -> list[int]:
    """Return the number of poses of each compound in one process."""
    if not poses:
        raise PredictionError("expected at least one pose; found none")
    if sizes is None:
        if collated:
            raise PredictionError("one batch of poses needs sizes, the poses of each compound")
        return [len(poses)]
    try:
        sizes = [operator.index(size) for size in sizes]
    except TypeError:
        raise PredictionError(
            f"sizes must be whole numbers, one per compound; found {sizes!r}"
        ) from None
    for compound, size in enumerate(sizes):
        if size < 0:
            raise PredictionError(
                f"compound {compound}: a number of poses must not be negative; found {size}",
                compound=compound,
            )
    if not sizes:
        raise PredictionError("sizes must name at least one compound; found none")
    if not collated and sum(sizes) != len(poses):
        raise PredictionError(
            f"sizes must add up to the number of poses: {len(sizes)} compounds with"
            f" {sum(sizes)} poses in all; found {len(poses)} poses"
        )
    return sizes


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


def _named(n_poses: int, first: int) -> str:
    return f"pose {first}" if n_poses == 1 else f"poses {first} to {first + n_poses - 1}"


def _check_numbers(predictions: object, n_poses: int, first: int) -> None:
    """Raise unless a pose model's output is one floating-point number for each of its poses."""
    who = _named(n_poses, first)
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


def _check_finite(predictions: Tensor, inputs: PoseInputs, n_poses: list[int]) -> None:
    """Raise on the first number that is NaN or infinite, and name its pose."""
    named = {"the prediction": predictions}
    named |= {f"pose_inputs[{name!r}]": values for name, values in inputs.items()}
    for what, values in named.items():
        finite = torch.isfinite(values.detach())
        if finite.all():
            continue
        pose = int((~finite).nonzero()[0])
        within, compound = pose, 0
        while within >= n_poses[compound]:
            within -= n_poses[compound]
            compound += 1
        where = f" (pose {within} of compound {compound})" if len(n_poses) > 1 else ""
        raise PredictionError(
            f"pose {pose}{where}: {what} is {values[pose].item()}, and it would spoil the gradient"
            " of every other pose; leave the pose out, or pass check_finite=False to combine it"
            " anyway",
            pose=pose,
            compound=compound,
        )
