"""The command ``mtenn check``: parse its arguments, and run the checks."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from mtenn_core._cli.completion import complete_check_id, complete_name_or_file
from mtenn_core._cli.list import nothing_installed
from mtenn_core._cli.output import errors_to_exit_code, json_option
from mtenn_core._cli.torch_import import torch_importable
from mtenn_core._registry import registry
from mtenn_core.errors import MtennError

# This repeats LEVELS of mtenn_core.testing, because that import would import torch. A test compares
# the two.
LEVELS = ("gate", "full", "quality")


@click.command()
@click.argument("targets", nargs=-1, metavar="[TARGET]...", shell_complete=complete_name_or_file)
@click.option("--all", "everything", is_flag=True, help="Check every installed combination.")
@click.option(
    "--arg",
    "arguments",
    multiple=True,
    metavar="NAME=VALUE",
    help="An argument of the combination, instead of its examples. Can be repeated.",
)
@click.option(
    "--level",
    type=click.Choice(LEVELS),
    default="full",
    show_default=True,
    help="gate: the checks of the registry; full: the contract; quality: advice is a failure.",
)
@click.option(
    "--only",
    multiple=True,
    metavar="ID",
    shell_complete=complete_check_id,
    help="Run only the check with this id. Can be repeated.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    show_default=True,
    help="Seed of the random numbers that the checks use.",
)
@click.option(
    "--isolated",
    is_flag=True,
    help="Run the checks in a child process, for plugins that crash or hang.",
)
@click.option(
    "--time-limit",
    type=click.FloatRange(0, min_open=True),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="With --isolated: limit for one target. One check may take half of it.",
)
@click.option(
    "--memory-limit",
    type=click.IntRange(1),
    default=4096,
    show_default=True,
    metavar="MIB",
    help="With --isolated: limit in addition to the memory that torch itself takes.",
)
@json_option
@click.option(
    "--html",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    metavar="FILE",
    help="Also write an HTML page with plots.",
)
@errors_to_exit_code
def command(
    targets: tuple[str, ...],
    everything: bool,
    arguments: tuple[str, ...],
    as_json: bool,
    html: Path | None,
    **options: Any,
) -> None:
    """Check that combinations keep their contract and have correct gradients.

    \b
    TARGET is one of
      boltzmann             a name that `mtenn list` shows
      package.module:Class  a class in a module that can be imported from here
      folder/file.py:Class  a class in a file
    A function that makes an instance may stand in the place of the class.

    Exits with 0 if no check failed, with 1 if one failed, and with 2 for wrong usage. Advice is
    no failure, except at the level quality.
    """  # noqa: D301 - click requires the backslash
    _check_usage(targets, everything, arguments, html)
    records = registry.records()  # before the slow import of torch, because settings may be invalid
    names = [record.qualified_name for record in records] if everything else targets
    if not names:
        raise MtennError(nothing_installed())
    with torch_importable(registry):
        from mtenn_core._cli.check_outcomes import check_targets

        passed = check_targets(names, arguments, as_json=as_json, html=html, **options)
    sys.exit(not passed)


def _check_usage(
    targets: tuple[str, ...],
    everything: bool,
    arguments: tuple[str, ...],
    html: Path | None,
) -> None:
    if bool(targets) == everything:
        found = "both" if everything else "neither"
        raise click.UsageError(
            "expected a combination or --all; found"
            f" {found}. A combination is a name that `mtenn list` shows, package.module:Class or"
            " folder/file.py:Class"
        )
    if arguments and (everything or len(targets) > 1):
        raise click.UsageError("--arg applies to one combination. Give exactly one name")
    context = click.get_current_context()
    for name in ("time_limit", "memory_limit"):
        is_given = context.get_parameter_source(name) is not ParameterSource.DEFAULT
        if is_given and not context.params["isolated"]:
            raise click.UsageError(f"--{name.replace('_', '-')} needs --isolated")
    if html and not os.access(html.parent, os.W_OK):
        raise click.BadParameter(
            f"cannot write into the folder {str(html.parent)!r}. Create it, or name another folder",
            param_hint="'--html'",
        )
