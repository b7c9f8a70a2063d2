"""What is known of a plugin before it is imported, and what may be wrong with it."""

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

# Extras behind it are allowed, and mean nothing any more.
_TARGET = re.compile(r"(?P<module>[\w.]+)(\s*:\s*(?P<attribute>[\w.]+))?(\s*\[.*\])?")
_LONGEST = 500  # of what a message quotes
Status = Literal["available", "disabled", "shadowed"]


def canonical(name: str) -> str:
    """Return a name as names are compared (PEP 503): in lower case, ``-``, ``_`` and ``.`` as one.

    ``packaging.utils`` has the same function, and takes longer to import than a scan does.
    """
    return re.sub(r"[-_.]+", "-", name).lower()


def told(error: BaseException) -> str:
    """Return the type of an error and what it says, if it can say it."""
    try:
        text = str(error)
    except Exception:
        text = "(it cannot be printed)"
    return f"{type(error).__name__}: {_cut(text)}"


def shown(value: object) -> str:
    """Return the ``repr`` of what a plugin has made, cut, or the type of what has none."""
    try:
        return _cut(repr(value))
    except Exception:
        return f"a {type(value).__name__} that cannot be printed"


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


@dataclass(frozen=True)
class PluginRecord:
    """What is known of a combination plugin before it is imported.

    Attributes
    ----------
    name : the combination's name, which is the name of the entry point
    target : where it is, ``"module:attribute"``
    distribution, version, location : the package that offers it and its folder; None for a
        combination that was registered by a call
    metadata : the folder of the distribution's metadata, ``….dist-info`` as a rule
    requires : what the distribution requires of mtenn-core, as its metadata has it
    plugin : the object itself, where it was registered by a call
    status : ``"available"``; ``"disabled"`` by the :class:`~mtenn_core.Policy`; or ``"shadowed"``,
        there is another copy of the distribution, which an import finds first
    reason : why it is not available
    shadows : the other copies of its distribution, if any
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
        """The name as names are compared."""
        return canonical(self.name)

    @cached_property
    def owner(self) -> str:
        """The distribution's name as names are compared."""
        return canonical(self.distribution or "")

    @cached_property
    def words(self) -> tuple[str, ...]:
        """What an entry of a policy may call it, as names are compared."""
        if self.distribution is None:
            return (self.key,)
        return self.key, self.owner, f"{self.owner}:{self.key}"

    @property
    def qualified_name(self) -> str:
        """``distribution:name``, which no other distribution can share."""
        return f"{self.distribution}:{self.name}" if self.distribution else self.name

    @property
    def origin(self) -> str:
        """The distribution and its version."""
        if self.distribution is None:
            return "registered here"
        return f"{self.distribution} {self.version or '(no version)'}"

    @property
    def where(self) -> str:
        """The folder of the metadata, for a message; nothing if there is none."""
        return f" in {self.metadata}" if self.metadata else ""

    def parsed_target(self) -> tuple[str, str]:
        """Return module and attribute; a target may have no attribute.

        Raises
        ------
        PluginLoadError : the target is malformed
        """
        match = _TARGET.fullmatch(self.target.strip())
        if match is None:
            raise PluginLoadError(
                f"{self}{self.where}: its entry point must read 'module:attribute'; found"
                f" {self.target!r}; {self.remedy}",
                record=self,
            )
        return match["module"], match["attribute"] or ""

    @property
    def requires_core(self) -> str:
        """The version specifier that the distribution sets on mtenn-core.

        Raises
        ------
        whatever ``packaging`` raises of what is no requirement
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
        """What to do where the plugin does not work."""
        if self.distribution is None:
            return "register another class"
        if self.shadows:
            return (
                f"{self.metadata} hides {' and '.join(self.shadows)}: if it is the stale one of"
                " them, delete it"
            )
        return f"repair it, or remove it with: pip uninstall {self.distribution}"

    def sort_key(self) -> tuple[str, ...]:
        """Return what records are sorted by: nothing of it depends on the order of folders."""
        return self.key, self.qualified_name, self.target, self.metadata or ""

    def matches(self, entry: str) -> bool:
        """Whether an entry of a policy means this plugin.

        Parameters
        ----------
        entry : a name, a distribution, or ``distribution:name``
        """
        return canonical(entry) in self.words

    def to_json(self) -> dict[str, Any]:
        """Return all but the object as JSON knows it."""
        facts = "name", "target", "distribution", "version", "location", "metadata"
        plain: dict[str, Any] = {fact: getattr(self, fact) for fact in facts}
        rest = {"requires": list(self.requires), "status": self.status, "reason": self.reason}
        return plain | rest

    def __str__(self) -> str:
        return f"plugin {self.name!r} ({self.origin})"


@dataclass(frozen=True)
class Problem:
    """Something that is wrong with an installed plugin, or with a setting.

    Attributes
    ----------
    kind : in a word or two
    message : who, what was found, and what to do
    record : the plugin, if it is about one
    """

    kind: str
    message: str
    record: PluginRecord | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, error: RegistryError) -> Problem:
        """Return the problem that an error is about."""
        kinds = {
            PluginIncompatibleError: "incompatible",
            PluginPinError: "not pinned",
            PluginLoadError: "does not load",
            PluginSpecError: "no combination",
        }
        return cls(kinds.get(type(error), "error"), str(error), error.record)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON knows it."""
        record = self.record and self.record.to_json()
        return {"kind": self.kind, "message": self.message, "plugin": record}
