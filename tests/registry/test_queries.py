"""Queries change nothing: each runs in a new process, next to a file that stops torch's import."""

import os
import subprocess
import sys
from textwrap import dedent

import pytest
from installed import write_distribution

# Compares the process before and after. Importing importlib_metadata adds its finder to
# sys.meta_path, and makes the finder of the standard library find no distributions.
PROGRAM = """
import os, sys, warnings

def state():
    return {
        "environment": dict(os.environ),
        "path": list(sys.path),
        "finders": [finder for finder in sys.meta_path if "importlib_metadata" not in repr(finder)],
        "hooks": list(sys.path_hooks),
        "filters": list(warnings.filters),
        "showwarning": warnings.showwarning,
        "directory": os.getcwd(),
    }

warnings.simplefilter("ignore")
before = state()
n_finders = len(sys.meta_path)
CODE
after = state()
for key in before:
    assert before[key] == after[key], (key, before[key], after[key])
assert len(sys.meta_path) <= n_finders + 1, sys.meta_path
assert "torch" not in sys.modules
assert "pluggy" not in sys.modules  # queries do not need it
assert "demo_healthy" not in sys.modules
"""
QUERIES = {
    "names": "registry.names()",
    "records": "registry.records(), registry.records(everything=True)",
    "info": "registry.info('healthy'), registry.info('demo-healthy:healthy')",
    "in": "assert 'healthy' in registry and 'absent' not in registry",
    "len": "len(registry)",
    "iteration": "list(registry)",
    "repr": "repr(registry)",
    "problems": "assert registry.problems()",
    "record_of": "assert registry.record_of(type('X', (), {})) is None",
    "refresh": "registry.names(), registry.refresh(), registry.names()",
}
COMMANDS = {
    "list": ["list"],
    "list all": ["list", "--all", "--json"],
    "list pins": ["list", "--pins"],
    "info": ["info", "healthy", "--no-import"],
    "doctor": ["doctor"],
}
COMMAND = """
from mtenn_core._cli import main
try:
    main({arguments!r})
except SystemExit as exit:
    assert exit.code in (0, 1), exit.code
"""


@pytest.fixture
def run(places):
    write_distribution(places.site, "demo-bad", "[console_scripts]\nno equals sign\n", None)
    path = os.pathsep.join([str(places.site), os.environ.get("PYTHONPATH", "")])
    environment = {k: v for k, v in os.environ.items() if k != "TORCH_DEVICE_BACKEND_AUTOLOAD"}

    def run(code):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM.replace("CODE", dedent(code))],
            capture_output=True,
            text=True,
            env=environment | {"PYTHONPATH": path},
            check=False,
        )
        assert done.returncode == 0, done.stderr

    return run


@pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES)
def test_a_query_changes_nothing(run, query):
    run(f"from mtenn_core import registry\n{query}")


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS)
def test_a_command_changes_nothing(run, arguments):
    run(COMMAND.format(arguments=arguments))
