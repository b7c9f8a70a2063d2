"""What the commands print with ``--json`` is what docs/reference/schemas says, and no more."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from installed import write_distribution
from jsonschema import Draft202012Validator, ValidationError
from referencing import Registry, Resource

from mtenn_core import registry
from mtenn_core._cli import main

pytest_plugins = "pytester"

SCHEMAS = Path(__file__).parents[1] / "docs/reference/schemas"
DOCUMENTS = {path.stem: json.loads(path.read_text("utf-8")) for path in SCHEMAS.glob("*.json")}
WRONG = """
    from mtenn_core import Combination

    class Wrong(Combination):
        def combine(self, predictions):
            return predictions.mean()

        def pose_weights(self, predictions):
            return 1.001 * predictions.new_ones(len(predictions)) / len(predictions)

    class Unready(Wrong):
        def __init__(self, needed):
            super().__init__()
"""
COMMANDS = {
    "list": ["list"],
    "list all": ["list", "--all"],
    "info": ["info", "healthy"],
    "info of a stale copy": ["info", "wrong"],
    "info of nothing": ["info", "absent"],
    "check": ["check", "healthy", "wrong"],
    "check at the gate": ["check", "wrong", "--level", "gate"],
    "check of what cannot be made": ["check", "unready", "absent", "no.module:Class"],
    "doctor": ["doctor"],
    "doctor without imports": ["doctor", "--no-import"],
    "new": ["new", "my-rule", "--output", "{folder}/new"],
}


def validator(name):
    documents = [(f"{key}.json", Resource.from_contents(DOCUMENTS[key])) for key in DOCUMENTS]
    return Draft202012Validator(DOCUMENTS[name], registry=Registry().with_resources(documents))


@pytest.fixture
def plugins(places, monkeypatch):
    entry_points = {"wrong": "demo_wrong:Wrong", "unready": "demo_wrong:Unready"}
    entry_points["gone"] = "demo_wrong:Gone"
    for folder in (places.front, places.site):
        write_distribution(folder, "demo-wrong", entry_points, WRONG)
    # What children import from; a process of its own does not know the test's sys.path.
    monkeypatch.setenv("PYTHONPATH", f"{places.front}:{places.site}")
    registry.refresh()
    yield places
    registry.refresh()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_schema_is_valid(name):
    Draft202012Validator.check_schema(DOCUMENTS[name])


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS)
def test_document_is_as_its_schema_says(arguments, plugins, tmp_path):
    arguments = [argument.format(folder=tmp_path) for argument in arguments]
    result = CliRunner().invoke(main, [*arguments, "--json"])
    validator(arguments[0]).validate(json.loads(result.stdout))


def test_conformance_tests_write_what_the_schema_says(pytester):
    pytester.makepyfile(
        """
        from mtenn_core import Combination
        from mtenn_core.testing import CombinationConformance

        class Mean(Combination):
            def combine(self, predictions):
                return predictions.mean()

        class TestMean(CombinationConformance):
            combination = Mean
            level = "gate"
        """
    )
    pytester.runpytest("--conformance-json", "found.json")
    found = json.loads((pytester.path / "found.json").read_text())
    assert found["reports"]
    validator("conformance").validate(found)


# A schema that lets everything pass would prove nothing.
FAKES = {
    "a key that no schema knows": ("list", [{**dict.fromkeys("ab"), "name": "x"}]),
    "another error": ("check", {"error": {"kind": "x"}}),
    "another status": ("check", [{"passed": True, "records": [{"status": "passed"}]}]),
    "no list": ("list", {"plugins": []}),
}


@pytest.mark.parametrize(("name", "document"), FAKES.values(), ids=FAKES)
def test_another_document_is_refused(name, document):
    with pytest.raises(ValidationError):
        validator(name).validate(document)
