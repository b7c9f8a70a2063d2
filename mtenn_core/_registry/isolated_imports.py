"""Import plugins in a process of their own: a crash, a hang or an exit is then a result, too.

There is one process for each distribution. Where it dies, another goes on with the plugins that are
left.
"""

from __future__ import annotations

import io
import itertools
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import fields
from typing import Any

from mtenn_core._process.child import Child, ChildDiedError, Send, limit_memory
from mtenn_core._registry.policy import Policy
from mtenn_core._registry.record import PluginRecord, Problem
from mtenn_core.errors import PluginWarning, RegistryError

MEMORY_LIMIT = 4096  # MiB, beyond what torch takes by itself
MOST_DEATHS = 3  # of one distribution: each costs the seconds in which torch starts
SLOW = 3.0  # seconds; torch, which takes one or two, is there before


def import_apart(
    records: Sequence[PluginRecord], time_limit: float
) -> Iterator[tuple[PluginRecord, list[Problem]]]:
    """Import plugins, each distribution's in a child process, and yield what is wrong with each.

    Parameters
    ----------
    time_limit : in seconds, for each plugin

    Raises
    ------
    ChildDiedError : no child starts, which is the doing of no plugin
    """
    by_owner = sorted(records, key=_owner)
    for _, same in itertools.groupby(by_owner, key=_owner):
        yield from _import_distribution(list(same), time_limit)


def _owner(record: PluginRecord) -> str:
    return record.owner


def _import_distribution(
    left: list[PluginRecord], time_limit: float
) -> Iterator[tuple[PluginRecord, list[Problem]]]:
    n_deaths = 0
    while left and n_deaths < MOST_DEATHS:
        job = [_to_plain(record) for record in left]
        limits = {"time_limit": float("inf"), "time_limit_of_step": time_limit}
        has_begun = False
        with Child(__name__, job, **limits) as child:
            try:
                for word, content in child.words():
                    has_begun |= word == "ready"
                    if word == "found":
                        record = left.pop(0)
                        yield record, [Problem(kind, text, record) for kind, text in content]
            except ChildDiedError as death:
                if not has_begun:
                    raise
                n_deaths += 1
                if left:
                    record = left.pop(0)
                    yield record, [_problem_of_death(record, death, left, n_deaths)]


def _problem_of_death(
    record: PluginRecord, death: ChildDiedError, left: list[PluginRecord], n_deaths: int
) -> Problem:
    more = f"\n{len(left)} more of its plugins are not tried" * (n_deaths == MOST_DEATHS)
    text = f"{record}: importing it in isolation: {death}{more}\n{record.remedy}"
    return Problem("crashes", text, record)


def _to_plain(record: PluginRecord) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in fields(record) if field.repr}


def _from_plain(plain: dict[str, Any]) -> PluginRecord:
    tuples = {key: tuple(plain[key]) for key in ("requires", "shadows")}
    return PluginRecord(**(plain | tuples))


def main(job: list[dict[str, Any]], send: Send) -> None:
    """Be the child: import one after the other, and tell what is wrong with it."""
    import torch  # noqa: F401 - so that no plugin is blamed for the time that it takes

    limit_memory(MEMORY_LIMIT)
    send("ready", None)
    for plain in job:
        problems = _problems(_from_plain(plain))
        send("found", [[problem.kind, problem.message] for problem in problems])


def _problems(record: PluginRecord) -> list[Problem]:
    from mtenn_core._registry.load import load

    problems = []
    printed = io.StringIO()
    start = time.monotonic()
    with warnings.catch_warnings(record=True) as warned, redirect_stdout(printed):
        warnings.simplefilter("always")
        try:
            load(record, Policy(strict=False).resolved())
        except RegistryError as error:
            problems.append(Problem.of(error))
    seconds = time.monotonic() - start
    for warning in warned:
        if issubclass(warning.category, PluginWarning):
            problems.append(Problem("leaves traces", str(warning.message)))
    if seconds > SLOW:
        text = f"{record}: its import takes {seconds:.1f} s: tell its author"
        problems.append(Problem("slow", text))
    if line := printed.getvalue().strip().partition("\n")[0]:
        text = f"{record}: its import prints to standard output, {line[:60]!r} say: tell its author"
        problems.append(Problem("prints", text))
    return problems
