"""Combine the pose predictions of a multi-pose model through plugins with validated gradients.

>>> import torch
>>> from mtenn_core import MultiPoseModel
>>> model = MultiPoseModel(torch.nn.Linear(3, 1), "boltzmann", gradients="stored")
>>> out = model(torch.randn(5, 3))      # five poses of one compound
>>> out.prediction.backward()           # gradients as if all five graphs had been kept
>>> out.pose_predictions.shape
torch.Size([5])
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mtenn_core._engine.cost import ModeCost
    from mtenn_core._engine.estimate import Estimate
    from mtenn_core._registry import PluginRecord, Policy, Problem, Registry, registry
    from mtenn_core.combination import Combination, as_mtenn_combination
    from mtenn_core.gradients import attach_gradients
    from mtenn_core.hookspecs import hookimpl
    from mtenn_core.model import MultiPoseModel, MultiPoseOutput
    from mtenn_core.uncertainty import effective_poses, jackknife_error, propagated_error

# Lazy imports (PEP 562): torch takes a second to import, and a list of plugins does not need it.
_MODULE_OF = {
    "Combination": "mtenn_core.combination",
    "Estimate": "mtenn_core._engine.estimate",
    "ModeCost": "mtenn_core._engine.cost",
    "MultiPoseModel": "mtenn_core.model",
    "MultiPoseOutput": "mtenn_core.model",
    "PluginRecord": "mtenn_core._registry",
    "Policy": "mtenn_core._registry",
    "Problem": "mtenn_core._registry",
    "Registry": "mtenn_core._registry",
    "as_mtenn_combination": "mtenn_core.combination",
    "attach_gradients": "mtenn_core.gradients",
    "effective_poses": "mtenn_core.uncertainty",
    "hookimpl": "mtenn_core.hookspecs",
    "jackknife_error": "mtenn_core.uncertainty",
    "propagated_error": "mtenn_core.uncertainty",
    "registry": "mtenn_core._registry",
}

__all__ = [
    "Combination",
    "Estimate",
    "ModeCost",
    "MultiPoseModel",
    "MultiPoseOutput",
    "PluginRecord",
    "Policy",
    "Problem",
    "Registry",
    "as_mtenn_combination",
    "attach_gradients",
    "effective_poses",
    "hookimpl",
    "jackknife_error",
    "propagated_error",
    "registry",
]


if not TYPE_CHECKING:  # else type checkers would accept every misspelt name

    def __getattr__(name: str) -> object:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(_MODULE_OF[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
