"""Checks in a child process: a plugin that crashes, hangs or fills the memory is a result, too.

The child tells each result as it has it. Where it dies, the check that was running has failed, and
another child goes on with those that are left.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from mtenn_core import errors
from mtenn_core._process.child import Child, ChildDiedError, Send, limit_memory
from mtenn_core._registry import PluginRecord, Registry, registry
from mtenn_core._registry.targets import Target, parse_argument
from mtenn_core.combination import Combination
from mtenn_core.testing._catalogue import CHECKS, chosen_checks
from mtenn_core.testing._checks.check import Level
from mtenn_core.testing._report import Record, Report
from mtenn_core.testing._runner import check_combination

# Each costs the seconds in which Python and torch start.
MOST_DEATHS = 5
TITLES = {
    "import": "it can be imported and made",
    **{check.id: check.title for check in CHECKS},
    "curves": "it has numbers for the plots",
}
OUT_OF_MEMORY = re.compile(
    "MemoryError|bad_alloc|allocate memory|enough memory|start new thread|SIGKILL"
)


def check_target(
    target: Target, known: Registry = registry, *, isolated: bool = False, **options: Any
) -> Iterator[Report]:
    """Check what ``target`` names, with each set of its arguments.

    Parameters
    ----------
    known : where to look a name up
    isolated : whether to do it in a child process, which looks it up in the default registry
    **options : for :func:`~mtenn_core.testing.check_combination` or :func:`check_isolated`

    Yields
    ------
    each report when it is finished

    Raises
    ------
    MtennError : whatever ``target.combinations()`` raises
    """
    if isolated:
        yield from check_isolated(target, **options)
        return
    for name, this, combination in target.combinations(known):
        yield check_combination(combination, name=name, target=this, **options)


def check_isolated(
    target: Target,
    *,
    level: Level = "full",
    seed: int = 0,
    only: Collection[str] | None = None,
    time_limit: float = 60.0,
    memory_limit: int = 4096,
    on_record: Callable[[Record], object] = lambda record: None,
) -> Iterator[Report]:
    """Check in a child process what ``target`` names, with each set of its arguments.

    A check that ends its process is an ``"error"`` that says how, and those after it run in a new
    one, up to a number of deaths. What was not run shows in ``n_expected``. Needs POSIX; the limit
    of memory needs Linux.

    Parameters
    ----------
    level, seed, only, on_record : see :func:`~mtenn_core.testing.check_combination`
    time_limit : in seconds, for all that the target does; one check, or the import, may take half
        of it
    memory_limit : in MiB, beyond the address space of a process that has imported torch

    Yields
    ------
    each report when it is finished; one with the record ``"import"`` if no check could begin

    Raises
    ------
    MtennError : whatever ``target.combinations()`` raises; or the platform is not POSIX
    ValueError : there is no such level, or no check of such an id
    """
    if os.name != "posix":
        raise errors.MtennError(
            f"isolated checks need a POSIX system; found {sys.platform}: check without isolation"
        )
    findings = _Findings(target, level, seed, only, memory_limit, on_record)
    limits = {"time_limit": time_limit, "time_limit_of_step": time_limit / 2}
    while limits["time_limit"] > 0 and not findings.complete:
        with Child(__name__, findings.job(), **limits) as child:
            try:
                for kind, content in child.words():
                    findings.take(kind, content)
                    yield from findings.pop_finished()
            except ChildDiedError as death:
                findings.take_death(death)
        limits["time_limit"] -= child.seconds
    yield from findings.pop_all()


@dataclass
class _Findings:
    """What the children of one target have told so far."""

    target: Target
    level: Level
    seed: int
    only: Collection[str] | None
    memory_limit: int
    on_record: Callable[[Record], object]

    def __post_init__(self) -> None:
        self.ids = [check.id for check in chosen_checks(self.level, self.only)]
        self.complete = False
        self._reports: list[Report] = []
        self._commands: list[str] = []
        self._begun = False
        self._n_finished = 0
        self._n_popped = 0
        self._n_deaths = 0

    def job(self) -> dict[str, Any]:
        """Return what is left to do, for a new child."""
        self._begun = False
        return {
            "path": self.target.path,
            "arguments": self.target.argument_texts(),
            "level": self.level,
            "seed": self.seed,
            "only": None if self.only is None else self.ids,
            "ids": self.ids,
            "left": [self._left(report) for report in self._reports],
            "memory_limit": self.memory_limit,
        }

    def take(self, kind: str, content: Any) -> None:
        """Write down a word of a child."""
        match kind:
            case "ready":
                self._warn_of_no_limit(is_limited=content)
            case "made":
                self._begun = True
                if not self._reports:
                    self._reports = [Report(**header) for header, _ in content]
                    self._commands = [command for _, command in content]
            case "record":
                index, record = content
                self._add(index, Record(**record))
            case "finished":
                index, curves = content
                self._reports[index].curves.update(curves)
                self._n_finished = index + 1
            case "error":
                name, message = content
                message = self._about_memory(message)
                raise getattr(errors, name, errors.MtennError)(message)
            case "done":
                self.complete = True

    def take_death(self, death: ChildDiedError) -> None:
        """Write down that the child died, as the outcome of what it was doing."""
        self._n_deaths += 1
        if not self._begun:
            # Another child would die of the same.
            plugin = self._plugin()
            self._reports = self._reports or [self._empty_report(plugin)]
            record = self._error("import", death)
            if plugin is not None:
                record = replace(record, reason=f"{record.reason}\n{plugin.remedy}")
            self._add(self._n_finished, record)
            self.complete = True
            return
        if self._n_finished == len(self._reports):
            return
        left = self._left(self._reports[self._n_finished])
        self._add(self._n_finished, self._error(left[0] if left else "curves", death))
        self._n_finished += len(left) < 2
        self.complete = self._n_deaths == MOST_DEATHS or self._n_finished == len(self._reports)

    def pop_finished(self) -> Iterator[Report]:
        """Yield reports to which nothing will be added, each once."""
        while self._n_popped < self._n_finished:
            self._n_popped += 1
            yield self._reports[self._n_popped - 1]

    def pop_all(self) -> Iterator[Report]:
        """Yield the other reports, finished or not, each once."""
        self._n_finished = len(self._reports)
        return self.pop_finished()

    def _left(self, report: Report) -> list[str]:
        found = {record.id for record in report.records}
        return [id for id in self.ids if id not in found]

    def _plugin(self) -> PluginRecord | None:
        """Return the plugin that the target names, if it names one."""
        with suppress(errors.RegistryError):
            return registry.info(self.target.path)
        return None

    def _empty_report(self, plugin: PluginRecord | None) -> Report:
        name = self.target.path if plugin is None else str(plugin)
        return Report(name, "", {}, self.level, len(self.ids))

    def _add(self, index: int, record: Record) -> None:
        if record.status == "error":
            record = replace(
                record,
                reason=self._about_memory(record.reason),
                repro=self._command(index, record.id),
            )
        self._reports[index].records.append(record)
        self.on_record(record)

    def _command(self, index: int, id: str) -> str:
        """Return the line for the shell that meets an error again, in isolation as well."""
        if id not in self.ids:
            return self.target.command("--isolated")
        return f"{self._commands[index]} --only {id} --seed {self.seed}"

    def _error(self, id: str, death: ChildDiedError) -> Record:
        no_more = f"\nthis was death {MOST_DEATHS}: what is left is not run"
        return Record(
            id=id,
            title=TITLES[id],
            level=self.level,
            status="error",
            reason=str(death) + (no_more if self._n_deaths == MOST_DEATHS else ""),
            cause="",
            metrics={},
            seed=self.seed,
            duration=death.seconds,
            repro="",
        )

    def _about_memory(self, reason: str) -> str:
        if OUT_OF_MEMORY.search(reason):
            return f"{reason}\nperhaps not enough memory: the limit is {self.memory_limit} MiB"
        return reason

    def _warn_of_no_limit(self, *, is_limited: bool) -> None:
        if not is_limited:
            warnings.warn(
                f"memory has no limit: {sys.platform} cannot set one", RuntimeWarning, stacklevel=4
            )


def main(job: dict[str, Any], send: Send) -> None:
    """Be the child: check, and tell."""
    send("ready", limit_memory(job["memory_limit"]))
    try:
        _check(job, send)
    except errors.MtennError as error:
        send("error", [type(error).__name__, str(error)])


def _check(job: dict[str, Any], send: Send) -> None:
    target = Target(job["path"], dict(map(parse_argument, job["arguments"])))
    made = list(target.combinations())
    send("made", [_header(job, *each) for each in made])
    for index, (name, this, combination) in enumerate(made):
        left = job["left"][index] if job["left"] else job["ids"]
        if not left:
            continue
        report = check_combination(
            combination,
            level=job["level"],
            seed=job["seed"],
            only=job["only"] if left == job["ids"] else left,
            name=name,
            target=this,
            on_record=partial(_send_record, send, index),
        )
        send("finished", [index, report.curves])


def _header(
    job: dict[str, Any], name: str, target: Target, combination: Combination
) -> tuple[dict[str, Any], str]:
    """Return the report before any check, and the command that checks this one alone."""
    empty = check_combination(combination, level="gate", only=(), name=name)
    report = replace(empty, level=job["level"], n_expected=len(job["ids"]))
    return asdict(report), target.command("--isolated")


def _send_record(send: Send, index: int, record: Record) -> None:
    send("record", [index, asdict(record)])
