"""Runs checks on a combination and writes down what they found."""

from __future__ import annotations

import copy
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch

from mtenn_core.combination import Combination, check_facts
from mtenn_core.testing._check import Check, Level, Verdict
from mtenn_core.testing._checks import CHECKS
from mtenn_core.testing._report import Record, Report, Status
from mtenn_core.testing._subject import Subject

FACTS = ("min_poses", "domain", "smooth", "stochastic", "properties")


def check_combination(
    combination: Combination | Callable[[], Combination],
    *,
    level: Level = "gate",
    seed: int = 0,
    name: str | None = None,
) -> Report:
    """Check that a combination's gradient is the derivative of its value.

    Works on copies, in float64 and under a forked random state: ``combination`` stays as it is.

    Parameters
    ----------
    combination : an instance, or a class or function that makes one
    level : which checks; ``"gate"`` are those that the registry runs
    seed : of the random numbers to probe with
    name : who it is, for the report

    Raises
    ------
    CombinationContractError : it declares of itself what cannot be

    Returns
    -------
    Report, with ``passed``, ``records`` and, as ``str``, both numbers of what failed
    """
    if not isinstance(combination, Combination):
        combination = combination()
    check_facts(combination)
    checks = [check for check in CHECKS if check.level == level]
    report = Report(
        name=name or type(combination).__name__,
        combination=_shown(combination),
        facts={fact: _plain(getattr(combination, fact)) for fact in FACTS},
        n_expected=len(checks),
    )
    # devices=[]: the copies are on the CPU, and asking for the GPUs' states would start CUDA.
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        for check in checks:
            report.records.append(_run(check, combination, seed))
    return report


def _run(check: Check, combination: Combination, seed: int) -> Record:
    start = time.perf_counter()
    status: Status = "pass"
    reason, metrics = "", {}
    try:
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # probes go where a user's numbers do not
            # A copy for each check: none finds what another has left behind. In float64: finite
            # differences of float32 parameters would be confidently wrong.
            subject = Subject(copy.deepcopy(combination).cpu().double(), seed)
            metrics = check.run(subject)
    except Verdict as verdict:
        status, reason, metrics = verdict.status, str(verdict), verdict.metrics
    except (Exception, SystemExit) as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        status = "error"
        reason = f"{type(error).__name__}: {error}\nraised in {where.filename}:{where.lineno}"
    return Record(
        id=check.id,
        title=check.title,
        level=check.level,
        status=status,
        reason=reason,
        metrics=metrics,
        seed=seed,
        duration=time.perf_counter() - start,
    )


def _shown(combination: Combination) -> str:
    try:
        return repr(combination)
    except Exception as error:
        return f"{type(combination).__name__}(its repr raises {type(error).__name__}: {error})"


def _plain(fact: Any) -> Any:
    return sorted(fact) if isinstance(fact, frozenset | set) else fact
