"""The zoo of rules for vectors: right combinations that take several numbers per pose.

Some return a vector, and some return one number. The mistakes of :mod:`bank.wrong_vectors` derive
from them.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch

from mtenn_core import Combination
from mtenn_core._engine.known_gradients import refuse_double_backward
from mtenn_core.combination import InputKind

from .bases import positive
from .right import Network, Right
from .right import right as into_zoo

_zoo: list[Right] = []

POOLING = frozenset({"permutation_invariant", "replication_invariant"})


def right(name: str, **arguments):
    """Put a class into the zoo of this module, made with these arguments."""
    return into_zoo(name, _zoo, **arguments)


# Without parameters.


@right("columns: mean of any number")
class MeanOfColumns(Combination):
    pose_columns = "any"
    properties = POOLING | {"bounded", "monotone", "idempotent", "translation_equivariant"}

    def combine(self, predictions):
        return predictions.mean(0)

    def reference(self, predictions):
        return sum(predictions.unbind(0)) / len(predictions)


@right("columns: maximum of each, ties share")
class MaxOfColumns(Combination):
    pose_columns = "any"
    smooth = False
    properties = POOLING | {"bounded", "monotone", "idempotent", "translation_equivariant"}

    def combine(self, predictions):
        return predictions.amax(0)

    def reference(self, predictions):
        return predictions.sort(0).values[-1]


class LogSumExp(Combination):
    """(1/t) ln Σ_i exp(t y_ij) of each column j, less ln M."""

    pose_columns = "any"
    properties = POOLING | {"bounded", "monotone", "idempotent", "translation_equivariant"}
    examples = ({}, {"t": 3.0})

    def __init__(self, t=1.0):
        super().__init__()
        self.t = positive("t", t)

    def combine(self, predictions):
        largest = predictions.amax(0).detach()
        means = torch.logsumexp(self.t * (predictions - largest), dim=0) - math.log(
            len(predictions)
        )
        return largest + means / self.t

    def reference(self, predictions):
        largest = predictions.amax(0)
        return largest + (self.t * (predictions - largest)).exp().mean(0).log() / self.t


right("columns: log-mean-exp of each")(LogSumExp)


class Confidence(Combination):
    """h = Σ_i p_i y_i with p = softmax(t c): ∂h/∂y_i = p_i and ∂h/∂c_i = t p_i (y_i - h)."""

    pose_columns = ("affinity", "confidence")
    properties = POOLING | {"translation_equivariant"}
    examples = ({}, {"t": 3.0})

    def __init__(self, t=1.0):
        super().__init__()
        self.t = positive("t", t)

    # Shift by the extreme first: t*c alone loses its last digits where |c| is large.
    def shares(self, confidence):
        return torch.softmax(self.t * (confidence - confidence.amax().detach()), dim=0)

    def translation(self, affinity):
        return affinity.amin().detach()

    def combine(self, predictions):
        affinity, confidence = predictions.unbind(1)
        low = self.translation(affinity)
        return low + self.shares(confidence) @ (affinity - low)

    def reference(self, predictions):
        affinity, confidence = predictions.unbind(1)
        low = affinity.amin()
        factors = (self.t * (confidence - confidence.amax())).exp()
        return low + (factors * (affinity - low)).sum() / factors.sum()


right("columns: affinities weighted by confidences")(Confidence)


@right("columns: affinities weighted by confidences, closed form", t=2.0)
class ConfidenceClosedForm(Confidence):
    def pose_weights(self, predictions):
        affinity, confidence = predictions.unbind(1)
        shares = self.shares(confidence)
        above = affinity - affinity.amin()
        return torch.stack([shares, self.t * shares * (above - shares @ above)], dim=1)


@right("columns: mean of affinities with positive weights, closed form")
class PositiveColumn(Combination):
    pose_columns = ("affinity", "weight")
    domain = (0.0, math.inf)
    properties = POOLING | {"bounded"}

    def combine(self, predictions):
        affinity, weight = predictions.unbind(1)
        return (weight * affinity).sum() / weight.sum()

    def pose_weights(self, predictions):
        affinity, weight = predictions.unbind(1)
        shares = weight / weight.sum()
        of_weight = (affinity - shares @ affinity) / weight.sum()
        return torch.stack([shares, of_weight], dim=1)


@right("columns: mean row of the two poses that are best in one column")
class TopTwo(Combination):
    pose_columns = ("score", "affinity", "contacts")
    min_poses, smooth = 2, False
    properties = frozenset({"permutation_invariant", "bounded"})

    def combine(self, predictions):
        best = predictions[:, 0].topk(2).indices
        return predictions[best].mean(0)


@right("columns: covariances, upper triangle")
class Covariances(Combination):
    pose_columns = 3
    min_poses = 2
    properties = POOLING

    def combine(self, predictions):
        centred = predictions - predictions.mean(0)
        covariances = centred.T @ centred / len(predictions)
        return covariances[torch.triu_indices(3, 3).unbind()]


@right("columns: free energy, mean energy and mean of an observable")
class Ensemble(Combination):
    """Three averages over a Boltzmann ensemble, whose energies are one of the columns."""

    pose_columns = ("energy", "observable")
    properties = frozenset({"permutation_invariant"})

    def combine(self, predictions):
        energy, observable = predictions.unbind(1)
        lowest = energy.amin().detach()
        populations = torch.softmax(lowest - energy, dim=0)
        free_energy = lowest - torch.logsumexp(lowest - energy, dim=0)
        mean_energy = lowest + populations @ (energy - lowest)
        return torch.stack([free_energy, mean_energy, populations @ observable])


# With pose inputs.


class Strained(Combination):
    """A pooled embedding: Σ_i p_i y_i with p = softmax(-t · strain)."""

    pose_columns = 3
    pose_inputs: ClassVar[dict[str, InputKind]] = {"strain": "real"}
    properties = POOLING | {"translation_equivariant", "monotone"}
    examples = ({}, {"t": 3.0})

    def __init__(self, t=1.0):
        super().__init__()
        self.t = positive("t", t)

    def combine(self, predictions, strain):
        return torch.softmax(-self.t * (strain - strain.amin().detach()), dim=0) @ predictions

    def reference(self, predictions, strain):
        factors = (-self.t * (strain - strain.amin())).exp()
        return (factors[:, None] * predictions).sum(0) / factors.sum()


right("columns: pooled vector, weighted by a strain")(Strained)


class OfLowestCharge(Confidence):
    """Only the poses of the lowest charge state count: a mask."""

    pose_inputs: ClassVar[dict[str, InputKind]] = {"charge": "label"}
    properties = frozenset({"permutation_invariant"})

    def combine(self, predictions, charge):
        masked = predictions[:, 1].masked_fill(self.others(charge), -math.inf)
        return self.shares(masked) @ predictions[:, 0]

    def others(self, charge):
        return charge != charge.amin()

    def reference(self, predictions, charge):
        return super().reference(predictions[charge == charge.amin()])


right("columns: confidences with a mask")(OfLowestCharge)


# With parameters of their own.


class UserSets(Network):
    """The rule of the guide: ρ(Σ_i φ(y_i)), where φ and ρ are small networks."""

    pose_columns = 3
    properties = frozenset({"permutation_invariant"})

    def __init__(self):
        super().__init__()
        self.phi, self.rho = self.layers(3, 8, 4), self.layers(4, 8, 1)

    def combine(self, predictions):
        return self.rho(torch.tanh(self.phi(predictions)).sum(0))[0]


right("columns: deep sets, sum")(UserSets)


@right("columns: deep sets, mean, a vector")
class MeanOfSets(UserSets):
    properties = POOLING

    def __init__(self):
        super().__init__()
        self.rho = self.layers(4, 8, 2)

    def combine(self, predictions):
        return self.rho(torch.tanh(self.phi(predictions)).mean(0))


class TanhSets(Network):
    """h = Σ_i tanh(y_i W) · r, with ∂h/∂y_i = (r (1 - tanh²(y_i W))) Wᵀ."""

    pose_columns = 3
    properties = frozenset({"permutation_invariant"})

    def __init__(self):
        super().__init__()
        layer = self.layers(3, 5)[0]
        self.w = torch.nn.Parameter(layer.weight.detach().T.clone())
        self.r = torch.nn.Parameter(torch.linspace(-1.0, 2.0, 5))

    def combine(self, predictions):
        return torch.tanh(predictions @ self.w).sum(0) @ self.r

    def pose_weights(self, predictions):
        return (1 - torch.tanh(predictions @ self.w).square()) * self.r @ self.w.T


right("columns: deep sets with a closed form")(TanhSets)


class Gated(Network):
    """Gated attention of Ilse, Tomczak and Welling 2018 (arXiv 1802.04712): a pooled vector."""

    properties = POOLING
    examples = ({}, {"n_columns": 3})

    def __init__(self, n_columns=4):
        super().__init__()
        self.pose_columns = n_columns
        self.v_and_u, self.score = self.layers(n_columns, 10), self.layers(5, 1)

    def gate(self, predictions):
        of_v, of_u = self.v_and_u(predictions).chunk(2, dim=1)
        return torch.tanh(of_v) * torch.sigmoid(of_u)

    def attention(self, predictions):
        return torch.softmax(self.score(self.gate(predictions)), dim=0)

    def combine(self, predictions):
        return (self.attention(predictions) * predictions).sum(0)


right("columns: gated attention")(Gated)
right("columns: gated attention, as many as an argument says", n_columns=7)(Gated)


class GatedReadout(Gated):
    """The pooled vector, read out as one number."""

    def __init__(self, n_columns=4):
        super().__init__(n_columns)
        self.readout = self.layers(n_columns, 1)

    def combine(self, predictions):
        return self.readout(super().combine(predictions))[0]


right("columns: gated attention with a readout")(GatedReadout)


@right("columns: gated attention with dropout in the gate")
class GatedDropout(GatedReadout):
    stochastic = True
    properties = frozenset()

    def gate(self, predictions):
        return torch.nn.functional.dropout(super().gate(predictions), 0.25, self.training)


class Tempered(Gated):
    """Attention with a learned temperature: softmax(s exp(log_t))."""

    def __init__(self, n_columns=4):
        super().__init__(n_columns)
        self.log_t = torch.nn.Parameter(torch.tensor(0.3))

    def attention(self, predictions):
        return torch.softmax(self.score(self.gate(predictions)) * self.log_t.exp(), dim=0)


right("columns: attention with a learned temperature")(Tempered)


class SelfAttention(Network):
    """Each pose attends to all poses; the mean of the results is a vector."""

    pose_columns = 4
    properties = POOLING

    def __init__(self):
        super().__init__()
        layers = self.layers(4, 4, 4, 4)
        self.q, self.k, self.v = layers[0], layers[2], layers[4]

    def scores(self, predictions):
        return self.q(predictions) @ self.k(predictions).T / math.sqrt(4)

    def combine(self, predictions):
        attention = torch.softmax(self.scores(predictions), dim=1)
        return (attention @ self.v(predictions)).mean(0)


right("columns: self-attention over the poses")(SelfAttention)


@right("columns: mixer without normalisation")
class Mixer(Network):
    """Two rounds: each pose gets a function of itself and of the mean pose added."""

    pose_columns = 3
    properties = POOLING

    def __init__(self):
        super().__init__()
        self.first, self.second = self.layers(6, 8, 3), self.layers(6, 7, 3)

    def combine(self, predictions):
        for network in (self.first, self.second):
            means = predictions.mean(0, keepdim=True).expand_as(predictions)
            predictions = predictions + network(torch.cat([predictions, means], dim=1))
        return predictions.mean(0)


@right("columns: pooling by a learned query, many columns")
class LearnedQuery(Network):
    pose_columns = 32
    properties = POOLING

    def __init__(self):
        super().__init__()
        self.query = torch.nn.Parameter(self.layers(32, 1)[0].weight[0].detach().clone())
        self.value = self.layers(32, 6)

    def combine(self, predictions):
        return torch.softmax(predictions @ self.query, dim=0) @ self.value(predictions)


class Mapped(Network):
    """(1/M) Σ_i tanh(y_i W), a vector, by an autograd function that asks for each derivative."""

    pose_columns = 3
    properties = POOLING

    def __init__(self):
        super().__init__()
        layer = self.layers(3, 3)[0]
        self.w = torch.nn.Parameter(layer.weight.detach().T.clone())

    def combine(self, predictions):
        return MappedFunction.apply(self, predictions, self.w)

    def of_predictions(self, go, y, w):
        """Return go · ∂h/∂y, shape (n_poses, 3), for a gradient of shape (3,)."""
        return (1 - torch.tanh(y @ w).square()) * go @ w.T / len(y)

    def of_w(self, go, y, w):
        return y.T @ ((1 - torch.tanh(y @ w).square()) * go) / len(y)


class MappedFunction(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(combination, y, w):
        return torch.tanh(y @ w).mean(0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.combination, y, w = inputs
        ctx.save_for_backward(y, w)

    @staticmethod
    def backward(ctx, go):
        refuse_double_backward()
        combination, (y, w) = ctx.combination, ctx.saved_tensors
        return None, combination.of_predictions(go, y, w), combination.of_w(go, y, w)


right("columns: mean of mapped rows, by an autograd function")(Mapped)


RIGHT_VECTORS: tuple[Right, ...] = tuple(_zoo)
