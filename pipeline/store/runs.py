"""The documents of runs in a store, and the marks that processes leave on them."""

from __future__ import annotations

import uuid
from typing import ClassVar, Protocol, TypeVar

from pipeline.base.errors import DamagedDocument, StoreError
from pipeline.base.secrets import redact
from pipeline.base.shapes import to_json
from pipeline.store.checksum import with_checksum
from pipeline.store.layout import (
    RUNS,
    life_mark,
    marks_folder,
    parse_life,
    run_document,
    run_ids,
    run_mark,
)
from pipeline.store.root import StoreRoot


class RunDocument(Protocol):
    """A dataclass that is a document of a run.

    Attributes:
        DOCUMENT: the name of its file.
    """

    DOCUMENT: ClassVar[str]


_Document = TypeVar("_Document", bound=RunDocument)


class RunStore(StoreRoot):
    """The part of a store that is about runs."""

    def write_run(self, run_id: str, document: RunDocument) -> None:
        """Write, or replace, a document of a run, redacted; run ids sort by time."""
        self.prepare()
        path = run_document(run_id, document.DOCUMENT)
        self.storage.write(path, with_checksum(redact(to_json(document))))

    def read_run(self, run_id: str, shape: type[_Document]) -> _Document | None:
        """Return a document of a run, or None without one; it may be a `DamagedDocument`."""
        return self.read_document(shape, run_document(run_id, shape.DOCUMENT))

    def peek_run(self, run_id: str, shape: type[_Document]) -> _Document | None:
        """Return a document of a run, or None without a whole one."""
        try:
            return self.read_run(run_id, shape)
        except DamagedDocument:
            return None

    def list_runs(self) -> list[str]:
        """Return the ids of all runs, oldest first."""
        return run_ids(self.storage.names(RUNS))

    def begin_life(self, run_id: str) -> int:
        """Return a number that no other driver of the run has, above all earlier ones'."""
        number = self.newest_life(run_id)[0] + 1
        while not self.mark_run(run_id, life_mark(number)):
            number += 1
        return number

    def newest_life(self, run_id: str) -> tuple[int, float]:
        """Return the number of the run's newest driver, and when it began; zeros without any."""
        marks = self.storage.files(marks_folder(run_id))
        begun = [(parse_life(mark.path), mark.time) for mark in marks]
        return max(((life, time_s) for life, time_s in begun if life), default=(0, 0.0))

    def beat(self, run_id: str) -> None:
        """Leave a sign of life of a run's driver, in place of the one before."""
        self.storage.write(run_mark(run_id, "alive"), b"")

    def last_beat(self, run_id: str) -> float | None:
        """Return the Unix time of the last sign of life of a run's driver, by the storage's clock.

        That is a mark or the document `state`. None if the storage does not tell times.
        """
        try:
            paths = run_document(run_id, "state"), run_mark(run_id, "alive")
            return max(file.time for path in paths for file in self.storage.files(path))
        except (StoreError, ValueError):
            return None

    def mark_run(self, run_id: str, mark: str) -> bool:
        """Leave a mark on a run, for its driver to see; tell whether it is new."""
        # What it holds tells it from the same mark of another process, see `create`.
        return self.storage.create(run_mark(run_id, mark), uuid.uuid4().hex.encode())

    def run_marks(self, run_id: str) -> list[str]:
        """Return the marks on a run."""
        return self.storage.names(marks_folder(run_id))
