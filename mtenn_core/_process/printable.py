"""Text from plugins, with visible escape sequences in place of control characters."""

import unicodedata


def printable(text: str) -> str:
    """Return text that a terminal shows as it is.

    Characters that a terminal does not show, but obeys, become escape sequences. Examples are the
    start of a color or of a title, and marks that reverse the direction of the text.
    """
    if text.isprintable():
        return text
    return "".join(c if _is_visible(c) else c.encode("unicode_escape").decode() for c in text)


def value_text(value: object) -> str:
    """Return the ``repr`` of a value, or its type if ``repr`` raises."""
    try:
        return repr(value)
    except KeyboardInterrupt:
        raise
    except BaseException:
        return f"a {type(value).__name__} that cannot be printed"


def error_text(error: BaseException) -> str:
    """Return the type and the message of an error, also if ``str(error)`` raises."""
    return f"{type(error).__name__}: {error_message(error)}"


def error_message(error: BaseException) -> str:
    """Return the message of an error, also if ``str(error)`` raises."""
    try:
        return str(error)
    except KeyboardInterrupt:
        raise
    except BaseException:  # a plugin may raise SystemExit, and an extension in Rust a panic
        return "(it cannot be printed)"


def _is_visible(character: str) -> bool:
    # Besides the blank, str.isprintable() refuses all spaces (Zs), which are harmless.
    return character in "\n\t" or character.isprintable() or unicodedata.category(character) == "Zs"
