"""The attempts at cells: how they begin, what they report, and what follows when they end.

A failed attempt is retried after a pause; a preempted one waits for another machine; one that finds
a damaged input lets its cell run again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import islice

from pipeline.base.parallel import Requests
from pipeline.base.states import CellState
from pipeline.executors import AbstractExecutor
from pipeline.running.account import Account
from pipeline.running.cell_run import CellRun
from pipeline.store.events import EVENTS_AT_ONCE, Event, EventTail
from pipeline.worker.task import Outcome

LISTEN_S = 0.5  # for all cells together at a time: signals and deadlines wait meanwhile
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0
_REPAIRS = 3


class Attempts:
    """The cells of a run, and the attempts at them that the executor has.

    Attributes:
        cells: name -> every cell of the run.
        in_flight: name -> the cells that the executor has.
        unheard: names of cells in flight that are still to be read in this round.
    """

    def __init__(self, account: Account, executor: AbstractExecutor, requests: Requests):
        self._account = account
        self._executor = executor
        self._requests = requests
        self._schedule, self._store = account.schedule, account.store
        self._view, self._stop = account.view, account.stop
        self._run_id = account.record.run_id
        self._token = self._store.prepare()
        self.tail = EventTail(self._store, self._run_id, {})
        self.cells = {name: CellRun(one) for name, one in self._schedule.statuses.items()}
        self.in_flight: dict[str, CellRun] = {}
        self.unheard: list[str] = []

    # -- beginnings

    def begin(self, name: str) -> None:
        """Give a cell to the executor."""
        self.cells[name].begin()
        self.in_flight[name] = self.cells[name]
        task = self._schedule.task(
            name, run=self._run_id, storage=self._store.url, token=self._token
        )
        self._executor.submit(task, self._schedule.cell(name).resources)

    def use_stored(self, name: str) -> None:
        """Use a result that another run has made meanwhile."""
        self._schedule.change(name, CellState.CACHED)
        self._account.note(name, CellState.CACHED)

    # -- reports

    def listen_to_all(self) -> None:
        """Read cells in flight in turn, for a bounded time; the next call reads the rest."""
        end_s = time.monotonic() + LISTEN_S
        self.unheard = self.unheard or list(self.in_flight)
        at_once = self._requests.at_once
        while self.unheard and time.monotonic() < end_s:
            names, self.unheard = self.unheard[:at_once], self.unheard[at_once:]
            self._listen([name for name in names if name in self.in_flight])

    def _listen(self, names: Sequence[str]) -> list[str]:
        """Take in new events of cells, up to a bound; return the cells without further ones."""
        heard = []
        for name, events in self._requests.ask(self._read, names):
            self._take_all(name, events)
            if len(events) < EVENTS_AT_ONCE:
                heard.append(name)
        return heard

    def _read(self, name: str) -> list[Event]:
        cell = self.in_flight[name]
        ended = self._stop.signal is not None or cell.outcome is not None
        return self.tail.read(name, cell.status.key, ended=ended)[0]

    def _take_all(self, name: str, events: Sequence[Event]) -> None:
        cell = self.in_flight[name]
        for event in events:
            cell.take(event)
            if event["type"] == "start":
                self._schedule.change(name, CellState.RUNNING)
        if events:
            cell.heard_s = time.monotonic()
            self._account.note(name, CellState.RUNNING)

    @property
    def unread(self) -> bool:
        """Whether events are left to read at once, of this round or of an ended attempt."""
        return bool(self.unheard) or any(cell.outcome for cell in self.in_flight.values())

    def any_begun(self) -> bool:
        """Tell whether a worker has begun one of the cells in flight."""
        self._listen(list(self.in_flight))
        return any(cell.started_s is not None for cell in self.in_flight.values())

    # -- ends

    def check_deadlines(self) -> None:
        """Cancel attempts that ran or were silent for too long."""
        for name, cell in self.in_flight.items():
            outcome = cell.overdue(self._schedule.cell(name).timeout_s)
            if outcome is not None:
                self._executor.cancel(name)
                cell.outcome = outcome

    def take_outcomes(self, timeout_s: float) -> None:
        """Settle attempts that have ended, once all of their events are read.

        Args:
            timeout_s: how long to wait for the executor.
        """
        end_s = time.monotonic() + timeout_s + LISTEN_S
        for name, outcome in self._executor.wait(timeout_s):
            if name in self.in_flight:
                self.in_flight[name].outcome = outcome
        ended = {name: cell.outcome for name, cell in self.in_flight.items() if cell.outcome}
        names = iter(ended)
        while time.monotonic() <= end_s and (some := list(islice(names, self._requests.at_once))):
            for name in self._listen(some):
                self._settle(name, ended[name])

    def abandon_all(self) -> None:
        """Settle attempts whose end is known, and note the others as stopped."""
        self._listen(list(self.in_flight))
        for name, cell in list(self.in_flight.items()):
            if cell.outcome is not None:
                self._settle(name, cell.outcome)
                continue
            self._end(name, CellState.WAITING)
            self._account.note(name, CellState.STOPPED)

    def _settle(self, name: str, outcome: Outcome) -> None:
        cell = self.cells[name]
        cell.status.seconds = outcome.get("seconds")
        if outcome["status"] == "damaged":
            self._repair(name, outcome)
        elif outcome["status"] == "preempted":
            self._give_way(name, outcome)
        elif outcome["status"] not in {"ok", "lost"}:
            self._fail(name, outcome)
        elif cell.started_s is None:  # the worker found the result in the store
            self._end(name, CellState.CACHED)
            self.use_stored(name)
        else:
            self._end(name, CellState.DONE)
            self._account.note(name, CellState.DONE)

    def _end(self, name: str, state: CellState) -> None:
        self.in_flight.pop(name).end()
        self._schedule.change(name, state)

    def _fail(self, name: str, outcome: Outcome) -> None:
        """Retry a cell after a pause, or give it up."""
        cell, error = self.cells[name], outcome["error"]
        retries = self._schedule.cell(name).retries
        if outcome["status"] == "died" and cell.advanced:
            cell.failures = 0  # a cell that progresses survives any number of lost machines
        cell.failures += 1
        headline = error["message"].partition("\n")[0]
        if error["user"] or cell.failures > retries:
            cell.status.error = error
            self._end(name, CellState.FAILED)
            self._account.note(name, CellState.FAILED)
            self._view.say(f"{name} failed: {headline}")
            return
        pause_s = min(_LONGEST_PAUSE_S, 2.0 ** (cell.failures - 1))
        self._wait_again(name, pause_s)
        self._view.say(f"{name}: {headline}; retry {cell.failures} of {retries} in {pause_s:g} s")

    def _give_way(self, name: str, outcome: Outcome) -> None:
        """Let a cell that lost its machine, but no work, wait for another one."""
        if self._stop.signal is None:
            self._view.say(f"{name}: {outcome['error']['message']}")
        else:
            self._account.note(name, CellState.STOPPED)
        self._wait_again(name, _FIRST_PAUSE_S)

    def _wait_again(self, name: str, pause_s: float) -> None:
        self.cells[name].not_before_s = time.monotonic() + pause_s
        self._end(name, CellState.WAITING)

    def _repair(self, name: str, outcome: Outcome) -> None:
        """Set a damaged input aside, and let the cell wait until that is computed again."""
        cell, key = self.cells[name], outcome["key"]
        cell.repairs += 1
        self._store.set_aside(key)
        again = self._schedule.reset(key, lambda one: self._store.readable(one) is not None)
        if cell.repairs > _REPAIRS:
            self._fail(name, outcome)
            return
        self._end(name, CellState.WAITING)
        self._view.say(f"{name}: {outcome['error']['message']}; again: {', '.join(again)}")
