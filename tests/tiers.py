"""The marker of tests that only the full tier runs: ``tox run -m full``."""

from __future__ import annotations

from typing import Any

import pytest


def slow(*values: Any, reason: str) -> list[Any]:
    """Return values of a parameter for which only the full tier runs a test, and why."""
    return [pytest.param(value, marks=pytest.mark.slow(reason)) for value in values]
