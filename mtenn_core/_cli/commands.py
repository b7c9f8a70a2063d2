"""The command group ``mtenn``: its commands, exit codes and warnings."""

from __future__ import annotations

import importlib
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import click

from mtenn_core import __version__
from mtenn_core._cli.output import discard, echo, encode_all_text
from mtenn_core.errors import PluginWarning

COMMANDS = ("check", "combine", "doctor", "info", "list", "new")
INTERRUPTED = 128 + signal.SIGINT
CLOSED_PIPE = 128 + 13  # exit code of a shell for SIGPIPE; Windows has no signal.SIGPIPE


class Commands(click.Group):
    """A group of commands. Each command is in a module with its name.

    No command ends with a traceback after Ctrl-C, or if the output cannot be written.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import only the module of this command, so that `mtenn list` is fast."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"mtenn_core._cli.{cmd_name}").command
        command.name = cmd_name  # the heading on the reference page
        return command

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Parse the arguments. This also prints the text of ``--help``."""
        encode_all_text()
        with _exit_codes():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        with _exit_codes(), _plain_warnings():
            return super().invoke(ctx)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="mtenn-core", message="mtenn-core %(version)s")
def main() -> None:
    """List combinations of pose predictions, check them, use them on tables, and write new ones."""


@contextmanager
def _exit_codes() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # the reader has closed the pipe
        discard(1)
        discard(2)
        sys.exit(CLOSED_PIPE)
    except OSError as error:
        discard(1)
        with suppress(OSError):
            echo(f"error: {error}", err=True)
        sys.exit(1)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Print warnings about plugins in one line, without the source line that Python adds."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", PluginWarning)

        def show_plainly(
            message: Any, category: Any, filename: str, lineno: int, *args: Any, **kwargs: Any
        ) -> None:
            if issubclass(category, PluginWarning):
                echo(f"warning: {message}", err=True)
            else:
                echo(warnings.formatwarning(message, category, filename, lineno).rstrip(), err=True)

        warnings.showwarning = show_plainly
        yield
