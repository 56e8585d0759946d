"""The record of a run: its documents, and the state of its driver as others see it."""

from __future__ import annotations

import os
import shlex
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.base.errors import BadInput, TakenOver, nearest
from pipeline.base.states import CellState, RunState
from pipeline.running.documents import (
    CellStatus,
    DriverStatus,
    RunProgress,
    RunRequest,
    RunTracking,
)
from pipeline.store.layout import life_mark, parse_life, stop_mark
from pipeline.store.leases import has_died, lease_s, this_machine
from pipeline.store.store import Store
from pipeline.tracking import TrackerName, TrackingProgress

DEFAULT_FILE = Path("pipeline.yaml")
HEARTBEAT_S = 2.0


@dataclass(kw_only=True)
class RunRecord(RunRequest, DriverStatus):
    """One run, as in the store.

    Attributes:
        run_id: `YYYYMMDD-HHMMSS-xxxx`, in UTC.
        silent_s: seconds from the last heartbeat to the reading of the record, by the storage's
            clock.
        seen_s: time of the reading, by this process's monotonic clock.
        cells: cell -> status.
        tracking: progress of its tracking.
        tracked: whether it is tracked completely.
        destination: of its tracking, see `RunTracking`.
        damaged: names of its damaged documents; their content counts as unknown.
        storage: the URL given as --storage, which hints repeat; or None.
        trust: the option by which the code of its spec is trusted here, with a leading space; ""
            if none is needed or known.
    """

    run_id: str
    silent_s: float = field(default=0.0, compare=False)
    seen_s: float = field(default_factory=time.monotonic, compare=False)
    cells: Mapping[str, CellStatus] = field(default_factory=dict)
    tracking: TrackingProgress = field(default_factory=TrackingProgress)
    tracked: bool = False
    destination: str = ""
    damaged: Sequence[str] = ()
    storage: str | None = None
    trust: str = ""

    @property
    def where(self) -> str:
        """The option by which a command finds the run from here or its first folder, or "".

        It has a leading space.
        """
        if self.storage is not None:
            return f" --storage {shlex.quote(self.storage)}"
        other = self.options.file != str(DEFAULT_FILE)
        return f" --file {shlex.quote(self.options.file)}" if other else ""

    @property
    def resume_command(self) -> str:
        """The command that resumes the run."""
        return f"fls resume {self.run_id}{self.where}{self.trust}"

    def where_in(self, url: str) -> str:
        """Return the options by which `fls resume` and `fls accept` find the run by URL."""
        trust = self.trust or ("" if self.storage else self.where)
        return f"--storage {shlex.quote(url)}{trust}"

    @property
    def sync_command(self) -> str:
        """The command that sends the run's missing parts to the tracking server."""
        return f"fls sync {self.run_id}{self.where}"

    def claim(self, store: Store, cells: Mapping[str, CellStatus]) -> None:
        """Make this process the run's driver, with these statuses of its cells."""
        self.life = store.begin_life(self.run_id)
        self.state, self.tracked = RunState.RUNNING, False
        self.host, self.machine, self.pid = socket.gethostname(), this_machine(), os.getpid()
        self.cells = cells

    def save_request(self, store: Store) -> None:
        """Write the request."""
        names = RunRequest.__dataclass_fields__.keys() - {"DOCUMENT"}
        store.write_run(self.run_id, RunRequest(**{name: getattr(self, name) for name in names}))

    def take_over(self, store: Store) -> bool:
        """Make this process the one that records an ended run, unless another is faster."""
        life, time_s = store.newest_life(self.run_id)
        new = store.now() - time_s < 2 * lease_s()
        if life > self.life and new:  # its driver has not written its record yet
            return False
        if not store.mark_run(self.run_id, life_mark(life + 1)):
            return False
        self.state, self.life = self.observed_state(), life + 1
        self.host, self.machine, self.pid = socket.gethostname(), this_machine(), os.getpid()
        self.save_progress(store)
        return True

    def save_progress(self, store: Store, *, leaving: bool = False) -> None:
        """Write the run's progress, and a heartbeat, or that its driver is `leaving`."""
        self.heartbeat = 0.0 if leaving else time.time()
        self.silent_s, self.seen_s = 0.0, time.monotonic()
        status = {name: getattr(self, name) for name in DriverStatus.__dataclass_fields__}
        store.write_run(self.run_id, RunProgress(**status, cells=list(self.cells.values())))
        self.save_tracking(store)

    def beat(self, store: Store) -> None:
        """Write a heartbeat, at the cost of one small file for any number of cells."""
        store.beat(self.run_id)
        self.silent_s, self.seen_s = 0.0, time.monotonic()

    def save_tracking(self, store: Store) -> None:
        """Write the progress of the run's tracking."""
        document = RunTracking(
            **vars(self.tracking), tracked=self.tracked, destination=self.destination
        )
        store.write_run(self.run_id, document)

    def why_not_at(self, here: str) -> str | None:
        """Return why the run cannot be recorded at a destination, as a predicate; None if it can.

        One server tracks a run, from its first contact to the run's end.
        """
        lines = self.options.tracking is TrackerName.JSONL
        if lines or self.destination in {"", here} or not self.tracking.ids:
            return None
        return (
            f"is tracked at {self.destination}, and would be recorded at {here} from here; a run "
            f"has one tracking server. Set MLFLOW_TRACKING_URI to {self.destination} for this run. "
            f"To record at {here}, start a new run with `fls run`, which uses the results in the "
            "store."
        )

    def track_at(self, here: str) -> None:
        """Record the run at a destination from now on; a new destination gets all of it."""
        if self.destination not in {"", here}:
            self.tracking, self.tracked = TrackingProgress(), False
        self.destination = here

    def superseded(self, store: Store) -> bool:
        """Tell whether another driver has taken the run over from this silent one."""
        lives = [mark for mark in store.run_marks(self.run_id) if parse_life(mark) is not None]
        return len(lives) > self.life

    def require_own(self, store: Store) -> None:
        """Check that the run still belongs to this process, which may else not write to it.

        Raises:
            TakenOver: another process has taken the run over.
        """
        if self.superseded(store):
            raise TakenOver(
                f"Run {self.run_id} was taken over by another process while this one was silent; "
                "this one ends."
            )

    def ask_to_stop(self, store: Store) -> None:
        """Ask the run's present driver to stop, on any machine."""
        store.mark_run(self.run_id, stop_mark(self.life))

    def asked_to_stop(self, store: Store) -> bool:
        """Tell whether another process has asked this record's driver to stop."""
        return stop_mark(self.life) in store.run_marks(self.run_id)

    def status(self, cell: str) -> CellStatus:
        """Return the status of a cell.

        Raises:
            BadInput: the run has no such cell.
        """
        if cell not in self.cells:
            raise BadInput(f"Run {self.run_id} has no cell {cell!r}{nearest(cell, self.cells)}.")
        return self.cells[cell]

    def observed_state(self) -> RunState:
        """Return the true state: a run with a dead or silent driver is interrupted."""
        lost = self.state is RunState.RUNNING and not self.is_attended()
        return RunState.INTERRUPTED if lost else self.state

    def is_at_work(self) -> bool:
        """Tell whether a driver runs cells of the run, or waits for them to stop."""
        stopping = self.state is RunState.STOPPED and self.is_attended()
        return stopping or self.observed_state() is RunState.RUNNING

    def observed_cell_state(self, status: CellStatus) -> CellState:
        """Return the true state of a cell: one that ran when its driver died is interrupted."""
        lost = status.state is CellState.RUNNING and not self.is_at_work()
        return CellState.INTERRUPTED if lost else status.state

    def is_attended(self) -> bool:
        """Tell whether a process attends the run: its driver, or `fls sync`.

        After the run's end, a driver attends it until tracking is complete.
        """
        if not self.heartbeat or self.has_died():
            return False
        return self.silence_s() <= 2 * lease_s()

    def has_died(self) -> bool:
        """Tell whether the process that last attended the run is certainly gone."""
        return has_died(self.machine, self.pid)

    def silence_s(self) -> float:
        """Return the seconds since the last heartbeat, independent of the machines' clocks."""
        return self.silent_s + time.monotonic() - self.seen_s
