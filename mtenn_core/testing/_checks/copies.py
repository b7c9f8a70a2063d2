"""A9: copies, pickles and checkpoints of a combination, and its ``repr``."""

from __future__ import annotations

import copy
import pickle
import sys
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from mtenn_core._engine.declarations import constructor_arguments
from mtenn_core.combination import Combination
from mtenn_core.testing._checks.arguments import alternatives
from mtenn_core.testing._checks.check import check
from mtenn_core.testing._checks.side_effects import call_keeping_state
from mtenn_core.testing._outcomes import Fail, Metrics, Skip
from mtenn_core.testing._probe.comparison import equal_with_nan
from mtenn_core.testing._probe.instances import shares_with
from mtenn_core.testing._probe.subject import Subject


@check("A9", "copies, pickles and checkpoints are the same combination")
def copies(subject: Subject) -> Metrics:
    """Compare deepcopy, pickle, and a new instance that loads the state_dict with the original."""
    original = subject.copy(torch.float64, as_written=True)
    step = subject.probes.step()
    for _ in range(2):  # a copy must also keep state that changes with each call
        call_keeping_state(original, step)
    made = _copies(original)
    for how, other in made.items():
        what = _shared(other, original)
        if what:
            raise Fail(
                f"after {how}: the copy must have its own parameters, buffers, modules and lists;"
                f" found {what} that it shares with the original",
                cause=f"{_METHODS[how]} copies nothing, or only the outer object: remove it",
            )
    anew = _new_instance(subject)
    if anew is not None:
        _load(original, anew)
        made["state_dict"] = anew
    for how, other in made.items():
        for spread in (1.0, 0.1):
            poses = subject.probes.poses(3, 0.0, spread)
            # Use the original itself (copied=False), because a copy of it may lose the same state.
            ours, theirs = (Subject(c, subject.seed, copied=False) for c in (original, other))
            same = equal_with_nan(ours.value(poses), theirs.value(poses))
            if not (same and equal_with_nan(ours.weights(poses), theirs.weights(poses))):
                raise Fail(
                    f"after {how}: expected the value {ours.value(poses).item():.17g}; found"
                    f" {theirs.value(poses).item():.17g}",
                    cause="the copy loses an argument or a state: set arguments as attributes in"
                    " __init__, and keep learned numbers in parameters and buffers",
                )
    _check_frozen_copies(subject.copy(torch.float64, as_written=True))
    return {"ways": sorted(made)}


_METHODS = {"deepcopy": "__deepcopy__", "pickle": "__reduce__ (or __getstate__, __setstate__)"}


def _copies(original: Combination) -> dict[str, Combination]:
    """Return a copy by each of the ways that apply."""
    made: dict[str, Combination] = {"deepcopy": copy.deepcopy(original)}
    if _importable(type(original)):
        made["pickle"] = pickle.loads(pickle.dumps(original))
    return made


def _shared(one: Combination, other: Combination) -> str:
    """Return a part that two combinations have in common, or ""."""
    if shares_with(one, other):
        return "one"
    for name, value in vars(one).items():
        if isinstance(value, list | dict | set | Tensor) and value is vars(other).get(name):
            return f"the attribute {name!r}"
    return ""


def _check_frozen_copies(original: Combination) -> None:
    """Check that copies of a frozen combination in eval mode are frozen and in eval mode."""
    original.requires_grad_(False).eval()
    for how, other in _copies(original).items():
        if other.training or any(param.requires_grad for param in other.parameters()):
            what = "training" if other.training else "requires_grad of its parameters"
            raise Fail(
                f"after {how}: a copy of a frozen combination in eval mode must be frozen and in"
                f" eval mode, too; found that {what} is True",
                cause=f"{_METHODS[how]} makes a new instance, which loses requires_grad and"
                " training: remove it",
            )


def _load(original: Combination, anew: Combination) -> None:
    try:
        anew.load_state_dict(original.state_dict())
    except RuntimeError as error:
        raise Fail(
            f"its state_dict does not fit a new instance: {error}",
            cause="a call makes a parameter or buffer: make it in __init__",
        ) from None


def _importable(cls: type) -> bool:
    module: Any = sys.modules.get(cls.__module__)
    found = reduce(lambda at, part: getattr(at, part, None), cls.__qualname__.split("."), module)
    return found is cls


def _new_instance(subject: Subject) -> Combination | None:
    try:
        args, kwargs = vars(subject.original)["_arguments"]
        return type(subject.original)(*copy.deepcopy(args), **copy.deepcopy(kwargs)).double()
    except Exception:  # for example, a function made it without its constructor
        return None


@check("A9q", "its repr shows its arguments", "quality")
def shows_arguments(subject: Subject) -> Metrics:
    """Check that instances with different arguments have a different ``repr``."""
    for name, other in alternatives(subject):
        if repr(other) == repr(subject.original):
            raise Fail(
                f"instances with different {name!r} must have different reprs; found {other!r} for"
                " both",
                cause="remove extra_repr: the base class shows the arguments",
            )
    if not constructor_arguments(subject.original, defaults=True):
        raise Skip("it takes no arguments")
    return {}
