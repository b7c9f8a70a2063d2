"""The settings and random states that a plugin must not change: how to read and set each."""

from __future__ import annotations

import gc
import locale
import pickle
import random
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from mtenn_core._process import floating_point, torch_state


class Setting(NamedTuple):
    """Functions that read and set a setting.

    Attributes
    ----------
    get : returns the value. None means that it cannot be read, and then it is not compared
    set : sets a value that ``get`` has returned
    default : the value that the gate uses, or None if it uses the caller's
    """

    get: Callable[[], Any]
    set: Callable[[Any], object]
    default: Any = None


_CPU = torch.device("cpu")
# A guard that is freed restores the earlier mode, so the guards are kept.
_inference_guards: list[Any] = []


def _default_device() -> torch.device:
    context = torch_state.device_context()
    return _CPU if context is None else context.device


def _set_default_device(device: torch.device) -> None:
    # Set None instead of "cpu", because "cpu" makes every later call of torch slower.
    torch.set_default_device(None if device.type == "cpu" else device)
    if device.type == "cpu":
        torch_state.forget_device_context()


def _set_inference_mode(mode: bool) -> None:
    guard = torch.inference_mode(mode)
    guard.__enter__()
    _inference_guards.append(guard)


def _anomaly_mode() -> tuple[bool, bool]:
    enabled = torch.is_anomaly_enabled()
    return enabled, torch.is_anomaly_check_nan_enabled() if enabled else True


def _numpy_state() -> Any:
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    state = numpy.random.get_state()
    if isinstance(state, dict):  # of another generator than numpy's own
        return pickle.dumps(state)
    name, key, *rest = state  # == raises for a tuple with arrays
    return name, key.tobytes(), *rest


def _set_numpy_state(state: Any) -> None:
    numpy = sys.modules["numpy"]
    if isinstance(state, bytes):
        numpy.random.set_state(pickle.loads(state))
    else:
        name, key, *rest = state
        numpy.random.set_state((name, numpy.frombuffer(key, dtype=numpy.uint32), *rest))


def _numpy_errors() -> Any:
    numpy = sys.modules.get("numpy")
    return None if numpy is None else numpy.geterr()


def _set_numpy_errors(errors: dict[str, str]) -> None:
    sys.modules["numpy"].seterr(**errors)


def _decimal_context() -> Any:
    decimal = sys.modules.get("decimal")
    if decimal is None:
        return None
    context = decimal.getcontext()
    numbers = context.prec, context.rounding, context.Emin, context.Emax
    return *numbers, context.capitals, context.clamp, dict(context.traps)


def _set_decimal_context(value: tuple[Any, ...]) -> None:
    context = sys.modules["decimal"].getcontext()
    *values, traps = value
    for name, each in zip(
        ("prec", "rounding", "Emin", "Emax", "capitals", "clamp"), values, strict=True
    ):
        setattr(context, name, each)
    context.traps.update(traps)


def _garbage_collector() -> Any:
    # Another thread may switch it off for a moment. To restore that would switch it off for good.
    return (gc.get_threshold(), True) if gc.isenabled() else None


def _set_garbage_collector(value: Any) -> None:
    gc.set_threshold(*value[0])
    gc.enable()


def _conversion() -> tuple[bool, bool]:
    future = torch.__future__
    return (
        future.get_overwrite_module_params_on_conversion(),
        future.get_swap_module_params_on_conversion(),
    )


def _set_conversion(value: tuple[bool, bool]) -> None:
    torch.__future__.set_overwrite_module_params_on_conversion(value[0])
    torch.__future__.set_swap_module_params_on_conversion(value[1])


def _sparse_checks() -> bool:
    return torch.sparse.check_sparse_tensor_invariants.is_enabled()


def _set_sparse_checks(enabled: bool) -> None:
    checks = torch.sparse.check_sparse_tensor_invariants
    checks.enable() if enabled else checks.disable()


# These are not in the settings, because a stochastic combination may advance a random state.
RANDOM_STATES = {
    "torch's random state": Setting(torch.get_rng_state, torch.set_rng_state),
    "the random state of `random`": Setting(random.getstate, random.setstate),
    "numpy's random state": Setting(_numpy_state, _set_numpy_state),
}
# The order is that of restoring: modes may change the results of all others, and the inference mode
# sets the grad mode.
THREAD_SETTINGS = {
    "torch's modes for functions": Setting(
        torch_state.function_modes, torch_state.set_function_modes
    ),
    "torch's modes for operations": Setting(
        torch_state.dispatch_modes, torch_state.set_dispatch_modes
    ),
    "the inference mode": Setting(torch.is_inference_mode_enabled, _set_inference_mode),
    "the grad mode": Setting(torch.is_grad_enabled, torch.set_grad_enabled),
    "autograd's switches": Setting(
        torch_state.autograd_switches, torch_state.set_autograd_switches
    ),
    "autograd's hooks for saved tensors": Setting(
        torch_state.saved_tensors_hooks, torch_state.set_saved_tensors_hooks
    ),
    "autocast": Setting(torch_state.autocast_state, torch_state.set_autocast_state),
    "torch's default device": Setting(_default_device, _set_default_device),
    "torch's number of threads": Setting(torch.get_num_threads, torch.set_num_threads),
    "torch's flushing of denormal numbers": Setting(
        floating_point.flushes_denormals, floating_point.set_flushes_denormals, (False, False)
    ),
    "the rounding of floating-point numbers": Setting(
        floating_point.rounding, floating_point.set_rounding
    ),
    "numpy's handling of errors": Setting(
        _numpy_errors,
        _set_numpy_errors,
        {"divide": "warn", "over": "warn", "under": "ignore", "invalid": "warn"},
    ),
    "the context of `decimal`": Setting(_decimal_context, _set_decimal_context),
}
PROCESS_SETTINGS = {
    "torch's default dtype": Setting(
        torch.get_default_dtype, torch.set_default_dtype, torch.float32
    ),
    "torch's float32 precision": Setting(
        torch_state.float32_precision,
        torch_state.set_float32_precision,
        torch_state.FLOAT32_PRECISION,
    ),
    "torch's deterministic mode": Setting(
        torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode, 0
    ),
    "autograd's anomaly mode": Setting(
        _anomaly_mode, lambda mode: torch.set_anomaly_enabled(*mode), (False, True)
    ),
    "hooks of all modules": Setting(torch_state.module_hooks, torch_state.set_module_hooks, {}),
    "torch's default generator": Setting(torch_state.generators, torch_state.set_generators),
    "torch's checks of sparse tensors": Setting(_sparse_checks, _set_sparse_checks),
    "torch's filling of uninitialized memory": Setting(
        torch_state.fills_memory, torch_state.set_fills_memory
    ),
    "torch's conversion of parameters": Setting(_conversion, _set_conversion),
    "torch's print options": Setting(torch_state.print_options, torch_state.set_print_options),
    "torch's number of interop threads": Setting(
        torch.get_num_interop_threads, torch.set_num_interop_threads
    ),
    "torch.backends.mha.fastpath": Setting(
        torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled
    ),
    "torch.backends.opt_einsum": Setting(
        torch_state.einsum_options, torch_state.set_einsum_options
    ),
    **{name: Setting(*functions) for name, functions in torch_state.backend_flags().items()},
    "the garbage collector": Setting(_garbage_collector, _set_garbage_collector),
    "the recursion limit": Setting(sys.getrecursionlimit, sys.setrecursionlimit),
    "the locale": Setting(
        lambda: locale.setlocale(locale.LC_ALL),
        lambda value: locale.setlocale(locale.LC_ALL, value),
    ),
}
SETTINGS = THREAD_SETTINGS | PROCESS_SETTINGS
