"""The thread in which the driver records its run in tracking.

So a slow server does not delay the workers, and a server that is away does not end the run. The
thread holds the names of cells with news, no events, so their number bounds its memory. While the
server is away it retries, with growing pauses, until the run ends.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from pathlib import Path

from pipeline.base.parallel import Requests
from pipeline.base.secrets import redact
from pipeline.base.states import CellState, RunState
from pipeline.store.store import Store
from pipeline.tracking.base import (
    AbstractTracker,
    CellFacts,
    RunFacts,
    TrackerName,
    TrackingProgress,
    make_tracker,
)
from pipeline.tracking.recorder import News, Recorder

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 15.0
_TURN_S = 1.0

Chores = Callable[[AbstractTracker], object]


class TrackingThread:
    """Records a run, in the order of its news.

    Args:
        name: of the tracker; the thread imports it, because MLflow takes seconds.
        store: holds the news.
        progress: of an earlier life of the run.
        patient: whether to continue even after a first error that waiting does not correct.

    Attributes:
        error: why tracking could not begin, or None.
        behind: whether the server is away.
    """

    def __init__(
        self, name: TrackerName, store: Store, progress: TrackingProgress, *, patient: bool = False
    ):
        self._name = name
        self._store = store
        self._patient = patient or bool(progress.ids)
        self._live = progress.copy()  # the thread's own
        self._recorded = progress.copy()  # after its last step
        self._change = threading.Condition()  # guards the following attributes
        self._news: dict[str, News] = {}  # by cell
        self._promoted: list[Path] = []
        self._end: RunState | None = None
        self._abandoned = False
        self._set_aside: dict[str, str] = {}
        self._finishing = self._given_up = False
        self._messages: list[str] = []
        self._thread: threading.Thread | None = None
        self.error: Exception | None = None
        self.behind = False

    def open(self, run: RunFacts, chores: Chores) -> None:
        """Begin; `chores` is called once, as soon as the run is open."""
        self._thread = threading.Thread(
            target=self._work, args=(run, chores), name="tracking", daemon=True
        )
        self._thread.start()

    def note(self, cell: CellFacts, state: CellState, source: str | None = None) -> None:
        """Note that there is something to record of a cell, see `Recorder.record`."""
        with self._change:
            self._news[cell.cell] = cell, state, source
            self._change.notify()

    def promote(self, folder: Path) -> None:
        """Note an output, named by its folder, that is kept with the run itself."""
        with self._change:
            self._promoted.append(folder)

    def close(self, state: RunState) -> None:
        """Note how the run ended; recorded once all that was noted before is."""
        with self._change:
            self._end = state

    def abandon(self, state: RunState) -> None:
        """Note how the run ended, and record nothing else: what there was to say cannot be read."""
        with self._change:
            self._abandoned, self._end = True, state
            self._news.clear()
            self._promoted.clear()

    def progress(self) -> TrackingProgress:
        """Return the progress so far."""
        with self._change:
            return self._recorded.copy()

    def messages(self) -> list[str]:
        """Return new messages for the user."""
        with self._change:
            messages, self._messages = self._messages, []
            return messages

    def finish(
        self,
        timeout_s: float,
        away_s: float = math.inf,
        meanwhile: Callable[[], object] = lambda: None,
    ) -> bool:
        """Wait until all is recorded; return False after a timeout or an error.

        Args:
            timeout_s: limit in seconds.
            away_s: limit in seconds for a server that is away.
            meanwhile: called every second or so.
        """
        if self._thread is None:
            return False
        with self._change:
            self._finishing = True
            self._change.notify()
        end_s, since_s = time.monotonic() + timeout_s, None
        try:
            while self._thread.is_alive():
                now = time.monotonic()
                since_s = (since_s or now) if self.behind else None
                left_s = min(end_s, math.inf if since_s is None else since_s + away_s) - now
                if left_s <= 0:
                    break
                self._thread.join(min(left_s, _TURN_S))
                meanwhile()
        finally:
            with self._change:
                self._given_up = True
                self._change.notify()
        return self._recorded.ended and not self._set_aside

    # -- in the thread

    def _work(self, run: RunFacts, chores: Chores) -> None:
        try:
            tracker = make_tracker(self._name)
        except Exception as error:  # its library is not installed, or broken
            self.error = error
            return
        recorder = Recorder(tracker, self._store, run, self._live, self._stepped, self._tell)
        self._set_aside = recorder.set_aside
        with Requests(self._store.storage.at_once) as requests:
            self._record_all(recorder, requests, tracker, chores)

    def _record_all(
        self, recorder: Recorder, requests: Requests, tracker: AbstractTracker, chores: Chores
    ) -> None:
        opened, pause_s = False, _FIRST_PAUSE_S
        while not self._given_up:
            try:
                if not opened:
                    recorder.open()
                    opened = self._patient = True
                    self._do(chores, tracker)
                while self._record_next(recorder, requests):
                    pause_s = _FIRST_PAUSE_S
                return
            except Exception as error:  # a server or a database may fail in any way
                if not self._patient and not tracker.is_outage(error):
                    self.error = error
                    return
                # Opening again finds what the failed call has done.
                self._patient, opened = True, False
                self._fall_behind(error)
                with self._change:
                    self._change.wait_for(lambda: self._given_up, pause_s)
                pause_s = min(_LONGEST_PAUSE_S, 2 * pause_s)

    def _do(self, chores: Chores, tracker: AbstractTracker) -> None:
        """Call the chores for other runs; of their errors, only an outage concerns this run."""
        try:
            chores(tracker)
        except Exception as error:
            if tracker.is_outage(error):
                raise
            self._tell(f"Earlier runs stay open in tracking: {redact(str(error))}")

    def _record_next(self, recorder: Recorder, requests: Requests) -> bool:
        """Wait for news and record it, or else the run's end; return whether more may come."""
        with self._change:
            if not self._news:
                self._catch_up()
            self._change.wait_for(lambda: self._news or self._finishing)
            if self._given_up:
                return False
            taken = {name: self._news.pop(name) for name in list(self._news)[: requests.at_once]}
        if not taken:
            for folder in self._promoted:
                recorder.promote(folder.name, folder)
            if self._end is not None:
                recorder.close(self._end)
            return False
        if len(taken) > 1:
            recorder.read_ahead(list(taken.values()), requests)
        try:
            while taken and not self._abandoned and not self._given_up:
                name = next(iter(taken))
                recorder.record(*taken[name])
                del taken[name]
        finally:  # also after an outage
            with self._change:  # in front, unless there is newer news of the cell
                if not self._abandoned:
                    self._news = {**taken, **self._news}
        return True

    def _fall_behind(self, error: Exception) -> None:
        with self._change:
            if not self.behind:
                self.behind = True
                self._messages.append(
                    f"Tracking is behind ({type(error).__name__}: {redact(str(error))}); "
                    "the run continues. Its news wait in the store until the server is back, or "
                    "until `fls sync` sends them."
                )

    def _catch_up(self) -> None:
        if self.behind:
            self.behind = False
            self._messages.append("Tracking has caught up.")

    def _tell(self, text: str) -> None:
        with self._change:
            self._messages.append(text)

    def _stepped(self, cell: str | None) -> None:
        with self._change:
            if cell is None:
                self._recorded = self._live.copy()
            else:
                self._recorded.follow(self._live, cell)
