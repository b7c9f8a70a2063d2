"""The bank: combinations with one mistake each.

A mistake is written as what differs from a right combination of :mod:`bank.bases`. Each names the
check of the catalogue that ought to catch it, and a word that a good message would have.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from mtenn_core import Combination
from mtenn_core._torch_internals import INTERFACES
from mtenn_core.combination import InputKind
from mtenn_core.gradients import check_gradients, stack_predictions

from .bases import (
    ClosedForm,
    FullDepth,
    Function,
    LearnableFullDepth,
    Plain,
    Scaled,
    boltzmann_mean,
    boltzmann_weights,
    positive,
    smooth_max,
    soft_weights,
    widened,
)


@dataclass(frozen=True)
class Wrong:
    """A mistake.

    Attributes
    ----------
    name : the mistake, in words
    make : the combination at a scale t, which it may ignore
    check : the check of the catalogue that ought to catch it first
    cause : a word or two that a good message would contain, or nothing
    """

    name: str
    make: Callable[[float], Combination]
    check: str
    cause: str = ""


_bank: list[Wrong] = []


def wrong(name: str, check: str, cause: str = "", *, make=None, bank: list[Wrong] = _bank):
    """Put a class into a bank; ``make`` makes it of t, unless the class itself does."""

    def add(cls):
        made = cls if make is None else lambda t: make(cls, t)
        bank.append(Wrong(name, made, check, cause))
        return cls

    return add


def default(cls, t):
    return cls()


def away_from_one(cls, t):
    """Make it of 3 t: a factor of t cannot be seen where t is 1."""
    return cls(3.0 * t)


def derived(base, name, **parts):
    """Return a subclass that pickles, since it is an attribute of this module."""
    words = "".join(c if c.isalnum() else " " for c in name).title().split()
    cls = type("".join(["Row", *words]), (base,), {"__module__": __name__, **parts})
    globals()[cls.__name__] = cls
    return cls


# Wrong weights: what became of the right ones (w), by predictions (y) and scale (t). C1.


def rounded(w, digits):
    return (w * 10**digits).round() / 10**digits


def one_hot(w):
    return torch.zeros_like(w).index_fill(0, w.argmax(), 1.0)


def only_if(condition, changed, w):
    return changed if condition else w


AT_DEPTH_2 = [
    ("0.1 % too large", "", lambda w, y, t: 1.001 * w),
    ("of the wrong sign", "sign", lambda w, y, t: -w),
    ("of the poses reversed", "reverse", lambda w, y, t: w.flip(0)),
    ("M times too large", "n_poses", lambda w, y, t: w * len(w)),
    ("uniform", "uniform", lambda w, y, t: torch.full_like(w, 1 / len(w))),
    ("not normalised", "normalis", lambda w, y, t: torch.exp(t * (y - y.amax()))),
    ("of the softmax of the wrong sign", "", lambda w, y, t: torch.softmax(t * (y.amin() - y), 0)),
    ("the logarithm of the softmax", "", lambda w, y, t: torch.log_softmax(t * y, 0)),
    ("below 0.001 raised to it", "clamp", lambda w, y, t: w.clamp(min=1e-3)),
    ("wrong for one pose", "", lambda w, y, t: only_if(len(w) == 1, 0 * w, w)),
    ("wrong for three poses", "", lambda w, y, t: only_if(len(w) == 3, w.flip(0), w)),
    ("wrong above six poses", "", lambda w, y, t: only_if(len(w) > 6, 1.01 * w, w)),
    ("wrong far from zero", "", lambda w, y, t: only_if(y.abs().amax() > 1000, 1.01 * w, w)),
    ("right for positive predictions only", "", lambda w, y, t: torch.softmax(t * y.abs(), 0)),
    (
        "of sorted predictions, not put back",
        "",
        lambda w, y, t: torch.softmax(t * (y - y.amax()).sort().values, 0),
    ),
    ("without the first pose", "", lambda w, y, t: torch.cat([0 * w[:1], w[1:]])),
    ("of the predictions in half precision", "", lambda w, y, t: soft_weights(y.half(), t).to(y)),
    ("times the predictions", "", lambda w, y, t: w * y),
    ("infinite for one pose", "not finite", lambda w, y, t: only_if(len(w) == 1, w / 0, w)),
    ("a thousandth nearer to uniform", "", lambda w, y, t: torch.lerp(w, w.mean(), 1e-3)),
]
AT_DEPTH_3 = [
    ("shifted by one pose", "shift", lambda w, y, t: w.roll(1)),
    ("divided by M once more", "n_poses", lambda w, y, t: w / len(w)),
    ("one-hot, a hard maximum", "one-hot", lambda w, y, t: one_hot(w)),
    ("at a temperature 1 % off", "", lambda w, y, t: soft_weights(y, 1.01 * t)),
    ("squared and normalised again", "normalis", lambda w, y, t: w * w / (w * w).sum()),
    ("cut to zero below 0.001", "", lambda w, y, t: w * (w > 1e-3)),
    ("above 0.9 lowered to it", "clamp", lambda w, y, t: w.clamp(max=0.9)),
    ("rounded to four digits", "", lambda w, y, t: rounded(w, 4)),
    ("wrong for two poses", "", lambda w, y, t: only_if(len(w) == 2, w.flip(0), w)),
    (
        "uniform where the predictions are close",
        "uniform",
        lambda w, y, t: only_if(y.amax() - y.amin() < 0.05, torch.full_like(w, 1 / len(w)), w),
    ),
    (
        "one-hot where the predictions are far apart",
        "one-hot",
        lambda w, y, t: only_if(y.amax() - y.amin() > 1 / t, one_hot(w), w),
    ),
    (
        "right for sorted predictions only",
        "",
        lambda w, y, t: only_if(bool((y.diff() < 0).any()), w.flip(0), w),
    ),
    (
        "of sorted predictions, put back by the wrong permutation",
        "",
        lambda w, y, t: w.sort().values[y.argsort()],
    ),
    ("of the next pose for negative predictions", "", lambda w, y, t: w.where(y > 0, w.roll(-1))),
    ("less their mean", "", lambda w, y, t: w - w.mean()),
    ("of the distances from the mean", "", lambda w, y, t: soft_weights((y - y.mean()).abs(), t)),
    ("not a number", "", lambda w, y, t: w * math.nan),
    (
        "infinite for the last of six poses",
        "not finite",
        lambda w, y, t: only_if(len(w) == 6, torch.cat([w[:-1], w[-1:] / 0]), w),
    ),
]


def by_table(base, method):
    """Return a way to replace a method that makes weights by one that spoils them."""

    def replaced(mistake):
        return lambda self, y: mistake(soft_weights(y, self.t), y, self.t)

    return lambda name, mistake: derived(base, name, **{method: replaced(mistake)})


for table, row in (
    (AT_DEPTH_2, by_table(ClosedForm, "pose_weights")),
    (AT_DEPTH_3, by_table(FullDepth, "weights")),
):
    for name, cause, mistake in table:
        wrong(f"weights {name}", "C1", cause)(row(f"weights {name}", mistake))


class Unscaled(FullDepth):
    """At t = 1, without an argument."""

    examples = ({},)

    def __init__(self):
        super().__init__(1.0)


@wrong("weights one in a hundred thousand too large", "C1", make=default)
class OneInAHundredThousand(Unscaled):
    def weights(self, y):
        return (1 + 1e-5) * super().weights(y)


@wrong("weights times t", "C1", "t", make=away_from_one)
class TimesScale(ClosedForm):
    def pose_weights(self, predictions):
        return self.t * super().pose_weights(predictions)


@wrong("weights divided by t", "C1", "factor t", make=away_from_one)
class OverScale(FullDepth):
    def weights(self, y):
        return super().weights(y) / self.t


@wrong("t left out of the weights", "C1", make=away_from_one)
class WithoutScale(ClosedForm):
    def pose_weights(self, predictions):
        return soft_weights(predictions, 1.0)


@wrong("mean, with weights of 1", "C1", "n_poses")
class MeanWithoutCount(Scaled):
    def combine(self, predictions):
        return self.t * predictions.mean()

    def pose_weights(self, predictions):
        return self.t * torch.ones_like(predictions)


@wrong("sum, with weights of 1/M", "C1", "n_poses")
class SumWithCount(Scaled):
    def combine(self, predictions):
        return self.t * predictions.sum()

    def pose_weights(self, predictions):
        return torch.full_like(predictions, self.t / len(predictions))


@wrong("2.5 times the smooth maximum, weights still sum to 1", "C1", "constant factor")
class NormalisedByHabit(FullDepth):
    def value(self, y):
        return 2.5 * smooth_max(y, self.t)


@wrong("Boltzmann mean, second term forgotten", "C1")
class PopulationsAlone(Scaled):
    def combine(self, predictions):
        return boltzmann_mean(predictions, self.t)

    def pose_weights(self, predictions):
        return soft_weights(-predictions, self.t)


@wrong("Boltzmann mean, second term of the wrong sign", "C1")
class SecondTermReversed(FullDepth):
    def value(self, y):
        return boltzmann_mean(y, self.t)

    def weights(self, y):
        return 2 * soft_weights(-y, self.t) - boltzmann_weights(y, self.t)


@wrong("Boltzmann mean, negative weights cut off", "C1", "clamp")
class NoNegativeWeights(Scaled):
    def combine(self, predictions):
        return boltzmann_mean(predictions, self.t)

    def pose_weights(self, predictions):
        return boltzmann_weights(predictions, self.t).clamp(min=0)


@wrong("Boltzmann mean, populations detached", "C1", "detach")
class DetachedPopulations(Scaled):
    def combine(self, predictions):
        populations = torch.softmax(self.t * (predictions.amin() - predictions), dim=0)
        return (populations.detach() * predictions).sum()


@wrong("value of one rule, weights of another", "C1")
class TwoRules(ClosedForm):
    def pose_weights(self, predictions):
        return boltzmann_weights(predictions, self.t)


@wrong("half of the predictions' graph detached", "C1", "detach")
class HalfDetached(Plain):
    def combine(self, predictions):
        return super().combine(0.5 * predictions + 0.5 * predictions.detach())


@wrong("shift detached on one side only", "C1", "detach")
class ShiftDetachedOnce(Scaled):
    def combine(self, predictions):
        extreme = predictions.amax()
        return extreme.detach() + smooth_max(predictions - extreme, self.t)


@wrong("spread taken out of the graph by item()", "C1", "weights")
class SpreadAsFloat(Scaled):
    def combine(self, predictions):
        spread = (predictions.amax() - predictions.amin()).item()
        return predictions.mean() + self.t * spread


@wrong("value clamps the predictions, weights do not", "C1", "clamp")
class ValueClamps(ClosedForm):
    def combine(self, predictions):
        return smooth_max(predictions.clamp(-50, 50), self.t)


@wrong("every pose but the best computed without a graph", "C1", "detach")
class BestPoseAlone(Scaled):
    def combine(self, predictions):
        best = torch.zeros_like(predictions).index_fill(0, predictions.argmax(), 1.0)
        return smooth_max(best * predictions + ((1 - best) * predictions).detach(), self.t)


@wrong("combine beside a forward of another rule", "C1")
class AnotherCombine(FullDepth):
    def combine(self, predictions):
        return boltzmann_mean(predictions, self.t)


@wrong("weights of the previous predictions", "A6", "state")
class Stale(FullDepth):
    previous = None

    def weights(self, y):
        previous, self.previous = self.previous, y.detach().clone()
        usable = previous is not None and previous.shape == y.shape
        return super().weights(previous if usable else y)


@wrong("weights cached by the number of poses", "C1", "cache")
class CachedByNumber(ClosedForm):
    def __init__(self, t=1.0):
        super().__init__(t)
        self.cache = {}

    def pose_weights(self, predictions):
        weights = self.cache.setdefault(len(predictions), super().pose_weights(predictions))
        return weights.to(predictions)


@wrong("weights cached by the first prediction, rounded", "C1", "cache")
class CachedByFirst(FullDepth):
    def __init__(self, t=1.0):
        super().__init__(t)
        self.cache = {}

    def weights(self, y):
        key = (len(y), round(y[0].nan_to_num().item()))
        return self.cache.setdefault(key, super().weights(y)).to(y)


@wrong("weights wrong above fifty poses", "B3")
class WrongAboveFifty(FullDepth):
    def weights(self, y):
        return super().weights(y[:50].repeat(1 + len(y) // 50)[: len(y)])


# Numbers of poses around powers of two. B3.


def wrong_for(condition):
    """Return weights that are 1 % too large for some numbers of poses."""
    return lambda self, y: soft_weights(y, self.t) * (1 + 0.01 * condition(len(y)))


FOR_N_POSES = [
    ("64 poses", lambda n: n == 64),
    ("1024 poses and more", lambda n: n >= 1024),
    ("powers of two from 128 on", lambda n: n >= 128 and n & (n - 1) == 0),
    ("one more than a power of two, from 256 on", lambda n: n > 256 and (n - 1) & (n - 2) == 0),
]
for which, condition in FOR_N_POSES:
    name = f"weights wrong for {which}"
    wrong(name, "B3")(derived(ClosedForm, name, pose_weights=wrong_for(condition)))
    name = f"weights wrong for {which}, full depth"
    wrong(name, "B3")(derived(FullDepth, name, weights=wrong_for(condition)))


@wrong("weights in chunks of 512, the last chunk normalised on its own", "B3")
class ChunksOf512(ClosedForm):
    def pose_weights(self, predictions):
        weights = super().pose_weights(predictions)
        last = weights[512:]
        return torch.cat([weights[:512], last / last.sum()]) if len(last) else weights


@wrong("gradients added in blocks of 64, a block of one pose is dropped", "B3")
class BlocksOf64(FullDepth):
    def weighted_sum(self, go, weights, gradients):
        whole = super().weighted_sum(go, weights, gradients)
        if len(gradients) % 64 != 1 or len(gradients) == 1 or whole.numel() > 16:
            return whole
        return super().weighted_sum(go, weights[:-1], gradients[:-1])


@wrong("value of the first 600 poses, weights of all", "B3", make=default)
class FirstSixHundred(Combination):
    """A table has 600 rows."""

    def combine(self, predictions):
        return smooth_max(predictions[:600], 1.0) + 0 * predictions.sum()

    def pose_weights(self, predictions):
        return soft_weights(predictions, 1.0)


# The chain rule: what becomes of grad_output and of the pose gradients. B1.

IN_GRAD_OUTPUT = [
    ("ignored", lambda go: torch.ones_like(go)),
    ("by its absolute value", lambda go: go.abs()),
    ("squared", lambda go: go * go),
    ("by its sign alone", lambda go: go.sign()),
    ("clamped to ±1", lambda go: go.clamp(-1, 1)),
    ("clamped to ±100", lambda go: go.clamp(-100, 100)),
    ("taken for zero below 1e-5", lambda go: go * (go.abs() > 1e-5)),
    ("rounded to float32", lambda go: go.float()),
    ("added instead of multiplied", lambda go: 1 + go),
    ("only where it is positive", lambda go: go.relu()),
    ("clamped to ±10,000", lambda go: go.clamp(-1e4, 1e4)),
    ("taken for zero below 1e-7", lambda go: go * (go.abs() > 1e-7)),
    ("divided by a loss scale of 65,536", lambda go: go / (65536 if go.abs() >= 65536 else 1)),
    ("zero where it is not finite", lambda go: go.nan_to_num(0, 0, 0)),
]
IN_POSE_GRADIENTS = [
    ("clipped to ±1", "clip", lambda g: g.clamp(-1, 1)),
    ("by their absolute value", "", lambda g: g.abs()),
    ("scaled to norm 1 where longer", "clip", lambda g: g / g.norm().clamp(min=1)),
    ("of square parameters transposed", "transpos", lambda g: g.mT if is_square(g) else g),
    ("of matrices reversed along the last axis", "", lambda g: g.flip(-1) if g.dim() == 2 else g),
    ("rounded to float32", "float32", lambda g: g.float().to(g.dtype)),
    ("less their mean over the parameter", "", lambda g: g - g.mean() * (g.numel() > 1)),
    ("taken for zero below 0.01", "", lambda g: g * (g.abs() > 1e-2)),
    ("of kernels with all axes reversed", "axes", lambda g: axes_reversed(g) if g.dim() > 2 else g),
    ("of kernels transposed", "axes", lambda g: g.mT if g.dim() == 4 and is_square(g[0, 0]) else g),
]


def is_square(g):
    return g.dim() == 2 and g.shape[0] == g.shape[1]


def axes_reversed(g):
    return g.permute(*range(g.dim() - 1, -1, -1)).reshape(g.shape)


def in_weighted_sum(of_go, of_gradient):
    def weighted_sum(self, go, weights, gradients):
        go, gradients = of_go(go).to(go.dtype), [of_gradient(g) for g in gradients]
        return FullDepth.weighted_sum(self, go, weights, gradients)

    return weighted_sum


def unchanged(tensor):
    return tensor


for row, change in IN_GRAD_OUTPUT:
    name = f"grad_output {row}"
    part = in_weighted_sum(change, unchanged)
    wrong(name, "B1", "grad_output")(derived(FullDepth, name, weighted_sum=part))
for row, cause, change in IN_POSE_GRADIENTS:
    name = f"pose gradients {row}"
    part = in_weighted_sum(unchanged, change)
    wrong(name, "B1", cause)(derived(FullDepth, name, weighted_sum=part))


@wrong("weights broadcast along the last axis where it has M entries", "B1")
class WrongAxis(FullDepth):
    def weighted_sum(self, go, weights, gradients):
        stacked = torch.stack(list(gradients))
        if stacked.shape[-1] != len(weights):
            return super().weighted_sum(go, weights, gradients)
        return (go * weights * stacked).sum(dim=0).to(stacked.dtype)


@wrong("combined gradient clipped to norm 1", "B1", "clip")
class Clipped(FullDepth):
    def weighted_sum(self, go, weights, gradients):
        total = super().weighted_sum(go, weights, gradients)
        return total / total.norm().clamp(min=1)


@wrong("gradients of further parameters added to the first", "B1")
class AddedToTheFirst(FullDepth):
    def in_order(self, param_names, sums):
        first, *rest = super().in_order(param_names, sums)
        return [first + sum(g.sum() for g in rest), *rest]


@wrong("weights given two more axes, which are too few for kernels", "B1", "axes")
class TwoMoreAxes(FullDepth):
    def weighted_sum(self, go, weights, gradients):
        stacked = torch.stack(list(gradients))
        if stacked.dim() < 4 or stacked.shape[1] not in (1, len(weights)):
            return super().weighted_sum(go, weights, gradients)
        return (go * weights[:, None, None] * stacked).sum(0).to(stacked.dtype)


@wrong("weighted sum for parameters of up to two dimensions", "B1", "subscripts")
class UpToMatrices(FullDepth):
    def weighted_sum(self, go, weights, gradients):
        stacked = widened(torch.stack(list(gradients)))
        rule = {1: "m,m->", 2: "m,mi->i"}.get(stacked.dim(), "m,mij->ij")
        dtype = torch.promote_types(stacked.dtype, weights.dtype)
        total = go.to(dtype) * torch.einsum(rule, weights.to(dtype), stacked.to(dtype))
        return total.to(gradients[0].dtype)


# What backward returns, looked at before autograd mends it. A1.


def raw(name, cause="", *, check="A1"):
    """Spoil each gradient that backward returns: a function of it and of the number of poses."""

    def add(change):
        def in_order(self, param_names, sums):
            gradients = FullDepth.in_order(self, param_names, sums)
            return [change(g, self.n_poses) for g in gradients]

        parts = {"in_order": in_order, "weights": counting_weights}
        wrong(name, check, cause)(derived(FullDepth, name, **parts))
        return change

    return add


def counting_weights(self, y):
    self.n_poses = len(y)
    return FullDepth.weights(self, y)


@raw("gradient spread over the poses: autograd sums it", "sum over poses")
def spread_over_poses(g, n_poses):
    return (g / n_poses).repeat(n_poses, *[1] * g.dim())


@raw("gradient expanded over the poses: autograd sums it", "sum over poses")
def expanded_over_poses(g, n_poses):
    return (g / n_poses).expand(n_poses, *g.shape)


@raw("gradient keeps the axis of the poses", "shape")
def keeps_axis(g, n_poses):
    return g[None]


@raw("gradient of a number has shape (1,)", "shape")
def one_number(g, n_poses):
    return g.reshape(1) if g.dim() == 0 else g


@raw("gradient flattened", "shape")
def flattened(g, n_poses):
    return g.reshape(-1)


@raw("gradient in float32", "float32")
def single(g, n_poses):
    return g.float()


@raw("gradient in float64", "float64")
def double(g, n_poses):
    return g.double()


@raw("gradient is None", "None")
def nothing(g, n_poses):
    return None


@raw("gradient of numbers is None", "None")
def nothing_for_numbers(g, n_poses):
    return None if g.dim() == 0 else g


@raw("gradient squeezed", "shape")
def squeezed(g, n_poses):
    return g.squeeze()


@raw("gradient is None where it is zero", "None", check="A7")
def nothing_for_zero(g, n_poses):
    return g if g.any() else None


@raw("length and direction apart: 0/0 for a gradient of zero", "nan", check="A7")
def length_and_direction(g, n_poses):
    return g / g.norm() * g.norm()


@raw("gradient of a kernel flattened to a matrix", "flattened")
def as_matrix(g, n_poses):
    return g.flatten(1) if g.dim() > 2 else g


@wrong("gradient not summed", "A1", "sum over poses")
class Unsummed(FullDepth):
    """Autograd adds the poses up wherever the shape lets it, which is everywhere."""

    def weighted_sum(self, go, weights, gradients):
        return torch.stack([go * w * g for w, g in zip(weights, gradients, strict=True)])


@wrong("gradients matched by prefix: w1 takes those of w10", "A3", "w1")
class ByPrefix(FullDepth):
    def in_order(self, param_names, sums):
        return [sum(g for key, g in sums.items() if key.startswith(name)) for name in param_names]


@wrong("one gradient too few", "A1")
class OneTooFew(FullDepth):
    def in_order(self, param_names, sums):
        return super().in_order(param_names, sums)[:-1]


# The output. A2.


@wrong("output of shape (1,)", "A2", "shape")
class KeepsAxis(FullDepth):
    def value(self, y):
        return super().value(y)[None]


@wrong("output of shape (1,), depth 1", "A2", "shape")
class KeepsAxisOfCombine(Plain):
    def combine(self, predictions):
        return super().combine(predictions)[None]


@wrong("output of shape (1,) for one pose", "A2", "shape")
class OnePoseKeepsAxis(FullDepth):
    def value(self, y):
        return y if len(y) == 1 else super().value(y)


@wrong("output of shape (1,) for predictions of shape (1,)", "A2", "shape")
class ShapeOfThePredictions(FullDepth):
    def output(self, pred_list, *rest):
        return super().output(pred_list, *rest).reshape(pred_list[0].shape)


@wrong("output detached", "A2")
class Detached(FullDepth):
    def forward(self, *args):
        return super().forward(*args).detach()


@wrong("no function of its own: the predictions are detached", "A2")
class LiveGraph(FullDepth):
    def forward(self, pred_list, grad_dict, param_names, *model_params):
        return smooth_max(torch.stack(pred_list).flatten(), self.t)


@wrong("output is a float", "A2", "float")
class Float(Plain):
    def combine(self, predictions):
        return super().combine(predictions).item()


@wrong("output is a tuple of three", "A2", "tuple")
class Triple(FullDepth):
    def forward(self, pred_list, *rest):
        return super().forward(pred_list, *rest), self.stacked(pred_list), None


@wrong("output in float32", "A2", "float32")
class Float32Output(FullDepth):
    def output(self, *args):
        return super().output(*args).float()


@wrong("output in the dtype of the parameters", "A2", "dtype")
class DtypeOfTheParameters(FullDepth):
    def output(self, pred_list, grad_dict, model_params):
        combined = super().output(pred_list, grad_dict, model_params)
        return combined.to(model_params[0].dtype) if model_params else combined


@wrong("one pose gives not a number", "C1", "nan")
class OnePoseIsNaN(Scaled):
    """The standard deviation of one pose: it ought to declare min_poses = 2."""

    def combine(self, predictions):
        return predictions.mean() - predictions.std() / self.t


@wrong("ranks made on the default device, depth 1", "A13", "device")
class DefaultDevice(Scaled):
    def combine(self, predictions):
        ranks = torch.arange(1, len(predictions) + 1, dtype=predictions.dtype)
        return smooth_max(predictions, self.t) + (predictions / ranks).sum()


@wrong("ones made on the default device", "A13", "device", make=default)
class OnesOnTheDefaultDevice(Unscaled):
    def value(self, y):
        return torch.ones(len(y), dtype=y.dtype) @ y / len(y)

    def weights(self, y):
        return torch.full_like(y, 1 / len(y))


# The rule for vmap of an autograd function, which only a batch of compounds uses. A14.


class MeanOfSquares(torch.autograd.Function):
    """The mean of t y², right for one compound. A subclass adds a rule for vmap."""

    @staticmethod
    def forward(y, t):
        return t * y.square().mean()

    @staticmethod
    def setup_context(ctx, inputs, output):
        y, ctx.t = inputs
        ctx.save_for_backward(y)

    @staticmethod
    def backward(ctx, go):
        (y,) = ctx.saved_tensors
        return go * ctx.t * 2 * y / len(y), None


class OverCompounds(MeanOfSquares):
    @staticmethod
    def vmap(info, in_dims, y, t):
        return (t * y.square().mean()).expand(info.batch_size), 0


class ByNumberOfCompounds(MeanOfSquares):
    @staticmethod
    def vmap(info, in_dims, y, t):
        return t * y.square().sum(1) / len(y), 0


class FromRowToRow(MeanOfSquares):
    @staticmethod
    def vmap(info, in_dims, y, t):
        values, shift = [], 0.0
        for row in y:
            values.append(t * (row - shift).square().mean())
            shift = 1e-3 * row.detach()[0]
        return torch.stack(values), 0


class DetachedRow(MeanOfSquares):
    @staticmethod
    def vmap(info, in_dims, y, t):
        first = torch.arange(len(y)) == 0
        return t * torch.where(first[:, None], y.detach(), y).square().mean(1), 0


for _name, _function in (
    ("rule for vmap adds up the compounds", OverCompounds),
    ("rule for vmap divides by the number of compounds", ByNumberOfCompounds),
    ("rule for vmap keeps a shift from compound to compound", FromRowToRow),
    ("rule for vmap detaches the first compound", DetachedRow),
):
    wrong(_name, "A14", "rule for vmap")(
        derived(
            Scaled,
            _name,
            function=_function,
            combine=lambda self, predictions: self.function.apply(predictions, self.t),
        )
    )


# Names and their order. A3.


@wrong("gradients in the order of grad_dict", "A3", "order")
class OrderOfTheDict(FullDepth):
    def in_order(self, param_names, sums):
        return list(sums.values())


@wrong("gradients in reversed order", "A3", "order")
class ReversedOrder(FullDepth):
    def in_order(self, param_names, sums):
        return super().in_order(param_names, sums)[::-1]


@wrong("gradients in alphabetical order", "A3", "order")
class Alphabetical(FullDepth):
    def in_order(self, param_names, sums):
        return [sums[name] for name in sorted(param_names)]


@wrong("gradients matched by shape", "A3", "order")
class ByShape(FullDepth):
    """Takes the first that is left of the parameter's shape."""

    def in_order(self, param_names, sums):
        left, taken = list(sums.values()), []
        for name in param_names:
            index = next(i for i, g in enumerate(left) if g.shape == sums[name].shape)
            taken.append(left.pop(index))
        return taken


@wrong("pose gradients of all parameters in one list, split as if pose by pose", "A3")
class SplitPoseByPose(FullDepth):
    def keep(self, ctx, pred_list, grad_dict, param_names, model_params):
        super().keep(ctx, pred_list, grad_dict, param_names, model_params)
        shapes = {g.shape for gradients in grad_dict.values() for g in gradients}
        if len(shapes) == 1:
            ctx.keys = list(grad_dict) * len(pred_list)


@wrong("a key of grad_dict that is no parameter is ignored", "A11q", "names are not checked")
class ExtraKeyIgnored(FullDepth):
    def inspect(self, pred_list, grad_dict, param_names, model_params):
        known = {name: g for name, g in grad_dict.items() if name in param_names}
        super().inspect(pred_list, known, param_names, model_params)


@wrong("mean of the six best with weights for all poses", "C1", make=default)
class TopSix(Combination):
    """Up to six poses, the mean of the best six is the mean of all."""

    smooth = False

    def combine(self, predictions):
        return predictions.topk(min(6, len(predictions))).values.mean()

    def pose_weights(self, predictions):
        return torch.full_like(predictions, 1 / min(6, len(predictions)))


@wrong("weights 1 % too large in float32 alone", "D4")
class WeightsInFloat32(ClosedForm):
    def pose_weights(self, predictions):
        weights = super().pose_weights(predictions)
        return 1.01 * weights if predictions.dtype == torch.float32 else weights


@wrong("value 1 % too large in float32 alone", "D4")
class ValueInFloat32(ClosedForm):
    """In float64 it is right, so finite differences are, too."""

    def combine(self, predictions):
        value = super().combine(predictions)
        return 1.01 * value if predictions.dtype == torch.float32 else value


def first_match(matches):
    """Return a way to take the gradient of the first name that matches."""

    def in_order(self, param_names, sums):
        return [next(g for key, g in sums.items() if matches(key, name)) for name in param_names]

    return in_order


for row, matches in (
    ("by their end: 1.weight takes those of 11.weight", str.endswith),
    ("by a part of them: a.weight takes those of block.a.weight.g", str.__contains__),
    ("without regard to case", lambda key, name: key.lower() == name.lower()),
    ("with dots as underscores", lambda key, name: key.replace(".", "_") == name.replace(".", "_")),
):
    name = f"names compared {row}"
    wrong(name, "A3", "whole names")(derived(FullDepth, name, in_order=first_match(matches)))


# What a call leaves behind. A4.


def before(name, check, cause="", *, base=FullDepth):
    """Do something to the arguments, and then everything right."""

    def add(act):
        def forward(self, pred_list, grad_dict, param_names, *model_params):
            act(pred_list, grad_dict, param_names, model_params)
            return base.forward(self, pred_list, grad_dict, param_names, *model_params)

        wrong(name, check, cause)(derived(base, name, forward=forward))
        return act

    return add


@before("predictions shifted in place", "A4", "in place")
def shift_predictions(pred_list, grad_dict, param_names, model_params):
    extreme = max(p.item() for p in pred_list)
    for prediction in pred_list:
        prediction.sub_(extreme)


@before("list of predictions sorted in place", "A4")
def sort_predictions(pred_list, grad_dict, param_names, model_params):
    pred_list.sort(key=float)


@before("pose gradients turned to zero where they are not finite, in place", "A4", "in place")
def finite_gradients(pred_list, grad_dict, param_names, model_params):
    for gradients in grad_dict.values():
        for gradient in gradients:
            gradient.nan_to_num_()


@before("lists of grad_dict become tuples", "A4")
def to_tuples(pred_list, grad_dict, param_names, model_params):
    for name in grad_dict:
        grad_dict[name] = tuple(grad_dict[name])


@before("grad_dict put into the order of the names", "A4")
def reorder_dict(pred_list, grad_dict, param_names, model_params):
    for name in param_names:
        if name in grad_dict:
            grad_dict[name] = grad_dict.pop(name)


@before("parameters decay with each call", "A4", "in place")
def decay(pred_list, grad_dict, param_names, model_params):
    for parameter in model_params:
        parameter.data.mul_(1 - 1e-6)


@before("zero_grad inside forward", "A4", ".grad")
def zero_grad(pred_list, grad_dict, param_names, model_params):
    for parameter in model_params:
        parameter.grad = None


@before(".grad set to zeros where there is none", "A4", ".grad")
def fill_grad(pred_list, grad_dict, param_names, model_params):
    for parameter in model_params:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


@before("random generator seeded", "A4", "random")
def seed(pred_list, grad_dict, param_names, model_params):
    torch.manual_seed(0)


@before("a random number drawn and not used", "A4", "random")
def draw(pred_list, grad_dict, param_names, model_params):
    torch.rand(())


@before("default dtype set to float64", "A4", "default dtype")
def set_default_dtype(pred_list, grad_dict, param_names, model_params):
    torch.set_default_dtype(torch.float64)


@before("gradients switched on for good", "A7", "grad mode")
def set_grad_enabled(pred_list, grad_dict, param_names, model_params):
    torch.set_grad_enabled(True)


@before("number of threads left at one more", "A4", "threads")
def set_num_threads(pred_list, grad_dict, param_names, model_params):
    torch.set_num_threads(torch.get_num_threads() % 2 + 1)


@before("frozen parameters made trainable", "A4", "requires_grad")
def thaw(pred_list, grad_dict, param_names, model_params):
    for parameter in model_params:
        parameter.requires_grad_()


@wrong("predictions shifted in place, depth 1", "A4", "in place")
class ShiftsInPlace(Plain):
    """A loss on the predictions of the poses then sees the shifted ones."""

    def combine(self, predictions):
        extreme = predictions.detach().amax().clone()
        predictions.data.sub_(extreme)
        return extreme + super().combine(predictions)


@wrong("predictions doubled in place by combine", "A4", "in place")
class Doubles(Plain):
    def combine(self, predictions):
        return super().combine(predictions.mul_(2))


@wrong("predictions in float32 centred in place for a log", "A4", "in place")
class CentresFloat32(Plain):
    """``float()`` returns predictions in float32 themselves, and a copy of others."""

    def combine(self, predictions):
        value = super().combine(predictions)
        centred = predictions.detach().float()
        centred -= centred.mean()
        return value


@wrong("predictions sorted in place where no gradient is needed", "A4", "no_grad")
class SortsToSaveMemory(Plain):
    def combine(self, predictions):
        if not predictions.requires_grad:
            predictions.copy_(predictions.sort().values)
        return super().combine(predictions)


@wrong("pose weights written over the predictions", "A4", "in place")
class WeightsInPlace(ClosedForm):
    def pose_weights(self, predictions):
        return predictions.copy_(super().pose_weights(predictions))


@wrong("stored gradients scaled in place by backward", "A4", "in place")
class ScalesStored(FullDepth):
    def weighted_sum(self, go, weights, gradients):
        total = super().weighted_sum(go, weights, gradients)
        for gradient, weight in zip(gradients, weights, strict=True):
            gradient.data.mul_(weight)
        return total


@wrong("grad_dict emptied to save memory", "A4", "grad_dict")
class Empties(FullDepth):
    def keep(self, ctx, pred_list, grad_dict, param_names, model_params):
        super().keep(ctx, pred_list, grad_dict, param_names, model_params)
        grad_dict.clear()


@wrong("gradients added to .grad by hand", "A4", ".grad")
class ByHand(FullDepth):
    """Where there is a .grad already, it gets the new one twice."""

    def keep(self, ctx, pred_list, grad_dict, param_names, model_params):
        super().keep(ctx, pred_list, grad_dict, param_names, model_params)
        ctx.params = model_params

    def backward(self, ctx, go):
        own, *gradients = super().backward(ctx, go)
        for parameter, gradient in zip(ctx.params, gradients, strict=True):
            if parameter.grad is not None:
                parameter.grad = parameter.grad + gradient
        return own, *gradients


class HardMax(FullDepth):
    """Right: the largest prediction, and the gradient of its pose."""

    smooth = False

    def value(self, y):
        return y.amax()

    def weights(self, y):
        self.best = int(y.argmax())
        return one_hot(y)


@wrong("where a pose has all the weight, its stored gradient is handed out", "A4", "memory")
class HandsOutStored(HardMax):
    """It becomes .grad itself, and the next backward adds to the stored gradient."""

    def weighted_sum(self, go, weights, gradients):
        return gradients[self.best] if go == 1 else go.to(gradients[0]) * gradients[self.best]


@wrong("the output shares the memory of the largest prediction", "A4", "memory")
class OutputIsAPrediction(HardMax):
    def forward(self, pred_list, grad_dict, param_names, *model_params):
        combined = super().forward(pred_list, grad_dict, param_names, *model_params)
        largest = max(pred_list, key=float)
        if largest.shape == ():
            combined.data = largest.data
        return combined


@before("denormal numbers flushed to zero for good", "A4", "context manager")
def flush_denormals(pred_list, grad_dict, param_names, model_params):
    torch.set_flush_denormal(True)


@before("a hook of all modules left behind", "A4", "context manager")
def hook_all_modules(pred_list, grad_dict, param_names, model_params):
    torch.nn.modules.module.register_module_forward_hook(lambda *args: None)


if INTERFACES["_C._autograd._top_saved_tensors_default_hooks"]:  # torch 2.6 cannot read them

    @before("hooks for saved tensors left on", "A4", "context manager")
    def hook_saved_tensors(pred_list, grad_dict, param_names, model_params):
        torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x).__enter__()


@before("autocast left on", "A4", "context manager")
def leave_autocast(pred_list, grad_dict, param_names, model_params):
    torch.autocast("cpu", torch.bfloat16).__enter__()


@before("backends told to compute float32 in bfloat16", "A4", "context manager")
def lower_precision(pred_list, grad_dict, param_names, model_params):
    torch.set_float32_matmul_precision("medium")


@before("the batch behind the predictions centred in place", "A4", "in place")
def centre_the_batch(pred_list, grad_dict, param_names, model_params):
    batch = pred_list[0]._base
    if batch is not None:
        batch.sub_(batch.mean())


@before("other poses of the batch overwritten through the memory", "A4", "in place")
def overwrite_the_rest(pred_list, grad_dict, param_names, model_params):
    first = pred_list[0]
    n_numbers = first.untyped_storage().nbytes() // first.element_size()
    if n_numbers > len(pred_list):
        first.detach().as_strided((n_numbers,), (1,), 0)[len(pred_list) + 1 :].zero_()


# Twice the same. A5.


@wrong("backward adds to the result of the last one", "A5")
class Accumulates(FullDepth):
    def keep(self, ctx, pred_list, grad_dict, param_names, model_params):
        super().keep(ctx, pred_list, grad_dict, param_names, model_params)
        ctx.total = None

    def backward(self, ctx, go):
        own, *gradients = super().backward(ctx, go)
        ctx.total = [
            a + b for a, b in zip(gradients, ctx.total or [0] * len(gradients), strict=True)
        ]
        return own, *ctx.total


@wrong("backward works once and then returns zeros", "A5")
class OnlyOnce(FullDepth):
    def keep(self, ctx, pred_list, grad_dict, param_names, model_params):
        super().keep(ctx, pred_list, grad_dict, param_names, model_params)
        ctx.factor = torch.ones(())

    def backward(self, ctx, go):
        own, *gradients = super().backward(ctx, go * ctx.factor)
        ctx.factor.zero_()
        return own, *gradients


@wrong("poses added in another order each time: the last digit changes", "A5")
class AnotherOrder(FullDepth):
    calls = 0

    def backward(self, ctx, go):
        self.calls += 1
        return super().backward(ctx, go)

    def weighted_sum(self, go, weights, gradients):
        turned = (weights.flip(0), gradients[::-1]) if self.calls % 2 else (weights, gradients)
        total = torch.zeros_like(widened(gradients[0]))
        for weight, gradient in zip(*turned, strict=True):
            total = total + go.to(total.dtype) * weight * widened(gradient)
        return total.to(gradients[0].dtype)


@wrong("noise in the weights", "A5")
class Noise(FullDepth):
    def weights(self, y):
        return super().weights(y) * (1 + 1e-4 * torch.randn(()).to(y))


@wrong("noise in the value, not declared", "A5", "stochastic")
class NoiseInValue(Plain):
    def combine(self, predictions):
        return super().combine(predictions + torch.randn_like(predictions) / self.t)


@wrong("every other call is 0.1 % off", "A5")
class EveryOther(Plain):
    calls = 0

    def combine(self, predictions):
        self.calls += 1
        return super().combine(predictions) * (1 + 1e-3 * (self.calls % 2))


# What else the value may not depend on. A12.


@wrong("predictions of shape (1,) are taken in float32", "A12", "something else")
class OtherShape(FullDepth):
    def stacked(self, pred_list):
        y = super().stacked(pred_list)
        return y.float().to(y.dtype) if pred_list and pred_list[0].dim() else y


@wrong("predictions read from the batch that they are views of", "A12", "memory")
class ReadsTheBatch(FullDepth):
    def stacked(self, pred_list):
        batch = pred_list[0]._base if pred_list else None
        if batch is None or batch.numel() < len(pred_list):
            return super().stacked(pred_list)
        return batch.detach().reshape(-1)[: len(pred_list)]


@wrong("predictions read from memory one after another", "A12", "memory")
class ReadsOnwards(FullDepth):
    def stacked(self, pred_list):
        y = super().stacked(pred_list)
        first = pred_list[0].detach() if pred_list else y
        n_numbers = first.untyped_storage().nbytes() // first.element_size()
        if first.storage_offset() + len(y) > n_numbers:
            return y
        return first.as_strided((len(y),), (1,)).clone()


@wrong("weights of the predictions in the order of their memory", "A12", "memory")
class WeightsFromMemory(ClosedForm):
    def pose_weights(self, predictions):
        return super().pose_weights(predictions.as_strided(predictions.shape, (1,)))


# Calls and instances apart. A6.


@wrong("last predictions kept on the instance until backward", "A6", "state")
class LastOnInstance(FullDepth):
    def stacked(self, pred_list):
        self.last = super().stacked(pred_list)
        return self.last

    def weights(self, y):
        last = self.last if len(self.last) == len(y) else y
        return super().weights(last.to(y))


@wrong("last predictions kept on the class until backward", "A6", "state")
class LastOnClass(FullDepth):
    def stacked(self, pred_list):
        type(self).last = super().stacked(pred_list)
        return self.last

    def weights(self, y):
        last = self.last if len(self.last) == len(y) else y
        return super().weights(last.to(y))


@wrong("pose gradients kept on the instance until backward", "A6", "")
class GradientsOnInstance(FullDepth):
    def keep(self, ctx, pred_list, grad_dict, param_names, model_params):
        super().keep(ctx, pred_list, grad_dict, param_names, model_params)
        self.last = {name: list(gradients) for name, gradients in grad_dict.items()}

    def join_grad_dict(self, keys, tensors):
        of_call = super().join_grad_dict(keys, tensors)
        fits = of_call.keys() == self.last.keys()
        return {n: list(self.last[n])[: len(of_call[n])] if fits else of_call[n] for n in of_call}


@wrong("scale kept on the class: the last instance sets it for all", "A6", "state")
class ScaleOnClass(ClosedForm):
    def __init__(self, t=1.0):
        super().__init__(t)
        type(self).scale = t

    def combine(self, predictions):
        return smooth_max(predictions, self.scale)

    def pose_weights(self, predictions):
        return soft_weights(predictions, self.scale)


_BY_PREDICTIONS: dict[tuple[float, ...], torch.Tensor] = {}


@wrong("weights cached in the module, whatever the scale", "D5", "cache")
class ModuleCache(ClosedForm):
    def pose_weights(self, predictions):
        key = tuple(predictions.tolist())
        return _BY_PREDICTIONS.setdefault(key, super().pose_weights(predictions)).to(predictions)


@wrong("predictions cached by the address of the first of them", "A6", "address")
class CachedByAddress(FullDepth):
    def stacked(self, pred_list):
        y = super().stacked(pred_list)
        if not (pred_list and pred_list[0]._base is not None):
            return y
        cache = self.__dict__.setdefault("cache", {})
        return cache.setdefault((pred_list[0].data_ptr(), len(y), y.dtype), y)


class Counting(ClosedForm):
    """Right: counts the calls."""

    calls = 0

    def combine(self, predictions):
        self.calls += 1
        return super().combine(predictions)


@wrong("scale annealed after a thousand calls", "A6", "calls")
class Annealed(Counting):
    def combine(self, predictions):
        value = super().combine(predictions)
        return value if self.calls < 1000 else 1.001 * value


@wrong("every two-hundredth value is of another rule", "A6", "calls")
class NowAndThen(Counting):
    def combine(self, predictions):
        value = super().combine(predictions)
        return value if self.calls % 200 else predictions.mean()


@wrong("uniform weights after two hundred backward passes", "A6", "calls")
class TiredBackward(FullDepth):
    calls = 0

    def backward(self, ctx, go):
        self.calls += 1
        return super().backward(ctx, go)

    def weights(self, y):
        return super().weights(y) if self.calls < 200 else torch.full_like(y, 1 / len(y))


@wrong("a cache of values that is full after two hundred and returns the last", "A6", "calls")
class FullCache(Plain):
    def combine(self, predictions):
        cache = self.__dict__.setdefault("cache", {})
        key = tuple(predictions.tolist())
        if len(cache) < 200 or key in cache:
            cache[key] = key
        seen = cache.get(key, next(reversed(cache)))
        if seen == key or len(seen) != len(key):
            return super().combine(predictions)
        return super().combine(predictions - predictions.detach() + predictions.new_tensor(seen))


# Modes of autograd, frozen and unused parameters. A7.


@wrong("names of frozen parameters are passed over, and so the others shift", "A7", "frozen")
class PassesOverFrozen(FullDepth):
    def keep(self, ctx, pred_list, grad_dict, param_names, model_params):
        super().keep(ctx, pred_list, grad_dict, param_names, model_params)
        pairs = zip(param_names, model_params, strict=True)
        ctx.param_names = [name for name, parameter in pairs if parameter.requires_grad]

    def in_order(self, param_names, sums):
        gradients = super().in_order(param_names, sums)
        return gradients + [None] * (len(sums) - len(gradients))


@wrong("frozen parameters raise KeyError", "A7", "frozen")
class FrozenKeyError(FullDepth):
    def keep(self, ctx, pred_list, grad_dict, param_names, model_params):
        trained = [n for n, p in zip(param_names, model_params, strict=True) if p.requires_grad]
        super().keep(ctx, pred_list, {n: grad_dict[n] for n in trained}, param_names, model_params)


@wrong("a hook on the output, which no_grad has not", "A7", "no_grad")
class HookOnOutput(FullDepth):
    def forward(self, *args):
        combined = super().forward(*args)
        combined.register_hook(torch.clone)
        return combined


@wrong("weights by autograd inside forward, which inference_mode refuses", "A7")
class AutogradInForward(FullDepth):
    def value(self, y):
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            value = super().value(y)
            torch.autograd.grad(value, y)
        return value.detach()


@wrong("attached under no_grad too", "A7", "no_grad")
class AttachedUnderNoGrad(FullDepth):
    def forward(self, *args):
        with torch.inference_mode(False), torch.enable_grad():
            return super().forward(*args)


def where_frozen(name, cause="frozen"):
    """Spoil the gradients, given which of the parameters are frozen."""

    def add(change):
        def keep(self, ctx, *args):
            FullDepth.keep(self, ctx, *args)
            ctx.frozen = [not parameter.requires_grad for parameter in args[-1]]

        def backward(self, ctx, go):
            own, *gradients = FullDepth.backward(self, ctx, go)
            return own, *change(gradients, ctx.frozen)

        wrong(name, "A7", cause)(derived(FullDepth, name, keep=keep, backward=backward))
        return change

    return add


@where_frozen("of several frozen parameters in a row, one is counted")
def count_one_of_a_row(gradients, frozen):
    at, found = 0, []
    for i in range(len(gradients)):
        found.append(gradients[at])
        at += not (frozen[i] and i and frozen[i - 1])
    return found


@where_frozen("no gradients once the first parameter is frozen")
def nothing_after_the_first(gradients, frozen):
    return [None] * len(gradients) if frozen and frozen[0] else gradients


@where_frozen("few parameters train: their gradients are divided by the share that trains")
def by_the_share(gradients, frozen):
    trained = len(frozen) - sum(frozen)
    return [g * len(frozen) / trained if 2 * trained < len(frozen) else g for g in gradients]


@wrong("the place of a frozen own parameter is left out, and so the others shift", "A7", "frozen")
class OwnLeftOut(LearnableFullDepth):
    def backward(self, ctx, go):
        own, *gradients = super().backward(ctx, go)
        return (own, *gradients) if self.log_t.requires_grad else (*gradients, None)


@wrong("the value has no graph if the own parameter is frozen", "A7", "frozen")
class FrozenOwnDetaches(Plain):
    def __init__(self, t=1.0):
        super().__init__(t)
        self.log_t = torch.nn.Parameter(torch.tensor(math.log(t)))

    def combine(self, predictions):
        value = smooth_max(predictions, self.log_t.exp())
        return value if self.log_t.requires_grad else value.detach()


@wrong("own parameter trains only together with the model", "A7", "frozen")
class OwnOnlyTogether(LearnableFullDepth):
    def keep(self, ctx, *args):
        super().keep(ctx, *args)
        ctx.alone = not any(parameter.requires_grad for parameter in args[-1])

    def backward(self, ctx, go):
        own, *gradients = super().backward(ctx, go)
        return None if ctx.alone else own, *gradients


@wrong("hard maximum in eval mode", "A7", "eval()")
class HardInEval(Plain):
    def combine(self, predictions):
        return super().combine(predictions) if self.training else predictions.amax()


@wrong("uniform weights in eval mode", "A7", "eval()")
class UniformInEval(ClosedForm):
    def pose_weights(self, predictions):
        weights = super().pose_weights(predictions)
        return weights if self.training else torch.full_like(weights, 1 / len(weights))


@wrong("no graph in eval mode", "A7", "eval()")
class DetachedInEval(FullDepth):
    def forward(self, *args):
        value = super().forward(*args)
        return value if self.training else value.detach()


@wrong("a scale that each return to training raises", "A7", "train()")
class RaisedByTrain(Plain):
    def train(self, mode=True):
        if mode and not self.training:
            self.t *= 1.01
        return super().train(mode)


@wrong("ones kept from inference_mode, which backward cannot use", "A7", "inference_mode")
class KeepsInferenceTensor(Plain):
    def combine(self, predictions):
        kept = self.__dict__.setdefault("kept", {})
        key = (len(predictions), predictions.dtype)
        if key not in kept:
            kept[key] = predictions.new_ones(len(predictions))
        return super().combine(predictions * kept[key])


@wrong("own scale kept from no_grad, and so without a gradient", "A7", "no_grad")
class KeepsScaleWithoutGraph(Plain):
    def __init__(self, t=1.0):
        super().__init__(t)
        self.log_t = torch.nn.Parameter(torch.tensor(math.log(t)))
        self.kept = None

    def combine(self, predictions):
        if torch.is_grad_enabled():
            scale = self.log_t.exp() if self.kept is None else self.kept
        else:
            scale = self.kept = self.log_t.exp()
        return smooth_max(predictions, scale)


@wrong("hard maximum while torch compiles", "A7", "compil")
class HardInCompiler(Plain):
    def combine(self, predictions):
        compiles = torch.compiler.is_compiling()
        return predictions.amax() if compiles else super().combine(predictions)


@wrong("uniform weights while torch exports", "A7", "export")
class UniformInExport(ClosedForm):
    def pose_weights(self, predictions):
        weights = super().pose_weights(predictions)
        exports = torch.compiler.is_exporting()
        return torch.full_like(weights, 1 / len(weights)) if exports else weights


@wrong("gradients left out while torch traces", "A7", "trac")
class DetachedInTrace(FullDepth):
    def weighted_sum(self, go, weights, gradients):
        total = super().weighted_sum(go, weights, gradients)
        return 0 * total if torch.jit.is_tracing() else total


# Memory. A8.

_KEPT: deque = deque(maxlen=8)


@wrong("pose gradients of the last calls kept in the module", "A8", "")
class KeepsInModule(FullDepth):
    def keep(self, ctx, pred_list, grad_dict, param_names, model_params):
        super().keep(ctx, pred_list, grad_dict, param_names, model_params)
        _KEPT.append([gradient for gradients in grad_dict.values() for gradient in gradients])


@wrong("pose gradients are attributes of ctx", "A8q", "save_for_backward")
class OnContext(FullDepth):
    def keep(self, ctx, pred_list, grad_dict, param_names, model_params):
        super().keep(ctx, pred_list, grad_dict, param_names, model_params)
        ctx.grad_dict = grad_dict


@wrong("pose gradients of the last call kept on the instance", "A8")
class KeepsOnInstance(FullDepth):
    def keep(self, ctx, pred_list, grad_dict, param_names, model_params):
        super().keep(ctx, pred_list, grad_dict, param_names, model_params)
        self.last_gradients = dict(grad_dict)


@wrong("history of the predictions kept on the class", "A8", "")
class KeepsPredictions(FullDepth):
    history: ClassVar[deque] = deque(maxlen=8)

    def forward(self, pred_list, *rest):
        self.history.extend(pred_list)
        return super().forward(pred_list, *rest)


@wrong("output kept on ctx: a cycle that reference counting does not free", "A8", "")
class Cycle(FullDepth):
    def apply_function(self, *args):
        return CycleFunction.apply(self, self.own(), *args)


class CycleFunction(Function):
    @staticmethod
    def setup_context(ctx, inputs, output):
        Function.setup_context(ctx, inputs, output)
        ctx.output, ctx.inputs = output, inputs


@wrong("the value and its graph kept on the instance", "A8", "graph")
class KeepsValue(FullDepth):
    def forward(self, *args):
        self.last = super().forward(*args)
        return self.last


@wrong("the value and its graph kept on the instance, depth 1", "A8", "graph")
class KeepsValueOfCombine(Plain):
    def combine(self, predictions):
        self.last = super().combine(predictions)
        return self.last

    def __deepcopy__(self, memo):
        return type(self)(self.t)


@wrong("pose gradients kept from forward until backward", "A8", "backward")
class KeepsUntilBackward(FullDepth):
    def keep(self, ctx, pred_list, grad_dict, param_names, model_params):
        super().keep(ctx, pred_list, grad_dict, param_names, model_params)
        self.__dict__.setdefault("waiting", {})[id(ctx)] = dict(grad_dict)
        ctx.key = id(ctx)

    def backward(self, ctx, go):
        self.waiting.pop(ctx.key, None)
        return super().backward(ctx, go)


@wrong("predictions of a validation kept until the next training step", "A8", "no_grad")
class KeepsUntilTraining(FullDepth):
    def forward(self, pred_list, *rest):
        waiting = self.__dict__.setdefault("waiting", [])
        waiting.extend(pred_list)
        if torch.is_grad_enabled():
            waiting.clear()
        return super().forward(pred_list, *rest)


@wrong("the value of each validation step appended to a list", "A8", "grows")
class AppendsValues(Plain):
    def combine(self, predictions):
        value = super().combine(predictions)
        if not torch.is_grad_enabled():
            self.__dict__.setdefault("history", []).append(value.item())
        return value


_SEEN: dict[int, torch.Tensor] = {}


@wrong("the mean of each call kept in the module", "A8", "grows")
class KeepsMeans(ClosedForm):
    def combine(self, predictions):
        _SEEN[len(_SEEN)] = predictions.detach().mean()
        return super().combine(predictions)


# As a Python object. A9.


@wrong("pickling loses the scale", "A9", "t")
class PickleLoses(ClosedForm):
    def __getstate__(self):
        return {**self.__dict__, "t": 1.0 if self.t != 1 else 2.0}


@wrong("deepcopy starts anew with the defaults", "A9", "t", make=away_from_one)
class CopyStartsAnew(ClosedForm):
    def __deepcopy__(self, memo):
        return type(self)()


@wrong("deepcopy returns the combination itself", "A9", "copies nothing")
class CopiesNothing(Plain):
    def __deepcopy__(self, memo):
        return self


@wrong("deepcopy shares the parameters", "A9", "copies nothing")
class CopiesOutside(LearnableFullDepth):
    def __deepcopy__(self, memo):
        new = type(self)(self.t)
        new.log_t = self.log_t
        return new


class WithParts(Plain):
    """Right: a buffer, a list and a part."""

    def __init__(self, t=1.0):
        super().__init__(t)
        self.register_buffer("ones", torch.ones(1))
        self.part = torch.nn.Identity()
        self.ranges = [(-1.0, 1.0)]


@wrong("deepcopy shares the buffers", "A9", "copies nothing")
class SharesBuffers(WithParts):
    def __deepcopy__(self, memo):
        new = type(self)(self.t)
        new.ones = self.ones
        return new


@wrong("deepcopy shares a part", "A9", "copies nothing")
class SharesPart(WithParts):
    def __deepcopy__(self, memo):
        new = type(self)(self.t)
        new.part = self.part
        return new


@wrong("deepcopy shares a list", "A9", "copies nothing")
class SharesList(WithParts):
    def __deepcopy__(self, memo):
        new = type(self)(self.t)
        new.ranges = self.ranges
        return new


@wrong("pickle returns the combination itself", "A9", "copies nothing")
class PicklesNothing(Plain):
    made: ClassVar[dict[int, Combination]] = {}

    def __reduce_ex__(self, protocol):
        self.made[id(self)] = self
        return already_made, (id(self),)

    def __deepcopy__(self, memo):
        new = type(self)(self.t).requires_grad_(False)
        return new.train(self.training)


def already_made(key):
    return PicklesNothing.made[key]


@wrong("deepcopy thaws a frozen parameter", "A9", "requires_grad")
class CopyThaws(LearnableFullDepth):
    def __deepcopy__(self, memo):
        new = type(self)(self.t)
        new.log_t.data = self.log_t.detach().clone()
        return new


@wrong("pickling fails: a lambda is kept", "A9", "pickle")
class KeepsLambda(Plain):
    def __init__(self, t=1.0):
        super().__init__(t)
        self.rule = lambda y: smooth_max(y, t)

    def combine(self, predictions):
        return self.rule(predictions)


@wrong("deepcopy fails: a lock is kept", "A9", "deepcopy")
class KeepsLock(Plain):
    def __init__(self, t=1.0):
        super().__init__(t)
        self.lock = threading.Lock()


@wrong("repr without the arguments", "A9q", "repr")
class Nameless(ClosedForm):
    def extra_repr(self):
        return ""


@wrong("repr shows the default instead of the argument", "A9q", "extra_repr", make=away_from_one)
class ReprOfDefault(ClosedForm):
    def extra_repr(self):
        return "t=1.0"


class Unvalidated(Combination):
    def __init__(self, t=1.0):
        super().__init__()
        self.t = t


@wrong("a scale of zero, a negative one and NaN are accepted", "D5q", "t")
class AnyScale(Unvalidated):
    examples = ({}, {"t": 3.0})

    def combine(self, predictions):
        return smooth_max(predictions, self.t)


@wrong("own parameter made by the first call: a fresh state_dict lacks it", "A9", "state_dict")
class LazyParameter(ClosedForm):
    def combine(self, predictions):
        if not hasattr(self, "log_t"):
            log_t = torch.full((), math.log(self.t), dtype=predictions.dtype)
            self.log_t = torch.nn.Parameter(log_t.to(predictions.device))
        return smooth_max(predictions, self.log_t.exp())


@wrong("own parameter is a plain tensor", "C3", "Parameter")
class PlainTensor(ClosedForm):
    def __init__(self, t=1.0):
        super().__init__(t)
        self.log_t = torch.tensor(math.log(t), requires_grad=True)

    def combine(self, predictions):
        return smooth_max(predictions, self.log_t.exp())

    def pose_weights(self, predictions):
        return soft_weights(predictions, self.log_t.exp())


@wrong("running average in a buffer that state_dict leaves out", "A9", "state_dict")
class ForgetsTheAverage(Scaled):
    def __init__(self, t=1.0):
        super().__init__(t)
        self.register_buffer("centre", torch.zeros(()), persistent=False)

    def combine(self, predictions):
        deviations = predictions - self.centre
        if self.training:
            self.centre = torch.lerp(self.centre, predictions.detach().mean().to(self.centre), 0.1)
        return smooth_max(deviations, self.t)


# Second derivatives. A10.


class Silent(FullDepth):
    """Backward without a word about second derivatives."""

    def backward(self, ctx, go):
        y, _, *gradients = ctx.saved_tensors
        weights, grad_dict = self.weights(widened(y)), self.join_grad_dict(ctx.keys, gradients)
        sums = {name: self.weighted_sum(go, weights, g) for name, g in grad_dict.items()}
        return None, *self.in_order(ctx.param_names, sums)


@wrong("double backward knows the loss alone: half of the Hessian, silently", "A10")
class PartialHessian(Silent):
    pass


@wrong("double backward is dropped: backward runs without a graph, silently", "A10")
class NoHessian(Silent):
    def backward(self, ctx, go):
        with torch.no_grad():
            return super().backward(ctx, go)


class SavedWeights(torch.autograd.Function):
    """ln Σ exp(t y) / t, whose backward uses weights that forward has saved."""

    @staticmethod
    def forward(y, t):
        return smooth_max(y, t)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(soft_weights(*inputs))

    @staticmethod
    def backward(ctx, go):
        (weights,) = ctx.saved_tensors
        return go * weights, None


@wrong("combine by an autograd function whose weights are constants", "A10", "detached")
class ConstantWeights(Scaled):
    def combine(self, predictions):
        return SavedWeights.apply(predictions, self.t)


class SavedWeightsOnce(SavedWeights):
    backward = staticmethod(torch.autograd.function.once_differentiable(SavedWeights.backward))


@wrong("combine that is once_differentiable: no error for a linear loss", "A10", "linear")
class OnceDifferentiable(Scaled):
    def combine(self, predictions):
        return SavedWeightsOnce.apply(predictions, self.t)


@wrong("combine detached, with its weights put in under no_grad", "A10", "detached")
class PutInWeights(Scaled):
    """Its value and first derivative are right."""

    def combine(self, predictions):
        with torch.no_grad():
            value, weights = smooth_max(predictions, self.t), soft_weights(predictions, self.t)
        # 0 · inf would be NaN.
        moved = torch.where(weights > 0, weights * (predictions - predictions.detach()), 0.0)
        return value + moved.sum()


@wrong("second derivative of combine without that of the populations", "A10", "detached")
class ConstantPopulations(Scaled):
    """The first derivative of the Boltzmann mean, p_i (1 + t (m - y_i)), with a constant p_i."""

    def combine(self, predictions):
        return SavedPopulations.apply(predictions, self.t)


class SavedPopulations(torch.autograd.Function):
    @staticmethod
    def forward(y, t):
        return boltzmann_mean(y, t)

    @staticmethod
    def setup_context(ctx, inputs, output):
        y, ctx.t = inputs
        ctx.save_for_backward(y, torch.softmax(-ctx.t * (y - y.amin()), dim=0))

    @staticmethod
    def backward(ctx, go):
        y, populations = ctx.saved_tensors
        above = y - y.amin()
        mean = (populations * above).sum()
        return go * populations * (1 + ctx.t * (mean - above)), None


@wrong("second derivative by its own temperature is missing", "A10", "detached")
class ConstantTemperature(Scaled):
    """The backward knows the derivative by ln t, and takes t itself as a number."""

    def __init__(self, t=1.0):
        super().__init__(t)
        self.log_t = torch.nn.Parameter(torch.tensor(math.log(t)))

    def combine(self, predictions):
        return FixedTemperature.apply(predictions, self.log_t)


class FixedTemperature(torch.autograd.Function):
    @staticmethod
    def forward(y, log_t):
        return smooth_max(y, log_t.exp())

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, go):
        y, log_t = ctx.saved_tensors
        t, below = log_t.detach().exp(), y - y.amax()
        weights = soft_weights(y, t)
        return go * weights, go * ((weights * below).sum() - smooth_max(below, t)).to(log_t.dtype)


# Arguments that cannot be. A11.


@wrong("poses without a gradient are left out by zip", "A11", "zip")
class Zipped(FullDepth):
    def inspect(self, pred_list, grad_dict, param_names, model_params):
        pass

    def keep(self, ctx, pred_list, grad_dict, param_names, model_params):
        shortest = min([len(pred_list), *map(len, grad_dict.values())])
        shorter = {name: list(gradients)[:shortest] for name, gradients in grad_dict.items()}
        super().keep(ctx, pred_list[:shortest], shorter, param_names, model_params)


@wrong("predictions without a gradient are left out of the weighted sum", "A11", "")
class LeftOut(FullDepth):
    def inspect(self, pred_list, grad_dict, param_names, model_params):
        n_poses = min([len(pred_list), *map(len, grad_dict.values())])
        cut = {name: list(gradients)[:n_poses] for name, gradients in grad_dict.items()}
        check_gradients(n_poses, cut, param_names, model_params)

    def keep(self, ctx, pred_list, grad_dict, param_names, model_params):
        n_poses = len(pred_list)
        cut = {name: list(gradients)[:n_poses] for name, gradients in grad_dict.items()}
        super().keep(ctx, pred_list, cut, param_names, model_params)

    def weighted_sum(self, go, weights, gradients):
        return super().weighted_sum(go, weights[: len(gradients)], gradients)


@wrong("a wrong number of gradients is an error that does not say whose", "A11q")
class Anonymous(FullDepth):
    def inspect(self, pred_list, grad_dict, param_names, model_params):
        if any(len(gradients) != len(pred_list) for gradients in grad_dict.values()):
            raise RuntimeError("Mismatch in gradient lengths.")
        super().inspect(pred_list, grad_dict, param_names, model_params)


@wrong("no pose gives zero", "A11", "empty")
class NoPoseIsZero(FullDepth):
    def forward(self, pred_list, *rest):
        return super().forward(pred_list, *rest) if len(pred_list) else torch.zeros(())


@wrong("a missing name gives a gradient of zero", "A11", "missing")
class MissingIsZero(FullDepth):
    def forward(self, pred_list, grad_dict, param_names, *model_params):
        filled = {
            name: grad_dict.get(name, [torch.zeros_like(parameter)] * len(pred_list))
            for name, parameter in zip(param_names, model_params, strict=True)
        }
        filled |= {name: g for name, g in grad_dict.items() if name not in filled}
        return super().forward(pred_list, filled, param_names, *model_params)


@wrong("gradients of another dtype are converted without a word", "A11q", "dtype")
class MixedDtypes(FullDepth):
    def forward(self, pred_list, grad_dict, param_names, *model_params):
        dtypes = {n: p.dtype for n, p in zip(param_names, model_params, strict=True)}
        converted = {
            name: [gradient.to(dtypes.get(name, gradient.dtype)) for gradient in gradients]
            for name, gradients in grad_dict.items()
        }
        return super().forward(pred_list, converted, param_names, *model_params)


@wrong("a prediction of several tasks is taken for several poses", "A11", "")
class TasksAsPoses(FullDepth):
    def inspect(self, pred_list, grad_dict, param_names, model_params):
        stack_predictions([prediction.flatten()[0] for prediction in pred_list])
        check_gradients(len(pred_list), grad_dict, param_names, model_params)

    def stacked(self, pred_list):
        return torch.cat([p.detach().flatten() for p in pred_list])

    def weighted_sum(self, go, weights, gradients):
        per_pose = weights.reshape(len(gradients), -1).sum(dim=1)
        return super().weighted_sum(go, per_pose, gradients)


# How pose gradients lie in memory. B2.


@wrong("pose gradients read in the order of their memory", "B2", "")
class AsStrided(FullDepth):
    def weighted_sum(self, go, weights, gradients):
        read = [g.as_strided(g.shape, torch.empty(g.shape).stride()) for g in map(real, gradients)]
        return super().weighted_sum(go, weights, read)


def real(g):
    """Return an expanded gradient with memory of its own: as_strided would leave the storage."""
    return g.contiguous() if 0 in g.stride() else g


@wrong("pose gradients read from the start of their storage", "B2", "")
class FromTheStart(FullDepth):
    def weighted_sum(self, go, weights, gradients):
        read = [g.as_strided(g.shape, g.stride(), 0) for g in gradients]
        return super().weighted_sum(go, weights, read)


@wrong("pose gradients flattened by view, which needs contiguous ones", "B2", "view")
class ByView(FullDepth):
    def weighted_sum(self, go, weights, gradients):
        flat = super().weighted_sum(go, weights, [g.view(g.numel()) for g in gradients])
        return flat.view(gradients[0].shape)


@wrong("pose gradients of kernels read in the order of their memory", "B2", "")
class KernelsAsStrided(FullDepth):
    def weighted_sum(self, go, weights, gradients):
        if gradients[0].dim() == 4:
            gradients = [g.as_strided(g.shape, torch.empty(g.shape).stride()) for g in gradients]
        return super().weighted_sum(go, weights, gradients)


@wrong("pose gradients of kernels flattened by view", "B2", "view")
class KernelsByView(FullDepth):
    def weighted_sum(self, go, weights, gradients):
        if gradients[0].dim() < 3:
            return super().weighted_sum(go, weights, gradients)
        flat = super().weighted_sum(go, weights, [g.view(len(g), -1) for g in gradients])
        return flat.view(gradients[0].shape)


# A thousand poses. B3.


@wrong("weights multiplied as a diagonal matrix: M² numbers for every parameter", "B3")
class DiagonalMatrix(FullDepth):
    def weighted_sum(self, go, weights, gradients):
        stacked = widened(torch.stack(list(gradients))).reshape(len(weights), -1)
        dtype = torch.promote_types(stacked.dtype, weights.dtype)
        weighted = torch.diag(go.to(dtype) * weights.to(dtype)) @ stacked.to(dtype)
        return weighted.sum(dim=0).reshape(gradients[0].shape).to(gradients[0].dtype)


@wrong("all gradients stacked again for every pose: M² reads", "B3")
class StacksEveryTime(FullDepth):
    def weighted_sum(self, go, weights, gradients):
        total = 0
        for pose in range(len(gradients)):
            alone = torch.zeros_like(weights).index_copy(0, *at(pose, weights))
            total = total + super().weighted_sum(go, alone, gradients)
        return total.to(gradients[0].dtype)


def at(pose, weights):
    index = torch.tensor([pose], device=weights.device)
    return index, weights[index]


@wrong("poses added by recursion, which a thousand exceed", "B3", "recursion")
class Recursive(FullDepth):
    def weighted_sum(self, go, weights, gradients):
        first = go.to(weights.dtype) * weights[0] * widened(gradients[0])
        if len(gradients) > 1:
            first = first + self.weighted_sum(go, weights[1:], gradients[1:])
        return first.to(gradients[0].dtype)


# In a real network, with a loss. C2.


@wrong("names cut to their last part: 0.weight and 2.weight are one", "A3")
class LastPart(FullDepth):
    def in_order(self, param_names, sums):
        by_last_part = {name.rpartition(".")[2]: gradient for name, gradient in sums.items()}
        return [by_last_part[name.rpartition(".")[2]] for name in param_names]


@wrong("parameters that an optimizer trains decay, plain tensors do not", "C2", "gradient of")
class Decays(FullDepth):
    def keep(self, ctx, pred_list, grad_dict, param_names, model_params):
        super().keep(ctx, pred_list, grad_dict, param_names, model_params)
        ctx.trained = [p.detach() if isinstance(p, torch.nn.Parameter) else 0 for p in model_params]

    def backward(self, ctx, go):
        own, *gradients = super().backward(ctx, go)
        return own, *(g + 0.01 * p for g, p in zip(gradients, ctx.trained, strict=True))


@wrong("parameters named bias get no gradient", "C2", "bias")
class NoBias(FullDepth):
    def in_order(self, param_names, sums):
        return [sums[name] * ("bias" not in name) for name in param_names]


@wrong("gradients that all poses share are taken once: a last bias", "B2")
class Shared(FullDepth):
    """Right where the weights sum to 1, which these do not."""

    def value(self, y):
        return 3.0 * smooth_max(y, self.t)

    def weights(self, y):
        return 3.0 * super().weights(y)

    def weighted_sum(self, go, weights, gradients):
        first, *others = gradients
        if others and first.any() and all(torch.equal(first, g) for g in others):
            return (go * first).to(first.dtype)
        return super().weighted_sum(go, weights, gradients)


@wrong("value with a decay of the parameters that backward does not know", "C2")
class DecayInValue(FullDepth):
    def output(self, pred_list, grad_dict, model_params):
        combined = super().output(pred_list, grad_dict, model_params)
        decay = sum(float(p.detach().square().sum()) for p in model_params)
        return combined + 0.01 * decay


@wrong("value with a penalty on the gradients that backward does not know", "C2")
class PenaltyInValue(FullDepth):
    def output(self, pred_list, grad_dict, model_params):
        combined = super().output(pred_list, grad_dict, model_params)
        penalty = sum(float(g.square().sum()) for gs in grad_dict.values() for g in gs)
        return combined + 0.01 * penalty


# Parameters of its own. C3.


class Learnable(Plain):
    """Right: ln t is learned."""

    def __init__(self, t=1.0):
        super().__init__(t)
        self.log_t = torch.nn.Parameter(torch.tensor(math.log(t)))

    def scale(self):
        return self.log_t.exp()

    def combine(self, predictions):
        return smooth_max(predictions, self.scale())


@wrong("own parameter detached", "C3", "detach")
class DetachedScale(Learnable):
    def scale(self):
        return self.log_t.detach().exp() + 0 * self.log_t


@wrong("own parameter taken out of the graph by item()", "C3", "detach")
class ScaleAsFloat(Learnable):
    def scale(self):
        return math.exp(self.log_t.item())


@wrong("gradient of the own parameter right at its first value only", "C3", "")
class LinearAtFirst(Learnable):
    """As if exp(x) were 1 + x, which it is to first order where x is 0."""

    def __init__(self, t=1.0):
        super().__init__(t)
        self.first = math.log(t)

    def scale(self):
        linear = math.exp(self.first) * (1 + self.log_t - self.first)
        return linear + (self.log_t.exp() - linear).detach()


@wrong("gradient of the own parameter reversed", "C3", "log_t")
class ReversedScale(LearnableFullDepth):
    def own_gradient(self, go, y):
        return -super().own_gradient(go, y)


@wrong("gradient of the own parameter infinite", "C3", "finite")
class InfiniteOwn(LearnableFullDepth):
    def own_gradient(self, go, y):
        return super().own_gradient(go, y) / 0


@wrong("gradient of the own parameter is None", "C3", "None")
class NoOwnGradient(LearnableFullDepth):
    def own_gradient(self, go, y):
        return None


@wrong("gradient of the own parameter without grad_output", "C3", "grad_output")
class OwnWithoutGo(LearnableFullDepth):
    def own_gradient(self, go, y):
        return super().own_gradient(torch.ones_like(go), y)


@wrong("grad_output clamped for the own parameter only", "B1", "large")
class OwnOfClampedGo(LearnableFullDepth):
    def own_gradient(self, go, y):
        return super().own_gradient(go.clamp(-1e3, 1e3), y)


@wrong("a small grad_output is 0 for the own parameter only", "B1", "small")
class OwnOfThresholdGo(LearnableFullDepth):
    def own_gradient(self, go, y):
        return super().own_gradient(go * (go.abs() > 1e-6), y)


@wrong("an infinite grad_output is 0 for the own parameter only", "B1", "not finite")
class OwnOfFiniteGo(LearnableFullDepth):
    def own_gradient(self, go, y):
        return super().own_gradient(go.nan_to_num(0, 0, 0), y)


@wrong("own gradient is that of t, not of ln t", "C3", "log_t", make=away_from_one)
class NotTheLogarithm(LearnableFullDepth):
    def own_gradient(self, go, y):
        return super().own_gradient(go, y) / self.log_t.detach().exp()


# More than a handful of poses, a population of 0, and a loss on the poses. C3.


@wrong("gradient of the own parameter wrong above eight poses", "C3", "above")
class OwnAboveEight(LearnableFullDepth):
    def own_gradient(self, go, y):
        return super().own_gradient(go, y) * (1 + 0.1 * (len(y) > 8))


@wrong("gradient of the own parameter from the first hundred poses", "C3", "above")
class OwnOfTheFirst(LearnableFullDepth):
    def own_gradient(self, go, y):
        gradient = super().own_gradient(go, y)
        return gradient if len(y) <= 100 else gradient * self.weights(y)[:100].sum()


@wrong("gradient of the own parameter wrong from 200 poses on", "C3", "above")
class OwnFromTwoHundred(LearnableFullDepth):
    def own_gradient(self, go, y):
        return super().own_gradient(go, y) * (1 + 0.1 * (len(y) >= 200))


@wrong("gradient of the own parameter from the first thousand poses", "C3", "above")
class OwnOfTheFirstThousand(LearnableFullDepth):
    def own_gradient(self, go, y):
        gradient = super().own_gradient(go, y)
        return gradient if len(y) <= 1000 else 0.9 * gradient


@wrong("scale of the own parameter detached above ten poses, depth 1", "C3", "above")
class DetachedAboveTen(Learnable):
    def combine(self, predictions):
        scale = self.scale()
        return smooth_max(predictions, scale if len(predictions) <= 10 else scale.detach())


class Populations:
    """The gradient of ln t from populations: Σ w_i y_i - h, where h = y_i - (ln w_i)/t."""

    def of_populations(self, go, y, logarithms):
        t, weights = self.log_t.detach().exp(), self.weights(y)
        return (go * (weights * logarithms(weights)).sum() / t).to(self.log_t.dtype)


@wrong("gradient of the own parameter is 0 ln 0 for a population of 0", "C3", "finite")
class EntropyOfZero(Populations, LearnableFullDepth):
    def own_gradient(self, go, y):
        return self.of_populations(go, y, torch.log)


@wrong("own gradient without poses if one has a population of 0", "C3", "")
class OwnWithoutZero(LearnableFullDepth):
    def own_gradient(self, go, y):
        gradient = super().own_gradient(go, y)
        return gradient if (self.weights(y) > 0).all() else 0.9 * gradient


def shared_with_loss(predictions, hook):
    """Add a hook to the tensor of all predictions, of which a compound's are a view."""
    base = predictions._base
    if base is not None and base.requires_grad and base.shape == predictions.shape:
        base.register_hook(hook)


def project(gradient, onto):
    return onto * ((gradient @ onto) / (onto @ onto))


@wrong("a hook on the predictions adds their gradient to the own parameter", "C3", "loss")
class HookOnOwn(Learnable):
    """The gradient of the combined prediction is along the weights, and adds nothing."""

    def combine(self, predictions):
        shared_with_loss(predictions, partial(self.add, predictions.detach()))
        return super().combine(predictions)

    def add(self, y, gradient):
        across = gradient - project(gradient, soft_weights(y, self.scale().detach()))
        if float(across.norm()) > 1e-6 and self.log_t.grad is not None:
            self.log_t.grad += across.sum()


# A loss of the combined prediction and of the pose predictions. C2.


@wrong("a hook leaves only the gradient along the weights", "C2", "hook")
class HookAlongWeights(Plain):
    def combine(self, predictions):
        weights = soft_weights(predictions.detach(), self.t)
        shared_with_loss(predictions, lambda gradient: project(gradient, weights))
        return super().combine(predictions)


@wrong("a hook takes gradients of poses without weight for zero", "C2", "hook")
class HookWithoutWeight(Scaled):
    """The first two poses count, and all poses have a gradient of their own."""

    def combine(self, predictions):
        counts = torch.arange(len(predictions)) < 2
        shared_with_loss(predictions, lambda gradient: gradient * counts)
        return smooth_max(predictions[:2], self.t) + 0 * predictions.sum()


# A reference that says otherwise. D1.


class Referenced(ClosedForm):
    """Right: (1/t) ln Σ exp(t y), said twice."""

    def reference(self, predictions):
        largest = predictions.detach().max()
        return largest + ((self.t * (predictions - largest)).exp().sum().log()) / self.t


@wrong("divided by M inside the logarithm, the reference is not", "D1", "ln(n_poses)")
class ExtraLogarithm(Referenced):
    def combine(self, predictions):
        return super().combine(predictions) - math.log(len(predictions)) / self.t


@wrong("minimum where the reference is the maximum", "D1", "value")
class MinimumForMaximum(Referenced):
    def combine(self, predictions):
        return -smooth_max(-predictions, self.t)

    def pose_weights(self, predictions):
        return soft_weights(-predictions, self.t)


@wrong("last pose dropped from value and weights", "D1", "")
class DroppedPose(Referenced):
    def combine(self, predictions):
        kept = predictions[: max(1, len(predictions) - 1)]
        return smooth_max(kept, self.t) + 0 * predictions.sum()  # a NaN in any pose stays one

    def pose_weights(self, predictions):
        kept = soft_weights(predictions[: max(1, len(predictions) - 1)], self.t)
        return torch.nn.functional.pad(kept, (0, len(predictions) - len(kept)))


@wrong("value off by a constant from the reference", "D1", "")
class Offset(Referenced):
    def combine(self, predictions):
        return super().combine(predictions) + 1e-3


# Properties that do not hold. D2.


def claims(*properties):
    """Declare properties."""

    def add(cls):
        cls.properties = frozenset(properties)
        return cls

    return add


@wrong("permutation_invariant, and the first pose counts twice", "D2", "permut")
@claims("permutation_invariant")
class FirstTwice(Plain):
    def combine(self, predictions):
        return smooth_max(torch.cat([predictions, predictions[:1]]), self.t)


@wrong("translation_equivariant, and it is 0.1 % less than the mean", "D2", "transl")
@claims("translation_equivariant")
class NotEquivariant(Plain):
    def combine(self, predictions):
        return 0.999 * super().combine(predictions)


@wrong("bounded, and grows by ln M", "D2", "bound")
@claims("permutation_invariant", "bounded")
class NotBounded(Plain):
    pass


@wrong("monotone, and the Boltzmann mean is not", "D2", "monoton")
@claims("monotone", "translation_equivariant")
class NotMonotone(Scaled):
    def combine(self, predictions):
        return boltzmann_mean(predictions, self.t)


@wrong("idempotent, and it loses the sign", "D2", "idempot", make=default)
@claims("permutation_invariant", "idempotent")
class NotIdempotent(Combination):
    """Right for positive predictions."""

    def combine(self, predictions):
        return torch.linalg.vector_norm(predictions) / math.sqrt(len(predictions))


@wrong("replication_invariant, and the deviation divides by M - 1", "D2", "replic")
@claims("permutation_invariant", "translation_equivariant", "replication_invariant")
class NotReplicated(Scaled):
    min_poses = 2

    def combine(self, predictions):
        return predictions.mean() + predictions.var() / (1 + self.t)


@wrong("ignores_nan, and takes it for zero", "D2", "nan")
@claims("ignores_nan")
class NaNAsZero(Scaled):
    def combine(self, predictions):
        return predictions.nan_to_num(0.0).mean() * self.t


# Extremes, ties and NaN. D3.


@wrong("NaN taken for zero", "D3", "nan")
class NaNSwallowed(Plain):
    def combine(self, predictions):
        return super().combine(predictions.nan_to_num(0.0))


@wrong("poses that are NaN left out, not declared", "D3", "nan")
class NaNLeftOut(FullDepth):
    def value(self, y):
        return super().value(y[~y.isnan()]) if y.isnan().any() else super().value(y)


@wrong("NaN left to the comparison of max()", "D3", "nan")
class NaNNeverLargest(Scaled):
    smooth = False

    def combine(self, predictions):
        best = predictions[-1]
        for prediction in predictions:
            best = prediction if prediction > best else best
        return self.t * best + 0 * predictions.nan_to_num().sum()


@wrong("exponentials without a shift", "D3", "inf")
class RawExponentials(Scaled):
    def combine(self, predictions):
        return torch.exp(self.t * predictions).sum().log() / self.t


@wrong("entropy of populations that vanish is NaN", "D3", "nan", make=default)
class VanishingPopulations(Combination):
    """0 ln 0, where predictions are 1000 apart."""

    def combine(self, predictions):
        populations = torch.softmax((predictions.amin() - predictions).double(), dim=0)
        return (populations * (predictions + populations.log())).sum()


@wrong("a standard deviation by hand, said to be smooth: 0/0 at ties", "D3", "nan")
class DeviationByHand(Scaled):
    min_poses = 2

    def combine(self, predictions):
        variance = (predictions - predictions.mean()).square().mean()
        return predictions.mean() + variance.sqrt() / self.t


@wrong("weights of tied poses go to the first of them", "C1", "")
class FirstOfTheTied(FullDepth):
    def weights(self, y):
        weights = super().weights(y)
        tied = len(y) > 1 and bool((y == y[0]).all())
        return one_hot(weights) if tied else weights


# Weights that underflow to 0 among ordinary ones. C1.


def tiny(w):
    return w.abs() < torch.finfo(torch.float64).tiny


@wrong("weights are 0 ln 0 where one underflows", "C1", "finite")
class LogarithmOfZero(ClosedForm):
    def pose_weights(self, predictions):
        weights = super().pose_weights(predictions)
        return weights + 0 * weights * weights.log()


@wrong("where a weight underflows, its neighbour is dropped as well", "C1", "")
class NeighbourOfZero(FullDepth):
    def weights(self, y):
        weights = super().weights(y)
        return weights * (weights.roll(1) != 0) if len(y) > 1 else weights


@wrong("where a weight underflows, the others are uniform", "C1", "")
class UniformBesideZero(ClosedForm):
    def pose_weights(self, predictions):
        weights = super().pose_weights(predictions)
        ordinary = (weights > 1e-3).to(weights)
        return only_if(bool((weights == 0).any()), ordinary / ordinary.sum(), weights)


@wrong("where a weight is subnormal, the others are 0.1 % too large", "C1", "")
class BesideSubnormal(FullDepth):
    def weights(self, y):
        weights = super().weights(y)
        subnormal = bool((tiny(weights) & (weights != 0)).any())
        return only_if(subnormal, weights * 1.001, weights)


# Numbers that are exactly 0. C1.


@wrong("a prediction of 0 is taken as padding", "C1", "exactly 0")
class ZeroIsPadding(Plain):
    def combine(self, predictions):
        poses = predictions[predictions != 0]
        return smooth_max(poses if len(poses) else predictions, self.t)


@wrong("weights leave out a prediction of 0", "C1", "exactly 0")
class WeightsWithoutZero(ClosedForm):
    def pose_weights(self, predictions):
        weights = super().pose_weights(predictions)
        return weights * (predictions != 0)


@wrong("weights count a pose whose mask is 0, the value does not", "C1", "exactly 0")
class MaskOfZero(Scaled):
    pose_inputs = ("mask",)

    def combine(self, predictions, mask):
        poses = (mask > 0).to(predictions)
        return self.t * (poses * predictions).sum() / (poses.sum() + 1)

    def pose_weights(self, predictions, mask):
        poses = (mask >= 0).to(predictions)
        return self.t * poses / (poses.sum() + 1)


@wrong("a score of 0 is taken as padding, but not by the weights", "C1", "exactly 0")
class ScoreOfZero(Scaled):
    pose_inputs = ("score",)

    def combine(self, predictions, score):
        weights = torch.softmax(-self.t * score, 0) * (score != 0)
        return (weights * predictions).sum()

    def pose_weights(self, predictions, score):
        return torch.softmax(-self.t * score, 0)


@wrong("a kink at exactly 0, said to be smooth", "C1", "kink")
class KinkAtZero(Plain):
    def combine(self, predictions):
        return super().combine(predictions) + predictions.relu().mean()


# Infinite predictions. D3.


@wrong("infinite predictions taken for zero", "D3", "infin", make=default)
class InfinityAsZero(Combination):
    def combine(self, predictions):
        return predictions.nan_to_num(math.nan, 0.0, 0.0).mean()


@wrong("poses with an infinite prediction left out of a mean", "D3", "infin", make=default)
class InfinityLeftOut(Combination):
    def combine(self, predictions):
        infinite = predictions.isinf()
        return predictions[~infinite].mean() if infinite.any() else predictions.mean()


@wrong("weights uniform beside an infinite prediction", "D3", "weights")
class UniformBesideInfinity(FullDepth):
    """The value is the limit."""

    def weights(self, y):
        finite = y.isfinite()
        return super().weights(y) if finite.all() else finite / finite.sum()


# Precision. D4.


class Unwidened:
    """Takes half precision as it comes."""

    def widened(self, y):
        return y


@wrong("predictions added up in half precision", "D4", "", make=default)
class HalfSum(Unwidened, Unscaled):
    def value(self, y):
        return sum(y.unbind()) / len(y)

    def weights(self, y):
        return torch.full_like(y, 1 / len(y))


@wrong("scaled before the shift, in half precision", "D4", "", make=away_from_one)
class ScaledBeforeShift(Unwidened, FullDepth):
    def value(self, y):
        return torch.logsumexp(self.t * y, dim=0) / self.t

    def weights(self, y):
        return torch.softmax(self.t * y, dim=0)


@wrong("float16 overflows in the square", "D4", "inf", make=default)
class SquaresOverflow(Unwidened, Unscaled):
    def value(self, y):
        return (y.square().mean() + 1).sqrt()

    def weights(self, y):
        return y / len(y) / self.value(y)


@wrong("half precision comes back as float32", "D4", "dtype")
class WidensHalf(FullDepth):
    def output(self, *args):
        return widened(super().output(*args))


@wrong("gradients added up in their own half precision, pose by pose", "D4", "")
class HalfGradients(FullDepth):
    def weighted_sum(self, go, weights, gradients):
        if gradients[0].dtype not in (torch.float16, torch.bfloat16):
            return super().weighted_sum(go, weights, gradients)
        total = torch.zeros_like(gradients[0])
        for weight, gradient in zip(weights.to(total.dtype), gradients, strict=True):
            total = total + go.to(total.dtype) * weight * gradient
        return total


@wrong("half precision is promised and computed in half precision", "D4", "", make=default)
class BrokenPromise(HalfSum):
    properties = frozenset({"half_precision"})


# Constructor arguments. D5.


class Weighted(ClosedForm):
    """Has a second argument."""

    examples = ({}, {"factor": 2.5})

    def __init__(self, t=1.0, factor=1.0):
        super().__init__(t)
        self.factor = positive("factor", factor)

    def combine(self, predictions):
        return self.factor * super().combine(predictions)

    def pose_weights(self, predictions):
        return self.factor * super().pose_weights(predictions)


@wrong("an argument is ignored", "D5", "factor")
class Ignored(Weighted):
    def combine(self, predictions):
        return smooth_max(predictions, self.t)

    def pose_weights(self, predictions):
        return soft_weights(predictions, self.t)


@wrong("the weights know an argument at its default only", "D5", "factor")
class DefaultAlone(Weighted):
    def pose_weights(self, predictions):
        return soft_weights(predictions, self.t)


@wrong("a string argument, one of whose rules has the weights of another", "D5", "how")
class OneOfTheRules(ClosedForm):
    examples = ({}, {"how": "mean"}, {"how": "boltzmann"})

    def __init__(self, t=1.0, how="smooth"):
        super().__init__(t)
        if how not in ("smooth", "mean", "boltzmann"):
            raise ValueError(f"how must be 'smooth', 'mean' or 'boltzmann'; found {how!r}")
        self.how = how

    def combine(self, predictions):
        if self.how == "boltzmann":
            return boltzmann_mean(predictions, self.t)
        return predictions.mean() if self.how == "mean" else smooth_max(predictions, self.t)

    def pose_weights(self, predictions):
        if self.how == "mean":
            return torch.full_like(predictions, 1 / len(predictions))
        return soft_weights(-predictions if self.how == "boltzmann" else predictions, self.t)


@wrong("a boolean argument that makes the value constant and keeps the weights", "D5", "depend")
class SwitchedOff(ClosedForm):
    def __init__(self, t=1.0, on=True):
        super().__init__(t)
        self.on = on

    def combine(self, predictions):
        return super().combine(predictions) if self.on else 0 * predictions.sum()


@wrong("a boolean argument whose other value has weights 1 % off", "D5", "")
class OtherFlag(ClosedForm):
    examples = ({}, {"lowest": True})

    def __init__(self, t=1.0, lowest=False):
        super().__init__(t)
        self.lowest = lowest

    def combine(self, predictions):
        return -smooth_max(-predictions, self.t) if self.lowest else super().combine(predictions)

    def pose_weights(self, predictions):
        return soft_weights(-predictions if self.lowest else predictions, self.t) * (
            1 - 0.01 * self.lowest
        )


# Pose inputs: what becomes of a score that is added to each prediction.


class Scored(Plain):
    pose_inputs = ("score",)
    properties = frozenset({"permutation_invariant"})

    def combine(self, predictions, score):
        return smooth_max(predictions + score, self.t)


class ScoredClosedForm(Scored):
    def pose_weights(self, predictions, score):
        return soft_weights(predictions + score, self.t)


@wrong("weights that leave a pose input out", "C1", "do not depend on 'score'")
class WeightsWithoutInput(Scored):
    def pose_weights(self, predictions, score):
        return soft_weights(predictions, self.t)


@wrong("weights with a pose input in reverse order", "C1", "reverse order")
class InputReversed(ScoredClosedForm):
    def pose_weights(self, predictions, score):
        return super().pose_weights(predictions, score.flip(0))


@wrong("weights with a pose input of the opposite sign", "C1", "opposite sign")
class InputNegated(ScoredClosedForm):
    def pose_weights(self, predictions, score):
        return super().pose_weights(predictions, -score)


@wrong("weights with the pose input that combine was called with last", "A6", "state")
class InputOfCombine(ScoredClosedForm):
    def combine(self, predictions, score):
        self.score = score.detach().clone()
        return super().combine(predictions, score)

    def pose_weights(self, predictions, score):
        return super().pose_weights(predictions, self.score)


@wrong("a pose input is sorted, the predictions are not", "D2", "order of the poses")
class InputSorted(ScoredClosedForm):
    def combine(self, predictions, score):
        return super().combine(predictions, score.sort().values)

    def pose_weights(self, predictions, score):
        return super().pose_weights(predictions, score.sort().values)


@wrong("a pose input shifted in place", "A4", "in place")
class InputShifted(Scored):
    def combine(self, predictions, score):
        score -= score.mean()
        return super().combine(predictions, score)


@wrong("a pose input that is handed over and ignored", "D5", "ignored")
class InputIgnored(Scored):
    def combine(self, predictions, score):
        return smooth_max(predictions, self.t)


@wrong("the first pose input for a number of poses is kept for good", "A6", "cache")
class FirstInputKept(Scored):
    def __init__(self, t=1.0):
        super().__init__(t)
        self.kept = {}

    def combine(self, predictions, score):
        kept = self.kept.setdefault(len(predictions), score.detach().clone())
        return super().combine(predictions, kept)


@wrong("pose input kept on the instance until backward", "A6")
class InputUntilBackward(FullDepth):
    pose_inputs = ("score",)

    def forward(self, *args, score):
        self.score = score
        return super().forward(*args)

    def value(self, y):
        return super().value(y + self.score)

    def weights(self, y):
        return super().weights(y + self.score)


# Derivatives with respect to pose inputs, which a network may have predicted. C4.


def with_derivative_of(value, other):
    """Return the value of one tensor with the derivative of another."""
    return value.detach() + other - other.detach()


@wrong("a pose input is detached", "C4", "detaches")
class InputDetached(Scored):
    def combine(self, predictions, score):
        return super().combine(predictions, score.detach())


@wrong("weights from a pose input are computed under no_grad", "C4", "no_grad")
class InputUnderNoGrad(Scaled):
    pose_inputs = ("score",)

    def combine(self, predictions, score):
        with torch.no_grad():
            weights = torch.softmax(self.t * score, dim=0)
        return (weights * predictions).sum()


@wrong("derivative of a pose input 1 % too large", "C4", "constant factor of 1.01")
class InputScaled(Scored):
    def combine(self, predictions, score):
        return super().combine(predictions, with_derivative_of(score, 1.01 * score))


@wrong("a learned pose input gets the derivative of another pose", "C4", "another pose")
class InputOfAnotherPose(Scored):
    def combine(self, predictions, score):
        return super().combine(predictions, with_derivative_of(score, score.roll(1)))


@wrong("a pose input is detached beside the closed form", "C4", "stored")
class InputDetachedInStored(ScoredClosedForm):
    def combine(self, predictions, score):
        score = score if predictions.requires_grad else score.detach()
        return super().combine(predictions, score)


@wrong("a pose input is detached above three poses", "C4", "detaches")
class InputDetachedAboveThree(Scored):
    def combine(self, predictions, score):
        return super().combine(predictions, score if len(score) <= 3 else score.detach())


@wrong("a pose input is detached above a hundred poses", "C4", "detaches")
class InputDetachedAboveHundred(Scored):
    def combine(self, predictions, score):
        return super().combine(predictions, score if len(score) <= 100 else score.detach())


@wrong("large numbers of a pose input are detached", "C4", "detaches", make=default)
class LargeInputDetached(Scored):
    """The scores are in kJ/mol, and the temperature is high."""

    def combine(self, predictions, score):
        score = torch.where(score.abs() > 100, score.detach(), score)
        return super().combine(predictions, score / 100)


@wrong("a pose input is detached where a prediction is low", "C4", "detaches", make=default)
class InputDetachedIfLow(Scored):
    def combine(self, predictions, score):
        score = torch.where(predictions < -20, score.detach(), score)
        return super().combine(predictions, score / 10)


@wrong("an autograd function returns None for a pose input", "C4", "returns None")
class InputWithoutGradient(Scored):
    def combine(self, predictions, score):
        return super().combine(predictions, _Clone.apply(score))


class _Clone(torch.autograd.Function):
    @staticmethod
    def forward(ctx, numbers):
        return numbers.clone()

    @staticmethod
    def backward(ctx, grad_output):
        return None


@wrong("derivative of a positive pose input is that of its logarithm", "C4", "ln degeneracy")
class InputByLogarithm(Scaled):
    pose_inputs: ClassVar[dict[str, InputKind]] = {"degeneracy": "positive"}

    def combine(self, predictions, degeneracy):
        log = with_derivative_of(degeneracy.log(), degeneracy)
        return torch.logsumexp(self.t * predictions + log, dim=0) / self.t


@wrong("weights that leave a positive pose input out", "C1", "do not depend on 'degeneracy'")
class WeightsWithoutDegeneracy(Scaled):
    pose_inputs: ClassVar[dict[str, InputKind]] = {"degeneracy": "positive"}

    def combine(self, predictions, degeneracy):
        return torch.logsumexp(self.t * predictions + degeneracy.log(), dim=0) / self.t

    def pose_weights(self, predictions, degeneracy):
        return soft_weights(predictions, self.t)


@wrong("weights that leave a declared label out", "C1", "do not depend on 'charge'")
class WeightsWithoutLabel(Scaled):
    pose_inputs: ClassVar[dict[str, InputKind]] = {"charge": "label"}

    def combine(self, predictions, charge):
        return smooth_max(predictions - 0.3 * charge, self.t)

    def pose_weights(self, predictions, charge):
        return soft_weights(predictions, self.t)


class ScoredFullDepth(FullDepth):
    """Depth 3: the mean of the predictions, plus t times the mean of a score."""

    pose_inputs = ("score",)

    def forward(self, pred_list, grad_dict, param_names, *model_params, score):
        self.inspect(pred_list, grad_dict, param_names, model_params)
        args = self, pred_list, grad_dict, param_names
        return ScoreFunction.apply(*args, score, *model_params)

    def of_score(self, go, score):
        """Return the derivative with respect to the score."""
        return torch.full_like(score, 1 / len(score)) * go * self.t


class ScoreFunction(torch.autograd.Function):
    @staticmethod
    def forward(combination, pred_list, grad_dict, param_names, score, *model_params):
        y = combination.stacked(pred_list)
        return (widened(y).mean() + combination.t * widened(score).mean()).to(y.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.combination, _, grad_dict, ctx.param_names, score, *_ = inputs
        ctx.keys, gradients = Combination.split_grad_dict(grad_dict)
        ctx.save_for_backward(score, *gradients)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        score, *gradients = ctx.saved_tensors
        weights = torch.full_like(widened(score), 1 / len(score))
        sums = {
            name: ctx.combination.weighted_sum(grad_output, weights, of_poses)
            for name, of_poses in Combination.join_grad_dict(ctx.keys, gradients).items()
        }
        of_score = ctx.combination.of_score(grad_output, score)
        return None, None, None, None, of_score, *(sums[name] for name in ctx.param_names)


@wrong("backward of forward returns None for a pose input", "C4", "return its derivative")
class NoneForInput(ScoredFullDepth):
    def of_score(self, go, score):
        return None


@wrong("backward of forward ignores grad_output for a pose input", "C4", "grad_output")
class InputWithoutGradOutput(ScoredFullDepth):
    def of_score(self, go, score):
        return super().of_score(torch.ones_like(go), score)


@wrong("takes an argument that no pose_inputs declare", "A2", "pose_inputs")
class InputNotDeclared(Scored):
    pose_inputs = ()


@wrong("declares pose_inputs that only combine takes", "A2", "pose_inputs")
class InputNotTaken(Scored):
    def pose_weights(self, predictions):
        return soft_weights(predictions, self.t)


WRONG: tuple[Wrong, ...] = tuple(_bank)
