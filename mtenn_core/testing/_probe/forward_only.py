"""Values of many poses at once from a ``torch.autograd.Function`` that has no rule for vmap."""

from __future__ import annotations

from typing import Any

from torch.overrides import TorchFunctionMode

from mtenn_core.testing._probe.torch_internals import custom_function_call


class ForwardOnly(TorchFunctionMode):
    """Calls the ``forward`` of an autograd function inside of ``torch.func.vmap``, and no more.

    Without it, vmap asks each function for a rule, ``generate_vmap_rule``, which is about backward.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is custom_function_call:
            function, *inputs = args
            return function.forward(*inputs)
        return func(*args, **(kwargs or {}))
