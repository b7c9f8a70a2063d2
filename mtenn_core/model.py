"""The multi-pose model: one pose model for all poses, and one combination for all compounds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial, update_wrapper
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self, SupportsIndex

import torch
from torch import Tensor

from mtenn_core._engine import checkpoint
from mtenn_core._engine.call import checked_call, checked_poses, given_sizes, total_sizes
from mtenn_core._engine.columns import Columns, are_columns, columns_of
from mtenn_core._engine.compounds import (
    combine_compounds,
    combine_full_depth,
    combine_tasks,
    weights_of_compounds,
    weights_of_tasks,
)
from mtenn_core._engine.declarations import (
    check_argument_names,
    check_facts,
    checked_instance,
    constructor_signature,
)
from mtenn_core._engine.estimate import Estimate, estimate
from mtenn_core._engine.evaluation import (
    check_finite,
    check_kinds,
    combined_prediction,
    hint_at_direction,
    inputs_like,
    note_sizes,
)
from mtenn_core._engine.gradient_buffers import forget_memory
from mtenn_core._engine.mode import Collate, Options
from mtenn_core._engine.mode import GradientMode as GradientMode  # users import it from here
from mtenn_core._engine.mode_table import MODES
from mtenn_core._engine.shared_part import run_shared
from mtenn_core._torch_internals import base_of
from mtenn_core.combination import Combination, _ConstructorSignature

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup as Group

    from mtenn_core.combination import _typed_as


class MultiPoseOutput(NamedTuple):
    """The predictions of a :class:`MultiPoseModel`. Both tensors are differentiable.

    Attributes
    ----------
    prediction : the combined prediction, shape (); with ``sizes``, shape (n_compounds,). With
        ``tasks``, it has n_tasks as its last dimension. So it has n_results if the combination
        returns a vector.
    pose_predictions : shape (n_poses,); the poses are in the order of the call. With ``tasks``, or
        if the combination declares ``pose_columns``, shape (n_poses, n_columns).
    """

    prediction: Tensor
    pose_predictions: Tensor


class MultiPoseModel(torch.nn.Module):
    """A model that predicts one number for a compound from many of its poses.

    With ``tasks``, it predicts several numbers for a compound. With a combination of vectors, it
    predicts what the combination makes of several numbers per pose, such as an embedding.

    Parameters
    ----------
    pose_model : a module that maps one pose to one number. With ``collate``, it maps a batch of n
        poses to shape (n,). With ``tasks``, or if the combination declares ``pose_columns``, it
        maps a pose to shape (n_columns,) and a batch to (n, n_columns).
    combination : the combination's name in the registry, or an instance. With ``tasks``, it may be
        a list with one for each task.
    gradients : the mode, which decides what is kept of the poses until backward. All modes give the
        same numbers; the notes below name three exceptions.

        - ``"graph"`` keeps the graphs of all poses, as plain autograd does.
        - ``"stored"`` runs pose by pose. It keeps the gradient of each pose and frees the graph of
          the pose. It needs memory for one graph and n_poses gradients.
        - ``"recomputed"`` keeps only the predictions. In backward, it runs poses with nonzero
          weight again, one chunk at a time. It needs memory for the graph of one chunk, and about
          1 kB for each operation of each pose. If a second run differs from the first, it raises an
          error.
    collate : a function that makes a batch from a list of poses (``torch.stack``, PyG's
        ``Batch.from_data_list``). Without it, the pose model gets one pose at a time.
    chunk_size : the number of poses in a batch, with ``collate``. The default is all poses of a
        call in ``"graph"``, and one pose in the other modes.
    skip_below : in backward, skip each pose whose weight in the loss is at most this fraction of
        the largest weight. 0 skips poses with weight exactly zero. None skips no pose.
    check_finite : raise an error for a NaN or infinite prediction. The error names the pose. False
        passes such predictions to the combination; forward then does not wait for a GPU. In
        evaluation mode, True also gives a :class:`~mtenn_core.errors.DirectionWarning` once if
        predictions look like pIC50, but the combination prefers the lowest one.
    shared : a module for the part that all poses of a compound share, such as the embedding of
        the receptor. It runs once for each compound, on an entry of ``shared_inputs``. The pose
        model gets its output as a second argument: ``pose_model(pose, output)``. With ``collate``
        or ``collated``, this argument is a list with one output per pose.
    tasks : the number of tasks, or their names. The pose model then predicts one number for each
        task, and each task is combined on its own. None means that the pose model predicts one
        number, or the numbers that the combination declares.

    Raises
    ------
    ValueError : an option does not exist, or two options exclude each other
    CombinationNotFoundError, GradientValidationError : see :meth:`mtenn_core.Registry.create`

    Notes
    -----
    The numbers of the modes differ in three cases:

    - Poses of one batch influence each other (BatchNorm in training). ``"stored"`` never makes
      batches.
    - With ``collate``, random numbers (dropout) depend on the sizes of the batches.
    - The pose model has nonlinear backward hooks (for example, clip). In ``"stored"`` they run
      before the weighting.

    While ``"stored"`` or a backward of ``"recomputed"`` runs, no other thread may use the pose
    model. On a CPU, ``"stored"`` keeps its memory for the next step until
    :meth:`~torch.nn.Module.eval`.

    If ``fully_shard`` has sharded parts of the pose model, every rank must run the same number of
    batches. For this, give every rank the same number of poses, or a ``chunk_size`` above the
    number of poses.

    With ``skip_below``, the error of the gradient is at most Σ ‖v_i ∂ŷ_i/∂θ‖ over the skipped
    poses, where v_i is the derivative of the loss with respect to ŷ_i. For a skipped pose, hooks on
    tensors of the pose model get None instead of a gradient of zeros.

    The gradient of the output of ``shared`` is summed over the poses of the compound, and then goes
    through the shared part once. The graph of the shared part stays in memory until backward.
    ``"stored"`` also stores the gradient of the output for each pose.
    """

    __signature__: ClassVar[_ConstructorSignature] = _ConstructorSignature()

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Return an empty model. Raise a TypeError that helps with an unknown argument."""
        combination = kwargs.get("combination", args[1] if len(args) > 1 else None)
        check_argument_names(cls, kwargs, _advice(combination, kwargs))
        return super().__new__(cls)

    def __init__(
        self,
        pose_model: torch.nn.Module,
        combination: str | Combination | Sequence[str | Combination],
        *,
        gradients: GradientMode = "graph",
        collate: Collate | None = None,
        chunk_size: int | None = None,
        skip_below: float | None = 0.0,
        check_finite: bool = True,
        shared: torch.nn.Module | None = None,
        tasks: int | Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(pose_model, torch.nn.Module):
            raise TypeError(f"pose_model must be a torch.nn.Module; found {pose_model!r}")
        self.pose_model = pose_model
        self.combination: Combination | torch.nn.ModuleList = _combinations(combination, tasks)
        self.gradients = gradients
        self.collate = collate
        self.chunk_size = chunk_size
        self.skip_below = skip_below
        self.check_finite = check_finite
        self.shared = shared
        self.tasks = tasks
        options = self._options()
        MODES[options.gradients].check_options(options)

    # jsonargparse reads __new__ and not __signature__. This leads it to __init__.
    update_wrapper(__new__, __init__, assigned=["__annotations__"], updated=[])

    def forward(
        self,
        poses: Iterable[Any],
        sizes: Sequence[int] | Tensor | None = None,
        pose_inputs: Mapping[str, Any] | None = None,
        *,
        ptr: Sequence[int] | Tensor | None = None,
        shared_inputs: Sequence[Any] | None = None,
        collated: bool = False,
        group: Group | None = None,
    ) -> MultiPoseOutput:
        """Return the predictions for one compound, or for several compounds.

        Parameters
        ----------
        poses : one entry per pose, of any type that the pose model or ``collate`` takes
        sizes : the number of poses of each compound. ``poses`` has the poses of the first compound
            first, then those of the second, and so on. Without ``sizes`` and ``ptr``, all poses
            belong to one compound.
        pose_inputs : for each name in the combination's ``pose_inputs``, n_poses numbers: a tensor,
            a list, an array or a column of a table. Their order counts, not their labels.
        ptr : instead of ``sizes``, the offset of each compound's first pose and, at the end, the
            number of poses, shape (n_compounds + 1,). PyG describes its batches in this way.
        shared_inputs : the input of the ``shared`` part for each compound
        collated : True if ``poses`` is already one batch, for example from a ``DataLoader``. The
            pose model then gets the batch unchanged.
        group : the processes that share the poses of each compound. Each process passes its own
            part of ``poses``, ``sizes`` and ``pose_inputs``, and the ``shared_inputs`` of all
            compounds. The processes exchange only predictions, and a stochastic combination draws
            the same random numbers in all of them. All processes get the same output; the poses of
            a compound are in the order of the ranks. Gradients must be averaged over the group, as
            ``DistributedDataParallel`` and ``fully_shard`` do.

        Returns
        -------
        MultiPoseOutput, in the unit of the pose model. Half-precision predictions become float32.

        Raises
        ------
        PredictionError : there is no pose, or another argument does not fit, or a
            prediction is not one finite number, or has another number of columns. The message
            names the pose, the compound and the column.
        GradientError : the mode would lose a gradient of the pose model. The message names it.
        ChangedBeforeBackwardError : in backward of ``"recomputed"``, poses cannot run again under
            the same conditions
        """
        run = self._predict
        if torch.compiler.is_compiling():
            # torch.compile would trace the run in pieces, and each run of a pose would give other
            # pieces. If the pose model itself is compiled, it stays compiled.
            run = torch.compiler.disable(run)
        if ptr is not None:
            sizes = given_sizes(sizes, ptr)
        return run(poses, sizes, pose_inputs, shared_inputs, collated, group)

    if TYPE_CHECKING:

        @_typed_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def _predict(
        self,
        poses: Iterable[Any],
        sizes: Sequence[int] | Tensor | None,
        pose_inputs: Mapping[str, Any] | None,
        shared_inputs: Sequence[Any] | None,
        collated: bool,
        group: Group | None,
    ) -> MultiPoseOutput:
        """Return the output of :meth:`forward`: check the call, run all poses, combine them."""
        options = self._options()
        mode = MODES[options.gradients]
        mode.check_options(options)
        chunk_size = mode.chunk_size(options)
        arguments = partial(
            checked_call, options, chunk_size, poses, sizes, pose_inputs, shared_inputs, collated
        )
        if group is None:
            call = arguments()
            shares = [call.sizes]
        else:
            # This import takes time, and most calls have no group.
            from mtenn_core._engine.process_group import (
                exchange_sizes,
                gather_poses,
                same_random_numbers,
            )

            mode.check_group(options)
            call, shares = exchange_sizes(arguments, group)
        n_poses = total_sizes(options.combinations, shares, sizes)
        if options.shared is not None:
            call = run_shared(options.shared, call)
        predictions, gradients = mode.predict(options, call)
        inputs = inputs_like(predictions, call.inputs)
        if group is not None:
            predictions = torch.cat(gather_poses(predictions, shares, group))
            inputs = {n: torch.cat(gather_poses(i, shares, group)) for n, i in inputs.items()}
        if options.check_finite:
            check_finite(predictions, inputs, n_poses, options.columns)
            for each in options.combinations if inputs else ():
                check_kinds(each, inputs, n_poses)
            if not (self.training or options.tasks or group):
                hint_at_direction(options.combinations[0], predictions, inputs, n_poses)
        random_numbers: AbstractContextManager[None] = nullcontext()
        if group is not None and any(each.stochastic for each in options.combinations):
            random_numbers = same_random_numbers(predictions.device, group)
        combination, closed_form = options.combinations[0], mode.uses_closed_form
        given = predictions, inputs, n_poses
        with random_numbers:
            if options.tasks is not None:
                combined = combine_tasks(
                    options.combinations, *given, gradients, closed_form=closed_form
                )
            elif gradients is not None:
                combined = combine_full_depth(combination, *given, gradients)
            elif sizes is None:
                # A view, so that torch raises an error if the combination changes it in place.
                own = predictions.split(n_poses)[0]
                combined = combined_prediction(combination, own, inputs, closed_form=closed_form)
            else:
                combined = combine_compounds(combination, *given, closed_form=closed_form)
        if sizes is None and (options.tasks is not None or gradients is not None):
            combined = combined[0]
        if len(n_poses) > 1:
            note_sizes(predictions, n_poses)
        if base_of(combined) is not None:
            # If the caller changed a view in place, fully_shard would lose its hooks (torch 2.13).
            combined = combined.clone()
        return MultiPoseOutput(combined, predictions)

    def pose_weights(
        self,
        pose_predictions: Tensor,
        sizes: Sequence[int] | Tensor | None = None,
        pose_inputs: Mapping[str, Any] | None = None,
        *,
        ptr: Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """Return the derivative of each combined prediction with respect to its pose predictions.

        With ``tasks``, these are the pose predictions of the same task.

        A compound's weights show which poses its prediction comes from. They are the same in all
        modes, and need no gradients. The combination's parameters have their current values.

        Parameters
        ----------
        pose_predictions : the ``pose_predictions`` of a call
        sizes, pose_inputs, ptr : the arguments of that call. With ``group``, those of all ranks
            together: the ranks' poses of one compound follow one another.

        Returns
        -------
        dimensionless, without a graph; shape, dtype and device of ``pose_predictions``

        Raises
        ------
        PredictionError : the arguments do not fit together
        CombinationContractError : the combination returns a vector
        """
        sizes = given_sizes(sizes, ptr)
        options = self._options()
        n_poses, inputs = checked_poses(
            options.combinations, options.columns, pose_predictions, sizes, pose_inputs
        )
        for each in options.combinations if inputs else ():
            check_kinds(each, inputs, n_poses)
        given = pose_predictions, inputs, n_poses
        if options.tasks is not None:
            weights = weights_of_tasks(options.combinations, *given)
        else:
            weights = weights_of_compounds(options.combinations[0], *given)
        if len(n_poses) > 1:
            note_sizes(weights, n_poses)
        return weights

    def estimate(
        self,
        poses: Iterable[Any],
        sizes: Sequence[int] | Tensor | None = None,
        pose_inputs: Mapping[str, Any] | None = None,
        *,
        ptr: Sequence[int] | Tensor | None = None,
        shared_inputs: Sequence[Any] | None = None,
        collated: bool = False,
    ) -> Estimate:
        """Return the estimated cost of a training step on these poses in each mode.

        This method runs each pose once and leaves buffers and random states unchanged. It counts
        the backwards of a loss that uses only the combined prediction.

        Parameters
        ----------
        poses, sizes, pose_inputs, ptr, shared_inputs, collated : as for ``forward``
        """
        sizes = given_sizes(sizes, ptr)
        return estimate(self._options(), poses, sizes, pose_inputs, shared_inputs, collated)

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode. Evaluation mode frees the memory of ``"stored"``."""
        if not mode:
            forget_memory(self.pose_model)
        return super().train(mode)

    def extra_repr(self) -> str:
        """Return the options, for ``repr``."""
        return f"gradients={self.gradients!r}, chunk_size={self.chunk_size}"

    def get_extra_state(self) -> Tensor:
        """Return the combination's identity for a checkpoint: JSON, a byte in each entry."""
        return checkpoint.identity_tensor(self._combinations(), self.tasks)

    def set_extra_state(self, state: Any) -> None:
        """Raise a ``CheckpointError`` if the checkpoint was made with another combination."""
        checkpoint.check(state, self._combinations(), self.tasks)

    def _combinations(self) -> tuple[Combination, ...]:
        """Return the one combination, or the combination of each task."""
        combination: Any = self.combination
        if not isinstance(combination, torch.nn.ModuleList):
            return (combination,)
        if self.tasks is None:
            raise ValueError(_NO_TASKS.format(list(combination)))
        return tuple(_combination(each) for each in combination)

    def _options(self) -> Options:
        """Check the options and return them. Users may set them between two calls."""
        combinations, tasks = self._combinations(), self.tasks
        columns = None
        if tasks is not None:
            columns = _columns_of_tasks(tasks, combinations)
        elif (declared := combinations[0].pose_columns) is not None:
            check_facts(combinations[0])
            columns = columns_of(declared)
        options = Options(
            self.pose_model,
            combinations,
            self.gradients,
            self.collate,
            self.chunk_size,
            self.skip_below,
            self.check_finite,
            self.shared,
            tasks,
            columns,
        )
        _check_options(options)
        return options


def _combinations(
    combination: str | Combination | Sequence[str | Combination], tasks: object
) -> Combination | torch.nn.ModuleList:
    """Return the given combination, or a list with the combination of each task."""
    if isinstance(combination, str) or not isinstance(combination, Sequence | torch.nn.ModuleList):
        return _combination(combination)
    if tasks is None:
        raise ValueError(_NO_TASKS.format(list(combination)))
    return torch.nn.ModuleList(map(_combination, combination))


_NO_TASKS = (
    "several combinations need the argument tasks, with one task for each of them; found the"
    " combinations {}, and no tasks"
)


def _combination(combination: Any) -> Combination:
    """Return the given instance, or the combination with this name in the registry."""
    if isinstance(combination, str):
        # The registry is in a higher layer, so import it only here.
        from mtenn_core._registry import registry

        return registry.create(combination)
    rule = "combination must be a name in the registry or an instance of Combination"
    return checked_instance(combination, rule)


def _advice(combination: Any, given: Mapping[str, Any]) -> str:
    """Return how to give arguments to a combination, for a message about unknown arguments."""
    options = constructor_signature(MultiPoseModel).parameters
    arguments = ", ".join(f"{n}={value!r}" for n, value in given.items() if n not in options)
    if isinstance(combination, str):
        example = f"registry.create({combination!r}, {arguments})"
    else:
        cls = combination if isinstance(combination, type) else type(combination)
        example = f"{cls.__name__ if issubclass(cls, Combination) else 'Class'}({arguments})"
    return (
        " Arguments of a combination belong to its instance:"
        f" MultiPoseModel(pose_model, {example})."
    )


def _check_options(options: Options) -> None:
    """Raise a ValueError or TypeError for an option that no mode accepts."""
    if options.gradients not in tuple(MODES):
        raise ValueError(f"gradients must be one of {tuple(MODES)}; found {options.gradients!r}")
    if not (options.shared is None or isinstance(options.shared, torch.nn.Module)):
        raise TypeError(f"shared must be a torch.nn.Module or None; found {options.shared!r}")
    skip_below, collate, chunk_size = options.skip_below, options.collate, options.chunk_size
    skip = 0 if skip_below is None else skip_below
    if not (isinstance(skip, int | float) and 0 <= skip < 1):
        raise ValueError(
            "skip_below must be a number that is at least 0 and below 1, or None; found"
            f" {skip_below!r}"
        )
    if not (collate is None or callable(collate)):
        raise TypeError(
            "collate must be a function that makes a batch from a list of poses, such as"
            f" torch.stack; found {collate!r}"
        )
    if chunk_size is not None:
        if not isinstance(chunk_size, SupportsIndex) or chunk_size < 1:
            raise ValueError(
                "chunk_size must be a whole number of poses, at least 1, or None; found"
                f" {chunk_size!r}"
            )
        if chunk_size > 1 and collate is None:
            raise ValueError("chunk_size > 1 needs collate, which makes a batch from several poses")


def _columns_of_tasks(tasks: int | Sequence[str], combinations: Sequence[Combination]) -> Columns:
    """Return one column for each task. Raise a ValueError if the combinations do not fit them."""
    if not are_columns(tasks):
        raise ValueError(
            "tasks must be a whole number above 0, a list of different names, or None; found"
            f" {tasks!r}"
        )
    columns = columns_of(tasks)
    if len(combinations) not in (1, columns.number):
        raise ValueError(
            "combination must be one for all tasks, or a list with one for each of the"
            f" {columns.number} tasks; found {len(combinations)}"
        )
    for combination in combinations:
        if combination.pose_columns is not None:
            raise ValueError(
                f"{type(combination).__name__} takes several numbers per pose (pose_columns ="
                f" {combination.pose_columns!r}), and tasks are for combinations of one number."
                " Leave out tasks."
            )
    return columns
