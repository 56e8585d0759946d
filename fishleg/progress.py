"""A progress line on a terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType

_EVERY_S = 0.1
_WIDTH = 79


class ProgressLine:
    """One line of standard error, overwritten on a terminal, and absent elsewhere.

    Args:
        shown: whether to show it; None: where standard error is a terminal.
    """

    def __init__(self, shown: bool | None = None):
        self._shown = sys.stderr.isatty() if shown is None else shown
        self._began_s = self._last_s = 0.0
        self._what = ""

    def __enter__(self) -> ProgressLine:
        self._began_s = time.monotonic()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._shown and self._what:
            self._write("")

    def tell(self, what: str, done: int = 0, total: int = 0) -> None:
        """Show the present work: a phrase, and its share done (nothing where `total` is 0)."""
        now_s = time.monotonic()
        if not self._shown or (what == self._what and now_s - self._last_s < _EVERY_S):
            return
        self._what, self._last_s = what, now_s
        share = f" {100 * done // total:3d} %" if total else ""
        self._write(f"fishleg: {what}{share}, {now_s - self._began_s:.0f} s")

    def _write(self, text: str) -> None:
        sys.stderr.write(f"\r{text[:_WIDTH].ljust(_WIDTH)}\r{text[:_WIDTH]}")
        sys.stderr.flush()
