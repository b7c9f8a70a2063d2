"""The metadata of one installed copy of a distribution, read file by file.

This module reads only the few files that a list of plugins needs. The parsers of
:mod:`importlib_metadata` take longer, and they reject a whole file for one malformed line.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mtenn_core._registry.files import is_special, open_regular
from mtenn_core._registry.record import PluginRecord, Problem, canonical

if TYPE_CHECKING:
    from importlib_metadata import Distribution
    from packaging.version import Version

# Other names could not be used in a setting, or would look like `distribution:name`.
_NAME = re.compile(r"\w([\w.-]*\w)?")
_ON_CORE = re.compile(r"\s*mtenn[-_.]+core(?![\w.-])", re.IGNORECASE)
_NO_TEXT = "\ufffd"  # replaces bytes that are not UTF-8


def unmet_requirements(record: PluginRecord) -> dict[str, str]:
    """Return the requirements of a plugin's distribution that this environment does not meet.

    The values are the versions that were found, or "none".
    Requirements on mtenn-core are left out, because the policy checks them.
    """
    from importlib import metadata

    from packaging.requirements import InvalidRequirement, Requirement

    unmet = {}
    fields = _parse_header(_text_of(os.path.join(record.metadata or "", "METADATA")))
    for text in itertools.filterfalse(_ON_CORE.match, fields.get("requires-dist", ())):
        try:
            requirement = Requirement(text)
        except InvalidRequirement:  # pip has accepted it, so another version of packaging knows it
            continue
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = metadata.version(requirement.name) or "none"
        except metadata.PackageNotFoundError:
            found = "none"
        if found == "none" or not requirement.specifier.contains(found, prereleases=True):
            unmet[f"{requirement.name}{requirement.specifier}"] = found
    return unmet


class Metadata:
    """The metadata folder of one copy of a distribution.

    Attributes
    ----------
    path : the metadata folder
    folder : the folder on the path that contains the metadata folder
    name : canonical name of the distribution (PEP 503)
    is_egg : True for ``.egg-info`` and other formats that are not ``.dist-info``
    is_leftover : True if an interrupted pip left it behind
    is_endless : True if ``entry_points.txt`` is a pipe or a device
    mentions_group : True if ``entry_points.txt`` contains the name of the group
    """

    def __init__(self, distribution: Distribution, group: str) -> None:
        self._distribution = distribution
        self._group = group
        path = getattr(distribution, "_path", None)  # None for a third-party finder
        self._is_folder = isinstance(path, Path)
        self.path = str(path or distribution.locate_file("")).rstrip(os.sep)
        self.folder, file_name = os.path.split(self.path)
        if file_name == "EGG-INFO":  # use the name of the folder or zip file around it
            file_name = os.path.basename(self.folder)
        stem, suffix = os.path.splitext(file_name)
        self.is_egg = suffix != ".dist-info"
        # Use the folder's name, because METADATA would be one more file to read per distribution.
        self.name = canonical(stem.partition("-")[0] if path else str(distribution.name))
        self._version = stem.partition("-")[2]
        self._entry_points = self._read("entry_points.txt")
        self.is_endless = not self._entry_points and is_special(
            os.path.join(self.path, "entry_points.txt")
        )
        self.mentions_group = group in self._entry_points
        self.is_leftover = stem.startswith("~")  # pip gives a folder this name before it deletes it

    @property
    def stops_torch(self) -> bool:
        """True if ``import torch`` raises or hangs when it reads these entry points."""
        return (
            self.is_endless
            or _NO_TEXT in self._entry_points
            or any("=" not in line for _, _, line in self._entry_point_lines())
        )

    def similar_groups(self) -> list[str]:
        """Return groups whose names look like a misspelt name of our group."""
        first_word = re.split(r"[\W_]", self._group)[0].lower()
        if first_word not in self._entry_points.lower():  # so that a scan stays fast
            return []
        import difflib

        groups = dict.fromkeys(re.findall(r"^\s*\[(.+)\]\s*$", self._entry_points, re.MULTILINE))
        return [
            group
            for group in map(str.strip, groups)
            if group != self._group
            and difflib.get_close_matches(group.lower(), [self._group.lower()], cutoff=0.75)
        ]

    @property
    def has_header(self) -> bool:
        """True if the file with the name of the distribution exists."""
        return bool(self._read_header())

    def version(self) -> Version:
        """Return the version from the name of the folder."""
        from packaging.version import InvalidVersion, Version

        try:
            return Version(self._version)
        except InvalidVersion:
            return Version("0")

    def records(self, problems: list[Problem]) -> list[PluginRecord]:
        """Return a record for each entry point of the group. Append a problem for each bad line."""
        if not self.mentions_group:
            return []
        name, version, requires = self._header(problems)
        entry_points = dict.fromkeys(self._parse_group(f"{name} {version}", problems))
        return [
            PluginRecord(
                name=entry_point,
                target=target,
                distribution=name,
                version=version,
                location=self.folder,
                metadata=self.path,
                requires=requires,
            )
            for entry_point, target in entry_points
        ]

    def _header(self, problems: list[Problem]) -> tuple[str, str | None, tuple[str, ...]]:
        """Return name, version and the requirements on mtenn-core."""
        fields = _parse_header(self._read_header())
        name, version = fields.get("name", [""])[0], fields.get("version", [""])[0]
        requires = self._egg_requirements() if self.is_egg else fields.get("requires-dist", [])
        on_core = tuple(filter(_ON_CORE.match, requires))
        if name and version and _NO_TEXT not in name + version:
            # Metadata could use the name of another distribution to get around a policy.
            if canonical(name) == self.name or not self._is_folder:
                return name, version, on_core
            found = f"contain the name {name!r}"
        else:
            found, version = "contain no name or no version", ""
        problems.append(
            Problem(
                "no metadata",
                f"{self.name}: the metadata in {self.path} {found}. Reinstall the distribution:"
                f" pip install --force-reinstall {self.name}",
            )
        )
        return self.name, version or None, on_core

    def _read_header(self) -> str:
        return self._read("METADATA") or self._read("PKG-INFO")

    def _egg_requirements(self) -> list[str]:
        # These are the files that importlib_metadata reads.
        files = ("METADATA", "PKG-INFO", "requires.txt", "")
        if any(is_special(os.path.join(self.path, file)) for file in files):
            return []
        try:
            return list(self._distribution.requires or ())
        except Exception:  # the parser raises several types of errors
            return []

    def _parse_group(self, owner: str, problems: list[Problem]) -> Iterator[tuple[str, str]]:
        """Yield name and target of each entry point of the group."""
        for group, number, line in self._entry_point_lines():
            if group != self._group or line.startswith(";"):  # some parsers allow such comments
                continue
            name, equals, target = (part.strip() for part in line.partition("="))
            if equals and _NAME.fullmatch(name) and _NO_TEXT not in line:
                yield name, target
                continue
            file = os.path.join(self.path, "entry_points.txt")
            problems.append(
                Problem(
                    "malformed",
                    f"{owner}: expected 'name = module:attribute' in line {number} of {file};"
                    f" found {line!r}. Tell its author",
                )
            )

    def _entry_point_lines(self) -> Iterator[tuple[str, int, str]]:
        """Yield group, line number and text of each line of ``entry_points.txt`` with a group."""
        group = ""
        for number, line in enumerate(map(str.strip, self._entry_points.splitlines()), 1):
            if line.startswith("[") and line.endswith("]"):
                group = line[1:-1].strip()
            elif group and line and not line.startswith("#"):
                yield group, number, line

    def _read(self, name: str) -> str:
        """Return the text of a file, or "" if there is no such file."""
        if not self._is_folder:
            return self._distribution.read_text(name) or ""
        return _text_of(os.path.join(self.path, name))

    def __str__(self) -> str:
        return self.path


def _text_of(path: str) -> str:
    """Return the text of a file, or "" if there is no such file."""
    try:
        with open_regular(path) as file:
            return file.read().decode("utf-8-sig", errors="replace")
    except OSError:
        return ""


def _parse_header(text: str) -> dict[str, list[str]]:
    """Return the fields before the first blank line. The keys are their names in lower case.

    This does not use the parser of :mod:`email`, because its import takes longer than a scan.
    """
    fields: dict[str, list[str]] = {}
    for line in itertools.takewhile(str.strip, text.splitlines()):
        name, colon, value = line.partition(":")
        if colon and not line[0].isspace():
            fields.setdefault(name.lower(), []).append(value.strip())
    return fields
