"""The account of a run: its record in the store, and what tracking is told."""

from __future__ import annotations

import time
from dataclasses import replace

from pipeline.base.errors import Damaged, PipelineError
from pipeline.base.secrets import redact
from pipeline.base.states import CellState, RunState
from pipeline.running.facts import cell_facts
from pipeline.running.heartbeat import Heartbeat
from pipeline.running.live import LiveView
from pipeline.running.ready import Schedule
from pipeline.running.record import HEARTBEAT_S, RunRecord
from pipeline.running.stopping import Stop
from pipeline.store.store import Store
from pipeline.tracking import CellFacts, TrackerName, TrackingThread

_SAVING_SHARE = 0.05  # the largest share of the time that goes into saving progress
STOPPED_TRACKING_S = 10.0
_TRACKING_TIMEOUT_S = 120.0
_AWAY_S = 30.0  # how long the end of a run waits for a tracking server that is away


class Account:
    """Keeps the run's record in the store, and passes news of cells to tracking.

    Attributes:
        schedule, store, record, view, stop: the parts of the run, which its attempts share.
        heartbeat: of the run.
    """

    def __init__(
        self,
        schedule: Schedule,
        store: Store,
        record: RunRecord,
        tracking: TrackingThread,
        view: LiveView,
        stop: Stop,
    ):
        self.schedule = schedule
        self.store = store
        self.record = record
        self._tracking = tracking
        self.view = view
        self.stop = stop
        self._next_s = 0.0
        self._refused = False
        self.heartbeat = Heartbeat(store, record)

    def facts(self, name: str) -> CellFacts:
        """Return the facts of a cell that tracking records."""
        facts = cell_facts(self.schedule.planned(name))
        key = self.schedule.statuses[name].key
        return replace(facts, key=key, calls=self.schedule.calls(name))

    def note(self, name: str, state: CellState, source: str | None = None) -> None:
        """Tell tracking that there is something to record of a cell."""
        self._tracking.note(self.facts(name), state, source)

    def promote(self) -> None:
        """Give tracking the outputs that are shown with the run."""
        for name, status in self.schedule.statuses.items():
            for output, declared in self.schedule.cell(name).declaration.outputs.items():
                if declared.promote and status.state.has_result:
                    try:
                        self._tracking.promote(self.store.fetch(status.key, output))
                    except Damaged as error:
                        self.view.say(f"{name}: {error}")

    def check(self) -> None:
        """Show messages of tracking, and handle requests of other processes.

        Raises:
            PipelineError: tracking could not begin, and waiting would not correct that.
        """
        error = self._tracking.error
        if error is not None:
            self._refused = True
            raise PipelineError(
                f"{_unusable(error)} To run without it, and send the run later by `fls sync`, give "
                "--tracking-later."
            )
        self._attend()

    def _attend(self) -> None:
        """Show messages, handle requests and save, also while the end waits for tracking."""
        for message in self._tracking.messages():
            self.view.say(message)
        self.heartbeat.check()
        if self.heartbeat.asked_to_stop:
            self.stop.ask()
        self.save()

    def save(self, *, now: bool = False, leaving: bool = False) -> None:
        """Write the run's progress every few seconds, or `now`.

        With thousands of cells that takes long, so it takes at most a twentieth of the time. A run
        that another driver has taken over is not written; see `RunRecord.require_own`.
        """
        began_s = time.monotonic()
        if not now and began_s < self._next_s:
            return
        self.record.require_own(self.store)
        self.record.tracking = self._tracking.progress()
        self.record.save_progress(self.store, leaving=leaving)
        end_s = time.monotonic()
        self._next_s = end_s + max(HEARTBEAT_S, (end_s - began_s) / _SAVING_SHARE)

    def finish(self, state: RunState) -> None:
        """Wait until tracking has recorded the run, within limits; save the result."""
        self._announce_registration()
        limit_s = STOPPED_TRACKING_S if state is RunState.STOPPED else _TRACKING_TIMEOUT_S
        limit_s = min(limit_s, max(self.stop.left_s(), STOPPED_TRACKING_S))
        away_s = 0.0 if self.record.options.tracking_later else _AWAY_S
        away_s = min(away_s, self.stop.left_s())
        tracked = self._tracking.finish(limit_s, away_s, self._attend)
        for message in self._tracking.messages():
            self.view.say(message)
        error, command = self._tracking.error, self.record.sync_command
        if error is not None and not self._refused:  # it came after the last cell
            self.view.say(f"{_unusable(error)} `{command}` sends the run later.")
        if not tracked and error is None:
            self.view.say(f"Tracking is not complete; `{command}` sends the rest.")
        self.record.tracked = tracked
        self.save(now=True, leaving=True)

    def _announce_registration(self) -> None:
        """Announce models to register, each of which may take seconds."""
        done = self._tracking.progress().registered
        count = sum(
            name not in done and self.schedule.cell(name).registration is not None
            for name, status in self.schedule.statuses.items()
            if status.state.has_result
        )
        if count and self.record.options.tracking is TrackerName.MLFLOW:
            self.view.say(f"Registering {count} model{'s' if count > 1 else ''} ...")


def _unusable(error: Exception) -> str:
    return f"Tracking does not work ({type(error).__name__}: {redact(str(error))})."
