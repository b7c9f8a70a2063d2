"""A Python process that may die, hang or flood, and what it said until then."""

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

KEPT_OUTPUT = 2**16
LONGEST_WORD = 2**22
SHOWN_LINES = 8
SECONDS_BETWEEN_LOOKS = 0.05
SECONDS_TO_SAY_WHERE = 5.0

Send = Callable[[str, Any], None]


class ChildDiedError(Exception):
    """The child ended before it was done; the message says how, and what it printed last.

    Attributes
    ----------
    seconds : since its last word
    """

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(message)
        self.seconds = seconds


class Child:
    """A process that runs ``module.main``, told in JSON what to do, and whatever it starts.

    It speaks in words, a name and a content each, through a pipe of its own. Its standard output
    and error are kept, to be shown where it dies. At the end of the context it is killed, with all
    processes of its group.

    Parameters
    ----------
    module : whose ``main(job, send)`` does it
    time_limit : in seconds, from the word ``"ready"`` to ``"done"``
    time_limit_of_step : in seconds, from one word to the next

    Attributes
    ----------
    seconds : how long it ran, from the word ``"ready"`` on
    """

    def __init__(
        self, module: str, job: Any, *, time_limit: float, time_limit_of_step: float
    ) -> None:
        self.seconds = 0.0
        self._time_limit = time_limit
        self._time_limit_of_step = time_limit_of_step
        self._ready: float | None = None
        self._last_word = time.monotonic()
        self._token = secrets.token_hex(8)
        self._words, words_end = os.pipe()
        self._output, output_end = os.pipe()
        self._buffers = {self._words: bytearray(), self._output: bytearray()}
        self._selector = selectors.DefaultSelector()
        for file in self._buffers:
            self._selector.register(file, selectors.EVENT_READ)
        path = [os.path.abspath(entry) for entry in sys.path if isinstance(entry, str)]
        # As its input: an argument has a limit.
        with tempfile.TemporaryFile("w+") as told:
            json.dump([path, job], told)
            told.seek(0)
            self._process = subprocess.Popen(
                # -P: the folder that the shell is in may have a random.py.
                [sys.executable, "-P", "-u", "-m", __name__, module, str(words_end), self._token],
                stdin=told,
                stdout=output_end,
                stderr=output_end,
                pass_fds=[words_end],
                start_new_session=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
            )
        os.close(words_end)
        os.close(output_end)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._ready is not None:
            self.seconds = time.monotonic() - self._ready
        self._kill()
        self._process.wait()
        self._selector.close()
        for file in self._buffers:
            os.close(file)

    def words(self) -> Iterator[tuple[str, Any]]:
        """Yield each word; the last is ``"done"``.

        Raises
        ------
        ChildDiedError : it ended before it was done, or took too long
        """
        while True:
            dead = self._process.poll() is not None
            if dead:
                self._kill()  # what it has started may hold the pipes open
            anything = self._read(0 if dead else SECONDS_BETWEEN_LOOKS)
            for kind, content in self._complete_words():
                self._last_word = time.monotonic()
                if kind == "ready":
                    self._ready = self._last_word
                yield kind, content
                if kind == "done":
                    return
            if dead and not anything:
                raise self._death(_ending(self._process.returncode))
            self._check_time()

    def _read(self, timeout: float) -> bool:
        """Wait for output and keep it; return whether there was any."""
        ready = self._selector.select(timeout)
        for key, _ in ready:
            chunk = os.read(key.fd, 2**16)
            if not chunk:
                self._selector.unregister(key.fd)
            self._buffers[key.fd] += chunk
            kept = LONGEST_WORD if key.fd == self._words else KEPT_OUTPUT
            del self._buffers[key.fd][:-kept]
        return bool(ready)

    def _complete_words(self) -> Iterator[tuple[str, Any]]:
        buffer = self._buffers[self._words]
        if b"\n" not in buffer:
            return
        *lines, rest = buffer.split(b"\n")
        buffer[:] = rest
        token = self._token.encode()
        for line in lines:
            if line.startswith(token):  # a plugin may write to any file that is open
                kind, content = json.loads(line.removeprefix(token))
                yield kind, content

    def _check_time(self) -> None:
        if self._ready is None:  # Python and torch: as long as they need
            return
        now = time.monotonic()
        step, whole = now - self._last_word, now - self._ready
        if step > self._time_limit_of_step:
            how = f"did not end within {self._time_limit_of_step:g} s"
        elif whole > self._time_limit:
            how = f"did not end within {step:.2g} s, and then the time for all was over"
        else:
            return
        self._process.send_signal(signal.SIGABRT)  # faulthandler prints where it is
        while self._process.poll() is None and time.monotonic() < now + SECONDS_TO_SAY_WHERE:
            self._read(SECONDS_BETWEEN_LOOKS)
        raise self._death(how)

    def _kill(self) -> None:
        with suppress(ProcessLookupError, PermissionError):  # macOS says the latter of the dead
            os.killpg(self._process.pid, signal.SIGKILL)

    def _death(self, how: str) -> ChildDiedError:
        seconds = time.monotonic() - self._last_word
        self._kill()
        for _ in range(2**8):  # not for ever: a process outside its group may print on
            if not self._read(0):
                break
        printed = self._buffers[self._output].decode(errors="replace")
        return ChildDiedError("\n".join([how, *_last_lines(printed)]), seconds)


def main() -> None:
    """Be the child: do the job, and end without what a plugin does at the exit."""
    module, number, token = sys.argv[1:]
    del sys.argv[1:]
    path, job = json.load(sys.stdin)
    # Whole: one with a colon in it is two in the environment.
    sys.path += [entry for entry in path if entry not in sys.path]
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.set_inheritable(int(number), False)
    words = os.fdopen(int(number), "w")
    pid = os.getpid()
    # A file number of its own: a plugin may close standard error.
    faulthandler.enable(os.dup(2), all_threads=False)

    def send(kind: str, content: Any) -> None:
        if os.getpid() != pid:
            os._exit(1)  # a plugin has forked, and its copy of this process came back
        words.write(f"\n{token}{json.dumps([kind, content], default=repr)}\n")
        words.flush()

    importlib.import_module(module).main(job, send)
    send("done", None)
    os._exit(0)


def limit_memory(mebibytes: int) -> bool:
    """Let this process take so much more memory, and dump no core; return whether it is limited."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + mebibytes * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    except (OSError, ValueError):
        return False
    return True


def _ending(returncode: int) -> str:
    if returncode >= 0:
        return f"exited with {returncode} before it was done"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = f"signal {-returncode}"
    return f"killed by {name}"


def _last_lines(printed: str) -> list[str]:
    _, fatal, trace = printed.rpartition("Fatal Python error")
    lines = [line for line in (fatal + trace).splitlines() if line.strip()]
    lines = [line for line in lines if "importlib" not in line]
    shown = lines[:SHOWN_LINES] if fatal else lines[-SHOWN_LINES:]
    return ["  " + "".join(c if c.isprintable() else " " for c in line[:200]) for line in shown]


if __name__ == "__main__":
    main()
