"""Import plugins in child processes, and report a crash, a hang or an exit as a problem.

Each distribution has its own process. If a process dies, another one continues with the remaining
plugins.
"""

from __future__ import annotations

import io
import itertools
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import fields
from operator import attrgetter
from typing import Any

from mtenn_core._process.child import Child, ChildDiedError, Send, limit_memory
from mtenn_core._registry.policy import Policy
from mtenn_core._registry.record import PluginRecord, Problem
from mtenn_core.errors import PluginWarning, RegistryError

MEMORY_LIMIT = 4096  # MiB, in addition to the memory that torch itself takes
MAX_DEATHS = 3  # for each distribution, because each new process needs seconds to import torch
SLOW = 3.0  # seconds, without the import of torch, which takes one or two


def import_isolated(
    records: Sequence[PluginRecord], time_limit: float
) -> Iterator[tuple[PluginRecord, list[Problem]]]:
    """Import the plugins of each distribution in a child process, and yield their problems.

    Parameters
    ----------
    time_limit : time limit of each plugin in seconds

    Raises
    ------
    ChildDiedError : no child process starts, so no plugin is the cause
    """
    by_owner = sorted(records, key=attrgetter("owner"))
    for _, same_owner in itertools.groupby(by_owner, key=attrgetter("owner")):
        yield from _import_distribution(list(same_owner), time_limit)


def _import_distribution(
    remaining: list[PluginRecord], time_limit: float
) -> Iterator[tuple[PluginRecord, list[Problem]]]:
    n_deaths = 0
    while remaining and n_deaths < MAX_DEATHS:
        job = [_to_json(record) for record in remaining]
        limits = {"time_limit": float("inf"), "step_time_limit": time_limit}
        with Child(__name__, job, **limits) as child:
            try:
                for kind, content in child.messages():
                    if kind == "problems":
                        record = remaining.pop(0)
                        yield record, [Problem(kind, text, record) for kind, text in content]
            except ChildDiedError as death:
                if not child.is_ready:
                    raise
                n_deaths += 1
                if remaining:
                    record = remaining.pop(0)
                    gives_up = n_deaths == MAX_DEATHS
                    yield record, [_death_problem(record, death, len(remaining), gives_up)]


def _death_problem(
    record: PluginRecord, death: ChildDiedError, n_remaining: int, gives_up: bool
) -> Problem:
    lines = [f"{record}: the import in a child process failed: {death}"]
    if gives_up:
        lines.append(f"{n_remaining} more plugins of this distribution were not imported")
    return Problem("crashes", "\n".join([*lines, record.remedy]), record)


def _to_json(record: PluginRecord) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in fields(record) if field.repr}


def _from_json(data: dict[str, Any]) -> PluginRecord:
    tuples = {key: tuple(data[key]) for key in ("requires", "shadows")}
    return PluginRecord(**(data | tuples))


def main(job: list[dict[str, Any]], send: Send) -> None:
    """Import each plugin in the child process, and send its problems."""
    import torch  # noqa: F401 - its import time must not count as the time of a plugin

    limit_memory(MEMORY_LIMIT)
    send("ready", None)
    for data in job:
        problems = _import_problems(_from_json(data))
        send("problems", [[problem.kind, problem.message] for problem in problems])


def _import_problems(record: PluginRecord) -> list[Problem]:
    from mtenn_core._registry.load import load

    problems = []
    output = io.StringIO()
    start = time.monotonic()
    with warnings.catch_warnings(record=True) as caught, redirect_stdout(output):
        warnings.simplefilter("always")
        try:
            load(record, Policy(strict=False).resolved())
        except RegistryError as error:
            problems.append(Problem.of(error))
    seconds = time.monotonic() - start
    for warning in caught:
        if issubclass(warning.category, PluginWarning):
            problems.append(Problem("leaves traces", str(warning.message)))
    if seconds > SLOW:
        text = f"{record}: its import takes {seconds:.1f} s. Tell its author"
        problems.append(Problem("slow", text))
    if line := output.getvalue().strip().partition("\n")[0]:
        text = f"{record}: its import prints {line[:60]!r} to standard output. Tell its author"
        problems.append(Problem("prints", text))
    return problems
