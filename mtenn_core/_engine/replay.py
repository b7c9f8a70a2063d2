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

import torch
from torch import Tensor

from mtenn_core._engine.autograd_nodes import current_backward, is_leaf, nodes_of, version_of
from mtenn_core._engine.fingerprint import Fingerprint, joined, samples_of
from mtenn_core._engine.module_tensors import (
    Places,
    accelerators,
    is_sharded,
    lock_of,
    same_places,
)
from mtenn_core._engine.noted_buffers import Buffers, NotedBuffers
from mtenn_core._engine.plain_attributes import PlainAttributes
from mtenn_core._engine.tensor_search import tensors_in
from mtenn_core._process.interrupts import delayed_interrupts
from mtenn_core.errors import ChangedBeforeBackwardError


@dataclass(slots=True)
class Run:
    """The first run of a chunk: its conditions, as far as a run may change them, and its result.

    Attributes
    ----------
    random_states : the random states before the run; empty if no run drew a random number
    buffers : the buffers before the run
    buffers_change : True if the run changes the buffers
    fingerprint : the result, and samples of the saved tensors; None until the end of the run
    """

    random_states: Sequence[Tensor]
    buffers: Buffers
    buffers_change: bool = True
    fingerprint: Fingerprint | None = None


_NO_BUFFERS = Buffers()


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
        self._n_poses = len(poses)
        self._versions = _versions(self._held)
        self._flags = [
            _Flags("training", modules),
            # torch refuses to set requires_grad of a tensor that is not a leaf.
            _Flags("requires_grad", [param for param in self._held if param.is_leaf]),
        ]
        self._autocast = _autocast_state(self._devices)
        self._random_states = _random_states(self._devices)
        # The backward that has been compared with the conditions of forward, and the differences.
        self._compared_in: int | None = None
        self._of_caller: list[Callable[[], AbstractContextManager[object]]] = []

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
        samples = None if saved is None else joined(samples_of(saved))
        run.fingerprint = Fingerprint(predictions.detach().clone(), n_saved, samples)

    def after_forward(self, runs: Sequence[Run]) -> None:
        """Free the random states if no run has changed them."""
        # In forward, the pose model itself may have changed parameters (max_norm).
        self._versions = _versions(self._held)
        # Compare only once, because it takes long.
        if all(map(torch.equal, runs[0].random_states, self._random_states)):
            for run in runs:
                run.random_states = ()

    def kept_tensors(self) -> list[Tensor]:
        """Return the tensors with a graph that the pose model holds in plain attributes."""
        return self._attributes.tensors_with_graph()

    @contextmanager
    def restored(self, conditions: Run) -> Iterator[None]:
        """Restore the conditions of a run. At the end, restore the conditions of the caller.

        Raises
        ------
        ChangedBeforeBackwardError : a pose was changed in place
        """
        backward = current_backward()
        # Compare only once in each backward, because there may be many poses. -1 means that no
        # backward runs, for example if code reads grad_fn.saved_tensors.
        if backward != self._compared_in or backward == -1:
            self._compare_with_caller()
            self._compared_in = backward
        contexts = self._contexts(conditions)
        if not contexts:
            yield
            return
        # Otherwise a Ctrl-C could leave a part of the conditions behind.
        with delayed_interrupts(), ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            yield

    def _compare_with_caller(self) -> None:
        """Note which conditions of the caller differ from those of forward. Check the poses."""
        self._check_poses()
        self._of_caller = [flags.restored for flags in self._flags if flags.have_changed()]
        if self._attributes.move():
            self._of_caller.insert(0, self._attributes.kept)
        if self._parameters_differ():
            self._of_caller.append(partial(self._parameters.holding, self._places))

    def _contexts(self, conditions: Run) -> list[AbstractContextManager[object]]:
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

    def versions(self) -> list[int]:
        """Return how often each parameter was changed in place."""
        return _versions(self._held)

    def check_parameters(self, before: Sequence[int], predictions: Tensor) -> None:
        """Raise an error if a second run used a parameter that somebody has changed in place.

        torch checks versions only of tensors that a graph saves, but these graphs save no tensors.

        Parameters
        ----------
        before : the result of :meth:`versions` before the run
        predictions : the result of the run, with its graph
        """
        # In the run, the pose model itself may have changed parameters, as in forward (max_norm).
        after = _versions(self._held)
        if after != before:
            changes = zip(self._versions, after, before, strict=True)
            self._versions = [noted + now - then for noted, now, then in changes]
        if after == self._versions:
            return
        # An optimizer that steps in this backward may have changed a parameter after the last pose
        # that uses it.
        nodes = [] if predictions.grad_fn is None else nodes_of(predictions.grad_fn)
        used = {id(node.variable) for node in nodes if is_leaf(node)}
        for param, now, noted in zip(self._held, after, self._versions, strict=True):
            # A graph does not show whether it uses a frozen parameter.
            if now == noted or (param.requires_grad and id(param) not in used):
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
                compound = index - self._n_poses
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
    """Return how often each tensor was changed in place; -1 for tensors of ``inference_mode``."""
    try:
        return list(map(version_of, tensors))
    except RuntimeError:
        return [-1 if tensor.is_inference() else version_of(tensor) for tensor in tensors]


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
    """Saved values of one attribute of several modules or parameters."""

    def __init__(self, name: str, owners: Sequence[Any]) -> None:
        self._name = name
        self._owners = owners
        self._get = operator.attrgetter(name)
        self._noted = self._now()

    def have_changed(self) -> bool:
        """Return whether the value of any owner differs from the noted value."""
        return self._now() != self._noted

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Set the noted values. At the end, restore the values of the caller."""
        now = self._now()
        try:
            self._set(self._noted)
            yield
        finally:
            self._set(now)

    def _now(self) -> list[bool]:
        return list(map(self._get, self._owners))

    def _set(self, flags: list[bool]) -> None:
        for owner, flag in zip(self._owners, flags, strict=True):
            setattr(owner, self._name, flag)
