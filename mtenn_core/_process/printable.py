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


def _is_visible(character: str) -> bool:
    # Besides the blank, str.isprintable() refuses all spaces (Zs), which are harmless.
    return character in "\n\t" or character.isprintable() or unicodedata.category(character) == "Zs"
