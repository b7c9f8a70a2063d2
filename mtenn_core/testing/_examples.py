"""The instances of a combination to test: their arguments, and their labels in test names."""

from __future__ import annotations

import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from mtenn_core._engine.declarations import constructor_arguments
from mtenn_core._process.printable import value_text
from mtenn_core.combination import Combination
from mtenn_core.errors import CombinationContractError

Source = Combination | Callable[..., Combination]


@dataclass(frozen=True)
class Case:
    """A combination to test.

    Attributes
    ----------
    source : an instance, a class, or a function that makes an instance
    arguments : the arguments for a class or function
    label : text for the combination in the names of its tests
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
    """Return a case for each instance and for each example of a class. Labels are unique.

    Raises
    ------
    CombinationContractError : the ``examples`` of a class are malformed
    """
    counts: Counter[str] = Counter()
    cases = []
    for source in sources:
        for arguments in _arguments(source):
            label = _label(source, arguments)
            counts[label] += 1
            suffix = f"#{counts[label]}" if counts[label] > 1 else ""
            cases.append(Case(source, arguments, label + suffix))
    return cases


def declared_examples(source: Callable[..., Combination]) -> Sequence[Mapping[str, Any]]:
    """Return the ``examples`` of a class, or ``({},)`` for a function without ``examples``.

    Raises
    ------
    CombinationContractError : ``examples`` is not a nonempty tuple of dicts
    """
    examples: Any = getattr(source, "examples", ({},))
    is_sequence = isinstance(examples, list | tuple) and len(examples) > 0
    if not (is_sequence and all(isinstance(example, Mapping) for example in examples)):
        raise CombinationContractError(
            f"{_name(source)}.examples must be a tuple of at least one dict of constructor"
            f" arguments; found {reprlib.repr(examples)}. Write: examples = ({{'name': value}},)"
        )
    return examples


def _arguments(source: Source) -> Sequence[Mapping[str, Any]]:
    if isinstance(source, Combination):
        return [constructor_arguments(source)]
    return declared_examples(source)


def _label(source: Any, arguments: Mapping[str, Any]) -> str:
    while isinstance(source, partial):
        source, arguments = source.func, source.keywords | arguments
    given = ", ".join(f"{name}={_short_repr(value)}" for name, value in arguments.items())
    return f"{_name(source)}({given})" if given else _name(source)


def _name(source: Source) -> str:
    named = type(source) if isinstance(source, Combination) else source
    return getattr(named, "__name__", type(source).__name__)


def _short_repr(value: Any) -> str:
    """Return an argument as text for the name of a test.

    The text is one short line, and it is the same in every process.
    """
    text = value_text(value)
    return text if re.fullmatch(r"(?!.* at 0x).{0,40}", text) else type(value).__name__
