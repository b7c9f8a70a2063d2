"""Pins: the distributions that may be imported, each with its version and the hash of its files.

A line of a pins file reads ``distribution==version RECORD=sha256:…``. The hash is that of the
distribution's RECORD (https://packaging.python.org/specifications/recording-installed-packages/),
of those lines that are the same on every machine; the files themselves are held to these lines.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from base64 import urlsafe_b64encode
from pathlib import Path

from mtenn_core._registry._record import PluginRecord, canonical
from mtenn_core.errors import PluginPinError

_LINE = re.compile(r"([\w.-]+)==(\S+)\s+RECORD=sha256:([0-9a-f]{64})")
# Whoever installs writes these, differently each time; so are scripts, outside of the folder.
_OF_THE_INSTALLER = {"INSTALLER", "REQUESTED", "direct_url.json", "uv_cache.json"}


def pin(record: PluginRecord) -> str:
    """Return the line of a pins file for what is installed now.

    Raises
    ------
    PluginPinError : it has no RECORD, is installed as editable, or differs from its RECORD
    """
    return f"{record.distribution}=={record.version} RECORD=sha256:{_digest(record)}"


def check_pin(record: PluginRecord, file: str | os.PathLike[str]) -> None:
    """Check that a plugin is one of those that were pinned.

    Raises
    ------
    PluginPinError : it is not, cannot be, or the file is no list of pins
    """
    pins = _read(Path(file), record)
    versions = {version: hash for owner, version, hash in pins if owner == record.owner}
    if not versions:
        raise PluginPinError(
            f"{record} is not pinned in {os.fspath(file)}; if you trust it, add the line:"
            f" {pin(record)}",
            record=record,
        )
    if record.version not in versions:
        raise PluginPinError(
            f"{record}{record.where} is pinned to {' or '.join(versions)} in"
            f" {os.fspath(file)}; install that: pip install"
            f" {record.distribution}=={next(iter(versions))}",
            record=record,
        )
    found, expected = _digest(record), versions[record.version]
    if found != expected:
        raise PluginPinError(
            f"{record}{record.where} is another build than the one that is pinned in"
            f" {os.fspath(file)}: expected RECORD=sha256:{expected}; found {found}; reinstall it,"
            " or pin this one if you trust it",
            record=record,
        )


def _read(file: Path, record: PluginRecord) -> list[tuple[str, str, str]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PluginPinError(
            f"{record}: the pins cannot be read ({error}); correct MTENN_PINS, or write them with:"
            f" mtenn list --pins > {file}",
            record=record,
        ) from error
    pins = []
    for number, line in enumerate(lines, 1):
        if not (line := line.partition("#")[0].strip()):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise PluginPinError(
                f"{file}:{number}: expected 'distribution==version RECORD=sha256:…', as `mtenn list"
                f" --pins` writes it; found {line!r}",
                record=record,
            )
        pins.append((canonical(match[1]), match[2], match[3]))
    return pins


def _digest(record: PluginRecord) -> str:
    """Return the hash of what RECORD says of the files, after a look at the files."""
    metadata, folder = Path(record.metadata or ""), Path(record.location or "")
    _refuse_editable(record, metadata)
    try:
        rows = list(csv.reader((metadata / "RECORD").read_text(encoding="utf-8").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error):
        rows = []
    kept = sorted(
        (row[0], row[1]) for row in rows if len(row) > 1 and row[1] and not _varies(row[0])
    )
    if not kept:
        raise PluginPinError(
            f"{record} cannot be pinned: {metadata} has no RECORD with hashes of its files; install"
            " it from a wheel",
            record=record,
        )
    for path, hash in kept:
        if _hash_of(folder / path, hash.partition("=")[0]) != hash:
            raise PluginPinError(
                f"{record}: {folder / path} is not as it was installed; find out why, or reinstall:"
                f" pip install --force-reinstall {record.distribution}=={record.version}",
                record=record,
            )
    return hashlib.sha256("".join(f"{path},{hash}\n" for path, hash in kept).encode()).hexdigest()


def _refuse_editable(record: PluginRecord, metadata: Path) -> None:
    try:
        origin = json.loads((metadata / "direct_url.json").read_text(encoding="utf-8"))
        editable = origin["dir_info"]["editable"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if editable:
        raise PluginPinError(
            f"{record} cannot be pinned: it is installed as editable from {origin.get('url')}, and"
            " may be another one each time; install it from a wheel",
            record=record,
        )


def _varies(path: str) -> bool:
    parts = Path(path).parts
    return ".." in parts or (parts[0].endswith(".dist-info") and parts[-1] in _OF_THE_INSTALLER)


def _hash_of(file: Path, algorithm: str) -> str | None:
    """Return what RECORD has for such a file, or None if it is not there."""
    try:
        digest = hashlib.new(algorithm, file.read_bytes()).digest()
    except (OSError, ValueError):
        return None
    return f"{algorithm}={urlsafe_b64encode(digest).decode().rstrip('=')}"
