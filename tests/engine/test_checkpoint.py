import copy
import functools
import threading
import zlib
from decimal import Decimal

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mtenn_core import Combination, MultiPoseModel, registry
from mtenn_core.errors import CheckpointError, PluginWarning


class SmoothMinimum(Combination):
    def __init__(self, scale: float = 1.0, shift: object = 0.0) -> None:
        super().__init__()
        self.scale, self.shift = scale, shift
        self.offset = torch.nn.Parameter(torch.zeros(()))

    def combine(self, predictions: Tensor) -> Tensor:
        return self.offset - torch.logsumexp(-self.scale * predictions, dim=0) / self.scale


class Other(SmoothMinimum):
    pass


PLUGIN = """
from mtenn_core import Combination
class Mean(Combination):
    def __init__(self, shift=0.0):
        super().__init__()
        self.shift = shift
    def combine(self, predictions):
        return predictions.mean() + self.shift
class Sum(Mean):
    def combine(self, predictions):
        return predictions.sum() + self.shift
"""


def model_of(combination):
    return MultiPoseModel(torch.nn.Linear(2, 1), combination)


def text_of(state):
    return bytes(state["_extra_state"].tolist()).decode()


def tensor_of(text):
    checked = f"{text}\n{zlib.crc32(text.encode()):08x}"
    return torch.tensor(list(checked.encode()), dtype=torch.int32)


def through_a_file(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "model.pt")
    return torch.load(tmp_path / "model.pt", weights_only=True)


def test_a_checkpoint_loads_into_the_same_combination(tmp_path):
    model = model_of(SmoothMinimum(2.0))
    with torch.no_grad():
        model.combination.offset.fill_(3.0)
    again = model_of(SmoothMinimum(scale=2.0))
    again.load_state_dict(through_a_file(model, tmp_path))
    assert again.combination.offset == 3.0


def test_a_checkpoint_from_before_the_registration_loads():
    before = model_of(SmoothMinimum(2.0)).state_dict()
    with registry.temporary({"smooth-minimum": SmoothMinimum}):
        registered = model_of(SmoothMinimum(2.0))
        registered.load_state_dict(before)
    model_of(SmoothMinimum(2.0)).load_state_dict(registered.state_dict())


@pytest.mark.parametrize(
    ("combination", "message"),
    [
        (
            Other(2.0),
            r"of '.*:SmoothMinimum' with scale=2.0, shift=0.0, and this model has '.*:Other' with",
        ),
        (SmoothMinimum(3.0), r"scale=2.0, .* has other arguments: .* with scale=3.0, shift=0.0"),
    ],
    ids=["class", "arguments"],
)
def test_another_combination_is_told_and_nothing_is_loaded(tmp_path, combination, message):
    state = through_a_file(model_of(SmoothMinimum(2.0)), tmp_path)
    model = model_of(combination)
    before = model.pose_model.weight.clone()
    with pytest.raises(CheckpointError, match=message):
        model.load_state_dict(state)
    assert torch.equal(model.pose_model.weight, before)
    del state["_extra_state"]  # the remedy that the message gives
    model.load_state_dict(state, strict=False)
    assert not torch.equal(model.pose_model.weight, before)


def test_a_plugin_is_known_by_name_distribution_and_version(install_plugin, tmp_path):
    names = {"my-mean": "demo_rules:Mean", "my-sum": "demo_rules:Sum"}
    install_plugin("demo-rules", names, PLUGIN)
    registry.refresh()
    state = through_a_file(model_of(registry.create("my-mean", shift=1)), tmp_path)
    model_of(registry.create("my-mean", shift=1.0)).load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"of 'my-mean' \(demo-rules 1.0\) with shift=1, and"):
        model_of(registry.create("my-sum", shift=1)).load_state_dict(state)
    from demo_rules import Mean  # which the registry has not made, and knows all the same

    model_of(Mean(1.0)).load_state_dict(state)


def test_another_version_of_the_plugin_is_a_warning(install_plugin, tmp_path):
    install_plugin("demo-rules", {"my-mean": "demo_rules:Mean"}, PLUGIN)
    registry.refresh()
    model = model_of(registry.create("my-mean"))
    state = model.state_dict()
    text, _ = text_of(state).split("\n")
    state["_extra_state"] = tensor_of(text.replace('"1.0"', '"0.9"'))
    with pytest.warns(PluginWarning, match=r"\(demo-rules 0.9\) .*and version 1.0 is installed"):
        model.load_state_dict(state)


@pytest.mark.parametrize(
    "state",
    [
        torch.tensor([1, 2]),
        torch.rand(3),
        {"name": "mean"},
        torch.tensor(list(b"{}")),
        tensor_of("{}"),
    ],
    ids=["short", "random", "dict", "no checksum", "no fields"],
)
def test_what_cannot_be_read_is_told(state):
    model = model_of(SmoothMinimum())
    with pytest.raises(CheckpointError, match=r"cannot be read .*ends in '_extra_state'"):
        model.load_state_dict(model.state_dict() | {"_extra_state": state})


class Plain:
    """Its repr has an address."""

    def __init__(self, **attributes):
        self.__dict__ |= attributes

    def scaled(self, y):
        return self.k * y


class Scale(torch.nn.Module):
    def __init__(self, k):
        super().__init__()
        self.k = k


def scaled_by(k):
    return lambda y: k * y


def constant_linear(value):
    layer = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(layer.weight, value)
    torch.nn.init.zeros_(layer.bias)
    return layer


@pytest.mark.parametrize(
    ("then", "now"),
    [
        (model_of, model_of),
        (frozenset({"alpha", "beta", "gamma"}), frozenset({"gamma", "beta", "alpha"})),
        (Plain(), Plain()),
        (float("nan"), float("nan")),
    ],
    ids=["function", "set", "object", "nan"],
)
def test_arguments_are_called_the_same_in_every_process(tmp_path, then, now):
    model = model_of(SmoothMinimum(shift=then))
    assert " at 0x" not in text_of(model.state_dict())
    model_of(SmoothMinimum(shift=now)).load_state_dict(through_a_file(model, tmp_path))


@pytest.mark.parametrize(
    ("then", "now"),
    [
        (torch.tensor(0.59301), torch.tensor(0.59302)),
        (torch.zeros(5000), torch.zeros(5000).index_fill(0, torch.tensor([2500]), 1e-3)),
        ({(1, 2): 0.5}, {(1, 2): 0.25}),
        (torch.zeros(3), torch.zeros(3).double()),
        ({1j}, {2j}),
        ({1: 0.5}, {"1": 0.5}),
        (torch.eye(3).to_sparse(), 2 * torch.eye(3).to_sparse()),
        (np.float32(0.1), 0.1),
        (np.array([0.123456789]), np.array([0.123456788])),
        (np.arange(5000.0), np.where(np.arange(5000) == 2500, 0.0, np.arange(5000.0))),
        ([np.array([1, "a"], dtype=object)], [np.array([1, "b"], dtype=object)]),
        (np.longdouble("0.1"), np.longdouble(0.1)),
        (Decimal("0.1"), Decimal("0.2")),
        (Plain(k=1), Plain(k=2)),
        (functools.partial(pow, 2), functools.partial(pow, 3)),
        (lambda y: y, lambda y: -y),
        (lambda y: y + 1.0, lambda y: y + 2.0),
        (lambda y, k=1: y * k, lambda y, k=2: y * k),
        (scaled_by(2.0), scaled_by(3.0)),
        (torch.nn.Linear(1, 1), torch.nn.Linear(2, 1)),
        ([constant_linear(1.0)], [constant_linear(2.0)]),
        (Scale(2.0), Scale(3.0)),
        (Plain(k=2).scaled, Plain(k=3).scaled),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_checkpoint_with_another_argument_does_not_load(tmp_path, then, now):
    state = through_a_file(model_of(SmoothMinimum(shift=then)), tmp_path)
    again = copy.deepcopy(then) if not callable(then) else then
    model_of(SmoothMinimum(shift=again)).load_state_dict(state)
    with pytest.raises(CheckpointError, match="other arguments"):
        model_of(SmoothMinimum(shift=now)).load_state_dict(state)


@pytest.mark.parametrize(
    ("then", "now"),
    [
        (0.5, np.float64(0.5)),
        (0.5, np.float32(0.5)),
        (0.5, np.array(0.5)),
        (0.5, torch.tensor(0.5)),
        (2, torch.tensor(2.0)),
        (torch.tensor([0.25, 0.1], dtype=torch.float64), np.array([0.25, 0.1])),
        (torch.arange(40), np.arange(40)),
        (np.arange(40.0), np.arange(40.0).astype(">f8")),
        (np.arange(40.0), np.arange(80.0)[::2] / 2),
        (torch.arange(40.0), torch.arange(80.0)[::2] / 2),
        ((1, 2), [1, 2]),
        (10**5000, 10**5000),
        (lambda y: 2 * y, lambda y: 2 * y),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_checkpoint_with_an_equal_argument_loads(then, now):
    state = model_of(SmoothMinimum(shift=then)).state_dict()
    model_of(SmoothMinimum(shift=now)).load_state_dict(state)


def test_print_options_are_not_part_of_an_argument():
    arguments = {"array": np.array([1 / 3]), "tensor": torch.tensor([1 / 3]), "number": 1 / 3}
    state = model_of(SmoothMinimum(shift=[arguments, Plain(**arguments)])).state_dict()
    with np.printoptions(precision=2):
        torch.set_printoptions(precision=2)
        try:
            again = copy.deepcopy(arguments)
            model_of(SmoothMinimum(shift=[again, Plain(**again)])).load_state_dict(state)
        finally:
            torch.set_printoptions(profile="default")


def test_a_lambda_is_the_same_after_many_calls():
    function = scaled_by(2.0)
    before = model_of(SmoothMinimum(shift=function)).state_dict()["_extra_state"]
    for _ in range(100):  # the interpreter adapts its code to the arguments of the calls
        function(1.0)
    after = model_of(SmoothMinimum(shift=function)).state_dict()["_extra_state"]
    assert torch.equal(before, after)


class Unprintable:
    def __init__(self, error):
        self.error = error

    def __reduce_ex__(self, protocol):
        raise self.error

    def __repr__(self):
        raise self.error


def fake_tensor():
    with FakeTensorMode():
        return torch.empty(3)


def contains_itself():
    values = []
    values.append(values)
    return values


@pytest.mark.parametrize(
    "make",
    [
        lambda: Unprintable(ValueError("no")),
        lambda: Unprintable(SystemExit(0)),
        lambda: Unprintable(BaseException("panic")),
        lambda: torch.empty(3, device="meta"),
        fake_tensor,
        lambda: torch.nn.LazyLinear(1),
        lambda: "\udcff",
        threading.Lock,
        contains_itself,
        lambda: functools.reduce(lambda nested, _: [nested], range(10_000), []),
    ],
    ids=["repr", "exit", "panic", "meta", "fake", "lazy", "surrogate", "lock", "cycle", "deep"],
)
def test_saving_never_fails(make):
    state = model_of(SmoothMinimum(shift=make())).state_dict()
    model_of(SmoothMinimum(shift=make())).load_state_dict(state)


def test_a_wrong_environment_variable_does_not_stop_saving(monkeypatch):
    monkeypatch.setenv("MTENN_STRICT", "maybe")
    state = model_of(SmoothMinimum(2.0)).state_dict()
    monkeypatch.delenv("MTENN_STRICT")
    model_of(SmoothMinimum(2.0)).load_state_dict(state)
    with pytest.raises(CheckpointError, match="other arguments"):
        model_of(SmoothMinimum(3.0)).load_state_dict(state)


def test_a_checkpoint_is_saved_and_loaded_under_another_default_device():
    with torch.device("meta"):
        state = model_of(SmoothMinimum(2.0)).state_dict()
        model_of(SmoothMinimum(2.0)).load_state_dict(state, assign=True)
    model = model_of(SmoothMinimum(2.0))
    with torch.device("meta"):
        model.load_state_dict(model_of(SmoothMinimum(2.0)).state_dict() | model.state_dict())


@pytest.mark.parametrize(
    "calculate",
    [
        lambda states, key: states[0][key].half(),
        lambda states, key: states[0][key].bfloat16(),
        lambda states, key: sum(state[key] for state in states) / len(states),
        lambda states, key: torch.stack([state[key].float() for state in states]).mean(dim=0),
        lambda states, key: 0.999 * states[0][key] + 0.001 * states[1][key],
    ],
    ids=["half", "bfloat16", "sum", "mean", "moving"],
)
def test_rounded_and_averaged_checkpoints_load(calculate):
    states = [model_of(SmoothMinimum(2.0)).state_dict() for _ in range(5)]
    model = model_of(SmoothMinimum(2.0))
    model.load_state_dict({key: calculate(states, key) for key in states[0]})
    with pytest.raises(CheckpointError, match=r"with scale=2.0, .* other arguments"):
        model_of(SmoothMinimum(3.0)).load_state_dict(
            {key: calculate(states, key) for key in states[0]}
        )


def test_an_average_over_different_combinations_says_what_to_do():
    one, other = (model_of(SmoothMinimum(scale)).state_dict() for scale in (1.0, 3.0))
    average = {key: (one[key] + other[key]) / 2 for key in one}
    with pytest.raises(CheckpointError, match=r"its checksum is wrong.*averaged them, take this"):
        model_of(SmoothMinimum(2.0)).load_state_dict(average)


@pytest.mark.parametrize("installed", [False, True])
def test_another_class_under_the_same_name_does_not_load(install_plugin, installed):
    class Another(Combination):
        def combine(self, predictions: Tensor) -> Tensor:
            return 2 * predictions.mean()

    if installed:
        install_plugin("demo-rules", {"my-mean": "demo_rules:Mean"}, PLUGIN)
        registry.refresh()
        state = model_of(registry.create("my-mean")).state_dict()
        text, _ = text_of(state).split("\n")
        state["_extra_state"] = tensor_of(text.replace("demo_rules:Mean", "demo_rules:Old"))
        with pytest.raises(CheckpointError, match=r"'my-mean' .*, and this model has 'my-mean'"):
            model_of(registry.create("my-mean")).load_state_dict(state)
        return
    with registry.temporary({"rule": SmoothMinimum}):
        state = model_of(SmoothMinimum()).state_dict()
    with (
        registry.temporary({"rule": Another}),
        pytest.raises(CheckpointError, match=r"is of 'rule' \(class .*:SmoothMinimum\)"),
    ):
        model_of(Another()).load_state_dict(state)


def test_one_class_under_two_names_loads():
    with registry.temporary({"rule": SmoothMinimum}):
        state = model_of(SmoothMinimum()).state_dict()
    with registry.temporary({"other-rule": SmoothMinimum}):
        model_of(SmoothMinimum()).load_state_dict(state)


class Learned(Combination):
    """Its arguments are start values, unless it keeps them in another attribute, too."""

    def __init__(self, start, keep="nothing", device=None):
        super().__init__()
        tensor = torch.as_tensor(start)
        self.start = torch.nn.Parameter(tensor.to(device) if device else tensor)
        if keep == "sum":
            self.kept = float(tensor.sum())
        if keep == "buffer":
            self.register_buffer("kept", tensor.clone(), persistent=False)
        if keep == "hook":
            total = float(tensor.sum())
            self.register_forward_hook(lambda *_: total)

    def combine(self, predictions: Tensor) -> Tensor:
        return predictions.mean() + self.start.sum()


@pytest.mark.parametrize(
    "start",
    [0.5, [0.5, 0.75], torch.ones(100), np.ones(100)],
    ids=["float", "list", "tensor", "array"],
)
def test_the_start_value_of_a_learned_parameter_may_differ(tmp_path, start):
    model = model_of(Learned(copy.deepcopy(start)))
    with torch.no_grad():
        model.combination.start.fill_(3.0)
    other = [1.0, 1.0] if isinstance(start, list) else 2 * start
    again = model_of(Learned(other)).double()
    again.combination._compiled_call_impl = print  # as Module.compile() does
    again.load_state_dict(through_a_file(model, tmp_path))
    assert (again.combination.start == 3.0).all()


@pytest.mark.parametrize("keep", ["sum", "buffer", "hook"])
@pytest.mark.parametrize("trained_in_place", [True, False])
def test_a_start_value_that_is_kept_elsewhere_must_be_equal(keep, trained_in_place):
    state = model_of(Learned(torch.ones(3), keep)).state_dict()
    model_of(Learned(torch.ones(3), keep)).load_state_dict(state)
    # A parameter that shares the argument's memory hides the argument's first value.
    start = 2 * torch.ones(3) if trained_in_place else [2.0, 2.0, 2.0]
    with pytest.raises(CheckpointError, match=r"other arguments|value of the attribute"):
        model_of(Learned(start, keep)).load_state_dict(state)


def test_an_argument_of_which_a_view_is_trained_is_compared():
    class First(Combination):
        def __init__(self, values):
            super().__init__()
            self.first = torch.nn.Parameter(values[:1])
            self.rest = values[1:]

        def combine(self, predictions: Tensor) -> Tensor:
            return predictions.mean() + self.first[0] + self.rest.sum()

    state = model_of(First(torch.tensor([1.0, 2.0]))).state_dict()
    with pytest.raises(CheckpointError, match="other arguments"):
        model_of(First(torch.tensor([1.0, 3.0]))).load_state_dict(state)


def test_an_argument_that_is_trained_is_not_held_against_its_first_value(tmp_path):
    class Learnable(SmoothMinimum):
        def __init__(self, shift):
            super().__init__()
            self.shift = torch.nn.Parameter(shift)

    model = model_of(Learnable(torch.zeros(2)))
    with torch.no_grad():
        model.combination.shift.fill_(3.0)
    again = model_of(Learnable(torch.zeros(2)))
    again.load_state_dict(through_a_file(model, tmp_path))
    assert torch.equal(again.combination.shift, torch.full((2,), 3.0))
