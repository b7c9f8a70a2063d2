"""Ctrl-C in a block that must not stop halfway, in a second run, and in an inner backward."""

import contextlib
import copy
import signal
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn

from mtenn_core import Combination, MultiPoseModel
from mtenn_core._process.interrupts import delayed_interrupts


@pytest.fixture(autouse=True)
def _interrupts():
    """Handle Ctrl-C as Python does. A shell may start the tests with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def steps_until_interrupted(n_interrupts: int) -> list[str]:
    """Return the steps of a delayed block that run before a KeyboardInterrupt."""
    steps = []
    with contextlib.suppress(KeyboardInterrupt):
        with delayed_interrupts():
            for number in range(n_interrupts):
                interrupt()
                steps.append(f"after interrupt {number}")
            steps.append("end")
        steps.append("after the block")
    return steps


@pytest.mark.parametrize(
    ("n_interrupts", "steps"),
    [
        (0, ["end", "after the block"]),
        (1, ["after interrupt 0", "end"]),
        (2, ["after interrupt 0"]),
    ],
)
def test_the_first_interrupt_waits_for_the_end_and_the_second_does_not(n_interrupts, steps):
    assert steps_until_interrupted(n_interrupts) == steps


def test_blocks_may_be_nested():
    steps = []
    with pytest.raises(KeyboardInterrupt), delayed_interrupts():  # noqa: PT012
        with delayed_interrupts():
            interrupt()
            steps.append("inner block")
        steps.append("outer block")
    assert steps == ["inner block", "outer block"]


def test_a_handler_of_the_user_gets_the_interrupt():
    received = []
    signal.signal(signal.SIGINT, lambda number, frame: received.append((number, frame)))
    try:
        with delayed_interrupts():
            interrupt()
            assert received == []
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    ((number, frame),) = received
    assert number == signal.SIGINT
    assert frame is not None


def test_ignored_interrupts_stay_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with delayed_interrupts():
            interrupt()
            interrupt()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_an_error_in_the_block_ends_the_delay():
    with pytest.raises(ValueError, match="wrong"), delayed_interrupts():
        raise ValueError("wrong")


def test_other_threads_change_no_handler():
    handlers = []

    def run() -> None:
        with delayed_interrupts():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert handlers == [signal.default_int_handler]


class Mean(Combination):
    def combine(self, predictions):
        return predictions.mean()


class Changing(nn.Module):
    """Draws random numbers, and changes a buffer and plain attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1)).double()
        self.layers[2].bias.requires_grad_(False)
        self.register_buffer("largest", torch.zeros((), dtype=torch.float64))
        self.n_runs, self.seen = 0, []

    def forward(self, pose):
        self.n_runs += 1
        self.seen.append(self.n_runs)
        self.largest = torch.maximum(self.largest, pose.abs().max())
        return self.layers(pose)


def state_of(module: nn.Module) -> dict[str, object]:
    """Return the state that a second run changes for a moment."""
    return {
        "buffers": {n: (id(b), b._version, b.tolist()) for n, b in module.named_buffers()},
        "parameters": {n: (id(p), p._version) for n, p in module.named_parameters()},
        "training": [m.training for m in module.modules()],
        "requires_grad": [p.requires_grad for p in module.parameters()],
        "attributes": (module.n_runs, list(module.seen)),
        "hooks": [dict(p._backward_hooks or {}) for p in module.parameters()],
        "random state": torch.get_rng_state().tolist(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "grad": torch.is_grad_enabled(),
        "handler": signal.getsignal(signal.SIGINT),
    }


@pytest.mark.parametrize("n_interrupts", [1, 2])
def test_an_interrupt_in_a_second_run_leaves_the_state_as_it_was(poses, n_interrupts):
    pose_model = Changing()
    model = MultiPoseModel(pose_model, Mean(), gradients="recomputed")
    with torch.autocast("cpu", enabled=False):
        prediction = model(poses).prediction
    # All that a second run restores differs from the first run.
    pose_model.eval()
    pose_model.layers[0].requires_grad_(False)
    pose_model.layers[2].bias.requires_grad_(True)
    pose_model.largest = torch.tensor(100.0, dtype=torch.float64)
    inside = []

    def stop() -> None:
        inside.append(pose_model.training)
        for _ in range(n_interrupts):
            interrupt()
        inside.append("went on")

    pose_model.register_forward_hook(lambda *_: stop())
    before = state_of(pose_model)
    with pytest.raises(KeyboardInterrupt):
        prediction.backward()
    assert inside == [True, "went on"][: 3 - n_interrupts]
    assert state_of(pose_model) == before


def test_a_backward_after_an_interrupt_is_right(poses):
    found = []
    for interrupted in (False, True):
        torch.manual_seed(0)
        model = MultiPoseModel(Changing(), Mean(), gradients="recomputed")
        prediction = model(poses).prediction
        if interrupted:
            hook = model.pose_model.register_forward_hook(lambda *_: interrupt())
            with pytest.raises(KeyboardInterrupt):
                prediction.backward()
            hook.remove()
            model.zero_grad()
        prediction.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)  # the same operations


def call_in_backward(module: nn.Module, call: Callable[[], None]):
    """Call a function when backward comes to the output of a module."""
    return module.register_forward_hook(
        lambda module, given, out: out.register_hook(lambda gradient: call()) and None
    )


@pytest.mark.parametrize("hooked", [False, True], ids=["no hooks", "hooks"])
def test_an_interrupt_in_the_inner_backward_of_stored_leaves_hooks_as_they_were(poses, hooked):
    pose_model, calls = Changing().eval(), []
    if hooked:
        for param in pose_model.parameters():
            if param.requires_grad:
                param.register_hook(calls.append)
    reached = []
    first, last = pose_model.layers[0], pose_model.layers[2]
    stopping = call_in_backward(last, interrupt)
    going_on = call_in_backward(first, lambda: reached.append(1))
    model = MultiPoseModel(pose_model, Mean(), gradients="stored")
    before = state_of(pose_model)
    with pytest.raises(KeyboardInterrupt):
        model(poses)
    after = state_of(pose_model)
    for changes in ("buffers", "attributes"):  # the first run has changed them
        del before[changes], after[changes]
    assert after == before
    assert calls == []
    assert len(reached) == hooked  # the backward of the pose ends only if hooks are muted
    stopping.remove()
    going_on.remove()
    expected = copy.deepcopy(pose_model)
    model(poses).prediction.backward()
    MultiPoseModel(expected, Mean())(poses).prediction.backward()
    for param, other in zip(pose_model.parameters(), expected.parameters(), strict=True):
        if param.requires_grad:
            # The same float64 products, added up in another order.
            torch.testing.assert_close(param.grad, other.grad, rtol=1e-12, atol=1e-13)
    assert len(calls) == 3 * hooked


def test_an_interrupt_that_ends_the_process_ends_it_after_the_block():
    """Signal handler SIG_DFL, as in a process that a shell script starts and that resets it."""
    code = (
        "import signal\n"
        "from mtenn_core._process.interrupts import delayed_interrupts\n"
        "signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
        "with delayed_interrupts():\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "    print('end of block', flush=True)\n"
        "print('after the block', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("end of block\n", -signal.SIGINT)


def test_a_handler_that_python_did_not_install_stays(monkeypatch):
    """Python cannot put such a handler back. It reports None for it."""
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    monkeypatch.setattr(signal, "signal", None)
    with delayed_interrupts():
        pass
    monkeypatch.undo()
