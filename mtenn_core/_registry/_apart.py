"""Import plugins in a process of their own: a crash, a hang or an exit is then a result, too.

Where it dies, another goes on with the plugins that are left.
"""

from __future__ import annotations

import io
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import fields
from typing import Any

from mtenn_core._child_process import Child, ChildDiedError, Send
from mtenn_core._registry._policy import Policy
from mtenn_core._registry._record import PluginRecord, Problem
from mtenn_core.errors import PluginWarning, RegistryError

SLOW = 3.0  # seconds; torch, which takes one or two, is there before


def import_apart(
    records: Sequence[PluginRecord], time_limit: float
) -> Iterator[tuple[PluginRecord, list[Problem]]]:
    """Import plugins in a child process, and yield for each what is wrong with it.

    Parameters
    ----------
    time_limit : in seconds, for each plugin
    """
    left = list(records)
    while left:
        job = [_to_plain(record) for record in left]
        limits = {"time_limit": float("inf"), "time_limit_of_step": time_limit}
        with Child(__name__, job, **limits) as child:
            try:
                for word, content in child.words():
                    if word == "found":
                        record = left.pop(0)
                        yield record, [Problem(kind, text, record) for kind, text in content]
            except ChildDiedError as death:
                if left:
                    record = left.pop(0)
                    text = f"{record}: importing it in isolation: {death}\n{record.remedy}"
                    yield record, [Problem("crashes", text, record)]


def _to_plain(record: PluginRecord) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in fields(record) if field.repr}


def _from_plain(plain: dict[str, Any]) -> PluginRecord:
    tuples = {key: tuple(plain[key]) for key in ("requires", "shadows")}
    return PluginRecord(**(plain | tuples))


def main(job: list[dict[str, Any]], send: Send) -> None:
    """Be the child: import one after the other, and tell what is wrong with it."""
    import torch  # noqa: F401 - so that no plugin is blamed for the time that it takes

    send("ready", None)
    for plain in job:
        problems = _problems(_from_plain(plain))
        send("found", [[problem.kind, problem.message] for problem in problems])


def _problems(record: PluginRecord) -> list[Problem]:
    from mtenn_core._registry._load import load

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
