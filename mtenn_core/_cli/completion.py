"""Completion in the shell: names of combinations and ids of checks, without plugins and torch."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from pathlib import Path

import click
from click.shell_completion import CompletionItem

import mtenn_core
from mtenn_core._registry import registry
from mtenn_core.errors import MtennError


def complete_name(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Return the names of combinations that begin with ``incomplete``."""
    try:
        with warnings.catch_warnings(action="ignore"):  # they would be printed into the prompt
            names = registry.names()
    except MtennError:  # a malformed setting, which the command itself will report
        return []
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def complete_name_or_file(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Return the names of combinations, and ask the shell for its files.

    click's script for bash forgets the items before the one for files, so that one is the first.
    bash then shows files only if no name fits.
    """
    files = CompletionItem(incomplete, type="file")
    return [files, *complete_name(ctx, param, incomplete)]


def complete_check_id(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Return the ids of checks that begin with ``incomplete``, with their titles."""
    return [
        CompletionItem(id, help=title)
        for id, title in sorted(check_titles())
        if id.startswith(incomplete)
    ]


def check_titles() -> Iterator[tuple[str, str]]:
    """Yield the id and the title of each check.

    They come from the source code of the checks, because an import would import torch.
    """
    folder = Path(mtenn_core.__file__).parent / "testing" / "_checks"
    for module in folder.glob("*.py"):
        for node in ast.parse(module.read_bytes()).body:
            for decorator in getattr(node, "decorator_list", ()):
                match decorator:
                    case ast.Call(
                        func=ast.Name("check"),
                        args=[ast.Constant(str(id)), ast.Constant(str(title)), *_],
                    ):
                        yield id, title
