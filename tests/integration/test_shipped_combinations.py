"""Every shipped combination comes back from a checkpoint, and ``mtenn info`` describes it."""

import json

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner

from mtenn_core import MultiPoseModel, registry
from mtenn_core._cli import main
from mtenn_core.errors import CheckpointError

EXAMPLES = [
    pytest.param(name, example, id=f"{name} {example}")
    for name in registry.names()
    for example in registry.get(name, validate=False).examples
]
# An argument that is the start value of a learned parameter, and the parameter.
START_VALUES = {
    "attention": ("temperature", "log_temperature", {"n_features": 3}),
    "boltzmann": ("kT", "log_kT", {}),
    "confidence_weighted": ("temperature", "log_temperature", {}),
    "gated_attention": ("temperature", "log_temperature", {"n_features": 3}),
    "max": ("pred_scale", "log_pred_scale", {"normalize": True}),
    "min": ("pred_scale", "log_pred_scale", {}),
}


def model_of(combination):
    return MultiPoseModel(torch.nn.Linear(2, 1), combination)


def learned(combination):
    """Return a combination with other numbers in its parameters."""
    with torch.no_grad():
        for parameter in combination.parameters():
            parameter.add_(0.1 * torch.rand_like(parameter))
    return combination


@pytest.mark.parametrize("file", ["torch", "safetensors"])
@pytest.mark.parametrize(("name", "arguments"), EXAMPLES)
def test_a_shipped_combination_comes_back(name, arguments, file, tmp_path):
    combination = learned(registry.create(name, **arguments)).eval()
    state, path = model_of(combination).state_dict(), tmp_path / "model"
    if file == "torch":
        torch.save(state, path)
    else:
        safetensors.torch.save_file(state, path)
    found = registry.from_checkpoint(path).eval()
    assert type(found) is type(combination)
    assert found.extra_repr() == combination.extra_repr()
    columns = {None: (), "any": (3,)}.get(combination.pose_columns, (2,))
    if isinstance(combination.pose_columns, int):
        columns = (combination.pose_columns,)
    predictions = torch.randn(5, *columns)
    assert torch.equal(found.combine(predictions), combination.combine(predictions))
    model_of(found).load_state_dict(state)


@pytest.mark.parametrize(
    ("name", "argument", "parameter", "others"),
    [(name, *rest) for name, rest in START_VALUES.items()],
    ids=START_VALUES,
)
def test_the_start_value_of_a_learned_argument_may_differ(name, argument, parameter, others):
    one = learned(registry.create(name, **{argument: 0.5}, **others, learnable=True))
    other = registry.create(name, **{argument: 2.0}, **others, learnable=True)
    model_of(other).load_state_dict(model_of(one).state_dict())
    assert torch.equal(getattr(other, parameter), getattr(one, parameter))
    fixed = registry.create(name, **{argument: 2.0}, **others)
    with pytest.raises(CheckpointError, match=f"{argument}=0.5, .*has other arguments"):
        model_of(fixed).load_state_dict(model_of(one).state_dict())


def test_every_shipped_combination_that_learns_an_argument_is_tested():
    learn = {
        name
        for name in registry.names()
        if any(e.get("learnable") for e in registry.get(name, validate=False).examples)
    }
    assert learn == START_VALUES.keys()


@pytest.mark.parametrize("name", registry.names())
def test_info_describes_every_argument_of_a_shipped_combination(name):
    found = json.loads(CliRunner().invoke(main, ["info", name, "--json"]).stdout)
    assert "not_imported" not in found
    assert found["combination"]["summary"].endswith(".")
    for argument in found["combination"]["arguments"]:
        assert argument["description"]
        assert not argument["description"].startswith("see ")
