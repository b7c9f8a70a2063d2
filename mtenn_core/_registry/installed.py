"""Scan the path for installed plugins, and for problems with their metadata.

Only this package imports :mod:`importlib_metadata`, and only in :func:`scan`.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from mtenn_core._registry.messages import describe_error, describe_value
from mtenn_core._registry.metadata import Metadata
from mtenn_core._registry.record import PluginRecord, Problem

MISSPELT = "misspelt group"


@dataclass(frozen=True)
class Scan:
    """The result of a scan.

    Attributes
    ----------
    key : a value that changes when a distribution is installed or removed
    records : all plugins, including those of shadowed copies
    problems : problems with metadata, and with names that cannot be reached
    stops_torch : metadata folders whose ``entry_points.txt`` makes ``import torch`` raise or hang
    """

    key: tuple[Any, ...]
    records: tuple[PluginRecord, ...]
    problems: tuple[Problem, ...]
    stops_torch: tuple[str, ...] = ()


def path_key() -> tuple[Any, ...]:
    """Return a value that changes when a distribution is installed or removed."""
    return tuple((entry, _modification_time(entry)) for entry in sys.path)


def scan(group: str) -> Scan:
    """Find the entry points of ``group`` in all installed distributions, sorted by name."""
    key = path_key()
    problems: list[Problem] = []
    # Leave out missing entries. By default, the path contains a zip file that does not exist, and
    # the finder would import a library to open it.
    copies = _find_copies([entry for entry, time in key if time is not None], group, problems)
    names = {copy.name for copy in copies if copy.mentions_group}
    relevant = sorted((copy for copy in copies if copy.name in names), key=attrgetter("name"))
    records: list[PluginRecord] = []
    for _, same_name in itertools.groupby(relevant, key=attrgetter("name")):
        records += _distribution_records(_sort_copies(list(same_name)), problems)
    problems += [
        _misspelt(copy, found, group) for copy in copies for found in copy.similar_groups()
    ]
    stops_torch = [copy for copy in copies if copy.stops_torch]
    problems += _torch_problems(stops_torch, problems)
    return Scan(
        key,
        tuple(sorted(records, key=PluginRecord.sort_key)),
        tuple(sorted(problems, key=attrgetter("message"))),
        tuple(map(str, stops_torch)),
    )


def _find_copies(path: list[Any], group: str, problems: list[Problem]) -> list[Metadata]:
    # This import is in a function, because it replaces the metadata finder of the process.
    import importlib_metadata

    try:
        return _read_copies(importlib_metadata.distributions(path=path), group, problems)
    except Exception as error:  # from a third-party finder
        problems.append(
            Problem(
                "unreadable",
                f"a finder of distributions raises {describe_error(error)} in"
                f" {_place_of(error)}, and is ignored. Repair or uninstall the package that added"
                " it to sys.meta_path",
            )
        )
        context = importlib_metadata.DistributionFinder.Context(path=path)
        distributions = importlib_metadata.MetadataPathFinder.find_distributions(context)
        return _read_copies(distributions, group, problems)


def _read_copies(
    distributions: Iterable[Any], group: str, problems: list[Problem]
) -> list[Metadata]:
    copies = []
    for distribution in distributions:
        try:
            copy = Metadata(distribution, group)
        except Exception as error:
            text = (
                f"a distribution cannot be read ({describe_error(error)}):"
                f" {describe_value(distribution)}"
            )
            problems.append(Problem("unreadable", text))
            continue
        if not copy.is_leftover:
            copies.append(copy)
        elif copy.mentions_group:
            text = f"{copy} was left behind by an interrupted pip, and is ignored. Delete it"
            problems.append(Problem("leftover", text))
    return copies


def _sort_copies(copies: list[Metadata]) -> list[Metadata]:
    """Sort the copies of one distribution. The copy that Python imports comes first.

    Folders are in the order of the path. Within one folder, egg-info comes last, because older
    tools leave it behind, and newer versions come before older ones.
    """
    if len(copies) == 1:
        return copies
    # If a folder is on the path twice, for example through a link, it counts once.
    unique = list({os.path.realpath(copy.path): copy for copy in reversed(copies)}.values())
    folders = list(dict.fromkeys(copy.folder for copy in copies))
    newest_first = sorted(unique, key=lambda copy: (copy.version(), copy.path), reverse=True)
    return sorted(
        newest_first,
        key=lambda copy: (folders.index(copy.folder), not copy.has_header, copy.is_egg),
    )


def _distribution_records(copies: list[Metadata], problems: list[Problem]) -> list[PluginRecord]:
    """Return the records of all copies of a distribution. The first copy shadows the others."""
    winner, *others = copies
    shadows = tuple(map(str, others))
    records = [replace(record, shadows=shadows) for record in winner.records(problems)]
    keys = {record.key for record in records}
    for copy in others:
        reason = f"{winner} comes first on the path. Delete it if it is stale"
        shadowed = [
            replace(record, status="shadowed", reason=reason) for record in copy.records(problems)
        ]
        records += shadowed
        unreachable = [record for record in shadowed if record.key not in keys]
        problems += [
            Problem("shadowed", f"{record} in {copy} cannot be reached: {reason}", record)
            for record in unreachable
        ]
        if shadowed and not unreachable and shadowed[0].version != records[0].version:
            text = (
                f"{shadowed[0].origin} in {copy} is not used, because {winner} comes first. Delete"
                " the stale copy"
            )
            problems.append(Problem("stale copy", text, shadowed[0]))
    return records


def _misspelt(copy: Metadata, found: str, group: str) -> Problem:
    return Problem(
        MISSPELT,
        f"{copy.name} has entry points in the group {found!r}, which mtenn-core does not read. Did"
        f" you mean {group!r}? Correct its pyproject.toml, and install it again ({copy})",
    )


def _torch_problems(stops_torch: list[Metadata], known: list[Problem]) -> list[Problem]:
    """Return problems of distributions that stop ``import torch``, except known problems."""
    malformed = [problem.message for problem in known if problem.kind == "malformed"]
    return [
        Problem(
            "malformed",
            f"{copy}: {_rule(copy)}. import torch fails at it unless"
            f" TORCH_DEVICE_BACKEND_AUTOLOAD=0 is set. Repair or uninstall {copy.name}",
        )
        for copy in stops_torch
        if not any(copy.path in message for message in malformed)
    ]


def _rule(copy: Metadata) -> str:
    if copy.is_endless:
        return "entry_points.txt must be a regular file; found a pipe or a device"
    return "each line of entry_points.txt must be 'name = value' in UTF-8; found another line"


def _place_of(error: Exception) -> str:
    import traceback  # rarely needed

    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename}:{frame.lineno}"


def _modification_time(entry: Any) -> int | None:
    try:
        return os.stat(entry or ".").st_mtime_ns if isinstance(entry, str) else None
    except (OSError, ValueError):
        return None
