"""The base class of all combinations, and the three depths at which one can be written."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from mtenn_core.errors import CombinationContractError, PredictionError
from mtenn_core.gradients import (
    GradDict,
    at_least_float32,
    attach_gradients,
    join_grad_dict,
    no_autocast,
    refuse_double_backward,
    split_grad_dict,
)
from mtenn_core.hookspecs import hookimpl

PoseInputs = Mapping[str, Tensor]
NO_INPUTS: PoseInputs = MappingProxyType({})


class Combination(torch.nn.Module):
    """Makes one prediction h(ŷ_1 … ŷ_M) of the predictions of a compound's poses.

    Write :meth:`combine`; everything else follows from it. Add :meth:`pose_weights` where the
    derivative is known in closed form. Override :meth:`forward` for full control. A combination may
    own parameters and buffers like any module.

    Attributes
    ----------
    min_poses : the smallest number of poses that it can combine
    domain : the open interval in which predictions may lie
    smooth : False for a value with kinks (median, top-k), which is then probed away from ties
    stochastic : True for a value that draws random numbers, which are then replayed
    properties : claims for the conformance suite to hold it to, ``"permutation_invariant"`` say
    examples : constructor arguments to validate it with; each is a dict
    pose_inputs : names of further numbers per pose that it needs, ``("docking_score",)`` say. They
        come from ``model(poses, pose_inputs={"docking_score": …})`` and are handed to ``combine``,
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
        if not (overrides(cls, "combine") or overrides(cls, "forward")):
            raise TypeError(
                f"{cls.__name__} cannot be instantiated: it must define combine(predictions),"
                " or forward(pred_list, grad_dict, param_names, *model_params)"
            )
        combination = super().__new__(cls)
        # Past torch's __setattr__, which wants __init__ to have run.
        combination.__dict__["_arguments"] = args, kwargs
        return combination

    @classmethod
    @hookimpl
    def mtenn_combination(cls) -> type[Self]:
        """Return this class: every combination is a plugin (see :mod:`mtenn_core.hookspecs`)."""
        return cls

    def extra_repr(self) -> str:
        """Return the constructor's arguments, for ``repr``."""
        shown = constructor_arguments(self, defaults=True)
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())

    # *args: a subclass that takes pose inputs by name is then no incompatible override.
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
            f"{type(self).__name__} defines forward alone and has no combine(predictions)"
        )

    def pose_weights(self, predictions: Tensor, *args: Any, **pose_inputs: Any) -> Tensor:
        """Return ∂h/∂ŷ_i for every pose.

        Overridden by a closed form, it is what training uses. This one derives the weights from
        :meth:`combine` by autograd, or else from the backward of :meth:`forward`.

        Parameters
        ----------
        predictions : shape (n_poses,)
        **pose_inputs : as for :meth:`combine`

        Returns
        -------
        shape (n_poses,), dimensionless, dtype and device of ``predictions``
        """
        if overrides(type(self), "combine"):
            return autograd_weights(self, predictions, pose_inputs)
        return backward_weights(self, predictions, pose_inputs)

    def reference(self, predictions: Tensor, *args: Any, **pose_inputs: Any) -> Tensor:
        """Return the combined prediction again, stated independently; optional.

        The conformance suite holds the value, and its derivative, to this one: plain and slow
        where ``combine`` is fast and stable, say. Training does not use it.

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
        predictions = attach_gradients(pred_list, grad_dict, param_names, *model_params)
        return combined_prediction(self, predictions, pose_inputs)


def as_mtenn_combination(combination: Combination) -> torch.nn.Module:
    """Return a combination as mtenn's ``GroupedModel`` takes it (mtenn 0.5 and later).

    Its ``forward(pred_list, grad_dict, param_names, *model_params)`` returns the pair (combined,
    pose predictions), shapes () and (n_poses,), both differentiable.

    Raises
    ------
    ValueError : it needs pose inputs, or trains parameters of its own: ``GroupedModel`` has no
        place for the former, and asks each parameter for a gradient per pose
    """
    trainable = [name for name, param in combination.named_parameters() if param.requires_grad]
    if trainable or combination.pose_inputs:
        what = f"pose_inputs {combination.pose_inputs}" if combination.pose_inputs else trainable
        raise ValueError(
            f"{type(combination).__name__} has {what}, and mtenn's GroupedModel has no place for"
            " them: use mtenn_core.MultiPoseModel"
        )
    return _MtennCombination(combination)


class _MtennCombination(torch.nn.Module):
    def __init__(self, combination: Combination) -> None:
        super().__init__()
        self.combination = combination

    def forward(
        self,
        pred_list: Sequence[Tensor],
        grad_dict: GradDict,
        param_names: Sequence[str],
        *model_params: Tensor,
    ) -> tuple[Tensor, Tensor]:
        predictions = attach_gradients(pred_list, grad_dict, param_names, *model_params)
        if overrides(type(self.combination), "forward"):
            args = (pred_list, grad_dict, param_names, *model_params)
            return full_depth_prediction(self.combination, *args), predictions
        return combined_prediction(self.combination, predictions), predictions


def constructor_arguments(combination: Combination, *, defaults: bool = False) -> dict[str, Any]:
    """Return the arguments that a combination was made with, by name.

    Parameters
    ----------
    defaults : whether to name those that were not given, too
    """
    try:
        args, kwargs = combination.__dict__["_arguments"]
        bound = constructor_signature(type(combination)).bind(*args, **kwargs)
    except (KeyError, TypeError, ValueError):  # made without __new__, or of a strange signature
        return {}
    if defaults:
        bound.apply_defaults()
    arguments = dict(bound.arguments)
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name, {})
        elif parameter.kind is parameter.VAR_POSITIONAL and not arguments.get(name):
            arguments.pop(name, None)
    return arguments


def constructor_signature(combination: type[Combination]) -> inspect.Signature:
    """Return the signature of ``__init__``, without ``self``.

    That of the class is the one of ``__new__``, above, in earlier releases of Python 3.11.
    """
    signature = inspect.signature(combination.__init__)
    _, *parameters = signature.parameters.values()
    return signature.replace(parameters=parameters)


def overrides(combination: type[Combination], method: str) -> bool:
    """Whether a class has a ``method`` of its own, beside the one of :class:`Combination`."""
    return getattr(combination, method) is not getattr(Combination, method)


def autograd_weights(
    combination: Combination, predictions: Tensor, pose_inputs: PoseInputs = NO_INPUTS
) -> Tensor:
    """Return the pose weights that autograd derives from ``combine``, shape (n_poses,)."""
    with torch.inference_mode(False), torch.enable_grad():
        y = predictions.detach().clone().requires_grad_()
        value = combined_prediction(combination, y, pose_inputs, closed_form=False)
        (weights,) = torch.autograd.grad(value, y)
    return weights


def backward_weights(
    combination: Combination, predictions: Tensor, pose_inputs: PoseInputs = NO_INPUTS
) -> Tensor:
    """Return the pose weights that the backward of ``forward`` uses, shape (n_poses,).

    With the gradients of the poses set to the unit vectors e_1 … e_M, the gradient of the combined
    prediction is the vector of the weights.
    """
    with torch.inference_mode(False), torch.enable_grad():
        pred_list = list(predictions.detach().clone())
        probe = torch.zeros_like(predictions, requires_grad=True)
        unit_vectors = list(torch.eye(len(probe), dtype=probe.dtype, device=probe.device))
        value = full_depth_prediction(
            combination, pred_list, {"probe": unit_vectors}, ["probe"], probe, **pose_inputs
        )
        (weights,) = torch.autograd.grad(value, probe)
    return weights


def combined_prediction(
    combination: Combination,
    predictions: Tensor,
    pose_inputs: PoseInputs = NO_INPUTS,
    *,
    closed_form: bool = True,
) -> Tensor:
    """Return what ``combination`` makes of a differentiable vector of predictions.

    ``combine`` in float32 at least, checked, and with the derivative from ``pose_weights`` if that
    is overridden.

    Parameters
    ----------
    predictions : shape (n_poses,)
    pose_inputs : what ``combination.pose_inputs`` names, each of shape (n_poses,)
    closed_form : False leaves the derivative to autograd

    Returns
    -------
    shape (), dtype and device of ``predictions``

    Raises
    ------
    PredictionError : fewer poses than ``min_poses``
    CombinationContractError : ``combine`` or ``pose_weights`` returned another shape
    """
    check_n_poses(combination, len(predictions))
    wide = predictions.to(at_least_float32(predictions.dtype))
    pose_inputs = {name: numbers.to(wide.dtype) for name, numbers in pose_inputs.items()}
    # A stochastic value would draw other numbers for its weights than it drew for itself.
    closed_form &= overrides(type(combination), "pose_weights") and not combination.stochastic
    with no_autocast(predictions.device.type):  # it would compute in half precision
        if closed_form and wide.requires_grad and torch.is_grad_enabled():
            detached = wide.detach()
            value = check_scalar(combination, combination.combine(detached, **pose_inputs))
            # Now, and not a view: a parameter of the combination may have changed by backward.
            with torch.no_grad():
                weights = combination.pose_weights(detached, **pose_inputs)
            _check_weights(combination, weights, detached)
            value = _ClosedForm.apply(value, wide, weights.clone())
        else:
            value = check_scalar(combination, combination.combine(wide, **pose_inputs))
    return value.to(predictions.dtype)


def full_depth_prediction(combination: Combination, *args: Any, **pose_inputs: Any) -> Tensor:
    """Return what the ``forward`` of a combination gives, shape ().

    Parameters
    ----------
    *args : ``pred_list, grad_dict, param_names, *model_params``
    """
    pred_list, *_ = args
    with no_autocast(pred_list[0].device.type):
        return check_scalar(combination, first_of_pair(combination(*args, **pose_inputs)))


def first_of_pair(value: Any) -> Any:
    """Return the first of (combined, pose predictions), which combinations of mtenn return.

    The second is not needed: a :class:`~mtenn_core.MultiPoseModel` has its own.
    """
    return value[0] if isinstance(value, tuple) and len(value) == 2 else value


def check_facts(combination: Combination) -> None:
    """Raise a :class:`~mtenn_core.errors.CombinationContractError` for facts that cannot be."""
    fewest, domain, properties = combination.min_poses, combination.domain, combination.properties
    rules = (
        ("min_poses", "an int above 0", isinstance(fewest, int) and fewest > 0),
        ("domain", "(low, high) with low < high", _is_interval(domain)),
        ("properties", "a set of names", isinstance(properties, frozenset | set)),
        ("pose_inputs", "a tuple of names", _are_names(combination.pose_inputs)),
    )
    for fact, rule, holds in rules:
        if not holds:
            raise CombinationContractError(
                f"{type(combination).__name__}.{fact} must be {rule};"
                f" found {getattr(combination, fact)!r}"
            )


def _is_interval(found: Any) -> bool:
    try:
        low, high = found
        return bool(low < high)
    except (TypeError, ValueError):
        return False


def _are_names(found: Any) -> bool:
    return isinstance(found, tuple) and all(isinstance(n, str) and n.isidentifier() for n in found)


def check_n_poses(combination: Combination, n_poses: int, compound: int | None = None) -> None:
    """Raise a :class:`~mtenn_core.errors.PredictionError` for fewer poses than ``min_poses``."""
    fewest = max(1, combination.min_poses)
    if n_poses < fewest:
        who = "" if compound is None else f"compound {compound}: "
        raise PredictionError(
            f"{who}{type(combination).__name__} needs at least {fewest} pose(s); found {n_poses}",
            compound=compound,
        )


def check_scalar(combination: Combination, value: Tensor) -> Tensor:
    """Return the ``value`` of a combination if it is a tensor of shape (), else raise."""
    if not isinstance(value, Tensor) or value.shape != ():
        raise CombinationContractError(
            f"{type(combination).__name__} must return a scalar tensor, shape ();"
            f" found {_shape_or_type(value)}"
        )
    return value


def _check_weights(combination: Combination, weights: Tensor, predictions: Tensor) -> None:
    if not isinstance(weights, Tensor) or weights.shape != predictions.shape:
        raise CombinationContractError(
            f"{type(combination).__name__}.pose_weights must return one weight per pose, shape"
            f" {tuple(predictions.shape)}; found {_shape_or_type(weights)}"
        )


def _shape_or_type(found: object) -> str:
    return f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__


class _ClosedForm(torch.autograd.Function):
    """A value whose derivative with respect to the predictions is known.

    The value carries the graph of the combination's own parameters, the predictions that of the
    poses.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, predictions: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(weights)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        (weights,) = ctx.saved_tensors
        return grad_output, grad_output * weights, None
