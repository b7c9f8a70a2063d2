"""A1 to A3, A12 and A13: the arguments and results of ``forward`` and backward."""

from __future__ import annotations

from dataclasses import replace
from inspect import signature

import torch
from torch import Tensor

from mtenn_core._engine.declarations import overrides
from mtenn_core.combination import Combination
from mtenn_core.testing._checks.chain_rule import check_chain_rule
from mtenn_core.testing._checks.check import check
from mtenn_core.testing._outcomes import Fail, Metrics, Skip
from mtenn_core.testing._probe.meta_device import ShapesFromCpu
from mtenn_core.testing._probe.subject import Subject
from mtenn_core.testing._probe.torch_internals import output_shapes
from mtenn_core.testing._probe.training_step import Step


@check("A1", "backward returns one gradient per parameter", "gate")
def raw_return(subject: Subject) -> Metrics:
    """Check the tensors that backward returns, before autograd changes their shape or dtype."""
    if not subject.full_depth:
        raise Skip("it has no forward of its own")
    for dtype in (torch.float64, torch.float32):
        _check_returned(subject.probes.step().to(dtype), subject, dtype)
    return {}


def _check_returned(step: Step, subject: Subject, dtype: torch.dtype) -> None:
    value = subject.call(step, combination=subject.copy(dtype))
    if not isinstance(value.grad_fn, torch.autograd.function.BackwardCFunction):
        raise Skip("the output does not come from an autograd.Function")
    # If forward returns the pair (combined prediction, pose predictions), no loss uses the second.
    others = [torch.zeros(shape, dtype=dtype) for shape in output_shapes(value.grad_fn)[1:]]
    with torch.no_grad():  # as in an ordinary backward
        returned = value.grad_fn.apply(torch.ones((), dtype=dtype), *others)
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


@check("A2", "the output is a scalar with a gradient", "gate")
def output(subject: Subject) -> Metrics:
    """Check the shape, the dtype and the graph of the output."""
    _check_signatures(subject.combination)
    _check_dtype(subject)
    for n_poses in sorted({subject.probes.n_poses(n) for n in (1, 2, 3)}):
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
            if found.dtype != torch.float64:
                raise Fail(
                    f"{where}: expected torch.float64, the dtype of the predictions; found"
                    f" {found.dtype}",
                    cause="the output does not keep the dtype of the predictions",
                )
            if not found.requires_grad:
                raise Fail(
                    f"{where}: the output must require a gradient; found that it does not",
                    cause="is the output detached, computed under no_grad, or made by item() or"
                    " numpy()?",
                )
    return {}


def _check_signatures(combination: Combination) -> None:
    """Check that each method takes the declared pose inputs after its usual arguments."""
    usual: dict[str, tuple[str, ...]] = {
        "combine": ("predictions",),
        "pose_weights": ("predictions",),
        "reference": ("predictions",),
        "forward": ("pred_list", "grad_dict", "param_names", "*model_params"),
    }
    names = combination.pose_inputs
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
    """Order ``param_names`` and the keys of ``grad_dict`` differently."""
    # The shapes are equal, because autograd would notice a wrong one. The names are not sorted.
    names = ("w10", "a.weight", "w1", "w2", "c.bias", "b.weight")
    step = subject.probes.step(dict.fromkeys(names, (3,)))
    order = subject.probes.permutation(len(names))
    shuffled = Step(step.poses, step.gradients, {names[i]: step.params[names[i]] for i in order})
    return {"largest error in tolerances": check_chain_rule(subject, shuffled, (1.0,))}


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
    found["predictions of shape (1,)"] = subject.call(
        step, pred_list=[prediction.reshape(1) for prediction in step.pred_list()]
    )
    for what, other in found.items():
        if not torch.equal(value, other):
            raise Fail(
                f"with {what}: expected the value {value.item():.17g}; found {other.item():.17g}",
                cause="the value depends on something else than the predictions",
            )
    return {}


@check("A13", "it runs on the device of the predictions")
def device(subject: Subject) -> Metrics:
    """Run a copy on torch's meta device.

    Tensors on this device have no numbers, but torch refuses to mix them with tensors on the CPU.
    """
    try:
        with ShapesFromCpu():
            devices = [tensor.device.type for tensor in _on_meta(subject)]
    except MemoryError:
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
        value = combination(*given, **inputs)
        made += [value, *torch.autograd.grad(value, params)]
    return made
