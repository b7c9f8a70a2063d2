"""What the commands print with ``--json`` is what docs/reference/schemas says, and no more."""

import json
import os
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from installed import write_distribution
from jsonschema import Draft202012Validator, ValidationError
from referencing import Registry, Resource

from mtenn_core import MultiPoseModel, registry
from mtenn_core._cli import main

SCHEMAS = Path(__file__).parents[2] / "docs/reference/schemas"
DOCUMENTS = {path.stem: json.loads(path.read_text("utf-8")) for path in SCHEMAS.glob("*.json")}
WRONG = '''
    import torch
    from mtenn_core import Combination

    class Wrong(Combination):
        def combine(self, predictions):
            return predictions.mean()

        def pose_weights(self, predictions):
            return 1.001 * predictions.new_ones(len(predictions)) / len(predictions)

    class Advised(Combination):
        def forward(self, *args):
            return Function.apply(*args)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(pred_list, grad_dict, param_names, *model_params):
            return torch.stack(pred_list).mean()

        @staticmethod
        def setup_context(ctx, inputs, output):
            _, ctx.grad_dict, ctx.names, *_ = inputs

        @staticmethod
        def backward(ctx, grad_output):
            sums = [grad_output * torch.stack(ctx.grad_dict[name]).mean(0) for name in ctx.names]
            return None, None, None, *sums

    class Unready(Wrong):
        def __init__(self, needed):
            super().__init__()

    class Described(Combination):
        """The mean, shifted.

        Parameters
        ----------
        shift : added to the mean
        """

        pose_inputs = {"strain": "real", "charge": "label"}
        pose_columns = ("low", "high")
        domain = (0.0, float("inf"))
        examples = ({"shift": 1.0}, {"shift": float("nan"), "more": [1]})

        def __init__(self, shift, *rest, bounds=(1.0, float("inf")), **more):
            super().__init__()
            self.shift = torch.nn.Parameter(torch.tensor([float(shift), float("nan")]))
            self.register_buffer("many", torch.zeros(3, 4))

        def combine(self, predictions, strain, charge):
            return predictions.mean() + self.shift[0]
'''
TABLE = ["{folder}/poses.csv", "healthy", "--by", "name", "--column", "score"]
# A command, its exit status, and a part of what it must print.
COMMANDS = {
    "list": (["list"], 0, '"name": "healthy"'),
    "list all": (["list", "--all"], 0, '"status": "shadowed"'),
    "info": (["info", "pinned"], 0, '"pin": "demo-pinned==1.0'),
    "info of a stale copy": (["info", "wrong"], 0, '"no_pin": "'),
    "info without imports": (["info", "wrong", "--no-import"], 0, '"combination": null'),
    "info of arguments": (["info", "described"], 0, '"default": "(1.0, inf)"'),
    "info of what cannot be imported": (["info", "gone"], 0, '"not_imported": "plugin'),
    "info of a checkpoint": (["info", "{folder}/good.pt"], 0, '"status": "passes"'),
    "info of checkpoint tasks": (["info", "{folder}/tasks.pt"], 0, '"n_tasks": 2'),
    "info of a checkpoint that fails": (["info", "{folder}/bad.pt"], 0, '"status": "fails"'),
    "info of a file unimported": (["info", "{folder}/bad.pt", "--no-import"], 0, '"not imported"'),
    "info of no checkpoint": (["info", "{folder}/none.pt"], 1, '"type": "CheckpointError"'),
    "info of nothing": (["info", "absent"], 1, '"type": "CombinationNotFoundError"'),
    "check": (["check", "healthy", "wrong"], 1, '"cause": "a constant factor'),
    "check at the gate": (["check", "healthy", "--level", "gate"], 0, '"curves": {}'),
    "check with advice": (["check", "advised", "--only", "A10"], 0, '"status": "advice"'),
    "check of what cannot be made": (["check", "unready", "no.module:Class"], 1, '"error": {'),
    "combine": (["combine", *TABLE], 0, '"effective_poses": 1.0'),
    "combine without a table": (["combine", "absent.csv", *TABLE[1:]], 1, '"error": {'),
    "doctor": (["doctor"], 1, '"kind": "does not load"'),
    "doctor without imports": (["doctor", "--no-import"], 0, '"problems": []'),
    "new": (["new", "my-rule", "--output", "{folder}/new"], 0, '"files": ['),
}


def validator(name):
    documents = [(f"{key}.json", Resource.from_contents(DOCUMENTS[key])) for key in DOCUMENTS]
    return Draft202012Validator(DOCUMENTS[name], registry=Registry().with_resources(documents))


@pytest.fixture
def plugins(places, monkeypatch, tmp_path):
    entry_points = {"wrong": "demo_wrong:Wrong", "unready": "demo_wrong:Unready"}
    entry_points |= {"advised": "demo_wrong:Advised"}
    entry_points |= {"gone": "demo_wrong:Gone", "described": "demo_wrong:Described"}
    for folder in (places.front, places.site):
        write_distribution(folder, "demo-wrong", entry_points, WRONG)
    pinned = {"pinned": "demo_pinned:Good"}
    write_distribution(places.site, "demo-pinned", pinned, record=True)
    # What children import from; a process of its own does not know the test's sys.path.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(places.front), str(places.site)]))
    registry.refresh()
    _save_checkpoints(tmp_path)
    yield places
    registry.refresh()


def _save_checkpoints(folder):
    good = registry.create("healthy")
    many = registry.get("described", validate=False)(1.0, 2, key="x", activation=lambda y: y)
    for name, combination, tasks in [
        ("good", good, None),
        ("tasks", [good, good], ("a", "b")),
        ("bad", many, None),
    ]:
        model = MultiPoseModel(torch.nn.Linear(2, 2), combination, tasks=tasks)
        torch.save({"model": model.state_dict()}, folder / f"{name}.pt")
    torch.save({}, folder / "none.pt")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_schema_is_valid(name):
    Draft202012Validator.check_schema(DOCUMENTS[name])


@pytest.mark.parametrize(("arguments", "status", "part"), COMMANDS.values(), ids=COMMANDS)
def test_a_document_matches_its_schema(arguments, status, part, plugins, tmp_path):
    arguments = [argument.format(folder=tmp_path) for argument in arguments]
    (tmp_path / "poses.csv").write_text("name,score\nA,-7\n")
    result = CliRunner().invoke(main, [*arguments, "--json"])
    assert result.exit_code == status
    assert part in result.stdout
    validator(arguments[0]).validate(json.loads(result.stdout))


# A schema that lets everything pass would prove nothing.
PLUGIN = dict.fromkeys(("name", "target", "reason"), "x") | {"requires": [], "status": "available"}
PLUGIN |= dict.fromkeys(("distribution", "version", "location", "metadata"))
FAKES = {
    "a key that no schema knows": ("list", [PLUGIN | {"more": 1}]),
    "a key that is missing": ("list", [{"name": "x"}]),
    "another status": ("list", [PLUGIN | {"status": "good"}]),
    "another error": ("check", {"error": {"kind": "x"}}),
    "no list": ("list", {"plugins": []}),
}


def test_a_complete_plugin_document_is_valid():
    validator("list").validate([PLUGIN])


@pytest.mark.parametrize(("name", "document"), FAKES.values(), ids=FAKES)
def test_another_document_is_refused(name, document):
    with pytest.raises(ValidationError):
        validator(name).validate(document)
