"""Read and restore the modes and settings of torch.

A setting for which torch has no interface is left out, and is then not watched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from mtenn_core import _torch_internals as internals


def all_function_modes() -> list[Any]:
    """Return the modes for functions, such as ``torch.device``, the outermost first."""
    return [internals.function_mode_at(i) for i in range(internals.n_function_modes())]


def set_all_function_modes(modes: list[Any]) -> None:
    """Use exactly these modes for functions."""
    for _ in range(internals.n_function_modes()):
        internals.pop_function_mode()
    for mode in modes:
        internals.push_function_mode(mode)


def function_modes() -> tuple[Any, ...]:
    """Return the modes for functions, except the one of the default device."""
    return tuple(m for m in all_function_modes() if m is not device_context())


def set_function_modes(modes: tuple[Any, ...]) -> None:
    """Use exactly these modes for functions. Keep the one of the default device."""
    kept = [m for m in all_function_modes() if m is device_context()]
    set_all_function_modes([*kept, *modes])


def device_context() -> Any:
    """Return the mode of the default device, or None."""
    # set_default_device would make another mode for the same device, and get_default_device makes a
    # tensor under all modes.
    return getattr(internals.default_device_mode, "device_context", None)


def forget_device_context() -> Callable[[], None]:
    """Forget the mode of the default device. Return a function to undo it."""
    # Not None instead: torch.get_default_device of torch 2.6 would raise an AttributeError.
    of_this_thread = vars(internals.default_device_mode)
    before = dict(of_this_thread)
    of_this_thread.clear()
    return lambda: of_this_thread.update(before)


def dispatch_modes() -> tuple[Any, ...]:
    """Return the modes for operations, such as ``FakeTensorMode``, the outermost first."""
    # torch's own _disable_current_modes imports the compiler, which takes a second.
    return tuple(internals.dispatch_mode_at(i) for i in range(internals.n_dispatch_modes()))


def set_dispatch_modes(modes: tuple[Any, ...]) -> None:
    """Use exactly these modes for operations."""
    for _ in range(internals.n_dispatch_modes()):
        internals.pop_dispatch_mode(None)
    for mode in modes:
        internals.push_dispatch_mode(mode)


@contextmanager
def paused_modes() -> Iterator[None]:
    """Run the block without modes for functions and operations, which could change its results."""
    functions, operations = all_function_modes(), dispatch_modes()
    set_all_function_modes([])
    set_dispatch_modes(())
    try:
        yield
    finally:
        set_all_function_modes(functions)
        set_dispatch_modes(operations)


def saved_tensors_hooks() -> tuple[Any, ...]:
    """Return the pairs of hooks for tensors that are saved for backward, the first pair first."""
    if not has_saved_tensors_hooks():
        return ()
    hooks = _pop_saved_tensors_hooks()
    _push_saved_tensors_hooks(hooks)
    return hooks


def set_saved_tensors_hooks(hooks: tuple[Any, ...]) -> None:
    """Use exactly these pairs of hooks for tensors that are saved for backward."""
    _pop_saved_tensors_hooks()
    _push_saved_tensors_hooks(hooks)


def has_saved_tensors_hooks() -> bool:
    """Return True if tensors that are saved for backward pass through hooks."""
    return bool(internals.top_saved_hooks(False))


def _pop_saved_tensors_hooks() -> tuple[Any, ...]:
    hooks = []
    while pair := internals.top_saved_hooks(False):  # only the last pair can be read
        hooks.append(pair)
        internals.pop_saved_hooks()
    return tuple(hooks[::-1])


def _push_saved_tensors_hooks(hooks: tuple[Any, ...]) -> None:
    for pair in hooks:
        internals.push_saved_hooks(*pair)


def module_hooks() -> dict[str, Any]:
    """Return the hooks of all modules. Without hooks, the dict is empty."""
    found: dict[str, Any] = {
        name: dict(hooks) for name, hooks in internals.MODULE_HOOKS.items() if hooks
    }
    if found:
        kind = internals.KIND_OF_MODULE_HOOKS
        found[kind] = getattr(torch.nn.modules.module, kind, None)
    return found


def set_module_hooks(hooks: dict[str, Any]) -> None:
    """Use exactly these hooks of all modules."""
    for name, registered in internals.MODULE_HOOKS.items():
        registered.clear()
        registered.update(hooks.get(name, {}))
    kind = internals.KIND_OF_MODULE_HOOKS
    setattr(torch.nn.modules.module, kind, hooks.get(kind))


# Autocast. The dtype of each type of device, and how many contexts are open: the cache of weights
# in low precision is freed when the last one ends.
AUTOCAST_DEVICES: list[str] = []
for _device in ("cpu", "cuda", "mps", "xpu"):
    with suppress(RuntimeError, AttributeError):
        torch.get_autocast_dtype(_device)
        AUTOCAST_DEVICES.append(_device)


def autocast_state() -> tuple[Any, ...]:
    """Return the number of open contexts, the use of the cache, and the dtype for each device."""
    n_open = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    devices = [
        (torch.is_autocast_enabled(each), torch.get_autocast_dtype(each))
        for each in AUTOCAST_DEVICES
    ]
    return n_open, torch.is_autocast_cache_enabled(), *devices


def set_autocast_state(state: tuple[Any, ...]) -> None:
    """Restore autocast, and free its cache, which may hold weights that have changed."""
    n_open, has_cache, *devices = state
    for name, (is_enabled, dtype) in zip(AUTOCAST_DEVICES, devices, strict=True):
        torch.set_autocast_enabled(name, is_enabled)
        torch.set_autocast_dtype(name, dtype)
    torch.set_autocast_cache_enabled(has_cache)
    torch.clear_autocast_cache()
    while torch.autocast_increment_nesting() - 1 > n_open:
        torch.autocast_decrement_nesting()
        torch.autocast_decrement_nesting()
    while torch.autocast_decrement_nesting() < n_open:
        torch.autocast_increment_nesting()
        torch.autocast_increment_nesting()


# The precision of float32 on each backend: torch.backends.mkldnn.matmul.fp32_precision and others.
# Their attributes read and write these. A parent comes before its children, which inherit from it.
# torch has them since version 2.9.
_PRECISIONS = [
    ("generic", "all"),
    *((backend, op) for backend in ("cuda", "mkldnn") for op in ("all", "matmul", "conv", "rnn")),
]
if internals.get_precision is None:
    _PRECISIONS = []


def _precision(backend: str, operation: str) -> str:
    """Return the precision of one operation. Full precision has two names; this returns "none"."""
    found = str(internals.get_precision(backend, operation)) if internals.get_precision else "none"
    return "none" if found == "ieee" else found


def float32_precision() -> tuple[str | None, tuple[str, ...]]:
    """Return the precision that all backends have, or None if they differ, and that of each."""
    try:
        common = torch.get_float32_matmul_precision()
    except RuntimeError:  # a backend has its own
        common = None
    return common, tuple(_precision(*each) for each in _PRECISIONS)


def set_float32_precision(value: tuple[str | None, tuple[str, ...]]) -> None:
    """Restore the precision of float32."""
    common, precisions = value
    if common is not None:
        torch.set_float32_matmul_precision(common)
    for each, precision in zip(_PRECISIONS, precisions, strict=True):
        # If a parent has another value, only the second name means full precision.
        for name in (precision, "ieee" if precision == "none" else precision):
            if _precision(*each) != precision:
                internals.set_precision(*each, name)


# torch's own default.
FLOAT32_PRECISION = (
    "highest",
    tuple("tf32" if e in {("cuda", "conv"), ("cuda", "rnn")} else "none" for e in _PRECISIONS),
)


def backend_flags() -> dict[str, tuple[Callable[[], Any], Callable[[Any], None]]]:
    """Return the functions that read and set each switch of the backends that this torch has."""
    return {
        name: (getter, _with_arguments(setter))
        for name, (getter, setter) in internals.BACKEND_SWITCHES.items()
    }


def _with_arguments(function: Callable[..., object]) -> Callable[[Any], None]:
    """Return a setter that also takes a pair, which some getters return."""

    def set_flag(value: Any) -> None:
        function(*value) if isinstance(value, tuple) else function(value)

    return set_flag


def einsum_options() -> tuple[Any, Any]:
    """Return whether einsum chooses the order of its operations, and how."""
    return internals.einsum_enabled(), internals.einsum_strategy()


def set_einsum_options(options: tuple[Any, Any]) -> None:
    """Restore what :func:`einsum_options` returned."""
    internals.set_einsum_enabled(options[0])
    if options[0]:  # otherwise torch refuses a strategy
        internals.set_einsum_strategy(options[1])


def generators() -> tuple[Any, Any]:
    """Return the default generator, which is in two places."""
    # Code outside of torch uses the first, torch.manual_seed the second.
    return torch.default_generator, vars(torch.random)["default_generator"]


def set_generators(generators: tuple[Any, Any]) -> None:
    """Restore the default generator in both places."""
    torch.default_generator, vars(torch.random)["default_generator"] = generators


def fills_memory() -> bool:
    """Return whether deterministic mode fills uninitialized memory."""
    # The type checker does not know this property of a module.
    return bool(torch.utils.deterministic.fill_uninitialized_memory)  # type: ignore[attr-defined]


def set_fills_memory(enabled: bool) -> None:
    """Restore what :func:`fills_memory` returned."""
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", enabled)  # noqa: B010


def print_options() -> dict[str, Any]:
    """Return the options of ``torch.set_printoptions``."""
    return dict(internals.PRINT_OPTIONS)


def set_print_options(options: dict[str, Any]) -> None:
    """Restore the options of ``torch.set_printoptions``."""
    # torch.set_printoptions itself cannot set sci_mode to None.
    internals.PRINT_OPTIONS.update(options)


def autograd_switches() -> tuple[bool, ...]:
    """Return whether forward-mode derivatives and several threads in backward are allowed."""
    return internals.forward_ad_enabled(), internals.threads_enabled()


def set_autograd_switches(switches: tuple[bool, ...]) -> None:
    """Restore what :func:`autograd_switches` returned."""
    internals.enable_forward_ad(switches[0])
    internals.enable_threads(switches[1])
