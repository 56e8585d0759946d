"""A console for what anybody may have written: it shows no secrets, and obeys nothing.

Names, messages and documents come from specs, stages and stores. Printing code need not
think of it: every text that is printed, and every cell of a table, is made presentable here.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from pipeline.base.secrets import presentable


class RedactingConsole(Console):
    """Prints what it is told, without markup, for cells' names have brackets."""

    def __init__(self, **options: Any):
        super().__init__(markup=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a text as it is shown; rich calls this for all that is printed as `str`."""
        return super().render_str(presentable(text), **options)
