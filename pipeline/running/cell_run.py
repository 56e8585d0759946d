"""One cell of a run: its status, its failures so far, and its attempt in flight."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from pipeline.running.activity import Pace, first_line
from pipeline.running.documents import CellStatus
from pipeline.store.events import Event
from pipeline.store.leases import lease_s
from pipeline.worker.task import Outcome, died

# Leases that a worker may be silent; it reports far more often, except during a long call.
_SILENT_LEASES = 6


@dataclass
class CellRun:
    """One cell of a run; times are of this process's monotonic clock, in seconds.

    Attributes:
        status: the cell's entry in the run's record.
        failures: failed attempts since the last one that progressed before it died.
        repairs: damaged inputs that an attempt found.
        not_before_s: the earliest time of the next attempt.
        held: whether another run was last seen running the cell.
        started_s: when the attempt in flight was first heard of, or None.
        heard_s: when it was last heard of.
        advanced: whether it has written a checkpoint.
        pace: the usual time between its reports of progress.
        outcome: its end, while some of its events are still unread; else None.
    """

    status: CellStatus
    failures: int = 0
    repairs: int = 0
    not_before_s: float = 0.0
    held: bool = False
    started_s: float | None = None
    heard_s: float = 0.0
    advanced: bool = False
    pace: Pace = field(default_factory=Pace)
    outcome: Outcome | None = None

    def begin(self) -> None:
        """Begin another attempt."""
        self.started_s, self.heard_s, self.advanced = None, 0.0, False
        self.pace, self.outcome = Pace(), None

    def take(self, event: Event) -> None:
        """Update the status from an event of the attempt."""
        status = self.status
        if event["type"] == "start":
            self.started_s = time.monotonic()
            status.began = event["time"]
            self.pace.begin(event)
        elif event["type"] == "progress":
            status.progress = (event["done"], event["total"], event["unit"])
            status.moved, status.gap_s = time.time(), self.pace.move(event)
        elif event["type"] == "text":
            status.said = first_line(event["text"])
        elif event["type"] == "checkpoint":
            self.advanced = True

    def end(self) -> None:
        """Clear the parts of the status that describe a running attempt."""
        status = self.status
        status.began = status.progress = status.moved = status.gap_s = status.said = None

    def overdue(self, limit_s: float | None) -> Outcome | None:
        """Return the outcome of an attempt that ran or was silent for too long; else None.

        Args:
            limit_s: seconds that an attempt may take, or None.
        """
        if self.started_s is None or self.outcome is not None:
            return None
        now = time.monotonic()
        if limit_s is not None and now - self.started_s > limit_s:
            return {**died(f"timed out after {limit_s:g} s (timeout_s)"), "status": "failed"}
        if now - self.heard_s > (silent_s := _SILENT_LEASES * lease_s()):
            return died(f"no sign of life for {silent_s:g} s")
        return None
