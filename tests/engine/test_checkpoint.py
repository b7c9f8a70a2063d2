import pytest
import torch
from torch import Tensor

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
    text = bytes(state["_extra_state"].tolist()).decode().replace('"1.0"', '"0.9"')
    state["_extra_state"] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    with pytest.warns(PluginWarning, match=r"\(demo-rules 0.9\) .*and version 1.0 is installed"):
        model.load_state_dict(state)


@pytest.mark.parametrize(
    "state", [torch.tensor([1, 2]), torch.rand(3), {"name": "mean"}, torch.tensor(list(b"{}"))]
)
def test_what_cannot_be_read_is_told(state):
    model = model_of(SmoothMinimum())
    with pytest.raises(CheckpointError, match=r"cannot be read .*ends in '_extra_state'"):
        model.load_state_dict(model.state_dict() | {"_extra_state": state})


class Plain:
    """Its repr has an address."""


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
    text = bytes(model.state_dict()["_extra_state"].tolist()).decode()
    assert " at 0x" not in text
    model_of(SmoothMinimum(shift=now)).load_state_dict(through_a_file(model, tmp_path))


def test_arguments_that_json_does_not_know_are_compared_by_their_repr(tmp_path):
    state = through_a_file(model_of(SmoothMinimum(shift={1j})), tmp_path)
    model_of(SmoothMinimum(shift={1j})).load_state_dict(state)
    with pytest.raises(CheckpointError, match="other arguments"):
        model_of(SmoothMinimum(shift={2j})).load_state_dict(state)


@pytest.mark.parametrize(
    ("then", "now"),
    [
        (torch.tensor(0.59301), torch.tensor(0.59302)),
        (torch.zeros(5000), torch.zeros(5000).index_fill(0, torch.tensor([2500]), 1e-3)),
        ({(1, 2): 0.5}, {(1, 2): 0.25}),
        (torch.zeros(3), torch.zeros(3).double()),
    ],
    ids=["close", "long", "keys", "dtype"],
)
def test_arguments_are_compared_by_their_values(tmp_path, then, now):
    state = through_a_file(model_of(SmoothMinimum(shift=then)), tmp_path)
    equal = then.clone().requires_grad_() if isinstance(then, Tensor) else dict(then)
    model_of(SmoothMinimum(shift=equal)).load_state_dict(state)
    with pytest.raises(CheckpointError, match="other arguments"):
        model_of(SmoothMinimum(shift=now)).load_state_dict(state)


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
