"""A combination is made again from a checkpoint, without the pose model."""

import math
import sys
import zlib
from collections import OrderedDict
from decimal import Decimal

import numpy as np
import pytest
import safetensors.torch
import torch
from installed import write_distribution
from torch import Tensor

from mtenn_core import Combination, MultiPoseModel, registry
from mtenn_core.errors import (
    CheckpointError,
    CombinationNotFoundError,
    GradientValidationError,
    PluginWarning,
)

PLUGIN = """
    import torch
    from mtenn_core import Combination

    class Shifted(Combination):
        examples = ({"shift": 0.0},)

        def __init__(self, shift, *, activation=torch.tanh, more=()):
            super().__init__()
            self.shift, self.activation, self.more = shift, activation, more
            self.scale = torch.nn.Parameter(torch.ones(1))
            self.register_buffer("count", torch.zeros(()))

        def combine(self, predictions):
            return self.scale[0] * predictions.mean()

    class Other(Shifted):
        pass
"""


class Scripted(Combination):
    """A class that no plugin has."""

    def __init__(self, first=1, /, *rest, factor=1.0, **more):
        super().__init__()
        self.values = first, rest, factor, more

    def combine(self, predictions: Tensor) -> Tensor:
        return predictions.mean()


class WrongGradient(Combination):
    def combine(self, predictions: Tensor) -> Tensor:
        return predictions.mean()

    def pose_weights(self, predictions: Tensor) -> Tensor:
        return torch.ones_like(predictions)


@pytest.fixture
def shifted(places):
    """Make a plugin's combination with these arguments, and learned values."""
    names = {"shifted": "demo_shifts:Shifted"}
    write_distribution(places.site, "demo-shifts", names, PLUGIN)
    registry.refresh()

    def make(*args, **kwargs):
        combination = registry.create("shifted", *args, **kwargs)
        with torch.no_grad():
            combination.scale.fill_(3.0)
            combination.count.fill_(7.0)
        return combination

    yield make
    registry.refresh()


def state_of(combination, tasks=None):
    return MultiPoseModel(torch.nn.Linear(2, tasks or 1), combination, tasks=tasks).state_dict()


def with_identity(state, change):
    """Return a state dict with another text in its identity."""
    text, _ = bytes(state["_extra_state"].tolist()).decode().rstrip().split("\n")
    assert change(text) != text
    checked = f"{change(text)}\n{zlib.crc32(change(text).encode()):08x}"
    return state | {"_extra_state": torch.tensor(list(checked.encode()), dtype=torch.int32)}


def assert_comes_back(combination, shift):
    assert type(combination).__name__ == "Shifted"
    assert combination.shift == shift
    assert (combination.scale.item(), combination.count.item()) == (3.0, 7.0)
    assert combination.scale.requires_grad


SAVED = {
    "state dict": lambda state: state,
    "Lightning": lambda state: {
        "epoch": 3,
        "state_dict": {f"model.{key}": value for key, value in state.items()},
    },
    "training loop": lambda state: {"model": state, "optimizer": {"state": {0: {"step": 1}}}},
    "compiled": lambda state: OrderedDict((f"_orig_mod.{k}", v) for k, v in state.items()),
}


@pytest.mark.parametrize("saved", SAVED.values(), ids=SAVED)
def test_a_combination_comes_back_from_a_file_of_torch(shifted, tmp_path, saved):
    torch.save(saved(state_of(shifted(0.25))), tmp_path / "model.pt")
    assert_comes_back(registry.from_checkpoint(tmp_path / "model.pt"), 0.25)
    assert_comes_back(registry.from_checkpoint(str(tmp_path / "model.pt")), 0.25)
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    assert_comes_back(registry.from_checkpoint(content), 0.25)


def test_a_combination_comes_back_from_an_old_file_of_torch(shifted, tmp_path):
    torch.save(state_of(shifted(0.25)), tmp_path / "model.pt", _use_new_zipfile_serialization=False)
    assert_comes_back(registry.from_checkpoint(tmp_path / "model.pt"), 0.25)


def test_a_combination_comes_back_from_safetensors(shifted, tmp_path):
    model = MultiPoseModel(torch.nn.Linear(2, 1), shifted(0.25))
    safetensors.torch.save_file(model.state_dict(), tmp_path / "one.safetensors")
    safetensors.torch.save_model(model, tmp_path / "two")  # the content tells, not the name
    for name in ("one.safetensors", "two"):
        combination = registry.from_checkpoint(tmp_path / name)
        assert_comes_back(combination, 0.25)
        again = MultiPoseModel(torch.nn.Linear(2, 1), combination)
        safetensors.torch.load_model(again, tmp_path / name)
        assert torch.equal(again.pose_model.weight, model.pose_model.weight)


def test_safetensors_that_are_not_installed_are_named(shifted, tmp_path, monkeypatch):
    safetensors.torch.save_file(state_of(shifted(0.25)), tmp_path / "model.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(CheckpointError, match="pip install safetensors"):
        registry.from_checkpoint(tmp_path / "model.safetensors")


def test_a_model_with_the_combination_loads_the_checkpoint(shifted, tmp_path):
    model = MultiPoseModel(torch.nn.Linear(2, 1), shifted((1, "a")))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    again = MultiPoseModel(torch.nn.Linear(2, 1), registry.from_checkpoint(tmp_path / "model.pt"))
    again.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    poses = torch.randn(5, 2)
    assert torch.equal(again(poses).prediction, model(poses).prediction)


@pytest.mark.parametrize(
    "shift",
    [math.inf, (1, [2, (3,)]), {1: 0.5, "a": (None,)}, "nan", np.float32(0.1), "x" * 1000],
    ids=["inf", "tuple", "dict", "text", "numpy", "long text"],
)
def test_an_argument_comes_back_with_its_type(shifted, shift):
    found = registry.from_checkpoint(state_of(shifted(shift))).shift
    assert found == shift
    assert type(found) is type(shift)


def test_an_argument_that_is_nan_comes_back(shifted):
    assert math.isnan(registry.from_checkpoint(state_of(shifted(math.nan))).shift)


def test_an_argument_that_is_a_small_tensor_comes_back(shifted):
    shift = torch.tensor([[0.1, 0.2]], dtype=torch.float64)
    found = registry.from_checkpoint(state_of(shifted(shift))).shift
    torch.testing.assert_close(found, shift, rtol=0, atol=0)


def test_a_parameter_that_was_an_argument_comes_back_with_what_it_learned():
    class Start(Combination):
        def __init__(self, start):
            super().__init__()
            self.start = torch.nn.Parameter(start)

        def combine(self, predictions: Tensor) -> Tensor:
            return predictions.mean() + self.start.sum()

    start = Start(torch.zeros(100))  # too many numbers for a description
    with torch.no_grad():
        start.start.fill_(2.0)
    found = registry.from_checkpoint(state_of(start), classes=[Start])
    assert torch.equal(found.start, torch.full((100,), 2.0))


def test_values_in_double_precision_keep_their_digits(shifted):
    combination = shifted(0.25).double()
    with torch.no_grad():
        combination.scale.fill_(1 / 3)
    found = registry.from_checkpoint(state_of(combination))
    assert found.scale.dtype == torch.float64
    assert found.scale.item() == 1 / 3


def test_what_comes_back_shares_no_memory_with_the_checkpoint(shifted):
    state = state_of(shifted(0.25))
    found = registry.from_checkpoint(state)
    with torch.no_grad():
        found.scale.fill_(0.0)
    assert state["combination.scale"].item() == 3.0


@pytest.mark.parametrize(
    "mode",
    [lambda: torch.device("meta"), torch.inference_mode, torch.no_grad],
    ids=["meta", "inference", "no grad"],
)
def test_the_modes_of_the_caller_do_not_matter(shifted, tmp_path, mode):
    torch.save(state_of(shifted(0.25)), tmp_path / "model.pt")
    with mode():
        found = registry.from_checkpoint(tmp_path / "model.pt")
    assert_comes_back(found, 0.25)
    found.combine(torch.ones(2)).backward()
    assert found.scale.grad == 1.0


def test_another_object_is_no_checkpoint():
    with pytest.raises(TypeError, match=r"must be a path, a state dict, .*found a Linear"):
        registry.from_checkpoint(torch.nn.Linear(1, 1))


def test_a_combination_for_each_task_comes_back_as_a_list(shifted):
    state = state_of([shifted(0.25), shifted(0.5)], tasks=2)
    first, second = registry.from_checkpoint(state)
    assert_comes_back(first, 0.25)
    assert_comes_back(second, 0.5)
    model = MultiPoseModel(torch.nn.Linear(2, 2), [first, second], tasks=2)
    model.load_state_dict(state)
    (only,) = registry.from_checkpoint(state_of([shifted(0.75)], tasks=1))
    assert_comes_back(only, 0.75)
    assert_comes_back(registry.from_checkpoint(state_of(shifted(0.75), tasks=2)), 0.75)


def test_an_averaged_checkpoint_comes_back(shifted):
    states = [state_of(shifted(0.25)) for _ in range(3)]
    average = {key: sum(state[key] for state in states) / 3 for key in states[0]}
    assert_comes_back(registry.from_checkpoint(average), 0.25)


def test_one_of_several_models_comes_back_by_its_path(shifted):
    checkpoint = {"model": state_of(shifted(0.25)), "ema": state_of(shifted(0.5))}
    with pytest.raises(CheckpointError, match=r"several multi-pose models: 'model', 'ema'.*model="):
        registry.from_checkpoint(checkpoint)
    assert_comes_back(registry.from_checkpoint(checkpoint, model="ema"), 0.5)
    with pytest.raises(CheckpointError, match=r"has no model 'mean'; found 'model', 'ema'"):
        registry.from_checkpoint(checkpoint, model="mean")


def test_the_extra_state_of_another_module_is_skipped(shifted):
    state = {f"net.{key}": value for key, value in state_of(shifted(0.25)).items()}
    state |= {"metric._extra_state": {"n": 1}, "other._extra_state": torch.zeros(3)}
    assert_comes_back(registry.from_checkpoint(state), 0.25)


def test_a_missing_plugin_is_named_with_the_command_that_installs_it(shifted, places):
    state = state_of(shifted(0.25))
    (places.site / "demo_shifts-1.0.dist-info" / "entry_points.txt").write_text("")
    registry.refresh()
    message = r"'shifted' \(demo-shifts 1.0\) .* is not installed. .*pip install demo-shifts==1.0"
    with pytest.raises(CombinationNotFoundError, match=message):
        registry.from_checkpoint(state)


def test_another_distribution_with_the_name_is_not_used(shifted, places):
    state = state_of(shifted(0.25))
    (places.site / "demo_shifts-1.0.dist-info" / "entry_points.txt").write_text("")
    write_distribution(places.site, "demo-more", {"shifted": "demo_more:Good"})
    registry.refresh()
    with pytest.raises(CombinationNotFoundError, match=r"Another distribution offers 'shifted'"):
        registry.from_checkpoint(state)


def test_another_version_of_the_plugin_is_a_warning(shifted):
    state = with_identity(state_of(shifted(0.25)), lambda text: text.replace('"1.0"', '"0.9"'))
    with pytest.warns(PluginWarning, match=r"\(demo-shifts 0.9\) .*and version 1.0 is installed"):
        found = registry.from_checkpoint(state)
    assert_comes_back(found, 0.25)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            '"shift"',
            '"shift_of"',
            r"cannot be made with these arguments.*Make the combination",
        ),
        ("demo_shifts:Shifted", "demo_shifts:Old", r"has another class: demo_shifts:Shifted"),
        ('"shift": 0.25', '"shift": {"!eval": 1}', r"argument 'shift' cannot be read"),
    ],
    ids=["arguments", "class", "data"],
)
def test_an_identity_that_does_not_fit_the_plugin_is_an_error(shifted, before, after, message):
    state = with_identity(state_of(shifted(0.25)), lambda text: text.replace(before, after))
    with pytest.raises(CheckpointError, match=message):
        registry.from_checkpoint(state)


def test_parameters_that_do_not_fit_are_an_error(shifted):
    state = state_of(shifted(0.25))
    del state["combination.scale"]
    with pytest.raises(CheckpointError, match=r"do not fit this combination.*scale"):
        registry.from_checkpoint(state)


@pytest.mark.parametrize(
    "value",
    [lambda y: y, torch.sin, torch.nn.Linear(1, 1), [1, Decimal("0.1")], torch.zeros(10_000)],
    ids=["lambda", "function", "module", "in a list", "large tensor"],
)
def test_an_argument_that_no_checkpoint_can_hold_is_named(shifted, value):
    state = state_of(shifted(0.25, activation=value))
    message = r"cannot hold the value of its argument 'activation'.*Make the combination yourself"
    with pytest.raises(CheckpointError, match=message):
        registry.from_checkpoint(state)


def test_a_default_that_no_checkpoint_can_hold_comes_back(shifted):
    found = registry.from_checkpoint(state_of(shifted(0.25, more=(1,))))
    assert found.activation is torch.tanh
    assert found.more == (1,)


def test_a_class_that_is_no_plugin_comes_back_if_it_is_passed():
    state = state_of(Scripted(2, 3, 4, factor=0.5, other="x"))
    with pytest.raises(CheckpointError, match=r"the class Scripted .*classes=\[Scripted\]"):
        registry.from_checkpoint(state)
    found = registry.from_checkpoint(state, classes=[WrongGradient, Scripted])
    assert found.values == (2, (3, 4), 0.5, {"other": "x"})
    found = registry.from_checkpoint(state_of(Scripted(2, factor=0.5)), classes=[Scripted])
    assert found.values == (2, (), 0.5, {})


def test_a_class_of_a_script_comes_back_after_an_import_of_the_script():
    """A script that runs calls its module __main__."""
    state = state_of(Scripted(2))
    state = with_identity(
        state, lambda text: text.replace(f"{__name__}:Scripted", "__main__:Scripted")
    )
    found = registry.from_checkpoint(state, classes=[Scripted])
    assert found.values == (2, (), 1.0, {})
    MultiPoseModel(torch.nn.Linear(2, 1), found).load_state_dict(state)
    other = state_of(WrongGradient())
    model = MultiPoseModel(torch.nn.Linear(2, 1), found)
    with pytest.raises(CheckpointError, match="this model has"):
        model.load_state_dict(other)


def test_a_class_that_was_registered_comes_back():
    with registry.temporary({"scripted": Scripted}):
        state = state_of(Scripted(2))
        assert registry.from_checkpoint(state).values[0] == 2
    assert registry.from_checkpoint(state, classes=[Scripted]).values[0] == 2
    with pytest.raises(CheckpointError, match=r"classes=\[Scripted\]"):
        registry.from_checkpoint(state)


def test_a_combination_that_comes_back_is_validated():
    state = state_of(WrongGradient())
    with pytest.raises(GradientValidationError, match="WrongGradient"):
        registry.from_checkpoint(state, classes=[WrongGradient])
    found = registry.from_checkpoint(state, classes=[WrongGradient], validate=False)
    assert isinstance(found, WrongGradient)


def without_exact(text):
    """Return an identity as versions before ``exact`` wrote it."""
    return text[: text.index(', "exact"')] + "}"


def test_a_checkpoint_from_before_exact_values_loads(shifted):
    combination = shifted(0.25, activation=None)
    state = with_identity(state_of(combination), without_exact)
    MultiPoseModel(torch.nn.Linear(2, 1), combination).load_state_dict(state)
    # () was described as [], and this is the default.
    assert_comes_back(registry.from_checkpoint(state), 0.25)
    state = with_identity(state_of(shifted("nan")), without_exact)
    with pytest.raises(CheckpointError, match="argument 'shift'"):
        registry.from_checkpoint(state)


FILES = {
    "text": (b"hello", "is no checkpoint"),
    "empty": (b"", "is no checkpoint"),
    "damaged": (b"PK\x03\x04 damaged", "is no checkpoint"),
    "damaged safetensors": (b"\x05\0\0\0\0\0\0\0{nope" + b" " * 9, "cannot be read"),
}


@pytest.mark.parametrize(("content", "message"), FILES.values(), ids=FILES)
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, content, message):
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"model.pt' {message}"):
        registry.from_checkpoint(tmp_path / "model.pt")


def test_a_missing_file_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model\.pt"):
        registry.from_checkpoint(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight": torch.zeros(2)}, "no key that ends in '_extra_state'"),
        ([1, 2], "must contain a state dict, or a dict with one; found a list"),
        ({"a": Decimal("0.1")}, r"contains decimal.Decimal, .*weights_only=False"),
    ],
    ids=["no combination", "list", "pickle"],
)
def test_a_file_without_a_combination_is_named(tmp_path, content, message):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=message):
        registry.from_checkpoint(tmp_path / "model.pt")


def test_a_checkpoint_without_numbers_is_named(shifted):
    with torch.device("meta"):
        state = {key: value.to("meta") for key, value in state_of(shifted(0.25)).items()}
    with pytest.raises(CheckpointError, match="have no numbers"):
        registry.from_checkpoint(state)
