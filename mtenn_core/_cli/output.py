"""Where the command's output goes, and what happens where it cannot go."""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from functools import wraps
from typing import TYPE_CHECKING, Any, TextIO

import click

from mtenn_core.errors import MtennError, PluginWarning

if TYPE_CHECKING:
    from rich.console import Console

INTERRUPTED = 128 + signal.SIGINT
CLOSED_PIPE = 128 + 13  # what a shell shows for SIGPIPE, which Windows has not


class Commands(click.Group):
    """Commands that end without a traceback on Ctrl-C, and where their output cannot be written."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Read the arguments, and print ``--help``."""
        with _exit_codes():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        with _exit_codes(), _plain_warnings():
            return super().invoke(ctx)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show warnings about plugins as a line each, without the line of code that a script has."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", PluginWarning)
        show = warnings.showwarning

        def show_plainly(message: Any, category: Any, *where: Any, **more: Any) -> None:
            if issubclass(category, PluginWarning):
                click.echo(f"warning: {message}", err=True)
            else:
                show(message, category, *where, **more)

        warnings.showwarning = show_plainly
        yield


def errors_to_exit_code(command: Callable[..., None]) -> Callable[..., None]:
    """Print an error of mtenn-core, as JSON where that was asked for, and exit with 1."""

    @wraps(command)
    def wrapped(as_json: bool, **kwargs: Any) -> None:
        try:
            command(as_json=as_json, **kwargs)
        except MtennError as error:
            if as_json:
                print_json({"error": error_to_json(error)})
            else:
                click.echo(f"error: {error_text(error)}", err=True)
            sys.exit(1)

    return wrapped


def error_to_json(error: Exception) -> dict[str, str]:
    """Return the type of an error and what it says."""
    return {"type": type(error).__name__, "message": error_text(error)}


def error_text(error: Exception) -> str:
    """Return what an error says, notes included."""
    return "\n".join([str(error), *getattr(error, "__notes__", ())])


def print_json(value: Any, file: TextIO | None = None) -> None:
    """Print for a script to read."""
    click.echo(json.dumps(value, indent=2, allow_nan=False), file=file)


def console(file: TextIO | None = None) -> Console:
    """Return what prints tables, to standard output if not elsewhere."""
    from rich.console import Console

    class Plain(Console):
        def on_broken_pipe(self) -> None:
            raise  # and exit as every other print does

    file = file or sys.stdout
    to_terminal = file is not None and file.isatty()
    # Names and paths are not markup, and numbers in them need no colour. What is no terminal has no
    # width: a line for each row can be searched.
    width = None if to_terminal or "COLUMNS" in os.environ else 1000
    return Plain(file=file, highlight=False, markup=False, soft_wrap=not to_terminal, width=width)


@contextmanager
def own_stdout() -> Iterator[TextIO]:
    """Yield standard output for the command alone: what plugins print goes to standard error.

    It does so until the process ends, since C code may write what it has buffered at the exit.
    """
    _open_standard_files()
    stdout: TextIO | None = sys.stdout
    if stdout is None:
        # Closed in the shell: the exit code still tells.
        stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    if not _is_file_1(stdout):
        with redirect_stdout(sys.stderr):
            yield stdout
        return
    stdout.flush()
    own = os.fdopen(os.dup(1), "w", encoding=stdout.encoding, errors=stdout.errors)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    try:
        yield own
        own.flush()
    except OSError:
        _discard(own.fileno())
        raise


def _is_file_1(file: TextIO) -> bool:
    """Whether ``file`` is that of the process, not one in which a caller captures the output."""
    try:
        return file.fileno() == 1
    except OSError:
        return False


def _open_standard_files() -> None:
    """Let no file that is opened later have a number that is taken for standard output."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)


@contextmanager
def _exit_codes() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # whoever reads has seen enough
        _discard(1)
        _discard(2)
        sys.exit(CLOSED_PIPE)
    except OSError as error:
        _discard(1)
        with suppress(OSError):
            click.echo(f"error: {error}", err=True)
        sys.exit(1)


def _discard(number: int) -> None:
    """Let what is not written yet to a file go nowhere: at the exit it would fail once more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)
