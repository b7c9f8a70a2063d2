"""The command ``mtenn new``: write the files of a new plugin from the templates."""

from __future__ import annotations

import re
import shlex
from contextlib import suppress
from importlib import metadata, resources
from pathlib import Path
from string import Template

import click
from packaging.utils import canonicalize_name
from packaging.version import Version

from mtenn_core import __version__
from mtenn_core._cli.output import errors_to_exit_code, json_option, print_json
from mtenn_core._registry import registry
from mtenn_core.errors import CombinationConflictError, MtennError

TEMPLATES = resources.files("mtenn_core._cli") / "template"
# The templates have the suffix .template, so that tools do not read them as code or settings.
TEMPLATE_OF = {
    "mtenn_$snake/__init__.py": "__init__.py.template",
    "mtenn_$snake/py.typed": "py.typed.template",
    "tests/test_$snake.py": "test.py.template",
    "README.md": "README.md.template",
    "pyproject.toml": "pyproject.toml.template",
    "tox.ini": "tox.ini.template",
    ".gitignore": "gitignore.template",
}
NAME = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")
MAX_LENGTH = 35  # with a longer name, some lines of the package would be too long for its linter


@click.command()
@click.argument("name")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="A new or empty folder for the package, instead of ./mtenn-NAME.",
)
@json_option
@errors_to_exit_code
def command(name: str, output: Path | None, as_json: bool) -> None:
    """Write a new package with a combination NAME. It passes its own tests."""
    key = _key(name)
    _check_free(key)
    folder = output or Path(f"mtenn-{key}")
    paths = _write(folder, _files(key))
    if as_json:
        print_json({"name": key, "folder": str(folder), "files": [str(path) for path in paths]})
        return
    click.echo("".join(f"wrote {path}\n" for path in paths))
    click.echo(f"Change {paths[0]} at the comments that say EDIT. Then run")
    # The first three need no mtenn-core from a package index: it is already installed here.
    cd = f"cd {shlex.quote(str(folder))}"
    for line in (cd, "pip install -e .", f"mtenn check {key}", "tox"):
        click.echo(f"  {line}")
    click.echo("tox installs mtenn-core, too. If no package index has it, see README.md, Install.")


def _key(name: str) -> str:
    """Return the canonical name (PEP 503), without the prefix ``mtenn-``."""
    key = canonicalize_name(name).removeprefix("mtenn-")
    if not NAME.fullmatch(key) or len(key) > MAX_LENGTH:
        raise click.BadParameter(
            "a name must start with a letter and have at most"
            f" {MAX_LENGTH} characters: letters and digits, with '-', '_' or '.' between them;"
            f" found {name!r}",
            param_hint="'NAME'",
        )
    return key


def _check_free(key: str) -> None:
    for record in registry.records(everything=True):
        if record.key == key:
            message = f"the name {key!r} belongs to {record}. Choose another name"
            raise CombinationConflictError(message, record=record)
    with suppress(metadata.PackageNotFoundError):  # for example, mtenn-core itself exists
        version = metadata.version(f"mtenn-{key}")
        raise MtennError(
            f"the distribution of {key!r} would be mtenn-{key}, but mtenn-{key} {version} is"
            " installed. Choose another name"
        )


def _files(key: str) -> dict[str, str]:
    """Return the text of each file. The keys are paths in the package."""
    words = key.split("-")
    values = {
        "name": key,
        "snake": "_".join(words),
        "camel": "".join(word.capitalize() for word in words),
        "core": _versions_of_core(__version__),
    }
    return {
        Template(path).substitute(values): Template(
            (TEMPLATES / template).read_text(encoding="utf-8")
        ).substitute(values)
        for path, template in TEMPLATE_OF.items()
    }


def _versions_of_core(version: str) -> str:
    """Return the range of mtenn-core versions for a plugin that is written with ``version``."""
    now = Version(version)
    first = now.public if now.is_prerelease else f"{now.major}.{now.minor}"
    below = f"{now.major + 1}" if now.major else f"0.{now.minor + 1}"
    return f">={first},<{below}"


def _write(folder: Path, files: dict[str, str]) -> list[Path]:
    """Write all files into a new or empty folder, and return their paths."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise MtennError(
                f"{folder} must be empty; found files. Nothing was written. Name another folder"
            )
        for path, text in files.items():
            (folder / path).parent.mkdir(exist_ok=True)
            with (folder / path).open("x", encoding="utf-8", newline="\n") as file:
                file.write(text)
    except OSError as error:
        raise MtennError(f"the package in {folder} is incomplete: {error}") from error
    return [folder / path for path in files]
