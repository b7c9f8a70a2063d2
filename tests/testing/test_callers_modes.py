"""The gate and the suite judge a combination, whatever modes of torch the caller uses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from mtenn_core import Combination, MultiPoseModel, Registry
from mtenn_core._process.settings import default_settings, restoring_process_state
from mtenn_core._process.torch_modes import uses_modes, without_modes
from mtenn_core._torch_internals import INTERFACES
from mtenn_core.errors import CheckpointError, GradientValidationError
from mtenn_core.testing import check_combination


class Temperature(Combination):
    """A Boltzmann mean with a parameter, a buffer, a plain tensor, and tensors made in a call."""

    examples = ({}, {"kT": 0.5})

    def __init__(self, kT=0.593):
        super().__init__()
        self.log_kT = torch.nn.Parameter(torch.tensor(math.log(kT)))
        self.register_buffer("sign", torch.tensor(-1.0))
        self.plain = torch.tensor(1.0)

    def combine(self, predictions):
        centred = predictions - predictions.amin().detach()
        weights = torch.softmax(self.sign * self.plain * centred / self.log_kT.exp(), dim=0)
        return predictions.amin().detach() + (weights * centred).sum() * torch.ones(())


class WrongTemperature(Temperature):
    """Its pose weights are those of a mean."""

    def pose_weights(self, predictions):
        return torch.full_like(predictions, 1 / len(predictions))


class Doubles(TorchFunctionMode):
    """A mode that changes results."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return 2 * result if func is torch.softmax else result


@contextmanager
def restored(set_, value, before) -> Iterator[None]:
    set_(value)
    try:
        yield
    finally:
        set_(before)


@contextmanager
def hook_of_all_modules() -> Iterator[None]:
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *args: 2 * args[-1])
    try:
        yield
    finally:
        handle.remove()


def default_dtype(dtype: torch.dtype) -> AbstractContextManager[object]:
    return restored(torch.set_default_dtype, dtype, torch.float32)


MODES = {
    "torch.device": lambda: torch.device("meta"),
    "default device": lambda: restored(torch.set_default_device, "meta", None),
    "fake tensors": FakeTensorMode,
    "flop counter": lambda: FlopCounterMode(display=False),
    "function mode": Doubles,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "deterministic": lambda: restored(torch.use_deterministic_algorithms, True, False),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "saved tensors": lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: 0 * x, lambda x: x),
    "hook of all modules": hook_of_all_modules,
}
if not INTERFACES["_C._autograd._top_saved_tensors_default_hooks"]:  # torch 2.6 cannot read them
    del MODES["saved tensors"]
UNDER = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


def verdict(combination: type[Combination]) -> str:
    """Return the report of the gate, without the times."""
    return str(check_combination(combination, level="gate"))


@UNDER
def test_a_check_has_the_same_result_in_every_mode(mode):
    reports = [verdict(Temperature), verdict(WrongTemperature)]
    with mode():
        assert [verdict(Temperature), verdict(WrongTemperature)] == reports


@UNDER
def test_the_registry_gives_the_same_verdict_in_every_mode(mode):
    registry = Registry()
    with registry.temporary({"right": Temperature, "wrong": WrongTemperature}):
        with pytest.raises(GradientValidationError) as without:
            registry.get("wrong")
        with mode():
            registry.create("right", kT=0.4)
            assert registry.get("right") is Temperature
            with pytest.raises(GradientValidationError) as under:
                registry.get("wrong")
        assert str(under.value) == str(without.value)
        assert registry.get("right") is Temperature


@UNDER
def test_a_mode_is_as_before_after_a_block_without_modes(mode):
    with mode():
        before = uses_modes(), torch.ones(1).device, torch.softmax(torch.ones(1), 0).dtype
        with without_modes():
            assert not uses_modes()
            assert torch.ones(1).device.type == "cpu"
            assert torch.ones(1).add(1).item() == 2
        after = uses_modes(), torch.ones(1).device, torch.softmax(torch.ones(1), 0).dtype
    assert before == after
    assert before[0]
    assert not uses_modes()


CREATED = {
    "torch.device": (MODES["torch.device"], "meta", torch.float32),
    "default device": (MODES["default device"], "meta", torch.float32),
    "float64": (MODES["float64"], "cpu", torch.float64),
    "no mode": (nullcontext, "cpu", torch.float32),
}


@pytest.mark.parametrize(("mode", "device", "dtype"), CREATED.values(), ids=CREATED)
def test_an_instance_is_created_as_the_caller_asks(mode, device, dtype):
    registry = Registry()
    with registry.temporary({"right": Temperature}), mode():
        combination = registry.create("right")
        assert combination.log_kT.device.type == combination.plain.device.type == device
        assert combination.log_kT.dtype == dtype


def test_a_fake_instance_is_created_in_a_fake_mode():
    registry = Registry()
    with registry.temporary({"right": Temperature}), FakeTensorMode() as mode:
        assert registry.create("right").plain.fake_mode is mode


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad], ids=["vmap", "grad"])
def test_a_combination_may_be_created_in_a_transform(transform):
    registry = Registry()

    def mean(x, create):
        combination = create("right", kT=0.4)
        return combination.combine(torch.stack([x, 2 * x, -x]))

    with registry.temporary({"right": Temperature}):
        x = torch.tensor([0.3, 0.7]) if transform is torch.func.vmap else torch.tensor(0.3)
        found = transform(lambda x: mean(x, registry.create))(x)
        expected = transform(lambda x: mean(x, lambda name, kT: Temperature(kT)))(x)
    assert torch.equal(found, expected)


class TakesTensor(Combination):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def combine(self, predictions):
        return (self.scale.to(predictions.dtype) * predictions).mean()


def test_an_argument_without_numbers_is_not_the_fault_of_the_combination():
    registry = Registry()
    with registry.temporary({"scaled": TakesTensor}):
        registry.create("scaled", torch.tensor(3.0))
        with torch.device("meta"):
            registry.create("scaled", torch.tensor(3.0, device="cpu"))
            with pytest.raises(GradientValidationError, match="needs numbers; found none in scale"):
                registry.create("scaled", torch.tensor(3.0))


def test_an_instance_on_meta_is_checked_with_numbers():
    with torch.device("meta"):
        combination, wrong = Temperature(), WrongTemperature()
    assert check_combination(combination, level="gate").passed
    (record,) = check_combination(wrong, level="gate").failures
    assert record.id == "C1"


def test_an_import_under_modes_leaves_ordinary_constants(tmp_path, monkeypatch):
    (tmp_path / "constant_on_import.py").write_text(
        "import torch\nfrom mtenn_core import Combination\nONE = torch.ones(())\n"
        "class Mean(Combination):\n    def combine(self, y):\n        return ONE * y.mean()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    from mtenn_core._registry.load import load
    from mtenn_core._registry.policy import Policy
    from mtenn_core._registry.record import PluginRecord

    with torch.device("meta"):
        load(PluginRecord("mean", "constant_on_import:Mean"), Policy())
    import constant_on_import

    assert constant_on_import.ONE.device.type == "cpu"


class Fixed(Temperature):
    """Its argument is not only the start value of a parameter."""

    def __init__(self, kT=0.593):
        super().__init__(kT)
        self.kT = kT


@UNDER
def test_a_checkpoint_is_compared_in_every_mode(mode):
    right, wrong = (MultiPoseModel(torch.nn.Linear(2, 1), Fixed(kT)) for kT in (0.4, 0.6))
    state = right.state_dict()
    with mode():
        right.set_extra_state(state["_extra_state"])
        right.set_extra_state(right.get_extra_state())
        with pytest.raises(CheckpointError, match="other arguments: "):
            wrong.set_extra_state(state["_extra_state"])


def test_a_checkpoint_without_numbers_is_not_compared():
    model = MultiPoseModel(torch.nn.Linear(2, 1), Temperature())
    model.set_extra_state(model.get_extra_state().to("meta"))


@pytest.mark.parametrize("import_ends_first", [True, False])
def test_an_import_at_the_same_time_is_not_blamed_for_the_defaults_of_a_check(import_ends_first):
    """The blocks overlap, as in two threads."""
    with default_dtype(torch.bfloat16):
        check, imported = ExitStack(), ExitStack()
        check.enter_context(default_settings())
        changes = imported.enter_context(restoring_process_state())
        for block in (imported, check) if import_ends_first else (check, imported):
            block.close()
        assert changes.settings == []
        assert torch.get_default_dtype() == torch.bfloat16


def test_an_import_during_a_check_may_not_change_the_default_dtype():
    with default_dtype(torch.bfloat16):
        with default_settings():
            with restoring_process_state() as changes:
                torch.set_default_dtype(torch.float64)
            assert torch.get_default_dtype() == torch.float32
        assert changes.settings == ["torch's default dtype"]
        assert torch.get_default_dtype() == torch.bfloat16
