"""Combinations that weight each pose by a softmax: attention, and weighting by confidences."""

import math
import operator
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout as with_dropout
from torch.nn.functional import linear

from mtenn_core import Combination
from mtenn_core.errors import PredictionError

# In units of τ. A pose this far below the highest score has the weight 0: exp(-1000) is 0 in
# float64.
FAR = 1000.0
# The largest number divided by the largest τ. It is above FAR, because exp(ln τ) is rounded.
WIDE = 2000.0


class SoftmaxCombination(Combination):
    """The base of combinations that weight pose i by softmax(s/τ)_i, with a score s_i.

    A ``temperature`` outside 6e-36 to 1.7e35 (in float64, 1.2e-305 to 9e304) counts as the nearer
    end of this range. The derivative with respect to ln τ is 0 there.

    Parameters
    ----------
    temperature : the temperature τ, in the unit of the scores. τ and 1/τ are positive and finite.
    learnable : train ln τ with the rest of the model; training starts at ``temperature``

    Raises
    ------
    ValueError : ``temperature`` or 1/``temperature`` is not positive and finite, or ``learnable``
        is not True or False
    """

    def __init__(self, temperature: float, learnable: bool) -> None:
        super().__init__()
        number = _positive("temperature", temperature)
        self.learnable = _flag("learnable", learnable)
        if learnable:
            # It has one dimension because fully_shard does not accept parameters of shape ().
            self.log_temperature = torch.nn.Parameter(torch.tensor([math.log(number)]))
        else:
            self._temperature = number

    @property
    def temperature(self) -> float | Tensor:
        """The temperature in the unit of the scores. If learnable, a tensor of shape ()."""
        return self.log_temperature.exp().squeeze(0) if self.learnable else self._temperature

    def extra_repr(self) -> str:
        """Return the arguments with the current temperature, for ``repr``."""
        arguments = super().extra_repr()
        # After fully_shard, one process alone cannot read the parameter.
        if not self.learnable or hasattr(self.log_temperature, "device_mesh"):
            return arguments
        now = f"temperature={self.log_temperature.exp().item():.6g}"
        return re.sub(r"temperature=[^,]*", now, arguments)

    def _softmax(self, scores: Tensor) -> Tensor:
        """Return softmax(scores/τ), shape (n_poses,), in the dtype of the scores.

        A pose at -inf has the weight 0. If all poses are at -inf, or some are at +inf, these poses
        share the weight equally.
        """
        temperature = self._temperature_within_range(scores.dtype)
        # Infinite scores count as the largest numbers, because inf - inf is NaN.
        finite = torch.where(scores.isinf(), scores.detach().nan_to_num(), scores)
        # The softmax does not depend on this shift, so autograd need not differentiate the highest.
        below = finite - finite.detach().amax()
        # If scores/τ were infinite, the derivative with respect to ln τ would be 0 * inf.
        far = below < -FAR * temperature
        factors = (below.masked_fill(far, 0) / temperature).exp().masked_fill(far, 0)
        return factors / factors.sum()

    def _temperature_within_range(self, dtype: torch.dtype) -> float | Tensor:
        """Return τ for arithmetic in ``dtype``. FAR * τ and FAR / τ do not overflow."""
        highest = torch.finfo(dtype).max / WIDE
        if not self.learnable:
            return min(max(self._temperature, 1 / highest), highest)
        # Clamp ln τ and not τ: the derivative of a clamped exp(1000) would be 0 * inf.
        bound = math.log(highest)
        return self.log_temperature.to(dtype).clamp(-bound, bound).exp().squeeze(0)


class AttentionCombination(SoftmaxCombination):
    """Pooled embedding z = Σ_i a_i h_i with a = softmax(s/τ) and s_i = wᵀ tanh(V h_i).

    These are equations 7 and 8 of Ilse, Tomczak and Welling 2018 (arXiv 1802.04712), with τ = 1.

    V and w are initialized as :class:`torch.nn.Linear` does, from torch's random state: call
    ``torch.manual_seed`` first to repeat them. They have no bias, as in the paper.

    Parameters
    ----------
    n_features : the number of features of each pose, the length of h_i
    n_hidden : the number of hidden units, the rows of V
    dropout : in training mode, the probability that a hidden unit of a pose is zeroed. The others
        are divided by 1 - ``dropout``. Each call draws anew; evaluation mode draws nothing.
    readout : return a learned linear map of z to one number, shape (), instead of z
    temperature : the temperature τ. τ and 1/τ are positive and finite.
    learnable : train ln τ with the rest of the model; training starts at ``temperature``

    Raises
    ------
    ValueError : an argument is out of its range, or of another type
    """

    pose_columns: int | str = "any"  # of an instance: n_features
    examples = (
        {"n_features": 3, "n_hidden": 4},
        {"n_features": 3, "n_hidden": 4, "readout": True, "temperature": 0.5},
        {"n_features": 3, "n_hidden": 4, "dropout": 0.25, "readout": True, "learnable": True},
    )

    def __init__(
        self,
        n_features: int,
        n_hidden: int = 64,
        dropout: float = 0.0,
        readout: bool = False,
        temperature: float = 1.0,
        learnable: bool = False,
    ) -> None:
        super().__init__(temperature, learnable)
        self.pose_columns = _whole_number("n_features", n_features)
        n_hidden = _whole_number("n_hidden", n_hidden)
        self.dropout = _number(dropout)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1; found dropout = {dropout!r}")
        has_readout = _flag("readout", readout)
        self.V = torch.nn.Linear(self.pose_columns, n_hidden, bias=False)
        self.w = torch.nn.Linear(n_hidden, 1, bias=False)
        self.readout = torch.nn.Linear(self.pose_columns, 1) if has_readout else None

    # Facts of the instance, read-only: mypy knows them as attributes of the class.
    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        """True if ``combine`` draws random numbers: with dropout, in training mode."""
        return self.training and self.dropout > 0

    @property
    def properties(self) -> frozenset[str]:  # type: ignore[override]
        """The properties of the value. Dropout treats equal poses differently, so it has none."""
        if self.stochastic:
            return frozenset()
        return frozenset({"permutation_invariant", "replication_invariant"})

    def combine(self, predictions: Tensor) -> Tensor:
        """Return the pooled embedding of the poses, or the number that the readout makes of it.

        Parameters
        ----------
        predictions : the embeddings, shape (n_poses, n_features)

        Returns
        -------
        shape (n_features,), or () with ``readout``; dtype and device of ``predictions``
        """
        embeddings = _at_least_float32(predictions)
        units = self._hidden_units(embeddings)
        if self.stochastic:
            units = with_dropout(units, self.dropout)
        pooled = self._weights(units) @ embeddings
        result = pooled if self.readout is None else _map(self.readout, pooled).squeeze(0)
        return result.to(predictions.dtype)

    def attention_weights(
        self, predictions: Tensor, sizes: Sequence[int] | Tensor | None = None
    ) -> Tensor:
        """Return the attention a_i of each pose. The attention of a compound's poses sums to 1.

        There is no dropout. The result is differentiable, for example for a loss that keeps the
        attention from one pose. These are no pose weights ∂h/∂ŷ, because the embeddings also change
        the attention.

        Parameters
        ----------
        predictions : the embeddings, shape (n_poses, n_features)
        sizes : the number of poses of each compound. Without it, all poses belong to one compound:
            pass the sizes of the call if it had several.

        Returns
        -------
        shape (n_poses,), dimensionless, dtype and device of ``predictions``

        Raises
        ------
        PredictionError : the embeddings have another shape, or ``sizes`` does not fit them
        """
        if predictions.dim() != 2 or predictions.shape[1] != self.pose_columns:
            raise PredictionError(
                f"{type(self).__name__}.attention_weights takes embeddings of shape (n_poses,"
                f" {self.pose_columns}); found shape {tuple(predictions.shape)}. Pass the poses of"
                " several compounds one after the other, and the argument sizes."
            )
        units = self._hidden_units(_at_least_float32(predictions))
        parts = units.split(_checked_sizes(len(units), sizes))
        return torch.cat([self._weights(part) for part in parts]).to(predictions.dtype)

    def reference(self, predictions: Tensor) -> Tensor:
        """Return Σ_i exp(s_i/τ) h_i / Σ_i exp(s_i/τ), or the readout of it."""
        units = self._hidden_units(predictions)
        if self.stochastic:  # the same random numbers as in combine, if the state is the same
            units = with_dropout(units, self.dropout)
        scores = (units * self.w.weight).sum(dim=1, keepdim=True)
        factors = (scores / self.temperature).exp()
        pooled = (factors * predictions).sum(dim=0) / factors.sum()
        return pooled if self.readout is None else self.readout(pooled).sum()

    def _hidden_units(self, embeddings: Tensor) -> Tensor:
        """Return tanh(V h_i), shape (n_poses, n_hidden)."""
        return _map(self.V, embeddings).tanh()

    def _weights(self, units: Tensor) -> Tensor:
        """Return softmax(wᵀ u_i/τ) for the poses of one compound, shape (n_poses,)."""
        return self._softmax(_map(self.w, units).squeeze(1))


class GatedAttentionCombination(AttentionCombination):
    """Attention with gated hidden units, s_i = wᵀ (tanh(V h_i) ⊙ sigm(U h_i)).

    This is equation 9 of the paper of :class:`AttentionCombination`. tanh is almost linear near 0,
    and the gate sigm(U h_i) makes up for it. Dropout acts on the products.

    Parameters
    ----------
    n_features, n_hidden, dropout, readout, temperature, learnable :
        see :class:`AttentionCombination`. U is initialized as V.
    """

    def __init__(
        self,
        n_features: int,
        n_hidden: int = 64,
        dropout: float = 0.0,
        readout: bool = False,
        temperature: float = 1.0,
        learnable: bool = False,
    ) -> None:
        super().__init__(n_features, n_hidden, dropout, readout, temperature, learnable)
        self.U = torch.nn.Linear(n_features, n_hidden, bias=False)

    def _hidden_units(self, embeddings: Tensor) -> Tensor:
        """Return tanh(V h_i) ⊙ sigm(U h_i), shape (n_poses, n_hidden)."""
        return super()._hidden_units(embeddings) * _map(self.U, embeddings).sigmoid()


class ConfidenceWeightedCombination(SoftmaxCombination):
    """Mean of the affinities weighted by confidences, Σ_i p_i y_i with p = softmax(c/τ).

    The pose model predicts two numbers for each pose: its affinity y_i and its confidence c_i, in
    this order. arXiv 2311.12814 weights pose affinities by pose confidences in this way.

    A pose with the confidence -inf, or so far below the highest that c/τ overflows, has the weight
    0. The others are combined as if it were absent, also if its affinity is infinite. If all
    confidences are -inf, or some are +inf, these poses share the weight equally. The derivative
    with respect to an infinite confidence is 0. If any affinity or confidence is NaN, so is the
    value, whatever the weight of this pose is.

    Parameters
    ----------
    temperature : the temperature τ, in the unit of the confidences. τ and 1/τ are positive and
        finite.
    learnable : train ln τ with the rest of the model; training starts at ``temperature``

    Raises
    ------
    ValueError : ``temperature`` or 1/``temperature`` is not positive and finite, or ``learnable``
        is not True or False
    """

    pose_columns = ("affinity", "confidence")
    properties = frozenset({"permutation_invariant", "replication_invariant"})
    examples = ({}, {"temperature": 0.5, "learnable": True})

    def __init__(self, temperature: float = 1.0, learnable: bool = False) -> None:
        super().__init__(temperature, learnable)

    def combine(self, predictions: Tensor) -> Tensor:
        """Return the weighted mean of the affinities, shape (), in their unit.

        Parameters
        ----------
        predictions : affinity and confidence of each pose, shape (n_poses, 2)
        """
        weights, differences, centre = self._weights_and_differences(predictions)
        return (centre + (weights * differences).sum()).to(predictions.dtype)

    def pose_weights(self, predictions: Tensor) -> Tensor:
        """Return the derivative of the weighted mean with respect to each affinity and confidence.

        With p = softmax(c/τ) and h = Σ p_i y_i: ∂h/∂y_i = p_i and ∂h/∂c_i = p_i (y_i - h)/τ. The
        first sum to 1 and the second to 0. ∂h/∂c_i is 0 where c_i is infinite, and NaN where it is
        NaN. The README of the plugin has the derivation.

        Parameters
        ----------
        predictions : affinity and confidence of each pose, shape (n_poses, 2)

        Returns
        -------
        shape, dtype and device of ``predictions``
        """
        weights, differences, _ = self._weights_and_differences(predictions)
        mean = (weights * differences).sum()
        temperature = self._temperature_within_range(weights.dtype)
        of_confidences = weights * (differences - mean) / temperature
        # A finite change of an infinite confidence has no effect, nor has a confidence without
        # weight. Autograd gives 0 there.
        no_effect = (weights == 0) | predictions[:, 1].isinf()
        of_confidences = of_confidences.masked_fill(no_effect, 0)
        return torch.stack([weights, of_confidences], dim=1).to(predictions.dtype)

    def reference(self, predictions: Tensor) -> Tensor:
        """Return Σ_i p_i y_i with p = softmax(c/τ), shape (), without a shift."""
        affinities, confidences = predictions.unbind(1)
        return (torch.softmax(confidences / self.temperature, dim=0) * affinities).sum()

    def _weights_and_differences(self, predictions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return p, each y minus a centre, and the centre. All are float32 at least.

        The difference is 0 for a pose with p = 0, so that p y is not 0 * inf.
        """
        affinities, confidences = _at_least_float32(predictions).unbind(1)
        weights = self._softmax(confidences)
        absent = (weights == 0) & ~affinities.isnan()
        # Without the shift, y_i - h would lose its last digits if |y| is large. The mean of y minus
        # a constant is the mean minus the constant, so autograd need not differentiate the centre.
        centre = (weights * affinities.masked_fill(absent, 0)).sum().detach()
        centre = torch.where(centre.isfinite(), centre, 0)
        differences = (affinities - centre).masked_fill(absent, 0)
        return weights, differences, centre


def _checked_sizes(n_poses: int, sizes: Sequence[int] | Tensor | None) -> list[int]:
    """Return the number of poses of each compound. All poses belong to one if ``sizes`` is None."""
    if sizes is None:
        whole = [n_poses]
    else:
        try:
            values = sizes.tolist() if isinstance(sizes, Tensor) else sizes
            whole = [operator.index(size) for size in values]
        except TypeError:
            raise PredictionError(
                f"sizes must be whole numbers, one per compound; found {sizes!r}"
            ) from None
    for compound, size in enumerate(whole):
        if size < 1:
            raise PredictionError(
                f"compound {compound}: expected at least one pose; found {size}", compound=compound
            )
    if sum(whole) != n_poses:
        raise PredictionError(
            f"sizes must add up to the number of poses. They describe {len(whole)} compounds with"
            f" {sum(whole)} poses in all; found {n_poses} poses"
        )
    return whole


def _at_least_float32(predictions: Tensor) -> Tensor:
    """Return the predictions in float32, or unchanged if they are float64."""
    return predictions.to(torch.promote_types(predictions.dtype, torch.float32))


def _map(layer: torch.nn.Linear, numbers: Tensor) -> Tensor:
    """Return a layer's result in the dtype of its input, whatever the dtype of its parameters."""
    bias = None if layer.bias is None else layer.bias.to(numbers.dtype)
    return linear(numbers, layer.weight.to(numbers.dtype), bias)


def _positive(name: str, value: Any) -> float:
    """Return an argument as a float. Raise a ValueError if it, or 1 over it, is not positive."""
    number = _number(value)
    if not (0 < number < math.inf and 1 / number < math.inf):
        raise ValueError(
            f"{name} and 1/{name} must be positive and finite; found {name} = {value!r}"
        )
    return number


def _whole_number(name: str, value: Any) -> int:
    """Return an argument as an int. Raise a ValueError if it is not a whole number above 0."""
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{name} must be a whole number of at least 1; found {name} = {value!r}")
    return number


def _flag(name: str, value: Any) -> bool:
    """Return an argument. Raise a ValueError if it is not True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False; found {name} = {value!r}")
    return value


def _number(value: Any) -> float:
    """Return an argument as a float. Return NaN, which is in no range, if it is not a number."""
    if isinstance(value, bool | str):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # torch's are RuntimeErrors
        return math.nan
