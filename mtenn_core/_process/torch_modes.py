"""Run a block without the modes and settings of torch that the caller uses.

The private interfaces of torch here were seen in torch 2.13. Without them: a new thread has no
modes of its caller. But it would wait forever for a module that the caller is importing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor

from mtenn_core._process.settings import default_settings, differs_from_defaults


@contextmanager
def without_modes(*, process_wide: bool = True) -> Iterator[None]:
    """Run the block without the caller's modes and settings of torch, and restore them afterwards.

    These are modes for functions and for operations (``torch.device``, ``FakeTensorMode``,
    ``FlopCounterMode``), the default device, transforms of ``torch.func``, autocast, the grad and
    inference modes, hooks for saved tensors and of all modules, and process-wide settings of torch.

    Parameters
    ----------
    process_wide : False to keep the process-wide settings, such as the default dtype. Otherwise,
        those that differ from torch's defaults also change for other threads
    """
    with ExitStack() as stack:
        for remove in _REMOVE:
            stack.callback(remove())
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
        torch._C._len_torch_function_stack()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._autograd._top_saved_tensors_default_hooks(False)
        or torch.is_inference_mode_enabled()
        or not torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or differs_from_defaults()
    )


def has_numbers(tensor: Tensor) -> bool:
    """Return False for a tensor without numbers of its own.

    These are tensors on the meta device, fake tensors, and tensors inside of a transform of
    ``torch.func``.
    """
    fake = sys.modules.get("torch._subclasses.fake_tensor")  # slow to import, and then unused
    if fake is not None and isinstance(tensor, fake.FakeTensor):
        return False
    return not (tensor.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def _function_modes() -> Callable[[], None]:
    """Remove the modes for functions, such as ``torch.device``. Return a function to undo it."""
    length, pop = torch._C._len_torch_function_stack, torch._C._pop_torch_function_stack
    modes = [pop() for _ in range(length())]

    def restore() -> None:
        for _ in range(length()):  # the block may have left some
            pop()
        for mode in reversed(modes):
            torch._C._push_on_torch_function_stack(mode)

    return restore


def _default_device() -> Callable[[], None]:
    """Forget the default device, whose mode is one of those for functions."""
    # set_default_device would make another mode for the same device.
    devices = torch._GLOBAL_DEVICE_CONTEXT
    context = getattr(devices, "device_context", None)
    devices.device_context = None
    return lambda: setattr(devices, "device_context", context)


def _dispatch_modes() -> Callable[[], None]:
    """Remove the modes for operations, such as ``FakeTensorMode``."""
    # torch's own _disable_current_modes imports the compiler, which takes a second.
    length = torch._C._len_torch_dispatch_stack
    pop = partial(torch._C._pop_torch_dispatch_stack, None)
    modes = [pop() for _ in range(length())]

    def restore() -> None:
        for _ in range(length()):
            pop()
        for mode in reversed(modes):
            torch._C._push_on_torch_dispatch_stack(mode)

    return restore


def _transforms() -> Callable[[], None]:
    """Leave the transforms of ``torch.func``, such as vmap."""
    if torch._C._functorch.peek_interpreter_stack() is None:
        return lambda: None
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    left = temporarily_clear_interpreter_stack()
    left.__enter__()

    def restore() -> None:
        left.__exit__(None, None, None)

    return restore


def _saved_hooks() -> Callable[[], None]:
    """Remove the hooks for tensors that are saved for backward."""
    autograd, hooks = torch._C._autograd, []
    while pair := autograd._top_saved_tensors_default_hooks(False):
        hooks.append(pair)
        autograd._pop_saved_tensors_default_hooks()

    def restore() -> None:
        for pair in reversed(hooks):
            autograd._push_saved_tensors_default_hooks(*pair)

    return restore


# Modes for functions come first, because they may change the results of every call of torch.
_REMOVE = (_function_modes, _default_device, _dispatch_modes, _transforms, _saved_hooks)
