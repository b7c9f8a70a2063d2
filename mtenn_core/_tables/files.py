"""New files that are complete or absent, whatever happens meanwhile."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mtenn_core._tables.rows import table_error


def check_writable(path: Path, inputs: Path, *, replace: bool) -> None:
    """Raise an error, before any work, if a file cannot be written.

    Parameters
    ----------
    inputs : the table that is read
    replace : True to replace a file that exists
    """
    problem = ""
    if path.exists() and inputs.exists() and path.samefile(inputs):
        problem = "the output must be another file than the table itself"
    elif path.is_dir():
        problem = "the output must be a file; found a folder"
    elif path.exists() and not replace:
        problem = "the file already exists. Choose another name, or replace it with --force"
    elif not path.parent.is_dir():
        problem = f"there is no folder {str(path.parent)!r}. Create it, or name another folder"
    elif not os.access(path.parent, os.W_OK):
        problem = f"cannot write into the folder {str(path.parent)!r}. Name another folder"
    if problem:
        raise table_error(path, None, None, problem, "line")


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a path for writing, and rename it at the end. After an error, it is removed."""
    # In the same folder, because only there a file is renamed in one step. The suffix stays last,
    # since it tells matplotlib the format.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException as problem:  # Ctrl-C, too
        with suppress(OSError):
            temporary.unlink()
        if isinstance(problem, OSError):
            message = f"the file cannot be written: {problem.strerror or problem}"
            raise table_error(path, None, None, message, "line") from problem
        raise
