"""Instances of a combination to check: one with numbers, and copies."""

from __future__ import annotations

import copy

from torch import Tensor

from mtenn_core._engine.tensor_search import tensors_in
from mtenn_core._process.settings import preserved_process_state
from mtenn_core._process.torch_modes import has_numbers
from mtenn_core.combination import Combination


def made_again(combination: Combination) -> Combination:
    """Return a new instance with the same arguments, or the given one if that does not work.

    Random states are preserved.
    """
    try:
        args, kwargs = copy.deepcopy(vars(combination)["_arguments"])
        with preserved_process_state():
            return type(combination)(*args, **kwargs)
    except Exception:  # for example, because an argument cannot be copied
        return combination


def with_numbers(combination: Combination) -> Combination:
    """Return the combination, or a new instance if tensors of the given one have no numbers.

    An instance that was made under ``torch.device("meta")`` or in a ``FakeTensorMode`` has none.

    Raises
    ------
    ValueError : the new instance has no numbers either
    """
    if not _without_numbers(combination):
        return combination
    again = made_again(combination)
    names = _without_numbers(again)
    if names:
        raise ValueError(
            f"a check of {type(combination).__name__} needs numbers; found none in"
            f" {', '.join(names[:4])}, which is on the meta device, a fake tensor, or inside of a"
            " transform of torch.func. Make the combination, and tensors that are its arguments,"
            " without them"
        )
    return again


def _without_numbers(combination: Combination) -> list[str]:
    """Return the names of parameters, buffers and attributes without numbers."""
    return [name for name, tensor in _tensors(combination) if not has_numbers(tensor)]


def _tensors(combination: Combination) -> list[tuple[str, Tensor]]:
    named = [*combination.named_parameters(), *combination.named_buffers()]
    for module in combination.modules():
        attributes = {k: v for k, v in vars(module).items() if not k.startswith("_")}
        named += [([*attributes][i], t) for i, t in tensors_in([*attributes.values()])]
    return named
