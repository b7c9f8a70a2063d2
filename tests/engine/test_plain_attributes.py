"""The plain attributes of modules and parameters in a second run."""

import contextlib
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mtenn_core._engine.plain_attributes import PlainAttributes, attributes_kept, tensors_with_graph


class Owner(torch.nn.Module):
    """A module with a plain attribute."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)
        self.value = value


def _set(owner: Owner) -> None:
    owner.value = 5


def _add(owner: Owner) -> None:
    owner.more = 5


def _delete(owner: Owner) -> None:
    del owner.value


def _replace_tensor(owner: Owner) -> None:
    owner.value = owner.value + 1


# For each kind of change: the value before, and the change.
CHANGES: dict[str, tuple[Callable[[], Any], Callable[[Owner], Any]]] = {
    "number": (lambda: 3, _set),
    "new attribute": (lambda: 3, _add),
    "deleted attribute": (lambda: 3, _delete),
    "list": (lambda: [1, 2], lambda owner: owner.value.append(3)),
    "list, shorter": (lambda: [1, 2], lambda owner: owner.value.pop()),
    "list, entry": (lambda: [1, 2], lambda owner: owner.value.__setitem__(0, 7)),
    "list of lists": (lambda: [1, [2, [3]]], lambda owner: owner.value[1][1].append(4)),
    "dict": (lambda: {"a": 1}, lambda owner: owner.value.update(b=2)),
    "dict, value": (lambda: {"a": 1}, lambda owner: owner.value.update(a=2)),
    "dict, order": (
        lambda: OrderedDict(a=1, b=2),
        lambda owner: owner.value.move_to_end("a"),
    ),
    "list in dict": (lambda: {"a": [1]}, lambda owner: owner.value["a"].append(2)),
    "set": (lambda: {1, 2}, lambda owner: owner.value.add(3)),
    "set, other entry": (
        lambda: {1, 2},
        lambda owner: owner.value.symmetric_difference_update({2, 3}),
    ),
    "deque": (lambda: deque([1, 2], maxlen=2), lambda owner: owner.value.append(3)),
    "list in tuple": (lambda: (1, [2]), lambda owner: owner.value[1].append(3)),
    "list in list in tuple": (lambda: (1, ([2],)), lambda owner: owner.value[1][0].clear()),
    "tensor in place": (lambda: torch.ones(3), lambda owner: owner.value.mul_(2)),
    "tensor replaced": (lambda: torch.ones(3), _replace_tensor),
    "list with itself": (lambda: [1], lambda owner: owner.value.append(owner.value)),
}


def as_data(value: Any) -> Any:
    return value.tolist() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_found(change):
    make, run = CHANGES[change]
    owner = Owner(make())
    attributes = PlainAttributes([owner, owner.layer])
    run(owner)
    assert attributes.move()


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_undone(change):
    make, run = CHANGES[change]
    owner = Owner(make())
    value = owner.value
    with attributes_kept([vars(owner)]):
        run(owner)
    assert owner.value is value
    assert as_data(value) == as_data(make())
    assert not hasattr(owner, "more")


def test_the_second_run_leaves_what_the_first_run_left():
    owner = Owner([1])
    attributes = PlainAttributes([owner])
    owner.value.append(2)
    assert attributes.move()
    with attributes.kept():
        owner.value.append(3)
        owner.value = None
    assert owner.value == [1, 2]


def test_an_attribute_that_no_run_changes_is_left_alone():
    owner = Owner([1])
    attributes = PlainAttributes([owner, owner.layer])
    assert not attributes.move()
    with attributes.kept():
        owner.value.append(2)  # nobody noted it, and nobody pays for it
    assert owner.value == [1, 2]


def test_a_tensor_is_put_back_without_a_new_version():
    """A graph may have saved the tensor before the second run."""
    owner = Owner(torch.ones(3))
    attributes = PlainAttributes([owner])
    owner.value.mul_(2)  # by the first run
    weight = torch.ones(3, requires_grad=True)
    loss = (weight * owner.value).sum()
    with attributes.kept():
        owner.value.data.mul_(2)
    loss.backward()
    assert weight.grad.tolist() == [2.0, 2.0, 2.0]


def test_attributes_of_parameters_are_put_back():
    param = torch.nn.Parameter(torch.ones(3))
    param.tags = ["a"]
    attributes = PlainAttributes([param])
    param.tags.append("b")
    param.count = 1
    assert attributes.move()
    with attributes.kept():
        param.tags.append("c")
        param.count += 1
        param.other = 3
    assert param.tags == ["a", "b"]
    assert param.count == 1
    assert not hasattr(param, "other")


def test_attributes_of_torch_itself_are_left_alone():
    owner = Owner(1)
    attributes = PlainAttributes([owner])
    owner.eval()
    owner.register_buffer("scale", torch.ones(1))
    owner.register_forward_hook(lambda *_: None)
    owner.more = torch.nn.Linear(1, 1)
    assert not attributes.move()


def test_an_exception_undoes_changes_too():
    owner = Owner([1])
    with contextlib.suppress(KeyboardInterrupt), attributes_kept([vars(owner)]):
        owner.value.append(2)
        raise KeyboardInterrupt
    assert owner.value == [1]


def test_tensors_with_a_graph_are_found_in_containers():
    graph = torch.ones(1, requires_grad=True) * 2
    owner = Owner({"a": [(graph, 1)], "leaf": torch.ones(1, requires_grad=True)})
    other = Owner(graph)
    found = tensors_with_graph([vars(owner), vars(other)])
    assert list(map(id, found)) == [id(graph)] * 2
