"""Distributions as an installer leaves them, written for a test."""

from __future__ import annotations

import hashlib
from base64 import urlsafe_b64encode
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

GOOD = """
    from mtenn_core import Combination

    class Good(Combination):
        def combine(self, predictions):
            return predictions.mean()
"""


@dataclass(frozen=True)
class Places:
    """Folders on the path: ``site``, and ``front``, in which an import looks first."""

    site: Path
    front: Path


def write_distribution(
    folder: Path,
    distribution: str,
    entry_points: dict[str, str] | str | bytes,
    module: str | None = GOOD,
    *,
    version: str = "1.0",
    requires: str = "",
    metadata: str | bytes | None = None,
    egg: bool = False,
    record: bool = False,
) -> Path:
    """Write a distribution with one module, which has its name, and return its metadata's folder.

    Parameters
    ----------
    entry_points : those of our group, or all of the file
    module : its code; None for none
    requires : of ``Requires-Dist``
    metadata : all of the file, if not what the other arguments make; empty for no file
    egg : whether as ``setup.py develop`` did
    record : whether with a RECORD, as pip does
    """
    name = distribution.replace("-", "_")
    info = folder / (f"{name}.egg-info" if egg else f"{name}-{version}.dist-info")
    info.mkdir(parents=True)
    if metadata is None:
        metadata = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        metadata += f"Requires-Dist: {requires}\n" if requires else ""
    if metadata:
        _write(info / ("PKG-INFO" if egg else "METADATA"), metadata)
    if isinstance(entry_points, dict):
        lines = [f"{key} = {value}" for key, value in entry_points.items()]
        entry_points = "\n".join(["[mtenn.combinations]", *lines, ""])
    _write(info / "entry_points.txt", entry_points)
    if module is not None:
        _write(folder / f"{name}.py", dedent(module))
    if record:
        write_record(info)
    return info


def write_record(info: Path, path: str = "") -> None:
    """Write what pip writes: each file with its hash, and files that only the installer knows.

    Parameters
    ----------
    path : of the module; that of :func:`write_distribution` unless given
    """
    (info / "INSTALLER").write_text("pip\n")
    module = info.parent / (path or f"{info.name.partition('-')[0]}.py")
    files = [module, *sorted(set(info.iterdir()) - {info / "RECORD"})]
    rows = [f"{file.relative_to(info.parent)},{_hash(file)},1" for file in files]
    rows += [f"__pycache__/{module.stem}.pyc,,", f"{info.name}/RECORD,,"]
    (info / "RECORD").write_text("\n".join(rows) + "\n")


def _hash(file: Path) -> str:
    digest = hashlib.sha256(file.read_bytes()).digest()
    return f"sha256={urlsafe_b64encode(digest).decode().rstrip('=')}"


def _write(file: Path, content: str | bytes) -> None:
    file.write_bytes(content.encode() if isinstance(content, str) else content)
