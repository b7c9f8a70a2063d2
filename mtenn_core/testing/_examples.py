"""The combinations that tests are made for, and what they are called there."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from mtenn_core._engine.declarations import constructor_arguments
from mtenn_core.combination import Combination
from mtenn_core.errors import CombinationContractError

Source = Combination | Callable[..., Combination]


@dataclass(frozen=True)
class Case:
    """A combination to test.

    Attributes
    ----------
    source : an instance, or what makes one
    arguments : for what makes it
    label : who it is, in the name of a test
    """

    source: Source
    arguments: Mapping[str, Any]
    label: str

    def __str__(self) -> str:
        return self.label

    @property
    def maker(self) -> Source:
        """The instance, or a function without arguments that makes it."""
        if isinstance(self.source, Combination):
            return self.source
        return partial(self.source, **self.arguments)


def cases_of(sources: Iterable[Source]) -> list[Case]:
    """Return what there is to test, each with a label of its own: all examples of a class.

    Raises
    ------
    CombinationContractError : a class declares examples that are none
    """
    times: Counter[str] = Counter()
    cases = []
    for source in sources:
        for arguments in _examples(source):
            label = _label(source, arguments)
            times[label] += 1
            again = f"#{times[label]}" if times[label] > 1 else ""
            cases.append(Case(source, arguments, label + again))
    return cases


def _examples(source: Source) -> Sequence[Mapping[str, Any]]:
    if isinstance(source, Combination):
        return [constructor_arguments(source)]
    examples: Any = getattr(source, "examples", None) or ({},)
    if not (isinstance(examples, list | tuple) and all(isinstance(e, Mapping) for e in examples)):
        raise CombinationContractError(
            f"{_name(source)}.examples must be a tuple of dicts, examples = ({{'name': value}},);"
            f" found {examples!r}"
        )
    return examples


def _label(source: Any, arguments: Mapping[str, Any]) -> str:
    while isinstance(source, partial):
        source, arguments = source.func, source.keywords | arguments
    given = ", ".join(f"{name}={_shown(value)}" for name, value in arguments.items())
    return f"{_name(source)}({given})" if given else _name(source)


def _name(source: Source) -> str:
    named = type(source) if isinstance(source, Combination) else source
    return getattr(named, "__name__", type(source).__name__)


def _shown(value: Any) -> str:
    """Return an argument for the name of a test: one line, and the same in every process."""
    text = repr(value)
    return text if re.fullmatch(r"(?!.* at 0x).{0,40}", text) else type(value).__name__
