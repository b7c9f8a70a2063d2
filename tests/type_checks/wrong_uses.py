"""Uses of the public interface that type checkers must refuse, each on a line of its own.

Each of these lines has a comment for mypy and one for pyright. If a checker finds nothing wrong in
a line, the comment is unnecessary, which is an error. Pyright accepts three signatures that mypy
refuses. Nothing runs this file.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnusedExpression=false, reportUnusedImport=false

import torch
from mtenn_boltzmann import BoltzmannCombination
from mtenn_max import MaxCombination
from mtenn_mean import MeanCombination
from torch import Tensor

from mtenn_core import Combination, MultiPoseModel, Policy, errors, jackknife_error, registry
from mtenn_core.testing import CombinationConformance, Report, check_combination

# isort: split
from mtenn_core import MultiPosModel  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]

# Models ----------------------------------------------------------------------------------------

net = torch.nn.Linear(3, 1)
model = MultiPoseModel(net, "boltzmann")
poses = torch.randn(5, 3)
MultiPoseModel(net)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
MultiPoseModel(net, 3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
MultiPoseModel(net, BoltzmannCombination)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
MultiPoseModel(net, "mean", "stored")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
MultiPoseModel(net, "mean", gradients="store")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
MultiPoseModel(net, "mean", gradient="stored")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
MultiPoseModel(net, "mean", kT=0.593)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
MultiPoseModel(net, "mean", chunk_size="all")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
model()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
model(poses, sizes="3")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
model(poses, size=[3, 2])  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
model(poses, [3, 2], None, [0, 3, 5])  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
model(poses).predictions  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
model(poses).prediction + "1"  # type: ignore[operator]  # pyright: ignore[reportOperatorIssue]
model(poses).backward()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
model.pose_weights(poses, size=[3])  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
model.estimate(poses).fastest  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
model.estimate(poses, group=None)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]

# Combinations ----------------------------------------------------------------------------------

MeanCombination(kT=1.0)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
BoltzmannCombination(kt=1.0)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
BoltzmannCombination(kT="1.0")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
BoltzmannCombination(learnable=3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
MaxCombination(False, 1.0, False, False, True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
BoltzmannCombination().pose_weights()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
BoltzmannCombination().combine([1.0, 2.0])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
MeanCombination()(poses)  # type: ignore[arg-type, call-arg]  # pyright: ignore[reportCallIssue]
MeanCombination().split_grad_dict([poses])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


class NoTensor(Combination):
    def combine(self, predictions: Tensor) -> float:  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
        return 0.0


class NoPredictions(Combination):
    def combine(self) -> Tensor:  # type: ignore[override]
        return torch.zeros(())


class TooFew(Combination):
    def forward(self, pred_list: list[Tensor], grad_dict: dict[str, list[Tensor]]) -> Tensor:  # type: ignore[override]
        return pred_list[0]


class OtherOrder(Combination):
    def forward(  # type: ignore[override]
        self,
        grad_dict: dict[str, list[Tensor]],
        pred_list: list[Tensor],
        param_names: list[str],
        *model_params: Tensor,
    ) -> Tensor:
        return pred_list[0]


class WrongFacts(Combination):
    min_poses = "two"  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    properties = ["bounded"]  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    pose_inputs = {"score": "float"}  # type: ignore[dict-item]  # pyright: ignore[reportAssignmentType]
    examples = {"kT": 1.0}  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]

    def combine(self, predictions: Tensor) -> Tensor:
        return predictions.mean()


# The registry, errors and tests ----------------------------------------------------------------

registry.gets("mean")  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
registry.get("mean", valid=False)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
registry.get("mean").pose_weight  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
registry.get(BoltzmannCombination)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
registry.create("mean", validate="no")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
registry.create("mean").pose_weights()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
registry.register("mean", MeanCombination())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
registry.info("mean").nam  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
Policy(prefer="mtenn-mean")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
Policy(blocked=("mean",))  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
errors.PredictionErr  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
errors.PredictionError("text", pose="first")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
jackknife_error("mean", poses)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
check_combination("mean")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
check_combination(MeanCombination(), level="all")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
check_combination(MeanCombination()).pased  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
Report("mean").passed = True  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]


class TestString(CombinationConformance):
    combination = "mean"  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    level = "all"  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
