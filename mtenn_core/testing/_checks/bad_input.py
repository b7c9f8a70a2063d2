"""A11: inconsistent input raises an error."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mtenn_core.testing._checks.check import check
from mtenn_core.testing._outcomes import Advice, Fail, Metrics
from mtenn_core.testing._probe.subject import Subject
from mtenn_core.testing._probe.training_step import Step, gradients_of

_UNCHECKED = (
    "lengths and names are not checked (zip stops at the shorter list, and the sum of an empty list"
    " is 0): call mtenn_core.gradients.check_gradients"
)


@check("A11", "bad input is an error")
def bad_input(subject: Subject) -> Metrics:
    """Check that inconsistent input raises an error instead of giving a number.

    The model never passes such input, so a number is only advice.
    """
    for what, step, pred_list, grad_dict in _bad_inputs(subject):
        try:
            value = subject.call(
                _step_for(step, pred_list), pred_list=pred_list, grad_dict=grad_dict
            )
            if value.requires_grad:
                gradients_of(value, step.params)
        except Exception:
            continue
        raise Advice(
            f"{what}: found the value {_number(value)} and no error. The model passes consistent"
            " lists, but a mistake in other code that calls forward gives a wrong number without a"
            " warning: zip stops at the shorter list, the sum of an empty list is 0, and a missing"
            " name gets no gradient",
            cause="call stack_predictions(pred_list) and check_gradients(len(pred_list), grad_dict,"
            " param_names, model_params) of mtenn_core.gradients first",
        )
    return {}


@check("A11q", "errors about bad input name the parameter", "quality")
def errors_that_name(subject: Subject) -> Metrics:
    """Check that the message names the parameter if the input of one parameter is wrong."""
    for what, step, pred_list, grad_dict in _bad_inputs(subject):
        try:
            value = subject.call(
                _step_for(step, pred_list), pred_list=pred_list, grad_dict=grad_dict
            )
            torch.autograd.grad(value, list(step.params.values()))
        except Exception as error:
            if "'w10'" in what and "w10" not in str(error):
                raise Fail(
                    f"{what}: the error must name the parameter; found"
                    f" {type(error).__name__}: {error}",
                    cause=_UNCHECKED,
                ) from None
    step = subject.probes.step({"w1": (2,), "w10": (2,)})
    given = step.grad_dict()
    odd = {
        "gradients for 'w2', which is not a parameter": given | {"w2": given["w1"]},
        "gradients of 'w10' in float32": given | {"w10": [g.float() for g in given["w10"]]},
    }
    for what, grad_dict in odd.items():
        try:
            subject.gradients(step, grad_dict=grad_dict)
        except Exception:
            continue
        raise Fail(f"{what}: expected an error", cause=_UNCHECKED)
    return {}


def _bad_inputs(
    subject: Subject,
) -> list[tuple[str, Step, list[Tensor], dict[str, list[Tensor]]]]:
    """Return a description, a step, ``pred_list`` and ``grad_dict`` for each inconsistent input."""
    step = subject.probes.step({"w1": (2,), "w10": (2,)}, subject.probes.n_poses(2) + 1)
    full, predictions = step.grad_dict(), step.pred_list()
    first, last = {"w1": full["w1"]}, full["w10"]
    wide = [torch.cat([p.reshape(-1), p.new_ones(2)]) for p in predictions]
    return [
        ("no pose", step, [], {"w1": [], "w10": []}),
        ("no pose, but gradients", step, [], full),
        ("one gradient too few for 'w10'", step, predictions, {**first, "w10": last[:-1]}),
        ("one gradient too many for 'w10'", step, predictions, {**first, "w10": [*last, last[0]]}),
        ("one prediction too few", step, predictions[:-1], full),
        ("one prediction too many", step, [*predictions, predictions[0]], full),
        ("no gradients for 'w10'", step, predictions, first),
        (f"predictions of shape ({len(wide[0])},)", step, wide, full),
    ]


def _step_for(step: Step, pred_list: list[Tensor]) -> Step:
    """Return the step with one pose for each prediction, so that the pose inputs are not wrong."""
    return replace(step, poses=step.poses[[i % len(step.poses) for i in range(len(pred_list))]])


def _number(value: object) -> object:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
