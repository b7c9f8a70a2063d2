"""Restore random state (dropout), buffers, modes and autocast for the second run of a pose.

The conditions of a run are the random states, autocast, the buffers, the parameters, and the flags
``training`` and ``requires_grad``. They are noted before the first run. Poses and parameters must
not change in place between the two runs.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtenn_core._engine.autograd_nodes import current_backward, version_of
from mtenn_core._engine.module_tensors import Places, accelerators, is_sharded, lock_of
from mtenn_core._engine.tensor_search import tensors_in
from mtenn_core.errors import ChangedBeforeBackwardError


class Buffers(NamedTuple):
    """The buffers before a run: the tensors, the version of each, and copies."""

    tensors: list[Tensor]
    versions: list[int]
    copies: list[Tensor]


class Conditions(NamedTuple):
    """The conditions of one run, as far as a run may change them.

    Attributes
    ----------
    random_states : the random states before the run; empty if the run drew no random number
    buffers : the buffers before the run
    buffers_change : True if the run changes the buffers
    """

    random_states: Sequence[Tensor]
    buffers: Buffers
    buffers_change: bool = True


class Replay:
    """The conditions of all runs of one forward call.

    Parameters
    ----------
    pose_model : the module that runs, with its parameters, buffers and flags
    poses : the inputs of the pose model

    Attributes
    ----------
    lock : hold it while conditions are restored
    """

    def __init__(self, pose_model: torch.nn.Module, poses: Sequence[Any]) -> None:
        self.lock = lock_of(pose_model)
        self._pose_model = pose_model
        self._parameters = Places(pose_model, "parameters")
        self._buffers = Places(pose_model, "buffers")
        self._held = self._parameters.tensors()
        buffers = self._buffers.tensors()
        self._has_buffers = bool(buffers)
        self._devices = accelerators([*self._held, *buffers])
        inputs = tensors_in(poses)
        self._inputs = [(pose, tensor, _versions([tensor])) for pose, tensor in inputs]
        self._versions = _versions(self._held)
        self._flags = [
            _Flags("training", list(pose_model.modules())),
            # torch refuses to set requires_grad of a tensor that is not a leaf.
            _Flags("requires_grad", [param for param in self._held if param.is_leaf]),
        ]
        self._autocast = _autocast_state(self._devices)
        self._random_states = _random_states(self._devices)
        self._noted = Buffers([], [], [])
        self._checked_in: int | None = None  # the backward that has checked the poses

    def before_run(self) -> Conditions:
        """Return the conditions of the next run."""
        return Conditions(self._random_states, self._buffers_now())

    def after_run(self, before: Conditions) -> Conditions:
        """Return the conditions of the last run. Leave out random states that it did not change.

        Parameters
        ----------
        before : the result of :meth:`before_run`
        """
        random_states = _random_states(self._devices)
        if all(map(torch.equal, random_states, before.random_states)):
            random_states_before: Sequence[Tensor] = ()
        else:
            random_states_before, self._random_states = before.random_states, random_states
        return Conditions(random_states_before, before.buffers, self._differ_from(before.buffers))

    def _buffers_now(self) -> Buffers:
        """Return the buffers. Use copies from the previous run again if they are still right."""
        if self._differ_from(self._noted):
            # self._noted keeps the tensors alive, so no other tensor gets the same id. For this
            # reason, an id and a version identify one value.
            known = {(id(t), version): copy for t, version, copy in zip(*self._noted, strict=True)}
            tensors = self._buffers.tensors()
            versions = _versions(tensors)
            keys = [(id(t), version) for t, version in zip(tensors, versions, strict=True)]
            copies = [
                known[key] if key in known else tensor.detach().clone()
                for key, tensor in zip(keys, tensors, strict=True)
            ]
            self._noted = Buffers(tensors, versions, copies)
        return self._noted

    def _differ_from(self, buffers: Buffers) -> bool:
        """Return whether a buffer is now another tensor, or has another value."""
        if not self._has_buffers:  # a shortcut: each chunk calls this three times
            return False
        now = self._buffers.tensors()
        return not _same(now, buffers.tensors) or _versions(now) != buffers.versions

    @contextmanager
    def restored(self, conditions: Conditions) -> Iterator[None]:
        """Restore the conditions of a run. At the end, restore the conditions of the caller.

        Raises
        ------
        ChangedBeforeBackwardError : a parameter or a pose was changed in place
        """
        self._check_parameters()
        self._check_poses()
        with ExitStack() as stack:
            for context in self._contexts(conditions):
                stack.enter_context(context)
            yield

    def _contexts(self, conditions: Conditions) -> list[AbstractContextManager[object]]:
        """Return one context for each condition that has changed since the run."""
        contexts: list[AbstractContextManager[object]] = [
            flags.restored() for flags in self._flags if flags.have_changed()
        ]
        for device, enabled, dtype in self._autocast:
            if enabled or torch.is_autocast_enabled(device):
                # Switch the cache off. It would keep casts of weights until the end of the
                # outermost autocast, and these casts would keep the graph of the second run.
                contexts.append(torch.autocast(device, dtype, enabled, cache_enabled=False))
        if conditions.random_states:
            contexts.append(_random(conditions.random_states, self._devices))
        if conditions.buffers_change or self._differ_from(conditions.buffers):
            contexts.append(self._buffers.holding(_copies(conditions.buffers)))
        if self._parameters_differ():
            contexts.append(self._parameters.holding(self._held))
        return contexts

    def _check_parameters(self) -> None:
        """Raise an error if a parameter was changed in place, for example by an optimizer.

        torch checks versions only of tensors that a graph saves, but these graphs save no tensors.
        """
        now = _versions(self._held)
        if now == self._versions:
            return
        changed = next(
            param
            for param, version, then in zip(self._held, now, self._versions, strict=True)
            if version != then
        )
        names = [name for name, param in self._pose_model.named_parameters() if param is changed]
        raise ChangedBeforeBackwardError(
            f"parameter {(names or ['?'])[0]!r} was changed in place between forward and backward."
            " gradients='recomputed' runs the poses again and needs the parameters unchanged. Call"
            " backward before the optimizer's step, or use gradients='stored', which runs each pose"
            " once."
        )

    def _check_poses(self) -> None:
        """Raise an error if a tensor of a pose was changed in place.

        The check runs only once in each backward, because there may be many poses.
        """
        backward = current_backward()
        # -1 means that no backward runs, for example if code reads grad_fn.saved_tensors.
        if backward == self._checked_in != -1:
            return
        for pose, tensor, version in self._inputs:
            if _versions([tensor]) != version:
                raise ChangedBeforeBackwardError(
                    f"pose {pose}: one of its tensors, shape {tuple(tensor.shape)}, was changed in"
                    " place between forward and backward. gradients='recomputed' runs the poses"
                    " again and needs them unchanged. Pass a copy to the model, or use"
                    " gradients='stored'."
                )
        self._checked_in = backward

    def _parameters_differ(self) -> bool:
        """Return whether forward ran with other parameters, for example in ``functional_call``."""
        try:
            now = self._parameters.tensors()
        except KeyError:  # FullyShardedDataParallel itself removes parameters and puts them back
            return False
        # fully_shard also replaces sharded parameters itself.
        return not _same(now, self._held) and not any(map(is_sharded, self._held))

    def rounding(self, predictions: Tensor) -> float:
        """Return the allowed difference of a second run, relative to 1 and to the prediction."""
        dtypes = [dtype for _, enabled, dtype in self._autocast if enabled]
        dtypes += [tensor.dtype for tensor in self._held if tensor.is_floating_point()]
        eps = max(torch.finfo(dtype).eps for dtype in [predictions.dtype, *dtypes])
        # An accelerator may add numbers in another order in each run. This limit allows the
        # resulting differences.
        return eps ** (2 / 3)


def _copies(buffers: Buffers) -> list[Tensor]:
    """Return copies of the buffers for the second run, since this run also changes its buffers."""
    return [
        copy.clone().requires_grad_(tensor.requires_grad)
        for tensor, copy in zip(buffers.tensors, buffers.copies, strict=True)
    ]


def _same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return list(map(id, one)) == list(map(id, other))


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
