"""A1 to A3, A12 and A13: the arguments and results of ``forward`` and backward."""

from __future__ import annotations

from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from mtenn_core._engine.autograd_nodes import is_function
from mtenn_core._engine.declarations import overrides
from mtenn_core._engine.evaluation import value_of_forward
from mtenn_core.combination import Combination
from mtenn_core.errors import TorchVersionError
from mtenn_core.testing._checks.chain_rule import check_chain_rule, kernels
from mtenn_core.testing._checks.check import check
from mtenn_core.testing._outcomes import Fail, Metrics, Skip
from mtenn_core.testing._probe.meta_device import ShapesFromCpu
from mtenn_core.testing._probe.operations import output_shapes
from mtenn_core.testing._probe.poses import Poses
from mtenn_core.testing._probe.subject import Subject
from mtenn_core.testing._probe.training_step import Step


@check("A1", "backward returns one gradient per parameter", "gate")
def raw_return(subject: Subject) -> Metrics:
    """Check the tensors that backward returns, before autograd changes their shape or dtype."""
    if not subject.full_depth:
        raise Skip("it has no forward of its own")
    for dtype in (torch.float64, torch.float32):
        _check_returned(subject.probes.step().to(dtype), subject, dtype)
        if subject.thorough:
            _check_returned(kernels(subject).to(dtype), subject, dtype)
    return {}


def _check_returned(step: Step, subject: Subject, dtype: torch.dtype) -> None:
    value = subject.call(step, combination=subject.copy(dtype))
    node: Any = value.grad_fn
    if not is_function(type(node)):
        raise Skip("the output does not come from an autograd.Function")
    # If forward returns the pair (combined prediction, pose predictions), no loss uses the second.
    others = [torch.zeros(shape, dtype=dtype) for shape in output_shapes(node)[1:]]
    with torch.no_grad():  # as in an ordinary backward
        returned = node.apply(torch.ones((), dtype=dtype), *others)
    returned = returned if isinstance(returned, tuple) else (returned,)
    n_params = len(step.params)
    if len(returned) < n_params:
        raise Fail(
            f"expected {n_params} gradients, one per parameter; found {len(returned)}",
            cause="backward must return a gradient for each of *model_params",
        )
    for (name, param), gradient in zip(step.params.items(), returned[-n_params:], strict=True):
        expected = (tuple(param.shape), param.dtype)
        found = (tuple(gradient.shape), gradient.dtype) if isinstance(gradient, Tensor) else None
        if found != expected:
            raise Fail(
                f"parameter {name!r}: backward must return {expected}; found {found}",
                cause=_wrong_form(gradient, param, len(step.poses)),
            )


def _wrong_form(gradient: object, param: Tensor, n_poses: int) -> str:
    if not isinstance(gradient, Tensor):
        return "backward returns None for a parameter: is the parameter missing in grad_dict?"
    if gradient.dtype != param.dtype:
        return f"the gradient has another dtype: keep that of the parameter, {param.dtype}"
    if gradient.shape == (n_poses, *param.shape):
        return "the sum over poses is missing: sum over dim=0"
    if gradient.numel() == param.numel():
        return "the gradient is flattened, or keepdim=True: return the shape of the parameter"
    return "the sum is over another axis than that of the poses"


@check("A2", "the output has the right shape and a gradient", "gate")
def output(subject: Subject) -> Metrics:
    """Check the shape, the dtype and the graph of the output."""
    _check_signatures(subject.combination)
    _check_dtype(subject)
    numbers = sorted({subject.probes.n_poses(n) for n in (1, 2, 3)})
    if subject.probes.columns is not None:
        _check_outputs_of_columns(subject, numbers)
        return {}
    for n_poses in numbers:
        for shape in ((), (1,)):
            step = subject.probes.step({"p": (2,)}, n_poses)
            pred_list = [prediction.reshape(shape) for prediction in step.pred_list()]
            found = subject.call(step, pred_list=pred_list)
            where = f"{n_poses} pose(s) of shape {shape}"
            if not isinstance(found, Tensor) or found.shape != ():
                what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise Fail(
                    f"{where}: expected a tensor of shape (); found {what}",
                    cause="return only the combined prediction, as a tensor"
                    if not isinstance(found, Tensor)
                    else "the value must be 0-dimensional for predictions of both shapes, () and"
                    " (1,): reshape(()) it, and do not squeeze() the predictions",
                )
            _check_output(found, where)
    return {}


def _check_outputs_of_columns(subject: Subject, numbers: list[int]) -> None:
    """Check that the output is a number, or a vector with equally many entries for all poses."""
    combination = subject.copy(torch.float64, as_written=True)
    shapes: dict[int, tuple[int, ...]] = {}
    for n_poses in numbers:
        poses = subject.probes.poses(n_poses)
        where = f"{n_poses} pose(s) with {poses.predictions.shape[1]} column(s)"
        with subject.restored_state():
            y = poses.predictions.requires_grad_().clone()
            found: object = combination.combine(y, **poses.copied_inputs())
        if not isinstance(found, Tensor) or found.dim() > 1 or not found.numel():
            what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise Fail(
                f"{where}: expected a tensor of shape (), or a vector, shape (n_results,); found"
                f" {what}",
                cause="sum over the poses, dim=0, without keepdim=True",
            )
        _check_output(found, where)
        shapes[n_poses] = tuple(found.shape)
    if len({*shapes.values()}) > 1:
        raise Fail(
            "the shape of the value must not depend on the number of poses; found"
            f" {', '.join(f'{shape} for {n} pose(s)' for n, shape in shapes.items())}",
            cause="the sum or mean is over the columns: the poses are dim=0, the columns dim=1",
        )
    if overrides(type(combination), "pose_weights"):
        _check_weights_of_columns(subject, combination, shapes[numbers[-1]])


def _check_weights_of_columns(
    subject: Subject, combination: Combination, shape: tuple[int, ...]
) -> None:
    """Check that ``pose_weights`` is that of a number, and has a weight for each prediction.

    Parameters
    ----------
    shape : the shape of the value
    """
    if shape:
        raise Fail(
            "pose_weights is the derivative of one number; found it beside a combine that returns"
            f" a vector, shape {shape}",
            cause="remove pose_weights: autograd takes the derivative of a vector",
        )
    poses = subject.probes.poses(3)
    with subject.restored_state(), torch.no_grad():
        weights: object = combination.pose_weights(poses.predictions, **poses.copied_inputs())
    expected = tuple(poses.predictions.shape)
    found = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
    if found != expected:
        raise Fail(
            "pose_weights must return one weight for each number of each pose, shape"
            f" {expected}; found {found}",
            cause="one weight for each pose is not enough: each column has its own",
        )


def _check_output(found: Tensor, where: str) -> None:
    if found.dtype != torch.float64:
        raise Fail(
            f"{where}: expected torch.float64, the dtype of the predictions; found {found.dtype}",
            cause="the output does not keep the dtype of the predictions",
        )
    if not found.requires_grad:
        raise Fail(
            f"{where}: the output must require a gradient; found that it does not",
            cause="is the output detached, computed under no_grad, or made by item() or numpy()?",
        )


def _check_signatures(combination: Combination) -> None:
    """Check that each method takes the declared pose inputs after its usual arguments."""
    usual: dict[str, tuple[str, ...]] = {
        "combine": ("predictions",),
        "pose_weights": ("predictions",),
        "reference": ("predictions",),
        "forward": ("pred_list", "grad_dict", "param_names", "*model_params"),
    }
    names = tuple(combination.pose_inputs)
    for method, first in usual.items():
        if not overrides(type(combination), method):
            continue
        try:
            signature(getattr(combination, method)).bind(*first, **dict.fromkeys(names))
        except ValueError:  # a builtin has no signature
            continue
        except TypeError as error:
            raise Fail(
                f"pose_inputs = {names}: {method} must take ({', '.join([*first, *names])}); found"
                f" {method}{signature(getattr(combination, method))}: {error}",
                cause="pose_inputs must name the further arguments, and combine, pose_weights,"
                " reference and forward must all take them",
            ) from None


def _check_dtype(subject: Subject) -> None:
    step = subject.probes.step()
    try:
        value = subject.call(replace(step.to(torch.float32), poses=step.poses))
    except Exception:  # a combination may refuse float32 parameters with float64 predictions
        return
    if isinstance(value, Tensor) and value.dtype != torch.float64:
        raise Fail(
            "parameters in float32: expected torch.float64, the dtype of the predictions; found"
            f" {value.dtype}",
            cause="the output takes its dtype from the parameters, not from the predictions",
        )


@check("A3", "gradients are in the order of param_names", "gate")
def order_of_names(subject: Subject) -> Metrics:
    """Order ``param_names`` and the keys of ``grad_dict`` differently.

    The gate leaves out names of which one is a part of another, or nearly the same.
    """
    # The names are not sorted.
    worst = _check_names(subject, ("w10", "a.weight", "w1", "w2", "c.bias", "b.weight"))
    if subject.thorough:
        # Both orders, because a wrong match may be the first or the last one.
        for names in (ALIKE, ALIKE[::-1]):
            worst = max(worst, _check_names(subject, names))
    return {"largest error in tolerances": worst}


ALIKE = (
    *("11.weight", "1.weight", "block.a.weight.g", "a.weight", "a_weight", "A.weight"),
    *("module.w1", "w1", "w1.w1"),
)


def _check_names(subject: Subject, names: tuple[str, ...]) -> float:
    # The shapes are equal, because autograd would notice a wrong one.
    step = subject.probes.step(dict.fromkeys(names, (3,)))
    order = subject.probes.permutation(len(names))
    shuffled = Step(step.poses, step.gradients, {names[i]: step.params[names[i]] for i in order})
    try:
        return check_chain_rule(subject, shuffled, (1.0,))
    except Fail as failure:
        cause = failure.cause or "names are compared by a part of them: compare whole names"
        raise Fail(str(failure), cause=cause, **failure.metrics) from None


@check("A12", "the value depends only on the predictions")
def value_of_predictions(subject: Subject) -> Metrics:
    """Check that the value does not depend on gradients, parameters, or the predictions' shape.

    It may also depend on pose inputs.
    """
    step = subject.probes.step()
    params = {
        name: subject.probes.randn(*p.shape).requires_grad_() for name, p in step.params.items()
    }
    gradients = {name: 100 * subject.probes.randn(*g.shape) for name, g in step.gradients.items()}
    others = {
        "other gradients": Step(step.poses, gradients, step.params),
        "other parameters": Step(step.poses, step.gradients, params),
        "fewer parameters": Step(
            step.poses, {"w1": step.gradients["w1"]}, {"w1": step.params["w1"]}
        ),
    }
    value = subject.call(step)
    found = {what: subject.call(other) for what, other in others.items()}
    if subject.probes.columns is None:
        found["predictions of shape (1,)"] = subject.call(
            step, pred_list=[prediction.reshape(1) for prediction in step.pred_list()]
        )
    for what, other in found.items():
        if not torch.equal(value, other):
            raise Fail(
                f"with {what}: expected the value {value.item():.17g}; found {other.item():.17g}",
                cause="the value depends on something else than the predictions",
            )
    _check_views(subject)
    return {}


def _check_views(subject: Subject) -> None:
    """Check predictions that are views of one tensor, as those of one compound in a batch are."""
    step = subject.probes.step(spread=1e-3)  # a large spread may make all weights 0 or 1
    others = subject.probes.poses(len(step.poses), 0.0, 1e-3).predictions
    predictions = step.poses.predictions
    views = {
        "a part of a batch": torch.cat([others, predictions, others]).chunk(3)[1],
        "a column of a matrix": torch.stack([predictions, others], dim=1)[:, 0],
    }
    pred_lists = {what: list(view) for what, view in views.items()}
    pred_lists["in reverse order in memory"] = list(predictions.flip(0))[::-1]
    expected = subject.call(step)
    for what, pred_list in pred_lists.items():
        _check_same("the value", what, expected, subject.call(step, pred_list=pred_list))
        found = subject.gradients(step, pred_list=pred_list)
        for name, gradient in subject.gradients(step).items():
            _check_same(f"the gradient of parameter {name!r}", what, gradient, found[name])
    for method in ("combine", "pose_weights"):
        if overrides(type(subject.combination), method):
            result = _of_method(subject, method, step.poses)
            for what, view in views.items():
                of_view = _of_method(subject, method, step.poses.at(view))
                _check_same(f"the result of {method}", what, result, of_view)


def _of_method(subject: Subject, method: str, poses: Poses) -> Tensor:
    with subject.restored_state(), torch.no_grad():
        found: Tensor = getattr(subject.combination, method)(
            poses.predictions, **poses.copied_inputs()
        )
        return found


def _check_same(result: str, what: str, expected: Tensor, found: Tensor) -> None:
    # Sums in another order may differ in the last digits, but other numbers differ in more.
    slack = 1e-6 * float(expected.detach().abs().amax())
    if not torch.allclose(expected, found, rtol=1e-6, atol=slack, equal_nan=True):
        raise Fail(
            f"predictions that are {what}: {result} must be the same as for predictions with memory"
            " of their own; found a difference",
            cause="it reads the memory of the predictions (._base, as_strided, untyped_storage,"
            " data_ptr) instead of their numbers",
        )


@check("A13", "it runs on the device of the predictions")
def device(subject: Subject) -> Metrics:
    """Run a copy on torch's meta device.

    Tensors on this device have no numbers, but torch refuses to mix them with tensors on the CPU.
    """
    try:
        with ShapesFromCpu():
            devices = [tensor.device.type for tensor in _on_meta(subject)]
    except (MemoryError, TorchVersionError):
        raise
    except Exception as error:
        if "expected device" in str(error) or "same device" in str(error):
            raise Fail(
                f"predictions on another device than the CPU: {error}",
                cause="a tensor is made without device=predictions.device, or it is a plain"
                " attribute: use register_buffer, new_zeros, zeros_like or arange(…, device=…)",
            ) from None
        # Python code may depend on numbers, which this device does not have.
        raise Skip(f"it needs numbers to run: {type(error).__name__}") from None
    if set(devices) != {"meta"}:
        raise Fail("the output must be on the device of the predictions; found it on the CPU")
    return {}


def _on_meta(subject: Subject) -> list[Tensor]:
    """Return all results of a copy on the meta device."""
    combination = subject.copy(torch.float64).to("meta")
    step = subject.probes.step()
    poses = step.poses.map(lambda numbers: numbers.to("meta"))
    predictions, inputs = poses.predictions.requires_grad_(), poses.inputs
    made = []
    if overrides(type(combination), "combine"):
        value = combination.combine(predictions, **inputs)
        made += [value, *torch.autograd.grad(value, predictions)]
    if overrides(type(combination), "pose_weights"):
        made.append(combination.pose_weights(predictions.detach(), **inputs))
    if subject.full_depth:
        params = [param.detach().to("meta").requires_grad_() for param in step.params.values()]
        grad_dict = {name: list(each.to("meta")) for name, each in step.gradients.items()}
        given = list(predictions.detach()), grad_dict, list(step.params), *params
        value = value_of_forward(combination, *given, **inputs)
        made += [value, *torch.autograd.grad(value, params)]
    return made
