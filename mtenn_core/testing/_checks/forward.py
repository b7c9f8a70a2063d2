"""A1 to A3, A12 and A13: what goes into ``forward``, and what comes out of it and of backward."""

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
    """What backward returns, before autograd sums it to shape or casts it."""
    if not subject.full_depth:
        raise Skip("it has no forward of its own")
    for dtype in (torch.float64, torch.float32):
        _check_returned(subject.probes.step().to(dtype), subject, dtype)
    return {}


def _check_returned(step: Step, subject: Subject, dtype: torch.dtype) -> None:
    value = subject.call(step, combination=subject.copy(dtype))
    if not isinstance(value.grad_fn, torch.autograd.function.BackwardCFunction):
        raise Skip("the output is not that of an autograd.Function")
    # Of a pair (combined, pose predictions), no loss is on the second.
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
        return "backward returns None for a parameter: is it missing from grad_dict's keys?"
    if gradient.dtype != param.dtype:
        return f"the dtype is cast on the way: keep that of the parameter, {param.dtype}"
    if gradient.shape == (n_poses, *param.shape):
        return "the sum over poses is missing: sum over dim=0"
    if gradient.numel() == param.numel():
        return "flattened, or keepdim=True: return the shape of the parameter"
    return "the sum runs over another axis than that of the poses"


@check("A2", "the output is a scalar with a gradient", "gate")
def output(subject: Subject) -> Metrics:
    """Shape (), dtype of the predictions, attached to the parameters."""
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
                    f"{where}: expected torch.float64, as predicted; found {found.dtype}",
                    cause="the dtype of the predictions is not kept",
                )
            if not found.requires_grad:
                raise Fail(
                    f"{where}: the output has no gradient",
                    cause="is it detached, computed under no_grad, or made by item() or numpy()?",
                )
    return {}


def _check_signatures(combination: Combination) -> None:
    """Check that every method takes the declared pose inputs besides its usual arguments."""
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
        except ValueError:  # a builtin has none
            continue
        except TypeError as error:
            raise Fail(
                f"pose_inputs = {names}: {method} must take ({', '.join([*first, *names])}); found"
                f" {method}{signature(getattr(combination, method))}: {error}",
                cause="pose_inputs must name every argument that combine, pose_weights, reference"
                " and forward need besides the usual ones, and each of them must take all of them",
            ) from None


def _check_dtype(subject: Subject) -> None:
    step = subject.probes.step()
    try:
        value = subject.call(replace(step.to(torch.float32), poses=step.poses))
    except Exception:  # it may refuse float32 parameters with float64 predictions
        return
    if isinstance(value, Tensor) and value.dtype != torch.float64:
        raise Fail(
            f"parameters in float32: expected torch.float64, as predicted; found {value.dtype}",
            cause="the output takes its dtype from the parameters, not from the predictions",
        )


@check("A3", "gradients are in the order of param_names", "gate")
def order_of_names(subject: Subject) -> Metrics:
    """``param_names`` and the keys of ``grad_dict`` are ordered independently."""
    # All of one shape: autograd itself would notice another. In no order that sorting gives.
    names = ("w10", "a.weight", "w1", "w2", "c.bias", "b.weight")
    step = subject.probes.step(dict.fromkeys(names, (3,)))
    order = subject.probes.permutation(len(names))
    shuffled = Step(step.poses, step.gradients, {names[i]: step.params[names[i]] for i in order})
    return {"largest error in tolerances": check_chain_rule(subject, shuffled, (1.0,))}


@check("A12", "the value depends only on the predictions")
def value_of_predictions(subject: Subject) -> Metrics:
    """Pose inputs aside: neither gradients, nor parameters, nor the shape of a prediction."""
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
                cause="the value uses something else than the predictions",
            )
    return {}


@check("A13", "it runs on the device of the predictions")
def device(subject: Subject) -> Metrics:
    """On torch's meta device, which holds no numbers but refuses to mix with the CPU."""
    try:
        with ShapesFromCpu():
            devices = [tensor.device.type for tensor in _on_meta(subject)]
    except MemoryError:
        raise
    except Exception as error:
        if "expected device" in str(error) or "same device" in str(error):
            raise Fail(
                f"predictions on another device than the CPU: {error}",
                cause="a tensor is made without device=predictions.device, or held as a plain"
                " attribute: use register_buffer, new_zeros, zeros_like or arange(…, device=…)",
            ) from None
        # Numbers may decide what it does, and there are none on this device.
        raise Skip(f"it needs numbers to run: {type(error).__name__}") from None
    if set(devices) != {"meta"}:
        raise Fail("the output is on the CPU, not where the predictions are")
    return {}


def _on_meta(subject: Subject) -> list[Tensor]:
    """Return what a copy on the meta device makes of predictions there."""
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
