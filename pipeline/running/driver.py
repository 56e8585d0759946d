"""The driver: the loop that runs a plan to its end.

The driver alone decides and records: it hands ready cells to the executor, reads their events,
retries, repairs damaged inputs, keeps the run's record in the store, and feeds tracking and the
live view. Workers know nothing of each other.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice

from pipeline.base.errors import StorageUnavailable, TakenOver
from pipeline.base.parallel import Requests
from pipeline.base.states import CellState, RunState
from pipeline.executors import AbstractExecutor
from pipeline.planning.planner import Plan
from pipeline.running.account import STOPPED_TRACKING_S, Account
from pipeline.running.attempts import LISTEN_S, Attempts
from pipeline.running.live import LiveView
from pipeline.running.ready import Schedule
from pipeline.running.record import RunRecord
from pipeline.running.runs import recorded_ids
from pipeline.running.stopping import Stop
from pipeline.store.leases import Holder, LeaseWatch
from pipeline.store.store import Store
from pipeline.tracking import TrackingThread

_WAIT_S = 0.2
_LISTEN_EVERY_S = 1.0
_LOOK_EVERY_S = 30.0  # between checks that a node still fits each waiting cell
GRACE_S = 10.0


class Driver:
    """Runs a plan.

    Args:
        plan: the plan.
        store: holds results, events and the run's record.
        record: of a new run, or of an interrupted one that is resumed.
        executor: runs the cells; the caller has checked their demands against it.
        tracking: records the run; the caller has opened it.
        view: shows the run.
        stop_after_s: seconds after which the run stops as by SIGTERM, or None.
        grace_s: seconds that workers have for a checkpoint when the run stops.

    Attributes:
        stop: has the signal that stopped the run.
    """

    def __init__(
        self,
        plan: Plan,
        store: Store,
        record: RunRecord,
        executor: AbstractExecutor,
        tracking: TrackingThread,
        view: LiveView,
        stop_after_s: float | None = None,
        grace_s: float = GRACE_S,
    ):
        self._plan = plan
        self._store = store
        self._record = record
        self._executor = executor
        self._tracking = tracking
        self._view = view
        self._grace_s = grace_s
        self.stop = Stop(stop_after_s)
        self._requests = Requests(store.storage.at_once)
        self._schedule = Schedule(plan)
        self._statuses = self._schedule.statuses
        self._account = Account(self._schedule, store, record, tracking, view, self.stop)
        self._attempts = Attempts(self._account, executor, self._requests)
        self._leases = LeaseWatch(store, record.run_id)
        self._listened_s = 0.0
        self._looked_s = time.monotonic()
        self._lacking: set[str] = set()

    def run(self) -> RunState:
        """Run until all cells have settled, or a signal asks to stop; return the final state.

        Workers are always stopped, and the run gets its final state in the store and in tracking;
        only a kill -9, or a storage that is away, leaves the run to be found interrupted.

        Raises:
            StorageUnavailable: the storage was away for longer than the driver waits.
            TakenOver: another driver has taken the run over.
        """
        with self._requests, self._account.heartbeat, self.stop.handling_signals():
            try:
                return self._run()
            except TakenOver:
                self._view.close(self._statuses)
                raise
            except StorageUnavailable as error:
                self._executor.stop()
                self._view.close(self._statuses)
                self._tracking.abandon(RunState.STOPPED)
                self._tracking.finish(STOPPED_TRACKING_S)
                where = self._record.where_in(self._store.url)
                raise StorageUnavailable(
                    f"{error} The run has ended, and its stored results are kept: once the storage "
                    f"is back, `fls resume {self._record.run_id} {where}` resumes it."
                ) from error

    def _run(self) -> RunState:
        """Run to the end and record it.

        Raises:
            StorageUnavailable: the storage is away, so nothing is recorded.
            TakenOver: another driver has taken the run over, and records it.
        """
        try:
            self._open()
            while not self._schedule.settled and self.stop.signal is None:
                self._step()
        except (StorageUnavailable, TakenOver):
            raise
        except BaseException:
            self._close(RunState.FAILED)
            raise
        state = self._final_state()
        self._close(state)
        return state

    # -- beginning and end

    def _open(self) -> None:
        self._record.claim(self._store, self._statuses)
        self._account.save(now=True)
        self._account.heartbeat.start()
        self._account_for_cached()

    def _account_for_cached(self) -> None:
        """Record the cells with stored results; finish those of an earlier life of this run."""
        cached = [(one.cell.name, one.manifest) for one in self._plan.cells if one.manifest]
        known = recorded_ids(
            self._store, [manifest.key for _, manifest in cached], self._record.destination
        )
        for name, manifest in cached:
            if manifest.making.get("run") != self._record.run_id:
                source = known[manifest.key].cell if manifest.key in known else None
                self._account.note(name, CellState.CACHED, source)
            elif name in self._record.tracking.closed:
                self._schedule.change(name, CellState.DONE)
                facts = self._account.facts(name)
                if facts.registration is not None or facts.tags:  # perhaps not recorded yet
                    self._account.note(name, CellState.CACHED)
            else:  # complete, but not recorded so far
                self._statuses[name].seconds = manifest.making.get("seconds", 0.0)
                self._schedule.change(name, CellState.DONE)
                self._account.note(name, CellState.DONE)

    def _final_state(self) -> RunState:
        if self.stop.signal is not None:
            return RunState.STOPPED
        states = {status.state for status in self._statuses.values()}
        return RunState.FAILED if states & {CellState.FAILED, CellState.SKIPPED} else RunState.DONE

    def _close(self, state: RunState) -> None:
        if self.stop.signal is not None:
            self._wind_down(state)
        self._attempts.abandon_all()
        if self.stop.signal is None:
            self._account.promote()
        self._tracking.close(state)
        self._record.state = state
        self._account.save(now=True)  # the sender of the signal may not wait for tracking
        self._executor.stop()
        self._view.close(self._statuses)
        self._account.finish(state)

    def _wind_down(self, state: RunState) -> None:
        """Let the workers write a checkpoint, for as long as the grace lasts.

        The run's state is saved first: the sender of the signal may not wait for them.
        """
        self._record.state = state
        self._account.save(now=True)
        end_s = time.monotonic() + self._grace_s
        try:
            if self._attempts.any_begun():
                self._view.say(
                    f"Stopping: up to {self._grace_s:g} s for checkpoints; again to stop at once."
                )
            self._executor.preempt()
            while self._attempts.any_begun() and time.monotonic() < end_s:
                self._attempts.take_outcomes(_WAIT_S)
        except KeyboardInterrupt:
            return  # cells without a new checkpoint resume from the one before

    # -- the loop

    def _step(self) -> None:
        if self.stop.left_s() == 0:
            self.stop.ask()
            return
        self._submit_ready()
        self._attempts.take_outcomes(0.0 if self._attempts.unread else _WAIT_S)
        now = time.monotonic()
        if self._attempts.unheard or now - self._listened_s >= _LISTEN_EVERY_S:
            self._listened_s = now
            self._attempts.listen_to_all()
            self._attempts.check_deadlines()
        if now - self._looked_s >= _LOOK_EVERY_S:
            self._looked_s = now
            self._check_room()
        self._account.check()
        self._view.show(self._statuses)

    def _submit_ready(self) -> None:
        window = self._executor.window
        limit = min(self._record.options.max_parallel or window, window)
        end_s = time.monotonic() + LISTEN_S
        found_one = True
        while found_one:  # a result in the store makes other cells ready at once
            found_one = False
            waiting = self._waiting()
            while (room := limit - len(self._attempts.in_flight)) > 0 and time.monotonic() < end_s:
                names = list(islice(waiting, min(room, self._requests.at_once)))
                if not names:
                    break
                for name, (exists, holder) in self._requests.ask(self._look, names):
                    if exists:
                        self._attempts.use_stored(name)
                        found_one = True
                    elif not self._is_held(name, holder):
                        self._attempts.begin(name)

    def _waiting(self) -> Iterator[str]:
        """Yield the cells that may run now, as far as can be told without the store."""
        busy = {cell.status.key for cell in self._attempts.in_flight.values()}
        for name in self._schedule.ready():
            cell = self._attempts.cells[name]
            key = cell.status.key
            if key not in busy and cell.not_before_s <= time.monotonic():
                busy.add(key)
                yield name

    def _look(self, name: str) -> tuple[bool, Holder | None]:
        """Return whether the store has a cell's result, and if not, which run works on it."""
        key = self._statuses[name].key
        if self._store.readable(key) is not None:
            return True, None
        holder = self._leases.holder(key)
        if holder is None:
            self._attempts.tail.skip(name, key)
        return False, holder

    def _is_held(self, name: str, holder: Holder | None) -> bool:
        """Tell whether another run works on the cell; its result is then waited for."""
        cell = self._attempts.cells[name]
        if holder is None:
            cell.held = False
            return False
        if not cell.held:
            self._view.say(
                f"{name}: run {holder.run} on {holder.host} is running it; waiting for its result."
            )
        cell.held = True
        cell.not_before_s = time.monotonic() + _LISTEN_EVERY_S
        return True

    def _check_room(self) -> None:
        """Say once of each stage that no node fits a waiting cell: a node may have been lost."""
        waiting = [
            (name, self._schedule.cell(name).resources)
            for name, cell in self._attempts.in_flight.items()
            if cell.started_s is None
        ]
        if waiting and not self._plan.spec.autoscaling:  # with it, the start has said so
            lacking = set(self._executor.check(waiting, may_grow=True))
            for lack in sorted(lacking - self._lacking):
                self._view.say(lack)
            self._lacking = lacking
