"""The base class of all combinations, and the three depths at which one can be written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from mtenn_core.errors import CombinationContractError
from mtenn_core.gradients import GradDict, attach_gradients, join_grad_dict, split_grad_dict
from mtenn_core.hookspecs import hookimpl

# The methods that every combination inherits are computed by the engine, which needs this class:
# they import the engine when they are called.


class Combination(torch.nn.Module):
    """A rule h that makes one prediction h(ŷ_1 … ŷ_M) of the predictions of a compound's poses.

    Write :meth:`combine`; everything else follows from it. Add :meth:`pose_weights` where the
    derivative is known in closed form. Override :meth:`forward` for full control. A combination may
    own parameters and buffers like any module.

    Attributes
    ----------
    min_poses : the smallest number of poses that it can combine
    domain : the open interval in which predictions may lie
    smooth : False for a value with kinks (median, top-k); checks then keep away from ties
    stochastic : True for a value that draws random numbers; checks then repeat the same numbers
    properties : claims that the conformance suite checks, such as ``"permutation_invariant"``
    examples : constructor arguments to validate it with; each is a dict
    pose_inputs : names of further numbers per pose, such as ``("docking_score",)``. They come from
        ``model(poses, pose_inputs={"docking_score": …})`` and are passed to ``combine``,
        ``pose_weights`` and ``reference`` by name: ``combine(self, predictions, docking_score)``
    """

    min_poses: ClassVar[int] = 1
    domain: ClassVar[tuple[float, float]] = (-math.inf, math.inf)
    smooth: ClassVar[bool] = True
    stochastic: ClassVar[bool] = False
    properties: ClassVar[frozenset[str]] = frozenset()
    examples: ClassVar[Sequence[dict[str, Any]]] = ({},)
    pose_inputs: ClassVar[tuple[str, ...]] = ()

    split_grad_dict = staticmethod(split_grad_dict)
    join_grad_dict = staticmethod(join_grad_dict)

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        if cls.combine is Combination.combine and cls.forward is Combination.forward:
            raise TypeError(
                f"{cls.__name__} cannot be instantiated: it must define combine(predictions),"
                " or forward(pred_list, grad_dict, param_names, *model_params)"
            )
        combination = super().__new__(cls)
        # torch's __setattr__ needs __init__ to have run.
        combination.__dict__["_arguments"] = args, kwargs
        return combination

    @classmethod
    @hookimpl
    def mtenn_combination(cls) -> type[Self]:
        """Return this class: every combination is a plugin (see :mod:`mtenn_core.hookspecs`)."""
        return cls

    def extra_repr(self) -> str:
        """Return the constructor's arguments, for ``repr``."""
        from mtenn_core._engine.declarations import constructor_arguments  # needs this class

        shown = constructor_arguments(self, defaults=True)
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())

    # *args, so that type checkers accept a subclass that takes its pose inputs by position or name.
    def combine(self, predictions: Tensor, *args: Any, **pose_inputs: Any) -> Tensor:
        """Return the combined prediction h, differentiable by autograd.

        Parameters
        ----------
        predictions : shape (n_poses,), float32 or wider when called by the core
        **pose_inputs : one for each name in ``pose_inputs``, shape (n_poses,), dtype and device of
            ``predictions``

        Returns
        -------
        shape (), in the unit, dtype and device of ``predictions``
        """
        raise CombinationContractError(
            f"{type(self).__name__} defines only forward and has no combine(predictions)"
        )

    def pose_weights(self, predictions: Tensor, *args: Any, **pose_inputs: Any) -> Tensor:
        """Return ∂h/∂ŷ_i for every pose.

        Override it with the closed form, which training then uses. This method derives the weights
        from :meth:`combine` by autograd, or else from the backward of :meth:`forward`.

        Parameters
        ----------
        predictions : shape (n_poses,)
        **pose_inputs : as for :meth:`combine`

        Returns
        -------
        shape (n_poses,), dimensionless, dtype and device of ``predictions``
        """
        from mtenn_core._engine.evaluation import derived_weights  # needs this class

        return derived_weights(self, predictions, pose_inputs)

    def reference(self, predictions: Tensor, *args: Any, **pose_inputs: Any) -> Tensor:
        """Return the combined prediction from an independent formula; optional.

        The conformance suite compares ``combine`` and its derivative with this one, which may be
        plain and slow where ``combine`` is fast and stable. Training does not use it.

        Parameters
        ----------
        predictions : shape (n_poses,), float64
        **pose_inputs : as for :meth:`combine`

        Returns
        -------
        shape ()
        """
        raise CombinationContractError(f"{type(self).__name__} declares no reference(predictions)")

    def forward(
        self,
        pred_list: Sequence[Tensor],
        grad_dict: GradDict,
        param_names: Sequence[str],
        *model_params: Tensor,
        **pose_inputs: Any,
    ) -> Tensor:
        """Return the combined prediction, with a backward that uses the gradients of the poses.

        Parameters
        ----------
        pred_list, grad_dict, param_names, *model_params : see :func:`mtenn_core.attach_gradients`
        **pose_inputs : as for :meth:`combine`

        Returns
        -------
        shape (), dtype and device of the predictions
        """
        from mtenn_core._engine.evaluation import combined_prediction  # needs this class

        predictions = attach_gradients(pred_list, grad_dict, param_names, *model_params)
        return combined_prediction(self, predictions, pose_inputs)


def as_mtenn_combination(combination: Combination) -> torch.nn.Module:
    """Return a module that mtenn's ``GroupedModel`` takes as a combination (mtenn 0.5 and later).

    Its ``forward(pred_list, grad_dict, param_names, *model_params)`` returns the pair (combined,
    pose predictions), shapes () and (n_poses,), both differentiable.

    Raises
    ------
    ValueError : the combination needs pose inputs, which ``GroupedModel`` does not pass on, or has
        trainable parameters, of which ``GroupedModel`` expects a gradient per pose
    """
    from mtenn_core._engine.mtenn_adapter import MtennCombination  # needs Combination

    trainable = [name for name, param in combination.named_parameters() if param.requires_grad]
    if trainable or combination.pose_inputs:
        what = f"trainable parameters {trainable}"
        if combination.pose_inputs:
            what = f"pose_inputs {combination.pose_inputs}"
        raise ValueError(
            f"{type(combination).__name__} has {what}. mtenn's GroupedModel cannot handle them. Use"
            " mtenn_core.MultiPoseModel instead."
        )
    return MtennCombination(combination)
