"""A child process that may crash, hang or print without end, and its messages."""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

MAX_OUTPUT_BYTES = 2**16  # the last bytes of standard output and error
MAX_MESSAGE_BYTES = 2**22
MAX_SHOWN_LINES = 8
POLL_INTERVAL = 0.05  # seconds
TRACEBACK_TIMEOUT = 5.0  # seconds in which a process that hangs may print its traceback
START_TIMEOUT = 60.0  # seconds in which the interpreter must start, without the import of torch

_NO_INTERPRETER = "sys.executable must be a Python interpreter with mtenn-core; found {!r}"

Send = Callable[[str, Any], None]


class ChildDiedError(Exception):
    """The child ended early. The message contains the cause and the last lines of its output.

    Attributes
    ----------
    seconds : time from the last message of the child to its end
    """

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(message)
        self.seconds = seconds


class Child:
    """A subprocess and its children. It takes a JSON job and sends (kind, content) messages.

    The messages come through a separate pipe. The last part of the child's standard output and
    error is kept, and it is shown if the child dies. When the context ends, all processes of the
    child's group are killed.

    Parameters
    ----------
    module : name of the module whose ``main(job, send)`` runs in the child
    job : JSON data for ``main``
    time_limit : time in seconds from the message ``"ready"`` to ``"done"``
    step_time_limit : time in seconds from one message to the next

    Attributes
    ----------
    seconds : time from the message ``"ready"`` to the end of the context
    is_ready : True after the message ``"ready"``. If the child dies before, no plugin is the cause

    Raises
    ------
    ChildDiedError : ``sys.executable`` cannot be started
    """

    def __init__(self, module: str, job: Any, *, time_limit: float, step_time_limit: float) -> None:
        _check_interpreter()
        self.seconds = 0.0
        self._time_limit = time_limit
        self._step_time_limit = step_time_limit
        self._ready_time: float | None = None
        self._has_started = False
        self._start_time = self._last_message_time = time.monotonic()
        self._token = secrets.token_hex(8)
        self._messages, messages_end = os.pipe()
        self._output, output_end = os.pipe()
        self._buffers = {self._messages: bytearray(), self._output: bytearray()}
        self._selector = selectors.DefaultSelector()
        for file in self._buffers:
            self._selector.register(file, selectors.EVENT_READ)
        path = [os.path.abspath(entry) for entry in sys.path if isinstance(entry, str)]
        # The job is sent through standard input, because the length of an argument is limited.
        with tempfile.TemporaryFile("w+") as job_file:
            json.dump([path, job], job_file)
            job_file.seek(0)
            self._process = subprocess.Popen(
                # Use -P, because a file in the working directory may hide a standard module.
                [
                    *(sys.executable, "-P", "-u", "-m", __name__),
                    *(module, str(messages_end), self._token),
                ],
                stdin=job_file,
                stdout=output_end,
                stderr=output_end,
                pass_fds=[messages_end],
                start_new_session=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
            )
        os.close(messages_end)
        os.close(output_end)

    @property
    def is_ready(self) -> bool:
        return self._ready_time is not None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._ready_time is not None:
            self.seconds = time.monotonic() - self._ready_time
        self._kill()
        self._process.wait()
        self._selector.close()
        for file in self._buffers:
            os.close(file)

    def messages(self) -> Iterator[tuple[str, Any]]:
        """Yield each message. The last is ``"done"``.

        Raises
        ------
        ChildDiedError : the child ended early, or took too long
        """
        while True:
            is_dead = self._process.poll() is not None
            if is_dead:
                self._kill()  # the child may have started processes that keep the pipes open
            has_output = self._read(0 if is_dead else POLL_INTERVAL)
            for kind, content in self._complete_messages():
                self._last_message_time = time.monotonic()
                if kind == "started":
                    self._has_started = True
                    continue
                if kind == "ready":
                    self._ready_time = self._last_message_time
                yield kind, content
                if kind == "done":
                    return
            if is_dead and not has_output:
                raise self._death(_exit_cause(self._process.returncode))
            self._check_time()

    def _read(self, timeout: float) -> bool:
        """Wait for output and keep it. Return True if there was any output."""
        ready = self._selector.select(timeout)
        for key, _ in ready:
            chunk = os.read(key.fd, 2**16)
            if not chunk:
                self._selector.unregister(key.fd)
            self._buffers[key.fd] += chunk
            max_bytes = MAX_MESSAGE_BYTES if key.fd == self._messages else MAX_OUTPUT_BYTES
            del self._buffers[key.fd][:-max_bytes]
        return bool(ready)

    def _complete_messages(self) -> Iterator[tuple[str, Any]]:
        buffer = self._buffers[self._messages]
        if b"\n" not in buffer:
            return
        *lines, rest = buffer.split(b"\n")
        buffer[:] = rest
        token = self._token.encode()
        for line in lines:
            if line.startswith(token):  # a plugin may write to any open file
                kind, content = json.loads(line.removeprefix(token))
                yield kind, content

    def _check_time(self) -> None:
        now = time.monotonic()
        if not self._has_started and now - self._start_time > START_TIMEOUT:
            raise self._death(f"it was silent for {START_TIMEOUT:g} s")
        if self._ready_time is None:  # the import of torch has no time limit
            return
        step, total = now - self._last_message_time, now - self._ready_time
        if step > self._step_time_limit:
            cause = f"did not end within {self._step_time_limit:g} s"
        elif total > self._time_limit:
            cause = f"did not end within {step:.2g} s, and the total time limit was reached"
        else:
            return
        self._process.send_signal(signal.SIGABRT)  # faulthandler prints the traceback
        while self._process.poll() is None and time.monotonic() < now + TRACEBACK_TIMEOUT:
            self._read(POLL_INTERVAL)
        raise self._death(cause)

    def _kill(self) -> None:
        with suppress(ProcessLookupError, PermissionError):  # macOS: PermissionError if it is dead
            os.killpg(self._process.pid, signal.SIGKILL)

    def _death(self, cause: str) -> ChildDiedError:
        seconds = time.monotonic() - self._last_message_time
        if not self._has_started:
            cause = f"{_NO_INTERPRETER.format(sys.executable)}; {cause}"
        self._kill()
        for _ in range(2**8):  # not forever, because a process outside the group may still print
            if not self._read(0):
                break
        output = self._buffers[self._output].decode(errors="replace")
        return ChildDiedError("\n".join([cause, *_last_lines(output)]), seconds)


def main() -> None:
    """Do the job in the child process, and exit without the exit handlers of plugins."""
    module, number, token = sys.argv[1:]
    del sys.argv[1:]
    path, job = json.load(sys.stdin)
    # PYTHONPATH is not enough, because an entry with a colon becomes two entries.
    sys.path += [entry for entry in path if entry not in sys.path]
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.set_inheritable(int(number), False)
    messages = os.fdopen(int(number), "w")
    pid = os.getpid()
    # Use a copy of the file descriptor, because a plugin may close standard error.
    faulthandler.enable(os.dup(2), all_threads=False)

    def send(kind: str, content: Any) -> None:
        if os.getpid() != pid:
            os._exit(1)  # a plugin called fork(), and this process is the copy
        messages.write(f"\n{token}{json.dumps([kind, content], default=repr)}\n")
        messages.flush()

    send("started", None)  # it shows that sys.executable is a Python interpreter
    importlib.import_module(module).main(job, send)
    send("done", None)
    os._exit(0)


def _check_interpreter() -> None:
    """Raise a ChildDiedError if ``sys.executable`` is certainly no Python interpreter."""
    # A frozen application would start itself again.
    if (
        getattr(sys, "frozen", False)
        or not sys.executable
        or not os.access(sys.executable, os.X_OK)
    ):
        raise ChildDiedError(_NO_INTERPRETER.format(sys.executable), 0.0)


def limit_memory(mebibytes: int) -> bool:
    """Limit the additional memory of this process, and switch core dumps off.

    Return True if the platform can limit memory.
    """
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + mebibytes * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    except (OSError, ValueError):
        return False
    return True


def _exit_cause(returncode: int) -> str:
    if returncode >= 0:
        return f"exited with {returncode} before it was done"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = f"signal {-returncode}"
    return f"killed by {name}"


def _last_lines(output: str) -> list[str]:
    """Return the last lines of the output, or the first lines of faulthandler's traceback."""
    _, fatal, trace = output.rpartition("Fatal Python error")
    lines = [line for line in (fatal + trace).splitlines() if line.strip()]
    lines = [line for line in lines if "importlib" not in line]
    shown = lines[:MAX_SHOWN_LINES] if fatal else lines[-MAX_SHOWN_LINES:]
    return ["  " + "".join(c if c.isprintable() else " " for c in line[:200]) for line in shown]


if __name__ == "__main__":
    main()
