"""Restore random state (dropout), buffers, modes and autocast for the second run of a pose.

The conditions of a run are the random states, autocast, the buffers, the parameters, and the flags
``training`` and ``requires_grad``. They are noted before the first run. Between the two runs,
nobody but the pose model may change poses and parameters in place.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mtenn_core._engine.autograd_nodes import is_leaf, nodes_of, versions_of
from mtenn_core._engine.fingerprint import Fingerprint, difference, marks_of
from mtenn_core._engine.module_tensors import (
    Places,
    accelerators,
    is_sharded,
    lock_of,
    same_places,
    sharded_part,
)
from mtenn_core._engine.noted_buffers import Buffers, NotedBuffers
from mtenn_core._engine.plain_attributes import PlainAttributes, tensors_with_graph
from mtenn_core._engine.tensor_search import tensors_in
from mtenn_core._process.interrupts import delayed_interrupts
from mtenn_core._torch_internals import current_backward, version_of
from mtenn_core.errors import ChangedBeforeBackwardError


@dataclass(slots=True)
class Run:
    """The first run of a chunk: its conditions, as far as a run may change them, and its result.

    Attributes
    ----------
    random_states : the random states before the run; empty if no run drew a random number
    buffers : the buffers before the run
    buffers_change : True if the run changes the buffers
    fingerprint : the result, and checksums of the saved tensors; None until the end of the run
    """

    random_states: Sequence[Tensor]
    buffers: Buffers
    buffers_change: bool = True
    fingerprint: Fingerprint | None = None


_NO_BUFFERS = Buffers()
Context = AbstractContextManager[object]
_EDITS: WeakKeyDictionary[torch.nn.Module, dict[int, int]] = WeakKeyDictionary()


class Replay:
    """The conditions of all runs of one forward call.

    Parameters
    ----------
    pose_model : the module that runs, with its parameters, buffers and flags
    poses, shared : the inputs of the pose model: one entry per pose, and the shared part's outputs

    Attributes
    ----------
    lock : hold it while conditions are restored
    """

    def __init__(
        self, pose_model: torch.nn.Module, poses: Sequence[Any], shared: Sequence[Any] = ()
    ) -> None:
        self.lock = lock_of(pose_model)
        self._pose_model = pose_model
        modules = list(pose_model.modules())
        self._parameters = Places(modules, "parameters")
        buffers = Places(modules, "buffers")
        self._places = self._parameters.now()
        self._held = self._parameters.tensors()
        self._devices = accelerators([*self._held, *buffers.tensors()])
        self._buffers = NotedBuffers(buffers)
        self._buffer_dicts = buffers.dicts
        self._attributes = PlainAttributes([*modules, *self._held])
        inputs = tensors_in([*poses, *shared])
        self._inputs = [(index, tensor, _versions([tensor])) for index, tensor in inputs]
        self._poses = poses
        self._indices = {id(param): index for index, param in enumerate(self._held)}
        # How often the pose model itself has changed each parameter, by id, in all calls.
        self._edits = _EDITS.setdefault(pose_model, {})
        self._edited: list[Tensor] = []  # the parameters that forward has changed
        self._before = _places_of(self._held)
        self._versions: list[int] = []  # of the parameters, without these changes
        self._flags = [
            _Flags("training", modules),
            # torch refuses to set requires_grad of a tensor that is not a leaf.
            _Flags("requires_grad", [param for param in self._held if param.is_leaf]),
        ]
        self._autocast = _autocast_state(self._devices)
        self._random_states = _random_states(self._devices)
        # The backward whose first run has been compared, and the contexts that its runs need.
        self._compared_in: int | None = None
        self._of_caller: list[Callable[[], Context]] = []

    def before_run(self) -> Run:
        """Return the conditions of the next run."""
        buffers = self._buffers.now() if any(self._buffer_dicts) else _NO_BUFFERS
        return Run(self._random_states, buffers)

    def after_run(
        self, run: Run, predictions: Tensor, n_saved: int, saved: Sequence[Tensor] | None
    ) -> None:
        """Complete the result of :meth:`before_run` after the run.

        Parameters
        ----------
        predictions, n_saved : the result of the run, and the number of tensors that it saves
        saved : these tensors; None if they are not compared
        """
        self._random_states = _random_states(self._devices)
        run.buffers_change = any(self._buffer_dicts) and self._buffers.differ_from(run.buffers)
        marks = None if saved is None else marks_of(saved, self._indices)
        run.fingerprint = Fingerprint(predictions.detach().clone(), n_saved, marks)

    def after_forward(self, runs: Sequence[Run]) -> None:
        """Note which parameters forward has changed. Free unchanged random states."""
        self._edited = self._note_edits(self._before)
        self._versions = self._foreign_versions()
        # Compare only once, because it takes long.
        if all(map(torch.equal, runs[0].random_states, self._random_states)):
            for run in runs:
                run.random_states = ()

    def _note_edits(self, before: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Count the changes of parameters since ``before`` as the pose model's own (max_norm)."""
        now = _places_of(self._held)
        if now == before:
            return []
        edited = []
        for param, place, then in zip(self._held, now, before, strict=True):
            if place != then:
                edited.append(param)
                self._edits[id(param)] = self._edits.get(id(param), 0) + place[0] - then[0]
        # FullyShardedDataParallel moves parameters in each run.
        return edited if sharded_part(self._pose_model) is None else []

    def _foreign_versions(self) -> list[int]:
        """Return how often anybody but the pose model has changed each parameter in place."""
        versions = _versions(self._held)
        if not self._edits:
            return versions
        return [
            version - self._edits.get(id(param), 0)
            for param, version in zip(self._held, versions, strict=True)
        ]

    def difference(self, run: Run, predictions: Tensor, saved: Sequence[Tensor]) -> Any:
        """Return how a second run differs from the first; see :func:`difference`."""
        if run.fingerprint is None:  # the pose model takes gradients in its own forward
            return None
        return difference(run.fingerprint, predictions, saved, self._indices)

    def kept_tensors(self) -> list[Tensor]:
        """Return the tensors with a graph in attributes and buffers of the pose model."""
        return tensors_with_graph([*self._attributes.owned, *self._buffer_dicts])

    def conditions(self) -> object:
        """Return the conditions that forward shares with other calls: flags and autocast."""
        return [flags.noted() for flags in self._flags], self._autocast

    @contextmanager
    def restored(self, conditions: Run) -> Iterator[None]:
        """Restore the conditions of a run. At the end, restore the conditions of the caller.

        Raises
        ------
        ChangedBeforeBackwardError : a pose was changed in place
        """
        backward = current_backward()
        # -1 means that no backward runs, for example if code reads grad_fn.saved_tensors.
        is_first = backward != self._compared_in or backward == -1
        if is_first:
            self._check_poses()
            self._of_caller = self._contexts_of_caller(is_first=True)
        contexts = self._contexts(conditions)
        if contexts:
            # Otherwise a Ctrl-C could leave a part of the conditions behind.
            with delayed_interrupts(), ExitStack() as stack:
                for context in contexts:
                    stack.enter_context(context)
                yield
        else:
            yield
        if is_first:
            self._compared_in = backward
            self._of_caller = self._contexts_of_caller(is_first=False)

    def _contexts_of_caller(self, *, is_first: bool) -> list[Callable[[], Context]]:
        """Return the contexts that all second runs of a backward need.

        Parameters
        ----------
        is_first : True for the first of these runs. A run may change flags and attributes that the
            next run changes back. So the first run keeps all of them, and shows which change.
        """
        contexts: list[Callable[[], Context]] = [
            flags.restored for flags in self._flags if is_first or flags.move()
        ]
        if is_first or self._attributes.move():
            contexts.append(partial(self._attributes.kept, all_of_them=is_first))
        if self._edited:
            contexts.append(partial(_data_kept, self._edited))
        if self._parameters_differ():
            contexts.append(partial(self._parameters.holding, self._places))
        return contexts

    def _contexts(self, conditions: Run) -> list[Context]:
        """Return one context for each condition that has changed since the run."""
        contexts = [context() for context in self._of_caller]
        for device, enabled, dtype in self._autocast:
            if enabled or torch.is_autocast_enabled(device):
                # Switch the cache off. It would keep casts of weights until the end of the
                # outermost autocast, and these casts would keep the graph of the second run.
                contexts.append(torch.autocast(device, dtype, enabled, cache_enabled=False))
        if conditions.random_states:
            contexts.append(_random(conditions.random_states, self._devices))
        if conditions.buffers_change or (
            any(self._buffer_dicts) and self._buffers.differ_from(conditions.buffers)
        ):
            contexts.append(self._buffers.holding(conditions.buffers))
        return contexts

    def parameters_now(self) -> list[tuple[int, int]]:
        """Return the version and the address of each parameter, if forward changes parameters."""
        return _places_of(self._held) if self._edited else []

    def check_parameters(self, before: Sequence[tuple[int, int]], predictions: Tensor) -> None:
        """Raise an error if a second run used a parameter that somebody has changed in place.

        torch checks versions only of tensors that a graph saves, but these graphs save no tensors.

        Parameters
        ----------
        before : the result of :meth:`parameters_now` before the run
        predictions : the result of the run, with its graph
        """
        if before:
            self._note_edits(before)
        now = self._foreign_versions()
        if now == self._versions or not self._versions:
            return
        # An optimizer that steps in this backward may have changed a parameter after the last pose
        # that uses it.
        nodes = [] if predictions.grad_fn is None else nodes_of(predictions.grad_fn)
        used = {id(node.variable) for node in nodes if is_leaf(node)}
        for param, version, noted in zip(self._held, now, self._versions, strict=True):
            # A graph does not show whether it uses a frozen parameter.
            if version == noted or (param.requires_grad and id(param) not in used):
                continue
            names = [name for name, own in self._pose_model.named_parameters() if own is param]
            raise ChangedBeforeBackwardError(
                f"parameter {(names or ['?'])[0]!r} was changed in place between forward and"
                " backward. gradients='recomputed' runs the poses again and needs the parameters"
                " unchanged. Call backward before the optimizer's step, or use gradients='stored',"
                " which runs each pose once."
            )

    def _check_poses(self) -> None:
        """Raise an error if a tensor of a pose was changed in place."""
        for index, tensor, version in self._inputs:
            if _versions([tensor]) != version:
                compound = index - len(self._poses)
                who = f"pose {index}" if compound < 0 else f"shared output of compound {compound}"
                raise ChangedBeforeBackwardError(
                    f"{who}: one of its tensors, shape {tuple(tensor.shape)}, was changed in"
                    " place between forward and backward. gradients='recomputed' runs the poses"
                    " again and needs them unchanged. Pass a copy to the model, or use"
                    " gradients='stored'."
                )

    def _parameters_differ(self) -> bool:
        """Return whether forward ran with other parameters, for example in ``functional_call``."""
        now = self._parameters.now()
        if [place.name for place in now] != [place.name for place in self._places]:
            return False  # FullyShardedDataParallel itself removes parameters and puts them back
        # fully_shard also replaces sharded parameters itself.
        return not same_places(now, self._places) and not any(map(is_sharded, self._held))


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    try:
        return list(map(version_of, tensors))
    except RuntimeError:  # a tensor of inference_mode
        return versions_of(tensors)


def _places_of(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Return the version and the address of each tensor. ``.data = …`` changes only the address."""
    try:
        addresses = list(map(Tensor.data_ptr, tensors))
    except RuntimeError:  # inside a transform of torch.func
        addresses = [0] * len(tensors)
    return list(zip(_versions(tensors), addresses, strict=True))


@contextmanager
def _data_kept(params: Sequence[Tensor]) -> Iterator[None]:
    """At the end of a block, put the numbers of parameters back."""
    # With .data, torch does not count a change.
    before = [(param, param.data, param.data.clone()) for param in params]
    try:
        yield
    finally:
        for param, data, copy in before:
            param.data = data.copy_(copy)


def _autocast_state(devices: Sequence[torch.device]) -> list[tuple[str, bool, torch.dtype]]:
    return [
        (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        for device in sorted({"cpu", *(device.type for device in devices)})
    ]


def _random_states(devices: Sequence[torch.device]) -> list[Tensor]:
    of_devices = (torch.get_device_module(d).get_rng_state(d) for d in devices)
    return [torch.get_rng_state(), *of_devices]


def _set_random_states(states: Sequence[Tensor], devices: Sequence[torch.device]) -> None:
    torch.set_rng_state(states[0])
    for device, state in zip(devices, states[1:], strict=True):
        torch.get_device_module(device).set_rng_state(state, device)


@contextmanager
def _random(states: Sequence[Tensor], devices: Sequence[torch.device]) -> Iterator[None]:
    """Set random states. At the end, restore the random states of the caller."""
    before = _random_states(devices)
    _set_random_states(states, devices)
    try:
        yield
    finally:
        _set_random_states(before, devices)


class _Flags:
    """Noted values of one attribute of several modules or parameters."""

    def __init__(self, name: str, owners: Sequence[Any]) -> None:
        self._name = name
        self._owners = owners
        self._get = operator.attrgetter(name)
        self._noted = self._now()
        self._moved = False

    def noted(self) -> list[bool]:
        """Return the noted values."""
        return self._noted

    def move(self) -> bool:
        """Return whether the values now differ from the noted ones, or a run has changed them."""
        return self._moved or self._now() != self._noted

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Set the noted values. At the end, restore the values of the caller."""
        now = self._now()
        try:
            self._set(self._noted)
            yield
        finally:
            self._moved |= self._now() != self._noted
            self._set(now)

    def _now(self) -> list[bool]:
        return list(map(self._get, self._owners))

    def _set(self, flags: list[bool]) -> None:
        if flags != self._now():
            for owner, flag in zip(self._owners, flags, strict=True):
                setattr(owner, self._name, flag)
