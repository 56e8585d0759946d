"""The documents of runs in a store, and the marks of processes on runs."""

from __future__ import annotations

import uuid
from typing import ClassVar, Protocol, TypeVar

from pipeline.base.errors import DamagedDocument, StoreError
from pipeline.base.secrets import redact
from pipeline.base.shapes import to_json
from pipeline.store import layout
from pipeline.store.checksum import with_checksum
from pipeline.store.root import StoreRoot


class RunDocument(Protocol):
    """A dataclass that is a document of a run; `DOCUMENT` is the name of its file."""

    DOCUMENT: ClassVar[str]


_Document = TypeVar("_Document", bound=RunDocument)


class RunStore(StoreRoot):
    """The part of a store with the runs."""

    def write_run(self, run_id: str, document: RunDocument) -> None:
        """Write, or replace, a document of a run, redacted; run ids sort by time."""
        self.prepare()
        path = layout.run_document(run_id, document.DOCUMENT)
        self.storage.write(path, with_checksum(redact(to_json(document))))

    def read_run(self, run_id: str, shape: type[_Document]) -> _Document | None:
        """Return a document of a run, or None; a damaged one raises `DamagedDocument`."""
        return self.read_document(shape, layout.run_document(run_id, shape.DOCUMENT))

    def peek_run(self, run_id: str, shape: type[_Document]) -> _Document | None:
        """Return a document of a run, or None if it is missing or damaged."""
        try:
            return self.read_run(run_id, shape)
        except DamagedDocument:
            return None

    def list_runs(self) -> list[str]:
        """Return the ids of all runs, oldest first."""
        return layout.run_ids(self.storage.names(layout.RUNS))

    def begin_life(self, run_id: str) -> int:
        """Return the number of a new driver of the run, above all earlier ones."""
        number = self.newest_life(run_id)[0] + 1
        while not self.mark_run(run_id, layout.life_mark(number)):
            number += 1
        return number

    def newest_life(self, run_id: str) -> tuple[int, float]:
        """Return number and start (Unix time) of the run's newest driver; zeros without any."""
        marks = self.storage.files(layout.marks_folder(run_id))
        begun = [(layout.parse_life(mark.path), mark.time) for mark in marks]
        return max(((life, time_s) for life, time_s in begun if life), default=(0, 0.0))

    def beat(self, run_id: str) -> None:
        """Write the heartbeat of a run's driver."""
        self.storage.write(layout.run_mark(run_id, "alive"), b"")

    def last_beat(self, run_id: str) -> float | None:
        """Return the Unix time of the last heartbeat, or write of `state`, by the storage's clock.

        None if there is none, or the storage has no times.
        """
        try:
            paths = layout.run_document(run_id, "state"), layout.run_mark(run_id, "alive")
            return max(file.time for path in paths for file in self.storage.files(path))
        except (StoreError, ValueError):
            return None

    def mark_run(self, run_id: str, mark: str) -> bool:
        """Leave a mark on a run for its driver; tell whether it is new."""
        # Random content distinguishes it from another process's mark, see `create`.
        return self.storage.create(layout.run_mark(run_id, mark), uuid.uuid4().hex.encode())

    def run_marks(self, run_id: str) -> list[str]:
        """Return the marks on a run."""
        return self.storage.names(layout.marks_folder(run_id))
