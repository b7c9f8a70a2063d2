"""A snapshot of all plugins: installed and registered records, and their names."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from mtenn_core._registry.installed import MISSPELT, Scan
from mtenn_core._registry.messages import suggestion
from mtenn_core._registry.policy import Policy
from mtenn_core._registry.record import PluginRecord, Problem, canonical
from mtenn_core.errors import (
    CombinationConflictError,
    CombinationDisabledError,
    CombinationNotFoundError,
    PluginPinError,
    RegistryError,
)


@dataclass(frozen=True)
class Snapshot:
    """All plugins at one time. A snapshot never changes, so threads read it without a lock.

    Attributes
    ----------
    scan : the installed plugins
    policy : the resolved policy
    records : all plugins with their status, sorted
    available : the plugins that can be looked up. The keys are canonical names
    """

    scan: Scan
    policy: Policy
    records: tuple[PluginRecord, ...]
    available: Mapping[str, tuple[PluginRecord, ...]]

    @classmethod
    def build(
        cls,
        scan: Scan,
        policy: Policy,
        registered: Iterable[PluginRecord],
        replaced: Collection[str],
    ) -> Snapshot:
        """Combine installed plugins with registered ones.

        Parameters
        ----------
        replaced : canonical names for which installed plugins are not available
        """
        installed = [_with_status(record, policy) for record in scan.records]
        records = sorted([*installed, *registered], key=PluginRecord.sort_key)
        available: dict[str, tuple[PluginRecord, ...]] = {}
        for record in records:
            is_replaced = record.distribution and record.key in replaced
            if record.status == "available" and not is_replaced:
                available[record.key] = (*available.get(record.key, ()), record)
        return cls(scan, policy, tuple(records), available)

    def available_records(self) -> list[PluginRecord]:
        """Return the plugins that can be looked up, sorted by name."""
        return list(itertools.chain(*self.available.values()))

    def without_pins(self) -> Snapshot:
        """Return the same plugins with a policy that has no pins."""
        return replace(self, policy=replace(self.policy, pins=None))

    def names(self) -> list[str]:
        """Return the sorted names of the plugins that can be looked up."""
        return [records[0].name for records in self.available.values()]

    def find(self, name: str) -> list[PluginRecord]:
        """Return the plugins that match ``name``. A valid name matches exactly one."""
        found = list(self.policy.preferred(self.available.get(canonical(name), ())))
        distribution, colon, bare_name = name.rpartition(":")
        if found or not colon:
            return found
        owner, key = canonical(distribution), canonical(bare_name)
        owned = [
            record
            for record in self.records
            if record.status == "available" and (record.owner, record.key) == (owner, key)
        ]
        # Two names of one distribution may have the same canonical name.
        return [record for record in owned if record.name == bare_name] or owned

    def lookup_error(self, name: str, group: str) -> RegistryError:
        """Return the error for a name that matches no plugin or several plugins."""
        if found := self.find(name):
            return CombinationConflictError(_conflict(name, found), record=found[0])
        by_status = {record.status: record for record in self.records if record.matches(name)}
        if record := by_status.get("disabled"):
            text = f"{record}{record.where} is disabled: {record.reason}. Change this setting to"
            return CombinationDisabledError(f"{text} allow it", record=record)
        if record := by_status.get("shadowed"):
            text = f"{record}{record.where} cannot be reached: {record.reason}"
            return CombinationNotFoundError(text, record=record)
        misspelt = [p.message for p in self.scan.problems if p.kind == MISSPELT]
        if not self.available:
            end = ". ".join(misspelt) or "Install one with pip"
            return CombinationNotFoundError(
                f"unknown combination {name!r}: no plugin is installed in {sys.prefix}, because no"
                f" distribution has an entry point in the group {group!r}. {end}"
            )
        names, qualified = self.names(), [record.qualified_name for record in self.records]
        hint = " Some plugins have problems: see `mtenn doctor`." if self.scan.problems else ""
        return CombinationNotFoundError(
            f"unknown combination {name!r}; installed: {', '.join(names)}."
            f"{suggestion(name, names) or suggestion(name, qualified)}"
            f"{''.join(f' {message}.' for message in misspelt)}{hint}"
        )

    def problems(self) -> Iterator[Problem]:
        """Yield all problems that can be found without importing a plugin."""
        yield from self.scan.problems
        for text in self.policy.unknown(self.records):
            yield Problem("unknown setting", text)
        for name, records in self.available.items():
            if len(self.policy.preferred(records)) > 1:
                yield Problem("conflict", _conflict(name, records), records[0])
        yield from self._distribution_problems()

    def _distribution_problems(self) -> Iterator[Problem]:
        policy = self.policy
        if policy.pins is not None:
            from mtenn_core._registry.pins import read_pins

            try:
                read_pins(policy.pins)
            except PluginPinError as error:  # report it once, and not for each plugin
                yield Problem.of(error)
                policy = replace(policy, pins=None)
        checked = set()
        for record in self.available_records():
            if record.distribution is None:
                continue
            try:
                if record.metadata not in checked:  # a distribution may have a thousand plugins
                    checked.add(record.metadata)
                    policy.check_distribution(record)
                record.parsed_target()
            except RegistryError as error:
                yield Problem.of(error)

    def check_strictly(self) -> None:
        """Raise an error if there is a problem. Only a success is cached.

        Raises
        ------
        RegistryError : there are problems
        """
        _ = self._has_no_problems

    @cached_property
    def _has_no_problems(self) -> bool:
        problems = list(self.problems())
        if problems:  # an error is not cached, because the user may repair a file at any time
            raise RegistryError(
                f"the policy is strict (MTENN_STRICT), and plugins have {len(problems)}"
                " problem(s):\n" + "\n".join(f"- {problem.message}" for problem in problems),
                record=problems[0].record,
            )
        return True


def _with_status(record: PluginRecord, policy: Policy) -> PluginRecord:
    reason = policy.reason_against(record)
    if record.status == "shadowed" or not reason:
        return record
    return replace(record, status="disabled", reason=reason)


def _conflict(name: str, candidates: Sequence[PluginRecord]) -> str:
    offers = [f"{r.qualified_name!r} ({r.origin}, {r.target}{r.where})" for r in candidates]
    return (
        f"combination {name!r} is offered by {len(candidates)} plugins: {', '.join(offers)}."
        f" {_conflict_remedy(name, candidates)}"
    )


def _conflict_remedy(name: str, candidates: Sequence[PluginRecord]) -> str:
    installed = [record for record in candidates if record.distribution]
    qualified = installed[0].qualified_name
    if len({(record.owner, record.name) for record in candidates}) < len(candidates):
        return f"No name distinguishes them. Tell the author of {installed[0].distribution}"
    if len(installed) < len(candidates):
        return (
            f"Ask for {qualified!r}, or remove the combination that this process registered:"
            f" registry.unregister({name!r})"
        )
    return (
        "Ask for one of these names, disable or uninstall all but one, or prefer one:"
        f" registry.policy = Policy(prefer=({qualified!r},))"
    )
