"""Events: what a running stage tells the world, on its way through the store.

A worker appends events to its attempt in numbered segments; the driver tails them, so many at a
time that it stays awake. What a stage prints is no event, see `pipeline.store.logs`. One event is a
flat JSON object with `type` and `time` (Unix seconds); the types, with their further fields:

    start       run, host, pid: first in every attempt
    metrics     values (name -> number), step (None: a final value)
    system      values (name -> number): a sample, see `pipeline.worker.system`
    progress    done, total, unit
    text        text: a line that the stage said, which is also in its log
    record      name, params, metrics: one evaluated object
    checkpoint  number; and what the attempt has cost so far, see `pipeline.worker.cost`
    heartbeat   nothing: the stage is alive and has nothing to say
    end         status: last in every attempt that was not killed; and the cost of one that failed

Of `progress` and `text`, which tell how a stage stands, a segment holds the latest one alone.

Once an attempt has ended, runs of its segments are merged: the first of a run is replaced by all of
them, and the others are deleted. So a new reader finds what there was, and one that has
read some of a run goes on within it: a merged segment says in a first line which of its events had
been in which segment.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from pipeline.base.shapes import Count
from pipeline.store.leases import lease_s

Event = dict[str, Any]

_FIRST_INTERVAL_S = 1.0
_LAST_INTERVAL_S = 10.0
_LATEST_ALONE = {"progress", "text"}
EVENTS_AT_ONCE = 5000  # in a segment, and of a cell in one turn of its reader
_MERGED = "merged"  # the type of a merged segment's first line


class EventWriter:
    """Appends events in the background, and a heartbeat when there are none.

    The interval between segments grows from 1 s to 10 s over a stage's first ten minutes: a short
    stage is seen at once, a long one does not leave thousands of tiny files.

    Args:
        append: takes the events of one segment.
        meanwhile: called before each look for events, also when there are none.
    """

    def __init__(
        self,
        append: Callable[[list[Event]], None],
        meanwhile: Callable[[], object] = lambda: None,
    ):
        self._append = append
        self._meanwhile = meanwhile
        self._pending: list[Event | None] = []
        self._latest: dict[str, int] = {}  # type -> where in `_pending` the latest one is
        self._lock = threading.Lock()
        self._writing = threading.Lock()  # apart, so that a slow storage does not slow the stage
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
        """Take an event; a checkpoint is written at once, with all that was said before it.

        Otherwise a kill right after it would lose what the next attempt does not say again.

        Raises:
            OSError: the store refused earlier events; the stage must not go on unheard.
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
        if event["type"] == "checkpoint":
            self.flush()

    def flush(self) -> None:
        """Write what is pending, as one segment unless that is a great deal."""
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
            except Exception as error:  # whatever the storage raises belongs to the stage's thread
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
    """Return the segments that a stored one holds: itself, or those that were merged into it.

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
    """Return what an event says to people, or "".

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
    """How far a cell's events have been read: up to `segment` of `attempt`, both included."""

    attempt: Count = 0
    segment: Count = 0


class EventSource(Protocol):
    """The part of the store that a tail reads."""

    def attempts(self, key: str) -> list[int]:
        """Return the numbers of the key's attempts, ascending."""

    def read_events(
        self, key: str, attempt: int, after: int, *, limit: int, merged: bool
    ) -> tuple[list[Event], int]:
        """Return `limit` events or so after segment `after`, and the last segment's number.

        With `merged`, they are also looked for in what was merged meanwhile.
        """


class EventTail:
    """Follows the events that the cells of one run write.

    Attempts of other runs at the same key (two drivers may race for a cell) are passed over: the
    first event of an attempt says whose it is, unless it got lost by damage.

    Args:
        source: the store.
        run_id: the run whose attempts are followed.
        cursors: cell -> where to go on; what came before has been handled in an earlier life.
    """

    def __init__(self, source: EventSource, run_id: str, cursors: Mapping[str, Cursor]):
        self._source = source
        self._run_id = run_id
        self._cursors = dict(cursors)
        self._foreign: set[tuple[str, int]] = set()

    def skip(self, cell: str, key: str) -> None:
        """Pass over the attempts that there are: only what later ones say will be read."""
        attempts = self._source.attempts(key)
        self._cursors[cell] = Cursor(attempts[-1] + 1 if attempts else 0)

    def read(self, cell: str, key: str, *, ended: bool = True) -> tuple[list[Event], Cursor]:
        """Return the cell's next events, and how far they go.

        Fewer than `EVENTS_AT_ONCE` are all that there are.

        Args:
            cell: the cell.
            key: its key.
            ended: whether its attempt may have ended. While it has not, nothing is merged, and a
                storage need not be asked for that.
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
