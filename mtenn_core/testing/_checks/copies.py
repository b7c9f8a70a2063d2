"""A9: copies, pickles and checkpoints of a combination, and its ``repr``."""

from __future__ import annotations

import copy
import pickle
import sys
from functools import reduce
from typing import Any

import torch

from mtenn_core._engine.declarations import constructor_arguments
from mtenn_core.combination import Combination
from mtenn_core.testing._checks.arguments import alternatives
from mtenn_core.testing._checks.check import check
from mtenn_core.testing._checks.side_effects import call_keeping_state
from mtenn_core.testing._outcomes import Fail, Metrics, Skip
from mtenn_core.testing._probe.comparison import equal_with_nan
from mtenn_core.testing._probe.subject import Subject


@check("A9", "copies, pickles and checkpoints are the same combination")
def copies(subject: Subject) -> Metrics:
    """deepcopy, pickle, and state_dict into an instance that is made anew."""
    original = subject.copy(torch.float64)
    step = subject.probes.step()
    for _ in range(2):  # what it learns or counts by being called must be kept, too
        call_keeping_state(original, step)
    made = {"deepcopy": copy.deepcopy(original)}
    if _importable(type(original)):
        made["pickle"] = pickle.loads(pickle.dumps(original))
    anew = _new_instance(subject)
    if anew is not None:
        _load(original, anew)
        made["state_dict"] = anew
    for how, other in made.items():
        for spread in (1.0, 0.1):
            poses = subject.probes.poses(3, 0.0, spread)
            # Not of copies: what a copy loses, two copies lose.
            ours, theirs = (Subject(c, subject.seed, copied=False) for c in (original, other))
            same = equal_with_nan(ours.value(poses), theirs.value(poses))
            if not (same and equal_with_nan(ours.weights(poses), theirs.weights(poses))):
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


def _new_instance(subject: Subject) -> Combination | None:
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
