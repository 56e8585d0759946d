"""The record of a run in the store, by which it is shown, resumed and found again.

It has three documents: `run` (the request; written once), `state` (the progress; rewritten every
few seconds, which is also the driver's heartbeat) and `tracking` (the progress and ids of its
tracking). The planner adds a fourth, `plan`.
"""

from __future__ import annotations

import math
import os
import secrets
import shlex
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from pipeline.base.errors import BadInput, DamagedDocument, TakenOver, nearest
from pipeline.base.text import cut
from pipeline.executors import ExecutorName
from pipeline.store.events import Cursor
from pipeline.store.leases import has_died, lease_s, this_machine
from pipeline.store.store import Store
from pipeline.tracking import TrackerName, TrackingProgress

DEFAULT_FILE = Path("pipeline.yaml")
DOCUMENTS = ("run", "state", "tracking")
HEARTBEAT_S = 2.0
_REASON_CHARACTERS = 300


class State(StrEnum):
    """The state of a cell in a run."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    CACHED = "cached"
    FAILED = "failed"
    SKIPPED = "skipped"


class RunState(StrEnum):
    """The state of a run; readers find a dead driver's run `interrupted`."""

    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    STOPPED = "stopped"
    INTERRUPTED = "interrupted"


@dataclass(kw_only=True)
class CellStatus:
    """The status of one cell.

    Attributes:
        cell: its name.
        stage: its stage's name.
        key: its key.
        state: see `State`.
        began: Unix time of its running attempt's beginning, or None.
        seconds: duration of its last attempt, or None.
        progress: (done, total, unit) inside the stage, or None.
        moved: Unix time of the last progress, or None.
        gap_s: usual seconds between two reports of progress, or None.
        said: the stage's last message, or None.
        error: `message`, and mostly `traceback`, of a failure or the reason of a skip; or None.
    """

    cell: str
    stage: str
    key: str
    state: State = State.WAITING
    began: float | None = None
    seconds: float | None = None
    progress: tuple[float, float, str] | None = None
    moved: float | None = None
    gap_s: float | None = None
    said: str | None = None
    error: Mapping[str, Any] | None = None


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

    file: str
    overrides: Sequence[str] = ()
    from_: Sequence[str] = ()
    only: Sequence[str] = ()
    until: Sequence[str] = ()
    force: Sequence[str] = ()
    executor: ExecutorName = ExecutorName.RAY
    tracking: TrackerName = TrackerName.MLFLOW
    tracking_later: bool = False
    max_parallel: int | None = None

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
class RunRecord:
    """One run, as in the store.

    Attributes:
        run_id: `YYYYMMDD-HHMMSS-xxxx`, in UTC.
        options: the request.
        spec_text: the spec as it was read.
        environment: of its planning, see `pipeline.code.provenance`.
        began: Unix time.
        state: see `RunState`; as the driver last wrote it.
        host: the name of the driver's machine.
        machine: the driver's machine; see `this_machine`.
        pid: the driver's process.
        life: number of the driver among the run's drivers, from 1.
        heartbeat: Unix time, by the driver's clock, of its last heartbeat; 0 once it has left the
            run.
        silent_s: seconds from that heartbeat to the reading of the record, by the storage's clock.
        seen_s: time of the reading, by this process's monotonic clock.
        cells: cell -> status.
        tracking: progress of its tracking.
        tracked: whether it is tracked completely.
        destination: of its tracking, see `pipeline.tracking.destination`; "" before it begins.
        damaged: names of its damaged documents; their content counts as unknown.
        storage: the URL given as --storage, which hints repeat; or None.
        trust: the option by which the code of its spec is trusted here, with a leading space; ""
            if none is needed or known.
    """

    run_id: str
    options: RunOptions
    spec_text: str
    environment: Mapping[str, Any] = field(default_factory=dict)
    began: float = field(default_factory=time.time)
    state: RunState = RunState.RUNNING
    host: str = ""
    machine: str = ""
    pid: int = 0
    life: int = 0
    heartbeat: float = 0.0
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
        document = {
            "options": asdict(self.options),
            "spec_text": self.spec_text,
            "environment": self.environment,
            "began": self.began,
        }
        store.write_run(self.run_id, "run", document)

    def take_over(self, store: Store) -> bool:
        """Make this process the one that records an ended run, unless another is faster."""
        life, time_s = store.newest_life(self.run_id)
        if (
            life > self.life and store.now() - time_s < 2 * lease_s()
        ):  # its owner has yet to record itself
            return False
        if not store.mark_run(self.run_id, f"life-{life + 1}"):
            return False
        self.state, self.life = self.observed_state(), life + 1
        self.host, self.machine, self.pid = socket.gethostname(), this_machine(), os.getpid()
        self.save_progress(store)
        return True

    def save_progress(self, store: Store, *, leaving: bool = False) -> None:
        """Write the run's progress, and a heartbeat, or that its driver is `leaving`."""
        self.heartbeat = 0.0 if leaving else time.time()
        self.silent_s, self.seen_s = 0.0, time.monotonic()
        state = {
            "state": self.state,
            "host": self.host,
            "machine": self.machine,
            "pid": self.pid,
            "life": self.life,
            "heartbeat": self.heartbeat,
            "cells": [asdict(status) for status in self.cells.values()],
        }
        store.write_run(self.run_id, "state", state)
        self.save_tracking(store)

    def beat(self, store: Store) -> None:
        """Write a heartbeat, at the cost of one small file for any number of cells."""
        store.beat(self.run_id)
        self.silent_s, self.seen_s = 0.0, time.monotonic()

    def save_tracking(self, store: Store) -> None:
        """Write the progress of the run's tracking."""
        about = {"tracked": self.tracked, "destination": self.destination}
        store.write_run(self.run_id, "tracking", {**asdict(self.tracking), **about})

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
        return len(store.run_marks(self.run_id, "life-")) > self.life

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
        store.mark_run(self.run_id, f"stop-{self.life}")

    def asked_to_stop(self, store: Store) -> bool:
        """Tell whether another process has asked this record's driver to stop."""
        return f"stop-{self.life}" in store.run_marks(self.run_id, "stop")

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

    def observed_cell_state(self, status: CellStatus) -> State | RunState:
        """Return the true state of a cell: one that ran when its driver died is interrupted."""
        lost = status.state is State.RUNNING and not self.is_at_work()
        return RunState.INTERRUPTED if lost else status.state

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


def new_run_id() -> str:
    """Return a unique id that sorts by time, to the millisecond."""
    now = datetime.now(UTC)
    return f"{now:%Y%m%d-%H%M%S}-{now.microsecond // 1000:03d}-{secrets.token_hex(2)}"


def load_run(store: Store, run_id: str) -> RunRecord:
    """Read a run from the store.

    The request must be whole. With another document damaged, the run counts as interrupted, and a
    resume finds its results in the store.

    Raises:
        BadInput: the store has no such run, or one of another version.
    """
    documents: dict[str, Any] = {"run": store.read_run(run_id, "run")}
    damaged = []
    for name in DOCUMENTS[1:]:
        try:
            documents[name] = store.read_run(run_id, name)
        except DamagedDocument:
            damaged.append(name)
    if None in documents.values():
        raise BadInput(f"{store.url} has no run {run_id!r}.")
    try:
        record = _read(run_id, documents, damaged)
        if record.heartbeat:
            last = store.last_beat(run_id)
            since = time.time() - record.heartbeat if last is None else store.now() - last
            record.silent_s = max(since, 0.0)
        else:
            record.silent_s = math.inf
        return record
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"{store.url}: the documents of run {run_id} are of another version "
            f"({type(error).__name__}: {cut(str(error), _REASON_CHARACTERS)})."
        ) from error


def _read(run_id: str, documents: Mapping[str, Any], damaged: Sequence[str]) -> RunRecord:
    request = documents["run"]
    record = RunRecord(
        run_id=run_id,
        options=_options(request["options"]),
        spec_text=request["spec_text"],
        environment=request["environment"],
        began=request["began"],
        damaged=damaged,
    )
    if state := documents.get("state"):
        record.state = RunState(state["state"])
        record.host, record.pid, record.life = state["host"], state["pid"], state["life"]
        record.machine = state.get("machine", "")
        record.heartbeat = state["heartbeat"]
        record.cells = {
            fields["cell"]: CellStatus(**{**fields, "state": State(fields["state"])})
            for fields in state["cells"]
        }
    if tracking := documents.get("tracking"):
        record.tracking, record.tracked = _progress(tracking), tracking["tracked"]
        record.destination = tracking.get("destination", "")
    return record


def _progress(tracking: Mapping[str, Any]) -> TrackingProgress:
    return TrackingProgress(
        cursors={cell: Cursor(**cursor) for cell, cursor in tracking["cursors"].items()},
        keys=tracking["keys"],
        closed=tracking["closed"],
        registered=tracking["registered"],
        ids=tracking["ids"],
        ended=tracking["ended"],
    )


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


def _options(fields: Mapping[str, Any]) -> RunOptions:
    """Return the options in a document.

    Raises:
        ValueError: the options are damaged.
    """
    if not Path(fields["file"]).name.strip(".") or "\0" in fields["file"]:
        raise ValueError(f"{fields['file']!r} names no file")
    names = {
        "executor": ExecutorName(fields["executor"]),
        "tracking": TrackerName(fields["tracking"]),
    }
    return RunOptions(**{**fields, **names})


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
        tracking = store.peek_run(run_id, "tracking") or {"closed": []}
        if destination and tracking.get("destination") not in {None, "", destination}:
            continue
        for cell in tracking["closed"]:
            key = tracking["keys"].get(cell)
            ids = tracking["ids"]
            if key in wanted and ids:
                wanted.remove(key)
                records = ids.get("records", {}).get(cell, {})
                found[key] = RecordedIds(ids.get("cells", {}).get(cell), records)
    return found
