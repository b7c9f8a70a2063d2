"""Files of distributions, which are read only if they are regular files, no pipes or devices."""

from __future__ import annotations

import os
import stat
from io import BufferedReader


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """Open a file for reading.

    Raises
    ------
    OSError : it does not exist, or it is no regular file
    """
    file = open(path, "rb", opener=_open_without_waiting)  # noqa: SIM115 - the caller closes it
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(f"{os.fspath(path)} is not a regular file")
    return file


def is_special(path: str) -> bool:
    """Return True for pipes, devices and sockets, which have no end or make a reader wait."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _open_without_waiting(path: str, flags: int) -> int:
    # Without this flag, open() itself waits until another process writes into the pipe.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
