"""What is installed: the one module that reads the metadata of distributions."""

from __future__ import annotations

import itertools
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtenn_core._registry.record import PluginRecord, Problem, canonical, shown, told
from mtenn_core.errors import PluginWarning

if TYPE_CHECKING:
    from importlib_metadata import Distribution
    from packaging.version import Version

_BACKENDS = "TORCH_DEVICE_BACKEND_AUTOLOAD"
# Others could not be named in a setting, or be taken for `distribution:name`.
_NAME = re.compile(r"\w([\w.-]*\w)?")
_ON_CORE = re.compile(r"\s*mtenn[-_.]+core(?![\w.-])", re.IGNORECASE)


@dataclass(frozen=True)
class Scan:
    """What a look at the path has found.

    Attributes
    ----------
    key : what changes when something is installed
    records : every plugin, those of shadowed copies included
    problems : what could not be read, and names that nobody can reach
    """

    key: tuple[Any, ...]
    records: tuple[PluginRecord, ...]
    problems: tuple[Problem, ...]


def path_key() -> tuple[Any, ...]:
    """Return what changes when something is installed: the path, and the times of its folders."""
    return tuple((entry, _modified(entry)) for entry in sys.path)


def scan(group: str) -> Scan:
    """Return the entry points of ``group`` in every installed distribution, sorted by name."""
    # Inside the function: importing it replaces the metadata finder of the process.
    import importlib_metadata

    key = path_key()
    problems: list[Problem] = []
    # Without what is not there, such as the zip file that is on every path: the finder would import
    # a library for it.
    path = [entry for entry, modified in key if modified is not None]
    try:
        copies = _copies(importlib_metadata.distributions(path=path), group, problems)
    except Exception as error:  # of a finder of somebody else's
        problems.append(
            Problem(
                "unreadable",
                f"a finder of distributions fails ({told(error)}, raised in {_raised_in(error)}),"
                " and is left out: repair or uninstall what has put it into sys.meta_path",
            )
        )
        context = importlib_metadata.DistributionFinder.Context(path=path)
        found = importlib_metadata.MetadataPathFinder.find_distributions(context)
        copies = _copies(found, group, problems)
    offers = {copy.name for copy in copies if copy.offers_any}
    records: list[PluginRecord] = []
    for _, same in itertools.groupby(
        sorted((c for c in copies if c.name in offers), key=lambda copy: copy.name),
        key=lambda copy: copy.name,
    ):
        records += _of_one_distribution(_in_order(list(same)), problems)
    _let_torch_start([copy for copy in copies if copy.stops_torch], problems)
    records.sort(key=PluginRecord.sort_key)
    return Scan(key, tuple(records), tuple(sorted(problems, key=lambda p: p.message)))


def _copies(distributions: Iterable[Any], group: str, problems: list[Problem]) -> list[_Copy]:
    copies = []
    for distribution in distributions:
        try:
            copy = _Copy(distribution, group)
        except Exception as error:
            text = f"a distribution cannot be read ({told(error)}): {shown(distribution)}"
            problems.append(Problem("unreadable", text))
            continue
        if not copy.is_leftover:
            copies.append(copy)
        elif copy.offers_any:
            text = f"{copy} is what an interrupted pip has left behind, and is left out: delete it"
            problems.append(Problem("leftover", text))
    return copies


class _Copy:
    """The metadata of a distribution in one place; there may be another place."""

    def __init__(self, distribution: Distribution, group: str) -> None:
        self.distribution = distribution
        self.group = group
        path = getattr(distribution, "_path", None)  # None for a finder of somebody else's
        self._is_folder = isinstance(path, Path)
        self.metadata = str(path or distribution.locate_file("")).rstrip(os.sep)
        self.folder, file_name = os.path.split(self.metadata)
        if file_name == "EGG-INFO":  # in a folder, or a zip file, that has the name
            file_name = os.path.basename(self.folder)
        stem, suffix = os.path.splitext(file_name)
        self.is_egg = suffix != ".dist-info"
        # The metadata's own name would cost a file for each distribution.
        self.name = canonical(stem.partition("-")[0] if path else str(distribution.name))
        self._version = stem.partition("-")[2]
        self.text = self._read("entry_points.txt")
        self.offers_any = group in self.text
        self.is_leftover = stem.startswith("~")  # so pip renames what it is about to delete

    @property
    def stops_torch(self) -> bool:
        """Whether torch, which looks for entry points when it is imported, stops at this file."""
        return "\ufffd" in self.text or any("=" not in line for _, _, line in self._lines())

    def _read(self, name: str) -> str:
        """Return the text of a file, with a mark for what is no text; empty if there is no file."""
        if not self._is_folder:
            return self.distribution.read_text(name) or ""
        path = os.path.join(self.metadata, name)
        try:
            with open(path, encoding="utf-8-sig", errors="replace") as file:
                return file.read()
        except OSError:
            return ""

    def version(self) -> Version:
        """Return what the name of the folder says."""
        from packaging.version import InvalidVersion, Version

        try:
            return Version(self._version)
        except InvalidVersion:
            return Version("0")

    def records(self, problems: list[Problem]) -> list[PluginRecord]:
        """Return a record for each line of the group, and append those that make none."""
        if not self.offers_any:
            return []
        name, version, requires = self._metadata(problems)
        return [
            PluginRecord(
                name=entry_point,
                target=target,
                distribution=name,
                version=version,
                location=self.folder,
                metadata=self.metadata,
                requires=requires,
            )
            for entry_point, target in dict.fromkeys(self._offers(f"{name} {version}", problems))
        ]

    def _metadata(self, problems: list[Problem]) -> tuple[str, str | None, tuple[str, ...]]:
        fields = _header(self._read("METADATA") or self._read("PKG-INFO"))
        name, version = fields.get("name", [""])[0], fields.get("version", [""])[0]
        requires = self._requirements() if self.is_egg else fields.get("requires-dist", [])
        on_core = tuple(filter(_ON_CORE.match, requires))
        if name and version and "\ufffd" not in name + version:
            # Whoever sets what is allowed must not be misled by a borrowed name.
            if canonical(name) == self.name or not self._is_folder:
                return name, version, on_core
            found = f"say that they are those of {name!r}"
        else:
            found, version = "tell no name or no version", ""
        problems.append(
            Problem(
                "no metadata",
                f"{self.name}: the metadata in {self.metadata} {found}; reinstall it:"
                f" pip install --force-reinstall {self.name}",
            )
        )
        return self.name, version or None, on_core

    def has_metadata(self) -> bool:
        """Whether there is the file that names the distribution."""
        return bool(self._read("METADATA") or self._read("PKG-INFO"))

    def _requirements(self) -> list[str]:
        try:
            return list(self.distribution.requires or ())
        except Exception:  # what a parser says of what is no requirement
            return []

    def _lines(self) -> Iterator[tuple[str, int, str]]:
        """Yield group, number and text of each line of ``entry_points.txt`` that is in a group."""
        group = ""
        for number, line in enumerate(map(str.strip, self.text.splitlines()), 1):
            if line.startswith("[") and line.endswith("]"):
                group = line[1:-1].strip()
            elif group and line and not line.startswith("#"):
                yield group, number, line

    def _offers(self, who: str, problems: list[Problem]) -> Iterator[tuple[str, str]]:
        """Yield name and target of each entry point of our group.

        Line by line, since the parsers of :mod:`importlib_metadata` give up a whole file, and all
        good names in it, for one line without an equals sign.
        """
        for group, number, line in self._lines():
            if group != self.group or line.startswith(";"):  # a comment, for some parsers
                continue
            name, equals, target = (part.strip() for part in line.partition("="))
            if equals and _NAME.fullmatch(name) and "\ufffd" not in line:
                yield name, target
                continue
            file = os.path.join(self.metadata, "entry_points.txt")
            problems.append(
                Problem(
                    "malformed",
                    f"{who}: expected 'name = module:attribute' in line {number} of {file};"
                    f" found {line!r}: tell its author",
                )
            )

    def __str__(self) -> str:
        return self.metadata


def _header(text: str) -> dict[str, list[str]]:
    """Return the fields in front of the first blank line, by their names in lower case.

    The parser of :mod:`email`, which :mod:`importlib_metadata` takes for this, takes longer to
    import than the whole scan.
    """
    fields: dict[str, list[str]] = {}
    for line in itertools.takewhile(str.strip, text.splitlines()):
        name, colon, value = line.partition(":")
        if colon and not line[0].isspace():
            fields.setdefault(name.lower(), []).append(value.strip())
    return fields


def _in_order(copies: list[_Copy]) -> list[_Copy]:
    """Return the copies of one distribution, the one that an import finds first in front.

    Those in one folder cannot be told by the path: egg-info is what older tools leave behind, and
    of the others the newest counts.
    """
    if len(copies) == 1:
        return copies
    # A folder that is on the path twice, by a link say, is one folder.
    unique = list({os.path.realpath(copy.metadata): copy for copy in reversed(copies)}.values())
    folders = list(dict.fromkeys(copy.folder for copy in copies))
    newest_first = sorted(unique, key=lambda copy: (copy.version(), copy.metadata), reverse=True)
    return sorted(
        newest_first,
        key=lambda copy: (folders.index(copy.folder), not copy.has_metadata(), copy.is_egg),
    )


def _of_one_distribution(copies: list[_Copy], problems: list[Problem]) -> list[PluginRecord]:
    """Return the records of all copies; those of all but the first are shadowed."""
    winner, *others = copies
    shadows = tuple(map(str, others))
    found = [replace(record, shadows=shadows) for record in winner.records(problems)]
    offered = {record.key for record in found}
    for copy in others:
        reason = f"{winner} comes first on the path; if it is stale, delete it"
        hidden = [
            replace(record, status="shadowed", reason=reason) for record in copy.records(problems)
        ]
        found += hidden
        lost = [record for record in hidden if record.key not in offered]
        problems += [
            Problem("shadowed", f"{record} in {copy} cannot be reached: {reason}", record)
            for record in lost
        ]
        if hidden and not lost and hidden[0].version != found[0].version:
            text = f"{hidden[0].origin} in {copy} is not used, {winner} is; delete what is stale"
            problems.append(Problem("stale copy", text, hidden[0]))
    return found


def _let_torch_start(stopping: list[_Copy], problems: list[Problem]) -> None:
    """Keep torch from what ends its import: it looks for entry points, and stops at such a file."""
    told_already = [problem.message for problem in problems if problem.kind == "malformed"]
    for copy in stopping:
        if not any(copy.metadata in message for message in told_already):
            text = (
                f"{copy} has an entry_points.txt with a line that is no 'name = value' in UTF-8:"
                f" the import of torch fails at it, if {_BACKENDS} is not 0; repair or uninstall"
                f" {copy.name}"
            )
            problems.append(Problem("malformed", text))
    if not stopping or os.environ.get(_BACKENDS) == "0":
        return
    os.environ[_BACKENDS] = "0"  # for child processes, too
    if "torch" not in sys.modules:
        warnings.warn(
            f"{stopping[0]} has an entry_points.txt with a line that is no 'name = value' in UTF-8,"
            f" at which the import of torch fails; so {_BACKENDS}=0 is set for this process, and"
            " torch goes without what others add to it; repair or uninstall that distribution",
            PluginWarning,
            stacklevel=6,
        )


def _raised_in(error: Exception) -> str:
    import traceback  # for what happens seldom

    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename}:{frame.lineno}"


def _modified(entry: Any) -> int | None:
    try:
        return os.stat(entry or ".").st_mtime_ns if isinstance(entry, str) else None
    except (OSError, ValueError):
        return None
