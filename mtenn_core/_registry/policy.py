"""Policies: the user's rules for which plugins may be imported."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mtenn_core import __version__
from mtenn_core._registry.messages import describe_error, suggestion
from mtenn_core._registry.record import PluginRecord, canonical
from mtenn_core.errors import PluginIncompatibleError, RegistryError

ALLOWED = "MTENN_PLUGINS"
DISABLED = "MTENN_DISABLE_PLUGINS"
STRICT = "MTENN_STRICT"
PINS = "MTENN_PINS"
_BOOLEANS = {
    **dict.fromkeys(("1", "true", "yes", "on"), True),
    **dict.fromkeys(("0", "false", "no", "off", ""), False),
}


@dataclass(frozen=True)
class Policy:
    """Rules for which installed plugins a registry may import. They apply before any import.

    An entry is a combination's name, a distribution, or ``distribution:name``. If a rule is None,
    its environment variable replaces it. Combinations that a program registers are always allowed.

    Attributes
    ----------
    allowed : the only entries that may be imported. Its variable is ``MTENN_PLUGINS``. If neither
        the rule nor the variable is set, all entries are allowed
    disabled : entries that must not be imported, even if they are allowed. Its variable is
        ``MTENN_DISABLE_PLUGINS``
    strict : True to raise an error if there is a problem with any plugin. Its variable is
        ``MTENN_STRICT``
    prefer : entries to choose if several distributions have the same name
    pins : a file that lists the distributions that may be imported, each with its version and a
        hash of its files. Its variable is ``MTENN_PINS``
    """

    allowed: tuple[str, ...] | None = None
    disabled: tuple[str, ...] | None = None
    strict: bool | None = None
    prefer: tuple[str, ...] = ()
    pins: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        for field in ("allowed", "disabled", "prefer"):
            entries = getattr(self, field)
            if isinstance(entries, str):
                raise TypeError(
                    f"{field} must be a tuple of entries; found {entries!r}. Write:"
                    f" {field}=({entries!r},)"
                )
            if entries is not None:
                object.__setattr__(self, field, tuple(entries))

    def resolved(self) -> Policy:
        """Return a policy in which environment variables have replaced each rule of None.

        Raises
        ------
        RegistryError : ``MTENN_STRICT`` is not a boolean, or ``MTENN_PINS`` is empty
        """
        return replace(
            self,
            allowed=_entries(ALLOWED) if self.allowed is None else self.allowed,
            disabled=_entries(DISABLED) or () if self.disabled is None else self.disabled,
            strict=_boolean(STRICT) if self.strict is None else self.strict,
            pins=_pins_file() if self.pins is None else Path(self.pins),
        )

    def reason_against(self, record: PluginRecord) -> str:
        """Return the reason why a resolved policy disables a plugin, or "" if it does not."""
        if any(map(record.matches, self.disabled or ())):
            return f"{self._source('disabled', DISABLED)} contains it"
        if self.allowed is not None and not any(map(record.matches, self.allowed)):
            return f"{self._source('allowed', ALLOWED)} does not contain it"
        return ""

    def check(self, record: PluginRecord) -> None:
        """Check that a resolved policy allows a plugin, before its code runs.

        Raises
        ------
        PluginIncompatibleError : the distribution requires another version of mtenn-core
        PluginPinError : the distribution is not pinned
        PluginLoadError : the entry point is malformed
        """
        if record.distribution is not None:
            self.check_distribution(record)
            record.parsed_target()

    def check_distribution(self, record: PluginRecord) -> None:
        """Check the distribution of a plugin. All its plugins have the same result.

        Raises
        ------
        PluginIncompatibleError, PluginPinError : see :meth:`check`
        """
        _check_compatible(record)
        if self.pins is not None:
            from mtenn_core._registry.pins import check_pin

            check_pin(record, self.pins)

    def preferred(self, candidates: Sequence[PluginRecord]) -> Sequence[PluginRecord]:
        """Return the preferred plugins among ``candidates``, or all if none is preferred."""
        preferred = [record for record in candidates if any(map(record.matches, self.prefer))]
        return preferred or candidates

    def unknown(self, records: Iterable[PluginRecord]) -> list[str]:
        """Return a message for each entry of a resolved policy that matches no plugin."""
        sources = {
            self._source("allowed", ALLOWED): self.allowed or (),
            self._source("disabled", DISABLED): self.disabled or (),
            "the policy's `prefer`": self.prefer,
        }
        if not any(sources.values()):
            return []
        known = {word for record in records for word in record.words}
        return [
            f"{source} contains {entry!r}, which matches no plugin or distribution."
            + suggestion(entry, sorted(known))
            for source, entries in sources.items()
            for entry in entries
            if canonical(entry) not in known
        ]

    def _source(self, field: str, variable: str) -> str:
        value = os.environ.get(variable)
        if value is not None and getattr(self, field) == _entries(variable):
            return f"{variable}={value}"
        return f"the policy's `{field}`"


def _check_compatible(record: PluginRecord) -> None:
    if not record.requires:
        return
    from packaging.specifiers import SpecifierSet

    try:
        specifier = record.requires_core
    except Exception as error:  # the parser raises several types of errors
        raise PluginIncompatibleError(
            f"{record}{record.where}: its requirement on mtenn-core cannot be parsed"
            f" ({describe_error(error).splitlines()[0]}). {record.remedy}",
            record=record,
        ) from error
    if not SpecifierSet(specifier).contains(__version__, prereleases=True):
        raise PluginIncompatibleError(
            f"{record}{record.where} requires mtenn-core{specifier}; found mtenn-core"
            f" {__version__}. Update one of them: pip install --upgrade {record.distribution}"
            " mtenn-core",
            record=record,
        )


def _entries(variable: str) -> tuple[str, ...] | None:
    value = os.environ.get(variable)
    return None if value is None else tuple(value.replace(",", " ").split())


def _pins_file() -> Path | None:
    value = os.environ.get(PINS)
    if value is not None and not value.strip():  # an empty value must not allow all plugins
        raise RegistryError(f"{PINS} must name a file; found an empty value. Set or unset it")
    return None if value is None else Path(value)


def _boolean(variable: str) -> bool:
    value = os.environ.get(variable, "")
    try:
        return _BOOLEANS[value.strip().lower()]
    except KeyError:
        raise RegistryError(f"{variable} must be 1 or 0; found {value!r}") from None
