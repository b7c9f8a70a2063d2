"""Values as JSON data from which they can be made again, with the same types.

Numbers, text, None, and lists and dicts of them are written as JSON writes them. Every other type
is a dict with one key, which starts with "!" and names the type, such as ``{"!tuple": [1, 2]}``.
No name of a class or function is looked up, so that a file cannot make a process import something.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mtenn_core._engine.descriptions import memory_key, persistent_tensors

# Data with a longer text are not kept, so that a checkpoint stays small.
MAX_LENGTH = 4000
_MARK = "!"
_INTEGERS = ("int64", "int32", "int16", "int8", "uint8", "bool")
_ARRAY_DTYPES = frozenset({"float64", "float32", "float16", *_INTEGERS})
_TENSOR_DTYPES = _ARRAY_DTYPES | {"bfloat16"}


class NotExactError(ValueError):
    """The value cannot be written exactly: it has another type, or is too long."""


class Encoder:
    """Writes values as JSON data.

    Parameters
    ----------
    module : a tensor in its ``state_dict()`` is written as its name there. Its values change in
        training, and are in the checkpoint already.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._names = {memory_key(t): name for name, t in persistent_tensors(module).items()}

    def encode(self, value: Any) -> Any:
        """Return JSON data for a value.

        Raises
        ------
        NotExactError : the value, or a part of it, has another type, or its text is too long
        """
        try:
            data = self._encode(value)
            length = len(json.dumps(data))
        except NotExactError:
            raise
        except Exception as error:  # for example, a list that contains itself
            raise NotExactError(repr(error)) from error
        if length > MAX_LENGTH:
            raise NotExactError(f"{length} characters")
        return data

    def _encode(self, value: Any) -> Any:
        kind = type(value)
        if value is None or kind in (bool, int, float, str):
            return value
        if isinstance(value, Tensor) and (name := self._names.get(memory_key(value))):
            is_parameter = isinstance(value, torch.nn.Parameter)
            return {f"{_MARK}{'parameter' if is_parameter else 'state'}": name}
        if kind in _ENCODERS:
            return _ENCODERS[kind](self, value)
        numpy = sys.modules.get("numpy")
        if numpy is not None and isinstance(value, numpy.generic | numpy.ndarray):
            return self._array(value)
        raise NotExactError(f"a {kind.__name__}")

    def _list(self, value: list[Any]) -> Any:
        return [self._encode(item) for item in value]

    def _items(self, value: Any) -> Any:
        name = type(value).__name__
        items = [self._encode(item) for item in value]
        # The order of a set depends on the process.
        return {f"{_MARK}{name}": items if name == "tuple" else sorted(items, key=repr)}

    def _dict(self, value: dict[Any, Any]) -> Any:
        if all(type(key) is str and not key.startswith(_MARK) for key in value):
            return {key: self._encode(item) for key, item in value.items()}
        pairs = [[self._encode(key), self._encode(item)] for key, item in value.items()]
        return {f"{_MARK}dict": pairs}

    def _tensor(self, tensor: Tensor) -> Any:
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in _TENSOR_DTYPES or tensor.layout is not torch.strided:
            raise NotExactError(f"a tensor of dtype {dtype} and layout {tensor.layout}")
        if tensor.requires_grad or tensor.is_meta:
            raise NotExactError("a tensor that requires grad, or on the device meta")
        values = tensor.detach().cpu().flatten().tolist()
        return {f"{_MARK}tensor": [dtype, list(tensor.shape), values]}

    def _array(self, array: Any) -> Any:
        numpy = sys.modules["numpy"]
        dtype, is_scalar = array.dtype.name, isinstance(array, numpy.generic)
        if dtype not in _ARRAY_DTYPES or not (is_scalar or type(array) is numpy.ndarray):
            raise NotExactError(f"a {type(array).__name__} of dtype {dtype}")
        shape = None if is_scalar else list(array.shape)
        return {f"{_MARK}numpy": [dtype, shape, array.ravel().tolist()]}


# The type must be exactly this one: a subclass, such as an enum or a named tuple, is another.
_ENCODERS: dict[type, Callable[[Encoder, Any], Any]] = {
    list: Encoder._list,
    tuple: Encoder._items,
    set: Encoder._items,
    frozenset: Encoder._items,
    dict: Encoder._dict,
    Tensor: Encoder._tensor,
    complex: lambda _, value: {f"{_MARK}complex": [value.real, value.imag]},
    bytes: lambda _, value: {f"{_MARK}bytes": value.hex()},
    torch.dtype: lambda _, value: {f"{_MARK}dtype": str(value).removeprefix("torch.")},
    torch.device: lambda _, value: {f"{_MARK}device": str(value)},
}


def decode(data: Any, state: Mapping[str, Tensor]) -> Any:
    """Return the value that :meth:`Encoder.encode` has written.

    Parameters
    ----------
    state : the state dict of the module

    Raises
    ------
    ValueError : the data were not written by :meth:`Encoder.encode`, or ``state`` lacks a tensor
    """
    if isinstance(data, list):
        return [decode(item, state) for item in data]
    if not isinstance(data, dict):
        return data
    mark = next(iter(data), "")
    if not mark.startswith(_MARK):
        return {key: decode(item, state) for key, item in data.items()}
    try:
        return _DECODERS[mark.removeprefix(_MARK)](data[mark], state)
    except Exception as error:
        raise ValueError(f"cannot read {str(data)[:100]} ({error!r})") from error


def _array(dtype: str, shape: list[int] | None, values: list[Any]) -> Any:
    import numpy  # torch works without it, and so does a checkpoint without its numbers

    if dtype not in _ARRAY_DTYPES:
        raise ValueError(f"the dtype {dtype!r}")
    array = numpy.array(values, dtype=dtype)
    return array[0] if shape is None else array.reshape(shape)


def _tensor(dtype: str, shape: list[int], values: list[Any]) -> Tensor:
    return torch.tensor(values, dtype=_dtype(dtype), device="cpu").reshape(shape)


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name!r} is no dtype")
    return found


_DECODERS: dict[str, Callable[[Any, Mapping[str, Tensor]], Any]] = {
    "tuple": lambda data, state: tuple(decode(data, state)),
    "set": lambda data, state: set(decode(data, state)),
    "frozenset": lambda data, state: frozenset(decode(data, state)),
    "dict": lambda data, state: {decode(k, state): decode(v, state) for k, v in data},
    "tensor": lambda data, _: _tensor(*data),
    "numpy": lambda data, _: _array(*data),
    "complex": lambda data, _: complex(*data),
    "bytes": lambda data, _: bytes.fromhex(data),
    "dtype": lambda data, _: _dtype(data),
    "device": lambda data, _: torch.device(data),
    "state": lambda data, state: state[data].detach().clone(),
    "parameter": lambda data, state: torch.nn.Parameter(state[data].detach().clone()),
}
