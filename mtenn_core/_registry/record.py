"""Facts about a plugin before its import, and problems with plugins and settings."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from mtenn_core.errors import (
    PluginIncompatibleError,
    PluginLoadError,
    PluginPinError,
    PluginSpecError,
    RegistryError,
)

# Extras may follow the attribute, although entry points no longer use them.
_TARGET = re.compile(r"(?P<module>[\w.]+)(\s*:\s*(?P<attribute>[\w.]+))?(\s*\[.*\])?")
Status = Literal["available", "disabled", "shadowed"]


def canonical(name: str) -> str:
    """Return the canonical name (PEP 503): in lower case, with ``-`` for ``_`` and ``.``.

    ``packaging.utils`` has the same function, but its import takes longer than a scan.
    """
    return re.sub(r"[-_.]+", "-", name).lower()


@dataclass(frozen=True)
class PluginRecord:
    """Facts about a combination plugin, which are known before its import.

    Attributes
    ----------
    name : name of the combination and of its entry point
    target : the object of the entry point, ``"module:attribute"``
    distribution, version, location : the distribution, its version and its folder; None for a
        combination that :meth:`~mtenn_core.Registry.register` added
    metadata : folder of the distribution's metadata, usually ``….dist-info``
    requires : the distribution's requirements on mtenn-core, in the text of its metadata
    plugin : the class that :meth:`~mtenn_core.Registry.register` added; None for a distribution
    status : ``"available"``; ``"disabled"`` if the :class:`~mtenn_core.Policy` disables it; or
        ``"shadowed"`` if Python imports another copy of the distribution instead
    reason : the reason why the plugin is not available, or ""
    shadows : metadata folders of other copies of the distribution
    """

    name: str
    target: str
    distribution: str | None = None
    version: str | None = None
    location: str | None = None
    metadata: str | None = None
    requires: tuple[str, ...] = ()
    plugin: object = field(default=None, repr=False)
    status: Status = field(default="available", compare=False)
    reason: str = field(default="", compare=False)
    shadows: tuple[str, ...] = field(default=(), compare=False)

    @cached_property
    def key(self) -> str:
        """The canonical name."""
        return canonical(self.name)

    @cached_property
    def owner(self) -> str:
        """The canonical name of the distribution."""
        return canonical(self.distribution or "")

    @cached_property
    def words(self) -> tuple[str, ...]:
        """All policy entries that match this plugin, with canonical names."""
        if self.distribution is None:
            return (self.key,)
        return self.key, self.owner, f"{self.owner}:{self.key}"

    @property
    def qualified_name(self) -> str:
        """``distribution:name``, a name that no other distribution can have."""
        return f"{self.distribution}:{self.name}" if self.distribution else self.name

    @property
    def origin(self) -> str:
        """The distribution and its version."""
        if self.distribution is None:
            return "registered here"
        return f"{self.distribution} {self.version or '(no version)'}"

    @property
    def where(self) -> str:
        """The end of a message that names the metadata folder; empty without such a folder."""
        return f" in {self.metadata}" if self.metadata else ""

    def parsed_target(self) -> tuple[str, str]:
        """Return the module and the attribute, which may be "".

        Raises
        ------
        PluginLoadError : the target is malformed
        """
        match = _TARGET.fullmatch(self.target.strip())
        if match is None:
            raise PluginLoadError(
                f"{self}{self.where}: its entry point must have the form 'module:attribute'; found"
                f" {self.target!r}. {self.remedy}",
                record=self,
            )
        return match["module"], match["attribute"] or ""

    @property
    def requires_core(self) -> str:
        """The version specifier in the distribution's requirements on mtenn-core.

        Raises
        ------
        any error of ``packaging`` if a requirement is malformed
        """
        from packaging.requirements import Requirement
        from packaging.specifiers import SpecifierSet

        specifier = SpecifierSet()
        for requirement in map(Requirement, self.requires):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                specifier &= requirement.specifier
        return str(specifier)

    @property
    def remedy(self) -> str:
        """The part of a message that tells the user how to repair the plugin."""
        if self.distribution is None:
            return "Register another class"
        if self.shadows:
            return f"{self.metadata} hides {' and '.join(self.shadows)}. Delete it if it is stale"
        return f"Repair it, or remove it with: pip uninstall {self.distribution}"

    def sort_key(self) -> tuple[str, ...]:
        """Return the sort key of records. It does not depend on the order of folders."""
        return self.key, self.qualified_name, self.target, self.metadata or ""

    def matches(self, entry: str) -> bool:
        """Return True if an entry of a policy matches this plugin.

        Parameters
        ----------
        entry : a name, a distribution, or ``distribution:name``
        """
        return canonical(entry) in self.words

    def to_json(self) -> dict[str, Any]:
        """Return all facts except ``plugin`` as JSON data."""
        facts = "name", "target", "distribution", "version", "location", "metadata"
        data: dict[str, Any] = {fact: getattr(self, fact) for fact in facts}
        return data | {
            "requires": list(self.requires),
            "status": self.status,
            "reason": self.reason,
        }

    def __str__(self) -> str:
        return f"plugin {self.name!r} ({self.origin})"


@dataclass(frozen=True)
class Problem:
    """A problem with an installed plugin or with a setting.

    Attributes
    ----------
    kind : the kind of problem, in one to three words
    message : the cause of the problem, and what to do
    record : the plugin, or None if the problem is not about a plugin
    """

    kind: str
    message: str
    record: PluginRecord | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, error: RegistryError) -> Problem:
        """Return the problem that an error describes."""
        kinds = {
            PluginIncompatibleError: "incompatible",
            PluginPinError: "not pinned",
            PluginLoadError: "does not load",
            PluginSpecError: "no combination",
        }
        return cls(kinds.get(type(error), "error"), str(error), error.record)

    def to_json(self) -> dict[str, Any]:
        """Return the problem as JSON data."""
        record = self.record and self.record.to_json()
        return {"kind": self.kind, "message": self.message, "plugin": record}
