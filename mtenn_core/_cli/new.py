"""Writes a plugin to begin from: what ``mtenn new`` does."""

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
from mtenn_core._cli.output import print_json
from mtenn_core._registry import registry
from mtenn_core.errors import CombinationConflictError, MtennError

TEMPLATES = resources.files("mtenn_core._cli") / "template"
# With a suffix of their own: nothing that looks for Python or settings takes them for either.
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
LONGEST = 35  # a longer one makes lines of the package too long for its style


def new_plugin(name: str, folder: Path | None, *, as_json: bool) -> None:
    """Write a package with a combination of this name, and say what to do next.

    Raises
    ------
    click.BadParameter : it cannot be a name
    CombinationConflictError : an installed distribution has it
    MtennError : the folder is not empty, or it cannot be written
    """
    key = _key(name)
    _check_free(key)
    folder = folder or Path(f"mtenn-{key}")
    paths = _write(folder, _files(key))
    if as_json:
        print_json({"name": key, "folder": str(folder), "files": [str(path) for path in paths]})
        return
    click.echo("".join(f"wrote {path}\n" for path in paths))
    click.echo(f"Make it your own: change {paths[0]} where it says EDIT. Then")
    for command in (f"cd {shlex.quote(str(folder))}", "tox", "pip install .", f"mtenn check {key}"):
        click.echo(f"  {command}")


def _key(name: str) -> str:
    """Return the name as the registry compares it, without the ``mtenn-`` of its distribution."""
    key = canonicalize_name(name).removeprefix("mtenn-")
    if not NAME.fullmatch(key) or len(key) > LONGEST:
        raise click.BadParameter(
            "a name begins with a letter, goes on with letters and digits, has '-', '_' and '.'"
            f" inside only, and is at most {LONGEST} long; found {name!r}",
            param_hint="'NAME'",
        )
    return key


def _check_free(key: str) -> None:
    for record in registry.records(everything=True):
        if record.key == key:
            message = f"the name {key!r} belongs to {record}; choose another"
            raise CombinationConflictError(message, record=record)
    with suppress(metadata.PackageNotFoundError):  # mtenn-core itself, say
        version = metadata.version(f"mtenn-{key}")
        raise MtennError(f"mtenn-{key} {version} is installed: choose another name than {key!r}")


def _files(key: str) -> dict[str, str]:
    """Return the text of each file, by its path in the package."""
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
    """Return which versions of mtenn-core a plugin is for that is begun with this one."""
    now = Version(version)
    first = now.public if now.is_prerelease else f"{now.major}.{now.minor}"
    below = f"{now.major + 1}" if now.major else f"0.{now.minor + 1}"
    return f">={first},<{below}"


def _write(folder: Path, files: dict[str, str]) -> list[Path]:
    """Write all files into a folder that is new or empty, and return their paths."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise MtennError(f"{folder} is not empty, and nothing was written: name another folder")
        for path, text in files.items():
            (folder / path).parent.mkdir(exist_ok=True)
            with (folder / path).open("x", encoding="utf-8", newline="\n") as file:
                file.write(text)
    except OSError as error:
        raise MtennError(f"cannot write all of {folder}: {error}") from error
    return [folder / path for path in files]
