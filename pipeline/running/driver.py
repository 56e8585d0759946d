"""The driver: the loop that brings a plan to its end.

It alone decides and writes down: it hands ready cells to the executor, tails their events, retries,
repairs damaged inputs, keeps the run's record in the store, and feeds tracking and the live view.
Workers know nothing of each other.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from types import FrameType

from pipeline.base.errors import Damaged, PipelineError, StorageUnavailable, TakenOver
from pipeline.base.parallel import Requests
from pipeline.base.secrets import redact
from pipeline.base.states import CellState, RunState
from pipeline.executors import AbstractExecutor
from pipeline.planning.planner import Plan
from pipeline.running.activity import Pace, first_line
from pipeline.running.facts import cell_facts
from pipeline.running.heartbeat import Heartbeat
from pipeline.running.live import LiveView
from pipeline.running.ready import Schedule
from pipeline.running.record import HEARTBEAT_S, RunRecord, recorded_ids
from pipeline.store.events import EVENTS_AT_ONCE, Event, EventTail
from pipeline.store.leases import Holder, LeaseWatch, lease_s
from pipeline.store.store import Store
from pipeline.tracking import CellFacts, TrackerName, TrackingThread
from pipeline.worker.worker import STOPPING, Outcome, died

_WAIT_S = 0.2
_LISTEN_EVERY_S = 1.0
_LISTEN_S = 0.5  # at a time, to all cells together: signals and deadlines wait meanwhile
_LOOK_EVERY_S = 30.0  # whether there still is a node for what waits
# Leases that a worker may be silent; it gives signs of life far more often, but for a long call.
_SILENT_LEASES = 6
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0
_REPAIRS = 3
_SAVING_SHARE = 0.05  # of the time, at most, that goes into writing how far the run is
GRACE_S = 10.0
_TRACKING_TIMEOUT_S = {RunState.DONE: 120.0, RunState.FAILED: 120.0, RunState.STOPPED: 10.0}
_AWAY_S = 30.0  # how long a server that is away is waited for at the end


@dataclass
class _Flight:
    """A cell that the executor has.

    Attributes:
        started_s: when its attempt was first heard of, by this process's monotonic clock, or None.
        heard_s: when it was last heard of.
        advanced: whether it has written a checkpoint.
        pace: how fast it gets on.
        outcome: how it has ended, while not all of its events are taken in; else None.
    """

    started_s: float | None = None
    heard_s: float = 0.0
    advanced: bool = False
    pace: Pace = field(default_factory=Pace)
    outcome: Outcome | None = None


class Driver:
    """Runs a plan.

    Args:
        plan: what to run.
        store: where results, events and the run's record go.
        record: of a new run, or of an interrupted one that goes on.
        executor: runs the cells; checked against their demands by the caller.
        tracking: records the run, which it has been told to open.
        view: shows it.
        stop_after_s: seconds after which it stops, as if it were told to by SIGTERM, or None.
        grace_s: seconds that the workers have for a checkpoint when it stops.
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
        self._token = store.prepare()
        self._record = record
        self._executor = executor
        self._tracking = tracking
        self._view = view
        self._stop_s = None if stop_after_s is None else time.monotonic() + stop_after_s
        self._grace_s = grace_s
        self._schedule = Schedule(plan)
        self._statuses = self._schedule.statuses
        self._leases = LeaseWatch(store, record.run_id)
        self._held_s: dict[str, float] = {}
        self._tail = EventTail(store, record.run_id, {})
        self._requests = Requests(store.storage.at_once)
        self._flights: dict[str, _Flight] = {}
        self._failures: Counter[str] = Counter()
        self._repairs: Counter[str] = Counter()
        self._retry_s: dict[str, float] = {}
        self._listened_s = 0.0
        self._unheard: list[str] = []
        self._looked_s = time.monotonic()
        self._lacking: set[str] = set()
        self._heartbeat = Heartbeat(store, record)
        self._save_s = 0.0
        self._superseded = False
        self._refused = False
        self.signal: int | None = None

    def run(self) -> RunState:
        """Run until all cells have settled, or a signal says stop; return how it ended.

        Whatever happens, workers are stopped and the run gets its final state, here and in
        tracking; only a kill -9, or a storage that is away, leaves it to be found interrupted.

        Raises:
            StorageUnavailable: the storage is away, for longer than it was waited for.
        """
        with self._requests, self._heartbeat, self._handling_signals():
            try:
                return self._run()
            except StorageUnavailable as error:
                self._executor.stop()
                self._view.close(self._statuses)
                self._tracking.abandon(RunState.STOPPED)
                self._tracking.finish(_TRACKING_TIMEOUT_S[RunState.STOPPED])
                where = self._record.where_in(self._store.url)
                raise StorageUnavailable(
                    f"{error} The run has ended, and what was stored is kept: once the storage is "
                    f"back, `fls resume {self._record.run_id} {where}` goes on from there."
                ) from error

    def _run(self) -> RunState:
        """Run until all is over, and say so; but not to a storage that is away.

        Raises:
            StorageUnavailable: it is.
            TakenOver: the run is another driver's by now.
        """
        state: RunState | None = RunState.FAILED
        try:
            self._open()
            while not self._schedule.settled and self.signal is None:
                self._step()
            state = self._final_state()
            return state
        except StorageUnavailable:
            state = None
            raise
        except TakenOver:
            self._superseded = True
            raise
        finally:
            if state is not None:
                self._close(state)

    # -- beginning and end

    def _open(self) -> None:
        self._record.claim(self._store, self._statuses)
        self._save(now=True)
        self._heartbeat.start()
        self._account_for_cached()

    def _account_for_cached(self) -> None:
        """Record the cells that are in the store; finish those of an earlier life of this run."""
        cached = [(one.cell.name, one.manifest) for one in self._plan.cells if one.manifest]
        known = recorded_ids(
            self._store, [manifest.key for _, manifest in cached], self._record.destination
        )
        for name, manifest in cached:
            if manifest.making.get("run") != self._record.run_id:
                source = known[manifest.key].cell if manifest.key in known else None
                self._tracking.note(self._facts(name), CellState.CACHED, source)
            elif name in self._record.tracking.closed:
                self._schedule.change(name, CellState.DONE)
                facts = self._facts(name)
                if facts.registration is not None or facts.tags:  # it may not have come to these
                    self._tracking.note(facts, CellState.CACHED)
            else:
                self._tail.skip(name, manifest.key)
                self._flights[name] = _Flight(started_s=time.monotonic())
                self._settle(name, {"status": "ok", "seconds": manifest.making["seconds"]})

    def _final_state(self) -> RunState:
        if self.signal is not None:
            return RunState.STOPPED
        states = {status.state for status in self._statuses.values()}
        return RunState.FAILED if states & {CellState.FAILED, CellState.SKIPPED} else RunState.DONE

    def _close(self, state: RunState) -> None:
        if self._superseded:
            self._view.close(self._statuses)
            return
        if self.signal is not None:
            self._wind_down(state)
        self._listen(list(self._flights))
        for name in list(self._flights):
            if (outcome := self._flights[name].outcome) is not None:
                self._settle(name, outcome)
                continue
            self._end_flight(name, CellState.WAITING)
            self._tracking.note(self._facts(name), CellState.STOPPED)
        for folder in () if self.signal else self._promoted():
            self._tracking.promote(folder)
        self._tracking.close(state)
        self._record.state = state
        self._save(now=True)  # who stops us may not wait for what comes next
        self._executor.stop()
        self._view.close(self._statuses)
        self._announce_registration()
        limit_s = _TRACKING_TIMEOUT_S[state]
        away_s = 0.0 if self._record.options.tracking_later else _AWAY_S
        if self._stop_s is not None:
            left_s = max(0.0, self._stop_s - time.monotonic())
            away_s = min(away_s, left_s)
            limit_s = min(limit_s, max(left_s, _TRACKING_TIMEOUT_S[RunState.STOPPED]))
        tracked = self._tracking.finish(limit_s, away_s, self._attend)
        self._pass_on_messages()
        error = self._tracking.error
        if error is not None and not self._refused:  # it came after the last cell
            self._view.say(f"{_unusable(error)} `{self._record.sync_command}` sends it later.")
        if not tracked and error is None:
            self._view.say(
                f"Tracking is not complete; `{self._record.sync_command}` sends the rest."
            )
        self._record.tracked = tracked
        self._save(now=True, leaving=True)

    def _announce_registration(self) -> None:
        """Say that models are yet to be registered, each of which may take seconds."""
        done = self._tracking.progress().registered
        count = sum(
            name not in done and self._schedule.cell(name).registration is not None
            for name, status in self._statuses.items()
            if status.state.has_result
        )
        if count and self._record.options.tracking is TrackerName.MLFLOW:
            self._view.say(f"Registering {count} model{'s' if count > 1 else ''} ...")

    def _wind_down(self, state: RunState) -> None:
        """Let the workers write a checkpoint, for as long as the grace lasts.

        The run's state is saved first: who stops us may not wait for them.
        """
        self._record.state = state
        self._save(now=True)
        end_s = time.monotonic() + self._grace_s
        try:
            if self._working():
                self._view.say(
                    f"Stopping: up to {self._grace_s:g} s for checkpoints; again to stop at once."
                )
            self._executor.preempt()
            while self._working() and time.monotonic() < end_s:
                self._take_outcomes(_WAIT_S)
        except KeyboardInterrupt:
            return  # what is not at a checkpoint goes on from the one before

    def _working(self) -> bool:
        """Tell whether a worker has begun with one of the cells in flight."""
        self._listen(list(self._flights))
        return any(flight.started_s is not None for flight in self._flights.values())

    def _promoted(self) -> Iterator[Path]:
        """Yield the folders of outputs that are shown with the run."""
        for name, status in self._statuses.items():
            for output, declared in self._schedule.cell(name).declaration.outputs.items():
                if declared.promote and status.state.has_result:
                    try:
                        yield self._store.fetch(status.key, output)
                    except Damaged as error:
                        self._view.say(f"{name}: {error}")

    @contextmanager
    def _handling_signals(self) -> Iterator[None]:
        """Take note of SIGINT and SIGTERM; the second one of its kind acts as usual.

        A terminal that is closed (SIGHUP, once or more often) is as SIGTERM; not under nohup. Only
        the main thread hears signals: a driver in another one does not.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) or signal.SIG_DFL for number in STOPPING}
        terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        nowhere = os.open(os.devnull, os.O_WRONLY)

        def note(number: int, frame: FrameType | None) -> None:
            self.signal = number
            signal.signal(number, before[signal.Signals(number)])

        def note_hangup(number: int, frame: FrameType | None) -> None:
            self.signal = self.signal or signal.SIGTERM
            for descriptor in terminals:  # what is written there now is an error
                os.dup2(nowhere, descriptor)

        for number in before:
            if number is not signal.SIGHUP:
                signal.signal(number, note)
            elif before[number] is not signal.SIG_IGN:
                signal.signal(number, note_hangup)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(nowhere)

    # -- the loop

    def _step(self) -> None:
        if self._stop_s is not None and time.monotonic() >= self._stop_s:
            self.signal = signal.SIGTERM
            return
        self._submit_ready()
        ended = any(flight.outcome is not None for flight in self._flights.values())
        self._take_outcomes(0.0 if ended or self._unheard else _WAIT_S)
        now = time.monotonic()
        if self._unheard or now - self._listened_s >= _LISTEN_EVERY_S:
            self._listened_s = now
            self._listen_to_all()
            self._check_deadlines()
        if now - self._looked_s >= _LOOK_EVERY_S:
            self._looked_s = now
            self._check_room()
        self._check_tracking()
        self._take_requests()
        self._save()
        self._view.show(self._statuses)

    def _submit_ready(self) -> None:
        limit = min(
            self._record.options.max_parallel or self._executor.window, self._executor.window
        )
        end_s = time.monotonic() + _LISTEN_S
        found_one = True
        while found_one:  # what the store has already makes others ready at once
            found_one = False
            waiting = self._waiting()
            while (room := limit - len(self._flights)) > 0 and time.monotonic() < end_s:
                names = list(islice(waiting, min(room, self._requests.at_once)))
                if not names:
                    break
                for name, (exists, holder) in self._requests.ask(self._look, names):
                    if exists:
                        self._take_from_store(name)
                        found_one = True
                    elif not self._is_held(name, holder):
                        self._submit(name)

    def _waiting(self) -> Iterator[str]:
        """Yield the cells that may run now, as far as can be told without the store."""
        busy = {self._statuses[name].key for name in self._flights}
        for name in self._schedule.ready():
            now = time.monotonic()
            held = now - self._held_s.get(name, -math.inf) < _LISTEN_EVERY_S
            key = self._statuses[name].key
            if not held and key not in busy and self._retry_s.get(name, 0) <= now:
                busy.add(key)
                yield name

    def _look(self, name: str) -> tuple[bool, Holder | None]:
        """Return whether the store has a cell's result, and else who works at it, if anyone."""
        key = self._statuses[name].key
        if self._exists(key):
            return True, None
        holder = self._leases.holder(key)
        if holder is None:
            self._tail.skip(name, key)
        return False, holder

    def _is_held(self, name: str, holder: Holder | None) -> bool:
        """Tell whether another run works at the cell, whose result is then waited for."""
        if holder is None:
            self._held_s.pop(name, None)
            return False
        if name not in self._held_s:
            self._view.say(f"{name}: run {holder.run} on {holder.host} is at it; waiting for that.")
        self._held_s[name] = time.monotonic()
        return True

    def _submit(self, name: str) -> None:
        self._flights[name] = _Flight()
        task = self._schedule.task(
            name, run=self._record.run_id, storage=self._store.url, token=self._token
        )
        self._executor.submit(task, self._schedule.cell(name).resources)

    def _take_from_store(self, name: str) -> None:
        """Use a result that another run has made meanwhile."""
        self._schedule.change(name, CellState.CACHED)
        self._tracking.note(self._facts(name), CellState.CACHED)

    def _listen_to_all(self) -> None:
        """Listen to the cells in flight, in turn, for as long as one may; the rest comes next."""
        end_s = time.monotonic() + _LISTEN_S
        self._unheard = self._unheard or list(self._flights)
        at_once = self._requests.at_once
        while self._unheard and time.monotonic() < end_s:
            names, self._unheard = self._unheard[:at_once], self._unheard[at_once:]
            self._listen([name for name in names if name in self._flights])

    def _read(self, name: str) -> list[Event]:
        ended = self.signal is not None or self._flights[name].outcome is not None
        return self._tail.read(name, self._statuses[name].key, ended=ended)[0]

    def _listen(self, names: Sequence[str]) -> list[str]:
        """Take in what cells have to say, up to a bound; return those of which that was all."""
        heard = []
        for name, events in self._requests.ask(self._read, names):
            self._take_all(name, events)
            if len(events) < EVENTS_AT_ONCE:
                heard.append(name)
        return heard

    def _take_all(self, name: str, events: Sequence[Event]) -> None:
        flight = self._flights[name]
        for event in events:
            self._take(name, flight, event)
        if events:
            flight.heard_s = time.monotonic()
            self._tracking.note(self._facts(name), CellState.RUNNING)

    def _take(self, name: str, flight: _Flight, event: Event) -> None:
        status = self._statuses[name]
        if event["type"] == "start":
            flight.started_s = time.monotonic()
            self._schedule.change(name, CellState.RUNNING)
            status.began = event["time"]
            flight.pace.begin(event)
        elif event["type"] == "progress":
            status.progress = (event["done"], event["total"], event["unit"])
            status.moved, status.gap_s = time.time(), flight.pace.move(event)
        elif event["type"] == "text":
            status.said = first_line(event["text"])
        elif event["type"] == "checkpoint":
            flight.advanced = True

    # -- ends of attempts

    def _take_outcomes(self, timeout_s: float) -> None:
        """Settle what has ended, once all that it said is taken in; see `_listen_to_all`."""
        end_s = time.monotonic() + timeout_s + _LISTEN_S
        for name, outcome in self._executor.wait(timeout_s):
            if name in self._flights:
                self._flights[name].outcome = outcome
        ended = {
            name: flight.outcome
            for name, flight in self._flights.items()
            if flight.outcome is not None
        }
        unheard = iter(ended)
        while time.monotonic() <= end_s and (
            names := list(islice(unheard, self._requests.at_once))
        ):
            for name in self._listen(names):
                self._settle(name, ended[name])

    def _settle(self, name: str, outcome: Outcome) -> None:
        self._statuses[name].seconds = outcome.get("seconds")
        if outcome["status"] == "damaged":
            self._repair(name, outcome)
        elif outcome["status"] == "preempted":
            self._give_way(name, outcome)
        elif outcome["status"] not in {"ok", "lost"}:
            self._fail(name, outcome)
        elif self._flights[name].started_s is None:  # the worker found the result in the store
            self._end_flight(name, CellState.CACHED)
            self._take_from_store(name)
        else:
            self._end_flight(name, CellState.DONE)
            self._tracking.note(self._facts(name), CellState.DONE)

    def _end_flight(self, name: str, state: CellState) -> None:
        del self._flights[name]
        self._schedule.change(name, state)
        status = self._statuses[name]
        status.began = status.progress = status.moved = status.gap_s = status.said = None

    def _fail(self, name: str, outcome: Outcome) -> None:
        """Let a cell try again after a pause, or give it up."""
        cell, error = self._schedule.cell(name), outcome["error"]
        if outcome["status"] == "died" and self._flights[name].advanced:
            # A machine that is taken away time and again is no reason to give up what gets on.
            self._failures[name] = 0
        self._failures[name] += 1
        tries = self._failures[name]
        headline = error["message"].partition("\n")[0]
        if error["user"] or tries > cell.retries:
            self._statuses[name].error = error
            self._end_flight(name, CellState.FAILED)
            self._tracking.note(self._facts(name), CellState.FAILED)
            self._view.say(f"{name} failed: {headline}")
            return
        pause_s = min(_LONGEST_PAUSE_S, 2.0 ** (tries - 1))
        self._wait_again(name, pause_s)
        self._view.say(f"{name}: {headline}; retry {tries} of {cell.retries} in {pause_s:g} s")

    def _give_way(self, name: str, outcome: Outcome) -> None:
        """Let a cell that lost its machine, but no work, wait for another one."""
        if self.signal is None:
            self._view.say(f"{name}: {outcome['error']['message']}")
        else:
            self._tracking.note(self._facts(name), CellState.STOPPED)
        self._wait_again(name, _FIRST_PAUSE_S)

    def _wait_again(self, name: str, pause_s: float) -> None:
        self._retry_s[name] = time.monotonic() + pause_s
        self._end_flight(name, CellState.WAITING)

    def _repair(self, name: str, outcome: Outcome) -> None:
        """Set a damaged input aside, and let the cell wait until it is made again."""
        key = outcome["key"]
        self._repairs[name] += 1
        self._store.set_aside(key)
        again = self._schedule.reset(key, self._exists)
        if self._repairs[name] > _REPAIRS:
            self._fail(name, outcome)
            return
        self._end_flight(name, CellState.WAITING)
        self._view.say(f"{name}: {outcome['error']['message']}; again: {', '.join(again)}")

    def _check_deadlines(self) -> None:
        now = time.monotonic()
        for name, flight in list(self._flights.items()):
            limit_s = self._schedule.cell(name).timeout_s
            if flight.started_s is None or flight.outcome is not None:
                continue
            if limit_s is not None and now - flight.started_s > limit_s:
                outcome = died(f"timed out after {limit_s:g} s (timeout_s)")
                outcome["status"] = "failed"
            elif now - flight.heard_s > (silent_s := _SILENT_LEASES * lease_s()):
                outcome = died(f"no sign of life for {silent_s:g} s")
            else:
                continue
            self._executor.cancel(name)
            flight.outcome = outcome

    def _check_room(self) -> None:
        """Say, once of each stage, that what waits fits on no node: one may have been lost."""
        waiting = [
            (name, self._schedule.cell(name).resources)
            for name, flight in self._flights.items()
            if flight.started_s is None
        ]
        if waiting and not self._plan.spec.autoscaling:  # where it has been said at the start
            lacking = set(self._executor.check(waiting, may_grow=True))
            for lack in sorted(lacking - self._lacking):
                self._view.say(lack)
            self._lacking = lacking

    # -- keeping account

    def _exists(self, key: str) -> bool:
        try:
            return self._store.manifest(key) is not None
        except Damaged:
            return False

    def _facts(self, name: str) -> CellFacts:
        facts = cell_facts(self._schedule.planned(name))
        return replace(facts, key=self._statuses[name].key, calls=self._schedule.calls(name))

    def _check_tracking(self) -> None:
        """Pass on what tracking has to say.

        Raises:
            PipelineError: it could not even begin, and waiting would not correct that.
        """
        error = self._tracking.error
        if error is not None:
            self._refused = True
            raise PipelineError(
                f"{_unusable(error)} "
                "To run all the same, and have it sent later by `fls sync`, give "
                "--tracking-later."
            )
        self._pass_on_messages()

    def _pass_on_messages(self) -> None:
        for message in self._tracking.messages():
            self._view.say(message)

    def _attend(self) -> None:
        """Show, while tracking ends, that the run is still being recorded by this process."""
        self._pass_on_messages()
        self._take_requests()
        self._save()

    def _take_requests(self) -> None:
        """See what was asked of this driver; raise what has ended its heartbeat, if it has."""
        self._heartbeat.check()
        if self.signal is None and self._heartbeat.asked_to_stop:
            self.signal = signal.SIGTERM

    def _save(self, *, now: bool = False, leaving: bool = False) -> None:
        """Write every few seconds how far the run is.

        That takes long of thousands of cells, but at most a twentieth of the time. Where the run
        is another driver's by now, nothing more is written; see `RunRecord.require_own`.
        """
        began_s = time.monotonic()
        if not now and began_s < self._save_s:
            return
        self._record.require_own(self._store)
        self._record.tracking = self._tracking.progress()
        self._record.save_progress(self._store, leaving=leaving)
        end_s = time.monotonic()
        self._save_s = end_s + max(HEARTBEAT_S, (end_s - began_s) / _SAVING_SHARE)


def _unusable(error: Exception) -> str:
    return f"Tracking does not work ({type(error).__name__}: {redact(str(error))})."
