"""Markdown in lines of at most 120 characters."""

from __future__ import annotations

import textwrap

_WIDTH = 120


def wrapped(text: str) -> str:
    """Return prose in lines of at most 120 characters; tables, titles and images as they are.

    An item of a list is indented below its dash.
    """
    return "\n".join(map(_wrapped_line, text.splitlines()))


def _wrapped_line(line: str) -> str:
    if line.startswith(("|", "#", "!")):
        return line
    indent = "  " if line.startswith("- ") else ""
    return textwrap.fill(
        line, _WIDTH, break_long_words=False, break_on_hyphens=False, subsequent_indent=indent
    )
