"""Pins: the distributions that may be imported, each with its version and the hash of its files.

A line of a pins file has the form ``distribution==version RECORD=sha256:…``. RECORD is a file with
the hash of each installed file
(https://packaging.python.org/specifications/recording-installed-packages/). A pin contains one
hash, computed from the lines of RECORD that are the same on every machine. A check also compares
the installed files with these lines.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import os
import re
import sys
from base64 import urlsafe_b64encode
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path

from mtenn_core._registry.files import open_regular
from mtenn_core._registry.record import PluginRecord, canonical
from mtenn_core.errors import PluginPinError

Rows = list[tuple[str, str]]
_LINE = re.compile(r"([\w.-]+)==(\S+)\s+RECORD=sha256:([0-9a-f]{64})")
# Installers write these files with different content each time.
_INSTALLER_FILES = {"INSTALLER", "REQUESTED", "direct_url.json", "uv_cache.json"}


def pin(record: PluginRecord) -> str:
    """Return the line of a pins file for the installed distribution of a plugin.

    Raises
    ------
    PluginPinError : the distribution has no RECORD or no version, it is an editable install or in
        an archive, or its files differ from its RECORD
    """
    if record.version is None:
        raise PluginPinError(
            f"{record}{record.where} cannot be pinned: its metadata contain no version. Reinstall"
            " it",
            record=record,
        )
    digest = _digest(record, _rows(record))
    return f"{record.distribution}=={record.version} RECORD=sha256:{digest}"


def read_pins(file: str | os.PathLike[str]) -> dict[tuple[str, str], set[str]]:
    """Return the pinned hashes of each distribution and version. Each wheel has its own hash.

    Raises
    ------
    PluginPinError : the file cannot be read, or a line is malformed
    """
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PluginPinError(
            f"the pins file cannot be read as UTF-8 ({error}), so no plugin may be imported. Name"
            f" another file (MTENN_PINS), or write it with: mtenn list --pins > {file}"
        ) from error
    pins: dict[tuple[str, str], set[str]] = {}
    for number, line in enumerate(lines, 1):
        if not (line := line.partition("#")[0].strip()):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise PluginPinError(
                f"{file}:{number}: a pin must have the form 'distribution==version"
                f" RECORD=sha256:…'; found {line!r}. `mtenn list --pins` prints such lines"
            )
        pins.setdefault((canonical(match[1]), match[2]), set()).add(match[3])
    return pins


def check_pin(record: PluginRecord, file: str | os.PathLike[str]) -> None:
    """Check that the installed distribution of a plugin is pinned.

    Raises
    ------
    PluginPinError : the distribution is not pinned or cannot be pinned, or the pins file is
        malformed
    """
    try:
        pins = read_pins(file)
    except PluginPinError as error:
        error.record = record
        raise
    versions = [version for owner, version in pins if owner == record.owner]
    if not versions:
        raise PluginPinError(
            f"{record}{record.where} is not pinned in {os.fspath(file)}. If you trust it, add the"
            f" line: {pin(record)}",
            record=record,
        )
    if record.version not in versions:
        raise PluginPinError(
            f"{record}{record.where} is pinned to {' or '.join(versions)} in {os.fspath(file)}."
            f" Install the pinned version: pip install {record.distribution}=={versions[0]}",
            record=record,
        )
    rows = _rows(record)
    found, expected = _digest(record, rows), pins[record.owner, record.version]
    if found not in expected:
        raise PluginPinError(
            f"{record}{record.where} differs from the build pinned in {os.fspath(file)}: expected"
            f" RECORD=sha256:{' or '.join(sorted(expected))}; found {found}. Reinstall the pinned"
            " build, or pin this build if you trust it",
            record=record,
        )
    _check_found_by_import(record, rows)


def _check_found_by_import(record: PluginRecord, rows: Rows) -> None:
    """Check that an import of the target loads only files of the distribution."""
    folder = Path(record.location or "")
    own = {os.path.realpath(folder / path) for path, _ in rows}
    module, _ = record.parsed_target()
    path: Sequence[str] | None = None
    for name in itertools.accumulate(module.split("."), "{}.{}".format):
        spec = _spec(name, path)
        if spec is None:
            return  # the import will raise a better error
        origin, path = spec.origin, spec.submodule_search_locations
        is_namespace = origin is None and path is not None
        if not is_namespace and (origin is None or os.path.realpath(origin) not in own):
            raise PluginPinError(
                f"{record}{record.where} is pinned, but {name!r} would be imported from"
                f" {origin or spec.loader}, which is not a file of this distribution. Remove that"
                " module, or change sys.path",
                record=record,
            )


def _spec(name: str, path: Sequence[str] | None) -> ModuleSpec | None:
    """Return the spec of a module, imported or not, without importing its parent packages."""
    if name in sys.modules:
        loaded = sys.modules[name]
        file = getattr(loaded, "__file__", None)
        return getattr(loaded, "__spec__", None) or ModuleSpec(name, None, origin=file)
    specs = (finder.find_spec(name, path) for finder in sys.meta_path)
    return next(filter(None, specs), None)


def _rows(record: PluginRecord) -> Rows:
    """Return path and hash of all files that are the same on every machine, sorted by path."""
    _refuse_editable(record, Path(record.metadata or ""))
    file = Path(record.metadata or "", "RECORD")
    try:
        rows = list(csv.reader(_text(file).splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error):
        rows = []
    kept = sorted((r[0], r[1]) for r in rows if len(r) > 1 and r[1] and not _varies(r[0]))
    if not kept and (archive := _archive_of(Path(record.metadata or ""))):
        raise PluginPinError(
            f"{record} cannot be pinned: it is imported from inside of {archive}, whose files are"
            f" not compared. Remove the archive from sys.path, and install it: pip install"
            f" {archive}",
            record=record,
        )
    if not kept:
        raise PluginPinError(
            f"{record} cannot be pinned: {record.metadata} has no RECORD with hashes of the files."
            " Install the distribution from a wheel",
            record=record,
        )
    return kept


def _digest(record: PluginRecord, rows: Rows) -> str:
    """Compare the files with their lines in RECORD, and return the hash of these lines."""
    folder = Path(record.location or "")
    for path, hash in rows:
        if _hash_of(folder / path, hash.partition("=")[0]) != hash:
            raise PluginPinError(
                f"{record}: {folder / path} has changed since it was installed. Find out why, or"
                f" reinstall: pip install --force-reinstall"
                f" {record.distribution}=={record.version}",
                record=record,
            )
    return hashlib.sha256("".join(f"{path},{hash}\n" for path, hash in rows).encode()).hexdigest()


def _refuse_editable(record: PluginRecord, metadata: Path) -> None:
    try:
        origin = json.loads(_text(metadata / "direct_url.json"))
        editable = origin["dir_info"]["editable"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if editable:
        raise PluginPinError(
            f"{record} cannot be pinned: it is an editable install from {origin.get('url')}, whose"
            " files may change. Install it from a wheel",
            record=record,
        )


def _text(file: Path) -> str:
    with open_regular(file) as opened:
        return opened.read().decode()


def _archive_of(path: Path) -> Path | None:
    """Return the zip file or wheel that contains a path, or None."""
    return next(filter(Path.is_file, path.parents), None)


def _varies(path: str) -> bool:
    """Return True for files that differ between machines: scripts, and files of installers."""
    parts = Path(path).parts
    return (
        not parts
        or ".." in parts
        or (parts[0].endswith(".dist-info") and parts[-1] in _INSTALLER_FILES)
    )


def _hash_of(file: Path, algorithm: str) -> str | None:
    """Return the hash of a file in the format of RECORD, or None if it cannot be computed."""
    if algorithm not in ("sha256", "sha384", "sha512"):  # the specification requires one of them
        return None
    try:
        with open_regular(file) as opened:
            digest = hashlib.file_digest(opened, algorithm).digest()
    except (OSError, ValueError):
        return None
    return f"{algorithm}={urlsafe_b64encode(digest).decode().rstrip('=')}"
