"""accelerate prepares a multi-pose model like any other module."""

import copy

import pytest
import torch

from mtenn_core import MultiPoseModel, registry
from mtenn_core._engine.mode_table import MODES

pytestmark = pytest.mark.slow("accelerate is only in the environment integration")


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("gradients", MODES)
def test_gradients_are_those_without_accelerate(gradients, precision, tmp_path):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    plain = MultiPoseModel(
        torch.nn.Linear(6, 1), registry.create("boltzmann", kT=0.593), gradients=gradients
    )
    prepared = accelerator.prepare(copy.deepcopy(plain))
    poses, sizes = list(torch.randn(8, 6)), torch.tensor([3, 5])

    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        expected = plain(poses, sizes=sizes)
    expected.prediction.sum().backward()
    found = prepared(poses, sizes=sizes)
    accelerator.backward(found.prediction.sum())

    # The same operations in the same order.
    assert torch.equal(found.prediction, expected.prediction)
    unwrapped = accelerator.unwrap_model(prepared)
    assert torch.equal(unwrapped.pose_model.weight.grad, plain.pose_model.weight.grad)
    accelerator.save_state(tmp_path)
    accelerator.load_state(tmp_path)
