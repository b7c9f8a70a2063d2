"""torch.export of a multi-pose model, with the wrapper that the page on exporting shows."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from mtenn_core import MultiPoseModel, registry
from mtenn_core._engine.columns import columns_of

# By its path, since no folder of tests is a package.
_SPEC = importlib.util.spec_from_file_location(
    "how_pages_are_run", Path(__file__).parents[1] / "test_docs.py"
)
docs = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(docs)

PAGE = docs.ROOT / "docs/how-to/export-a-model.md"
ONE_IS_ENOUGH = pytest.mark.slow("one example of each combination is in the fast tests")
N_POSES = torch.export.Dim("n_poses")


@pytest.fixture(scope="module")
def wrapper():
    """Return the class of the page."""
    namespace: dict[str, Any] = {}
    docs.run_python(docs.blocks(PAGE)[0], namespace, PAGE.name)
    return namespace["ExportableModel"]


def combinations(answer):
    """Return every example of the combinations of one row of the page's table."""
    rows = docs.table(PAGE, "combination")
    names = next(row[0] for row in rows if row[1].startswith(answer)).replace("`", "").split(", ")
    cases = []
    for name in names:
        first, *others = registry.get(name, validate=False).examples
        cases.append(pytest.param(name, first, id=f"{name} {first}"))
        cases += [
            pytest.param(name, example, id=f"{name} {example}", marks=ONE_IS_ENOUGH)
            for example in others
        ]
    return cases


def make_model(combination, dtype=torch.float32):
    declared = combination.pose_columns
    n_columns = 1 if declared is None else columns_of(declared).number
    layers = torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, n_columns)
    pose_model = torch.nn.Sequential(*layers).to(dtype)
    return MultiPoseModel(pose_model, combination, collate=torch.stack).eval()


def export(model, wrapper, dtype=torch.float32):
    example = (torch.randn(5, 6, dtype=dtype),)
    return torch.export.export(wrapper(model).eval(), example, dynamic_shapes=({0: N_POSES},))


def test_the_table_has_all_shipped_combinations():
    named = {case.values[0] for answer in ("yes", "no") for case in combinations(answer)}
    assert named == {r.name for r in registry.records() if r.distribution.startswith("mtenn-")}


@pytest.mark.parametrize(("name", "arguments"), combinations("yes"))
def test_an_exported_model_gives_the_numbers_of_the_model(name, arguments, wrapper, tmp_path):
    model = make_model(registry.create(name, **arguments))
    torch.export.save(export(model, wrapper), tmp_path / "model.pt2")
    exported = torch.export.load(tmp_path / "model.pt2").module()
    for n_poses in (1, 2, 5, 50):
        poses = torch.randn(n_poses, 6)
        # The same operations in the same order, so the default tolerance of float32 is ample.
        torch.testing.assert_close(exported(poses), tuple(model(list(poses))))


@pytest.mark.parametrize(("name", "arguments"), combinations("no"))
def test_the_other_combinations_are_refused(name, arguments, wrapper):
    model = make_model(registry.create(name, **arguments))
    with pytest.raises(torch._dynamo.exc.UserError, match=r"Constraints violated \(n_poses\)"):
        export(model, wrapper)


def test_half_precision_becomes_float32_as_in_the_model(wrapper):
    model = make_model(registry.create("boltzmann", kT=0.593), torch.float16)
    poses = torch.randn(50, 6, dtype=torch.float16)
    found = export(model, wrapper, torch.float16).module()(poses)
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found, tuple(model(list(poses))))


def test_a_compound_without_poses_has_no_error_from_the_program(wrapper):
    program = export(make_model(registry.create("mean")), wrapper).module()
    prediction, _ = program(torch.randn(0, 6))
    assert prediction == 0
