"""What is installed: the one module that reads the metadata of distributions."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

if TYPE_CHECKING:
    from importlib_metadata import Distribution


@dataclass(frozen=True)
class PluginRecord:
    """What is known of a combination plugin before it is imported.

    Attributes
    ----------
    name : the combination's name, which is the name of the entry point
    target : where it is, ``"module:attribute"``
    distribution, version, location : the package that offers it and its folder; None for a
        combination that was registered by a call
    requires_core : the version specifier that the distribution sets on mtenn-core
    plugin : the object itself, where it was registered by a call
    """

    name: str
    target: str
    distribution: str | None = None
    version: str | None = None
    location: str | None = None
    requires_core: str = ""
    plugin: object = field(default=None, repr=False)

    @property
    def key(self) -> str:
        """The name as names are compared: without case, ``_``, ``.`` and ``-`` being one."""
        return canonicalize_name(self.name)

    @property
    def qualified_name(self) -> str:
        """``distribution:name``, which no other distribution can share."""
        return f"{self.distribution}:{self.name}" if self.distribution else self.name

    def sort_key(self) -> tuple[str, str]:
        """Return what records are sorted by."""
        return self.key, self.qualified_name

    def __str__(self) -> str:
        origin = f"{self.distribution} {self.version}" if self.distribution else "registered here"
        return f"plugin {self.name!r} ({origin})"


def path_key() -> tuple[Any, ...]:
    """Return what changes when something is installed: the path, and the times of its folders."""
    return tuple(
        (entry, path.stat().st_mtime_ns if (path := Path(entry or ".")).is_dir() else None)
        for entry in sys.path
    )


def scan(group: str) -> list[PluginRecord]:
    """Return the entry points of ``group`` in every installed distribution, sorted by name."""
    # Inside the function: importing it replaces the metadata finder of the process.
    import importlib_metadata

    records: dict[str, list[PluginRecord]] = {}
    distributions: Iterable[Any] = importlib_metadata.distributions()
    for distribution in distributions:
        try:
            if group not in (distribution.read_text("entry_points.txt") or ""):
                continue
            found = _records(distribution, group)
        except Exception as error:
            warnings.warn(
                f"the entry points of {_location(distribution)} cannot be read and are left out"
                f" ({type(error).__name__}: {error})",
                RuntimeWarning,
                stacklevel=2,
            )
            continue
        # The same distribution twice on the path: the first is the one that an import would find.
        if found:
            records.setdefault(canonicalize_name(str(found[0].distribution)), found)
    return sorted(
        (record for found in records.values() for record in found), key=PluginRecord.sort_key
    )


def _records(distribution: Distribution, group: str) -> list[PluginRecord]:
    return [
        PluginRecord(
            name=entry_point.name,
            target=entry_point.value,
            distribution=distribution.name,
            version=distribution.version,
            location=_location(distribution),
            requires_core=_requires_core(distribution),
        )
        for entry_point in distribution.entry_points
        if entry_point.group == group
    ]


def _location(distribution: Distribution) -> str:
    return str(distribution.locate_file(""))


def _requires_core(distribution: Distribution) -> str:
    specifier = SpecifierSet()
    for line in distribution.requires or ():
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and canonicalize_name(requirement.name) == "mtenn-core":
            specifier &= requirement.specifier
    return str(specifier)
