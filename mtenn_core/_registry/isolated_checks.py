"""Run checks in a child process, and report a crash, a hang or too much memory as a result.

The child sends each result at once. If the child dies, the status of the running check is "error",
and another child continues with the remaining checks.
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
from mtenn_core._registry.targets import make_combinations
from mtenn_core.combination import Combination
from mtenn_core.testing._catalogue import CHECKS, chosen_checks
from mtenn_core.testing._checks.check import Level
from mtenn_core.testing._report import Record, Report
from mtenn_core.testing._runner import check_combination
from mtenn_core.testing._target import Target, parse_argument

MAX_DEATHS = 5  # limited, because each new process needs seconds to import torch
TITLES = {
    "import": "it can be imported and made",
    **{check.id: check.title for check in CHECKS},
    "curves": "it has numbers for the plots",
}
OUT_OF_MEMORY = re.compile(
    "MemoryError|bad_alloc|allocate memory|enough memory|start new thread|SIGKILL"
)


def check_target(
    target: Target, source: Registry = registry, *, isolated: bool = False, **options: Any
) -> Iterator[tuple[str, Report]]:
    """Check the combination of a target with each set of its arguments.

    Parameters
    ----------
    source : the registry in which to look up the name
    isolated : True to run the checks in a child process, which uses the default registry
    **options : arguments of :func:`~mtenn_core.testing.check_combination`, or of
        :func:`check_isolated`

    Yields
    ------
    the constructor's arguments as text, and the report when it is complete

    Raises
    ------
    MtennError : see :func:`~mtenn_core._registry.targets.make_combinations`
    """
    if isolated:
        yield from check_isolated(target, **options)
        return
    for name, instance_target, combination in make_combinations(target, source):
        report = check_combination(combination, name=name, target=instance_target, **options)
        yield _arguments_text(combination), report


def check_isolated(
    target: Target,
    *,
    level: Level = "full",
    seed: int = 0,
    only: Collection[str] | None = None,
    time_limit: float = 60.0,
    memory_limit: int = 4096,
    on_record: Callable[[Record], object] = lambda record: None,
) -> Iterator[tuple[str, Report]]:
    """Check the combination of a target in a child process.

    Parameters
    ----------
    level, seed, only, on_record : see :func:`~mtenn_core.testing.check_combination`
    time_limit : time limit of the target in seconds. A single check, or the import, may take half
        of it
    memory_limit : memory limit in MiB, in addition to the memory of a process that has imported
        torch

    Yields
    ------
    the constructor's arguments as text, and the report when it is complete. If no check could
    start, the report has one record, ``"import"``

    Raises
    ------
    MtennError : the platform is not POSIX, or the child process does not start; or see
        :func:`~mtenn_core._registry.targets.make_combinations`
    ValueError : the level or the id of a check is unknown
    """
    if os.name != "posix":
        raise errors.MtennError(
            f"isolated checks need a POSIX system; found {sys.platform}. Check without isolation"
        )
    results = _Results(target, level, seed, only, memory_limit, on_record)
    limits = {"time_limit": time_limit, "step_time_limit": time_limit / 2}
    while limits["time_limit"] > 0 and not results.are_complete:
        with _started(results.job(), limits) as child:
            try:
                for kind, content in child.messages():
                    results.add_message(kind, content)
                    yield from results.pop_finished()
            except ChildDiedError as death:
                if not child.is_ready:
                    raise _start_error(death) from death
                results.add_death(death)
        limits["time_limit"] -= child.seconds
    yield from results.pop_all()


def _started(job: dict[str, Any], limits: dict[str, float]) -> Child:
    try:
        return Child(__name__, job, **limits)
    except ChildDiedError as error:
        raise _start_error(error) from error


def _start_error(death: ChildDiedError) -> errors.MtennError:
    """Return the error for a child that died before it imported a plugin."""
    return errors.MtennError(
        f"no check ran, because the child process does not start: {death}\nCheck without isolation,"
        " or in another program"
    )


@dataclass
class _Results:
    """The results from the child processes of one target."""

    target: Target
    level: Level
    seed: int
    only: Collection[str] | None
    memory_limit: int
    on_record: Callable[[Record], object]

    def __post_init__(self) -> None:
        self.ids = [check.id for check in chosen_checks(self.level, self.only)]
        self.are_complete = False
        self._reports: list[Report] = []
        self._arguments: list[str] = []
        self._commands: list[str] = []
        self._has_started = False
        self._n_finished = 0
        self._n_popped = 0
        self._n_deaths = 0

    def job(self) -> dict[str, Any]:
        """Return the remaining work as the job of a new child."""
        self._has_started = False
        return {
            "path": self.target.path,
            "arguments": self.target.argument_texts(),
            "level": self.level,
            "seed": self.seed,
            "only": None if self.only is None else self.ids,
            "ids": self.ids,
            "remaining": [self._remaining(report) for report in self._reports],
            "memory_limit": self.memory_limit,
        }

    def add_message(self, kind: str, content: Any) -> None:
        """Add a message of a child."""
        match kind:
            case "ready":
                self._warn_if_unlimited(is_limited=content)
            case "combinations":
                self._has_started = True
                if not self._reports:
                    self._reports = [Report(**header) for header, _, _ in content]
                    self._arguments = [arguments for _, arguments, _ in content]
                    self._commands = [command for _, _, command in content]
            case "record":
                index, record = content
                self._add_record(index, Record(**record))
            case "finished":
                index, curves = content
                self._reports[index].curves.update(curves)
                self._n_finished = index + 1
            case "error":
                name, message = content
                message = self._with_memory_hint(message)
                raise getattr(errors, name, errors.MtennError)(message)
            case "done":
                self.are_complete = True

    def add_death(self, death: ChildDiedError) -> None:
        """Add the death of a child as the result of the running check."""
        self._n_deaths += 1
        if not self._has_started:
            self._add_import_death(death)
            return
        if self._n_finished == len(self._reports):
            return
        remaining = self._remaining(self._reports[self._n_finished])
        id = remaining[0] if remaining else "curves"
        self._add_record(self._n_finished, self._death_record(id, death))
        if len(remaining) < 2:
            self._n_finished += 1
        all_finished = self._n_finished == len(self._reports)
        self.are_complete = self._n_deaths == MAX_DEATHS or all_finished

    def pop_finished(self) -> Iterator[tuple[str, Report]]:
        """Yield each new complete report, with the text of its arguments."""
        while self._n_popped < self._n_finished:
            index = self._n_popped
            self._n_popped += 1
            yield self._arguments[index], self._reports[index]

    def pop_all(self) -> Iterator[tuple[str, Report]]:
        """Yield the remaining reports, which may be incomplete."""
        self._n_finished = len(self._reports)
        return self.pop_finished()

    def _add_import_death(self, death: ChildDiedError) -> None:
        """Add the death of a child before the first check, and stop. A new child would also die."""
        plugin = self._plugin()
        if not self._reports:
            self._reports, self._arguments = [self._empty_report(plugin)], [""]
        record = self._death_record("import", death)
        if plugin is not None:
            record = replace(record, reason=f"{record.reason}\n{plugin.remedy}")
        self._add_record(self._n_finished, record)
        self.are_complete = True

    def _remaining(self, report: Report) -> list[str]:
        finished = {record.id for record in report.records}
        return [id for id in self.ids if id not in finished]

    def _plugin(self) -> PluginRecord | None:
        """Return the plugin of the target, or None if the target is in a module or file."""
        with suppress(errors.RegistryError):
            return registry.info(self.target.path)
        return None

    def _empty_report(self, plugin: PluginRecord | None) -> Report:
        name = self.target.path if plugin is None else str(plugin)
        return Report(name, level=self.level, n_expected=len(self.ids))

    def _add_record(self, index: int, record: Record) -> None:
        if record.status == "error":
            reason = self._with_memory_hint(record.reason)
            record = replace(record, reason=reason, repro=self._command(index, record.id))
        self._reports[index].records.append(record)
        self.on_record(record)

    def _command(self, index: int, id: str) -> str:
        """Return the shell command that reproduces an error in a child process."""
        if id not in self.ids:
            return self.target.command("--isolated")
        return f"{self._commands[index]} --only {id} --seed {self.seed}"

    def _death_record(self, id: str, death: ChildDiedError) -> Record:
        reason = str(death)
        if self._n_deaths == MAX_DEATHS:
            reason += f"\nAfter {MAX_DEATHS} deaths, the remaining checks did not run"
        return Record(
            id=id,
            title=TITLES[id],
            level=self.level,
            status="error",
            reason=reason,
            seed=self.seed,
            duration=death.seconds,
        )

    def _with_memory_hint(self, reason: str) -> str:
        if OUT_OF_MEMORY.search(reason):
            return f"{reason}\nPerhaps not enough memory: the limit is {self.memory_limit} MiB"
        return reason

    def _warn_if_unlimited(self, *, is_limited: bool) -> None:
        if not is_limited:
            warnings.warn(
                f"the checks run without a memory limit, because {sys.platform} cannot set one",
                RuntimeWarning,
                stacklevel=4,
            )


def main(job: dict[str, Any], send: Send) -> None:
    """Run the checks in the child process, and send the results."""
    send("ready", limit_memory(job["memory_limit"]))
    try:
        _check(job, send)
    except errors.MtennError as error:
        send("error", [type(error).__name__, str(error)])


def _check(job: dict[str, Any], send: Send) -> None:
    target = Target(job["path"], dict(map(parse_argument, job["arguments"])))
    combinations = list(make_combinations(target, registry))
    send("combinations", [_header(job, *each) for each in combinations])
    for index, (name, instance_target, combination) in enumerate(combinations):
        remaining = job["remaining"][index] if job["remaining"] else job["ids"]
        if not remaining:
            continue
        report = check_combination(
            combination,
            level=job["level"],
            seed=job["seed"],
            only=job["only"] if remaining == job["ids"] else remaining,
            name=name,
            target=instance_target,
            on_record=partial(_send_record, send, index),
        )
        send("finished", [index, report.curves])


def _header(
    job: dict[str, Any], name: str, target: Target, combination: Combination
) -> tuple[dict[str, Any], str, str]:
    """Return the empty report, the text of the arguments, and the command for this instance."""
    empty = check_combination(combination, level="gate", only=(), name=name)
    report = replace(empty, level=job["level"], n_expected=len(job["ids"]))
    return asdict(report), _arguments_text(combination), target.command("--isolated")


def _send_record(send: Send, index: int, record: Record) -> None:
    send("record", [index, asdict(record)])


def _arguments_text(combination: Combination) -> str:
    """Return the constructor's arguments on one line, or "" if the class cannot show them."""
    try:
        return " ".join(combination.extra_repr().split())
    except KeyboardInterrupt:
        raise
    except BaseException:
        return ""
