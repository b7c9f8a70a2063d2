"""Peak memory of the gradient of one bag, measured in a separate process that runs this file."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

PROCESS = Path("/proc/self")
ENLARGE = 8  # images of 64 x 64
# glibc raises these thresholds as it goes, freed blocks then stay in the process, and the peak
# depends on the order of the allocations.
PINNED = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
}


def peak_memory(way: str, size: int) -> int | None:
    """Return the peak bytes of one gradient of a bag of images; None if they cannot be measured.

    Parameters
    ----------
    way : ``digit_bags.PLAIN`` or a mode
    """
    if not (PROCESS / "clear_refs").exists():
        return None
    command = [sys.executable, __file__, way, str(size)]
    child = subprocess.run(
        command, env=os.environ | PINNED, check=True, stdout=subprocess.PIPE, text=True
    )
    return int(child.stdout)


def _resident(field: str) -> int:
    """Return VmRSS (now) or VmHWM (peak) of this process, in bytes.

    ``getrusage`` does not work here: on Linux, a child's ru_maxrss starts at its parent's peak.
    """
    status = (PROCESS / "status").read_text()
    (kibibytes,) = re.findall(rf"^{field}:\s+(\d+) kB$", status, flags=re.MULTILINE)
    return 1024 * int(kibibytes)


def _measure(way: str, size: int) -> int:
    """Return the result of :func:`peak_memory` for this process."""
    # Imported here, so that a Ctrl-C in the seconds that it takes is caught below.
    import torch
    from bags import Bag
    from digit_bags import N_FEATURES, DigitNetwork, draw_bags, loss_gradients

    from mtenn_core import registry

    torch.set_num_threads(1)
    _, bag = draw_bags(2, size, part=slice(None), seed=0)
    network = DigitNetwork(ENLARGE)
    combination = registry.create("gated_attention", n_features=N_FEATURES, readout=True)

    # Kernels and lazy imports are not what is measured, nor are the first calls of "recomputed",
    # which compare all saved tensors of the two runs.
    for _ in range(5):
        loss_gradients(network, combination, Bag(bag.conformers[:2], bag.label), way)
    (PROCESS / "clear_refs").write_text("5")  # the peak starts again from here
    before = _resident("VmRSS")
    loss_gradients(network, combination, bag, way)
    return _resident("VmHWM") - before


if __name__ == "__main__":
    try:
        print(_measure(sys.argv[1], int(sys.argv[2])))
    except KeyboardInterrupt:
        sys.exit(130)  # the process that started this one says so
