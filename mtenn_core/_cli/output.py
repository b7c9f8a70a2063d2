"""Output of all commands: JSON, errors, and a standard output to which plugins do not write."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import wraps
from typing import TYPE_CHECKING, Any, TextIO

import click

from mtenn_core._process.printable import error_message, printable
from mtenn_core.errors import MtennError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")


def errors_to_exit_code(command: Callable[..., None]) -> Callable[..., None]:
    """Print an error of mtenn-core, as JSON if the user asked for it, and exit with 1."""

    @wraps(command)
    def wrapped(as_json: bool, **kwargs: Any) -> None:
        try:
            command(as_json=as_json, **kwargs)
        except MtennError as error:
            if as_json:
                print_json({"error": error_to_json(error)})
            else:
                echo(f"error: {error_text(error)}", err=True)
            sys.exit(1)

    return wrapped


def error_to_json(error: BaseException) -> dict[str, str]:
    """Return the type and the message of an error as JSON data."""
    return {"type": type(error).__name__, "message": error_text(error)}


def error_text(error: BaseException) -> str:
    """Return the message of an error, followed by its notes."""
    return "\n".join([error_message(error), *getattr(error, "__notes__", ())])


def echo(message: str, *, file: TextIO | None = None, err: bool = False) -> None:
    """Print text that may come from a plugin. Control characters become escape sequences."""
    # Name the file, because click by itself would write UTF-8 to a terminal that only knows ASCII.
    click.echo(printable(message), file=file or (sys.stderr if err else sys.stdout))


def cell(value: object, style: str = "") -> Text:
    """Return text for a console, in which control characters are escape sequences."""
    from rich.text import Text  # lazy, because most commands print no table

    return Text(printable("" if value is None else str(value)), style)


def encode_all_text() -> None:
    """Write characters that the encoding of a terminal lacks as escape sequences."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_json(value: Any, file: TextIO | None = None) -> None:
    """Print a JSON document."""
    click.echo(json.dumps(value, indent=2, allow_nan=False), file=file)


def console(file: TextIO | None = None) -> Console:
    """Return a console for tables, by default on standard output."""
    from rich.console import Console

    class Plain(Console):
        def on_broken_pipe(self) -> None:
            raise  # the command group handles this error for all commands

    file = file or sys.stdout
    to_terminal = file is not None and file.isatty()
    # Names and paths are not markup, and numbers in them need no color. Lines in a file or pipe are
    # not folded, so that a program can search them.
    width = None if to_terminal or "COLUMNS" in os.environ else 1000
    return Plain(file=file, highlight=False, markup=False, soft_wrap=not to_terminal, width=width)


@contextmanager
def separate_stdout() -> Iterator[TextIO]:
    """Yield standard output for the command. The output of plugins goes to standard error.

    The redirection lasts until the process ends, because C code may write buffered output at exit.
    """
    _open_standard_files()
    stdout: TextIO | None = sys.stdout
    if stdout is None:
        # The shell has closed standard output. The command still returns its exit code.
        stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    if not _is_file_1(stdout):
        with redirect_stdout(sys.stderr):
            yield stdout
        return
    stdout.flush()
    separate = os.fdopen(os.dup(1), "w", encoding=stdout.encoding, errors=stdout.errors)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    try:
        yield separate
        separate.flush()
    except OSError:
        discard(separate.fileno())
        raise


def discard(number: int) -> None:
    """Discard the remaining output of a file, because Python would fail to write it at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)


def _is_file_1(file: TextIO) -> bool:
    """Return True for standard output of the process, and False for a file that captures it."""
    try:
        return file.fileno() == 1
    except OSError:
        return False


def _open_standard_files() -> None:
    """Open the file descriptors 0 to 2 if they are closed, so that no other file gets them."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
