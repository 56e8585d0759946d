"""A console that redacts secrets and escapes control characters in everything it prints.

Names, messages and documents come from specs, stages and stores, which others may have written.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from pipeline.base.secrets import presentable


class RedactingConsole(Console):
    """Prints plain text without markup, because cell names contain brackets."""

    def __init__(self, **options: Any):
        super().__init__(markup=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a text in presentable form; rich calls this for every printed `str`."""
        return super().render_str(presentable(text), **options)
