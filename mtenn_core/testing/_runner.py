"""Run checks on a combination and record the results."""

from __future__ import annotations

import os
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

import mtenn_core
from mtenn_core._engine.declarations import check_facts
from mtenn_core._process.printable import error_text
from mtenn_core._process.settings import preserved_process_state
from mtenn_core._process.torch_modes import without_modes
from mtenn_core.combination import Combination
from mtenn_core.testing._catalogue import chosen_checks, known_ids
from mtenn_core.testing._checks.check import Check, Level
from mtenn_core.testing._html.curves import curves
from mtenn_core.testing._outcomes import Outcome
from mtenn_core.testing._probe.instances import with_numbers
from mtenn_core.testing._probe.subject import Subject
from mtenn_core.testing._report import Record, Report, Status
from mtenn_core.testing._target import Target, target_of

FACTS = ("min_poses", "domain", "smooth", "stochastic", "properties", "pose_inputs", "pose_columns")


def check_combination(
    combination: Combination | Callable[[], Combination],
    *,
    level: Level = "full",
    expected_failures: Mapping[str, str] | None = None,
    seed: int = 0,
    only: Collection[str] | None = None,
    name: str | None = None,
    target: Target | None = None,
    on_record: Callable[[Record], object] = lambda record: None,
) -> Report:
    """Check that a combination keeps the contract and that its gradient is correct.

    The checks use copies of ``combination``, in float64, on the CPU and with a separate random
    state. They do not change ``combination``. They run without the caller's modes and settings of
    torch, such as ``torch.device``, autocast or another default dtype.

    Parameters
    ----------
    combination : an instance, or a class or function that makes one. A class gets the first of its
        ``examples`` as arguments
    level : ``"gate"`` runs the checks of the registry, ``"full"`` runs all checks of the contract,
        and ``"quality"`` adds checks that go beyond the contract, and turns advice into failures
    expected_failures : maps the id of each check that may fail to the reason
    seed : seed of the random numbers that the checks use
    only : ids of the checks to run, which may be of any level
    name : name of the combination in the report
    target : target of ``mtenn check``, for the command that runs a check again
    on_record : function that gets each record as soon as its check has run

    Raises
    ------
    ValueError : the level or an id is unknown, an expected failure has no reason, or the instance
        has no numbers (it is on the meta device)
    TypeError : ``combination`` is no combination, and makes none
    CombinationContractError : a declared fact of the combination is invalid

    Returns
    -------
    the report: ``report.passed`` is the result, and ``str(report)`` describes the failures
    """
    checks = chosen_checks(level, only)
    known_ids(expected_failures or ())
    reasons = (expected_failures or {}).values()
    if not all(isinstance(reason, str) and reason.strip() for reason in reasons):
        raise ValueError(
            f"expected_failures must give a reason for each id; found {expected_failures}"
        )
    combination, report, again = _prepared(combination, level, len(checks), name, target, seed)
    make = partial(_subject, combination, level, seed)
    for check in checks:
        record = _run(check, make, seed, again(check.id))
        if level == "quality" and record.status == "advice":
            record = replace(record, status="fail")
        record = _expected(record, (expected_failures or {}).get(check.id))
        report.records.append(record)
        on_record(record)
    if level != "gate" and not only:
        with without_modes(), _restored_process_state(seed):
            report.curves.update(curves(make))
    return report


@without_modes()
def _prepared(
    source: Combination | Callable[[], Combination],
    level: Level,
    n_expected: int,
    name: str | None,
    target: Target | None,
    seed: int,
) -> tuple[Combination, Report, Callable[[str], str]]:
    """Return the combination to check, an empty report, and the command that runs a check again."""
    # devices=[]: the copies are on the CPU, and a query of the GPUs' states would start CUDA.
    with torch.random.fork_rng(devices=[]):
        combination = _instance(source)
        if combination is source:
            combination = with_numbers(combination)
    again = _shell_line(target or target_of(source), level, seed)
    check_facts(combination)
    report = Report(
        name=name or type(combination).__name__,
        combination=shown(combination),
        facts={fact: _plain(getattr(combination, fact)) for fact in FACTS},
        level=level,
        n_expected=n_expected,
    )
    return combination, report, again


def _instance(source: object) -> Combination:
    """Return a combination, or the one that a class or function makes."""
    found = source
    is_maker = not isinstance(source, type) or issubclass(source, Combination)
    if callable(source) and is_maker and not isinstance(source, torch.nn.Module):
        examples: Sequence[dict[str, Any]] = getattr(source, "examples", ())
        found = source(**next(iter(examples), {}))
    if not isinstance(found, Combination):
        is_short = isinstance(found, str | type)
        what = repr(found) if is_short else f"an instance of {type(found).__name__}"
        raise TypeError(
            "check_combination takes an instance of mtenn_core.Combination, or a class or function"
            f" that makes one; found {what}. Derive the class from mtenn_core.Combination. For a"
            " name, write registry.create(name)."
        )
    return found


def _subject(combination: Combination, level: Level, seed: int) -> Subject:
    # Each check gets a new subject, so that no check sees changes that another check made.
    return Subject(combination, seed, thorough=level != "gate")


@contextmanager
def _restored_process_state(seed: int) -> Iterator[None]:
    with preserved_process_state(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some probes are more extreme than a user's numbers
        # torch.manual_seed would take a millisecond, because it also looks for devices to seed.
        torch.default_generator.manual_seed(seed)
        yield


@without_modes()
def _run(check: Check, make: Callable[[], Subject], seed: int, again: str) -> Record:
    start = time.perf_counter()
    status: Status = "pass"
    reason, cause, metrics = "", "", {}
    try:
        with _restored_process_state(seed):
            metrics = check.run(make())
    except Outcome as outcome:
        status, reason = outcome.status, str(outcome)
        cause, metrics = outcome.cause, outcome.metrics
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit, or a panic of an extension in Rust
        status, reason = "error", described(error)
    return Record(
        id=check.id,
        title=check.title,
        level=check.level,
        status=status,
        reason=reason,
        cause=cause,
        metrics=metrics,
        seed=seed,
        duration=time.perf_counter() - start,
        repro=again,
        is_advice=status == "advice",
    )


def described(error: BaseException) -> str:
    """Return an error as text, with the file and line that raised it.

    The line is in the author's code if the traceback contains such code.
    """
    frames = traceback.extract_tb(error.__traceback__)
    libraries = tuple(os.path.join(module.__path__[0], "") for module in (torch, mtenn_core))
    theirs = [frame for frame in frames if not frame.filename.startswith(libraries)]
    where = (theirs or frames)[-1]
    return f"{error_text(error)}\nraised in {where.filename}:{where.lineno}"


def _expected(record: Record, why: str | None) -> Record:
    """Return the record. If there is a reason ``why``, mark it as an expected failure."""
    if why is None or record.status == "skip":
        return record
    if record.status == "pass":
        return replace(record, status="xpass", reason=f"a failure was expected: {why}")
    return replace(record, status="xfail", reason=f"expected: {why}\n{record.reason}")


def _shell_line(target: Target | None, level: Level, seed: int) -> Callable[[str], str]:
    is_quality = level == "quality"  # at other levels, some failures are only advice
    if target is None:
        end = f"seed={seed})  # mtenn check cannot import it"
        end = f"level={level!r}, {end}" if is_quality else end
        return lambda id: f"check_combination(…, only=[{id!r}], {end}"
    options = ["--seed", str(seed)]
    if is_quality:
        options += ["--level", level]
    return lambda id: target.command("--only", id, *options)


def shown(combination: Combination) -> str:
    """Return the ``repr`` of a combination, or a text with the error that ``repr`` raises."""
    try:
        return repr(combination)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return f"{type(combination).__name__}(its repr raises {error_text(error)})"


def _plain(fact: Any) -> Any:
    if isinstance(fact, frozenset | set):
        return sorted(fact)
    return dict(fact) if isinstance(fact, Mapping) else fact
