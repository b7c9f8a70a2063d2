"""A14: many compounds in one batch."""

from __future__ import annotations

import torch

from mtenn_core._engine.batch_probe import (
    CannotBatchError,
    DifferentNumbersError,
    check_can_batch,
)
from mtenn_core.testing._checks.check import check
from mtenn_core.testing._outcomes import Fail, Metrics, Skip
from mtenn_core.testing._probe.subject import Subject

# (compounds, poses of each). Equal numbers of both would hide a rule that takes the wrong axis.
PROBES = ((4, 3), (2, 5), (3, 1))


@check("A14", "a batch of compounds gives the numbers of each compound")
def batches(subject: Subject) -> Metrics:
    """Compare values, weights and gradients of a batch with those of a loop over the compounds.

    The core runs compounds with equal numbers of poses in one call, through ``torch.func.vmap``.
    """
    combination = subject.copy(torch.float64, as_written=True)
    for n_compounds, n_poses in PROBES:
        size = subject.probes.n_poses(n_poses)
        poses = [subject.probes.poses(size, 0.0, 0.5) for _ in range(n_compounds)]
        predictions = torch.stack([each.predictions for each in poses])
        inputs = {n: torch.stack([each.inputs[n] for each in poses]) for n in poses[0].inputs}
        try:
            check_can_batch(combination, predictions, inputs)
        except DifferentNumbersError as error:
            raise Fail(
                f"{n_compounds} compounds with {size} poses each: the batch must give the numbers"
                f" of a loop over the compounds; found a different {error.what}",
                cause="the rule for vmap of an autograd function is wrong (a sum over the"
                " compounds, len() of the wrong axis): write generate_vmap_rule = True instead",
            ) from None
        except CannotBatchError as reason:
            raise Skip(f"the core combines one compound after the other: {reason}") from None
    return {}
