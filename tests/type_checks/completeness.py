"""Fail if public names of mtenn_core or of a plugin have no known type.

    python tests/type_checks/completeness.py

Pyright's `--verifytypes` counts. In mtenn_core, 95 % of the names need a type that is written down:
an attribute that only `__init__` assigns needs an annotation, because type checkers infer its type
differently. In a plugin, an inferred type is enough. The plugins are examples for authors, and the
base class declares the types of the facts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MINIMUM = 0.95


def completeness(package: str) -> dict[str, Any]:
    """Return what pyright says about the types of an installed package."""
    # Pyright looks for packages with the `python` that it finds first.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        ["basedpyright", "--verifytypes", package, "--ignoreexternal", "--outputjson"],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        found: dict[str, Any] = json.loads(done.stdout)["typeCompleteness"]
    except (ValueError, KeyError):
        sys.exit(f"basedpyright printed no report about {package}:\n{done.stdout}{done.stderr}")
    return found


def main() -> None:
    """Print the share of each package, and the names without a known type."""
    packages = [path.parent.name for path in ROOT.glob("plugins/*/*/__init__.py")]
    incomplete: list[str] = []
    for package in ["mtenn_core", *sorted(packages)]:
        is_plugin = package in packages
        found = completeness(package)
        symbols = [each for each in found["symbols"] if each["isExported"]]
        missing = [
            each["name"]
            for each in symbols
            if not (each["isTypeKnown"] or (is_plugin and each["isTypeAmbiguous"]))
        ]
        share = 1 - len(missing) / len(symbols)
        print(f"{package:<18} {share:7.1%}", *missing, sep="\n    ")
        if share < MINIMUM:
            incomplete.append(package)
    if incomplete:
        sys.exit(f"less than {MINIMUM:.0%} of the names have a known type: {', '.join(incomplete)}")


if __name__ == "__main__":
    main()
