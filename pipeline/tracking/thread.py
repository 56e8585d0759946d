"""The thread in which the driver records its run.

A slow server must not keep the workers waiting, and one that is away must not end the run. The
thread holds no events, only which cells have news, so its memory is bounded by their number. While
the server is away it tries again, ever less often, for as long as the run lasts.
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
        name: of the tracker; imported in the thread, for MLflow takes seconds.
        store: holds what is to be recorded.
        progress: what an earlier life of the run recorded.
        patient: whether to continue even after a first error that waiting does not correct.

    Attributes:
        error: why tracking could not even begin, or None.
        behind: whether the server is away.
    """

    def __init__(
        self, name: TrackerName, store: Store, progress: TrackingProgress, *, patient: bool = False
    ):
        self._name = name
        self._store = store
        self._patient = patient or bool(progress.ids)
        self._live = progress.copy()  # the thread's own
        self._recorded = progress.copy()  # as of its last step
        self._change = threading.Condition()  # guards all that follows
        self._news: dict[str, News] = {}  # cell -> what is to be recorded of it
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
        """Begin; `chores` are done once, as soon as the run is open."""
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
        """Note an output, called as its folder is, that is kept with the run itself."""
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
        """Return what is recorded by now."""
        with self._change:
            return self._recorded.copy()

    def messages(self) -> list[str]:
        """Return what the user should know and has not been told."""
        with self._change:
            told, self._messages = self._messages, []
            return told

    def finish(
        self,
        timeout_s: float,
        away_s: float = math.inf,
        meanwhile: Callable[[], object] = lambda: None,
    ) -> bool:
        """Wait until all is recorded; False when it is not, for lack of time or for an error.

        Args:
            timeout_s: how long, at most.
            away_s: how long a server that is away is waited for.
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
                # How far the failed call came is found out by opening again.
                self._patient, opened = True, False
                self._fall_behind(error)
                with self._change:
                    self._change.wait_for(lambda: self._given_up, pause_s)
                pause_s = min(_LONGEST_PAUSE_S, 2 * pause_s)

    def _do(self, chores: Chores, tracker: AbstractTracker) -> None:
        """Do once what is to be done for other runs, whose errors are none of this one.

        Only an outage is.
        """
        try:
            chores(tracker)
        except Exception as error:
            if tracker.is_outage(error):
                raise
            self._tell(f"What earlier runs left open in tracking stays so: {redact(str(error))}")

    def _record_next(self, recorder: Recorder, requests: Requests) -> bool:
        """Wait for news and record it; once there is no more to come, record the run's end.

        Returns:
            Whether there is more to do.
        """
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
                    "the run goes on, and what is to be recorded waits in the store: it is sent "
                    "when the server is back, or by `fls sync`."
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
