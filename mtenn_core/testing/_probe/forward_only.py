"""Run ``forward`` of a ``torch.autograd.Function`` in vmap, although it has no rule for vmap."""

from __future__ import annotations

from typing import Any

from torch.overrides import TorchFunctionMode

from mtenn_core._torch_internals import custom_function_call


class ForwardOnly(TorchFunctionMode):
    """A mode in which ``torch.func.vmap`` calls only the ``forward`` of an autograd function.

    Otherwise, vmap would require ``generate_vmap_rule`` of the function, which is a rule for
    backward. ``Function.apply`` calls ``custom_function_call`` inside a transform of torch.func.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is custom_function_call:
            function, *inputs = args
            return function.forward(*inputs)
        return func(*args, **(kwargs or {}))
