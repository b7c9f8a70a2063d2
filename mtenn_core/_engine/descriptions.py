"""Descriptions of values as JSON data: equal values have equal descriptions in all processes."""

from __future__ import annotations

import ctypes
import dis
import hashlib
import json
import re
import sys
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from mtenn_core._engine.module_tensors import is_sharded
from mtenn_core._torch_internals import (
    ADDED_TO_MODULES,
    HOOKS_OF_MODULE,
    buffers_of,
    children_of,
    non_persistent_of,
    parameters_of,
)

# Arrays with more values, and data with a longer text, are represented by a hash.
MAX_VALUES = 16
MAX_LENGTH = 400
# Deeper values are represented by their class. Python's own limit would leave a depth that depends
# on the caller, and a value could differ from itself (seen in Python 3.13).
MAX_DEPTH = 100
# Attributes of every module. Its tables and hooks are described by their contents.
_IGNORED = frozenset(vars(torch.nn.Module())) | {"_arguments"}


class Describer:
    """Describes values, for a comparison with values in another process.

    Numbers, text, containers and arrays are compared by their values, other objects by their class
    and by the contents that pickle would write. A function that can be imported is compared by its
    name. Other functions, such as lambdas, are compared by their code and its variables.

    A description never raises an error. If an object refuses, its class describes it.

    Parameters
    ----------
    module : the tensors in its ``state_dict()`` are described without their values

    Attributes
    ----------
    found_state : True if a description contains a tensor of the ``state_dict()``
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._memory = {memory_key(tensor) for tensor in persistent_tensors(module).values()}
        self._open: list[int] = []  # ids of the values whose description has begun
        self.found_state = False

    def describe(self, value: Any) -> Any:
        """Return JSON data that describes a value."""
        if id(value) in self._open:  # the value contains itself
            return f"level {self._open.index(id(value))}"
        if len(self._open) == MAX_DEPTH:
            return _class_name(type(value))
        self._open.append(id(value))
        try:
            return self._describe(value)
        except (KeyboardInterrupt, MemoryError):
            raise
        except BaseException:  # an extension in Rust may raise errors that are no Exception
            return _class_name(type(value))
        finally:
            self._open.pop()

    def attributes(self, module: torch.nn.Module) -> dict[str, Any]:
        """Return a description of each attribute, parameter, buffer, child and hook of a module."""
        own: dict[str, Any] = {
            **parameters_of(module),
            **buffers_of(module),
            **children_of(module),
        }
        for name, value in vars(module).items():
            if name in HOOKS_OF_MODULE:
                # The keys are arbitrary numbers. The hooks of fully_shard compute nothing.
                hooks = [hook for hook in value.values() if not _is_distributed(hook)]
                own |= {name: hooks} if hooks else {}
            # What compile() and fully_shard add does not change what is computed.
            elif name not in _IGNORED and not name.startswith(ADDED_TO_MODULES):
                own[name] = value
        return {name: self.describe(own[name]) for name in sorted(own)}

    def _describe(self, value: Any) -> Any:
        if value is None or isinstance(value, str | int | float):
            return _atom(value)
        if isinstance(value, complex | bytes):
            return repr(value)
        if isinstance(value, Mapping):
            return {self._key(key): self.describe(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.describe(item) for item in value]
        if isinstance(value, set | frozenset):
            return sorted((self.describe(item) for item in value), key=_json)
        if isinstance(value, Tensor):
            return self._tensor(value)
        if _is_numpy(value):
            return self._array(value)
        if isinstance(value, torch.nn.Module):
            return [_class_name(type(value)), self.attributes(value)]
        if isinstance(value, type | types.ModuleType | types.FunctionType):
            return self._named(value)
        return self._object(value)

    def _key(self, key: Any) -> str:
        # In JSON, all keys are text. The brackets distinguish 1 from "1".
        return key if isinstance(key, str) else f"[{_json(self.describe(key))}]"

    def _tensor(self, tensor: Tensor) -> Any:
        kind = _array_kind(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        if memory_key(tensor) in self._memory:
            self.found_state = True
            return f"shape {tuple(tensor.shape)}, in the state dict"
        if not _has_values(tensor):
            return f"{kind}, without values"
        values = tensor.detach().cpu()
        if values.layout is not torch.strided:
            values = values.to_dense()
        values = values.resolve_conj().resolve_neg().contiguous()
        if values.ndim == 0:
            return self.describe(values.item())
        if values.numel() <= MAX_VALUES:
            return f"{kind}, {values.tolist()}"
        # Tensor.numpy() would need numpy.
        return f"{kind}, {_hash(ctypes.string_at(values.data_ptr(), values.nbytes))}"

    def _array(self, array: Any) -> Any:
        """Describe an array or a number of numpy, in the same way as an equal tensor."""
        if array.ndim == 0 or array.dtype.kind in "OV":  # objects, and records with gaps
            values = array.tolist()
            return repr(values) if _is_numpy(values) else self.describe(values)
        kind = _array_kind(array.dtype.name, array.shape)
        if array.size <= MAX_VALUES:
            return f"{kind}, {array.tolist()}"
        return f"{kind}, {_hash(array.astype(array.dtype.newbyteorder('=')).tobytes())}"

    def _named(self, value: Any) -> str:
        if isinstance(value, types.ModuleType):
            return value.__name__
        name = f"{value.__module__}:{value.__qualname__}"
        if isinstance(value, type) or _imported(value.__module__, value.__qualname__) is value:
            return name
        # Another release of Python compiles the same source to other code.
        version = "{}.{}".format(*sys.version_info)
        return f"{name} for Python {version}, {_hash(_json(self._function(value)).encode())}"

    def _function(self, function: types.FunctionType) -> list[Any]:
        """Describe a function that cannot be imported, with the variables that it reads."""
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        return [
            self._code(function.__code__, function.__globals__),
            self.describe([function.__defaults__, function.__kwdefaults__]),
            {name: self.describe(cell.cell_contents) for name, cell in cells},
        ]

    def _code(self, code: types.CodeType, namespace: Mapping[str, Any]) -> list[Any]:
        read = {
            instruction.argval
            for instruction in dis.get_instructions(code)
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME")
        }
        return [
            code.co_code.hex(),
            [code.co_names, code.co_flags],
            [
                self._code(constant, namespace)
                if isinstance(constant, types.CodeType)
                else [type(constant).__name__, self.describe(constant)]
                for constant in code.co_consts
            ],
            {name: self.describe(namespace[name]) for name in sorted(read & namespace.keys())},
        ]

    def _object(self, value: Any) -> Any:
        """Describe an object by its contents, as pickle would write them, or by its ``repr``."""
        if isinstance(value, RemovableHandle):  # its content is an arbitrary number
            return _class_name(RemovableHandle)
        try:
            reduced = value.__reduce_ex__(4)
        except Exception:  # for example, locks and files
            return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
        if isinstance(reduced, str):  # the name of a global variable
            return f"{getattr(value, '__module__', None) or type(value).__module__}:{reduced}"
        make, arguments, *contents = reduced
        make_name = getattr(make, "__name__", "")
        parts = list(arguments) if make_name == "__newobj__" else [make, *arguments]
        state, *items = (*contents, None, None, None)[:3]
        parts += [] if state is None else [state]
        parts += [list(item) for item in items if item is not None]
        described = [self.describe(part) for part in parts]
        return described[0] if len(described) == 1 else described


def shortened(data: Any, length: int = MAX_LENGTH) -> Any:
    """Return JSON data. If its text is long, return the start of the text and a hash instead."""
    text = _json(data)
    if len(text) <= length:
        return data
    return f"{text[: length // 4]}… {_hash(text.encode())}"


def _atom(value: str | float | None) -> Any:
    """Describe None, text or a number."""
    if isinstance(value, float):
        return float(value) if value == value else "nan"  # a NaN is not equal to itself
    if isinstance(value, int) and not isinstance(value, bool):
        # Python refuses to convert very long numbers to decimal text.
        return int(value) if value.bit_length() < 10_000 else hex(value)
    return str(value) if isinstance(value, str) else value


def _json(data: Any) -> str:
    return json.dumps(data, sort_keys=True)


def _hash(data: bytes) -> str:
    return f"SHA-256 {hashlib.sha256(data).hexdigest()[:32]}"


def _is_distributed(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.")


def _array_kind(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{dtype}, shape {shape}"


def _class_name(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _imported(module: str, qualname: str) -> Any:
    """Return the object that pickle would find under this name, or None."""
    found: Any = sys.modules.get(module)
    for name in qualname.split("."):
        found = getattr(found, name, None)
    return found


def _is_numpy(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray | numpy.generic)


def _has_values(tensor: Tensor) -> bool:
    """Return whether this process can read the values of a tensor."""
    if tensor.is_meta or is_sharded(tensor):
        return False
    if tensor.layout is not torch.strided or tensor.numel() == 0:
        return True
    storage = tensor.untyped_storage()
    # fully_shard frees memory. The memory of a FakeTensor is on the device "meta".
    return storage.nbytes() > 0 and storage.device.type != "meta"


def memory_key(tensor: Tensor) -> Any:
    """Return a key that two tensors share if they are the same view of the same memory."""
    try:
        if tensor.layout is torch.strided and tensor.numel() and _has_values(tensor):
            return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()
    except Exception:  # a lazy parameter, or another tensor without memory
        pass
    return id(tensor)


def persistent_tensors(module: torch.nn.Module) -> dict[str, Tensor]:
    """Return the tensors in a module's ``state_dict()``, by their names there.

    ``state_dict()`` itself would run hooks. Those of ``fully_shard`` exchange parameters.
    """
    tensors: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    for prefix, child in module.named_modules(remove_duplicate=False):
        for name in buffers_of(child).keys() - non_persistent_of(child):
            if (tensor := buffers_of(child)[name]) is not None:
                tensors[f"{prefix}.{name}" if prefix else name] = tensor
    return tensors
