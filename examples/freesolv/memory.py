"""Peak memory of one gradient, measured in a separate process that runs this file."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

PROCESS = Path("/proc/self")


def peak_memory(way: str, smiles: str, n_conformers: int, *, threads: int) -> int | None:
    """Return the peak bytes of one gradient of one molecule; None if they cannot be measured.

    Parameters
    ----------
    way : ``gradients.PLAIN`` or one of ``gradients.MODES``
    """
    if not (PROCESS / "clear_refs").exists():
        return None
    # A fixed threshold: glibc otherwise raises it as it goes, freed blocks stay in the process, and
    # the peak depends on the order of the allocations.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    numbers = map(str, (n_conformers, threads))
    command = [sys.executable, __file__, way, smiles, *numbers]
    child = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return int(child.stdout)


def _resident(field: str) -> int:
    """Return VmRSS (now) or VmHWM (peak) of this process, in bytes.

    ``getrusage`` does not work here: on Linux, a child's ru_maxrss starts at its parent's peak.
    """
    status = (PROCESS / "status").read_text()
    (kibibytes,) = re.findall(rf"^{field}:\s+(\d+) kB$", status, flags=re.MULTILINE)
    return 1024 * int(kibibytes)


def _measure(way: str, smiles: str, n_conformers: int, threads: int) -> int:
    """Return the result of :func:`peak_memory` for this process."""
    # Imported here, so that a Ctrl-C in the seconds that it takes is caught below.
    import torch
    from conformers import Conformer, Measurement, Molecule, embed, graphs
    from gradients import loss_gradients
    from pose_model import ConformerSchNet
    from training import COMBINATIONS

    from mtenn_core import registry

    torch.set_num_threads(threads)
    conformers = graphs(embed(smiles, n_conformers, threads=threads))
    measurement = Measurement("", smiles, 0.0, 0.0)
    pose_model = ConformerSchNet(0.0, 1.0)
    combination = registry.create("boltzmann", **COMBINATIONS["boltzmann"])

    def gradient(poses: tuple[Conformer, ...]) -> None:
        loss_gradients(pose_model, combination, [Molecule(measurement, 0, poses)], way)

    gradient(conformers[:2])  # threads, kernels and lazy imports are not what is measured
    (PROCESS / "clear_refs").write_text("5")  # the peak starts again from here
    before = _resident("VmRSS")
    gradient(conformers)
    return _resident("VmHWM") - before


if __name__ == "__main__":
    try:
        print(_measure(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])))
    except KeyboardInterrupt:
        sys.exit(130)  # the process that started this one says so
