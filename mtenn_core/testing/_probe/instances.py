"""Instances of a combination to check: one with numbers, and copies."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
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


def independent_copy(combination: Combination) -> Combination:
    """Return a copy that shares no parameter, buffer or module with the original.

    This is ``copy.deepcopy``, unless a ``__deepcopy__`` of the combination, or of a module in it,
    returns an object that the original uses, too. A check moves its copy to another dtype and
    device.
    """
    made: Combination = copy.deepcopy(combination)
    for param in made.parameters():
        if not param.is_leaf:  # a copy of a TorchScript module has the original in its graph
            param.detach_().requires_grad_()
    if not shares_with(made, combination):
        return made
    # deepcopy looks into this dict first, so it asks no parameter, buffer or module for a copy.
    memo: dict[int, Any] = {}
    for tensor in (*combination.parameters(), *combination.buffers()):
        memo[id(tensor)] = _copied_tensor(tensor)
    copies = {module: object.__new__(type(module)) for module in combination.modules()}
    memo |= {id(module): new for module, new in copies.items()}
    for module, new in copies.items():
        # torch's __setattr__ needs the attributes that are set here.
        new.__dict__.update(copy.deepcopy(vars(module), memo))
    return cast(Combination, copies[combination])


def shares_with(one: Combination, other: Combination) -> bool:
    """Return True if two combinations have a module, parameter or buffer in common, or memory."""
    return not _parts(one).isdisjoint(_parts(other))


def _parts(combination: Combination) -> set[tuple[str, int]]:
    tensors = [*combination.parameters(), *combination.buffers()]
    parts = {("object", id(part)) for part in (*combination.modules(), *tensors)}
    memory = {("memory", tensor.untyped_storage().data_ptr()) for tensor in tensors}
    return parts | memory - {("memory", 0)}  # tensors without elements


def _copied_tensor(tensor: Tensor) -> Tensor:
    numbers = tensor.detach().clone()
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(numbers, tensor.requires_grad)
    return numbers


def _without_numbers(combination: Combination) -> list[str]:
    """Return the names of parameters, buffers and attributes without numbers."""
    return [name for name, tensor in _tensors(combination) if not has_numbers(tensor)]


def _tensors(combination: Combination) -> list[tuple[str, Tensor]]:
    named = [*combination.named_parameters(), *combination.named_buffers()]
    for module in combination.modules():
        attributes = {k: v for k, v in vars(module).items() if not k.startswith("_")}
        named += [([*attributes][i], t) for i, t in tensors_in([*attributes.values()])]
    return named


def own_parameter(combination: Combination, name: str) -> torch.nn.Parameter:
    """Return a parameter of a combination.

    ``get_parameter`` raises an error for a parameter of a TorchScript module.
    """
    return dict(combination.named_parameters())[name]
