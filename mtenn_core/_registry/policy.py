"""Which plugins may be imported: what the user says by arguments or in the environment."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mtenn_core import __version__
from mtenn_core._registry.record import PluginRecord, canonical, told
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
    """Which of the installed plugins a registry may import; it acts before any import.

    An entry is a combination's name, a distribution, or ``distribution:name``. What is None is read
    from the environment. What is registered by a call is always allowed.

    Attributes
    ----------
    allowed : entries that may be imported, all others may not; ``MTENN_PLUGINS``, all if unset
    disabled : entries that may not, even if they are allowed; ``MTENN_DISABLE_PLUGINS``
    strict : whether a problem with any plugin is an error; ``MTENN_STRICT``
    prefer : entries that are taken where several distributions have one name
    pins : file of the distributions that may be imported, each with its version and the hash of its
        files; ``MTENN_PINS``
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
                raise TypeError(f"{field} takes several entries: {field}=({entries!r},)")
            if entries is not None:
                object.__setattr__(self, field, tuple(entries))

    def resolved(self) -> Policy:
        """Return the policy with what the environment says.

        Raises
        ------
        RegistryError : ``MTENN_STRICT`` is neither yes nor no, or ``MTENN_PINS`` is empty
        """
        return replace(
            self,
            allowed=_entries(ALLOWED) if self.allowed is None else self.allowed,
            disabled=_entries(DISABLED) or () if self.disabled is None else self.disabled,
            strict=_boolean(STRICT) if self.strict is None else self.strict,
            pins=_pins_file() if self.pins is None else Path(self.pins),
        )

    def reason_against(self, record: PluginRecord) -> str:
        """Return why an installed plugin may not be imported, or nothing; of a resolved policy."""
        if any(map(record.matches, self.disabled or ())):
            return f"{self._source('disabled', DISABLED)} names it"
        if self.allowed is not None and not any(map(record.matches, self.allowed)):
            return f"{self._source('allowed', ALLOWED)} does not name it"
        return ""

    def check(self, record: PluginRecord) -> None:
        """Check what can be known of a plugin before its code runs; of a resolved policy.

        Raises
        ------
        PluginIncompatibleError, PluginPinError, PluginLoadError : the last of a malformed target
        """
        if record.distribution is not None:
            self.check_distribution(record)
            record.parsed_target()

    def check_distribution(self, record: PluginRecord) -> None:
        """Check what is the same for all plugins of a distribution.

        Raises
        ------
        PluginIncompatibleError, PluginPinError
        """
        _check_compatible(record)
        if self.pins is not None:
            from mtenn_core._registry.pins import check_pin

            check_pin(record, self.pins)

    def preferred(self, candidates: Sequence[PluginRecord]) -> Sequence[PluginRecord]:
        """Return those of several plugins with one name that are preferred, if any is."""
        chosen = [record for record in candidates if any(map(record.matches, self.prefer))]
        return chosen or candidates

    def unknown(self, records: Iterable[PluginRecord]) -> list[str]:
        """Return, for each entry that means no plugin, what to say of it; of a resolved policy."""
        sources = {
            self._source("allowed", ALLOWED): self.allowed or (),
            self._source("disabled", DISABLED): self.disabled or (),
            "prefer": self.prefer,
        }
        if not any(sources.values()):
            return []
        known = {word for record in records for word in record.words}
        return [
            f"{source} names {entry!r}, and no plugin or distribution is called so."
            + closest(entry, sorted(known))
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
    except Exception as error:  # of the parser, in several kinds
        raise PluginIncompatibleError(
            f"{record}{record.where}: what it requires cannot be read"
            f" ({told(error).splitlines()[0]}); {record.remedy}",
            record=record,
        ) from error
    if not SpecifierSet(specifier).contains(__version__, prereleases=True):
        raise PluginIncompatibleError(
            f"{record}{record.where} requires mtenn-core{specifier}; found mtenn-core"
            f" {__version__}; update one of them: pip install --upgrade {record.distribution}"
            " mtenn-core",
            record=record,
        )


def closest(name: str, known: Iterable[str]) -> str:
    """Return a question with the name that looks most like ``name``, or nothing."""
    import difflib  # not for those who ask for what is there

    by_key = {canonical(each): each for each in known}
    close = difflib.get_close_matches(canonical(name), by_key, n=1)
    return f" Did you mean {by_key[close[0]]!r}?" if close else ""


def _entries(variable: str) -> tuple[str, ...] | None:
    value = os.environ.get(variable)
    return None if value is None else tuple(value.replace(",", " ").split())


def _pins_file() -> Path | None:
    value = os.environ.get(PINS)
    if value is not None and not value.strip():  # a guard that is off without a word is none
        raise RegistryError(f"{PINS} is empty: name a file, or unset it")
    return None if value is None else Path(value)


def _boolean(variable: str) -> bool:
    value = os.environ.get(variable, "")
    try:
        return _BOOLEANS[value.strip().lower()]
    except KeyError:
        raise RegistryError(f"{variable} is 1 or 0; found {value!r}") from None
