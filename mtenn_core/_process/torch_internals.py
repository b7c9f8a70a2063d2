"""Private interfaces of torch that are needed to read and restore its modes and settings.

Each has a comment: its use, the version of torch in which it was seen to work, and what could
replace it. An interface that another version lacks is left out, and is then not watched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

# The number of modes for functions and operations that are in use. Seen in torch 2.13.
# Without them: a new thread has no modes of its caller, but it would wait forever for a module that
# the caller is importing.
n_function_modes = torch._C._len_torch_function_stack
n_dispatch_modes = torch._C._len_torch_dispatch_stack

# Hooks that run for every module of the process; FlopCounterMode has some. Seen in torch 2.13.
# Without them: such hooks would run in the gate, and nobody would see that a plugin leaves some.
MODULE_HOOKS: dict[str, dict[Any, Any]] = {
    name: hooks
    for name, hooks in vars(torch.nn.modules.module).items()
    if name.startswith("_global_") and isinstance(hooks, dict)
}
# There are two kinds of backward hooks. Only one can be in use, and this name says which.
_KIND_OF_HOOKS = "_global_is_full_backward_hook"


def all_function_modes() -> list[Any]:
    """Return the modes for functions, such as ``torch.device``, the outermost first."""
    # Seen in torch 2.13. Without it: pop all modes, and push them again.
    return [torch._C._get_function_stack_at(i) for i in range(n_function_modes())]


def set_all_function_modes(modes: list[Any]) -> None:
    """Use exactly these modes for functions."""
    for _ in range(n_function_modes()):
        torch._C._pop_torch_function_stack()
    for mode in modes:
        torch._C._push_on_torch_function_stack(mode)


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
    # tensor under all modes. Seen in torch 2.13. Without it: torch.get_default_device.
    return getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)


def forget_device_context() -> Callable[[], None]:
    """Forget the mode of the default device. Return a function to undo it."""
    context = device_context()
    torch._GLOBAL_DEVICE_CONTEXT.device_context = None
    return lambda: setattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", context)


def dispatch_modes() -> tuple[Any, ...]:
    """Return the modes for operations, such as ``FakeTensorMode``, the outermost first."""
    # torch's own _disable_current_modes imports the compiler, which takes a second. Seen in 2.13.
    return tuple(torch._C._get_dispatch_stack_at(i) for i in range(n_dispatch_modes()))


def set_dispatch_modes(modes: tuple[Any, ...]) -> None:
    """Use exactly these modes for operations."""
    for _ in range(n_dispatch_modes()):
        torch._C._pop_torch_dispatch_stack(None)
    for mode in modes:
        torch._C._push_on_torch_dispatch_stack(mode)


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
    # Only the last pair can be read. Seen in torch 2.13. Without it: a tensor saved by an operation
    # shows whether there are hooks, and the hooks could not be removed.
    return bool(torch._C._autograd._top_saved_tensors_default_hooks(False))


def _pop_saved_tensors_hooks() -> tuple[Any, ...]:
    hooks = []
    while pair := torch._C._autograd._top_saved_tensors_default_hooks(False):
        hooks.append(pair)
        torch._C._autograd._pop_saved_tensors_default_hooks()
    return tuple(hooks[::-1])


def _push_saved_tensors_hooks(hooks: tuple[Any, ...]) -> None:
    for pair in hooks:
        torch._C._autograd._push_saved_tensors_default_hooks(*pair)


def module_hooks() -> dict[str, Any]:
    """Return the hooks of all modules. Without hooks, the dict is empty."""
    found: dict[str, Any] = {name: dict(hooks) for name, hooks in MODULE_HOOKS.items() if hooks}
    if found:
        found[_KIND_OF_HOOKS] = getattr(torch.nn.modules.module, _KIND_OF_HOOKS, None)
    return found


def set_module_hooks(hooks: dict[str, Any]) -> None:
    """Use exactly these hooks of all modules."""
    for name, registered in MODULE_HOOKS.items():
        registered.clear()
        registered.update(hooks.get(name, {}))
    setattr(torch.nn.modules.module, _KIND_OF_HOOKS, hooks.get(_KIND_OF_HOOKS))


# Autocast. The dtype of each type of device, and how many contexts are open: the cache of weights
# in low precision is freed when the last one ends. Seen in torch 2.13, in which the functions have
# no underscore but no documentation either. Without them: torch.is_autocast_enabled(device).
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
# Seen in torch 2.13. Without them: torch.get_float32_matmul_precision, as before torch 2.9.
_get_precision = getattr(torch._C, "_get_fp32_precision_getter", None)
_set_precision = getattr(torch._C, "_set_fp32_precision_setter", None)
_PRECISIONS = [
    ("generic", "all"),
    *((backend, op) for backend in ("cuda", "mkldnn") for op in ("all", "matmul", "conv", "rnn")),
]
if _get_precision is None or _set_precision is None:
    _PRECISIONS = []


def _precision(backend: str, operation: str) -> str:
    """Return the precision of one operation. Full precision has two names; this returns "none"."""
    found = str(_get_precision(backend, operation)) if _get_precision else "none"
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
            if _set_precision and _precision(*each) != precision:
                _set_precision(*each, name)


# torch's own default.
FLOAT32_PRECISION = (
    "highest",
    tuple("tf32" if e in {("cuda", "conv"), ("cuda", "rnn")} else "none" for e in _PRECISIONS),
)

# Switches of the backends: their name in torch.backends, and the functions that read and set them.
# The attributes of torch.backends use these functions, but they are slower, and some are missing
# in torch 2.6. Seen in torch 2.13.
_FLAGS = {
    "cudnn.enabled": ("_get_cudnn_enabled", "_set_cudnn_enabled"),
    "cudnn.benchmark": ("_get_cudnn_benchmark", "_set_cudnn_benchmark"),
    "cudnn.deterministic": ("_get_cudnn_deterministic", "_set_cudnn_deterministic"),
    "mkldnn.enabled": ("_get_mkldnn_enabled", "_set_mkldnn_enabled"),
    "mkldnn.deterministic": ("_get_mkldnn_deterministic", "_set_mkldnn_deterministic"),
    "nnpack": ("_get_nnpack_enabled", "_set_nnpack_enabled"),
    "quantized.engine": ("_get_qengine", "_set_qengine"),
    "cpu.allow_fp16_reduced_precision_reduction": (
        "_get_cpu_allow_fp16_reduced_precision_reduction",
        "_set_cpu_allow_fp16_reduced_precision_reduction",
    ),
    "cuda.matmul.allow_fp16_reduced_precision_reduction": (
        "_get_cublas_allow_fp16_reduced_precision_reduction",
        "_set_cublas_allow_fp16_reduced_precision_reduction",
    ),
    "cuda.matmul.allow_bf16_reduced_precision_reduction": (
        "_get_cublas_allow_bf16_reduced_precision_reduction",
        "_set_cublas_allow_bf16_reduced_precision_reduction",
    ),
    "cuda.matmul.allow_fp16_accumulation": (
        "_get_cublas_allow_fp16_accumulation",
        "_set_cublas_allow_fp16_accumulation",
    ),
    "cuda.preferred_linalg_library": (
        "_get_linalg_preferred_backend",
        "_set_linalg_preferred_backend",
    ),
    "cuda.enable_flash_sdp": ("_get_flash_sdp_enabled", "_set_sdp_use_flash"),
    "cuda.enable_mem_efficient_sdp": (
        "_get_mem_efficient_sdp_enabled",
        "_set_sdp_use_mem_efficient",
    ),
    "cuda.enable_math_sdp": ("_get_math_sdp_enabled", "_set_sdp_use_math"),
    "cuda.enable_cudnn_sdp": ("_get_cudnn_sdp_enabled", "_set_sdp_use_cudnn"),
    "cuda.allow_fp16_bf16_reduction_math_sdp": (
        "_get_math_sdp_allow_fp16_bf16_reduction",
        "_set_math_sdp_allow_fp16_bf16_reduction",
    ),
}
if not _PRECISIONS:  # later, the precision of float32 includes it
    _FLAGS["cudnn.allow_tf32"] = ("_get_cudnn_allow_tf32", "_set_cudnn_allow_tf32")


def backend_flags() -> dict[str, tuple[Callable[[], Any], Callable[[Any], None]]]:
    """Return the functions that read and set each switch of the backends that this torch has."""
    flags = {}
    for name, (getter, setter) in _FLAGS.items():
        if hasattr(torch._C, getter) and hasattr(torch._C, setter):
            flags[f"torch.backends.{name}"] = (
                getattr(torch._C, getter),
                _with_arguments(getattr(torch._C, setter)),
            )
    return flags


def _with_arguments(function: Callable[..., object]) -> Callable[[Any], None]:
    """Return a setter that also takes a pair, which some getters return."""

    def set_flag(value: Any) -> None:
        function(*value) if isinstance(value, tuple) else function(value)

    return set_flag


# The module behind torch.backends.opt_einsum, which is an object with slow attributes. Seen in
# torch 2.13. Without it: torch.backends.opt_einsum.enabled and .strategy.
_opt_einsum = getattr(torch.backends.opt_einsum, "m", torch.backends.opt_einsum)


def einsum_options() -> tuple[Any, Any]:
    """Return whether einsum chooses the order of its operations, and how."""
    return _opt_einsum._get_enabled(), _opt_einsum._get_strategy()


def set_einsum_options(options: tuple[Any, Any]) -> None:
    """Restore what :func:`einsum_options` returned."""
    _opt_einsum._set_enabled(options[0])
    if options[0]:  # otherwise torch refuses a strategy
        _opt_einsum._set_strategy(options[1])


def generators() -> tuple[Any, Any]:
    """Return the default generator, which is in two places."""
    # Code outside of torch uses the first, torch.manual_seed the second. Seen in torch 2.13.
    return torch.default_generator, vars(torch.random)["default_generator"]


def set_generators(generators: tuple[Any, Any]) -> None:
    """Restore the default generator in both places."""
    torch.default_generator, vars(torch.random)["default_generator"] = generators


def fills_memory() -> bool:
    """Return whether deterministic mode fills uninitialized memory."""
    # The type checker does not know this property of a module. Documented in torch 2.13.
    return bool(torch.utils.deterministic.fill_uninitialized_memory)  # type: ignore[attr-defined]


def set_fills_memory(enabled: bool) -> None:
    """Restore what :func:`fills_memory` returned."""
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", enabled)  # noqa: B010


def print_options() -> dict[str, Any]:
    """Return the options of ``torch.set_printoptions``."""
    # Seen in torch 2.13. Without it: the text of a tensor shows some of them.
    return dict(vars(torch._tensor_str.PRINT_OPTS))


def set_print_options(options: dict[str, Any]) -> None:
    """Restore the options of ``torch.set_printoptions``."""
    # torch.set_printoptions itself cannot set sci_mode to None.
    vars(torch._tensor_str.PRINT_OPTS).update(options)


def autograd_switches() -> tuple[bool, ...]:
    """Return whether forward-mode derivatives and several threads in backward are allowed."""
    # Seen in torch 2.13. Without them: the first could be seen only by a derivative.
    return torch._C._is_fwd_grad_enabled(), torch._C._is_multithreading_enabled()


def set_autograd_switches(switches: tuple[bool, ...]) -> None:
    """Restore what :func:`autograd_switches` returned."""
    torch._C._set_fwd_grad_enabled(switches[0])
    torch._C._set_multithreading_enabled(switches[1])
