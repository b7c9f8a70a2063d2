"""Run a block without the modes and settings of torch that the caller uses.

A new thread has no modes of its caller either. But it would wait forever for a module that the
caller is importing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from mtenn_core import _torch_internals as internals
from mtenn_core._process import torch_state
from mtenn_core._process.settings import (
    default_settings,
    default_thread_settings,
    differs_from_defaults,
    thread_differs_from_defaults,
)


@contextmanager
def without_modes(*, process_wide: bool = True) -> Iterator[None]:
    """Run the block without the caller's modes and settings of torch, and restore them afterwards.

    These are modes for functions and for operations (``torch.device``, ``FakeTensorMode``,
    ``FlopCounterMode``), the default device, transforms of ``torch.func``, autocast, the grad and
    inference modes, hooks for saved tensors and of all modules, the flushing of denormal numbers,
    numpy's handling of errors, and process-wide settings of torch.

    Parameters
    ----------
    process_wide : False to keep the process-wide settings, such as the default dtype. Otherwise,
        those that differ from torch's defaults also change for other threads
    """
    with ExitStack() as stack:
        for remove in _REMOVE:
            stack.callback(remove())
        stack.enter_context(default_thread_settings())
        if process_wide:
            stack.enter_context(default_settings())
        if torch.is_autocast_enabled("cpu"):
            stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        yield


def uses_modes() -> bool:
    """Return True if :func:`without_modes` would change a mode or a setting."""
    return bool(
        internals.n_function_modes()
        or internals.n_dispatch_modes()
        or internals.current_transform() is not None
        or torch_state.has_saved_tensors_hooks()
        or torch.is_inference_mode_enabled()
        or not torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or thread_differs_from_defaults()
        or differs_from_defaults()
    )


def has_numbers(tensor: Tensor) -> bool:
    """Return False for a tensor without numbers of its own.

    These are tensors on the meta device, fake tensors, and tensors inside of a transform of
    ``torch.func``.
    """
    # By name, because the module of this class is private and slow to import.
    if type(tensor).__name__ == "FakeTensor":
        return False
    return not (tensor.is_meta or internals.is_wrapped(tensor))


def _function_modes() -> Callable[[], None]:
    """Remove the modes for functions, such as ``torch.device``. Return a function to undo it."""
    modes = torch_state.all_function_modes()
    torch_state.set_all_function_modes([])
    return lambda: torch_state.set_all_function_modes(modes)


def _dispatch_modes() -> Callable[[], None]:
    """Remove the modes for operations, such as ``FakeTensorMode``."""
    modes = torch_state.dispatch_modes()
    torch_state.set_dispatch_modes(())
    return lambda: torch_state.set_dispatch_modes(modes)


def _transforms() -> Callable[[], None]:
    """Leave the transforms of ``torch.func``, such as vmap."""
    if internals.current_transform() is None:
        return lambda: None
    left = internals.outside_transforms()
    left.__enter__()

    def restore() -> None:
        left.__exit__(None, None, None)

    return restore


def _saved_hooks() -> Callable[[], None]:
    """Remove the hooks for tensors that are saved for backward."""
    hooks = torch_state.saved_tensors_hooks()
    torch_state.set_saved_tensors_hooks(())
    return lambda: torch_state.set_saved_tensors_hooks(hooks)


# Modes for functions come first, because they may change the results of every call of torch.
_REMOVE = (
    _function_modes,
    torch_state.forget_device_context,
    _dispatch_modes,
    _transforms,
    _saved_hooks,
)
