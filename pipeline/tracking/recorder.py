"""Brings a tracker up to date with a run in the store.

The store holds all news: events in the attempts, outputs and facts in the manifests. So the
recorder only needs the names of cells with news, and reads from where it stopped; for a server that
is away, nothing has to be kept. The driver's thread and `fls sync` use the same recorder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.base.errors import Damaged, TakenOver
from pipeline.base.parallel import Requests
from pipeline.base.secrets import redact
from pipeline.base.states import CellState, RunState
from pipeline.store.events import EVENTS_AT_ONCE, Cursor, Event, EventTail
from pipeline.store.manifest import Manifest
from pipeline.store.store import Store
from pipeline.tracking.base import AbstractTracker, CellEnd, CellFacts, RunFacts, TrackingProgress

News = tuple[CellFacts, CellState, str | None]  # the arguments of `Recorder.record`

_WITH_RESULT = {CellState.DONE, CellState.CACHED}


@dataclass(frozen=True)
class _Read:
    """The events of a cell's attempts between the cursors `begin` and `end`."""

    key: str
    begin: Cursor
    events: list[Event]
    end: Cursor


class Recorder:
    """Records one run.

    Its methods raise outages only. After any other error it reports what cannot be recorded, and
    continues: one bad cell does not hold up the others.

    Args:
        tracker: records the run.
        store: holds its news.
        run: the run.
        progress: of the recording; updated before each call of `changed`.
        changed: called after each successful step, with its cell or None.
        say: takes messages for the user.

    Attributes:
        set_aside: cell or other subject that cannot be recorded -> why; a cell is tried once more
            when it has ended.
    """

    def __init__(
        self,
        tracker: AbstractTracker,
        store: Store,
        run: RunFacts,
        progress: TrackingProgress,
        changed: Callable[[str | None], object] = lambda cell: None,
        say: Callable[[str], object] = lambda text: None,
    ):
        self._tracker = tracker
        self._store = store
        self._run = run
        self._progress = progress
        self._changed = changed
        self._say = say
        self._open: set[str] = set()
        self._reads: dict[str, _Read] = {}  # by cell, read ahead
        self._manifests: dict[str, Manifest] = {}  # by key, read ahead
        self.set_aside: dict[str, str] = {}
        tracker.ids = progress.ids

    def open(self) -> None:
        """Begin the run, or continue it; also after an error, before anything else."""
        self._open.clear()
        run, self._run = self._run, replace(self._run, resumed=True)
        # An error, of this call or a later one, leaves the recorded state unknown: the next call
        # looks it up.
        self._tracker.open_run(run)
        self._progress.ended = False
        self._step()

    def read_ahead(self, news: Sequence[News], requests: Requests) -> None:
        """Read the store for `record`, for many cells at a time; it retries failed reads itself."""
        self._reads.clear()
        self._manifests.clear()
        requests.ask(self._try_to_read, news)

    def _try_to_read(self, news: News) -> None:
        cell, state, _ = news
        with suppress(Exception):  # any error of the storage
            if state is not CellState.CACHED:
                self._reads[cell.cell] = self._read(cell, state)
            if state in _WITH_RESULT and (manifest := self._store.made(cell.key)) is not None:
                self._manifests[cell.key] = manifest

    def _read(self, cell: CellFacts, state: CellState) -> _Read:
        begin = self._progress.cursors.get(cell.cell, Cursor())
        tail = EventTail(self._store, self._run.run_id, {cell.cell: begin})
        events, end = tail.read(cell.cell, cell.key, ended=state is not CellState.RUNNING)
        return _Read(cell.key, begin, events, end)

    def record(self, cell: CellFacts, state: CellState, source: str | None = None) -> None:
        """Record the news of a cell.

        Args:
            cell: the cell.
            state: its state.
            source: of a cached cell, see `AbstractTracker.link_cached`.
        """
        if state is CellState.RUNNING and cell.cell in self.set_aside:
            return
        with self._setting_aside(cell.cell):
            self._record(cell, state, source)

    def _record(self, cell: CellFacts, state: CellState, source: str | None) -> None:
        name = cell.cell
        if state is CellState.CACHED:
            if self._progress.keys.get(name, cell.key) != cell.key:  # another run's other result
                self._forget(name, records=True)
            self._tracker.link_cached(cell, source, self._end(cell, state))
            self._progress.keys[name] = cell.key
            self._step(name)
            self._register(cell)
            return
        self._begin(cell)
        cursors = self._progress.cursors
        more = True
        while more:
            read = self._reads.pop(name, None)
            if read is None or (read.key, read.begin) != (cell.key, cursors[name]):
                read = self._read(cell, state)
            self._tracker.log(name, read.events)
            cursors[name] = read.end
            self._step(name)
            more = len(read.events) >= EVENTS_AT_ONCE
        if state is not CellState.RUNNING:
            self._tracker.close_cell(name, self._end(cell, state))
            self._open.discard(name)
            if state is CellState.DONE:
                self._progress.closed.append(name)
            self._step(name)
        if state is CellState.DONE:
            self._register(cell)

    def promote(self, output: str, folder: Path) -> None:
        """Keep an output with the run itself."""
        with self._setting_aside(f"the output {output} of the run"):
            self._tracker.promote(output, folder)
            self._step()

    def close(self, state: RunState) -> None:
        """Record the run's end."""
        with self._setting_aside("the end of the run"):
            self._tracker.close_run(state)
            self._progress.ended = True
            self._step()

    @contextmanager
    def _setting_aside(self, what: str) -> Iterator[None]:
        """Report a subject that cannot be recorded, and continue; an outage stays an error.

        Raises:
            TakenOver: another process has taken the run over.
        """
        try:
            yield
        except TakenOver:
            raise
        except Exception as error:
            if self._tracker.is_outage(error):
                raise
            why = f"{redact(str(error))} ({type(error).__name__})"
            if self.set_aside.get(what) != why:
                self._say(f"{what} cannot be recorded: {why}")
            self.set_aside[what] = why
            self._open.discard(what)
        else:
            self.set_aside.pop(what, None)

    def _begin(self, cell: CellFacts) -> None:
        """Open a cell; first forget records of another key, or of a lost result."""
        name, progress = cell.cell, self._progress
        if name in progress.closed or progress.keys.get(name, cell.key) != cell.key:
            self._forget(name)  # its records will be reported again
        progress.keys[name] = cell.key
        progress.cursors.setdefault(name, Cursor())
        if name not in self._open:
            self._tracker.open_cell(cell)
            self._open.add(name)
            self._step(name)

    def _forget(self, name: str, *, records: bool = False) -> None:
        progress = self._progress
        self._tracker.forget_cell(name, records=records)
        for recorded in (progress.closed, progress.registered):
            if name in recorded:
                recorded.remove(name)
        progress.cursors.pop(name, None)

    def _register(self, cell: CellFacts) -> None:
        if cell.registration is not None and cell.cell not in self._progress.registered:
            folder = self._store.fetch(cell.key, cell.registration.output)
            self._tracker.register(cell, folder)
            self._progress.registered.append(cell.cell)
            self._step(cell.cell)

    def _end(self, cell: CellFacts, state: CellState) -> CellEnd:
        """Gather the kept parts of a result; a damaged one is recorded without files."""
        manifest = None
        if state in _WITH_RESULT:
            manifest = self._manifests.pop(cell.key, None) or self._store.made(cell.key)
        if manifest is None:
            return CellEnd(state=state)
        folders = {}
        for output in cell.kept if state is CellState.DONE else ():
            try:
                folders[output] = self._store.fetch(cell.key, output)
            except Damaged:  # a cell that needs it lets it be computed and recorded again
                continue
        return CellEnd(
            state=state,
            outputs=folders,
            making=manifest.making,
            output_bytes=manifest.bytes,
            time_s=manifest.time,
        )

    def _step(self, cell: str | None = None) -> None:
        self._progress.ids = self._tracker.ids
        while self._tracker.notices:
            self._say(self._tracker.notices.pop(0))
        self._changed(cell)
