"""Compute and check the values and the pose weights of combinations."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor

from mtenn_core._engine.columns import Columns, named_column, named_type
from mtenn_core._engine.declarations import KINDS, check_facts, declared_kinds, overrides
from mtenn_core._engine.known_gradients import refuse_double_backward
from mtenn_core._engine.precision import at_least_float32, no_autocast
from mtenn_core._torch_internals import current_transform, over_rows
from mtenn_core.combination import Combination
from mtenn_core.errors import CombinationContractError, DirectionWarning, PredictionError

PoseInputs = Mapping[str, Tensor]
NO_INPUTS: PoseInputs = MappingProxyType({})

# The number of poses of each compound, for the predictions of calls with several compounds. The
# key is the memory of the predictions, so that predictions.detach() is recognized, too.
_SIZES: WeakKeyDictionary[torch.UntypedStorage, list[int]] = WeakKeyDictionary()


# Concentrations of 1 mM to 1 pM. Free energies of binding are negative.
PIC50_RANGE = 3.0, 12.0
_EXAMINED: WeakSet[Combination] = WeakSet()
_HINTS_GIVEN: set[type[Warning]] = set()


class PoseGradients(NamedTuple):
    """The gradients of a compound's poses. Combinations that override ``forward`` need them.

    Attributes
    ----------
    params : the parameters by name
    grad_dict : returns the gradients as the ``grad_dict`` of ``forward``
    """

    params: Mapping[str, Tensor]
    grad_dict: Callable[[], dict[str, list[Tensor]]]


def inputs_like(predictions: Tensor, inputs: PoseInputs) -> dict[str, Tensor]:
    """Return the pose inputs on the device and in the dtype of the predictions."""
    device, dtype = predictions.device, predictions.dtype
    return {name: numbers.to(device, dtype) for name, numbers in inputs.items()}


def note_sizes(predictions: Tensor, sizes: list[int]) -> None:
    """Note that a tensor has the predictions for several compounds, for :func:`noted_sizes`."""
    if current_transform() is None:  # a tensor of vmap has no memory of its own
        _SIZES[predictions.untyped_storage()] = sizes


def noted_sizes(predictions: Tensor) -> list[int] | None:
    """Return the noted number of poses of each compound; None if there is one compound."""
    if not _SIZES or current_transform() is not None:
        return None
    sizes = _SIZES.get(predictions.untyped_storage())
    has_all = sizes is not None and predictions.dim() > 0 and len(predictions) == sum(sizes)
    return sizes if has_all else None


def prediction_dims(combination: Combination) -> int:
    """Return the number of dimensions of one compound's pose predictions: 1 or 2."""
    return 1 if combination.pose_columns is None else 2


def check_one_compound(combination: Combination, predictions: Any) -> None:
    """Raise a PredictionError if a tensor is known to have the predictions for several compounds.

    ``pose_weights`` would take them for the poses of one compound, and return numbers that look
    like weights.
    """
    sizes = noted_sizes(predictions) if isinstance(predictions, Tensor) else None
    if sizes is not None:
        raise PredictionError(
            f"{type(combination).__name__}.pose_weights takes the predictions for one compound;"
            f" found those for {len(sizes)} compounds. Call model.pose_weights(pose_predictions,"
            " sizes) of the MultiPoseModel, which keeps the compounds apart."
        )
    _check_dims(combination, predictions, f"{type(combination).__name__}.pose_weights")


def _check_dims(combination: Combination, predictions: Tensor, who: str) -> None:
    """Raise a PredictionError if the predictions for one compound have another shape.

    Parameters
    ----------
    who : the function that gets the predictions, for the message
    """
    dims = prediction_dims(combination)
    if isinstance(predictions, Tensor) and predictions.dim() != dims:
        shape = "(n_poses,)" if dims == 1 else "(n_poses, n_columns)"
        raise PredictionError(
            f"{who} takes the predictions for one compound, shape {shape}; found shape"
            f" {tuple(predictions.shape)}"
        )


def of_one_compound(pose_weights: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a method ``pose_weights`` that refuses the predictions for several compounds."""

    @functools.wraps(pose_weights)
    def checked(self: Combination, *args: Any, **kwargs: Any) -> Tensor:
        check_one_compound(self, args[0] if args else next(iter(kwargs.values()), None))
        return pose_weights(self, *args, **kwargs)

    vars(checked)["refuses_several"] = True
    return checked


def check_finite(
    predictions: Tensor, inputs: PoseInputs, sizes: list[int], columns: Columns | None = None
) -> None:
    """Raise an error that names the pose of the first NaN or infinite number, if there is one.

    Parameters
    ----------
    predictions : shape (n_poses,), or (n_poses, n_columns)
    inputs : shape (n_poses,)
    sizes : the number of poses of each compound
    columns : the columns of the predictions, if they have columns
    """
    named = {"the prediction": predictions}
    named |= {f"pose_inputs[{name!r}]": values for name, values in inputs.items()}
    for what, values in named.items():
        finite = torch.isfinite(values.detach())
        try:
            if finite.all():
                continue
        except RuntimeError as error:  # torch.func.vmap
            error.add_note("inside torch.func.vmap, pass check_finite=False to MultiPoseModel")
            raise
        place = (~finite).nonzero()[0].tolist()
        where, compound = _place(place[0], sizes)
        if len(place) > 1:
            where += named_column(columns, place[1])
        raise PredictionError(
            f"{where}: {what} is {values[tuple(place)].item()}. This number would spoil the"
            " gradients of all other poses. Leave the pose out, or pass check_finite=False to"
            " combine it anyway.",
            pose=place[0],
            compound=compound,
        )


def hint_at_direction(
    combination: Combination, predictions: Tensor, inputs: PoseInputs, sizes: list[int]
) -> None:
    """Warn once per process if predictions look like pIC50, but the lowest has the largest weight.

    For pIC50, higher is better. Only the first call of each combination is examined, so that later
    calls do not wait for a GPU.

    Parameters
    ----------
    predictions, inputs, sizes : as for :func:`check_finite`
    """
    if DirectionWarning in _HINTS_GIVEN or combination in _EXAMINED:
        return
    _EXAMINED.add(combination)
    has_weights = overrides(type(combination), "combine") and not combination.stochastic
    if not has_weights or predictions.dim() > 1 or max(sizes) < 2:
        return
    first = next(i for i, size in enumerate(sizes) if size > 1)
    poses = slice(sum(sizes[:first]), sum(sizes[: first + 1]))
    y, (low, high) = predictions.detach(), PIC50_RANGE
    if not ((y >= low) & (y <= high)).all():
        return
    try:  # on a copy, because a call may change the combination's state
        weights = pose_weights(
            copy.deepcopy(combination), y[poses], {name: i[poses] for name, i in inputs.items()}
        )
    except Exception:  # a hint is never an error
        return
    if not weights[y[poses].argmin()] > weights[y[poses].argmax()]:
        return
    _HINTS_GIVEN.add(DirectionWarning)
    warnings.warn(
        f"all pose predictions are between {low:g} and {high:g}, as pIC50 is, for which higher is"
        f" better. But {type(combination).__name__} gives the lowest one the largest weight. For"
        " pIC50, use 'max', or negate the predictions. If lower is better for your predictions,"
        " ignore this hint (mtenn_core.errors.DirectionWarning)",
        DirectionWarning,
        stacklevel=6,  # the caller of the model, behind two functions of torch
    )


def check_kinds(combination: Combination, inputs: PoseInputs, sizes: list[int]) -> None:
    """Raise an error that names the pose of the first number that breaks its declared kind.

    Parameters
    ----------
    inputs, sizes : as for :func:`check_finite`
    """
    for name, kind in declared_kinds(combination).items():
        if kind not in KINDS:
            check_facts(combination)  # raises an error
        if kind == "real":
            continue
        values = inputs[name].detach()
        right = values > 0
        # Above it, the conversion to the dtype of the predictions merges labels.
        largest = 2 / torch.finfo(values.dtype).eps
        if kind == "label":
            right = (values >= 0) & (values == values.round()) & (values < largest)
        if right.all():
            continue
        pose = int((~right).nonzero()[0])
        where, compound = _place(pose, sizes)
        rule = "a number above 0" if kind == "positive" else "a whole number from 0 on"
        if kind == "label" and values[pose] >= largest:
            rule += f" and below {largest:.0f}, because {values.dtype} merges larger ones, and"
        raise PredictionError(
            f"{where}: pose_inputs[{name!r}] must be {rule}, because"
            f" {type(combination).__name__} declares it as {kind!r}; found {values[pose].item()}",
            pose=pose,
            compound=compound,
        )


def _place(pose: int, sizes: list[int]) -> tuple[str, int]:
    """Return a text that names a pose and its compound, and the index of the compound."""
    within, compound = pose, 0
    while within >= sizes[compound]:
        within -= sizes[compound]
        compound += 1
    where = f" (pose {within} of compound {compound})" if len(sizes) > 1 else ""
    return f"pose {pose}{where}", compound


def combined_prediction(
    combination: Combination,
    predictions: Tensor,
    pose_inputs: PoseInputs = NO_INPUTS,
    *,
    closed_form: bool = True,
) -> Tensor:
    """Return the combined prediction for a differentiable vector of pose predictions.

    The value comes from ``combine``, in float32 at least. If the combination overrides
    ``pose_weights``, the derivative comes from ``pose_weights``.

    Parameters
    ----------
    predictions : shape (n_poses,), or (n_poses, n_columns) if the combination declares columns. A
        batch of compounds has n_compounds as one more first dimension.
    pose_inputs : for each name in ``combination.pose_inputs``, shape (n_poses,); for a batch,
        (n_compounds, n_poses)
    closed_form : if False, autograd always derives the derivative from ``combine``

    Returns
    -------
    shape (), or (n_results,) if the value is a vector; for a batch, (n_compounds,) or (n_compounds,
    n_results). Dtype and device of ``predictions``.

    Raises
    ------
    PredictionError : fewer poses than ``min_poses``
    CombinationContractError : ``combine`` or ``pose_weights`` returned a wrong shape
    """
    if torch.is_autocast_enabled(predictions.device.type):  # combine would use half precision
        with no_autocast(predictions.device.type):
            return combined_prediction(
                combination, predictions, pose_inputs, closed_form=closed_form
            )
    check_n_poses(combination, predictions.shape[-prediction_dims(combination)])
    wide = predictions.to(at_least_float32(predictions.dtype))
    pose_inputs = {name: numbers.to(wide.dtype) for name, numbers in pose_inputs.items()}
    overridden = type(combination).pose_weights is not Combination.pose_weights
    # In a stochastic combination, combine and pose_weights would draw different random numbers.
    closed_form &= overridden and not combination.stochastic
    if closed_form and wide.requires_grad and torch.is_grad_enabled():
        value = _with_closed_form(combination, wide, pose_inputs)
    else:
        value = _value(combination, wide, pose_inputs)
    return value.to(predictions.dtype)


def _value(combination: Combination, predictions: Tensor, pose_inputs: PoseInputs) -> Tensor:
    """Return the checked result of ``combine`` for one compound, or for a batch of compounds."""

    def combine(predictions: Tensor, **pose_inputs: Tensor) -> Tensor:
        return _checked_value(combination, combination.combine(predictions, **pose_inputs))

    if predictions.dim() == prediction_dims(combination):
        return combine(predictions, **pose_inputs)
    return over_rows(combine, predictions, pose_inputs)


def _closed_form_weights(
    combination: Combination, predictions: Tensor, pose_inputs: PoseInputs
) -> Tensor:
    """Return the checked result of ``pose_weights``, in the shape of ``predictions``."""

    def pose_weights(predictions: Tensor, **pose_inputs: Tensor) -> Tensor:
        weights = combination.pose_weights(predictions, **pose_inputs)
        if not isinstance(weights, Tensor) or weights.shape != predictions.shape:
            raise CombinationContractError(
                f"{type(combination).__name__}.pose_weights must return one weight for each"
                f" prediction, shape {tuple(predictions.shape)}; found {_shape_or_type(weights)}"
            )
        return weights

    if predictions.dim() == prediction_dims(combination):
        return pose_weights(predictions, **pose_inputs)
    return over_rows(pose_weights, predictions, pose_inputs)


def _with_closed_form(
    combination: Combination, predictions: Tensor, pose_inputs: PoseInputs
) -> Tensor:
    """Return the value with ``pose_weights`` as its derivative."""
    # The predictions are detached, so the graph of the value leads only to the combination's own
    # parameters. The predictions get their gradient from the weights, and not a second time.
    detached = predictions.detach()
    value = _value(combination, detached, pose_inputs)
    # The weights are computed in forward and cloned below. Before backward, an optimizer may change
    # the combination's parameters.
    with torch.no_grad():
        weights = _closed_form_weights(combination, detached, pose_inputs)
    return _ClosedForm.apply(value, predictions, weights.clone())


class _ClosedForm(torch.autograd.Function):
    """Values whose derivatives with respect to the predictions are known.

    Predictions and weights have more dimensions than the values: the poses and the columns. The
    gradient also goes to ``value``, whose graph leads to the combination's own parameters.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, predictions: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(weights)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        (weights,) = ctx.saved_tensors
        added = (1,) * (weights.dim() - grad_output.dim())
        return grad_output, grad_output.reshape(grad_output.shape + added) * weights, None


def full_depth_prediction(combination: Combination, *args: Any, **pose_inputs: Any) -> Tensor:
    """Return the result of a combination's ``forward``, shape ().

    Parameters
    ----------
    *args : ``pred_list, grad_dict, param_names, *model_params``
    """
    pred_list, *_ = args
    with no_autocast(pred_list[0].device.type):
        return _checked_value(combination, value_of_forward(combination, *args, **pose_inputs))


def value_of_forward(combination: Callable[..., Any], *args: Any, **pose_inputs: Any) -> Any:
    """Return the combined prediction of a combination's ``forward``, without any check.

    mtenn's combinations return a pair, (combined, pose predictions). A
    :class:`~mtenn_core.MultiPoseModel` has its own pose predictions and does not need the second
    element.

    Parameters
    ----------
    *args : ``pred_list, grad_dict, param_names, *model_params``
    """
    value = combination(*args, **pose_inputs)
    return value[0] if isinstance(value, tuple) and len(value) == 2 else value


def pose_weights(
    combination: Combination, predictions: Tensor, pose_inputs: PoseInputs = NO_INPUTS
) -> Tensor:
    """Return the pose weights of one compound or of a batch, without a graph.

    They come from ``pose_weights`` if the combination overrides it, and else from autograd.

    Parameters
    ----------
    predictions, pose_inputs : as for :func:`combined_prediction`

    Returns
    -------
    shape, dtype and device of ``predictions``
    """
    with torch.no_grad(), no_autocast(predictions.device.type):
        wide = predictions.detach().to(at_least_float32(predictions.dtype))
        pose_inputs = {name: numbers.to(wide.dtype) for name, numbers in pose_inputs.items()}
        if overrides(type(combination), "pose_weights"):
            weights = _closed_form_weights(combination, wide, pose_inputs)
        else:
            weights = derived_weights(combination, wide, pose_inputs)
    return weights.to(predictions.dtype)


def derived_weights(
    combination: Combination, predictions: Tensor, pose_inputs: PoseInputs = NO_INPUTS
) -> Tensor:
    """Return pose weights without the use of a closed form, in the shape of ``predictions``."""
    if overrides(type(combination), "combine"):
        return autograd_weights(combination, predictions, pose_inputs)
    return backward_weights(combination, predictions, pose_inputs)


def autograd_weights(
    combination: Combination, predictions: Tensor, pose_inputs: PoseInputs = NO_INPUTS
) -> Tensor:
    """Return the pose weights that autograd derives from ``combine``.

    Parameters
    ----------
    predictions, pose_inputs : one compound or a batch, as for :func:`combined_prediction`

    Returns
    -------
    the shape of ``predictions``
    """
    with torch.inference_mode(False), torch.enable_grad():
        y = predictions.detach().clone().requires_grad_()
        value = combined_prediction(combination, y, pose_inputs, closed_form=False)
        # The compounds of a batch do not depend on one another.
        if value.dim() != y.dim() - prediction_dims(combination):
            raise CombinationContractError(
                f"{type(combination).__name__} returns a vector, and pose weights are the"
                " derivative of one number. The derivative of the vector is"
                " torch.func.jacrev(combination.combine)(predictions)."
            )
        (weights,) = torch.autograd.grad(value.sum(), y)
    return weights


def backward_weights(
    combination: Combination, predictions: Tensor, pose_inputs: PoseInputs = NO_INPUTS
) -> Tensor:
    """Return the pose weights that the backward of ``forward`` uses, shape (n_poses,).

    The unit vectors e_1 … e_M take the place of the poses' gradients. Then the gradient of the
    combined prediction is the vector of the weights.
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


def check_n_poses(combination: Combination, n_poses: int, compound: int | None = None) -> None:
    """Raise a :class:`~mtenn_core.errors.PredictionError` for fewer poses than ``min_poses``."""
    fewest = max(1, combination.min_poses)
    if n_poses < fewest:
        who = "" if compound is None else f"compound {compound}: "
        raise PredictionError(
            f"{who}{type(combination).__name__} needs at least {fewest} pose(s); found {n_poses}",
            compound=compound,
        )


def _checked_value(combination: Combination, value: Tensor) -> Tensor:
    """Return the ``value`` of a combination. Raise an error if it has a wrong shape."""
    if isinstance(value, Tensor) and value.shape == ():
        return value
    rule, cls = "a scalar tensor, shape ()", type(combination)
    if combination.pose_columns is not None:
        if overrides(cls, "pose_weights"):
            rule += ", because it defines pose_weights, the derivative of a scalar"
        elif isinstance(value, Tensor) and value.dim() == 1 and len(value):
            return value
        else:
            rule += ", or a vector, shape (n_results,)"
    raise CombinationContractError(
        f"{cls.__name__} must return {rule}; found {_shape_or_type(value)}"
    )


def _shape_or_type(found: object) -> str:
    return f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else named_type(found)
