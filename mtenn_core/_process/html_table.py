"""A table as HTML, for notebooks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from mtenn_core._process.printable import printable


def html_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str | int]],
    notes: Iterable[str] = (),
) -> str:
    """Return a title, a table and notes as HTML.

    All text is escaped, because it may come from a plugin. The colors are those of the page, so
    that the table is readable on a dark and on a light background.

    Parameters
    ----------
    columns : the head of each column; no column, no table
    rows : the cells of each row. Text keeps its line breaks.
    notes : paragraphs below the table
    """
    head = "".join(map(_head, columns))
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    # Without "inherit", a page without a doctype shows black text.
    table = (
        f'<table style="color: inherit"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    )
    below = "".join(map(_paragraph, notes))
    return f"<div>{_paragraph(title)}{table if columns else ''}{below}</div>"


def _paragraph(text: str) -> str:
    return f'<p style="white-space: pre-wrap">{_escaped(text)}</p>'


def _head(text: str) -> str:
    return f'<th scope="col" style="text-align: left">{_escaped(text)}</th>'


def _cell(content: str | int) -> str:
    # Notebooks align cells to the right, which suits only numbers.
    if isinstance(content, int):
        return f'<td style="text-align: right; vertical-align: top">{content}</td>'
    style = "text-align: left; vertical-align: top; white-space: pre-wrap"
    return f'<td style="{style}">{_escaped(content)}</td>'


def _escaped(text: str) -> str:
    return escape(printable(text))
