"""Attention over the embeddings of the poses (Ilse, Tomczak, Welling 2018, arXiv 1802.04712)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import dropout as with_dropout
from torch.nn.functional import linear

from mtenn_attention.softmax import SoftmaxCombination, at_least_float32


class AttentionCombination(SoftmaxCombination):
    """Pooled embedding z = Σ_i a_i h_i with a = softmax(s/τ) and s_i = wᵀ tanh(V h_i).

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
    ValueError : an argument is out of its range
    """

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
        for name, number in (("n_features", n_features), ("n_hidden", n_hidden)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1; found {number}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1; found {dropout}")
        self.pose_columns = n_features
        self.dropout = dropout
        self.V = torch.nn.Linear(n_features, n_hidden, bias=False)
        self.w = torch.nn.Linear(n_hidden, 1, bias=False)
        self.readout = torch.nn.Linear(n_features, 1) if readout else None

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
        embeddings = at_least_float32(predictions)
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
        sizes : the number of poses of each compound. Without it, all poses belong to one compound.

        Returns
        -------
        shape (n_poses,), dimensionless, dtype and device of ``predictions``
        """
        units = self._hidden_units(at_least_float32(predictions))
        parts = [units] if sizes is None else units.split(torch.as_tensor(sizes).tolist())
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

    tanh is almost linear near 0. The gate sigm(U h_i) makes up for it. Dropout acts on the
    products.

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


def _map(layer: torch.nn.Linear, numbers: Tensor) -> Tensor:
    """Return a layer's result in the dtype of its input, whatever the dtype of its parameters."""
    bias = None if layer.bias is None else layer.bias.to(numbers.dtype)
    return linear(numbers, layer.weight.to(numbers.dtype), bias)
