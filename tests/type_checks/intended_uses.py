"""Uses of the public interface that type checkers must accept.

`tox run` checks this file with mypy and pyright. Nothing runs it. `assert_type` says which type a
checker must infer.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, assert_type

import torch
from mtenn_attention import AttentionCombination, ConfidenceWeightedCombination
from mtenn_boltzmann import BoltzmannCombination
from mtenn_max import MaxCombination, MinCombination
from mtenn_mean import MeanCombination
from mtenn_ordered import (
    MedianCombination,
    QuantileCombination,
    TopKMeanCombination,
    TrimmedMeanCombination,
)
from torch import Tensor

from mtenn_core import (
    Combination,
    Estimate,
    ModeCost,
    MultiPoseModel,
    MultiPoseOutput,
    PluginRecord,
    Policy,
    Problem,
    Registry,
    as_mtenn_combination,
    attach_gradients,
    effective_poses,
    hookimpl,
    jackknife_error,
    propagated_error,
    registry,
)
from mtenn_core.errors import (
    GradientError,
    GradientValidationError,
    PredictionError,
    RegistryError,
)
from mtenn_core.model import GradientMode
from mtenn_core.testing import (
    CombinationConformance,
    Record,
    Report,
    check_combination,
    parametrize_with_checks,
)

# Write a combination --------------------------------------------------------------------------


class DepthOne(Combination):
    """Write `combine`, and declare facts."""

    min_poses = 2
    domain = (0.0, 1.0)
    smooth = False
    properties = frozenset({"permutation_invariant"})
    examples = ({}, {"kT": 0.5})

    def __init__(self, kT: float = 1.0) -> None:
        super().__init__()
        self.kT = kT

    def combine(self, predictions: Tensor) -> Tensor:
        return predictions.mean() / self.kT


class DepthTwo(DepthOne):
    """Add the closed form and a reference."""

    def pose_weights(self, predictions: Tensor) -> Tensor:
        return torch.full_like(predictions, 1 / len(predictions) / self.kT)

    def reference(self, predictions: Tensor) -> Tensor:
        return predictions.sum() / len(predictions) / self.kT


class DepthThree(Combination):
    """Override `forward` with the documented signature."""

    def forward(
        self,
        pred_list: list[Tensor],
        grad_dict: dict[str, list[Tensor]],
        param_names: list[str],
        *model_params: Tensor,
    ) -> Tensor:
        keys, tensors = Combination.split_grad_dict(grad_dict)
        assert_type(keys, list[str])
        joined = self.join_grad_dict(keys, tensors)
        assert_type(joined, dict[str, list[Tensor]])
        return attach_gradients(pred_list, joined, param_names, *model_params).mean()


class DepthThreeOfSequences(Combination):
    """Override `forward` and ask for less."""

    def forward(
        self,
        pred_list: Sequence[Tensor],
        grad_dict: dict[str, list[Tensor]],
        param_names: Sequence[str],
        *model_params: torch.nn.Parameter,
    ) -> Tensor:
        return super().forward(list(pred_list), grad_dict, list(param_names), *model_params)


class DepthThreeWithInput(Combination):
    """Override `forward` with a pose input."""

    pose_inputs = ("docking_score",)

    def forward(
        self,
        pred_list: list[Tensor],
        grad_dict: dict[str, list[Tensor]],
        param_names: list[str],
        *model_params: Tensor,
        docking_score: Tensor,
    ) -> Tensor:
        return attach_gradients(pred_list, grad_dict, param_names, *model_params) @ docking_score


class ByDockingScore(Combination):
    """Take a pose input by name, and train a parameter."""

    pose_inputs = ("docking_score",)

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))

    def combine(self, predictions: Tensor, docking_score: Tensor) -> Tensor:
        return torch.softmax(-docking_score * self.scale, dim=0) @ predictions

    def pose_weights(self, predictions: Tensor, docking_score: Tensor) -> Tensor:
        return torch.softmax(-docking_score * self.scale, dim=0)

    def reference(self, predictions: Tensor, docking_score: Tensor) -> Tensor:
        return self.combine(predictions, docking_score)


class WithKinds(Combination):
    """Declare kinds of pose inputs, and the facts with annotations."""

    pose_inputs = {"degeneracy": "positive", "chain": "label"}
    properties: ClassVar[frozenset[str]] = frozenset()
    examples: ClassVar[Sequence[dict[str, Any]]] = ({},)

    def combine(self, predictions: Tensor, *, degeneracy: Tensor, chain: Tensor) -> Tensor:
        return (predictions * degeneracy * chain).sum()


class OfColumns(Combination):
    """Take several numbers per pose."""

    pose_columns = ("affinity", "confidence")

    def combine(self, predictions: Tensor) -> Tensor:
        return predictions.prod(dim=1).sum()


class OfSomeColumns(Combination):
    """Set the number of columns in `__init__`."""

    def __init__(self, n_features: int) -> None:
        super().__init__()
        self.pose_columns = n_features

    def combine(self, predictions: Tensor) -> Tensor:
        return predictions.sum(dim=0)


class Plugin:
    """A plugin that is no combination."""

    @staticmethod
    @hookimpl
    def mtenn_combination() -> type[Combination]:
        return DepthOne


# Construct the shipped combinations ------------------------------------------------------------

boltzmann = BoltzmannCombination(kT=0.593, learnable=True)
assert_type(boltzmann.kT, float | Tensor)
assert_type(boltzmann.learnable, bool)
shipped: list[Combination] = [
    boltzmann,
    MeanCombination(),
    MaxCombination(negate_preds=True, pred_scale=10.0, normalize=True, learnable=False),
    MinCombination(pred_scale=10.0),
    TopKMeanCombination(k=2, largest=True),
    TrimmedMeanCombination(proportion=0.2),
    MedianCombination(),
    QuantileCombination(q=0.9),
    AttentionCombination(8, n_hidden=4, dropout=0.1, readout=True),
    ConfidenceWeightedCombination(temperature=2.0, learnable=True),
]
assert_type(boltzmann.combine(torch.zeros(3)), Tensor)
assert_type(boltzmann.pose_weights(torch.zeros(3)), Tensor)
assert_type(as_mtenn_combination(boltzmann), torch.nn.Module)

# Use a model -----------------------------------------------------------------------------------

net = torch.nn.Linear(3, 1)
model = MultiPoseModel(net, "boltzmann", gradients="stored")
MultiPoseModel(net, boltzmann, gradients="recomputed", collate=torch.stack, chunk_size=4)
MultiPoseModel(net, ["mean", boltzmann], tasks=["affinity", "solubility"], skip_below=None)
MultiPoseModel(net, DepthThree(), gradients="stored", check_finite=False, shared=net, tasks=2)

out = model(torch.randn(5, 3))
assert_type(out, MultiPoseOutput)
assert_type(out.prediction, Tensor)
assert_type(out.pose_predictions, Tensor)
prediction, pose_predictions = model([torch.randn(3)], [1], {"docking_score": [0.5]})
assert_type(prediction, Tensor)
model(torch.randn(5, 3), sizes=torch.tensor([2, 3]), collated=True)
model(torch.randn(5, 3), ptr=[0, 2, 5], shared_inputs=[torch.zeros(2)] * 2)
assert_type(model.pose_weights(out.pose_predictions, sizes=[2, 3]), Tensor)
assert_type(model.train(), MultiPoseModel)
assert_type(model.combination, Combination | torch.nn.ModuleList)

estimate = model.estimate(torch.randn(5, 3))
assert_type(estimate, Estimate)
assert_type(estimate.best, GradientMode)
assert_type(estimate.modes[0].gradients, GradientMode)
MultiPoseModel(net, boltzmann, gradients=estimate.best)
assert_type(estimate.free, int | None)
assert_type(estimate.modes, tuple[ModeCost, ...])
assert_type(estimate.modes[0].memory, int)

three = DepthThree()
parameter = torch.zeros(1, requires_grad=True)
assert_type(three([torch.zeros(())], {"w": [torch.zeros(1)]}, ["w"], parameter), Tensor)

# Look up combinations --------------------------------------------------------------------------

assert_type(registry, Registry)
assert_type(registry.names(), list[str])
cls: type[Combination] = registry.get("boltzmann")
assert_type(cls.properties, frozenset[str])
unvalidated: Combination = registry.get("boltzmann", validate=False)(0.593, learnable=True)
assert_type(registry.create("boltzmann", kT=0.593), Combination)
assert_type(registry.create("boltzmann", 0.593, validate=False), Combination)
assert_type(registry.from_checkpoint("model.pt"), Combination | list[Combination])
assert_type(registry.info("boltzmann"), PluginRecord)
assert_type(registry.info("boltzmann").distribution, str | None)
assert_type(registry.problems(), list[Problem])
assert_type(registry.check("boltzmann", level="gate"), list[Report])
assert_type(list(registry), list[str])
assert_type("boltzmann" in registry, bool)
registry.register("depth-one", DepthOne)
with registry.temporary({"depth-two": DepthTwo}) as temporary:
    assert_type(temporary, Registry)
registry.policy = Policy(prefer=("mtenn-boltzmann",), disabled=("mean",))

# Error bars ------------------------------------------------------------------------------------

weights = boltzmann.pose_weights(torch.zeros(3))
assert_type(effective_poses(weights), Tensor)
assert_type(propagated_error(weights, torch.ones(3)), Tensor)
assert_type(jackknife_error(boltzmann, torch.zeros(3)), Tensor)
assert_type(jackknife_error(boltzmann, torch.zeros(3), sizes=[2, 1]), Tensor)

# Catch errors ----------------------------------------------------------------------------------

try:
    model(torch.randn(5, 3))
except PredictionError as error:
    assert_type(error.pose, int | None)
    assert_type(error.compound, int | None)
except GradientError as error:
    assert_type(error.parameter, str | None)
except GradientValidationError as error:
    assert_type(error.report, Report | None)
except RegistryError as error:
    assert_type(error.record, PluginRecord | None)

# Test a combination ----------------------------------------------------------------------------

report = check_combination(DepthOne(), level="gate", seed=1)
assert_type(report, Report)
assert_type(report.passed, bool)
assert_type(report.records, list[Record])
assert_type(report.failures[0].reason, str)
check_combination(DepthOne)
check_combination(lambda: OfSomeColumns(3))  # or a function
assert_type(Report.from_json(report.to_json()), Report)


class TestDepthOne(CombinationConformance):
    """Inherit the suite."""

    combination = DepthOne
    level = "quality"
    expected_failures = {"D3": "the reason"}


class TestOneInstance(CombinationConformance):
    """Inherit the suite for an instance."""

    combination = DepthTwo(kT=2.0)


def of_three_columns() -> Combination:
    """Make an instance."""
    return OfSomeColumns(3)


class TestOneFunction(CombinationConformance):
    """Inherit the suite for a function."""

    combination = staticmethod(of_three_columns)


@parametrize_with_checks([DepthOne, DepthTwo(kT=2.0)])
def test_all(check: Any) -> None:
    """Use the decorator."""
