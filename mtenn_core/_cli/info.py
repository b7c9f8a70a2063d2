"""The command ``mtenn info``: print the facts about one combination, or about a checkpoint."""

from __future__ import annotations

import warnings
from typing import Any, TextIO

import click

from mtenn_core._cli.checkpoint_info import checkpoint_facts, checkpoint_lines, is_checkpoint
from mtenn_core._cli.completion import complete_name_or_file
from mtenn_core._cli.output import (
    echo,
    error_text,
    errors_to_exit_code,
    json_option,
    print_json,
    separate_stdout,
)
from mtenn_core._cli.torch_import import torch_importable
from mtenn_core._registry import PluginRecord, registry
from mtenn_core._registry.pins import pin
from mtenn_core.errors import MtennError, PluginPinError


@click.command()
@click.argument("name", metavar="NAME|FILE", shell_complete=complete_name_or_file)
@click.option("--no-import", is_flag=True, help="Show only facts that need no import of a plugin.")
@json_option
@errors_to_exit_code
def command(name: str, no_import: bool, as_json: bool) -> None:
    """Show what the combination NAME does, or what is in the checkpoint FILE.

    Imports the plugin. FILE is a checkpoint of torch, Lightning or safetensors. No code in it runs.
    """
    with separate_stdout() as stdout:
        if is_checkpoint(name):
            _show_checkpoint(name, stdout, imports=not no_import, as_json=as_json)
        else:
            _show_plugin(name, stdout, imports=not no_import, as_json=as_json)


def _show_checkpoint(path: str, stdout: TextIO, *, imports: bool, as_json: bool) -> None:
    with torch_importable(registry), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of torch, about a file that it then refuses
        facts = checkpoint_facts(path, imports=imports)
    if as_json:
        print_json(facts, stdout)
        return
    for line in checkpoint_lines(facts):
        echo(line, file=stdout)


def _show_plugin(name: str, stdout: TextIO, *, imports: bool, as_json: bool) -> None:
    record = registry.info(name)
    facts = _record_facts(record)
    if not as_json:
        for key, value in facts.items():
            if value:
                # A list is on one line, so that it can be copied.
                text = "; ".join(value) if isinstance(value, list) else value
                echo(f"{key:<13} {text}", file=stdout)
        stdout.flush()  # an import may end the process
    facts["combination"] = None
    if imports:
        with torch_importable(registry):
            facts |= _class_facts(record)
    if as_json:
        print_json(facts, stdout)
    elif "not_imported" in facts:
        echo(f"{'not imported':<13} {facts['not_imported']}", file=stdout)
    elif imports:
        from mtenn_core._cli.class_info import class_lines

        for line in ["", *class_lines(facts["combination"])]:
            echo(line, file=stdout)


def _record_facts(record: PluginRecord) -> dict[str, Any]:
    """Return the facts that need no import."""
    facts = record.to_json()
    try:
        facts["pin"] = pin(record)
    except PluginPinError as error:  # an editable install, for example
        facts["pin"], facts["no_pin"] = None, str(error)
    facts["problems"] = [
        problem.message
        for problem in registry.problems()
        if problem.record and problem.record.metadata == record.metadata
    ]
    return facts


def _class_facts(record: PluginRecord) -> dict[str, Any]:
    """Import a plugin and return what its class says, or why it cannot be imported."""
    from mtenn_core._cli.class_info import class_facts

    try:
        cls = registry.get(record.qualified_name, validate=False)
        return {"combination": class_facts(record, cls)}
    except MtennError as error:
        return {"not_imported": error_text(error)}
    except Exception as error:  # a malformed declaration, for example a domain of one number
        return {"not_imported": f"{record}: {type(error).__name__}: {error_text(error)}"}
