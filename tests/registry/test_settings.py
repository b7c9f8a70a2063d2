"""Settings that change the numbers of everybody: who changes one is named, and it is restored."""

from __future__ import annotations

import gc
import platform
import sys
import warnings
from textwrap import dedent

import numpy
import pytest
import torch
from installed import GOOD, write_distribution

from mtenn_core import Combination, MultiPoseModel, Registry
from mtenn_core._process import settings
from mtenn_core._process.setting_table import SETTINGS, Setting
from mtenn_core._process.settings import (
    changed,
    preserved_process_state,
    process_state,
    restoring_process_state,
)
from mtenn_core._torch_internals import INTERFACES, DispatchMode
from mtenn_core.errors import GradientValidationError, PluginWarning
from mtenn_core.testing import check_combination

UPWARD = {"x86_64": 0x800, "aarch64": 0x400000}.get(platform.machine())
SET_ROUNDING = f"import ctypes; ctypes.CDLL(None).fesetround({UPWARD})"
PASSES = "from torch.overrides import BaseTorchFunctionMode as Mode"
HOOKS = "torch.nn.modules.module.register_module"

# For each setting, lines that change it.
CHANGES = {
    "torch's modes for functions": (f"{PASSES}; Mode().__enter__()",),
    "torch's modes for operations": ("Passes().__enter__()",),
    "the inference mode": ("KEPT.append(torch.inference_mode()); KEPT[-1].__enter__()",),
    "the grad mode": ("torch.set_grad_enabled(not torch.is_grad_enabled())",),
    "autograd's switches": (
        "torch.autograd.set_multithreading_enabled(False)",
        "torch._C._set_fwd_grad_enabled(False)",
    ),
    "autograd's hooks for saved tensors": (
        "torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x).__enter__()",
    ),
    "autocast": (
        "torch.autocast('cpu', torch.bfloat16).__enter__()",
        "torch.set_autocast_enabled('cuda', True)",
        "torch.set_autocast_dtype('cpu', torch.float16)",
        "torch.set_autocast_cache_enabled(False)",
        "torch.autocast_increment_nesting()",
    ),
    "torch's default device": ("torch.set_default_device('meta')",),
    "torch's flushing of denormal numbers": ("torch.set_flush_denormal(True)",),
    "numpy's handling of errors": ("import numpy; numpy.seterr(over='raise')",),
    "the context of `decimal`": ("import decimal; decimal.getcontext().prec = 7",),
    "torch's float32 precision": (
        "torch.set_float32_matmul_precision('medium')",
        "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
        "torch.backends.fp32_precision = 'tf32'",
    ),
    "hooks of all modules": (
        f"{HOOKS}_forward_hook(lambda *args: None)",
        f"{HOOKS}_forward_pre_hook(lambda *args: None)",
        f"{HOOKS}_full_backward_hook(lambda *args: None)",
        f"{HOOKS}_parameter_registration_hook(lambda *args: None)",
    ),
    "torch's default generator": ("torch.default_generator = torch.Generator()",),
    "torch's checks of sparse tensors": ("torch.sparse.check_sparse_tensor_invariants.enable()",),
    "torch's filling of uninitialized memory": (
        "torch.utils.deterministic.fill_uninitialized_memory = False",
    ),
    "torch's conversion of parameters": (
        "torch.__future__.set_swap_module_params_on_conversion(True)",
    ),
    "torch's print options": ("torch.set_printoptions(precision=2)",),
    "torch.backends.mha.fastpath": ("torch.backends.mha.set_fastpath_enabled(False)",),
    "torch.backends.mkldnn.enabled": ("torch._C._set_mkldnn_enabled(False)",),
    "torch.backends.mkldnn.deterministic": ("torch.backends.mkldnn.deterministic = True",),
    "torch.backends.cudnn.enabled": ("torch.backends.cudnn.enabled = False",),
    "torch.backends.cudnn.benchmark": ("torch.backends.cudnn.benchmark = True",),
    "torch.backends.cudnn.deterministic": ("torch.backends.cudnn.deterministic = True",),
    "torch.backends.nnpack": ("torch.backends.nnpack.set_flags(False)",),
    "torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction": (
        "torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False",
    ),
    "torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction": (
        "torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False",
    ),
    "torch.backends.cuda.matmul.allow_fp16_accumulation": (
        "torch.backends.cuda.matmul.allow_fp16_accumulation = True",
    ),
    "torch.backends.cuda.enable_flash_sdp": ("torch.backends.cuda.enable_flash_sdp(False)",),
    "torch.backends.cuda.enable_mem_efficient_sdp": (
        "torch.backends.cuda.enable_mem_efficient_sdp(False)",
    ),
    "torch.backends.cuda.enable_math_sdp": ("torch.backends.cuda.enable_math_sdp(False)",),
    "torch.backends.cuda.enable_cudnn_sdp": ("torch.backends.cuda.enable_cudnn_sdp(False)",),
    "torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp": (
        "torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)",
    ),
    "the garbage collector": ("import gc; gc.disable()", "import gc; gc.set_threshold(10**6)"),
    "the recursion limit": ("import sys; sys.setrecursionlimit(sys.getrecursionlimit() + 1)",),
}
if UPWARD is not None:
    CHANGES["the rounding of floating-point numbers"] = (SET_ROUNDING,)
# Another version of torch may lack what these name.
MISSING = {
    "saved_tensors_hooks(": not INTERFACES["_C._autograd._top_saved_tensors_default_hooks"],
    ".fp32_precision": not INTERFACES["_C._get_fp32_precision_getter"],
}
CASES = {
    f"{name}: {line}": (name, line)
    for name, lines in CHANGES.items()
    for line in lines
    if name in SETTINGS and not any(text in line for text, lacks in MISSING.items() if lacks)
}
EACH = pytest.mark.parametrize(("name", "line"), CASES.values(), ids=CASES)
KEPT: list[object] = []


@pytest.fixture(autouse=True)
def restored():
    with preserved_process_state():
        yield
    KEPT.clear()


class Passes(DispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def run(line: str) -> None:
    exec(line, {"torch": torch, "KEPT": KEPT, "Passes": Passes})


def install(places, code: str) -> None:
    write_distribution(places.site, "demo-bad", {"bad": "demo_bad:Good"}, f"{code}\n{dedent(GOOD)}")


@EACH
def test_an_import_that_changes_a_setting_is_named_and_undone(places, name, line):
    install(places, f"import torch\nfrom {__name__} import KEPT, Passes\n{line}")
    before = process_state()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", PluginWarning)
        Registry().get("bad", validate=False)
    assert not changed(before, process_state())
    (message,) = [str(w.message) for w in warned if issubclass(w.category, PluginWarning)]
    assert "demo-bad 1.0) changed " in message
    assert name in message
    assert " while it was imported. The old values were restored. Tell its author" in message


@EACH
def test_a_call_that_changes_a_setting_fails_a4_and_is_undone(name, line):
    class Leaves(Combination):
        def combine(self, predictions):
            value = predictions.mean()
            run(line)
            return value

    before = process_state()
    (record,) = check_combination(Leaves, level="gate", only=["A4"]).failures
    assert record.status == "fail"
    assert name in record.reason
    assert "use a context manager" in record.cause
    assert not changed(before, process_state())


@EACH
def test_the_users_own_setting_stays_as_it_is(places, name, line):
    defaults = process_state()
    run(line)
    before = process_state()
    assert name in changed(defaults, before)
    registry = Registry()
    registry.create("healthy")
    registry.get("healthy")
    assert not changed(before, process_state())


CONTEXTS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no autocast": lambda: torch.autocast("cpu", enabled=False),
    "saved tensors": lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
    "device": lambda: torch.device("cpu"),
    "errstate": lambda: numpy.errstate(all="raise"),
    "mkldnn": lambda: torch.backends.mkldnn.flags(enabled=False),
    "sdpa": lambda: torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    "one thread": lambda: torch.autograd.set_multithreading_enabled(False),
    "anomaly": torch.autograd.detect_anomaly,
}


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
def test_a_context_manager_in_combine_passes(context):
    class Within(Combination):
        def combine(self, predictions):
            with context():
                return predictions.mean()

    report = check_combination(Within, level="gate")
    assert report.passed, str(report)


def test_the_registry_refuses_a_combination_that_changes_a_setting():
    class Flushes(Combination):
        def combine(self, predictions):
            torch.set_flush_denormal(True)
            return predictions.mean()

    registry = Registry()
    with (
        registry.temporary({"flushes": Flushes}),
        pytest.raises(GradientValidationError, match="torch's flushing of denormal numbers"),
    ):
        registry.create("flushes")
    assert sys.float_info.min / 2 > 0


def test_a_setting_that_cannot_be_restored_is_reported(places, monkeypatch):
    write_distribution(places.site, "demo-bad", {"bad": "demo_bad:Good"})
    values = iter("ab")

    def refuse(value):
        raise RuntimeError("it can be set only once")

    once = Setting(lambda: next(values, "b"), refuse)
    monkeypatch.setitem(settings.PROCESS_SETTINGS, "what is set once", once)
    with pytest.warns(
        PluginWarning, match=r"demo-bad 1\.0\) changed what is set once .* could not be undone"
    ):
        Registry().get("bad", validate=False)


def test_a_library_that_is_imported_meanwhile_is_no_change(monkeypatch):
    with monkeypatch.context() as context, restoring_process_state() as changes:
        context.delitem(sys.modules, "numpy")
        before = process_state()
        context.undo()
        assert not changed(before, process_state())
    assert not changes.settings


def test_a_collector_that_another_thread_has_paused_is_not_switched_off_for_good():
    gc.disable()
    with restoring_process_state() as changes:
        gc.enable()
    assert gc.isenabled()
    assert not changes.settings


def test_mixed_settings_of_float32_do_not_stop_a_check():
    """torch then raises an error for a question about the precision of all backends."""
    if not hasattr(torch.backends.mkldnn, "matmul"):
        pytest.skip("torch before 2.9")
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
        torch.get_float32_matmul_precision()
    registry = Registry()
    with registry.temporary({"mean": Mean}):
        registry.create("mean")
    assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    MultiPoseModel(torch.nn.Linear(2, 1), Mean()).state_dict()


class Mean(Combination):
    def combine(self, predictions):
        return predictions.mean()
