"""The command ``mtenn info``: print the facts about one combination."""

from __future__ import annotations

import click

from mtenn_core._cli.output import echo, errors_to_exit_code, json_option, print_json
from mtenn_core._registry import registry
from mtenn_core._registry.pins import pin
from mtenn_core.errors import PluginPinError


@click.command()
@click.argument("name")
@json_option
@errors_to_exit_code
def command(name: str, as_json: bool) -> None:
    """Show the facts about the combination NAME, without importing it."""
    record = registry.info(name)
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
    if as_json:
        print_json(facts)
        return
    for key, value in facts.items():
        if value:
            # A list is on one line, so that it can be copied.
            text = "; ".join(value) if isinstance(value, list) else value
            echo(f"{key:<13} {text}")
