"""The zoo: combinations that are right, with the facts that each of them needs.

Some break what a check might take for granted: that weights sum to 1, are positive, or do not
depend on the order of the poses.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from mtenn_core import Combination
from mtenn_core.combination import InputKind
from mtenn_core.gradients import check_gradients, stack_predictions

from .bases import (
    ClosedForm,
    FullDepth,
    LearnableFullDepth,
    Plain,
    boltzmann_mean,
    boltzmann_weights,
    positive,
    smooth_max,
    soft_weights,
    widened,
)


@dataclass(frozen=True)
class Right:
    """What a combination is, and how to make one."""

    name: str
    make: Callable[[], Combination]


_zoo: list[Right] = []


def right(name: str, zoo: list[Right] = _zoo, /, **arguments):
    """Put a class into a zoo, made with these arguments."""

    def add(cls):
        zoo.append(Right(name, (lambda: cls(**arguments)) if arguments else cls))
        return cls

    return add


# Depth 1: the value alone. Linear in the predictions, or nearly.


@right("sum")
class Sum(Combination):
    properties = frozenset({"permutation_invariant", "monotone"})

    def combine(self, predictions):
        return predictions.sum()


@right("mean in another unit: weights of 239")
class InOtherUnits(Combination):
    def combine(self, predictions):
        return 239.0 * predictions.mean()


@right("mean by a loop over the poses")
class Loop(Combination):
    properties = frozenset({"permutation_invariant", "translation_equivariant", "bounded"})

    def combine(self, predictions):
        total = predictions[0]
        for prediction in predictions[1:]:
            total = total + prediction
        return total / len(predictions)


@right("first pose alone: all other weights are zero")
class First(Combination):
    properties = frozenset({"translation_equivariant", "bounded", "idempotent", "monotone"})

    def combine(self, predictions):
        return predictions[0] + 0 * predictions.sum()  # a NaN in any pose stays one


@right("earlier poses weigh more")
class ByPosition(Combination):
    """Docking programs list their best pose first."""

    properties = frozenset({"translation_equivariant", "bounded", "idempotent", "monotone"})

    def combine(self, predictions):
        n_poses = len(predictions)
        rank = torch.arange(1, n_poses + 1, dtype=predictions.dtype, device=predictions.device)
        return (predictions / rank).sum() / (1 / rank).sum()


@right("mean of the poses that are not NaN")
class IgnoresNaN(Combination):
    properties = frozenset({"ignores_nan", "permutation_invariant", "bounded"})

    def combine(self, predictions):
        return predictions[~predictions.isnan()].mean()


@right("mean in float32, whatever the predictions are")
class InFloat32(Combination):
    def combine(self, predictions):
        return predictions.float().mean()


@right("string argument: how to reduce", how="sum")
class ByName(Combination):
    examples = ({}, {"how": "sum"}, {"how": "smooth"})

    def __init__(self, how="mean"):
        super().__init__()
        rules = {"mean": torch.mean, "sum": torch.sum, "smooth": self._smooth}
        if how not in rules:
            raise ValueError(f"how must be one of {sorted(rules)}; found {how!r}")
        self.how = how

    @staticmethod
    def _smooth(predictions):
        return smooth_max(predictions, 1.0)

    def combine(self, predictions):
        rules = {"mean": torch.mean, "sum": torch.sum, "smooth": self._smooth}
        return rules[self.how](predictions)


# Kinks: order statistics.


@right("median")
class Median(Combination):
    smooth = False
    properties = frozenset({"permutation_invariant", "translation_equivariant", "bounded"})

    def combine(self, predictions):
        return predictions.median()


@right("quantile, interpolated", q=0.3)
class Quantile(Combination):
    smooth = False
    properties = frozenset({"permutation_invariant", "translation_equivariant", "idempotent"})
    examples = ({}, {"q": 0.75})

    def __init__(self, q=0.25):
        super().__init__()
        if not 0 < q < 1:
            raise ValueError(f"q must lie between 0 and 1; found {q}")
        self.q = q

    def combine(self, predictions):
        return predictions.quantile(self.q)


@right("mean of the two largest")
class LargestTwo(Combination):
    min_poses, smooth = 2, False
    properties = frozenset({"permutation_invariant", "bounded", "monotone"})

    def combine(self, predictions):
        return predictions.topk(2).values.mean()


@right("integer argument: mean of the k smallest", k=3)
class Smallest(Combination):
    min_poses, smooth = 4, False
    examples = ({}, {"k": 1}, {"k": 3})

    def __init__(self, k=2):
        super().__init__()
        if not (isinstance(k, int) and 1 <= k <= self.min_poses):
            raise ValueError(f"k must be an int from 1 to {self.min_poses}; found {k!r}")
        self.k = k

    def combine(self, predictions):
        lowest = predictions.topk(self.k, largest=False).values.mean()
        return lowest + 0 * predictions.sum()  # topk takes NaN for large


@right("trimmed mean, without the lowest and the highest")
class Trimmed(Combination):
    min_poses, smooth = 3, False
    properties = frozenset({"permutation_invariant", "translation_equivariant", "bounded"})

    def combine(self, predictions):
        return predictions.sort().values[1:-1].mean() + 0 * predictions.sum()


@right("hard maximum, ties share")
class HardMax(Combination):
    smooth = False
    properties = frozenset({"permutation_invariant", "bounded", "replication_invariant"})

    def combine(self, predictions):
        return predictions.amax()


@right("middle of the range")
class MidRange(Combination):
    smooth = False

    def combine(self, predictions):
        return (predictions.amin() + predictions.amax()) / 2


# Spread.


@right("mean less the standard deviation, torch.std")
class LessDeviation(Combination):
    min_poses = 2
    properties = frozenset({"permutation_invariant", "translation_equivariant", "idempotent"})

    def combine(self, predictions):
        return predictions.mean() - predictions.std()


@right("mean less the standard deviation, by hand")
class LessDeviationByHand(Combination):
    """The square root has no derivative at ties."""

    min_poses, smooth = 2, False
    properties = frozenset({"permutation_invariant", "translation_equivariant"})

    def combine(self, predictions):
        centred = predictions - predictions.mean()
        return predictions.mean() - (centred.square().sum() / (len(predictions) - 1)).sqrt()


@right("root mean square")
class RootMeanSquare(Combination):
    properties = frozenset({"permutation_invariant", "replication_invariant"})

    def combine(self, predictions):
        return torch.linalg.vector_norm(predictions) / math.sqrt(len(predictions))


@right("eps argument: root mean square without a kink at zero", eps=0.01)
class SoftRootMeanSquare(Combination):
    properties = frozenset({"permutation_invariant", "replication_invariant"})
    examples = ({}, {"eps": 4.0})

    def __init__(self, eps=1.0):
        super().__init__()
        self.eps = positive("eps", eps)

    def combine(self, predictions):
        return (predictions.square().mean() + self.eps).sqrt()


# Predictions that lie in an interval.


@right("power mean of positive predictions", power=3.0)
class PowerMean(Combination):
    domain = (0.0, math.inf)
    properties = frozenset({"permutation_invariant", "bounded", "monotone", "idempotent"})
    examples = ({}, {"power": 5.0})

    def __init__(self, power=2.0):
        super().__init__()
        self.power = positive("power", power)

    def combine(self, predictions):
        largest = predictions.amax().detach()
        return largest * (predictions / largest).pow(self.power).mean().pow(1 / self.power)


@right("geometric mean of positive predictions")
class Geometric(Combination):
    domain = (0.0, math.inf)
    properties = frozenset({"permutation_invariant", "bounded", "monotone", "idempotent"})

    def combine(self, predictions):
        return predictions.log().mean().exp()


@right("harmonic mean of positive predictions")
class Harmonic(Combination):
    domain = (0.0, math.inf)
    properties = frozenset({"permutation_invariant", "bounded", "monotone", "idempotent"})

    def combine(self, predictions):
        return 1 / (1 / predictions).mean()


@right("noisy or of probabilities")
class NoisyOr(Combination):
    domain = (0.0, 1.0)
    properties = frozenset({"permutation_invariant", "monotone"})

    def combine(self, predictions):
        return -torch.expm1(torch.log1p(-predictions).sum())


@right("Tsallis escort mean of positive predictions", q=1.25)
class Escort(Combination):
    """Σ p_i y_i with p_i ∝ (1 + (q - 1) y_i)^(-q / (q - 1))."""

    domain = (0.0, math.inf)
    properties = frozenset({"permutation_invariant", "bounded", "replication_invariant"})
    examples = ({}, {"q": 3.0})

    def __init__(self, q=2.0):
        super().__init__()
        if not (q > 1 and math.isfinite(q)):
            raise ValueError(f"q must be finite and above 1; found {q}")
        self.q = q

    def combine(self, predictions):
        scores = -self.q / (self.q - 1) * torch.log1p((self.q - 1) * predictions)
        return (torch.softmax(scores, dim=0) * predictions).sum()


# Exponentials.


@right("plain smooth maximum: grows with the number of poses", t=2.0)
class SmoothMax(Plain):
    properties = frozenset({"permutation_invariant", "translation_equivariant", "monotone"})


@right("boolean argument: log-mean-exp or log-sum-exp", normalize=False)
class LogMeanExp(Combination):
    properties = frozenset({"permutation_invariant", "translation_equivariant"})
    examples = ({}, {"normalize": False})

    def __init__(self, normalize=True):
        super().__init__()
        if not isinstance(normalize, bool):
            raise TypeError(f"normalize must be a bool; found {normalize!r}")
        self.normalize = normalize

    def combine(self, predictions):
        count = len(predictions) if self.normalize else 1
        return torch.logsumexp(predictions, dim=0) - math.log(count)


@right("required argument: Boltzmann mean without a default temperature", kT=0.593)
class RequiredArgument(Combination):
    properties = frozenset({"permutation_invariant", "translation_equivariant", "bounded"})
    examples = ({"kT": 0.593}, {"kT": 2.5})

    def __init__(self, kT):
        super().__init__()
        self.kT = positive("kT", kT)

    def combine(self, predictions):
        return boltzmann_mean(predictions, 1 / self.kT)


@right("branches on the data: whichever end is further is the pivot")
class Branches(Combination):
    properties = frozenset({"translation_equivariant", "monotone"})

    def combine(self, predictions):
        pivot = predictions[0] if predictions[0] > predictions[-1] else predictions.amax()
        return pivot + torch.logsumexp(predictions - pivot, dim=0)


# Random numbers and state.


@right("Gumbel softmax")
class Gumbel(Combination):
    stochastic = True

    def combine(self, predictions):
        noise = -(-torch.rand_like(predictions).clamp(1e-6, 1 - 1e-6).log()).log()
        return (torch.softmax(predictions + noise, dim=0) * predictions).sum()


@right("dropout of poses")
class PoseDropout(Combination):
    stochastic = True
    examples = ({}, {"p": 0.75})

    def __init__(self, p=0.5):
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"p must lie in [0, 1); found {p}")
        self.p = p

    def combine(self, predictions):
        keep = torch.ones_like(predictions)
        kept = torch.nn.functional.dropout(keep, self.p, self.training)
        # Half of the value is the plain mean, so that an empty draw says something.
        return ((kept + 1) / 2 * predictions).mean()


@right("deviation from a running average, kept in a buffer")
class Running(Combination):
    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros(()))

    def combine(self, predictions):
        deviations = predictions - self.centre
        if self.training:
            self.centre = torch.lerp(self.centre, predictions.detach().mean().to(self.centre), 0.1)
        return boltzmann_mean(deviations, 1.0)


@right("the last hundred values kept as numbers, for a log")
class KeepsSomeNumbers(Plain):
    def __init__(self, t=1.0):
        super().__init__(t)
        self.history = deque(maxlen=100)

    def combine(self, predictions):
        value = super().combine(predictions)
        if not torch.compiler.is_compiling() and value.device.type == "cpu":
            # Transforms of torch.func have no numbers.
            with suppress(RuntimeError):
                self.history.append(value.item())
        return value


@right("logarithm of the number of poses from a cache")
class CachedLogarithm(Plain):
    def combine(self, predictions):
        return super().combine(predictions) - log_of(len(predictions)) / self.t


@cache
def log_of(n_poses):
    return math.log(n_poses)


# Parameters of its own.


@right("softmin with a learnable temperature")
class LearnableSoftmin(Combination):
    properties = frozenset({"permutation_invariant", "translation_equivariant", "monotone"})
    examples = ({}, {"kT": 0.3})

    def __init__(self, kT=1.0):
        super().__init__()
        self.kT = positive("kT", kT)
        self.log_kT = torch.nn.Parameter(torch.tensor(math.log(kT)))

    def combine(self, predictions):
        return -smooth_max(-predictions, torch.exp(-self.log_kT))


@right("softmin with a temperature that softplus keeps positive")
class SoftplusSoftmin(LearnableSoftmin):
    def __init__(self, kT=1.0):
        super().__init__(kT)
        del self.log_kT
        self.raw = torch.nn.Parameter(torch.tensor(math.log(math.expm1(kT))))

    def combine(self, predictions):
        return -smooth_max(-predictions, 1 / torch.nn.functional.softplus(self.raw))


@right("closed form with a learnable temperature", kT=0.593)
class LearnableBoltzmann(LearnableSoftmin):
    properties = frozenset({"permutation_invariant", "translation_equivariant", "bounded"})

    def combine(self, predictions):
        return boltzmann_mean(predictions, torch.exp(-self.log_kT))

    def pose_weights(self, predictions):
        return boltzmann_weights(predictions, torch.exp(-self.log_kT))


class Network(Combination):
    """Owns layers, the same ones each time."""

    def layers(self, *sizes: int) -> torch.nn.Sequential:
        with torch.random.fork_rng():
            torch.manual_seed(sum(sizes))
            layers = [
                layer
                for n_in, n_out in pairwise(sizes)
                for layer in (torch.nn.Linear(n_in, n_out), torch.nn.Tanh())
            ]
        return torch.nn.Sequential(*layers[:-1])

    @staticmethod
    def run(layers: torch.nn.Sequential, inputs: Tensor) -> Tensor:
        """Apply layers, in their dtype, and return that of the inputs."""
        return layers(inputs.to(layers[0].weight.dtype)).to(inputs.dtype)


@right("attention over the predictions")
class Attention(Network):
    properties = frozenset({"permutation_invariant", "translation_equivariant", "bounded"})

    def __init__(self):
        super().__init__()
        self.scores = self.layers(1, 8, 1)

    def combine(self, predictions):
        centred = predictions - predictions.mean()
        attention = torch.softmax(self.run(self.scores, centred[:, None])[:, 0], dim=0)
        return predictions.mean() + (attention * centred).sum()


@right("self-attention between all pairs of poses")
class PairAttention(Network):
    properties = frozenset({"permutation_invariant", "translation_equivariant", "bounded"})

    def __init__(self):
        super().__init__()
        self.log_width = torch.nn.Parameter(torch.tensor(0.2))

    def combine(self, predictions):
        apart = predictions[:, None] - predictions[None, :]
        attention = torch.softmax(-apart.square() * torch.exp(-self.log_width), dim=1)
        return (attention @ predictions).mean()


@right("network on sorted statistics")
class Statistics(Network):
    smooth = False
    properties = frozenset({"permutation_invariant", "translation_equivariant"})

    def __init__(self):
        super().__init__()
        self.network = self.layers(3, 8, 1)

    def combine(self, predictions):
        ranked = (predictions - predictions.mean()).sort().values
        statistics = torch.stack([ranked[0], ranked[len(ranked) // 2], ranked[-1]])
        return predictions.mean() + self.run(self.network, statistics)[0]


@right("deep sets")
class DeepSets(Network):
    properties = frozenset({"permutation_invariant", "replication_invariant"})

    def __init__(self):
        super().__init__()
        self.of_pose, self.of_compound = self.layers(1, 8, 4), self.layers(5, 8, 1)

    def combine(self, predictions):
        mean = predictions.mean()
        embedded = self.run(self.of_pose, predictions[:, None]).mean(dim=0)
        return mean + self.run(self.of_compound, torch.cat([embedded, torch.tanh(mean)[None]]))[0]


@right("wrapper around another combination")
class Mirrored(Combination):
    examples = ({"inner": LogMeanExp()}, {"inner": LearnableSoftmin(0.5)})

    def __init__(self, inner: Combination | None = None):
        super().__init__()
        self.inner = LearnableSoftmin() if inner is None else inner

    def combine(self, predictions):
        return -self.inner.combine(-predictions)


# Depths 2 and 3.


@right("closed form of the smooth maximum", t=10.0)
class SharpClosedForm(ClosedForm):
    properties = frozenset({"permutation_invariant", "translation_equivariant", "monotone"})

    def reference(self, predictions: Tensor) -> Tensor:
        total, extreme = 0.0, max(predictions.tolist())
        for prediction in predictions:
            total = total + torch.exp(self.t * (prediction - extreme))
        return extreme + torch.log(total) / self.t


@right("closed form that starts from the derived one")
class FromTheDerived(Plain):
    """Twice the smooth maximum."""

    def combine(self, predictions):
        return 2 * super().combine(predictions)

    def pose_weights(self, predictions):
        return super().pose_weights(predictions).clone()


@right("full depth", t=3.0)
class AtFullDepth(FullDepth):
    properties = frozenset({"permutation_invariant", "translation_equivariant", "monotone"})


@right("full depth that returns a pair")
class AsMtennReturns(FullDepth):
    """Of mtenn 0.5 and later; the first of the pair counts."""

    def forward(self, pred_list, *rest):
        return super().forward(pred_list, *rest), self.stacked(pred_list)


@right("full depth with combine beside it")
class WithCombine(FullDepth):
    def combine(self, predictions):
        return smooth_max(predictions, self.t)


@right("full depth, negative weights", t=2.0)
class BoltzmannFullDepth(FullDepth):
    properties = frozenset({"translation_equivariant", "bounded"})

    def value(self, y):
        return boltzmann_mean(y, self.t)

    def weights(self, y):
        return boltzmann_weights(y, self.t)


@right("full depth, its unit converted after the function")
class ConvertedAfterwards(FullDepth):
    """What backward of the output is called with is not what the function sees."""

    def apply_function(self, *args):
        return 0.593 * super().apply_function(*args)


@right("full depth with a parameter of its own", t=0.7)
class WithParameter(LearnableFullDepth):
    pass


@right("full depth as the guide teaches it, once_differentiable")
class Guide(Combination):
    def forward(self, pred_list, grad_dict, param_names, *model_params):
        check_gradients(len(stack_predictions(pred_list)), grad_dict, param_names, model_params)
        return GuideFunction.apply(pred_list, grad_dict, param_names, *model_params)


class GuideFunction(torch.autograd.Function):
    """ln Σ exp(ŷ_i), and per parameter a stack of weighted gradients that is summed."""

    @staticmethod
    def forward(pred_list, grad_dict, param_names, *model_params):
        predictions = torch.stack(pred_list).flatten()
        return torch.logsumexp(widened(predictions), dim=0).to(predictions.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pred_list, grad_dict, param_names, *_ = inputs
        ctx.keys, gradients = Combination.split_grad_dict(grad_dict)
        ctx.param_names = param_names
        ctx.save_for_backward(torch.stack(pred_list).flatten(), *gradients)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        predictions, *gradients = ctx.saved_tensors
        grad_dict = Combination.join_grad_dict(ctx.keys, gradients)
        weights = soft_weights(widened(predictions), 1.0)
        combined = {}
        for name, of_poses in grad_dict.items():
            weighted = [
                widened(grad_output) * weight * widened(gradient)
                for weight, gradient in zip(weights, of_poses, strict=True)
            ]
            combined[name] = torch.stack(weighted, dim=-1).sum(dim=-1).to(of_poses[0].dtype)
        return None, None, None, *(combined[name] for name in ctx.param_names)


@right("full depth as the guide teaches it, word for word")
class GuideWordForWord(Combination):
    """Everything that the contract asks for, and nothing of what the suite advises."""

    def forward(self, pred_list, grad_dict, param_names, *model_params):
        return GuideWordForWordFunction.apply(pred_list, grad_dict, param_names, *model_params)


class GuideWordForWordFunction(torch.autograd.Function):
    """ln Σ exp(ŷ_i) in the dtype of the predictions, with a zip and with a second derivative."""

    @staticmethod
    def forward(pred_list, grad_dict, param_names, *model_params):
        return torch.logsumexp(torch.stack(pred_list).flatten(), dim=0).detach()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pred_list, grad_dict, param_names, *model_params = inputs
        ctx.keys, gradients = Combination.split_grad_dict(grad_dict)
        ctx.param_names = param_names
        ctx.save_for_backward(torch.stack(pred_list).flatten(), *gradients, *model_params)

    @staticmethod
    def backward(ctx, grad_output):
        predictions, *saved = ctx.saved_tensors
        grad_dict = Combination.join_grad_dict(ctx.keys, saved[: len(ctx.keys)])
        value = torch.logsumexp(predictions.detach(), dim=0)
        combined = {}
        for name, of_poses in grad_dict.items():
            pairs = zip(of_poses, predictions)  # noqa: B905 - the guide's zip is not strict
            weighted = [gradient * (prediction - value).exp() for gradient, prediction in pairs]
            combined[name] = torch.stack(weighted, dim=-1).detach().sum(dim=-1)
        for gradient in combined.values():
            gradient *= grad_output
        return None, None, None, *(combined[name] for name in ctx.param_names)


@right("combine by an autograd function that refuses a second derivative")
class RefusesSecondDerivative(Plain):
    def combine(self, predictions):
        return RefusingFunction.apply(predictions, self.t)


class RefusingFunction(torch.autograd.Function):
    @staticmethod
    def forward(y, t):
        return smooth_max(y, t)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(soft_weights(*inputs))

    @staticmethod
    def backward(ctx, go):
        if torch.is_grad_enabled():
            raise RuntimeError("the weights are constants, so there is no second derivative")
        (weights,) = ctx.saved_tensors
        return go * weights, None


# What a buffer may be used for, and arguments that seldom show.


@right("scale in a buffer")
class ScaleInBuffer(Combination):
    def __init__(self, t=2.0):
        super().__init__()
        self.register_buffer("t", torch.tensor(positive("t", t)))

    def combine(self, predictions):
        return smooth_max(predictions, self.t.to(predictions))


@right("scale that runs along with the predictions")
class RunningScale(Combination):
    def __init__(self):
        super().__init__()
        self.register_buffer("size", torch.ones(()))

    def combine(self, predictions):
        value = smooth_max(predictions, (1 / (1 + self.size)).to(predictions))
        if self.training:
            self.size.lerp_(predictions.detach().abs().mean().to(self.size), 0.1)
        return value


@right("best k, or all of fewer")
class BestUpTo(Combination):
    smooth = False

    def __init__(self, k=10):
        super().__init__()
        self.k = positive("k", k)

    def combine(self, predictions):
        k = min(int(self.k), len(predictions))
        return predictions.topk(k, largest=False).values.mean()


@right("layers of a width")
class Layers(Combination):
    def __init__(self, width=8):
        super().__init__()
        self.score = torch.nn.Sequential(
            torch.nn.Linear(1, width), torch.nn.Tanh(), torch.nn.Linear(width, 1)
        )

    def combine(self, predictions):
        y = predictions.to(self.score[0].weight.dtype)
        scores = self.score(y[:, None])[:, 0]
        return (torch.softmax(scores, dim=0) * y).sum().to(predictions.dtype)


@right("concentrations: a domain without a near end")
class Concentration(Combination):
    domain = (0.0, 1e9)

    def combine(self, predictions):
        return predictions.log().mean().exp()


# Further numbers for each pose.


class WithPrior(Combination):
    """Boltzmann mean of the predictions, with a prior energy for each pose beside them."""

    pose_inputs = ("prior",)
    properties = frozenset({"permutation_invariant", "translation_equivariant", "bounded"})
    examples = ({}, {"kT": 0.3})

    def __init__(self, kT=0.593):
        super().__init__()
        self.kT = positive("kT", kT)

    def combine(self, predictions, prior):
        lowest = predictions.amin().detach()
        populations = torch.softmax(-(predictions - lowest + prior) / self.kT, dim=0)
        return lowest + (populations * (predictions - lowest)).sum()

    def reference(self, predictions, prior):
        energies = predictions + prior
        factors = ((energies.amin() - energies) / self.kT).exp()
        return (factors * predictions).sum() / factors.sum()


right("pose input: Boltzmann mean with a prior")(WithPrior)


@right("pose input: Boltzmann mean with a prior, closed form", kT=2.0)
class WithPriorClosedForm(WithPrior):
    def pose_weights(self, predictions, prior):
        above = predictions - predictions.amin()
        populations = torch.softmax(-(above + prior) / self.kT, dim=0)
        return populations * (1 + ((populations * above).sum() - above) / self.kT)


class ScoreWeighted(Combination):
    """Mean of the predictions, weighted by docking scores."""

    pose_inputs = ("docking_score",)
    properties = frozenset(
        {"permutation_invariant", "translation_equivariant", "monotone", "replication_invariant"}
    )

    def combine(self, predictions, docking_score):
        return (torch.softmax(-docking_score, dim=0) * predictions).sum()


right("pose input: mean weighted by docking scores")(ScoreWeighted)


@right("pose input: mean weighted by docking scores, closed form")
class ScoreWeightedClosedForm(ScoreWeighted):
    def pose_weights(self, predictions, docking_score):
        return torch.softmax(-docking_score, dim=0)


@right("pose input: mean weighted by docking scores, full depth")
class ScoreWeightedFullDepth(Combination):
    pose_inputs = ("docking_score",)
    properties = frozenset({"permutation_invariant", "translation_equivariant", "bounded"})

    def forward(self, pred_list, grad_dict, param_names, *model_params, docking_score):
        check_gradients(len(stack_predictions(pred_list)), grad_dict, param_names, model_params)
        return ScoreFunction.apply(pred_list, docking_score, grad_dict, param_names, *model_params)


class ScoreFunction(torch.autograd.Function):
    """Σ w_i ŷ_i, and the same sum of the gradients."""

    @staticmethod
    def forward(pred_list, score, grad_dict, param_names, *model_params):
        y = stack_predictions(pred_list)
        return (torch.softmax(-widened(score), dim=0) * widened(y)).sum().to(y.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pred_list, score, grad_dict, ctx.param_names, *_ = inputs
        ctx.keys, gradients = Combination.split_grad_dict(grad_dict)
        ctx.save_for_backward(score, stack_predictions(pred_list), *gradients)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        score, y, *gradients = ctx.saved_tensors
        populations = torch.softmax(-widened(score), dim=0)
        weights = widened(grad_output) * populations
        # ∂h/∂s_i = -p_i (ŷ_i - h); a learned score needs it.
        of_score = -weights * (widened(y) - (populations * widened(y)).sum())
        sums = {}
        for name, of_poses in Combination.join_grad_dict(ctx.keys, gradients).items():
            stacked = torch.stack(list(of_poses))
            sums[name] = torch.tensordot(weights, widened(stacked), 1).to(stacked.dtype)
        of_model = (sums[name] for name in ctx.param_names)
        return None, of_score.to(score.dtype), None, None, *of_model


@right("two pose inputs: penalties, and a learnable trust in docking scores")
class PenaltyAndScore(Combination):
    pose_inputs = ("penalty", "docking_score")
    properties = frozenset({"permutation_invariant", "translation_equivariant"})

    def __init__(self):
        super().__init__()
        self.trust = torch.nn.Parameter(torch.tensor(0.7))

    def combine(self, predictions, penalty, docking_score):
        weights = torch.softmax(-self.trust * docking_score, dim=0)
        return (weights * (predictions + penalty.square())).sum()


@right("pose input and kinks: the lowest prediction after a correction")
class LowestCorrected(Combination):
    smooth = False
    pose_inputs = ("correction",)
    properties = frozenset({"permutation_invariant", "translation_equivariant", "monotone"})

    def combine(self, predictions, correction):
        return (predictions + correction).amin()


@right("pose input: the prediction of the pose that docks best")
class BestDocked(Combination):
    pose_inputs = ("docking_score",)
    properties = frozenset({"permutation_invariant", "bounded", "monotone", "idempotent"})

    def combine(self, predictions, docking_score):
        return predictions[docking_score.argmin()]


# Labels as pose inputs: integers that are compared, or used as indices.


@right("label as a pose input: mean over clusters of the lowest in each")
class LowestOfClusters(Combination):
    smooth = False
    pose_inputs = ("cluster",)
    properties = frozenset({"permutation_invariant", "translation_equivariant", "bounded"})

    def combine(self, predictions, cluster):
        lowest = [predictions[cluster == label].amin() for label in cluster.unique()]
        return torch.stack(lowest).mean()


@right("label as a pose input: mean of the means of all chains, by scatter")
class MeanOfChains(Combination):
    pose_inputs = ("chain_id",)
    properties = frozenset({"permutation_invariant", "bounded", "monotone", "idempotent"})

    def combine(self, predictions, chain_id):
        chain = chain_id.long()
        sums = predictions.new_zeros(int(chain.max()) + 1).index_add(0, chain, predictions)
        counts = torch.bincount(chain, minlength=len(sums))
        return (sums / counts.clamp(min=1)).sum() / (counts > 0).sum()


@right("label as a pose input: one learned weight for each of two kinds, by one_hot")
class LearnedByKind(Combination):
    pose_inputs = ("kind",)
    properties = frozenset({"permutation_invariant", "translation_equivariant"})

    def __init__(self):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor([0.3, -0.4]))

    def combine(self, predictions, kind):
        scores = torch.nn.functional.one_hot(kind.long(), 2).to(self.logits) @ self.logits
        return (torch.softmax(scores, dim=0).to(predictions) * predictions).sum()


@right("label as a pose input: table of factors for the charge state, closed form")
class ByChargeState(Combination):
    pose_inputs = ("charge",)
    properties = frozenset({"permutation_invariant", "translation_equivariant", "bounded"})

    def weights(self, predictions, charge):
        table = predictions.new_tensor([0.5, 1.0, 0.25])
        factors = table[charge.long() + 1]
        return factors / factors.sum()

    def combine(self, predictions, charge):
        return (self.weights(predictions, charge) * predictions).sum()

    def pose_weights(self, predictions, charge):
        return self.weights(predictions, charge)


@right("a label and a score as pose inputs")
class ClustersAndScores(Combination):
    """Each cluster counts as its best pose does."""

    pose_inputs = ("cluster", "docking_score")
    properties = frozenset({"permutation_invariant", "translation_equivariant"})

    def combine(self, predictions, cluster, docking_score):
        same = (cluster[:, None] == cluster[None, :]).to(predictions)
        return (torch.softmax(-docking_score, 0) * (same @ predictions) / same.sum(1)).sum()


@right("label as a pose input: 0 or 1, and nothing else")
class CrystalPosesCountMore(Combination):
    pose_inputs = ("is_crystal",)
    properties = frozenset({"permutation_invariant", "translation_equivariant", "bounded"})

    def combine(self, predictions, is_crystal):
        if not set(is_crystal.tolist()) <= {0.0, 1.0}:
            raise ValueError("is_crystal must be 0 or 1")
        weights = 1 + 2 * is_crystal.to(predictions)
        return (weights * predictions).sum() / weights.sum()


@right("label as a pose input: ranks from 1 on")
class InverseRank(Combination):
    pose_inputs = ("rank",)
    properties = frozenset({"permutation_invariant", "translation_equivariant", "bounded"})

    def combine(self, predictions, rank):
        if (rank < 1).any():
            raise ValueError("ranks start at 1")
        weights = 1 / rank.to(predictions)
        return (weights * predictions).sum() / weights.sum()


@right("label as a pose input: probabilities, which are refused outside of 0 to 1")
class Probabilities(Combination):
    pose_inputs = ("probability",)

    def combine(self, predictions, probability):
        if ((probability < 0) | (probability > 1)).any():
            raise ValueError("probability must be in [0, 1]")
        weights = probability.to(predictions)
        return (weights * predictions).sum() / (weights.sum() + 1e-3)


@right("label as a pose input: weights that are not negative, with a sum that is not 0")
class NonNegativeWeights(Combination):
    pose_inputs = ("weight",)

    def combine(self, predictions, weight):
        if (weight < 0).any():
            raise ValueError("weight must not be negative")
        return (weight * predictions).sum() / weight.sum()


@right("label as a pose input: mean of the means of all clusters, by a loop")
class MeanOfClusters(Combination):
    pose_inputs = ("cluster",)
    properties = frozenset({"permutation_invariant", "translation_equivariant", "bounded"})

    def combine(self, predictions, cluster):
        means = [predictions[cluster == label].mean() for label in cluster.unique()]
        return torch.stack(means).mean()


@right("label as a pose input: mean of the means of all clusters, by unique and index_add")
class MeanOfClustersByIndex(MeanOfClusters):
    def combine(self, predictions, cluster):
        labels, index = torch.unique(cluster, return_inverse=True)
        zeros = predictions.new_zeros(len(labels))
        sums = zeros.index_add(0, index, predictions)
        counts = zeros.index_add(0, index, torch.ones_like(predictions))
        return (sums / counts).mean()


@right("label as a pose input: each pose has one share of its cluster")
class InverseSizeOfClusters(MeanOfClusters):
    def combine(self, predictions, cluster):
        sizes = (cluster[:, None] == cluster[None, :]).sum(1)
        weights = 1 / sizes.to(predictions)
        return (weights * predictions).sum() / weights.sum()


@right("a label and a score as pose inputs, where the score counts only within a group")
class WeightsWithinChains(Combination):
    pose_inputs = ("chain", "score")
    properties = frozenset({"permutation_invariant", "translation_equivariant", "bounded"})

    def combine(self, predictions, chain, score):
        means = []
        for label in chain.unique():
            mine = chain == label
            means.append((torch.softmax(-score[mine], 0) * predictions[mine]).sum())
        return torch.stack(means).mean()


# Pose inputs of a declared kind.


class Degeneracies(Combination):
    """The free energy -kT ln Σ g_i exp(-y_i / kT) of states with degeneracies g_i."""

    pose_inputs: ClassVar[dict[str, InputKind]] = {"degeneracy": "positive"}
    properties = frozenset({"permutation_invariant", "translation_equivariant", "monotone"})
    examples = ({}, {"kT": 0.3})

    def __init__(self, kT=0.593):
        super().__init__()
        self.kT = positive("kT", kT)

    def combine(self, predictions, degeneracy):
        return -self.kT * torch.logsumexp(degeneracy.log() - predictions / self.kT, dim=0)

    def reference(self, predictions, degeneracy):
        lowest = predictions.amin()
        factors = degeneracy * ((lowest - predictions) / self.kT).exp()
        return lowest - self.kT * factors.sum().log()


right("positive pose input: free energy with degeneracies")(Degeneracies)


@right("positive pose input: free energy with degeneracies, closed form", kT=2.0)
class DegeneraciesClosedForm(Degeneracies):
    def pose_weights(self, predictions, degeneracy):
        return torch.softmax(degeneracy.log() - predictions / self.kT, dim=0)


@right("positive pose input: mean with weights, closed form")
class PositiveWeights(Combination):
    pose_inputs: ClassVar[dict[str, InputKind]] = {"weight": "positive"}
    properties = frozenset({"permutation_invariant", "translation_equivariant", "bounded"})

    def combine(self, predictions, weight):
        if not (weight > 0).all():
            raise ValueError("weights must be positive")
        return (weight * predictions).sum() / weight.sum()

    def pose_weights(self, predictions, weight):
        return weight / weight.sum()


@right("positive and real pose inputs: logarithms of concentrations, and a strain")
class LogConcentrations(Combination):
    pose_inputs: ClassVar[dict[str, InputKind]] = {"concentration": "positive", "strain": "real"}
    properties = frozenset({"permutation_invariant", "translation_equivariant"})

    def combine(self, predictions, concentration, strain):
        return (predictions + strain + concentration.log() / math.log(10)).mean()


class Microstates(Combination):
    """Boltzmann means of each charge state, weighted by the populations of the states at a pH."""

    pose_inputs: ClassVar[dict[str, InputKind]] = {"charge": "label"}
    properties = frozenset({"permutation_invariant", "translation_equivariant"})

    def __init__(self, kT=0.593, pH_above_pKa=0.7):
        super().__init__()
        self.kT = positive("kT", kT)
        if not math.isfinite(pH_above_pKa):
            raise ValueError(f"pH_above_pKa must be finite; found {pH_above_pKa}")
        self.pH_above_pKa = pH_above_pKa

    def combine(self, predictions, charge):
        same = charge[:, None] == charge[None, :]
        energies = (predictions - predictions.amin()) / self.kT
        within = torch.where(same, -energies, -torch.inf).softmax(dim=1)
        # Each state counts once, however many of its microstates there are.
        states = torch.softmax(-math.log(10) * self.pH_above_pKa * charge - same.sum(1).log(), 0)
        return (states * (within @ predictions)).sum()


right("declared label: populations within charge states, then over them at a pH")(Microstates)


@right("declared label: populations within charge states, by a loop")
class MicrostatesByLoop(Microstates):
    def combine(self, predictions, charge):
        means, states = [], []
        for state in charge.unique():
            own = predictions[charge == state]
            means.append((torch.softmax(-own / self.kT, dim=0) * own).sum())
            states.append(-math.log(10) * self.pH_above_pKa * state)
        return (torch.softmax(torch.stack(states), dim=0) * torch.stack(means)).sum()


@right("declared label: ranks from 1 on")
class DeclaredRanks(InverseRank):
    pose_inputs: ClassVar[dict[str, InputKind]] = {"rank": "label"}


@right("declared label: a table of two rows, and a learned strain")
class TableAndStrain(Combination):
    pose_inputs: ClassVar[dict[str, InputKind]] = {"kind": "label", "strain": "real"}
    properties = frozenset({"permutation_invariant"})

    def combine(self, predictions, kind, strain):
        factors = predictions.new_tensor([1.0, 0.5])[kind.long()]
        return smooth_max(factors * (predictions - 0.1 * strain.square()), 1.0)


@right("pose input that must not be learned: an error if it requires a gradient")
class ConstantScore(ScoreWeighted):
    def combine(self, predictions, docking_score):
        if docking_score.requires_grad:
            raise ValueError("docking_score has no derivative here; pass docking_score.detach()")
        return super().combine(predictions, docking_score)


RIGHT: tuple[Right, ...] = tuple(_zoo)
