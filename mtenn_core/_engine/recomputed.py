"""Graphs of poses that save nothing forward, and are run again when backward asks.

Every chunk of poses has its ordinary graph, so that hooks, inputs that require grad and distributed
wrappers see nothing unusual. What the graph would have saved is thrown away, and computed again by
a second run of the chunk as soon as backward wants a part of it.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from mtenn_core._engine.autograd_nodes import Chunk
from mtenn_core._engine.module_tensors import Places, accelerators, is_sharded, lock_of
from mtenn_core.errors import ChangedBeforeBackwardError, GradientError, MtennError

Run = Callable[[], Tensor]


class _Buffers(NamedTuple):
    """The buffers before a run."""

    tensors: list[Tensor]
    versions: list[int]
    copies: list[Tensor]


class RecomputedGraphs:
    """Runs the chunks of one forward call, and again in backward with all as it was.

    Parameters
    ----------
    pose_model : the module that a chunk runs, with its parameters, buffers and modes
    poses : what the chunks read, to see whether it is the same in backward
    """

    def __init__(self, pose_model: torch.nn.Module, poses: Sequence[Any]) -> None:
        self._pose_model = pose_model
        self.lock = lock_of(pose_model)
        self._parameters = Places(pose_model, "parameters")
        self._buffers = Places(pose_model, "buffers")
        self._held = self._parameters.tensors()
        self._versions_then = _versions(self._held)
        self._flags = [
            _Flags("training", list(pose_model.modules())),
            _Flags("requires_grad", [param for param in self._held if param.is_leaf]),
        ]
        self._devices = accelerators([*self._held, *self._buffers.tensors()])
        self._autocast = _autocast_state(self._devices)
        self._random_states = _random_states(self._devices)
        self._noted = _Buffers([], [], [])
        self._read = [(pose, tensor, _versions([tensor])) for pose, tensor in _tensors_of(poses)]
        self._checked_in: int | None = None  # the backward that has seen to the poses
        self._last: Callable[[], _Chunk | None] = lambda: None

    def predict(self, run: Run, first_pose: int) -> tuple[Tensor, Chunk]:
        """Return ``run()``, whose graph has saved nothing, and what runs it again.

        Parameters
        ----------
        first_pose : index of the first, for errors
        """
        chunk = _Chunk(self, run, first_pose)
        chunk.random_states, chunk.buffers = self._random_states, self._buffers_now()
        try:
            with saved_tensors_hooks(chunk.leave_out, chunk.saved_again):
                predictions = run()
        except RuntimeError as error:
            if "saved tensor hooks" not in str(error):
                raise
            raise GradientError(
                "gradients='recomputed' does not work with grad, vjp and jacrev of torch.func,"
                " around the model or inside the pose model: use gradients='graph'"
            ) from error
        chunk.done(predictions.detach().clone())
        random_states = _random_states(self._devices)
        if all(map(torch.equal, random_states, chunk.random_states)):
            chunk.random_states = ()
        else:
            self._random_states = random_states
        chunk.changes_buffers = self._are_not(chunk.buffers)
        return predictions, chunk

    def _buffers_now(self) -> _Buffers:
        """Return the buffers, with the copies of the chunk before of what is still the same."""
        if self._are_not(self._noted):
            known = {(id(t), version): copy for t, version, copy in zip(*self._noted, strict=True)}
            tensors = self._buffers.tensors()
            versions = _versions(tensors)
            keys = [(id(t), version) for t, version in zip(tensors, versions, strict=True)]
            copies = [
                known[key] if key in known else tensor.detach().clone()
                for key, tensor in zip(keys, tensors, strict=True)
            ]
            self._noted = _Buffers(tensors, versions, copies)
        return self._noted

    def _are_not(self, buffers: _Buffers) -> bool:
        """Whether a buffer is another now, or has another value."""
        now = self._buffers.tensors()
        return not _same(now, buffers.tensors) or _versions(now) != buffers.versions

    def run_again(self, chunk: _Chunk) -> list[tuple[Tensor, int]]:
        """Return what the graph of a chunk would have saved, and the version of each."""
        if (last := self._last()) is not None:
            last.forget()  # what backward had no use for
        self._last = weakref.ref(chunk)
        saved: list[tuple[Tensor, int]] = []

        def keep(tensor: Tensor) -> Tensor:
            detached = tensor.detach()
            # torch sees to versions only of what it saves itself.
            saved.append((detached, detached._version))
            return detached

        with contextlib.ExitStack() as stack:
            for context in self._as_it_was(chunk):
                stack.enter_context(context)
            with torch.enable_grad(), saved_tensors_hooks(keep, _itself):
                predictions = chunk.run_again()
        chunk.check(predictions, len(saved), self._rounding)
        return saved

    def _as_it_was(self, chunk: _Chunk) -> list[AbstractContextManager[object]]:
        """Return contexts in which all that a run depends on is as it was, none where it is.

        Raises
        ------
        ChangedBeforeBackwardError : a parameter or a pose was changed in place
        """
        self._check_parameters()
        self._check_poses()
        contexts: list[AbstractContextManager[object]] = [
            flags.as_they_were() for flags in self._flags if flags.have_changed()
        ]
        for device, enabled, dtype in self._autocast:
            if enabled or torch.is_autocast_enabled(device):
                # No cache: it would keep the graph of a weight's cast alive.
                contexts.append(torch.autocast(device, dtype, enabled, cache_enabled=False))
        if chunk.random_states:
            contexts.append(_random(chunk.random_states, self._devices))
        if chunk.changes_buffers or self._are_not(chunk.buffers):
            contexts.append(self._buffers.holding(_copied(chunk.buffers)))
        if self._were_others():
            contexts.append(self._parameters.holding(self._held))
        return contexts

    def _check_parameters(self) -> None:
        now = _versions(self._held)
        if now == self._versions_then:
            return
        changed = [
            held
            for held, *versions in zip(self._held, now, self._versions_then, strict=True)
            if versions[0] != versions[1]
        ]
        names = [n for n, p in self._pose_model.named_parameters() if p is changed[0]]
        raise ChangedBeforeBackwardError(
            f"parameter {(names or ['?'])[0]!r} was changed in place between forward and backward,"
            " and gradients='recomputed' runs the poses again with the parameters as they were:"
            " call backward before the optimizer's step, or use gradients='stored', which does not"
            " need them any more"
        )

    def _check_poses(self) -> None:
        """Raise if a tensor of a pose has changed; once in a backward, since poses may be many."""
        backward = torch._C._current_graph_task_id()
        if backward == self._checked_in != -1:
            return
        for pose, tensor, version in self._read:
            if _versions([tensor]) != version:
                raise ChangedBeforeBackwardError(
                    f"pose {pose}: a tensor of it, shape {tuple(tensor.shape)}, was changed in"
                    " place between forward and backward, and gradients='recomputed' runs poses"
                    " again: hand a copy to the model, or use gradients='stored'"
                )
        self._checked_in = backward

    def _were_others(self) -> bool:
        """Whether the parameters were others in forward: those of a ``functional_call``."""
        try:
            now = self._parameters.tensors()
        except KeyError:  # FullyShardedDataParallel has taken them out, and puts them in itself
            return False
        # Sharded ones are put in and taken out by fully_shard itself.
        return not _same(now, self._held) and not any(map(is_sharded, self._held))

    def _rounding(self, predictions: Tensor) -> float:
        """Return by how much a second run may differ, relative to 1 and to the prediction."""
        dtypes = [dtype for _, enabled, dtype in self._autocast if enabled]
        dtypes += [tensor.dtype for tensor in self._held if tensor.is_floating_point()]
        eps = max(torch.finfo(dtype).eps for dtype in [predictions.dtype, *dtypes])
        # Above what sums in another order differ by: accelerators add in any.
        return eps ** (2 / 3)


class _Chunk:
    """Some poses that run together, and what their graph would have saved.

    Attributes
    ----------
    random_states : those before the run; none if it did not change them
    buffers, changes_buffers : those before the run, and whether it changed them
    left_out_in : the backward that has no gradient for these poses
    """

    random_states: Sequence[Tensor]
    buffers: _Buffers
    changes_buffers = True
    left_out_in: int | None = None

    def __init__(self, graphs: RecomputedGraphs, run: Run, first_pose: int) -> None:
        self._run = run
        self._graphs = graphs
        self._first_pose = first_pose
        self._count = itertools.count()
        # Returns what a saved tensor is called: partial and count since it is called for each.
        self.leave_out = partial(next, self._count)
        self._n_saved = 0
        self._predictions: Tensor | None = None  # while the first run lasts
        self._saved: dict[int, tuple[Tensor, int]] = {}

    def saved_again(self, index: int) -> Tensor:
        # Nodes ask for what they saved before they see that there is no gradient.
        left_out_in = self.left_out_in
        left_out = left_out_in is not None and left_out_in == torch._C._current_graph_task_id()
        if left_out and _asked_by_a_node():
            return _NOTHING
        # Handed out once, so that memory shrinks while backward goes on.
        found = self._saved.pop(index, None)
        tensor, version = found or self._of_a_second_run(index)
        if tensor._version != version:
            raise ChangedBeforeBackwardError(
                "one of the variables needed for gradient computation, shape"
                f" {tuple(tensor.shape)}, was modified by an inplace operation of the pose model"
                " itself: let it work on a copy"
            )
        return tensor

    def _of_a_second_run(self, index: int) -> tuple[Tensor, int]:
        with self._graphs.lock:
            found = self._saved.pop(index, None)  # another thread may have been faster
            if found is None:
                saved = dict(enumerate(self._graphs.run_again(self)))
                found = saved.pop(index)
                self._saved = saved
            return found

    def done(self, predictions: Tensor) -> None:
        """Note what the first run gave."""
        self._predictions, self._n_saved = predictions, next(self._count)

    def run_again(self) -> Tensor:
        """Return the predictions of a second run."""
        try:
            return self._run()
        except (MtennError, MemoryError, torch.cuda.OutOfMemoryError):
            raise
        except Exception as error:
            raise ChangedBeforeBackwardError(
                f"pose {self._first_pose}: run again in backward, the pose model raised"
                f" {type(error).__name__}: {error}. {_QUESTIONS}"
            ) from error

    def forget(self) -> None:
        self._saved = {}

    def check(
        self, predictions: Tensor, n_saved: int, rounding_of: Callable[[Tensor], float]
    ) -> None:
        """Raise unless the second run has done what the first did.

        Parameters
        ----------
        rounding_of : how far predictions may be apart; asks every parameter, and seldom needed
        """
        if self._predictions is None:  # a pose model that takes gradients in its own forward
            return
        if n_saved == self._n_saved and torch.equal(predictions, self._predictions):
            return
        first, rounding = self._predictions, rounding_of(predictions)
        same = torch.isclose(predictions.detach(), first, rounding, rounding, equal_nan=True)
        if n_saved == self._n_saved and same.all():
            return
        pose = int((~same).int().argmax())
        found = f"{n_saved} saved tensors for {self._n_saved}"
        if not same.all():
            found = f"prediction {predictions[pose].item()!r} for {first[pose].item()!r}"
        raise ChangedBeforeBackwardError(
            f"pose {self._first_pose + pose}: run again in backward, the pose model did something"
            f" else than in forward ({found}). {_QUESTIONS}"
        )


_QUESTIONS = (
    "Has something that it reads changed in between? Does it draw random numbers outside of torch,"
    " keep count, or keep something for the next pose (a cache that grows, a part of its graph)? If"
    " it must, use gradients='stored' or 'graph', which run each pose once"
)


def _asked_by_a_node() -> bool:
    """Whether the engine asks, and not code that wants to compute with it (torch.utils.checkpoint).

    On the threads of accelerators, nothing in Python has called the engine.
    """
    unpack = sys._getframe().f_back
    asks = unpack and unpack.f_back
    return asks is None or asks.f_code is torch.autograd.graph._engine_run_backward.__code__


_NO_TENSORS = (int, float, complex, str, bytes, type(None), type, FunctionType, ModuleType)
_LONG, _DEPTH = 100, 5


def _tensors_of(poses: Sequence[Any]) -> Iterator[tuple[int, Tensor]]:
    """Yield the tensors in poses, with the index of one that has it, each once.

    A pose may be a tensor, a dict, a list, a dataclass, PyG's ``Data``; and may know all others.
    """
    seen: dict[int, object] = {}
    level: list[tuple[int, Any]] = list(enumerate(poses))
    for _ in range(_DEPTH):
        below = []
        for pose, part in level:
            if isinstance(part, (*_NO_TENSORS, torch.nn.Module)) or id(part) in seen:
                continue
            seen[id(part)] = part
            if isinstance(part, Tensor):
                yield pose, part
            else:
                below += [(pose, inner) for inner in _parts(part)]
        level = below


def _parts(whole: Any) -> Iterable[Any]:
    if isinstance(whole, Mapping):
        return whole.values()
    if isinstance(whole, list | tuple):
        # A long list of names or numbers has no tensors.
        return () if len(whole) > _LONG and isinstance(whole[0], _NO_TENSORS) else whole
    slots = getattr(type(whole), "__slots__", ())
    names = [*getattr(whole, "__dict__", ()), *([slots] if isinstance(slots, str) else slots)]
    return [getattr(whole, name, None) for name in names]


# On another device, so that whoever computes with it after all has an error.
_NOTHING = torch.empty(1, device="meta")


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _copied(buffers: _Buffers) -> list[Tensor]:
    return [
        copy.clone().requires_grad_(tensor.requires_grad)
        for tensor, copy in zip(buffers.tensors, buffers.copies, strict=True)
    ]


def _same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return list(map(id, one)) == list(map(id, other))


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    """Return how often each tensor was changed in place; those of ``inference_mode`` do not say."""
    try:
        return list(map(operator.attrgetter("_version"), tensors))
    except RuntimeError:
        return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]


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
    """Draw as from these states, and go on from the present ones afterwards."""
    before = _random_states(devices)
    _set_random_states(states, devices)
    try:
        yield
    finally:
        _set_random_states(before, devices)


class _Flags:
    """An attribute of some modules or parameters, noted to be set again."""

    def __init__(self, name: str, owners: Sequence[Any]) -> None:
        self._name, self._owners = name, owners
        self._get = operator.attrgetter(name)
        self._then = self._now()

    def have_changed(self) -> bool:
        return self._now() != self._then

    @contextmanager
    def as_they_were(self) -> Iterator[None]:
        now = self._now()
        try:
            self._set(self._then)
            yield
        finally:
            self._set(now)

    def _now(self) -> list[bool]:
        return list(map(self._get, self._owners))

    def _set(self, flags: list[bool]) -> None:
        for owner, flag in zip(self._owners, flags, strict=True):
            setattr(owner, self._name, flag)
