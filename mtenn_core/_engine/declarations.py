"""The methods, facts and arguments that a combination class declares."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, get_args

import torch

from mtenn_core._engine.columns import ANY, are_columns
from mtenn_core.combination import Combination, InputKind
from mtenn_core.errors import CombinationContractError

KINDS: tuple[InputKind, ...] = get_args(InputKind)
# Other words for these kinds.
_OTHER_WORDS: dict[str, InputKind] = {"float": "real", "number": "real", "integer": "label"}
_OTHER_WORDS |= {"int": "label", "index": "label", "category": "label"}


def overrides(combination: type[Combination], method: str) -> bool:
    """Return whether a class overrides a method of :class:`Combination`."""
    return getattr(combination, method) is not getattr(Combination, method)


def constructor_signature(combination: type[torch.nn.Module]) -> inspect.Signature:
    """Return the signature of ``__init__``, without ``self``.

    ``inspect.signature(combination)`` returns the same, see
    ``mtenn_core.combination._ConstructorSignature``.
    """
    if combination.__init__ is torch.nn.Module.__init__ and not combination.call_super_init:
        return inspect.Signature()  # it says *args, **kwargs, but raises an error for any argument
    signature = inspect.signature(combination.__init__)
    _, *parameters = signature.parameters.values()
    return signature.replace(parameters=parameters)


def constructor_arguments(combination: Combination, *, defaults: bool = False) -> dict[str, Any]:
    """Return, by name, the constructor arguments of a combination.

    Parameters
    ----------
    defaults : include arguments that were not given
    """
    try:
        args, kwargs = combination.__dict__["_arguments"]
        bound = constructor_signature(type(combination)).bind(*args, **kwargs)
    except (KeyError, TypeError, ValueError):  # made without __new__, or with an odd signature
        return {}
    if defaults:
        bound.apply_defaults()
    arguments = dict(bound.arguments)
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name, {})
        elif parameter.kind is parameter.VAR_POSITIONAL and not arguments.get(name):
            arguments.pop(name, None)
    return arguments


def check_argument_names(
    cls: type[torch.nn.Module], given: Iterable[str], advice: str = ""
) -> None:
    """Raise a TypeError for the first name that is no argument of a constructor.

    Python's own message has no list of the arguments, and does not see that 'kt' means 'kT'.

    Parameters
    ----------
    advice : is added if the name is similar to none of the arguments
    """
    parameters = constructor_signature(cls).parameters
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return
    for name in given:
        if name not in parameters:
            meant = closest(name, parameters)
            hint = f" Did you mean {meant!r}?" if meant else advice
            raise TypeError(
                f"{cls.__name__} got an unexpected keyword argument {name!r}.{hint} Its arguments"
                f" are: {listed_arguments(parameters)}"
            )


def listed_arguments(parameters: Mapping[str, inspect.Parameter]) -> str:
    """Return the arguments of a constructor with their defaults, for messages."""
    shown = [str(each.replace(annotation=each.empty)) for each in parameters.values()]
    return ", ".join(shown) or "none"


def closest(name: str, candidates: Iterable[str]) -> str:
    """Return the candidate that was probably meant, in any case of its letters, or ""."""
    by_lower_case = {candidate.lower(): candidate for candidate in candidates}
    close = get_close_matches(name.lower(), by_lower_case, n=1)
    return by_lower_case[close[0]] if close else ""


def checked_instance(found: Any, rule: str) -> Combination:
    """Return a combination. Raise a TypeError with the ``rule`` for a class or anything else."""
    if isinstance(found, Combination):
        return found
    hint = ""
    if isinstance(found, type) and issubclass(found, Combination):
        required = [
            name
            for name, each in constructor_signature(found).parameters.items()
            if each.default is each.empty
            and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
        ]
        arguments = ", ".join(f"{name}=…" for name in required)
        hint = f". Pass an instance: {found.__name__}({arguments})"
    elif isinstance(found, str):
        hint = f". For a name, write registry.create({found!r})"
    raise TypeError(f"{rule}; found {found!r}{hint}")


def call_arguments(
    combination: type[Combination], values: Mapping[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """Return positional and keyword arguments that give a constructor these values.

    Parameters
    ----------
    values : by name, as :func:`constructor_arguments` returns them. A missing one has its default.
    """
    parameters = constructor_signature(combination).parameters.values()
    kinds = inspect.Parameter
    rest = next((p.name for p in parameters if p.kind is kinds.VAR_POSITIONAL), None)
    # Behind *args there is no other way to give the arguments before them.
    by_position = {kinds.POSITIONAL_ONLY} | (
        {kinds.POSITIONAL_OR_KEYWORD} if rest in values else set()
    )
    args: list[Any] = []
    keywords = dict(values)
    for parameter in parameters:
        if parameter.kind in by_position:
            args.append(keywords.pop(parameter.name, parameter.default))
    if rest in keywords:
        args += keywords.pop(rest)
    return args, keywords


def check_facts(combination: Combination) -> None:
    """Raise a :class:`~mtenn_core.errors.CombinationContractError` for an impossible fact."""
    fewest, domain, properties = combination.min_poses, combination.domain, combination.properties
    columns = combination.pose_columns
    rules = (
        ("min_poses", "an int above 0", isinstance(fewest, int) and fewest > 0),
        ("domain", "(low, high) with low < high", _is_interval(domain)),
        ("properties", "a set of names", isinstance(properties, frozenset | set)),
        (
            "pose_inputs",
            "a tuple of names, or a dict from names to kinds",
            _are_names(combination.pose_inputs),
        ),
        (
            "pose_columns",
            'None, a whole number above 0, a tuple of different names or "any"',
            columns is None or are_columns(columns) or str(columns) == ANY,
        ),
    )
    for fact, rule, holds in rules:
        if not holds:
            raise CombinationContractError(
                f"{type(combination).__name__}.{fact} must be {rule};"
                f" found {getattr(combination, fact)!r}"
            )
    for name, kind in declared_kinds(combination).items():
        if kind not in KINDS:
            raise CombinationContractError(
                f"{type(combination).__name__}.pose_inputs[{name!r}] must be the kind of the input,"
                f" one of {', '.join(map(repr, KINDS))}; found {kind!r}{_closest_kind(kind)}"
            )
    if columns is not None and overrides(type(combination), "forward"):
        raise CombinationContractError(
            f"{type(combination).__name__} overrides forward, whose pose predictions have one"
            f" number each; found pose_columns = {columns!r}. Write combine(predictions) instead."
        )


def declared_kinds(combination: Combination) -> Mapping[str, InputKind]:
    """Return the declared kind of each pose input; empty if only their names are declared."""
    found = combination.pose_inputs
    return found if isinstance(found, Mapping) else {}


def _closest_kind(found: Any) -> str:
    """Return a question with the kind that was probably meant, or ""."""
    close: str = closest(str(found), [*KINDS, *_OTHER_WORDS])
    return f". Did you mean {_OTHER_WORDS.get(close, close)!r}?" if close else ""


def _is_interval(found: Any) -> bool:
    try:
        low, high = found
        return bool(low < high)
    except (TypeError, ValueError):
        return False


def _are_names(found: Any) -> bool:
    is_collection = isinstance(found, tuple | Mapping)
    return is_collection and all(isinstance(n, str) and n.isidentifier() for n in found)
