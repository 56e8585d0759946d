"""Tracking without a driver: sends the missing parts of a run, and ends runs of dead drivers.

The next driver that starts on a store ends the runs of killed drivers in tracking. The unsent news
of such a run stay in the store, where `fls resume` and `fls sync` find them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice

from rich.console import Console

from pipeline.base.errors import (
    BadInput,
    DamagedDocument,
    PipelineError,
    StorageUnavailable,
    StoreError,
)
from pipeline.base.parallel import Requests
from pipeline.base.secrets import HIDDEN, redact
from pipeline.base.states import CellState, RunState
from pipeline.running.documents import RunTracking
from pipeline.running.facts import StoredFacts, load_facts
from pipeline.running.record import HEARTBEAT_S, RunRecord
from pipeline.running.runs import load_run, recorded_ids
from pipeline.running.trust import Places, Trust
from pipeline.spec.cells import Registration
from pipeline.store.store import Store
from pipeline.tracking import (
    AbstractTracker,
    News,
    Recorder,
    RunFacts,
    TrackerName,
    destination,
    make_tracker,
)

HIDDEN_ADDRESS = "was tracked at {}, and the hidden part is not stored; set MLFLOW_TRACKING_URI."
_ENDS = {
    CellState.DONE: CellState.DONE,
    CellState.CACHED: CellState.DONE,
    CellState.FAILED: CellState.FAILED,
}


def close_orphans(
    store: Store,
    kind: TrackerName,
    places: Places,
    tracker: AbstractTracker | None = None,
    *,
    mine: str = "",
) -> list[str]:
    """End, in tracking, the runs of a store whose driver is dead; return their ids.

    Args:
        store: the store.
        kind: the tracker that recorded them.
        places: the places to end runs at; others are left alone.
        tracker: one of that kind; None to make one for the first such run.
        mine: id of the run that is starting, which stays open; "" for none.

    Cost: one small document for each ended run, three for any other.
    """
    closed: list[str] = []
    away: set[str] = set()
    for run_id in store.list_runs():
        tracking = store.peek_run(run_id, RunTracking)
        if run_id == mine or tracking is None or tracking.ended:
            continue
        record, run = _orphan(store, run_id, kind, places)
        if record is None or run is None or (place := destination(run, kind)) in away:
            continue
        cells = {
            cell: _ENDS.get(status.state, CellState.STOPPED)
            for cell, status in record.cells.items()
        }
        if tracker is None:
            try:
                tracker = make_tracker(kind)
            except Exception:  # its library is not installed, or broken
                return closed
        try:
            found = tracker.close_orphan(run, _end(record.observed_state()), cells)
        except Exception as error:  # this run stays for the next start
            if tracker.is_outage(error):
                away.add(place)
            continue
        if found:
            record.tracking.ended = True
            record.save_tracking(store)
            closed.append(run_id)
    return closed


def _orphan(
    store: Store, run_id: str, kind: TrackerName, places: Places
) -> tuple[RunRecord | None, RunFacts | None]:
    """Return record and facts of a run, if its driver is dead and this side may end it."""
    try:
        facts, record = load_facts(store, run_id), load_run(store, run_id)
    except (BadInput, DamagedDocument):  # `fls status` reports it
        return None, None
    run = places.find(facts.run, kind) if facts else None
    if (
        run is None
        or record.options.tracking is not kind
        or record.destination not in {"", destination(run, kind)}
        or record.observed_state() is RunState.RUNNING
        or record.is_attended()
    ):
        return None, None
    return record, run


def sync_runs(
    store: Store,
    records: Sequence[RunRecord],
    trust: Trust,
    console: Console,
    *,
    named: bool = True,
) -> bool:
    """Send the missing parts of some runs; return whether all of them are complete now.

    Args:
        store: holds them.
        records: the runs.
        trust: of the present folder.
        console: gets a line for each run.
        named: whether a person named the runs. Otherwise a run with a silent driver is skipped,
            because a sleeping laptop may wake up.
    """
    complete = True
    for record in records:
        try:
            said, whole = _sync_one(store, record, trust, console, named)
            console.print(f"{record.run_id} {said}", soft_wrap=True)
        except DamagedDocument as error:
            whole = False
            console.print(f"{error}", soft_wrap=True)
        complete = complete and whole
    return complete


def _sync_one(
    store: Store, record: RunRecord, trust: Trust, console: Console, named: bool
) -> tuple[str, bool]:
    """Send the missing parts of a run; return a predicate, and whether it is complete now."""
    tracker, facts = record.options.tracking, load_facts(store, record.run_id)
    who = f"process {record.pid} on {record.host}"
    if record.observed_state() is RunState.RUNNING:
        return f"is running; its driver records it ({who}).", True
    if record.tracked:
        return "is complete.", True
    if facts is None:
        return "never began.", True
    run = trust.places.find(facts.run, tracker)
    if run is None and HIDDEN in facts.run.uri:
        return HIDDEN_ADDRESS.format(facts.run.uri), False
    if not named and _may_continue(record):
        return (
            f"has not ended: {who} has been silent for {record.silence_s():.0f} s, and may "
            f"continue. If it is gone for good, `{record.sync_command}` sends the rest."
        ), False
    if run is None:
        return trust.stranger(facts.run, tracker), False
    if (why := record.why_not_at(destination(run, tracker))) is not None:
        return why, False
    if record.is_attended() or not record.take_over(store):
        return f"is being recorded by {who}; try again later.", False
    record.track_at(destination(run, tracker))
    facts, unsure = _with_loaders(replace(facts, run=run), record, trust)
    return _sync(store, record, facts, unsure, console)


def _may_continue(record: RunRecord) -> bool:
    """Tell whether a run's driver has not ended it, and may be alive."""
    return record.state is RunState.RUNNING and record.heartbeat > 0 and not record.has_died()


def _sync(
    store: Store, record: RunRecord, facts: StoredFacts, unsure: Sequence[str], console: Console
) -> tuple[str, bool]:
    """Send the missing parts of one run; return a predicate for it, and whether it is complete.

    `unsure` are messages about parts that stay missing.

    Raises:
        PipelineError: the tracking server is away.
        StorageUnavailable: the storage is away.
    """
    tracker = make_tracker(record.options.tracking)
    step, say = partial(_step, store, record), partial(console.print, soft_wrap=True)
    recorder = Recorder(tracker, store, facts.run, record.tracking, step, say)
    for one in unsure:
        say(one)
    count, lost = 0, bool(unsure)
    try:
        recorder.open()
        for news in _read_ahead(recorder, store, _missing(store, record, facts)):
            recorder.record(*news)
            count += news[0].cell not in recorder.set_aside
        for key, output in _promoted(record, facts):
            try:
                folder = store.fetch(key, output)
            except StorageUnavailable:
                raise
            except StoreError as error:
                lost = True
                say(f"the output {output} cannot be kept with the run: {error}")
            else:
                recorder.promote(output, folder)
        recorder.close(_end(record.observed_state()))
    except PipelineError:
        raise
    except Exception as error:  # a server or a database may fail in any way
        raise PipelineError(
            f"Run {record.run_id} could not be sent to {redact(facts.run.uri)} "
            f"({type(error).__name__}: {redact(str(error))}). "
            f"Nothing is lost: `{record.sync_command}` sends the rest."
        ) from error
    finally:
        complete = record.tracking.ended and not recorder.set_aside and not lost
        record.tracked = complete
        if not record.superseded(store):
            record.save_progress(store, leaving=True)
    state = "is complete" if complete else "is recorded, except for the parts named above"
    return f"{state}: {count} cells sent.", complete


def _with_loaders(
    facts: StoredFacts, record: RunRecord, trust: Trust
) -> tuple[StoredFacts, list[str]]:
    """Register models as the present pipeline file does; return also messages about the others.

    The file must name their loaders, because registration runs a loader and the code that the
    model's file names.
    """
    wanted = [
        cell.cell
        for cell in facts.cells
        if cell.registration is not None and cell.cell not in record.tracking.registered
    ]
    if not wanted:
        return facts, []
    known: Mapping[str, tuple[Registration, Sequence[str]]] = {}
    why = f"no stage of {trust.file} registers it"
    try:
        known = trust.registrations()
    except PipelineError as error:
        why = str(error)
    cells, said = facts.by_name, []
    for name in wanted:
        own = cells[name].registration
        registration, calls = known.get(name, (None, ()))
        cells[name] = replace(cells[name], registration=registration, calls=calls)
        if registration is None and own is not None:
            said.append(
                f"{name} is not registered: the store names {own.loader!r} to load its model, "
                f"but {why}. `{record.resume_command}` does, or give its own pipeline as --file."
            )
    return replace(facts, cells=list(cells.values())), said


def _read_ahead(recorder: Recorder, store: Store, news: Iterator[News]) -> Iterator[News]:
    """Yield the news; the recorder reads the storage's number of cells at a time."""
    with Requests(store.storage.at_once) as requests:
        while some := list(islice(news, requests.at_once)):
            recorder.read_ahead(some, requests)
            yield from some


def _step(store: Store, record: RunRecord, cell: str | None) -> None:
    """Write a heartbeat every few seconds, unless the run was taken over: see `require_own`."""
    if time.time() - record.heartbeat >= HEARTBEAT_S:
        record.require_own(store)
        record.save_progress(store)


def _missing(store: Store, record: RunRecord, facts: StoredFacts) -> Iterator[News]:
    """Yield the unrecorded news, as the driver would have noted them."""
    cached = [one.key for one in record.cells.values() if one.state is CellState.CACHED]
    sources = recorded_ids(store, cached, record.destination)
    progress, cells = record.tracking, facts.by_name
    for name, status in record.cells.items():
        cell = replace(cells[name], key=status.key)
        recorded = name in progress.closed and progress.keys.get(name) == status.key
        if status.state is CellState.CACHED:
            source = sources[status.key].cell if status.key in sources else None
            yield cell, CellState.CACHED, source
        elif status.state is CellState.DONE or _made(store, record.run_id, status.key):
            if not recorded:
                yield cell, CellState.DONE, None
            elif cell.registration is not None and name not in progress.registered:
                yield cell, CellState.CACHED, None  # no more than that is missing
        elif status.state is CellState.FAILED:
            yield cell, CellState.FAILED, None
        elif status.state is CellState.RUNNING or name in progress.cursors:
            yield cell, CellState.STOPPED, None


def _made(store: Store, run_id: str, key: str) -> bool:
    """Tell whether the run made the result of `key`, even unknown to its driver."""
    manifest = store.readable(key)
    return manifest is not None and manifest.making.get("run") == run_id


def _promoted(record: RunRecord, facts: StoredFacts) -> Iterator[tuple[str, str]]:
    """Yield (key, output) of the outputs that are shown with the run."""
    cells = facts.by_name
    for name, status in record.cells.items():
        if status.state.has_result:
            for output in cells[name].promoted:
                yield status.key, output


def _end(state: RunState) -> RunState:
    """Return a run's end as trackers know it."""
    return RunState.STOPPED if state is RunState.INTERRUPTED else state
