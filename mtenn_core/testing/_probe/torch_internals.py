"""Private interfaces of torch that the conformance suite uses.

Each has a comment: its use, the version of torch in which it was seen to work, and what could
replace it. Those that the engine uses too are in ``mtenn_core._engine.autograd_nodes``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

# Function.apply calls this operator inside of a transform of torch.func. Seen in torch 2.13.
# Without it: vmap raises for a Function that has no rule for vmap, and poses run one by one.
custom_function_call: Any = None
with suppress(ImportError):
    from torch._functorch import autograd_function

    custom_function_call = getattr(autograd_function, "custom_function_call", None)

# Applies a function to the leaves of nested lists, tuples and dicts, such as the arguments of an
# operation. Seen in torch 2.13, whose own dispatch modes use it. Without it: a recursion of a few
# lines.
tree_map = _pytree.tree_map


def tensors_of(arguments: Any) -> list[Tensor]:
    """Return the tensors among the arguments or results of an operation, with repetitions."""
    # See tree_map.
    return [leaf for leaf in _pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)]


# Seen in torch 2.13. Without it: a subclass of Tensor with __torch_dispatch__, which combinations
# would notice.
class DispatchMode(TorchDispatchMode):
    """A mode that sees every operation. It avoids the slow import of torch's compiler."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # The default, True, would import the compiler. Seen in torch 2.13. A release without this
        # method does not call it.
        return False


class OperationCount(DispatchMode):
    """Counts the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


# Functions by which code asks whether torch compiles, exports or traces it. A name that was
# imported with "from torch.compiler import is_compiling" reads the flag. Seen in torch 2.13.
# Without a flag: only questions that are asked through the module are answered.
_QUESTIONS = {
    "torch.compile": (("is_compiling", "is_dynamo_compiling"), ("_is_compiling_flag",)),
    "torch.export": (
        ("is_compiling", "is_exporting"),
        ("_is_compiling_flag", "_is_exporting_flag"),
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
    # Torch's own modes read this schema, too. Seen in torch 2.13. Without it: the names of
    # operations in place, which end in an underscore or in "_out".
    return bool(operation._schema.is_mutable)


def changes_first_argument(operation: Any) -> bool:
    """Return whether an operation changes its first argument in place, and returns it."""
    # See is_in_place. Without it: the names of operations in place, which end in an underscore.
    changed = [
        each.alias_info is not None and each.alias_info.is_write
        for each in operation._schema.arguments
    ]
    returns = operation._schema.returns
    is_alias = len(returns) == 1 and returns[0].alias_info is not None
    return is_alias and changed[:1] == [True] and not any(changed[1:])


def makes_new_tensors(operation: Any) -> bool:
    """Return whether an operation returns only new tensors, with shapes that need no values."""
    # See is_in_place. Without it: a list of the operations by name.
    return (
        all(
            each.alias_info is None and isinstance(each.type, torch.TensorType | torch.ListType)
            for each in operation._schema.returns
        )
        and torch.Tag.dynamic_output_shape not in operation.tags
    )


def output_shapes(node: Any) -> list[torch.Size]:
    """Return the shapes of the outputs of the function to which a node of a graph belongs."""
    # These are the shapes of the gradients that backward takes. Seen in torch 2.13. Without it: A1
    # could check only functions with one output.
    return [torch.Size(output.shape) for output in node._input_metadata]


def n_hooks(tensor: Tensor) -> int:
    """Return the number of hooks that ``register_hook`` has added to a tensor."""
    # Seen in torch 2.13; None before the first hook. Without it: A4 would not see hooks.
    return len(tensor._backward_hooks or ())
