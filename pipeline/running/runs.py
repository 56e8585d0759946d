"""The runs of a store: found by id, read, and searched for the makers of results."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from pipeline.base.errors import BadInput, DamagedDocument, nearest
from pipeline.running.documents import DOCUMENTS, DriverStatus, RunProgress, RunRequest, RunTracking
from pipeline.running.record import RunRecord
from pipeline.store.store import Store


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
