"""Events of running stages: metrics, progress and the like, forwarded through the store.

A worker appends events to its attempt in numbered segments, and the driver tails them. Printed
output is no event, see `pipeline.store.logs`. An event is a flat JSON object with `type` and `time`
(Unix seconds); the types, with their further fields:

    start       run, host, pid: first in every attempt
    metrics     values (name -> number), step (None: a final value)
    system      values (name -> number): a sample, see `pipeline.worker.system`
    progress    done, total, unit
    text        text: a message of the stage, which is also in its log
    record      name, params, metrics: one evaluated object
    checkpoint  number; and the cost of the attempt so far, see `pipeline.worker.cost`
    heartbeat   no fields: the stage is alive
    end         status: last in every attempt that was not killed; and the cost of a failed one

A segment holds only the latest `progress` and the latest `text`.

After an attempt has ended, consecutive segments are merged: the first is replaced by all of them,
then the others are deleted. The first line of a merged segment counts the events of each, so a
reader that has read some of them continues within it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from pipeline.base.shapes import Count
from pipeline.store.leases import lease_s

if TYPE_CHECKING:
    from pipeline.store.store import Store

Event = dict[str, Any]

_FIRST_INTERVAL_S = 1.0
_LAST_INTERVAL_S = 10.0
_LATEST_ALONE = {"progress", "text"}
EVENTS_AT_ONCE = 5000  # most events of a segment, and of one read
_MERGED = "merged"  # the type of a merged segment's first line


class EventWriter:
    """Appends events in the background, or a heartbeat when there are none.

    The interval between segments grows from 1 s to 10 s over a stage's first ten minutes: events of
    a short stage are seen at once, and a long one leaves few files.

    Args:
        append: takes the events of one segment.
        meanwhile: called before each segment, and when there are no events.
    """

    def __init__(
        self, append: Callable[[list[Event]], None], meanwhile: Callable[[], object] = lambda: None
    ):
        self._append = append
        self._meanwhile = meanwhile
        self._pending: list[Event | None] = []
        self._latest: dict[str, int] = {}  # type -> index of the latest in `_pending`
        self._lock = threading.Lock()
        self._writing = threading.Lock()  # not `_lock`: a slow storage must not block the stage
        self._stopping = threading.Event()
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._work, name="events", daemon=True)
        self._error: Exception | None = None

    def __enter__(self) -> EventWriter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()
        self.flush()

    def emit(self, event: Event) -> None:
        """Take an event; a checkpoint is written at once, with all events before it.

        The next attempt resumes from it and does not repeat these events.

        Raises:
            OSError: the store refused earlier events, so the stage must stop.
        """
        if self._error is not None:
            raise OSError(f"Events cannot be written: {self._error}") from self._error
        kind = event["type"]
        with self._lock:
            if kind in _LATEST_ALONE:
                if kind in self._latest:
                    self._pending[self._latest[kind]] = None
                self._latest[kind] = len(self._pending)
            self._pending.append(event)
        if kind == "checkpoint":
            self.flush()

    def flush(self) -> None:
        """Write the pending events, in segments of at most `EVENTS_AT_ONCE`."""
        with self._writing:
            self._meanwhile()
            with self._lock:
                events = [event for event in self._pending if event is not None]
                self._pending, self._latest = [], {}
            for start in range(0, len(events), EVENTS_AT_ONCE):
                self._append(events[start : start + EVENTS_AT_ONCE])

    def _work(self) -> None:
        last_written = time.monotonic()
        while not self._stopping.wait(self._interval_s()):
            now = time.monotonic()
            try:
                if self._pending:
                    last_written = now
                elif now - last_written >= min(_LAST_INTERVAL_S, lease_s() / 3):
                    last_written = now
                    self.emit({"type": "heartbeat", "time": time.time()})
                self.flush()
            except Exception as error:  # `emit` raises it in the stage's thread
                self._error = error
                return

    def _interval_s(self) -> float:
        elapsed = time.monotonic() - self._began
        longest_s = min(_LAST_INTERVAL_S, lease_s() / 3)
        return min(longest_s, max(_FIRST_INTERVAL_S, elapsed / 60))


def merge(segments: Iterable[Sequence[Mapping[str, Any]]]) -> list[Mapping[str, Any]]:
    """Return the lines of a merged segment.

    >>> split(merge([[{"type": "start"}], [{"type": "end"}]]))
    [[{'type': 'start'}], [{'type': 'end'}]]
    """
    parts = list(segments)
    head = {"type": _MERGED, "events": [len(part) for part in parts]}
    return [head, *(event for part in parts for event in part)]


def split(lines: list[Any]) -> list[list[Any]]:
    """Return the segments in a stored one: itself, or those that were merged into it.

    Raises:
        ValueError: its first line does not fit the others.
    """
    head = lines[0] if lines else None
    if not isinstance(head, dict) or head.get("type") != _MERGED:
        return [lines]
    counts = head.get("events")
    if (
        not isinstance(counts, list)
        or not all(type(count) is int and count > 0 for count in counts)
        or sum(counts) != len(lines) - 1
    ):
        raise ValueError("its first line does not fit the others")
    left = iter(lines[1:])
    return [list(islice(left, count)) for count in counts]


def words(event: Mapping[str, Any]) -> str:
    """Return an event as text for people, or "".

    >>> words({"type": "metrics", "step": 3, "values": {"loss": 0.25}})
    'step 3: loss 0.25'
    """
    if event["type"] == "text":
        return str(event["text"])
    if event["type"] == "metrics":
        values = "  ".join(f"{name} {value:.6g}" for name, value in event["values"].items())
        return values if event["step"] is None else f"step {event['step']}: {values}"
    return ""


@dataclass(frozen=True)
class Cursor:
    """The position of a reader: it has read up to and including `segment` of `attempt`."""

    attempt: Count = 0
    segment: Count = 0


class EventTail:
    """Follows the events of one run's cells.

    Attempts of other runs at the same key (two drivers may race for a cell) are skipped: the first
    event of an attempt names its run, unless it is damaged.

    Args:
        source: the store.
        run_id: the run.
        cursors: cell -> position to continue from.
    """

    def __init__(self, source: Store, run_id: str, cursors: Mapping[str, Cursor]):
        self._source = source
        self._run_id = run_id
        self._cursors = dict(cursors)
        self._foreign: set[tuple[str, int]] = set()

    def skip(self, cell: str, key: str) -> None:
        """Skip the existing attempts: only events of later ones are read."""
        attempts = self._source.attempts(key)
        self._cursors[cell] = Cursor(attempts[-1] + 1 if attempts else 0)

    def read(self, cell: str, key: str, *, ended: bool = True) -> tuple[list[Event], Cursor]:
        """Return the cell's next events, and the position after them.

        Fewer than `EVENTS_AT_ONCE` are all events so far.

        Args:
            cell: the cell.
            key: its key.
            ended: whether its attempt may have ended; only then can segments have been merged.
        """
        cursor = self._cursors.get(cell, Cursor())
        found: list[Event] = []
        for attempt in self._source.attempts(key):
            if attempt < cursor.attempt or (key, attempt) in self._foreign:
                continue
            after = cursor.segment if attempt == cursor.attempt else 0
            events, last = self._source.read_events(
                key, attempt, after, limit=EVENTS_AT_ONCE, merged=ended
            )
            if not events:
                continue
            if after == 0 and events[0].get("run", self._run_id) != self._run_id:
                self._foreign.add((key, attempt))
                continue
            cursor = Cursor(attempt, last)
            found += events
            if len(found) >= EVENTS_AT_ONCE:
                break
        self._cursors[cell] = cursor
        return found, cursor
