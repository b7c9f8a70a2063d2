"""What is known of all plugins at a time: who answers to a name, and what is wrong."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from mtenn_core._registry.installed import Scan
from mtenn_core._registry.policy import Policy, closest
from mtenn_core._registry.record import PluginRecord, Problem, canonical
from mtenn_core.errors import (
    CombinationConflictError,
    CombinationDisabledError,
    CombinationNotFoundError,
    PluginPinError,
    RegistryError,
)


@dataclass(frozen=True)
class Known:
    """What is known at a time; never changed, so that threads may read it without a lock.

    Attributes
    ----------
    scan : what is installed
    policy : which of it may be imported, the environment included
    records : all, sorted, with their status
    available : those that can be asked for, by their name as names are compared
    """

    scan: Scan
    policy: Policy
    records: tuple[PluginRecord, ...]
    available: Mapping[str, tuple[PluginRecord, ...]]

    @classmethod
    def of(
        cls,
        scan: Scan,
        policy: Policy,
        registered: Iterable[PluginRecord],
        replaced: Collection[str],
    ) -> Known:
        """Put together what is installed and what was registered by a call.

        Parameters
        ----------
        replaced : names, as names are compared, that what is installed does not answer to
        """
        installed = [_with_status(record, policy) for record in scan.records]
        records = sorted([*installed, *registered], key=PluginRecord.sort_key)
        available: dict[str, tuple[PluginRecord, ...]] = {}
        for record in records:
            hidden = record.distribution and record.key in replaced
            if record.status == "available" and not hidden:
                available[record.key] = (*available.get(record.key, ()), record)
        return cls(scan, policy, tuple(records), available)

    def names(self) -> list[str]:
        """Return the names that can be asked for, sorted."""
        return [found[0].name for found in self.available.values()]

    def named(self, name: str) -> list[PluginRecord]:
        """Return the plugins that may be meant by ``name``: one, if it is right."""
        found = list(self.policy.preferred(self.available.get(canonical(name), ())))
        distribution, colon, bare = name.rpartition(":")
        if found or not colon:
            return found
        owner, key = canonical(distribution), canonical(bare)
        owned = [
            record
            for record in self.records
            if record.status == "available" and (record.owner, record.key) == (owner, key)
        ]
        # Two names of one distribution may be the same but for case, '-', '_' and '.'.
        return [record for record in owned if record.name == bare] or owned

    def error(self, name: str, group: str) -> RegistryError:
        """Return what is wrong with a name to which no plugin answers, or several."""
        if found := self.named(name):
            return CombinationConflictError(_conflict(name, found), record=found[0])
        meant = {record.status: record for record in self.records if record.matches(name)}
        if record := meant.get("disabled"):
            text = f"{record}{record.where} is disabled: {record.reason}; to allow it, change that"
            return CombinationDisabledError(text, record=record)
        if record := meant.get("shadowed"):
            text = f"{record}{record.where} cannot be reached: {record.reason}"
            return CombinationNotFoundError(text, record=record)
        if not self.available:
            return CombinationNotFoundError(
                f"unknown combination {name!r}: no plugin is installed in {sys.prefix} (none has an"
                f" entry point of the group {group!r}); install one with pip"
            )
        names, qualified = self.names(), [record.qualified_name for record in self.records]
        more = " There are problems: see `mtenn doctor`." if self.scan.problems else ""
        return CombinationNotFoundError(
            f"unknown combination {name!r}; installed: {', '.join(names)}."
            f"{closest(name, names) or closest(name, qualified)}{more}"
        )

    def problems(self) -> Iterator[Problem]:
        """Yield what is wrong, as far as no import is needed."""
        yield from self.scan.problems
        for text in self.policy.unknown(self.records):
            yield Problem("unknown setting", text)
        for name, found in self.available.items():
            if len(self.policy.preferred(found)) > 1:
                yield Problem("conflict", _conflict(name, found), found[0])
        policy = self.policy
        if policy.pins is not None:
            from mtenn_core._registry.pins import read_pins

            try:
                read_pins(policy.pins)
            except PluginPinError as error:  # once, and not for each plugin
                yield Problem.of(error)
                policy = replace(policy, pins=None)
        distributions = set()
        for record in itertools.chain(*self.available.values()):
            if record.distribution is None:
                continue
            try:
                if record.metadata not in distributions:  # which may have a thousand names
                    distributions.add(record.metadata)
                    policy.check_distribution(record)
                record.parsed_target()
            except RegistryError as error:
                yield Problem.of(error)


def _with_status(record: PluginRecord, policy: Policy) -> PluginRecord:
    reason = policy.reason_against(record)
    if record.status == "shadowed" or not reason:
        return record
    return replace(record, status="disabled", reason=reason)


def _conflict(name: str, candidates: Sequence[PluginRecord]) -> str:
    shown = [f"{r.qualified_name!r} ({r.origin}, {r.target}{r.where})" for r in candidates]
    installed = [record for record in candidates if record.distribution]
    qualified = installed[0].qualified_name
    if len({(record.owner, record.name) for record in candidates}) < len(candidates):
        remedy = f"no name tells them apart: tell the author of {installed[0].distribution}"
    elif len(installed) < len(candidates):
        remedy = (
            f"ask for {qualified!r}, or take back what was registered in this process:"
            f" registry.unregister({name!r})"
        )
    else:
        remedy = (
            "ask for one of these, disable or uninstall all but one, or prefer one: registry.policy"
            f" = Policy(prefer=({qualified!r},))"
        )
    offers = f"combination {name!r} is offered by {len(candidates)} plugins"
    return f"{offers}: {', '.join(shown)}; {remedy}"
