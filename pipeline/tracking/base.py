"""What every tracker can do, and the thread that it does it in.

The driver alone writes tracking data, so that no two writers meet in a fresh database and a stage
needs no tracking library. It does so from a thread, because a slow tracking server must not keep
the workers waiting, and with cursors, so that a resumed run goes on where the last one stopped.
"""

from __future__ import annotations

import copy
import importlib
import os
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from pipeline.events import Cursor, Event


class TrackerName(StrEnum):
    """The trackers there are."""

    MLFLOW = "mlflow"
    JSONL = "jsonl"


# Imported by name, because one of them needs MLflow and `fls plan` must not pay for that.
_CLASSES = {
    TrackerName.MLFLOW: "pipeline.tracking.mlflow:MLflowTracker",
    TrackerName.JSONL: "pipeline.tracking.jsonl:JsonLinesTracker",
}

DEFAULT_URI = "sqlite:///mlflow.db"


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a tracker records about the run itself.

    Attributes:
        run_id: the runner's id.
        name: the spec's name.
        experiment: where the run is filed.
        uri: the tracking server or database.
        spec_file: the spec's path as given.
        spec_text: the spec as it was read.
        tags: further facts, such as the commit.
        resumed: whether an earlier life of this run may have recorded something.
    """

    run_id: str
    name: str
    experiment: str
    uri: str
    spec_file: str
    spec_text: str
    tags: Mapping[str, str] = field(default_factory=dict)
    resumed: bool = False


@dataclass(frozen=True, kw_only=True)
class CellFacts:
    """What a tracker records about one cell; `tags` are facts that few cells have."""

    cell: str
    stage: str
    key: str
    params: Mapping[str, Any]
    tags: Mapping[str, str] = field(default_factory=dict)


class AbstractTracker(ABC):
    """Records one run; all calls come from one thread, `open_run` first and `close_run` last.

    Attributes:
        ids: JSON data that finds the run's parts again: `cells` (cell -> id) and `records`
            (cell -> record name -> id), where the tracker has ids.
    """

    ids: dict[str, Any]

    @abstractmethod
    def open_run(self, run: RunFacts) -> None:
        """Begin the run, or go on with what an earlier life of it recorded."""

    @abstractmethod
    def open_cell(self, cell: CellFacts) -> None:
        """Note that the cell runs; called again when a later attempt of it begins."""

    @abstractmethod
    def log(self, cell: str, events: list[Event]) -> None:
        """Record events of an open cell."""

    @abstractmethod
    def close_cell(self, cell: str, state: str, outputs: Mapping[str, Path]) -> None:
        """Note an open cell's end.

        Args:
            cell: its name.
            state: "done", "failed" or "stopped".
            outputs: output name -> folder whose files are to be kept with the cell.
        """

    @abstractmethod
    def link_cached(self, cell: CellFacts, source: str | None) -> None:
        """Note a cell whose result was there already; `source` is the id it was recorded under."""

    @abstractmethod
    def promote(self, output: str, folder: Path) -> None:
        """Keep an output's files with the run itself; a `table.md` among them is its summary."""

    @abstractmethod
    def close_run(self, state: str) -> None:
        """Note the run's end: "done", "failed" or "stopped"."""


def make_tracker(name: TrackerName) -> AbstractTracker:
    """Return the tracker called `name`."""
    module, _, attribute = _CLASSES[name].partition(":")
    tracker: AbstractTracker = getattr(importlib.import_module(module), attribute)()
    return tracker


def tracking_uri(declared: str | None) -> str:
    """Return where MLflow data goes: `MLFLOW_TRACKING_URI`, else what the spec says, else here."""
    return os.environ.get("MLFLOW_TRACKING_URI") or declared or DEFAULT_URI


@dataclass(kw_only=True)
class TrackingProgress:
    """How far a run is recorded; JSON apart from the cursors' type.

    Attributes:
        cursors: cell -> up to where its events are recorded.
        closed: cells whose end is recorded.
        ids: see `AbstractTracker.ids`.
    """

    cursors: dict[str, Cursor] = field(default_factory=dict)
    closed: list[str] = field(default_factory=list)
    ids: dict[str, Any] = field(default_factory=dict)


class TrackingThread:
    """Does a tracker's work in a thread, in order.

    The first error ends the tracking, not the run: what was recorded up to then is known by
    `progress`, and resuming the run sends the rest.

    Args:
        name: of the tracker; imported in the thread, for MLflow takes seconds.
        progress: what an earlier life of the run recorded.

    Attributes:
        opened: whether the run itself is recorded.
        error: what ended the tracking, or None.
    """

    def __init__(self, name: TrackerName, progress: TrackingProgress):
        self._name = name
        self._jobs: queue.SimpleQueue[Callable[[AbstractTracker], None] | None]
        self._jobs = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._progress = copy.deepcopy(progress)
        self.opened = False
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def put(self, job: Callable[[AbstractTracker], None]) -> None:
        """Queue some work, as a function of the tracker."""
        self._jobs.put(job)

    def open(self, run: RunFacts) -> None:
        """Queue the beginning of the run."""

        def job(tracker: AbstractTracker) -> None:
            tracker.open_run(run)
            self.opened = True

        self.put(job)

    def log(self, cell: str, events: list[Event], cursor: Cursor) -> None:
        """Queue events of a cell; once they are recorded, the cell's cursor is moved."""

        def job(tracker: AbstractTracker) -> None:
            tracker.log(cell, events)
            with self._lock:
                self._progress.cursors[cell] = cursor

        self.put(job)

    def close(self, cell: str, state: str, fetch: Callable[[], Mapping[str, Path]]) -> None:
        """Queue a cell's end; `fetch` returns the outputs to keep with it, and may take time."""

        def job(tracker: AbstractTracker) -> None:
            tracker.close_cell(cell, state, fetch())
            if state == "done" and cell not in self._progress.closed:
                with self._lock:
                    self._progress.closed.append(cell)

        self.put(job)

    def progress(self) -> TrackingProgress:
        """Return what is recorded by now."""
        with self._lock:
            return copy.deepcopy(self._progress)

    def finish(self, timeout_s: float) -> bool:
        """Wait until all is recorded; False when it is not, for lack of time or for an error."""
        self._jobs.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive() and self.error is None

    def _work(self) -> None:
        try:
            tracker = make_tracker(self._name)
            while (job := self._jobs.get()) is not None:
                job(tracker)
                with self._lock:
                    self._progress.ids = copy.deepcopy(tracker.ids)
        except Exception as error:  # a server or a database may fail in any way; the driver reports
            self.error = error
