"""Time or memory of the steps of a case, measured in a fresh process that runs this file."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from engine_cases import Case, Setup, Step

PROCESS = Path("/proc/self")
# glibc raises these thresholds as it goes, freed blocks then stay in the process, and the peak
# depends on the order of the allocations.
PINNED = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
}
# Settings of the allocator, by name. Another allocator is preloaded by its path.
DEFAULTS, THRESHOLD = "defaults", "threshold"
SETTINGS = {
    DEFAULTS: {},
    THRESHOLD: {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
}
# Of many poses, the small blocks of the graphs that stay lie between the holes that larger blocks
# left. With this threshold, the larger blocks leave no holes.
NO_HOLES = "no holes"
ALL_SETTINGS = {**SETTINGS, NO_HOLES: {**PINNED, "MALLOC_MMAP_THRESHOLD_": "16384"}}
ALLOCATOR_VARIABLES = (*PINNED, "MALLOC_TOP_PAD_", "GLIBC_TUNABLES", "LD_PRELOAD")
MIN_ROUNDS, MAX_ROUNDS = 3, 25


def measure(
    what: str,
    case: Case,
    ways: Sequence[str],
    checkout: Path | None = None,
    *,
    allocator: str = "",
    **options: Any,
) -> Any:
    """Return the figures from a fresh process, or None if it was killed or failed.

    Parameters
    ----------
    what : ``"times"``, ``"peak"``, ``"training"``, ``"differences"``, ``"estimated"`` or
        ``"thousand_steps"``, a function of this file
    checkout : folder whose ``mtenn_core`` is measured; None is the installed one
    allocator : a key of :data:`ALL_SETTINGS`, or the path of a library to preload; by default, the
        allocator is pinned for all but times
    options : ``threads`` for all functions, and the other arguments of the function
    """
    asked = {"what": what, "case": asdict(case), "ways": list(ways), **options}
    pinned = PINNED if what != "times" else {}
    command, environment = process(asked, checkout)
    if allocator:
        pinned = ALL_SETTINGS.get(allocator, {"LD_PRELOAD": allocator})
        environment = {k: v for k, v in environment.items() if k not in ALLOCATOR_VARIABLES}
    done = subprocess.run(command, env=environment | pinned, stdout=subprocess.PIPE, check=False)
    return json.loads(done.stdout) if done.returncode == 0 else None


def process(asked: dict[str, Any], checkout: Path | None) -> tuple[list[str], dict[str, str]]:
    """Return the command and the environment of a process that runs this file."""
    environment = dict(os.environ)
    if checkout is not None:
        asked = {**asked, "checkout": str(checkout)}
        environment["PYTHONPATH"] = str(checkout)  # it comes before installed packages
    return [sys.executable, __file__, json.dumps(asked)], environment


class Worker:
    """A process that keeps the models and poses of one case, and runs steps when it is asked to."""

    def __init__(self, checkout: Path) -> None:
        self.checkout = checkout
        command, environment = process({"what": "serve", "threads": 1}, checkout)
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, env=environment, stdin=pipe, stdout=pipe, text=True
        )

    def send(self, what: str, *arguments: Any) -> None:
        """Ask for a call of a method of :class:`Server`."""
        try:
            print(json.dumps([what, *arguments]), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            self._fail()

    def receive(self) -> Any:
        """Return the value that the method returned."""
        line = self._process.stdout.readline()
        if not line:
            self._fail()
        return json.loads(line)

    def ask(self, what: str, *arguments: Any) -> Any:
        """Send and receive."""
        self.send(what, *arguments)
        return self.receive()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _fail(self) -> NoReturn:
        raise SystemExit(f"The process that measures {self.checkout} failed. See its error above.")


def times(setup: Setup, ways: Sequence[str], seconds: float) -> dict[str, Any]:
    """Return the seconds of each way in each round; the ways take turns, so that noise hits all.

    The key ``"n_weights"`` has the number of nonzero weights.
    """
    steps = {way: setup.steps()[way] for way in ways}
    check(setup, steps)
    taken: dict[str, list[float]] = {way: [] for way in ways}
    # What others run does not count where one thread does all, and no thread waits for another.
    clock = time.process_time if threads() == 1 else time.perf_counter
    order, begin = list(ways), time.perf_counter()
    for n in range(MAX_ROUNDS):
        if n >= MIN_ROUNDS and time.perf_counter() - begin > seconds:
            break
        for way in order:
            setup.clear()
            start = clock()
            steps[way]()
            taken[way].append(clock() - start)
        order = order[1:] + order[:1]
    return {**taken, "n_weights": setup.n_weights}


def threads() -> int:
    import torch

    return torch.get_num_threads()


class Server:
    """The other end of a :class:`Worker`."""

    def set_up(self, case: dict[str, Any], ways: Sequence[str]) -> None:
        """Take a case instead of the last one, and check that all ways give the same gradients."""
        from engine_cases import Case, Setup

        self._setup = Setup(Case(**case))
        self._steps = {way: self._setup.steps()[way] for way in ways}
        check(self._setup, self._steps)

    def seconds(self, way: str, at_least: float) -> float:
        """Return the CPU seconds of a step: the mean over the steps that fill a time."""
        begin, n_steps, taken = time.process_time(), 0, 0.0
        while taken < at_least:
            self._setup.clear()
            self._steps[way]()
            n_steps += 1
            taken = time.process_time() - begin
        return taken / n_steps

    def serve(self, lines: IO[str]) -> None:
        """Answer each line with a line."""
        for line in lines:
            what, *arguments = json.loads(line)
            print(json.dumps(getattr(self, what)(*arguments)), flush=True)


def check(setup: Setup, steps: dict[str, Step]) -> None:
    """Raise unless all ways give the same gradients; this also warms them up."""
    expected = None
    for way, step in steps.items():
        setup.clear()
        step()
        found = [p.grad for p in setup.params]
        if found[0] is None:
            continue  # not a training step
        expected = expected or found
        for gradient, reference in zip(found, expected, strict=True):
            error = (gradient - reference).abs().max() / reference.abs().max().clamp(min=1e-30)
            if not error < 1e-3:
                raise SystemExit(f"{setup.case}: {way} is off by {error:.1e}")


def peak(setup: Setup, ways: Sequence[str]) -> int | None:
    """Return the peak bytes of one step, minus the bytes that the process had before it.

    It measures the first step after a small one. Graphs consist of small blocks. Later steps reuse
    the small blocks of the step before, and would not count them.
    """
    from mtenn_core._engine.gradient_buffers import forget_memory

    (way,) = ways
    if not (PROCESS / "clear_refs").exists():
        return None
    small_step(setup, way)
    forget_memory(setup.pose_model)  # "stored" would begin with the buffer of the small step
    step = setup.steps()[way]
    (PROCESS / "clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


def training(setup: Setup, ways: Sequence[str], n_steps: int) -> dict[str, float] | None:
    """Return the peak bytes of a few steps, minus the bytes before, and the seconds of the last.

    The seconds are CPU time, also that of the operating system, which provides fresh memory.
    """
    (way,) = ways
    if not (PROCESS / "clear_refs").exists():
        return None
    small_step(setup, way)
    step = setup.steps()[way]
    (PROCESS / "clear_refs").write_text("5")
    before = resident("VmRSS")
    for _ in range(n_steps):
        setup.clear()
        start = time.process_time()
        step()
        seconds = time.process_time() - start
    return {"peak": resident("VmHWM") - before, "seconds": seconds}


def small_step(setup: Setup, way: str) -> None:
    """Run a step of two small poses, which loads all libraries."""
    warm_up = [(types[:4], positions[:4]) for types, positions in setup.poses[:2]]
    setup.steps(warm_up)[way]()
    setup.clear()


def differences(setup: Setup, ways: Sequence[str], dtype: str) -> dict[str, float]:
    """Return the largest difference of the loss and of all gradients from those of the first way.

    Each tensor's difference is relative to its largest number.

    Parameters
    ----------
    dtype : of the pose model and of the poses, a name in torch
    """
    import torch

    setup.to(getattr(torch, dtype))
    found = []
    for way in ways:
        setup.clear()
        loss = setup.steps()[way]()
        found.append([loss, *(p.grad for p in setup.params)])

    def difference(tensor: Any, reference: Any) -> float:
        return float((tensor - reference).abs().max() / reference.abs().max())

    return {
        way: max(map(difference, tensors, found[0]))
        for way, tensors in zip(ways, found, strict=True)
    }


def estimated(setup: Setup, ways: Sequence[str]) -> dict[str, int]:
    """Return the bytes that ``MultiPoseModel.estimate`` expects for each mode."""
    given = {"shared_inputs": setup.pockets} if setup.shared else {}
    found = setup.model().estimate(setup.poses, setup.case.sizes, **given)
    return {cost.gradients: cost.memory for cost in found.modes if cost.gradients in ways}


def thousand_steps(setup: Setup, ways: Sequence[str]) -> list[int]:
    """Return the bytes of the process after 100 steps and after 1,000."""
    (way,) = ways
    step, found = setup.steps()[way], []
    for n in range(1, 1001):
        setup.clear()
        step()
        if n in (100, 1000):
            found.append(resident("VmRSS"))
    return found


def resident(field: str) -> int:
    """Return VmRSS (now) or VmHWM (peak) of this process, in bytes.

    ``getrusage`` does not work here: on Linux, a child's ru_maxrss starts at its parent's peak.
    """
    status = (PROCESS / "status").read_text()
    (kibibytes,) = re.findall(rf"^{field}:\s+(\d+) kB$", status, flags=re.MULTILINE)
    return 1024 * int(kibibytes)


def main(asked: dict[str, Any]) -> None:
    """Run the measurement that the parent asks for, and print it as JSON."""
    if "checkout" in asked:
        check_package(Path(asked.pop("checkout")))
    import torch
    from engine_cases import Case, Setup

    torch.set_num_threads(asked.pop("threads"))
    what = asked.pop("what")
    if what == "serve":
        return Server().serve(sys.stdin)
    case = Case(**asked.pop("case"))
    print(json.dumps(globals()[what](Setup(case), **asked)))


def check_package(checkout: Path) -> None:
    """Raise unless the ``mtenn_core`` of this process is that of a folder."""
    import mtenn_core

    found = Path(mtenn_core.__file__).resolve().parent
    if found != checkout.resolve() / "mtenn_core":
        raise SystemExit(f"mtenn_core must come from {checkout}; it was imported from {found}.")


if __name__ == "__main__":
    try:
        main(json.loads(sys.argv[1]))
    except KeyboardInterrupt:
        sys.exit(130)  # the process that started this one says so
