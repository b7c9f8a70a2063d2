"""The bank of mistakes in rules for vectors, which take several numbers per pose.

A mistake is written as what differs from a right rule of :mod:`bank.right_vectors`.
"""

from __future__ import annotations

import math
from functools import partial
from typing import ClassVar

import torch

from mtenn_core import Combination
from mtenn_core._engine.known_gradients import refuse_double_backward

from .right_vectors import (
    POOLING,
    Confidence,
    ConfidenceClosedForm,
    Covariances,
    Gated,
    LearnedQuery,
    LogSumExp,
    Mapped,
    MaxOfColumns,
    MeanOfColumns,
    OfLowestCharge,
    PositiveColumn,
    SelfAttention,
    Strained,
    TanhSets,
    Tempered,
)
from .wrong import Wrong, away_from_one, default
from .wrong import wrong as into_bank

_bank: list[Wrong] = []
wrong = partial(into_bank, bank=_bank)


# The closed form of a number: ∂/∂y_i = p_i and ∂/∂c_i = t p_i (y_i - h), with p = softmax(t c). C1.


@wrong("columns: softmax over the columns in the weights", "C1")
class WeightsOverColumns(ConfidenceClosedForm):
    def pose_weights(self, predictions):
        affinity = predictions[:, 0]
        shares = torch.softmax(self.t * predictions, dim=1)[:, 1]
        above = affinity - affinity.amin()
        return torch.stack([shares, self.t * shares * (above - shares @ above)], dim=1)


@wrong("columns: weights transposed by reshape", "C1", "transposed")
class WeightsTransposed(ConfidenceClosedForm):
    def pose_weights(self, predictions):
        return super().pose_weights(predictions).T.reshape(predictions.shape)


@wrong("columns: weights of another pose", "C1", "shifted by one pose")
class WeightsOfOtherPose(ConfidenceClosedForm):
    def pose_weights(self, predictions):
        return super().pose_weights(predictions).roll(1, 0)


@wrong("columns: weights with the columns in reverse order", "C1", "reverse order")
class WeightsOfOtherColumn(ConfidenceClosedForm):
    def pose_weights(self, predictions):
        return super().pose_weights(predictions).flip(1)


@wrong("columns: weights of all columns summed", "C1", "all columns are summed")
class WeightsSummed(ConfidenceClosedForm):
    def pose_weights(self, predictions):
        return super().pose_weights(predictions).sum(1, keepdim=True).expand_as(predictions)


@wrong("columns: weights divided by the number of columns", "C1", "n_columns")
class WeightsOverNumber(ConfidenceClosedForm):
    def pose_weights(self, predictions):
        return super().pose_weights(predictions) / predictions.shape[1]


@wrong("columns: one weight 1 % off", "C1", "only the weights of column 1 ('confidence')")
class OneWeight(ConfidenceClosedForm):
    def pose_weights(self, predictions):
        weights = super().pose_weights(predictions)
        weights[len(weights) // 2, 1] *= 1.01
        return weights


@wrong("columns: weights of the confidences without the combined prediction", "C1", "'confidence'")
class WithoutProductRule(ConfidenceClosedForm):
    """p_i y_i in place of p_i (y_i - h)."""

    def pose_weights(self, predictions):
        affinity, confidence = predictions.unbind(1)
        shares = self.shares(confidence)
        return torch.stack([shares, self.t * shares * affinity], dim=1)


@wrong("columns: weights of the confidences are zero", "C1", "'confidence') are wrong: they are ze")
class ConstantConfidence(ConfidenceClosedForm):
    def pose_weights(self, predictions):
        weights = super().pose_weights(predictions)
        return torch.stack([weights[:, 0], 0 * weights[:, 1]], dim=1)


@wrong("columns: weights without t for the confidences", "C1", "'confidence'", make=away_from_one)
class WithoutScale(ConfidenceClosedForm):
    def pose_weights(self, predictions):
        affinity, confidence = predictions.unbind(1)
        shares = self.shares(confidence)
        above = affinity - affinity.amin()
        return torch.stack([shares, shares * (above - shares @ above)], dim=1)


@wrong("columns: weights wrong for one pose", "C1")
class WrongForOnePose(ConfidenceClosedForm):
    def pose_weights(self, predictions):
        weights = super().pose_weights(predictions)
        return 0.99 * weights if len(weights) == 1 else weights


@wrong("columns: weights wrong above six poses", "C1")
class WrongAboveSix(ConfidenceClosedForm):
    def pose_weights(self, predictions):
        weights = super().pose_weights(predictions)
        return 1.01 * weights if len(weights) > 6 else weights


@wrong("columns: weights wrong above fifty poses", "B3")
class WrongAboveFifty(ConfidenceClosedForm):
    def pose_weights(self, predictions):
        weights = super().pose_weights(predictions)
        return 1.01 * weights if len(weights) > 50 else weights


@wrong("columns: weights of the columns of a matrix 1 % off in one number", "C1", make=default)
class OneNumber(TanhSets):
    def pose_weights(self, predictions):
        w = self.w.clone()
        w[1, 2] *= 1.01
        return (1 - torch.tanh(predictions @ self.w).square()) * self.r @ w.T


@wrong(
    "columns: a mean over the poses in the value is missing in the weights",
    "C1",
    "n_poses",
    make=default,
)
class MeanInValue(TanhSets):
    def combine(self, predictions):
        return super().combine(predictions) / len(predictions)


@wrong("columns: weights of the second column for the first", "C1", make=default)
class WeightsOfWeight(PositiveColumn):
    def pose_weights(self, predictions):
        weights = super().pose_weights(predictions)
        return torch.stack([weights[:, 0], weights[:, 0]], dim=1)


@wrong(
    "columns: weights with one number for each pose", "A2", "pose_weights must return", make=default
)
class WeightsOfPoses(PositiveColumn):
    def pose_weights(self, predictions):
        return super().pose_weights(predictions)[:, 0]


@wrong("columns: weights beside a value that is a vector", "A2", "pose_weights", make=default)
class WeightsOfVector(MeanOfColumns):
    def pose_weights(self, predictions):
        return torch.full_like(predictions, 1 / len(predictions))


# Parts of combine without a derivative. C1.


@wrong("columns: a gate is detached", "C1", "is the column detached")
class DetachedGate(Confidence):
    def shares(self, confidence):
        return super().shares(confidence.detach())


@wrong("columns: a gate under no_grad", "C1", "is the column detached")
class GateUnderNoGrad(Confidence):
    @torch.no_grad()
    def shares(self, confidence):
        return super().shares(confidence)


@wrong("columns: attention detached", "C1", make=default)
class DetachedAttention(Gated):
    def attention(self, predictions):
        return super().attention(predictions).detach()


@wrong("columns: keys of self-attention detached", "C1", make=default)
class DetachedKeys(SelfAttention):
    def scores(self, predictions):
        return self.q(predictions) @ self.k(predictions.detach()).T / math.sqrt(4)


@wrong("columns: the confidence of the first pose is detached", "C1")
class DetachedFirstPose(Confidence):
    def shares(self, confidence):
        return super().shares(torch.cat([confidence[:1].detach(), confidence[1:]]))


@wrong("columns: one entry of the value ignores its gradient", "C1")
class DetachedEntry(LogSumExp):
    pose_columns = 3

    def combine(self, predictions):
        values = super().combine(predictions)
        return torch.cat([values[:1], values[1:2].detach(), values[2:]])


@wrong("columns: right for two columns, and detached beyond", "C1", "5 column(s)")
class DetachedBeyondTwo(LogSumExp):
    def combine(self, predictions):
        return super().combine(torch.cat([predictions[:, :2], predictions[:, 2:].detach()], dim=1))


@wrong("columns: reshaped to two columns, whatever their number", "C1", "", make=default)
class AlwaysTwo(MeanOfColumns):
    def combine(self, predictions):
        return predictions.reshape(-1, 2).mean(0)


@wrong("columns: a kink that is not declared", "C1", "kink", make=default)
class UndeclaredMaximum(Combination):
    pose_columns = 3

    def combine(self, predictions):
        return predictions.amax(0)


# Derivatives of a vector by an autograd function: what becomes of grad_output. C1, B1, A10.


@wrong("columns: Jacobian transposed", "C1", "Jacobian is transposed", make=default)
class TransposedJacobian(Mapped):
    """A matrix, whose derivative is the matrix and not its transpose."""

    def combine(self, predictions):
        return TransposedFunction.apply(predictions, self.w).mean(0)


class TransposedFunction(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(y, w):
        return y @ w

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, go):
        refuse_double_backward()
        y, w = ctx.saved_tensors
        return go @ w, y.T @ go


@wrong("columns: gradient of the first entry taken for all", "C1", make=default)
class FirstGradOutput(Mapped):
    def of_predictions(self, go, y, w):
        return super().of_predictions(go[0].expand_as(go), y, w)


@wrong("columns: mean of the gradients of the entries taken for each", "C1", make=default)
class MeanGradOutput(Mapped):
    def of_predictions(self, go, y, w):
        return super().of_predictions(go.mean().expand_as(go), y, w)


@wrong("columns: gradient of the second entry ignored", "C1", make=default)
class IgnoredGradOutput(Mapped):
    def of_predictions(self, go, y, w):
        return super().of_predictions(go * go.new_tensor([1.0, 0.0, 1.0]), y, w)


@wrong("columns: gradients of two entries swapped", "C1", make=default)
class SwappedGradOutput(Mapped):
    def of_predictions(self, go, y, w):
        return super().of_predictions(go[[1, 0, 2]], y, w)


@wrong("columns: gradients of the entries ignored", "B1", "grad_output", make=default)
class NoGradOutput(Mapped):
    def of_predictions(self, go, y, w):
        return super().of_predictions(torch.ones_like(go), y, w)


@wrong("columns: absolute gradients of the entries", "B1", "", make=default)
class AbsoluteGradOutput(Mapped):
    def of_predictions(self, go, y, w):
        return super().of_predictions(go.abs(), y, w)


@wrong("columns: gradients of the entries clamped to ±100", "B1", "", make=default)
class ClampedGradOutput(Mapped):
    def of_predictions(self, go, y, w):
        return super().of_predictions(go.clamp(-100, 100), y, w)


@wrong("columns: features of another pose in backward", "C1", make=default)
class FeaturesOfOtherPose(Mapped):
    def of_predictions(self, go, y, w):
        return super().of_predictions(go, y.roll(1, 0), w)


@wrong("columns: features of another column in backward", "C1", make=default)
class FeaturesOfOtherColumn(Mapped):
    def of_predictions(self, go, y, w):
        return super().of_predictions(go, y, w.roll(1, 0))


@wrong("columns: double backward without the derivative of the saved tanh", "A10", "", make=default)
class HalfOfTheHessian(Mapped):
    def combine(self, predictions):
        return HalfFunction.apply(predictions @ self.w).mean(0)


class HalfFunction(torch.autograd.Function):
    """tanh, whose backward keeps numbers and not the graph of its result."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z):
        return torch.tanh(z)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.slopes = 1 - torch.tanh(inputs[0]).square()

    @staticmethod
    def backward(ctx, go):
        return go * ctx.slopes


# Parameters of its own. C3.


@wrong("columns: one entry of an own parameter's gradient 1 % off", "C3", "'w'", make=default)
class OneEntryOfParameter(Mapped):
    def of_w(self, go, y, w):
        gradient = super().of_w(go, y, w)
        gradient[1, 2] *= 1.01
        return gradient


@wrong("columns: an own parameter's gradient transposed", "C3", "'w'", make=default)
class ParameterTransposed(Mapped):
    def of_w(self, go, y, w):
        return super().of_w(go, y, w).T


@wrong("columns: an own parameter's gradient of the first pose alone", "C3", "'w'", make=default)
class ParameterOfFirstPose(Mapped):
    def of_w(self, go, y, w):
        return super().of_w(go, y[:1], w)


@wrong("columns: an own parameter's gradient ignores the second entry", "C3", "'w'", make=default)
class ParameterIgnoresEntry(Mapped):
    def of_w(self, go, y, w):
        return super().of_w(go * go.new_tensor([1.0, 0.0, 1.0]), y, w)


@wrong(
    "columns: one of 192 entries of an own parameter's gradient 1 % off",
    "C3",
    "weight",
    make=default,
)
class OneOfManyEntries(LearnedQuery):
    def combine(self, predictions):
        value = self.value[0]
        weight = OneEntryFunction.apply(value.weight)
        return torch.softmax(predictions @ self.query, dim=0) @ (predictions @ weight.T)


class OneEntryFunction(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(weight):
        return weight.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, go):
        gradient = go.clone()
        gradient[3, 17] *= 1.01
        return gradient


@wrong("columns: a learned temperature detached", "C3", "'log_t'", make=default)
class DetachedTemperature(Tempered):
    def attention(self, predictions):
        scores = self.score(self.gate(predictions))
        return torch.softmax(scores * self.log_t.detach().exp(), dim=0)


@wrong("columns: a readout made under no_grad", "C3", "detached, or not used", make=default)
class DetachedReadout(Gated):
    def __init__(self, n_columns=4):
        super().__init__(n_columns)
        self.readout = self.layers(n_columns, 1)

    def combine(self, predictions):
        return super().combine(predictions) @ self.readout[0].weight[0].detach()


@wrong("columns: matrices in a plain list", "C3", "Parameter", make=default)
class PlainList(Combination):
    pose_columns = 3

    def __init__(self):
        super().__init__()
        self.matrices = [torch.eye(3, dtype=torch.float64).requires_grad_()]

    def combine(self, predictions):
        return (predictions @ self.matrices[0].to(predictions.dtype)).tanh().mean(0)


# Shapes and signatures. A2.


@wrong("columns: mean over the columns in place of the poses", "A2", "dim=0", make=default)
class MeanOverColumns(MeanOfColumns):
    def combine(self, predictions):
        return predictions.mean(1)


@wrong("columns: the axis of the poses is kept", "A2", "dim=0", make=default)
class KeepsAxis(MeanOfColumns):
    def combine(self, predictions):
        return predictions.mean(0, keepdim=True)


@wrong("columns: as many results as poses", "A2", "number of poses", make=default)
class AsManyAsPoses(MeanOfColumns):
    def combine(self, predictions):
        return torch.cat([predictions.mean(0), predictions[1:, 0]])


@wrong("columns: a list of numbers", "A2", "expected a tensor", make=default)
class ListOfNumbers(MeanOfColumns):
    def combine(self, predictions):
        return [*predictions.mean(0)]


@wrong("columns: result in float32", "A2", "dtype", make=default)
class InFloat32(MeanOfColumns):
    def combine(self, predictions):
        return predictions.float().mean(0)


@wrong("columns: the value is detached", "A2", "gradient", make=default)
class WithoutGraph(MeanOfColumns):
    def combine(self, predictions):
        return predictions.detach().mean(0)


# Values. D1, D2, D3, D4, D5.


@wrong("columns: softmax over the columns in the value", "D1", "")
class ValueOverColumns(Confidence):
    def combine(self, predictions):
        shares = torch.softmax(self.t * predictions, dim=1)[:, 1]
        return (shares / shares.sum()) @ predictions[:, 0]


@wrong("columns: confidences of another pose in the value", "D2", "order of the poses")
class ValueOfOtherPose(Confidence):
    def shares(self, confidence):
        return super().shares(confidence.roll(1))


@wrong("columns: a reference with the entries in another order", "D1", "", make=default)
class OtherOrder(MaxOfColumns):
    def reference(self, predictions):
        return super().reference(predictions).flip(0)


@wrong("columns: a reference with one number for a vector", "D1", "shape", make=default)
class ReferenceOfOneNumber(MaxOfColumns):
    def reference(self, predictions):
        return predictions.amax()


@wrong("columns: masked poses still count in the sum of the weights", "D1", "", make=default)
class LeakingMask(OfLowestCharge):
    def combine(self, predictions, charge):
        kept = (~self.others(charge)).to(predictions)
        return (self.shares(predictions[:, 1]) * kept) @ predictions[:, 0]


@wrong("columns: masked poses have a score of 0 in place of -inf", "D1", "", make=default)
class MaskOfZero(OfLowestCharge):
    def combine(self, predictions, charge):
        masked = predictions[:, 1].masked_fill(self.others(charge), 0.0)
        return self.shares(masked) @ predictions[:, 0]


@wrong("columns: the mask of another compound", "A6", "cache", make=default)
class MaskOfOther(OfLowestCharge):
    def others(self, charge):
        kept = self.__dict__.setdefault("masks", {})
        return kept.setdefault(len(charge), super().others(charge))


@wrong("columns: said not to depend on the order, the first pose counts twice", "D2", "order")
class FirstTwice(LogSumExp):
    properties = frozenset({"permutation_invariant"})

    def combine(self, predictions):
        return super().combine(torch.cat([predictions[:1], predictions]))

    reference = Combination.reference


@wrong("columns: said to be replication invariant, and a sum", "D2", "twice", make=default)
class SumOfSets(TanhSets):
    properties = POOLING


@wrong("columns: said to be idempotent, and one number", "D2", "shape", make=default)
class IdempotentNumber(TanhSets):
    properties = frozenset({"idempotent"})


@wrong("columns: said to be monotone, and one entry falls", "D2", "negative", make=default)
class OneFalls(MeanOfColumns):
    properties = frozenset({"monotone"})
    reference = Combination.reference

    def combine(self, predictions):
        means = predictions.mean(0)
        return torch.cat([means[:-1], -means[-1:]])


@wrong("columns: said to be bounded, and one entry doubles", "D2", "range", make=default)
class OneDoubles(MeanOfColumns):
    properties = frozenset({"bounded"})
    reference = Combination.reference

    def combine(self, predictions):
        means = predictions.mean(0)
        return torch.cat([means[:-1], 2 * means[-1:]])


@wrong("columns: NaN in one column taken for zero", "D3", "NaN", make=default)
class NanInOneColumn(MeanOfColumns):
    def combine(self, predictions):
        last = predictions[:, -1:].nan_to_num(0.0, math.inf, -math.inf)
        return torch.cat([predictions[:, :-1], last], dim=1).mean(0)


@wrong("columns: poses with NaN in any column left out", "D3", "NaN", make=default)
class NanLeftOut(MeanOfColumns):
    def combine(self, predictions):
        broken = predictions.isnan().any(1)
        return predictions[~broken].mean(0) if broken.any() else predictions.mean(0)


@wrong("columns: infinite numbers taken for zero", "D3", "infin", make=default)
class InfinityAsZero(MeanOfColumns):
    def combine(self, predictions):
        return predictions.nan_to_num(math.nan, 0.0, 0.0).mean(0)


@wrong("columns: exponentials without a shift", "D3", "exp()", make=default)
class Overflows(Confidence):
    def combine(self, predictions):
        factors = predictions[:, 1].exp()
        return (factors @ predictions[:, 0]) / factors.sum()


@wrong("columns: standard deviations without a derivative at ties", "D3", "ties", make=default)
class Deviations(Covariances):
    def combine(self, predictions):
        return (predictions - predictions.mean(0)).square().mean(0).sqrt()


@wrong("columns: scores in half precision", "D4", "", make=default)
class HalfScores(Confidence):
    def shares(self, confidence):
        if confidence.dtype == torch.float64:
            return super().shares(confidence)
        return super().shares(confidence.bfloat16()).to(confidence.dtype)


class Shrunk(ConfidenceClosedForm):
    """Has a second argument: a part of the plain mean is added."""

    examples = ({}, {"share": 0.5})

    def __init__(self, t=1.0, share=0.25):
        super().__init__(t)
        self.share = share

    def combine(self, predictions):
        return super().combine(predictions) + self.share * predictions[:, 0].mean()

    reference = Combination.reference

    def pose_weights(self, predictions):
        weights = super().pose_weights(predictions)
        uniform = torch.full_like(weights[:, 0], self.share / len(weights))
        return weights + torch.stack([uniform, 0 * uniform], dim=1)


@wrong("columns: the weights know an argument at its default only", "D5", "share")
class DefaultAlone(Shrunk):
    def pose_weights(self, predictions):
        weights = ConfidenceClosedForm.pose_weights(self, predictions)
        uniform = torch.full_like(weights[:, 0], 0.25 / len(weights))
        return weights + torch.stack([uniform, 0 * uniform], dim=1)


@wrong("columns: an argument is ignored", "D5", "share")
class IgnoredArgument(Shrunk):
    combine = ConfidenceClosedForm.combine
    pose_weights = ConfidenceClosedForm.pose_weights


@wrong("columns: a named column is ignored", "D5", "column 1 ('weight')", make=default)
class IgnoredColumn(PositiveColumn):
    pose_weights = Combination.pose_weights

    def combine(self, predictions):
        return predictions[:, 0].mean()


@wrong("columns: only the first two of any number count", "D5", "column 2", make=default)
class FirstTwoColumns(MeanOfColumns):
    reference = Combination.reference

    def combine(self, predictions):
        return predictions[:, :2].mean(0)


@wrong(
    "columns: the last column is ignored for more than four of an argument",
    "D5",
    "column",
    make=default,
)
class LastColumnIgnored(Gated):
    examples = ({"n_columns": 3}, {"n_columns": 5})

    def __init__(self, n_columns=3):
        super().__init__(n_columns)

    def combine(self, predictions):
        return super().combine(predictions)[:4].sum() + 0 * predictions.sum()

    def gate(self, predictions):
        used = torch.arange(predictions.shape[1], device=predictions.device) < 4
        return super().gate(torch.where(used, predictions, 0.0))


# Rules for any number of columns that are right for two of them, which the usual probes have.


class Pooled(Combination):
    """Σ_i p_i y_i with p = softmax(t Σ_j y_ij / k), where t is a parameter."""

    pose_columns = "any"
    properties = POOLING

    def __init__(self):
        super().__init__()
        self.t = torch.nn.Parameter(torch.tensor(0.3))

    def combine(self, predictions):
        return torch.softmax(self.t * predictions.mean(1), dim=0) @ predictions


@wrong("columns: the value is that for two columns", "D1", "wrong for 5", make=default)
class ScaledForTwo(Pooled):
    def combine(self, predictions):
        return torch.softmax(self.t * predictions.sum(1) / 2, dim=0) @ predictions

    def reference(self, predictions):
        return Pooled.combine(self, predictions)


@wrong("columns: more than two depend on the order", "D2", "wrong for 5", make=default)
class OrderedAboveTwo(Pooled):
    def combine(self, predictions):
        first_two = super().combine(predictions)[:2]
        return torch.cat([first_two, predictions[:, 2:].cumsum(0).mean(0)])


@wrong("columns: a parameter is detached above two", "C3", "wrong for 5", make=default)
class ParameterDetachedAboveTwo(Pooled):
    def combine(self, predictions):
        t = self.t if predictions.shape[1] <= 2 else self.t.detach()
        return torch.softmax(t * predictions.mean(1), dim=0) @ predictions


@wrong("columns: all above the eighth are detached", "C1", "wrong for 40", make=default)
class DetachedAboveEight(Pooled):
    def combine(self, predictions):
        padded = torch.cat([predictions[:, :8], predictions[:, 8:].detach()], dim=1)
        return super().combine(padded)


# Pose inputs beside the columns. C4, D5.


@wrong("columns: a pose input is detached above two", "C4", "wrong for 5", make=default)
class InputDetachedAboveTwo(Strained):
    pose_columns = "any"

    def combine(self, predictions, strain):
        strain = strain if predictions.shape[1] <= 2 else strain.detach()
        return super().combine(predictions, strain)


@wrong("columns: a pose input is detached", "C4", "detaches")
class InputDetached(Strained):
    def combine(self, predictions, strain):
        return super().combine(predictions, strain.detach())


@wrong("columns: a pose input of another pose", "D2", "order of the poses", make=default)
class InputOfOtherPose(Strained):
    properties = POOLING

    def combine(self, predictions, strain):
        return super().combine(predictions, strain.roll(1))


@wrong("columns: weights that leave a pose input out", "C1")
class WeightsWithoutInput(Strained):
    """One number: the sum of the pooled vector."""

    properties = frozenset()
    reference = Combination.reference

    def combine(self, predictions, strain):
        return super().combine(predictions, strain).sum()

    def pose_weights(self, predictions, strain):
        return torch.full_like(predictions, 1 / len(predictions))


# State and side effects. A4 to A9.


@wrong("columns: embeddings shifted in place", "A4", "in place", make=default)
class ShiftedInPlace(MeanOfColumns):
    def combine(self, predictions):
        predictions -= predictions.detach().mean(0)
        return super().combine(predictions)


@wrong("columns: dropout that is not declared", "A5", "stochastic", make=default)
class UndeclaredDropout(MeanOfColumns):
    properties = frozenset()
    reference = Combination.reference

    def combine(self, predictions):
        return torch.nn.functional.dropout(predictions, 0.25, self.training).mean(0)


@wrong(
    "columns: centred by a running mean that leaks from compound to compound",
    "A6",
    "state",
    make=default,
)
class RunningMean(MeanOfColumns):
    properties = frozenset()
    reference = Combination.reference

    def combine(self, predictions):
        means = predictions.detach().mean(0)
        before = self.__dict__.get("means", means)
        self.__dict__["means"] = (
            0.9 * before + 0.1 * means if before.shape == means.shape else means
        )
        return (predictions - self.__dict__["means"]).square().mean(0)


@wrong("columns: the embeddings of the last call are the keys of this one", "A6", "", make=default)
class KeysOfLastCall(Combination):
    pose_columns = 3

    def combine(self, predictions):
        keys = self.__dict__.get("keys", {}).get(predictions.shape)
        keys = predictions if keys is None else keys
        self.__dict__.setdefault("keys", {})[predictions.shape] = predictions.detach().clone()
        return torch.softmax(predictions @ keys.T.sum(1), dim=0) @ predictions


@wrong("columns: weights from the attention that combine left", "A6", "state")
class WeightsOfCombine(ConfidenceClosedForm):
    def combine(self, predictions):
        self.__dict__["last"] = super().shares(predictions[:, 1]).detach()
        return super().combine(predictions)

    def pose_weights(self, predictions):
        shares, above = self.__dict__["last"], predictions[:, 0] - predictions[:, 0].amin()
        return torch.stack([shares, self.t * shares * (above - shares @ above)], dim=1)


@wrong("columns: the maximum in eval, the softmax in training", "A7", "eval")
class OtherInEval(LogSumExp):
    def combine(self, predictions):
        return super().combine(predictions) if self.training else predictions.amax(0)


@wrong("columns: batch statistics in training, fixed ones in eval", "A7", "eval", make=default)
class BatchStatistics(Mapped):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(3))

    def combine(self, predictions):
        centred = predictions - predictions.mean(0)
        spread = (centred.square().mean(0) + 0.1).sqrt() if self.training else self.scale
        return super().combine(predictions / spread)


@wrong("columns: embeddings kept on the instance", "A8", "", make=default)
class KeepsEmbeddings(MeanOfColumns):
    def combine(self, predictions):
        self.__dict__["embeddings"] = predictions
        return super().combine(predictions)


@wrong("columns: pickling loses the scale", "A9", "", make=default)
class LosesScale(LogSumExp):
    def __init__(self, t=3.0):
        super().__init__(t)

    def __reduce__(self):
        return type(self), (1.0,)


@wrong("columns: reads the whole matrix that a column is a view of", "A12", "memory", make=default)
class ReadsBase(MeanOfColumns):
    def combine(self, predictions):
        base = predictions if predictions._base is None else predictions._base
        scale = 1 + 0.1 * base.detach().double().mean().nan_to_num().tanh()
        return super().combine(predictions) * scale.to(predictions)


@wrong("columns: a query made on the default device", "A13", "device", make=default)
class QueryOnDefaultDevice(Combination):
    pose_columns = 3

    def combine(self, predictions):
        query = torch.linspace(-1, 1, 3, dtype=predictions.dtype)
        return torch.softmax(predictions @ query, dim=0) @ predictions


# The rule for vmap, which only a batch of compounds uses. A14.


class MappedInBatches(Mapped):
    """A rule for one compound, and one by hand for a batch."""

    function: ClassVar[type[torch.autograd.Function]]

    def combine(self, predictions):
        return self.function.apply(torch.tanh(predictions))


class MeanFunction(torch.autograd.Function):
    @staticmethod
    def forward(y):
        return y.mean(0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        (y,) = inputs
        ctx.n_poses = len(y)

    @staticmethod
    def backward(ctx, go):
        return go.expand(ctx.n_poses, -1) / ctx.n_poses


class OverCompounds(MeanFunction):
    @staticmethod
    def vmap(info, in_dims, y):
        return y.mean(0).mean(0).expand(info.batch_size, -1), 0


class OverColumns(MeanFunction):
    @staticmethod
    def vmap(info, in_dims, y):
        return y.mean(2)[:, :1].expand(-1, y.shape[2]), 0


class ByNumberOfCompounds(MeanFunction):
    @staticmethod
    def vmap(info, in_dims, y):
        return y.sum(1) / len(y), 0


class Standardized(MeanFunction):
    """Means less those of all compounds in the batch, as a batch normalization would have it."""

    @staticmethod
    def vmap(info, in_dims, y):
        return y.mean(1) - 1e-3 * y.mean((0, 1)), 0


@wrong("columns: in a batch, a mean over the compounds", "A14", "rule for vmap", make=default)
class BatchOverCompounds(MappedInBatches):
    function = OverCompounds


@wrong("columns: in a batch, a mean over the columns", "A14", "rule for vmap", make=default)
class BatchOverColumns(MappedInBatches):
    function = OverColumns


@wrong("columns: in a batch, divided by the number of compounds", "A14", "vmap", make=default)
class BatchByNumber(MappedInBatches):
    function = ByNumberOfCompounds


@wrong("columns: in a batch, statistics of all compounds", "A14", "vmap", make=default)
class BatchStandardized(MappedInBatches):
    function = Standardized


# A whole model, and many columns.


@wrong("columns: one of 48 columns 1 % off", "C1", "column 37", make=default)
class OneOfManyColumns(Combination):
    pose_columns = 48

    def combine(self, predictions):
        return OneColumnFunction.apply(predictions).tanh().mean(0)


class OneColumnFunction(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(y):
        return y.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, go):
        off = torch.ones_like(go[0])
        off[37] = 1.01
        return go * off


@wrong("columns: poses after the first 64 are detached", "B3", "", make=default)
class DetachedAfterSixtyFour(MeanOfColumns):
    """Further poses count in the value alone."""

    properties = frozenset()
    reference = Combination.reference

    def combine(self, predictions):
        kept = predictions[:64]
        return (kept.sum(0) + predictions[64:].detach().sum(0)) / len(predictions)


WRONG_VECTORS: tuple[Wrong, ...] = tuple(_bank)
