"""A, the conduct: what a combination does beside returning the right numbers."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import sys
import weakref
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from mtenn_core._process.settings import RANDOM_STATES, changed, process_state
from mtenn_core.combination import Combination, constructor_arguments, overrides
from mtenn_core.testing._checks.check import Fail, Metrics, Skip, check
from mtenn_core.testing._checks.values import alternatives
from mtenn_core.testing._probe.subject import Step, Subject, gradients_of

N_THREADS = 8


@check("A4", "it leaves alone what it is given, and the process")
def purity(subject: Subject) -> Metrics:
    """Predictions, inputs, gradients, parameters, ``.grad``, random states, settings; no alias."""
    step = subject.step(n_poses=5)  # few enough would be in order by chance
    step.params["w2"].requires_grad_(False)
    step = replace(step, params=dict(list(step.params.items())[::-1]))
    given: dict[str, Any] = {
        "pred_list": step.pred_list(),
        "grad_dict": step.grad_dict(),
        "param_names": list(step.params),
        "pose_inputs": step.poses.handed(),
    }
    for name in ("w1", "scalar", "rows"):  # the others have no .grad yet
        step.params[name].grad = torch.ones_like(step.params[name])
    torch.rand(())  # away from where manual_seed leaves the random state
    before, state = _contents(subject, step, **given), process_state()
    value = subject.call(step, **given)
    after = _contents(subject, step, **given)
    _nothing_changed("forward", before, after, subject, state)
    _no_alias("the value", value, before["tensors"])
    gradients = gradients_of(value, step.params)
    for name, gradient in gradients.items():
        _no_alias(f"the gradient of {name!r}", gradient, before["tensors"])
    after = _contents(subject, step, **given)
    _nothing_changed("backward", before, after, subject, state)
    subject.call(step).backward()
    for name in gradients:
        param = step.params[name]
        grad = before["grads"][f".grad of parameter {name!r}"]
        expected = gradients[name] + (0 if grad is None else grad)
        if param.grad is None or not torch.allclose(param.grad, expected):
            raise Fail(
                f"parameter {name!r}: backward must add its gradient to .grad once",
                cause=".grad is written or zeroed by the combination: return gradients instead, so"
                " that they accumulate",
            )
    _keeps_poses(subject)
    if subject.combination.stochastic:
        _not_reseeded(subject, step)
    return {}


def _keeps_poses(subject: Subject) -> None:
    """Hold ``combine`` and ``pose_weights`` to leave predictions and pose inputs alone."""
    for method in ("combine", "pose_weights"):
        if overrides(type(subject.combination), method):
            poses = subject.poses(subject.n_poses(3))
            before = poses.map(torch.clone)
            with subject.forgetting():
                getattr(subject.combination, method)(poses.predictions, **poses.inputs)
            for name, numbers in poses.named().items():
                if not _equal(before.named()[name], numbers):
                    raise Fail(f"{method} changed the {name}", cause=_change_cause(name))


def _contents(
    subject: Subject,
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
    own = dict(subject.combination.named_parameters())
    tensors |= {f"own parameter {name!r}": param for name, param in own.items()}
    grads = {f".grad of {what}": tensor.grad for what, tensor in tensors.items() if tensor.is_leaf}
    return {
        "tensors": tensors,
        "values": {what: tensor.detach().clone() for what, tensor in tensors.items()},
        "versions": {what: tensor._version for what, tensor in tensors.items()},
        "grads": {what: None if grad is None else grad.clone() for what, grad in grads.items()},
        "needs": {f"requires_grad of {what}": t.requires_grad for what, t in tensors.items()},
        "hooks": {what: len(tensor._backward_hooks or ()) for what, tensor in tensors.items()},
        "names": {"param_names": list(param_names)},
        "own": {f"which tensor {name!r} is": id(param) for name, param in own.items()},
        "lists": [
            (name, type(each), [id(tensor) for tensor in each])
            for name, each in [("pred_list", pred_list), *grad_dict.items()]
        ],
    }


def _nothing_changed(
    when: str, before: dict[str, Any], after: dict[str, Any], subject: Subject, state: Any
) -> None:
    found = []
    if before["lists"] != after["lists"]:
        found.append("pred_list or grad_dict (its keys, its lists or their order)")
    for what, tensor in before["values"].items():
        same = before["versions"][what] == after["versions"].get(what)
        if not (same and _equal(tensor, after["values"][what])):
            found.append(what)
    for part in ("hooks", "needs", "names", "own"):
        found += [what for what, n in before[part].items() if after[part].get(what) != n]
    for what, grad in before["grads"].items():
        now = after["grads"].get(what)
        if (grad is None) != (now is None) or (grad is not None and not _equal(grad, now)):
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
        return "it draws random numbers, or seeds: declare stochastic = True, and never seed"
    if what.startswith("requires_grad"):
        return "requires_grad_() on what belongs to the caller"
    if what.startswith(".grad"):
        return "return the gradients; autograd accumulates them"
    if "mode" in what or "default" in what or "threads" in what:
        return "a setting of the whole process is changed and not put back: use a context manager"
    return "an operation in place (add_, mul_, *=, sort, pop) on what belongs to the caller: copy"


def _no_alias(what: str, tensor: Tensor, inputs: Mapping[str, Tensor]) -> None:
    for name, other in inputs.items():
        if tensor.untyped_storage().data_ptr() == other.untyped_storage().data_ptr():
            raise Fail(
                f"{what} shares its memory with {name}",
                cause="a view or the tensor itself is returned: whoever changes one changes both;"
                " clone it",
            )


def _not_reseeded(subject: Subject, step: Step) -> None:
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        _call_unguarded(subject.combination, step)
        states.append(torch.get_rng_state())
    if torch.equal(*states):
        raise Fail(
            "after two different seeds the random state is the same",
            cause="it seeds the generator itself (manual_seed): draw from the state that there is",
        )


def _call_unguarded(combination: Combination, step: Step) -> None:
    """Call ``forward`` without forgetting what it leaves behind."""
    given = step.pred_list(), step.grad_dict(), list(step.params), *step.params.values()
    combination(*given, **step.poses.handed())


@check("A5", "the same call gives the same numbers")
def repeatable(subject: Subject) -> Metrics:
    """Forward twice, and backward twice with ``retain_graph``, to the last bit."""
    step = subject.step(spread=1e-3)
    first, second = subject.call(step), subject.call(step)
    if not _equal(first, second):
        raise Fail(
            f"the same call gave {first.item():.17g} and then {second.item():.17g}",
            cause="random numbers from elsewhere than torch's global state, which alone is replayed"
            if subject.combination.stochastic
            else "random numbers (declare stochastic = True), or state left by the first call",
        )
    go = torch.tensor(-3.7, dtype=first.dtype)  # 1 would hide a multiplication in place
    for value in (first, second):
        # Not as grad_outputs: to compare its shape, torch imports sympy, which takes a second.
        value.register_hook(lambda _: go)
    once = gradients_of(first, step.params, retain_graph=True)
    twice = gradients_of(first, step.params, retain_graph=True)
    again = gradients_of(second, step.params)
    for name, gradient in once.items():
        if not _equal(gradient, again[name]):
            raise Fail(
                f"parameter {name!r}: the same call gave two gradients",
                cause="random numbers or a counter in backward, or state left by the first call",
            )
        if not _equal(gradient, twice[name]):
            raise Fail(
                f"parameter {name!r}: backward twice (retain_graph=True) gave two gradients",
                cause="backward changes what forward has saved, in place",
            )
    return {}


_SHARED = "a cache, or state that a call leaves behind on self, the class or the module"


@check("A6", "calls do not disturb one another")
def isolated(subject: Subject) -> Metrics:
    """Two live calls, backward in both orders; two instances; threads."""
    step = subject.step(spread=1e-3)
    before = _value_and_gradients(subject, step)
    others: list[tuple[str, Combination]] = [("a copy", subject.copy(torch.float64))]
    others += [
        (f"an instance with another {n!r}", Subject(c, subject.seed).combination)
        for n, c in itertools.islice(alternatives(subject), 1)
        if c.pose_inputs == subject.combination.pose_inputs
    ]
    for what, combination in (("a second call", subject.combination), *others):
        for n_poses, spread in ((5, 1.0), (3, 1e-3)):
            _two_live_calls(subject, what, combination, n_poses, spread)
        if not all(map(_equal, before, _value_and_gradients(subject, step))):
            raise Fail(f"other numbers once there is {what}", cause=_SHARED)
    _weights_of_their_own(subject)
    _inputs_of_this_call(subject)
    buffers = dict(subject.combination.named_buffers())
    if not (subject.combination.stochastic or buffers):
        _in_threads(subject)
    return {}


def _weights_of_their_own(subject: Subject) -> None:
    """Hold ``pose_weights`` to its argument, whatever ``combine`` was called with before."""
    if not overrides(type(subject.combination), "pose_weights"):
        return
    n_poses = subject.n_poses(3)
    one, two = subject.poses(n_poses), subject.poses(n_poses)
    expected = subject.weights(one)
    with subject.forgetting(), torch.no_grad():
        if overrides(type(subject.combination), "combine"):
            subject.combination.combine(two.predictions, **two.inputs)
        found = subject.combination.pose_weights(one.predictions, **one.inputs)
    if not _equal(expected, found):
        raise Fail(
            "pose_weights(y) gave other weights after combine of other predictions",
            cause="state that combine leaves on self: compute it from the argument",
        )


def _inputs_of_this_call(subject: Subject) -> None:
    """Hold the value to its pose inputs, whatever those of an earlier call were."""
    step = subject.step(spread=1e-3)
    for name in step.poses.inputs:
        numbers = subject.poses(len(step.poses)).inputs[name]
        other = replace(step, poses=step.poses.with_input(name, numbers))
        expected = subject.call(other, combination=subject.copy(torch.float64))
        subject.call(step)
        found = subject.call(other)
        if not _equal(expected, found):
            raise Fail(
                f"{other.poses}: expected the value {expected.item():.17g}; found"
                f" {found.item():.17g} after a call with another {name!r}",
                cause=_SHARED,
            )


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two results are the same to the last bit, NaN in the same places."""
    return torch.equal(one, other) or (
        one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())
    )


def _two_live_calls(
    subject: Subject, what: str, other: Combination, n_poses: int, spread: float
) -> None:
    one = subject.step(spread=spread)
    two = subject.step(n_poses=max(n_poses, other.min_poses), spread=spread)
    held = subject.gradients(one)
    expected = {name: gradient.clone() for name, gradient in held.items()}
    for other_first in (False, True):
        value = subject.call(one)
        meanwhile = subject.call(two, combination=other)
        if other_first:
            gradients_of(meanwhile, two.params)
        found = gradients_of(value, one.params)
        for name, gradient in expected.items():
            if not _equal(gradient, found[name]):
                raise Fail(
                    f"parameter {name!r}: another gradient after {what} between forward and"
                    " backward",
                    cause="state on self, the class or the module, which belongs to the last call:"
                    " keep it on ctx",
                )
    gradients_of(subject.call(two, combination=other), two.params)
    if any(not _equal(held[name], expected[name]) for name in held):
        raise Fail(
            f"gradients that were handed out have changed after {what}",
            cause="a buffer that every backward writes to: return a tensor of its own",
        )
    if not _equal(subject.call(one), value):
        raise Fail(
            f"another value after {what}",
            cause=_SHARED,
        )


def _in_threads(subject: Subject) -> None:
    steps = [subject.step() for _ in range(N_THREADS)]
    alone = [_value_and_gradients(subject, step) for step in steps]
    with ThreadPoolExecutor(N_THREADS) as pool:
        found = list(pool.map(partial(_value_and_gradients, subject), 5 * steps))
    for one, other in zip(5 * alone, found, strict=True):
        if not all(map(_equal, one, other)):
            raise Fail(
                f"{N_THREADS} threads at once gave other numbers than one after the other",
                cause="state that the threads share",
            )


def _value_and_gradients(subject: Subject, step: Step) -> list[Tensor]:
    value = subject.call(step)
    return [value.detach(), *gradients_of(value, step.params).values()]


@check("A7", "it works without gradients, and with frozen and unused parameters")
def modes(subject: Subject) -> Metrics:
    """Under no_grad and inference_mode; parameters that are frozen, unused, or not there."""
    step = subject.step()
    value = subject.call(step)
    nothing = Step(step.poses, {}, {})
    with torch.no_grad():
        found = {"under no_grad": subject.call(step), "and no parameters": subject.call(nothing)}
        if found["under no_grad"].requires_grad:
            raise Fail(
                "under no_grad: the output requires a gradient",
                cause="the grad mode is switched on in forward (enable_grad, set_grad_enabled)",
            )
    with torch.inference_mode():
        found["under inference_mode"] = subject.call(step).clone()
    found["with no parameters"] = subject.call(nothing)
    for what, other in found.items():
        if not _equal(value, other):
            raise Fail(
                f"{what}: expected the value {value.item():.17g}; found {other.item():.17g}",
            )
    _frozen(subject, step)
    _unused(subject, step)
    _without_elements(subject)
    return {}


def _without_elements(subject: Subject) -> None:
    step = subject.step({"w": (2,), "empty": (0, 2)})
    if subject.gradients(step)["empty"].shape != (0, 2):
        raise Fail("a parameter without elements: its gradient has another shape")


def _frozen(subject: Subject, step: Step) -> None:
    expected = subject.gradients(step)
    params = {n: p.detach().requires_grad_(n != "w2") for n, p in step.params.items()}
    found = subject.gradients(Step(step.poses, step.gradients, params))
    for name, gradient in found.items():
        if not torch.allclose(gradient, expected[name], rtol=1e-12, atol=0):
            raise Fail(
                f"parameter {name!r}: another gradient while 'w2' is frozen",
                cause="frozen parameters are dropped, and the gradients no longer line up",
            )


def _unused(subject: Subject, step: Step) -> None:
    zero = {n: torch.zeros_like(g) if n == "w2" else g for n, g in step.gradients.items()}
    value = subject.call(replace(step, gradients=zero))
    (found,) = torch.autograd.grad(value, step.params["w2"], allow_unused=True)
    if found is None or not (found == 0).all():
        raise Fail(
            "parameter 'w2', unused by every pose: expected a gradient of 0; found"
            f" {found if found is None else found.flatten()[0].item()}",
            cause="return zeros, not None"
            if found is None
            else "a division by the size of the gradient, or something added to it (weight decay)",
        )


@check("A8", "memory is given back")
def memory(subject: Subject) -> Metrics:
    """Predictions and gradients of the poses die once the value is gone."""
    step = subject.step()
    pred_list, grad_dict, pose_inputs = step.pred_list(), step.grad_dict(), step.poses.handed()
    tensors = pred_list + [gradient for each in grad_dict.values() for gradient in each]
    tensors += pose_inputs.values()
    inputs = [weakref.ref(tensor) for tensor in tensors]
    value = subject.call(step, pred_list=pred_list, grad_dict=grad_dict, pose_inputs=pose_inputs)
    value.backward()
    del value, pred_list, grad_dict, pose_inputs, tensors
    if not any(ref() is not None for ref in inputs):
        return {}
    gc.collect()
    alive = sum(ref() is not None for ref in inputs)
    raise Fail(
        f"after backward, {alive or 'all'} of {len(inputs)} predictions, pose inputs and gradients"
        f" are still alive{'' if alive else ' until the garbage collector runs'}",
        cause="kept on self, the class or in a cache"
        if alive
        else "a cycle of references: save tensors with ctx.save_for_backward, not on ctx",
    )


@check("A8q", "gradients of the poses are freed by backward", "quality")
def freed_by_backward(subject: Subject) -> Metrics:
    """While the value lives on, for a log or a mean over the epoch."""
    step = subject.step()
    pred_list, grad_dict = step.pred_list(), step.grad_dict()
    inputs = [weakref.ref(gradient) for each in grad_dict.values() for gradient in each]
    value = subject.call(step, pred_list=pred_list, grad_dict=grad_dict)
    value.backward()
    del pred_list, grad_dict
    alive = sum(ref() is not None for ref in inputs)
    if alive:
        raise Fail(
            f"after backward, with the value kept, {alive} of {len(inputs)} gradients are alive",
            cause="they are attributes of ctx: ctx.save_for_backward lets them go after backward",
        )
    return {}


@check("A9", "copies, pickles and checkpoints are the same combination")
def copies(subject: Subject) -> Metrics:
    """deepcopy, pickle, and state_dict into an instance that is made anew."""
    original = subject.copy(torch.float64)
    step = subject.step()
    for _ in range(2):  # what it learns or counts by being called must be kept, too
        _call_unguarded(original, step)
    made = {"deepcopy": copy.deepcopy(original)}
    if _importable(type(original)):
        made["pickle"] = pickle.loads(pickle.dumps(original))
    anew = _anew(subject)
    if anew is not None:
        _load(original, anew)
        made["state_dict"] = anew
    for how, other in made.items():
        for spread in (1.0, 0.1):
            poses = subject.poses(subject.n_poses(3), 0.0, spread)
            # Not of copies: what a copy loses, two copies lose.
            ours, theirs = (Subject(c, subject.seed, copied=False) for c in (original, other))
            same = _equal(ours.value(poses), theirs.value(poses))
            if not (same and _equal(ours.weights(poses), theirs.weights(poses))):
                raise Fail(
                    f"after {how}: expected the value {ours.value(poses).item():.17g}; found"
                    f" {theirs.value(poses).item():.17g}",
                    cause="an argument is lost on the way: keep what the value depends on in"
                    " attributes set by __init__, and what is learned in parameters and buffers",
                )
    return {"ways": sorted(made)}


def _load(original: Combination, anew: Combination) -> None:
    try:
        anew.load_state_dict(original.state_dict())
    except RuntimeError as error:
        raise Fail(
            f"its state_dict does not fit a new instance: {error}",
            cause="a parameter or buffer is made by a call: make it in __init__",
        ) from None


def _importable(cls: type) -> bool:
    module: Any = sys.modules.get(cls.__module__)
    found = reduce(lambda at, part: getattr(at, part, None), cls.__qualname__.split("."), module)
    return found is cls


def _anew(subject: Subject) -> Combination | None:
    try:
        args, kwargs = vars(subject.original)["_arguments"]
        return type(subject.original)(*copy.deepcopy(args), **copy.deepcopy(kwargs)).double()
    except Exception:  # made by other means than its constructor
        return None


@check("A9q", "its repr shows its arguments", "quality")
def shows_arguments(subject: Subject) -> Metrics:
    """Two instances that differ look different."""
    for name, other in alternatives(subject):
        if repr(other) == repr(subject.original):
            raise Fail(
                f"instances with different {name!r} have the same repr: {other!r}",
                cause="remove extra_repr: the base class shows the arguments",
            )
    if not constructor_arguments(subject.original, defaults=True):
        raise Skip("it takes no arguments")
    return {}


@check("A10", "double backward is right or an error")
def double_backward(subject: Subject) -> Metrics:
    """The gradients of the poses are numbers here: a second derivative cannot be right."""
    step = subject.step({"w": (2,)})
    (param,) = step.params.values()
    # Not linear in the value: else its own derivative hides that of the combination.
    loss = subject.call(step).square()
    try:
        (gradient,) = torch.autograd.grad(loss, param, create_graph=True)
        (loss + gradient.square().sum()).backward()
    except Exception:
        return {}
    raise Fail(
        f"a second backward made the gradient {param.grad}, without an error, of a part of the"
        " Hessian alone",
        cause="decorate backward with torch.autograd.function.once_differentiable, or raise where"
        " torch.is_grad_enabled()",
    )
