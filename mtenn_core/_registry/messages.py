"""Parts of error messages: errors and values from plugins, and similar names."""

from __future__ import annotations

from collections.abc import Iterable

from mtenn_core._process.printable import error_text, printable, value_text
from mtenn_core._registry.record import canonical

MAX_LENGTH = 500


def describe_error(error: BaseException) -> str:
    """Return the type and the truncated message of an error, also if ``str(error)`` raises."""
    return _truncate(printable(error_text(error)))


def describe_value(value: object) -> str:
    """Return the truncated ``repr`` of a value, or its type if ``repr`` raises."""
    return _truncate(printable(value_text(value)))


def suggestion(name: str, candidates: Iterable[str]) -> str:
    """Return a question with the candidate that is most similar to ``name``, or an empty string."""
    import difflib  # only needed after a mistake

    by_key = {canonical(candidate): candidate for candidate in candidates}
    similar = difflib.get_close_matches(canonical(name), by_key, n=1)
    return f" Did you mean {by_key[similar[0]]!r}?" if similar else ""


def _truncate(text: str) -> str:
    return text if len(text) <= MAX_LENGTH else f"{text[:MAX_LENGTH]}…"
