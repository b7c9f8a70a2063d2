"""The size of the state that a combination keeps grows with each of its containers."""

from collections import deque
from functools import cache
from typing import ClassVar

import pytest
import torch

from mtenn_core import Combination
from mtenn_core.testing._probe.state_size import state_size

IN_MODULE = []


@cache
def remembered(number):
    return number


class Counts:
    def __init__(self):
        self.numbers = {}


class Keeps(Combination):
    of_class: ClassVar[list[int]] = []

    def __init__(self):
        super().__init__()
        self.in_list, self.in_dict, self.in_deque = [], {"nested": [set()]}, deque(maxlen=2)
        self.counts = Counts()
        self.text = ""
        self.register_buffer("history", torch.zeros(0))
        self.part = torch.nn.Module()
        self.part.numbers = []

    def combine(self, predictions):
        return predictions.mean()


def longer_text(combination):
    combination.text += "x"


def longer_tensor(combination):
    combination.history = torch.zeros(1)


@pytest.mark.parametrize(
    "keep",
    [
        lambda c: c.in_list.append(0),
        lambda c: c.in_dict["nested"][0].add(1),
        lambda c: c.in_deque.append(0),
        lambda c: c.counts.numbers.update({1: 2}),
        lambda c: c.part.numbers.append(0),
        lambda c: c.of_class.append(0),
        lambda c: IN_MODULE.append(0),
        lambda c: remembered(1),
        longer_text,
        longer_tensor,
    ],
    ids=[
        *("list", "set in a list in a dict", "deque", "dict of an object", "list of a part"),
        *("list of the class", "list of the module", "cache of a function", "text", "tensor"),
    ],
)
def test_the_size_grows_by_what_is_kept(keep):
    combination = Keeps()
    before = state_size(combination)
    keep(combination)
    assert state_size(combination) == before + 1


def test_the_size_stays_if_nothing_is_kept():
    combination = Keeps()
    before = state_size(combination)
    combination.combine(torch.zeros(3))
    assert state_size(combination) == before
