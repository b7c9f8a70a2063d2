"""A4 and A8: a call changes no inputs and no global state, and keeps no memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mtenn_core._engine.declarations import overrides
from mtenn_core._engine.evaluation import value_of_forward
from mtenn_core._process.setting_table import RANDOM_STATES, SETTINGS
from mtenn_core._process.settings import changed, process_state
from mtenn_core._torch_internals import version_of
from mtenn_core.combination import Combination
from mtenn_core.testing._checks.check import check
from mtenn_core.testing._outcomes import Fail, Metrics, Outcome
from mtenn_core.testing._probe.comparison import equal_with_nan
from mtenn_core.testing._probe.operations import n_hooks
from mtenn_core.testing._probe.state_size import state_size
from mtenn_core.testing._probe.subject import Subject
from mtenn_core.testing._probe.training_step import Step, gradients_of


@check("A4", "it does not modify its inputs or global state", "gate")
def purity(subject: Subject) -> Metrics:
    """Check inputs, parameters, ``.grad``, random states and settings after a call.

    The gate does not check ``.grad``, shared memory, or other numbers of a batch.
    """
    # Any call may change a setting, and a second call may then leave it as it is.
    settings = {name: value for name, value in process_state().items() if name in SETTINGS}
    try:
        # An operation in place on ``predictions.float()`` changes only predictions in float32.
        for dtype in (torch.float64, torch.float32):
            # Two copies, because a call may change buffers.
            _check_poses_unchanged(subject, subject.copy(dtype), dtype)
            _check_call(subject, subject.copy(dtype), dtype, settings)
        if subject.thorough:
            _check_batch_unchanged(subject)
    except Exception as error:
        left = changed(settings, process_state())
        if isinstance(error, Outcome) or not left:
            raise
        # For example, nothing works after a call that leaves the inference mode on.
        raise Fail(f"a call changed {', '.join(left[:4])}", cause=_change_cause(left[0])) from error
    if subject.thorough and subject.combination.stochastic:
        _check_not_reseeded(subject, subject.probes.step())
    return {}


def _check_batch_unchanged(subject: Subject) -> None:
    """Check that a call leaves the batch unchanged of which its predictions are a part."""
    step = subject.probes.step(n_poses=5)
    others = subject.probes.poses(5).predictions
    batch = torch.cat([others, step.poses.predictions, others])
    before = batch.clone()
    of_compound = batch[len(others) : -len(others)]
    subject.call(step, pred_list=list(of_compound)).backward()
    for method in ("combine", "pose_weights"):
        if overrides(type(subject.combination), method):
            with subject.restored_state():
                getattr(subject.combination, method)(of_compound, **step.poses.copied_inputs())
    if not equal_with_nan(batch, before):
        raise Fail(
            "predictions that are a part of a batch: a call must leave the batch unchanged; found"
            " changed numbers",
            cause="an operation in place on ._base or on the memory of the predictions",
        )


def _check_poses_unchanged(subject: Subject, combination: Combination, dtype: torch.dtype) -> None:
    """Check that ``combine`` and ``pose_weights`` do not change predictions and pose inputs."""
    for method in ("combine", "pose_weights"):
        if not overrides(type(combination), method):
            continue
        for training in (True, False):
            poses = subject.probes.poses(5).map(lambda numbers: numbers.to(dtype))
            given = poses.map(torch.clone)
            with subject.restored_state(), torch.set_grad_enabled(training):
                if training and method == "combine":  # as gradients="graph" calls it
                    given = given.at(given.predictions.requires_grad_().clone())
                getattr(combination, method)(given.predictions, **given.inputs)
            for name, numbers in given.named().items():
                if not equal_with_nan(poses.named()[name], numbers):
                    mode = "" if training else "under no_grad, "
                    raise Fail(
                        f"{mode}{method} changed the {name} ({dtype})", cause=_change_cause(name)
                    )


def _check_call(
    subject: Subject, combination: Combination, dtype: torch.dtype, settings: Mapping[str, Any]
) -> None:
    """Check that a call of ``forward`` and its backward change no inputs and no global state."""
    shapes = None if subject.thorough else {"w1": (2,), "w2": (2, 3), "scalar": ()}
    step = subject.probes.step(shapes, n_poses=5).to(dtype)  # fewer poses may be sorted by chance
    step.params["w2"].requires_grad_(False)
    step = replace(step, params=dict(list(step.params.items())[::-1]))
    given: dict[str, Any] = {
        "pred_list": step.pred_list(),
        "grad_dict": step.grad_dict(),
        "param_names": list(step.params),
        "pose_inputs": step.poses.copied_inputs(),
    }
    for name in {"w1", "scalar", "rows"} & step.params.keys():  # the others have no .grad
        step.params[name].grad = torch.ones_like(step.params[name])
    torch.rand(())  # so that a call of manual_seed would change the random state
    before, state = _contents(combination, step, **given), {**process_state(), **settings}
    value = subject.call(step, combination=combination, **given)
    after = _contents(combination, step, **given)
    _check_unchanged("forward", before, after, subject, state)
    gradients = gradients_of(value, step.params)
    after = _contents(combination, step, **given)
    _check_unchanged("backward", before, after, subject, state)
    if subject.thorough:
        _check_no_alias("the value", value, before["tensors"])
        for name, gradient in gradients.items():
            _check_no_alias(f"the gradient of {name!r}", gradient, before["tensors"])
        _check_grad(subject, subject.copy(dtype), step, before["grads"], gradients)


def _check_grad(
    subject: Subject,
    combination: Combination,
    step: Step,
    grads: Mapping[str, Tensor | None],
    gradients: Mapping[str, Tensor],
) -> None:
    """Check that backward adds each gradient to ``.grad`` once."""
    subject.call(step, combination=combination).backward()
    for name, gradient in gradients.items():
        grad = grads[f".grad of parameter {name!r}"]
        expected = gradient + (0 if grad is None else grad)
        found = step.params[name].grad
        if found is None or not torch.allclose(found, expected):
            raise Fail(
                f"parameter {name!r}: backward must add its gradient to .grad once",
                cause="the combination writes or zeroes .grad: return gradients instead, and"
                " autograd accumulates them",
            )


def _contents(
    combination: Combination,
    step: Step,
    pred_list: list[Tensor],
    grad_dict: Mapping[str, list[Tensor]],
    param_names: list[str],
    pose_inputs: Mapping[str, Tensor],
) -> dict[str, Any]:
    tensors = {f"pose input {name!r}": numbers for name, numbers in pose_inputs.items()}
    tensors |= {f"prediction {i}": prediction for i, prediction in enumerate(pred_list)}
    for name, gradients in grad_dict.items():
        tensors |= {f"gradient {i} of {name!r}": gradient for i, gradient in enumerate(gradients)}
    tensors |= {f"parameter {name!r}": param for name, param in step.params.items()}
    own = dict(combination.named_parameters())
    tensors |= {f"own parameter {name!r}": param for name, param in own.items()}
    grads = {f".grad of {what}": tensor.grad for what, tensor in tensors.items() if tensor.is_leaf}
    return {
        "tensors": tensors,
        "values": {what: tensor.detach().clone() for what, tensor in tensors.items()},
        "versions": {what: version_of(tensor) for what, tensor in tensors.items()},
        "grads": {what: None if grad is None else grad.clone() for what, grad in grads.items()},
        "needs": {f"requires_grad of {what}": t.requires_grad for what, t in tensors.items()},
        "hooks": {what: n_hooks(tensor) for what, tensor in tensors.items()},
        "names": {"param_names": list(param_names)},
        "own": {f"which tensor {name!r} is": id(param) for name, param in own.items()},
        "lists": [
            (name, type(each), [id(tensor) for tensor in each])
            for name, each in [("pred_list", pred_list), *grad_dict.items()]
        ],
    }


def _check_unchanged(
    when: str, before: dict[str, Any], after: dict[str, Any], subject: Subject, state: Any
) -> None:
    found = []
    if before["lists"] != after["lists"]:
        found.append("pred_list or grad_dict (its keys, its lists or their order)")
    for what, tensor in before["values"].items():
        same = before["versions"][what] == after["versions"].get(what)
        if not (same and equal_with_nan(tensor, after["values"][what])):
            found.append(what)
    for part in ("hooks", "needs", "names", "own"):
        found += [what for what, n in before[part].items() if after[part].get(what) != n]
    for what, grad in before["grads"].items():
        now = after["grads"].get(what)
        if (grad is None) != (now is None) or (grad is not None and not equal_with_nan(grad, now)):
            found.append(what)
    left = changed(state, process_state())
    found += [n for n in left if not (n in RANDOM_STATES and subject.combination.stochastic)]
    if found:
        raise Fail(
            f"{when} changed {', '.join(found[:4])}{', …' if len(found) > 4 else ''}",
            cause=_change_cause(found[0]),
        )


def _change_cause(what: str) -> str:
    if what in RANDOM_STATES:
        return "it draws random numbers or sets a seed: declare stochastic = True, and set no seed"
    if what.startswith("requires_grad"):
        return "requires_grad_() on a tensor of the caller"
    if what.startswith(".grad"):
        return "return the gradients; autograd accumulates them"
    if what in SETTINGS:
        return "it changes a setting of the whole process: use a context manager, which restores it"
    return "an operation in place (add_, mul_, *=, sort, pop) on an object of the caller: copy it"


def _check_no_alias(what: str, tensor: Tensor, inputs: Mapping[str, Tensor]) -> None:
    for name, other in inputs.items():
        if tensor.untyped_storage().data_ptr() == other.untyped_storage().data_ptr():
            raise Fail(
                f"{what} must have its own memory; found that it shares the memory of {name}",
                cause="the combination returns an input or a view of it, so a change of one"
                " changes both: return a clone",
            )


def _check_not_reseeded(subject: Subject, step: Step) -> None:
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        call_keeping_state(subject.combination, step)
        states.append(torch.get_rng_state())
    if torch.equal(*states):
        raise Fail(
            "the random state after a call must depend on the seed; found the same state for two"
            " seeds",
            cause="the combination sets a seed (manual_seed): use the current random state",
        )


def call_keeping_state(combination: Combination, step: Step) -> None:
    """Call ``forward``, and do not restore the state that it changes."""
    given = step.pred_list(), step.grad_dict(), list(step.params), *step.params.values()
    value_of_forward(combination, *given, **step.poses.copied_inputs())


@check("A8", "memory is freed after every call")
def memory(subject: Subject) -> Metrics:
    """Check that inputs and graph are freed after each call, and that nothing grows.

    A validation loop runs forward without backward, so that nothing may wait for a backward.
    """
    _check_freed(subject, "after backward", _backward)
    for when, mode in {
        "after forward without backward": torch.enable_grad,
        "after forward under no_grad": torch.no_grad,
        "after forward under inference_mode": torch.inference_mode,
    }.items():
        try:
            with mode():
                _check_freed(subject, when, _no_backward)
        except Fail:
            raise
        except Exception:  # A7 reports that it does not work in this mode
            continue
    return {"growth per call": _check_growth(subject)}


def _backward(value: Tensor) -> None:
    value.backward()


def _no_backward(value: Tensor) -> None:
    """Do nothing, as a validation loop."""


def _check_freed(subject: Subject, when: str, use: Callable[[Tensor], None]) -> None:
    step = subject.probes.step()
    pred_list, grad_dict = step.pred_list(), step.grad_dict()
    pose_inputs = step.poses.copied_inputs()
    tensors = pred_list + [gradient for each in grad_dict.values() for gradient in each]
    tensors += pose_inputs.values()
    inputs = [weakref.ref(tensor) for tensor in tensors]
    value = subject.call(step, pred_list=pred_list, grad_dict=grad_dict, pose_inputs=pose_inputs)
    use(value)
    kept_value = weakref.ref(value)
    del value, pred_list, grad_dict, pose_inputs, tensors
    has_graph = _has_graph(kept_value)
    if not (has_graph or any(ref() is not None for ref in inputs)):
        return
    gc.collect()
    alive = sum(ref() is not None for ref in inputs)
    if has_graph and _has_graph(kept_value):
        raise Fail(
            f"{when}, the value and its graph must be freed; found them alive",
            cause="self, the class or a list keeps the value with its graph: keep value.detach()",
        )
    raise Fail(
        f"predictions, pose inputs and gradients must be freed {when}; found"
        f" {alive or 'all'} of {len(inputs)} alive"
        f"{'' if alive else ' until the garbage collector runs'}",
        cause=_cause_if_alive(when) if alive else _CYCLE,
    )


_CYCLE = "a cycle of references: save tensors with ctx.save_for_backward, not on ctx"


def _has_graph(value: weakref.ref[Tensor]) -> bool:
    tensor = value()
    return tensor is not None and tensor.grad_fn is not None


def _cause_if_alive(when: str) -> str:
    if when == "after backward":
        return "self, the class or a cache keeps them"
    return (
        "they are kept until a backward or a training step, which a validation never runs, or a"
        " tensor with a graph is kept: keep what backward needs on ctx, and detach() other numbers"
    )


CALLS_OF_WINDOW = 12
# A cache of limited size is full after so many calls.
CALLS_TO_FILL = 2000


def _check_growth(subject: Subject) -> float:
    """Check that calls do not collect objects, and return how many each call adds."""
    step = subject.probes.step({"w": (2,)})
    given = step.pred_list(), step.grad_dict(), list(step.params), *step.params.values()
    inputs = step.poses.copied_inputs()

    def validate() -> None:
        with torch.no_grad():
            value_of_forward(subject.combination, *given, **inputs)

    def train() -> None:
        value_of_forward(subject.combination, *given, **inputs).backward()

    worst = 0.0
    with subject.restored_state():
        for what, call in {"validation (under no_grad)": validate, "training": train}.items():
            growth = _growth(subject, call)
            if growth:
                for _ in range(CALLS_TO_FILL):
                    call()
                growth = _growth(subject, call)
            if growth:
                raise Fail(
                    f"{what} must not collect memory; found that each call adds {growth:.3g}"
                    " entries or numbers",
                    cause="a list or dict on self, the class or the module grows with every call:"
                    " let the caller keep numbers",
                )
            worst = max(worst, growth)
    return worst


def _growth(subject: Subject, call: Callable[[], None]) -> float:
    """Return the growth of the combination's state per call, the smallest of some windows."""
    sizes = []
    for _ in range(4):
        for _ in range(CALLS_OF_WINDOW):
            call()
        sizes.append(state_size(subject.combination))
    return max(0.0, min(after - before for before, after in pairwise(sizes)) / CALLS_OF_WINDOW)


@check("A8q", "gradients of the poses are freed by backward", "quality")
def freed_by_backward(subject: Subject) -> Metrics:
    """Check that gradients are freed although a program keeps the value, for example for a log."""
    step = subject.probes.step()
    pred_list, grad_dict = step.pred_list(), step.grad_dict()
    inputs = [weakref.ref(gradient) for each in grad_dict.values() for gradient in each]
    value = subject.call(step, pred_list=pred_list, grad_dict=grad_dict)
    value.backward()
    del pred_list, grad_dict
    alive = sum(ref() is not None for ref in inputs)
    if alive:
        raise Fail(
            "the gradients of the poses must be freed by backward, also if the value is kept; found"
            f" {alive} of {len(inputs)} alive",
            cause="they are attributes of ctx: backward only frees tensors that were saved with"
            " ctx.save_for_backward",
        )
    return {}
