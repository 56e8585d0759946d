"""Text for display: control characters are escaped, and long text is cut.

Names, values and log lines come from files, stores and stages of others. Control characters drive
a terminal (they move the cursor or rename the window), and bidirectional controls reorder a line.
"""

from __future__ import annotations

import re

# C0 without tab and line feed, DEL, C1, line and paragraph separators, the marks, embeddings,
# overrides and isolates of bidirectional text, the byte order mark, and halves of surrogate pairs.
CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


def printable(text: str) -> str:
    r"""Return `text` with control characters as escapes; tabs and line feeds stay.

    >>> printable("a\x1b[31mb")
    'a\\x1b[31mb'
    """
    return CONTROLS.sub(lambda match: _escape(match[0]), text)


def cut(text: str, limit: int) -> str:
    """Return `text`, its middle left out when it is longer than `limit` characters.

    >>> cut("abcdefghij", 7)
    'ab...ij'
    """
    if len(text) <= limit:
        return text
    half = (limit - 3) // 2
    return f"{text[:half]}...{text[-half:]}"


def clock(seconds: float) -> str:
    """Return a duration as `m:ss` or `h:mm:ss`.

    >>> clock(75), clock(3675)
    ('1:15', '1:01:15')
    """
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x80 else f"\\u{code:04x}"
