"""Every private interface of torch that mtenn-core uses, and what replaces it if it is missing.

Private means that torch does not promise to keep it: its name, or the name of a module on the way
to it, has a leading underscore. No other module touches one. ``tests/test_torch_internals.py``
checks this, and hides each interface in turn. ``StorageWeakRef`` is here because torch does not
document it.

A comment gives the use of each interface. "Without it" says what happens in a torch that lacks it:

- A slower public way gives the same results.
- A feature raises a :class:`TorchVersionError`, which says what to use.
- A setting of torch is not watched, so a plugin could change it unnoticed.

An import never fails. Every interface was seen in torch 2.6.0, 2.13.0 and 2.14.1, except that
torch 2.6.0 lacks those in ``NOT_IN_2_6``.
"""

from __future__ import annotations

import itertools
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import attrgetter, methodcaller
from typing import Any, NamedTuple, NoReturn

import torch
import torch.backends.opt_einsum  # torch 2.6 does not import it by itself
from torch import Tensor

from mtenn_core.errors import TorchVersionError

VERSIONS = "2.6 to 2.14"
NOT_IN_2_6 = frozenset(
    {
        "_C._autograd._top_saved_tensors_default_hooks",
        "_C._get_cublas_allow_fp16_accumulation",
        "_C._set_cublas_allow_fp16_accumulation",
        "_C._get_fp32_precision_getter",
        "_C._set_fp32_precision_setter",
        "compiler._is_exporting_flag",
    }
)

# The class of the nodes that add gradients to leaves. It has no public name, and it has the private
# attributes of all nodes.
with torch.inference_mode(False):
    _edge = torch.autograd.graph.get_gradient_edge(torch.empty((), requires_grad=True))
AccumulateGrad = type(_edge.node)
# Where a path starts, if not at torch. A module has its tables only as an instance.
_STARTS = {"Node": AccumulateGrad, "Module": torch.nn.Module()}

# The path of each interface, and whether this torch has it.
INTERFACES: dict[str, bool] = {}


class _Needed(NamedTuple):
    """Stands for an interface that nothing replaces: who needs it, and what to use instead."""

    by: str
    use: str = ""

    def error(self, path: str) -> Callable[..., NoReturn]:
        def fail(*_: object, **__: object) -> NoReturn:
            others = f"{self.use}, or " if self.use else ""
            raise TorchVersionError(
                f"{self.by} needs {path} of torch, a private interface that torch"
                f" {torch.__version__} does not have. Use {others}torch {VERSIONS}."
            )

        return fail


def _find(path: str, instead: Any = None) -> Any:
    """Return an interface of torch. If this torch lacks it, return what replaces it."""
    first, *names = path.split(".")
    found: Any = _STARTS[first] if first in _STARTS else getattr(torch, first, None)
    for name in names:
        found = getattr(found, name, None)
    INTERFACES[path] = found is not None
    if found is None:
        return instead.error(path) if isinstance(instead, _Needed) else instead
    return found


def _find_attribute(path: str, instead: Any) -> Any:
    """Return a function that reads a private attribute of an object, or what replaces it."""
    found = _find(path, instead)
    return attrgetter(path.rpartition(".")[2]) if INTERFACES[path] else found


def _find_all(prefix: str, names: str, *instead: Any) -> list[Any]:
    """Return interfaces that work only together. If one is missing, return all replacements."""
    paths = [prefix + name for name in names.split()]
    found = [_find(path) for path in paths]
    return found if all(INTERFACES[path] for path in paths) else list(instead)


def _nothing(*_: object) -> None:
    """Do nothing. This replaces functions that read or set a setting that is not watched."""


def _fails(read: Callable[[Tensor], object], tensor: Tensor) -> bool:
    """Return whether an attempt to read something of a tensor fails."""
    try:
        read(tensor)
    except RuntimeError:  # or its subclass NotImplementedError
        return True
    return False


# --- Backward passes ---

# Returns the number of the backward pass that runs on this thread, or -1 if none runs. Without it:
# a new number each time, so poses without weight run again, too.
current_backward = _find("_C._current_graph_task_id", partial(next, itertools.count()))

# Returns True if the running backward pass was called with retain_graph=True. Without it: always
# True, so each step fills fresh memory.
graph_is_retained = _find("_C._autograd._get_current_graph_task_keep_graph", lambda: True)

# The code of the function in Python that all calls of autograd's engine go through: backward(),
# grad() and others. Without it: None, so poses without weight run again.
ENGINE_CODE = getattr(_find("autograd.graph._engine_run_backward"), "__code__", None)


def _add_each(sums: Sequence[Tensor], tensors: Sequence[Tensor], *, alpha: float) -> None:
    for total, tensor in zip(sums, tensors, strict=True):
        total.add_(tensor, alpha=alpha)


# Adds alpha · tensor to each of several tensors, as optimizers do. Without it: one call for each.
add_in_place = _find("_foreach_add_", _add_each)

# --- Attributes of tensors, nodes and modules ---

# Makes a weak reference to the memory of a tensor; expired() is True once it is freed. Without it:
# an error, because memory that is freed and used again would count once.
weak_reference = _find("multiprocessing.reductions.StorageWeakRef", _Needed("model.estimate"))

# Returns how often a tensor was changed in place, or raises a RuntimeError for a tensor that was
# made in inference_mode. Without it: an error, because a change would go unnoticed.
version_of = _find_attribute(
    "Tensor._version", _Needed("the search for changes in place", "gradients='graph'")
)

# Returns the tensor of which a tensor is a view, or None. Without it: the tensor itself. Then the
# model copies each combined prediction, and a view of a parameter is compared by its numbers.
base_of = _find_attribute("Tensor._base", lambda tensor: tensor)

# Returns the hooks of a tensor as a dict, or None. The engine reads this dict in every backward.
# Without it: an error, because "stored" would run hooks twice.
hooks_of = _find_attribute(
    "Tensor._backward_hooks",
    _Needed("gradients='stored' (or check A4)", "gradients='recomputed' or 'graph'"),
)

# Returns a node's number. Nodes that one thread creates later have larger numbers. Without it: an
# error, because a pose that a loss needs could be skipped.
_numbered = _find(
    "Node._sequence_nr", _Needed("gradients='recomputed'", "gradients='stored' or 'graph'")
)
sequence_number = methodcaller("_sequence_nr") if INTERFACES["Node._sequence_nr"] else _numbered

# Describes the gradients that enter a node: the shapes and dtypes of its results. Without it:
# "stored" scales all gradients as it does those in float16, and check A1 has an error.
input_metadata = _find_attribute("Node._input_metadata", _Needed("check A1"))

# The tables of a module: its parameters, buffers and children by name. Without them: an error.
_TABLES = _Needed("mtenn-core")
parameters_of = _find_attribute("Module._parameters", _TABLES)
buffers_of = _find_attribute("Module._buffers", _TABLES)
children_of = _find_attribute("Module._modules", _TABLES)

# The attributes with the hooks of a module, and the start of attributes that Module.compile() and
# fully_shard add. Without them: a checkpoint of a combination with hooks, or of a compiled or
# sharded one, counts as a checkpoint of another combination.
HOOKS_OF_MODULE = frozenset(
    {"_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"}
)
ADDED_TO_MODULES = ("_compiled_call_impl", "_is_fsdp_", "_fsdp_", "__composable_api_state_key")

# The names of buffers that state_dict() leaves out. Without it: compare the two. Hooks of
# state_dict() may be slow.
non_persistent_of = _find_attribute(
    "Module._non_persistent_buffers_set",
    lambda module: dict(module.named_buffers(recurse=False)).keys() - module.state_dict().keys(),
)

# --- Transforms of torch.func, and forward-mode differentiation ---


class _OldStyle(torch.autograd.Function):
    """A function without setup_context, which transforms refuse."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor


def _any_transform() -> Any:
    """Return None outside of transforms, or else one of unknown kind, which counts as vmap."""
    inside = _fails(_OldStyle.apply, torch.zeros(()))
    vmap = types.SimpleNamespace(name="Vmap")
    return types.SimpleNamespace(key=lambda: vmap) if inside else None


# Returns an object for the innermost transform that runs this code, or None; key().name is its
# kind. Without it: _any_transform, so "recomputed" refuses all transforms.
current_transform = _find("_C._functorch.peek_interpreter_stack", _any_transform)

# Both return whether a tensor represents many tensors, so that its values cannot be read: in vmap,
# or in is_grads_batched, which makes "legacy" tensors. Without them: try to read a value.
is_batched_by_vmap, is_legacy_batched = _find_all(
    "_C._functorch.",
    "is_batchedtensor is_legacy_batchedtensor",
    partial(_fails, lambda tensor: tensor.detach().flatten()[:1].tolist()),
    lambda tensor: False,
)


def _has_no_memory(tensor: Tensor) -> bool:
    # A sparse tensor belongs to no transform, and has no memory of its own either.
    return tensor.layout == torch.strided and _fails(Tensor.untyped_storage, tensor)


# Returns whether a tensor belongs to a transform. Without it: whether it has no memory of its own.
is_wrapped = _find("_C._functorch.is_functorch_wrapped_tensor", _has_no_memory)

# A context outside of all transforms. Without it: an error, because a gate would see the transform.
outside_transforms = _find(
    "_functorch.pyfunctorch.temporarily_clear_interpreter_stack",
    _Needed("validation inside a transform of torch.func", "registry.create outside of it"),
)


def _dual_level() -> int:
    """Return 0 if a dual tensor can be made, which needs a level, or else -1."""
    return -int(
        _fails(lambda zero: torch.autograd.forward_ad.make_dual(zero, zero), torch.zeros(()))
    )


# Returns the level of torch.autograd.forward_ad, or -1 outside of it. Without it: _dual_level.
_find("autograd.forward_ad._current_level")
forward_ad_level = (
    partial(getattr, torch.autograd.forward_ad, "_current_level")
    if INTERFACES["autograd.forward_ad._current_level"]
    else _dual_level
)

# The functions that torch.func.vmap calls. vmap itself takes 30 µs more per call, for trees of
# arguments. Without them: torch.func.vmap.
_VMAP = _find_all(
    "_C._functorch.",
    "_vmap_increment_nesting _add_batch_dim _remove_batch_dim _vmap_decrement_nesting",
)


def over_rows(
    function: Callable[..., Tensor], rows: Tensor, named_rows: Mapping[str, Tensor]
) -> Any:
    """Call a function once for all rows, as ``torch.func.vmap`` does. Return its results.

    Parameters
    ----------
    function : ``function(row, **{name: row})``
    rows, named_rows : tensors with one entry per row
    """
    if not _VMAP:
        return torch.func.vmap(lambda row, named: function(row, **named))(rows, dict(named_rows))
    enter, add_dimension, remove_dimension, leave = _VMAP
    level = enter(len(rows), "error")
    try:
        row, *named = (add_dimension(each, 0, level) for each in (rows, *named_rows.values()))
        result = function(row, **dict(zip(named_rows, named, strict=True)))
        return remove_dimension(result, level, len(rows), 0)
    finally:
        leave()


# Function.apply calls this operator inside of a transform. Without it: vmap raises for a Function
# that has no rule for vmap, and the checks run poses one by one.
custom_function_call = _find("_functorch.autograd_function.custom_function_call")

# --- Modes for functions and operations, and hooks for saved tensors ---

# The number of modes of a kind in use, the mode at an index, and functions that remove the
# innermost mode and add one. Without one of them: such modes stay in use, and are not watched.
_NO_MODES = (lambda: 0, _nothing, _nothing, _nothing)
n_function_modes, function_mode_at, pop_function_mode, push_function_mode = _find_all(
    "_C.",
    "_len_torch_function_stack _get_function_stack_at"
    " _pop_torch_function_stack _push_on_torch_function_stack",
    *_NO_MODES,
)
n_dispatch_modes, dispatch_mode_at, pop_dispatch_mode, push_dispatch_mode = _find_all(
    "_C.",
    "_len_torch_dispatch_stack _get_dispatch_stack_at"
    " _pop_torch_dispatch_stack _push_on_torch_dispatch_stack",
    *_NO_MODES,
)

# The innermost pair of hooks, and functions that remove it and add one. Without one of them: such
# hooks stay in use, and are not watched.
top_saved_hooks, pop_saved_hooks, push_saved_hooks = _find_all(
    "_C._autograd.",
    "_top_saved_tensors_default_hooks _pop_saved_tensors_default_hooks"
    " _push_saved_tensors_default_hooks",
    *(_nothing, _nothing, _nothing),
)

# Its attribute device_context is the mode of the default device. Without it: that mode is treated
# as any other mode for functions.
default_device_mode = _find("_GLOBAL_DEVICE_CONTEXT", threading.local())

# The base class of modes that see every operation. Without it: an error.
_MODE = "utils._python_dispatch.TorchDispatchMode"
_needed = {"__init__": _Needed("mtenn check").error(_MODE)}
_DispatchMode: Any = _find(_MODE, type("_NoDispatchMode", (), _needed))


class DispatchMode(_DispatchMode):
    """A mode that sees every operation. It avoids the slow import of torch's compiler."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # The default, True, would import the compiler. A torch without this method has no default.
        return False


# The schema of an operation: which arguments it changes, and what it returns. Without it: an error.
schema_of = _find_attribute("ops.aten.add.Tensor._schema", _Needed("mtenn check"))

# --- Settings. A setting without its interface is not watched ---

# Whether derivatives in forward mode, and several threads in backward, are allowed.
forward_ad_enabled, enable_forward_ad, threads_enabled, enable_threads = _find_all(
    "_C.",
    "_is_fwd_grad_enabled _set_fwd_grad_enabled"
    " _is_multithreading_enabled _set_multithreading_enabled",
    *(_nothing, _nothing, _nothing, _nothing),
)

# The options of torch.set_printoptions, which cannot set all of them.
PRINT_OPTIONS = vars(_find("_tensor_str.PRINT_OPTS", types.SimpleNamespace()))

# The functions behind torch.backends.opt_einsum. Without them: its attributes, which are slow.
einsum_enabled, einsum_strategy, set_einsum_enabled, set_einsum_strategy = _find_all(
    "backends.opt_einsum.m.",
    "_get_enabled _get_strategy _set_enabled _set_strategy",
    partial(getattr, torch.backends.opt_einsum, "enabled"),
    partial(getattr, torch.backends.opt_einsum, "strategy"),
    partial(setattr, torch.backends.opt_einsum, "enabled"),
    partial(setattr, torch.backends.opt_einsum, "strategy"),
)

# Hooks that run for every module; FlopCounterMode has some. There are two kinds of backward hooks,
# of which only one can be in use: KIND_OF_MODULE_HOOKS says which.
MODULE_HOOKS: dict[str, dict[Any, Any]] = {
    name: hooks
    for name, hooks in vars(torch.nn.modules.module).items()
    if name.startswith("_global_") and isinstance(hooks, dict)
}
KIND_OF_MODULE_HOOKS = "_global_is_full_backward_hook"
for _name in ("_global_forward_hooks", "_global_backward_hooks"):
    _find(f"nn.modules.module.{_name}")

# Read and set the precision of float32 on each backend. Without them: only
# torch.get_float32_matmul_precision.
get_precision, set_precision = _find_all(
    "_C.", "_get_fp32_precision_getter _set_fp32_precision_setter", None, None
)

# Flags in torch.compiler. Its functions is_compiling and is_exporting return them. Without one:
# code that has imported such a function by its name is told that nothing is compiled.
COMPILING_FLAG, EXPORTING_FLAG = "_is_compiling_flag", "_is_exporting_flag"
for _name in (COMPILING_FLAG, EXPORTING_FLAG):
    _find(f"compiler.{_name}")

# Switches: the name in torch.backends, whose attributes are slower and not all in torch 2.6, and a
# part of the names of the functions that read and set it.
_FP16, _BF16 = (f"allow_{_name}_reduced_precision_reduction" for _name in ("fp16", "bf16"))
_SWITCHES = {
    "cudnn.enabled": "cudnn_enabled",
    "cudnn.benchmark": "cudnn_benchmark",
    "cudnn.deterministic": "cudnn_deterministic",
    "cudnn.allow_tf32": "cudnn_allow_tf32",
    "mkldnn.enabled": "mkldnn_enabled",
    "mkldnn.deterministic": "mkldnn_deterministic",
    "nnpack": "nnpack_enabled",
    "quantized.engine": "qengine",
    f"cpu.{_FP16}": f"cpu_{_FP16}",
    f"cuda.matmul.{_FP16}": f"cublas_{_FP16}",
    f"cuda.matmul.{_BF16}": f"cublas_{_BF16}",
    "cuda.matmul.allow_fp16_accumulation": "cublas_allow_fp16_accumulation",
    "cuda.preferred_linalg_library": "linalg_preferred_backend",
    "cuda.allow_fp16_bf16_reduction_math_sdp": "math_sdp_allow_fp16_bf16_reduction",
}
_PAIRS = {name: (f"_get_{part}", f"_set_{part}") for name, part in _SWITCHES.items()} | {
    f"cuda.enable_{kind}_sdp": (f"_get_{kind}_sdp_enabled", f"_set_sdp_use_{kind}")
    for kind in ("flash", "mem_efficient", "math", "cudnn")
}
if get_precision is not None:  # the precision of float32 includes it
    del _PAIRS["cudnn.allow_tf32"]
BACKEND_SWITCHES: dict[str, tuple[Callable[[], Any], Callable[..., None]]] = {
    f"torch.backends.{_name}": (_read, _set)
    for _name, _pair in _PAIRS.items()
    for _read, _set in [_find_all("_C.", " ".join(_pair), None, None)]
    if _read is not None
}
