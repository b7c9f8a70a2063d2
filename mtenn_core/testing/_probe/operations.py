"""Operations of torch as a dispatch mode sees them, and what code can ask torch about itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mtenn_core._torch_internals import (
    COMPILING_FLAG,
    EXPORTING_FLAG,
    DispatchMode,
    hooks_of,
    input_metadata,
    schema_of,
)


def tensors_of(arguments: Any) -> list[Tensor]:
    """Return the tensors among the arguments or results of an operation, with repetitions."""
    if isinstance(arguments, dict):
        return tensors_of(list(arguments.values()))
    if isinstance(arguments, list | tuple):
        return [tensor for each in arguments for tensor in tensors_of(each)]
    return [arguments] if isinstance(arguments, Tensor) else []


def tree_map(function: Callable[[Any], Any], arguments: Any) -> Any:
    """Apply a function to all entries of nested lists, tuples and dicts."""
    if isinstance(arguments, dict):
        return {key: tree_map(function, each) for key, each in arguments.items()}
    if isinstance(arguments, list | tuple):
        return type(arguments)([tree_map(function, each) for each in arguments])
    return function(arguments)


class OperationCount(DispatchMode):
    """Counts the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


# Functions by which code asks whether torch compiles, exports or traces it. A name that was
# imported with "from torch.compiler import is_compiling" reads the flag.
_QUESTIONS = {
    "torch.compile": (("is_compiling", "is_dynamo_compiling"), (COMPILING_FLAG,)),
    "torch.export": (
        ("is_compiling", "is_exporting"),
        (COMPILING_FLAG, EXPORTING_FLAG),
    ),
}


@contextmanager
def pretended(what: str) -> Iterator[None]:
    """Tell code that asks that it runs under ``torch.compile``, export or trace.

    Nothing is compiled, because torch's compiler takes seconds.
    """
    questions, flags = _QUESTIONS.get(what, (("is_tracing",), ()))
    module: Any = torch.compiler if what in _QUESTIONS else torch.jit
    answers: dict[str, Any] = dict.fromkeys(questions, lambda: True)
    answers |= {flag: True for flag in flags if hasattr(module, flag)}
    before = {name: getattr(module, name) for name in answers if hasattr(module, name)}
    try:
        for name in before:
            setattr(module, name, answers[name])
        yield
    finally:
        for name, answer in before.items():
            setattr(module, name, answer)


def is_in_place(operation: Any) -> bool:
    """Return whether an operation that a dispatch mode sees changes one of its arguments."""
    return bool(schema_of(operation).is_mutable)


def changes_first_argument(operation: Any) -> bool:
    """Return whether an operation changes its first argument in place, and returns it."""
    changed = [
        each.alias_info is not None and each.alias_info.is_write
        for each in schema_of(operation).arguments
    ]
    returns = schema_of(operation).returns
    is_alias = len(returns) == 1 and returns[0].alias_info is not None
    return is_alias and changed[:1] == [True] and not any(changed[1:])


def makes_new_tensors(operation: Any) -> bool:
    """Return whether an operation returns only new tensors, with shapes that need no values."""
    return (
        all(
            each.alias_info is None and isinstance(each.type, torch.TensorType | torch.ListType)
            for each in schema_of(operation).returns
        )
        and torch.Tag.dynamic_output_shape not in operation.tags
    )


def output_shapes(node: Any) -> list[torch.Size]:
    """Return the shapes of the outputs of the function to which a node of a graph belongs."""
    # These are the shapes of the gradients that backward takes.
    return [torch.Size(output.shape) for output in input_metadata(node)]


def n_hooks(tensor: Tensor) -> int:
    """Return the number of hooks that ``register_hook`` has added to a tensor."""
    return len(hooks_of(tensor) or ())
