"""One training step of a pose model in each gradient mode, compared with plain autograd."""

from __future__ import annotations

import random
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mtenn_core import Combination, MultiPoseModel
from mtenn_core.errors import MtennError
from mtenn_core.model import MultiPoseOutput

# A mode must give what plain autograd gives, or it may instead raise an error that names a mode
# that works.
RIGHT, RIGHT_OR_ERROR = "right", "right or an error"

# float64 gradients are sums of a few hundred products, in another order in each mode: 1e-14. The
# sharp weights multiply rounding errors of the predictions by 1e4.
TOLERANCE = 1e-10


class Minimum(Combination):
    """A soft minimum. With scale 1e4, most poses have weight zero."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def combine(self, predictions: Tensor) -> Tensor:
        return -torch.logsumexp(-self.scale * predictions, dim=0) / self.scale

    def loss(self, out: MultiPoseOutput) -> Tensor:
        """Return a loss. It leaves poses without weight only if the minimum is sharp."""
        of_poses = out.pose_predictions.sin().sum() if self.scale == 1 else 0
        return out.prediction + of_poses


SCALES = {"dense": 1.0, "sharp": 1e4}


class Hidden(nn.Module):
    """A pose model with one hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.readout = nn.Linear(3, 6), nn.Linear(6, 1)

    def forward(self, pose: Tensor) -> Tensor:
        return self.readout(torch.tanh(self.hidden(pose)))


class PlainLoop(nn.Module):
    """The reference: it runs the pose model on one chunk after the other, and combines."""

    def __init__(
        self,
        pose_model: nn.Module,
        combination: Combination,
        collate: Callable[[list[Any]], Any] | None = None,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        self.pose_model, self.combination = pose_model, combination
        self.collate, self.chunk_size = collate, chunk_size or 1

    def forward(self, poses: list[Any]) -> MultiPoseOutput:
        chunks: Sequence[Any] = poses
        if self.collate is not None:
            starts = range(0, len(poses), self.chunk_size)
            chunks = [self.collate(poses[i : i + self.chunk_size]) for i in starts]
        predictions = torch.cat([self.pose_model(chunk).reshape(-1) for chunk in chunks])
        predictions = predictions.to(torch.promote_types(predictions.dtype, torch.float32))
        return MultiPoseOutput(self.combination.combine(predictions), predictions)


def vectors() -> list[Tensor]:
    """Return five poses of three numbers."""
    return [torch.randn(3) for _ in range(5)]


def step(model: Any, poses: list[Any]) -> MultiPoseOutput:
    """Run the poses and the backward of a loss."""
    out = model(poses)
    model.combination.loss(out).backward()
    return out


@dataclass(eq=False)
class Case:
    """A pose model, its poses, and what each mode must do.

    Attributes
    ----------
    make, poses : make the pose model and the poses, the same ones each time
    graph, stored, recomputed : RIGHT or RIGHT_OR_ERROR; None if the documentation excludes the case
    step : one or several training steps on a model and its poses; it returns the last output
    options : further options of the model
    dtype : the default dtype
    tolerance : the allowed difference, relative to the largest element
    not_in_message : words that no error may have
    """

    make: Callable[[], nn.Module]
    poses: Callable[[], list[Any]] = vectors
    graph: str = RIGHT
    stored: str | None = RIGHT
    recomputed: str | None = RIGHT
    step: Callable[[Any, list[Any]], MultiPoseOutput] = step
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    tolerance: float = TOLERANCE
    not_in_message: str = "\0"

    def check(self, gradients: str, scale: float, without: str = "\0") -> None:
        """Compare a mode with the plain loop. Leave out values whose names contain ``without``."""
        try:
            found = self.outcome(gradients, scale)
        except MtennError as error:
            if getattr(self, gradients) == RIGHT:
                raise
            self._check_message(str(error), gradients)
            return
        expected = self.expected(scale)
        assert_same(
            {name: value for name, value in found.items() if without not in name},
            {name: value for name, value in expected.items() if without not in name},
            self.tolerance,
        )

    def _check_message(self, message: str, gradients: str) -> None:
        assert "gradients=" in message
        assert self.not_in_message not in message
        named = set(re.findall(r"'(graph|stored|recomputed)'", message)) - {gradients}
        right = [mode for mode in named if getattr(self, mode) == RIGHT]
        assert right, f"the error names no mode that works: {message}"

    @cache  # noqa: B019 - the cases live as long as the module
    def expected(self, scale: float) -> dict[str, Any]:
        """Return the outcome of the plain loop."""
        return self.outcome(None, scale)

    def outcome(self, gradients: str | None, scale: float) -> dict[str, Any]:
        """Return predictions, gradients, and the state afterwards."""
        with default_dtype(self.dtype):
            seed()
            pose_model, poses = self.make(), self.poses()
            options = dict(self.options)
            if gradients == "stored":
                options.pop("chunk_size", None)
            if gradients is None:
                model: nn.Module = PlainLoop(pose_model, Minimum(scale), **options)
            else:
                model = MultiPoseModel(pose_model, Minimum(scale), gradients=gradients, **options)
            pose_leaves = list(leaves(poses))
            seed()
            out = self.step(model, poses)
        found = {"prediction": out.prediction, "pose predictions": out.pose_predictions}
        found["poses"] = poses
        found["gradients of poses"] = [leaf.grad for leaf in pose_leaves]
        return plain(found | parameters_of(pose_model) | state_of(pose_model))


def seed() -> None:
    """Set the random states of all libraries."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make new tensors in another dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def leaves(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of a pose that require grad."""
    if isinstance(value, Tensor):
        if value.requires_grad:
            yield value
    elif isinstance(value, list | tuple | dict) or hasattr(value, "__dict__"):
        inside = value if isinstance(value, list | tuple) else contents(value).values()
        for part in inside:
            yield from leaves(part)


def contents(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else vars(value)


def parameters_of(pose_model: nn.Module) -> dict[str, Any]:
    """Return the gradient, value, class and attributes of each parameter."""
    found: dict[str, Any] = {}
    for name, param in pose_model.named_parameters(remove_duplicate=False):
        found[f"gradient of {name}"] = param.grad
        found[f"parameter {name}"] = [param.detach(), type(param).__name__, vars(param)]
    return found


OF_EVERY_MODULE = vars(nn.Module()).keys()


def state_of(pose_model: nn.Module) -> dict[str, Any]:
    """Return the buffers and plain attributes of each module.

    Attributes that begin with an underscore are not compared.
    """
    found: dict[str, Any] = {}
    for name, module in pose_model.named_modules():
        found[f"buffers of {name}"] = dict(module._buffers)
        found[f"persistent buffers of {name}"] = sorted(module.state_dict())
        found[f"attributes of {name}"] = {
            key: value
            for key, value in vars(module).items()
            if not key.startswith("_") and key not in OF_EVERY_MODULE
        }
    return found


def plain(value: Any) -> Any:
    """Return a copy that consists of dicts, lists, tensors, numbers and names."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, int | float | str | None):
        return value
    if isinstance(value, list | tuple | deque):
        return list(map(plain, value))
    if isinstance(value, set):
        return sorted(value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "__dict__") and not callable(value):
        return plain(vars(value))
    return type(value).__name__


def assert_same(found: Any, expected: Any, tolerance: float, where: str = "") -> None:
    """Compare two results of :func:`plain`."""
    if isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key, value in expected.items():
            assert_same(found[key], value, tolerance, f"{where} {key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for index, value in enumerate(expected):
            assert_same(found[index], value, tolerance, f"{where}, {index}")
    elif isinstance(expected, Tensor | float):
        assert type(found) is type(expected), f"{where}: found {found}, expected {expected}"
        one, other = torch.as_tensor(found), torch.as_tensor(expected)
        size = other.double().abs().max().item() if other.numel() else 0.0
        # The last term is for sums that cancel to zero.
        torch.testing.assert_close(
            one,
            other,
            rtol=0,
            atol=tolerance * size + 1e-4 * tolerance,
            msg=lambda text: f"{where}: {text}",
        )
    else:
        assert found == expected, where


def table(models: Mapping[str, Callable[[], nn.Module]], **fields: Any) -> dict[str, Case]:
    """Return one case for each pose model."""
    return {name: Case(make, **fields) for name, make in models.items()}


def in_each_mode(*tables: Mapping[str, Case]) -> pytest.MarkDecorator:
    """Run a test for each case in each mode, with a dense and a sharp combination."""
    return pytest.mark.parametrize(
        ("case", "gradients", "scale"),
        [
            pytest.param(case, gradients, scale, id=f"{name}-{gradients}-{density}")
            for cases in tables
            for name, case in cases.items()
            for gradients in ("graph", "stored", "recomputed")
            if getattr(case, gradients) is not None
            for density, scale in SCALES.items()
        ],
    )
