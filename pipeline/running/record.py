"""The record of a run in the store, by which it is shown, resumed and found again.

A run has three documents in the store: `RunRequest`, `RunProgress` and `RunTracking`. The planner
adds a fourth, `pipeline.planning.planner.RunPlan`; tracking a fifth, `pipeline.running.facts`.
"""

from __future__ import annotations

import math
import os
import secrets
import shlex
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, ConfigDict, with_config
from typing_extensions import TypedDict

from pipeline.base.errors import BadInput, DamagedDocument, TakenOver, nearest
from pipeline.base.shapes import Count, Texts, Time, checked_as, exact
from pipeline.base.states import CellState, RunState
from pipeline.executors import ExecutorName
from pipeline.store.attempt import Failure
from pipeline.store.layout import life_mark, parse_life, stop_mark
from pipeline.store.leases import has_died, lease_s, this_machine
from pipeline.store.store import Store
from pipeline.tracking import TrackerName, TrackingProgress

DEFAULT_FILE = Path("pipeline.yaml")
HEARTBEAT_S = 2.0


@with_config(ConfigDict(extra="allow"))
class _Environment(TypedDict, total=False):
    python: str
    packages: Texts


@exact
@dataclass(kw_only=True)
class CellStatus:
    """The status of one cell.

    Attributes:
        cell: its name.
        stage: its stage's name.
        key: its key.
        state: see `CellState`.
        began: Unix time at which its running attempt began, or None.
        seconds: how long its last attempt took, or None.
        progress: (done, total, unit) inside the stage, or None.
        moved: Unix time of the last progress, or None.
        gap_s: usual seconds between two reports of progress, or None.
        said: the stage's last message, or None.
        error: `message`, and mostly `traceback`, of a failure or the reason of a skip; or None.
    """

    cell: str
    stage: str
    key: str
    state: CellState = CellState.WAITING
    began: Time | None = None
    seconds: float | None = None
    progress: tuple[float, float, str] | None = None
    moved: Time | None = None
    gap_s: float | None = None
    said: str | None = None
    error: Failure | None = None


def _require_file(name: str) -> str:
    if not Path(name).name.strip(".") or "\0" in name:
        raise ValueError(f"{name!r} names no file")
    return name


@exact
@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The request for a run: with the spec's text, all that `fls resume` needs.

    Attributes:
        file: the spec's path as given.
        overrides: the `--set` options.
        from_: the `--from` options.
        only: the `--only` options.
        until: the `--until` options.
        force: the `--force` options; their effect lasts, so a resume does not repeat them.
        executor: name of the executor.
        tracking: name of the tracker.
        tracking_later: whether neither beginning nor end wait for the tracking server.
        max_parallel: maximum number of cells at once, or None.
    """

    file: Annotated[str, AfterValidator(_require_file)]
    overrides: Sequence[str] = ()
    from_: Sequence[str] = ()
    only: Sequence[str] = ()
    until: Sequence[str] = ()
    force: Sequence[str] = ()
    executor: ExecutorName = ExecutorName.RAY
    tracking: TrackerName = TrackerName.MLFLOW
    tracking_later: bool = False
    max_parallel: Count | None = None

    @property
    def selection(self) -> dict[str, Sequence[str]]:
        """The options that select cells, with their values."""
        given = {
            "--from": self.from_,
            "--only": self.only,
            "--until": self.until,
            "--force": self.force,
        }
        return {option: values for option, values in given.items() if values}


@dataclass(kw_only=True)
class RunRequest:
    """The request for a run; written once.

    Attributes:
        options: the options of the command line.
        spec_text: the text of the spec.
        environment: versions of Python and of packages, see `pipeline.code.provenance`.
        began: Unix time.
    """

    DOCUMENT: ClassVar[str] = "run"
    options: RunOptions
    spec_text: str = ""
    environment: Annotated[Mapping[str, Any], checked_as(_Environment)] = field(
        default_factory=dict
    )
    began: Time = field(default_factory=time.time)


@dataclass(kw_only=True)
class DriverStatus:
    """The state of a run and its driver, as the driver last wrote it.

    Attributes:
        state: see `RunState`.
        host: the name of the driver's machine.
        machine: the driver's machine; see `this_machine`.
        pid: the driver's process.
        life: which of the run's drivers that is, from 1.
        heartbeat: Unix time, by the driver's clock, of its last sign of life; 0 once it has left
            the run.
    """

    state: RunState = RunState.RUNNING
    host: str = ""
    machine: str = ""
    pid: Count = 0
    life: Count = 0
    heartbeat: Time = 0.0


@dataclass(kw_only=True)
class RunProgress(DriverStatus):
    """The progress of a run; rewritten every few seconds, which is also the driver's heartbeat.

    Attributes:
        cells: the status of each.
    """

    DOCUMENT: ClassVar[str] = "state"
    cells: Sequence[CellStatus]


@dataclass(kw_only=True)
class RunTracking(TrackingProgress):
    """How far a run is recorded.

    Attributes:
        tracked: whether all of it is.
        destination: where, see `pipeline.tracking.destination`; "" before it begins.
    """

    DOCUMENT: ClassVar[str] = "tracking"
    tracked: bool
    destination: str = ""


@dataclass(kw_only=True)
class RunRecord(RunRequest, DriverStatus):
    """One run, as it stands in the store.

    Attributes:
        run_id: `YYYYMMDD-HHMMSS-xxxx`, in UTC.
        silent_s: seconds since the driver's last sign of life when the record was read, by the
            storage's clock.
        seen_s: when that was, by this process's monotonic clock.
        cells: cell -> status.
        tracking: how far the run is recorded.
        tracked: whether all of it is.
        destination: where that is so, see `RunTracking`.
        damaged: names of its damaged documents; what they said counts as unknown.
        storage: where it was looked for by --storage, and so where hints say it is; or None.
        trust: the option by which the code of its spec is trusted here; it begins with a space, or
            is "" where none is needed or known.
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
        """Write what was asked for."""
        names = RunRequest.__dataclass_fields__.keys() - {"DOCUMENT"}
        store.write_run(self.run_id, RunRequest(**{name: getattr(self, name) for name in names}))

    def take_over(self, store: Store) -> bool:
        """Make this process the one that records an ended run, unless another is faster."""
        life, time_s = store.newest_life(self.run_id)
        if (
            life > self.life and store.now() - time_s < 2 * lease_s()
        ):  # its owner has yet to record itself
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
        """Write how far the run is recorded."""
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
        """Tell whether another driver has taken the run over, because this one was silent."""
        return (
            sum(parse_life(mark) is not None for mark in store.run_marks(self.run_id)) > self.life
        )

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
        """Ask the run's present driver to stop, wherever it is."""
        store.mark_run(self.run_id, stop_mark(self.life))

    def asked_to_stop(self, store: Store) -> bool:
        """Tell whether the driver with this record is asked to stop."""
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
        """Return how a cell stands: what ran when its driver died is interrupted."""
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


# The documents of a run that has begun.
DOCUMENTS = (RunRequest, RunProgress, RunTracking)


def new_run_id() -> str:
    """Return a unique id that sorts by time, to the millisecond."""
    now = datetime.now(UTC)
    return f"{now:%Y%m%d-%H%M%S}-{now.microsecond // 1000:03d}-{secrets.token_hex(2)}"


def load_run(store: Store, run_id: str) -> RunRecord:
    """Read a run from the store.

    The request must be whole. With another document damaged, the run counts as interrupted, and a
    resume finds its results in the store.

    Raises:
        BadInput: there is no such run.
    """
    request = store.read_run(run_id, RunRequest)
    damaged = []
    progress, tracking = None, None
    try:
        progress = store.read_run(run_id, RunProgress)
    except DamagedDocument:
        damaged.append(RunProgress.DOCUMENT)
    try:
        tracking = store.read_run(run_id, RunTracking)
    except DamagedDocument:
        damaged.append(RunTracking.DOCUMENT)
    found = sum(one is not None for one in (request, progress, tracking))
    if request is None or found + len(damaged) < len(DOCUMENTS):
        raise BadInput(f"{store.url} has no run {run_id!r}.")
    record = RunRecord(run_id=run_id, damaged=damaged, **vars(request))
    if progress is not None:
        for name in DriverStatus.__dataclass_fields__:
            setattr(record, name, getattr(progress, name))
        record.cells = {status.cell: status for status in progress.cells}
    if tracking is not None:
        record.tracking = tracking.copy()
        record.tracked, record.destination = tracking.tracked, tracking.destination
    record.silent_s = _silence_s(store, record)
    return record


def _silence_s(store: Store, record: RunRecord) -> float:
    """Return the seconds since the last sign of life of a run's driver, by the storage's clock."""
    if not record.heartbeat:
        return math.inf
    last = store.last_beat(record.run_id)
    since = time.time() - record.heartbeat if last is None else store.now() - last
    return max(since, 0.0)


def load_runs(store: Store) -> tuple[list[RunRecord], list[str]]:
    """Return all begun runs, oldest first; and messages about damaged ones."""
    records, problems = [], []
    for run_id in store.list_runs():
        try:
            records.append(load_run(store, run_id))
        except BadInput:
            continue
        except DamagedDocument as error:
            problems.append(str(error))
    return records, problems


def find_run(store: Store, name: str) -> RunRecord:
    """Return the run whose id is, or begins with, `name`; `last` is the newest.

    Raises:
        BadInput: no run matches, or several do.
    """
    known = store.list_runs()
    found = known[-1:] if name == "last" else [one for one in known if one.startswith(name)]
    if not found:
        raise BadInput(f"{store.url} has no run {name!r}{nearest(name, known)}; see `fls status`.")
    if len(found) > 1:
        raise BadInput(f"{name!r} matches several runs: {', '.join(found)}.")
    return load_run(store, found[0])


@dataclass(frozen=True)
class RecordedIds:
    """The tracking ids of a result: of its cell, and of its records."""

    cell: str | None
    records: Mapping[str, str]


def recorded_ids(
    store: Store, keys: Iterable[str], destination: str = ""
) -> dict[str, RecordedIds]:
    """Return key -> tracking ids of the result, by the newest run that made it.

    Args:
        store: holds the ids.
        keys: of results.
        destination: of the runs to search; "" for any.

    Cost: one small document for each run, newest first, until all keys are found.
    """
    wanted = set(keys)
    found: dict[str, RecordedIds] = {}
    for run_id in reversed(store.list_runs()):
        if not wanted:
            break
        tracking = store.peek_run(run_id, RunTracking)
        if tracking is None or (destination and tracking.destination not in {"", destination}):
            continue
        ids = tracking.ids
        for cell in tracking.closed:
            key = tracking.keys.get(cell)
            if key in wanted and ids:
                wanted.remove(key)
                records = ids.get("records", {}).get(cell, {})
                found[key] = RecordedIds(ids.get("cells", {}).get(cell), records)
    return found
