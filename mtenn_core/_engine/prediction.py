"""The prediction of a multi-pose model: check, run, gather, combine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mtenn_core._engine.call import by_compound, checked_call, total_sizes
from mtenn_core._engine.evaluation import PoseInputs
from mtenn_core._engine.mode import Options
from mtenn_core._engine.mode_table import checked_mode
from mtenn_core.errors import PredictionError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup as Group


def predict(
    options: Options,
    poses: Iterable[Any],
    sizes: Sequence[int] | None,
    pose_inputs: Mapping[str, Any] | None,
    collated: bool,
    group: Group | None,
) -> tuple[Tensor, Tensor]:
    """Return the combined predictions and the pose predictions, both differentiable.

    Parameters
    ----------
    options : of the model
    poses, sizes, pose_inputs, collated, group : see :meth:`mtenn_core.MultiPoseModel.forward`
    """
    mode = checked_mode(options)  # in each call, since options can be set
    arguments = partial(checked_call, options.combination, poses, sizes, pose_inputs, collated)
    if group is None:
        call = arguments()
        shares = [call.sizes]
    else:
        # Its import takes time, and few need it.
        from mtenn_core._engine.process_group import exchange_sizes

        mode.check_group(options)
        call, shares = exchange_sizes(arguments, group)
    n_poses = total_sizes(options.combination, shares, sizes)
    predictions, gradients = mode.predict(options, call)
    inputs = call.inputs_like(predictions)
    if group is not None:
        from mtenn_core._engine.process_group import gather_poses

        predictions = torch.cat(gather_poses(predictions, shares, group))
        inputs = {n: torch.cat(gather_poses(i, shares, group)) for n, i in inputs.items()}
    if options.check_finite:
        _check_finite(predictions, inputs, n_poses)
    combined, first_pose = [], 0
    for own_predictions, own_inputs in by_compound(predictions, inputs, n_poses):
        arguments_of_one = (own_predictions, own_inputs, gradients, first_pose)
        combined.append(mode.combine(options.combination, *arguments_of_one))
        first_pose += len(own_predictions)
    return combined[0] if sizes is None else torch.stack(combined), predictions


def _check_finite(predictions: Tensor, inputs: PoseInputs, n_poses: list[int]) -> None:
    """Raise on the first number that is NaN or infinite, and name its pose."""
    named = {"the prediction": predictions}
    named |= {f"pose_inputs[{name!r}]": values for name, values in inputs.items()}
    for what, values in named.items():
        finite = torch.isfinite(values.detach())
        if finite.all():
            continue
        pose = int((~finite).nonzero()[0])
        within, compound = pose, 0
        while within >= n_poses[compound]:
            within -= n_poses[compound]
            compound += 1
        where = f" (pose {within} of compound {compound})" if len(n_poses) > 1 else ""
        raise PredictionError(
            f"pose {pose}{where}: {what} is {values[pose].item()}, and it would spoil the gradient"
            " of every other pose; leave the pose out, or pass check_finite=False to combine it"
            " anyway",
            pose=pose,
            compound=compound,
        )
