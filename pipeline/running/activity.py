"""The activity of a running cell: its progress, its last message, and whether it progresses.

Progress is shown until it is complete. The time since then and the stage's messages are all that is
known of the work that follows.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.base.text import clock, cut

if TYPE_CHECKING:
    from pipeline.running.record import CellStatus

# A stage stalls after this many of its usual gaps between two reports, but not after a short
# silence.
_GAPS = 10
_LEAST_S = 120.0
_SAID_CHARACTERS = 100


@dataclass
class Pace:
    """The usual time between a stage's reports of progress; times are Unix seconds."""

    began: float = 0.0
    first: float = 0.0
    last: float = 0.0
    count: int = 0
    total: tuple[float, str] = (0.0, "")
    done: float = 0.0

    def begin(self, event: Mapping[str, Any]) -> None:
        """Note the beginning of an attempt."""
        self.began, self.count = event["time"], 0

    def move(self, event: Mapping[str, Any]) -> float:
        """Note a report of progress; return the usual gap in seconds.

        Another series (with another unit, say) has its own gaps. The first report of a series
        includes its preparations, so it counts only until the second.
        """
        total, done = (event["total"], event["unit"]), event["done"]
        if total != self.total or done < self.done:
            self.began, self.count = self.last or self.began, 0
        self.total, self.done, self.last = total, done, event["time"]
        self.first = self.first if self.count else self.last
        self.count += 1
        if self.count == 1:
            return max(0.0, self.last - self.began)
        return max(0.0, (self.last - self.first) / (self.count - 1))


def unfinished(status: CellStatus) -> tuple[float, float, str] | None:
    """Return a cell's progress (done, total, unit) until it is complete, else None."""
    progress = status.progress
    return progress if progress is not None and progress[0] < progress[1] else None


def stalled_since(status: CellStatus, now: float | None = None) -> float | None:
    """Return the Unix time of a stalled cell's last progress; None for any other cell."""
    if unfinished(status) is None or status.moved is None or status.gap_s is None:
        return None
    silent_s = (time.time() if now is None else now) - status.moved
    return status.moved if silent_s > max(_LEAST_S, _GAPS * status.gap_s) else None


def describe(status: CellStatus, now: float | None = None) -> str:
    """Return the activity of a running cell in words; "" if nothing is known.

    Args:
        status: the cell's status.
        now: Unix time, or None for the present.
    """
    now = time.time() if now is None else now
    progress, said = status.progress, status.said or ""
    if progress is None or status.moved is None:
        return said
    done, total, unit = progress
    if unfinished(status):
        since = stalled_since(status, now)
        stalled = f", no progress for {clock(now - since)}" if since is not None else ""
        return f"{done:g}/{total:g} {unit}{stalled}"
    ago = clock(max(0.0, now - status.moved))
    return f"{total:g} {unit} done {ago} ago" + (f"; {said}" if said else "")


def first_line(text: str) -> str:
    """Return the first line of a stage's message, cut to the room for it."""
    return cut(text.strip().partition("\n")[0], _SAID_CHARACTERS)
