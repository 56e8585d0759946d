"""The launch of a run, new or resumed, up to its end."""

from __future__ import annotations

import os
import platform
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from pipeline.base.errors import BadInput, Damaged, DamagedDocument
from pipeline.base.places import LINES
from pipeline.base.secrets import HIDDEN
from pipeline.base.states import PlanState, RunState
from pipeline.base.variables import RAY_JOB, STORAGE
from pipeline.code.provenance import (
    Provenance,
    changed_versions,
    other_versions,
    read_source,
)
from pipeline.executors import ExecutorName, make_executor
from pipeline.planning.planner import Plan, make_plan
from pipeline.running.documents import RunOptions
from pipeline.running.drift import Drift, find_drift, is_complete, plan_of
from pipeline.running.driver import GRACE_S, Driver
from pipeline.running.facts import load_facts, save_facts, unregistered
from pipeline.running.live import LiveView
from pipeline.running.record import RunRecord
from pipeline.running.runs import load_run, new_run_id
from pipeline.running.sync import HIDDEN_ADDRESS, close_orphans
from pipeline.running.trust import Places, Trust, places_of
from pipeline.spec.cells import shorten
from pipeline.spec.spec import Spec
from pipeline.store.storage.local import LocalStorage
from pipeline.store.store import Store
from pipeline.tracking import RunFacts, TrackerName, TrackingThread, destination

_STOP_WAIT_S = 60.0
_Read = TypeVar("_Read")


@dataclass(frozen=True, kw_only=True)
class Ended:
    """The end of a run, or of a command that found nothing to run.

    Attributes:
        spec: the pipeline; None if the resumed run was complete.
        store: holds the results.
        keys: cell -> key, for the cells with results.
        record: of the run; None if there was nothing to run.
        signal: the signal that stopped the run, or None.
        folder: of its JSON lines.
    """

    spec: Spec | None
    store: Store
    keys: Mapping[str, str] = field(default_factory=dict)
    record: RunRecord | None = None
    signal: int | None = None
    folder: str = ""


def run_and_read(
    spec: Spec,
    options: RunOptions,
    console: Console,
    read: Callable[[Ended], _Read],
    stop_after_s: float | None = None,
    grace_s: float = GRACE_S,
    run_id: str | None = None,
) -> _Read:
    """Run the selected cells of a spec, see `start_run`, and return what `read` makes of the end.

    If nothing had to run, a damaged result that `read` meets is computed again.

    Raises:
        Damaged: `read` met a damaged result of the cells that ran.
    """
    while True:
        ended = start_run(spec, options, console, stop_after_s, grace_s, run_id)
        try:
            return read(ended)
        except Damaged as error:
            if ended.record is not None:
                raise
            ended.store.set_aside(error.key)
            console.print(f"{error}", soft_wrap=True)


def start_run(
    spec: Spec,
    options: RunOptions,
    console: Console,
    stop_after_s: float | None = None,
    grace_s: float = GRACE_S,
    run_id: str | None = None,
) -> Ended:
    """Run the selected cells of a spec, unless the store has them all and all models registered.

    After `stop_after_s` the run stops as by SIGTERM: finished cells are kept, running ones have
    `grace_s` for a checkpoint, from which a later run resumes.

    Raises:
        BadInput: the store has a run of that id.
    """
    store = Store(spec.storage)
    if run_id is not None and run_id in store.list_runs():
        before = RunRecord(run_id=run_id, options=options, spec_text="")
        raise BadInput(f"{store.url} has a run {run_id} already; `{before.resume_command}`.")
    places = places_of(spec, store)
    plan = make_plan(spec, store, options)
    plan.require_runnable()
    if not (_to_run(plan) or unregistered(store, plan, options.tracking)):
        selected = sum(one.selected for one in plan.cells)
        console.print(f"Nothing to do: all {selected} cells are in the store.")
        close_orphans(store, options.tracking, places)
        keys = {one.cell.name: one.key for one in plan.cells if one.state is PlanState.CACHED}
        return Ended(spec=spec, store=store, keys=keys)
    source = read_source(Path.cwd())
    record = RunRecord(
        run_id=run_id or new_run_id(),
        options=options,
        spec_text=spec.text,
        environment=source.environment(),
    )
    facts = _facts(spec, record, source, _lines_folder(spec, store, options, console))
    return _execute(plan, store, record, source, facts, places, console, stop_after_s, grace_s)


def resume_run(
    store: Store,
    record: RunRecord,
    trust: Trust,
    console: Console,
    stop_after_s: float | None = None,
    grace_s: float = GRACE_S,
    *,
    replan: bool = False,
) -> Ended:
    """Resume a run that was interrupted or stopped, or that failed.

    The spec is the one that the run began with; the file behind `trust` only names the imported
    code and the place of recording. With `replan`, changed cells run again, under new keys.

    Raises:
        BadInput: the run is still running; or code or data have changed, without `replan`; or the
            file does not name the run's code or the place where it is recorded.
    """
    if record.observed_state() is RunState.RUNNING:
        raise BadInput(
            f"Run {record.run_id} is running: process {record.pid} on {record.host}. Stop it first."
        )
    if is_complete(record, store):
        console.print(f"Nothing to do: run {record.run_id} is complete.")
        close_orphans(store, record.options.tracking, trust.places)
        return Ended(spec=None, store=store)
    plan = plan_of(record, store, trust)
    drift = find_drift(plan, record, store)
    if drift.causes and not replan:
        raise BadInput(drift.refusal(record, store.url))
    _print_drift(drift, record, console)
    plan.require_runnable()
    source = read_source(Path.cwd())
    if drift.touched:
        record.environment = source.environment()
    facts = _facts_again(plan.spec, record, source, store, trust, console)
    return _execute(
        plan, store, record, source, facts, trust.places, console, stop_after_s, grace_s
    )


def stop_run(store: Store, record: RunRecord, console: Console) -> int:
    """Ask a run's driver to stop, and wait until it has; return 0, or 1 if it has not in time.

    Raises:
        BadInput: the run is not running.
    """
    if record.observed_state() is not RunState.RUNNING:
        raise BadInput(f"Run {record.run_id} is not running: {record.observed_state()}.")
    record.ask_to_stop(store)
    resume_command = record.resume_command
    console.print(f"Run {record.run_id}: asked {record.host} to stop ...", soft_wrap=True)
    end_s = time.monotonic() + _STOP_WAIT_S
    while time.monotonic() < end_s:
        record = load_run(store, record.run_id)
        state = record.observed_state()
        if state is not RunState.RUNNING:
            more = "" if state is RunState.DONE else f" `{resume_command}` resumes it."
            console.print(f"Run {record.run_id}: {state}.{more}", soft_wrap=True)
            return 0
        time.sleep(0.5)
    console.print(f"Run {record.run_id} has not stopped within {_STOP_WAIT_S:g} s.")
    return 1


def _print_drift(drift: Drift, record: RunRecord, console: Console) -> None:
    """Print the changes since a resumed run began."""
    if drift.touched:
        console.print("Changed since the run began:")
        for line in drift.lines():
            console.print(f"  {line}", soft_wrap=True)
    versions = changed_versions(record.environment, Provenance().environment())
    if versions:
        text = f"Library versions, which are not part of the keys: {shorten(versions)}."
        console.print(text, soft_wrap=True)


def _to_run(plan: Plan) -> int:
    return sum(one.state is PlanState.RUN for one in plan.cells)


def _execute(
    plan: Plan,
    store: Store,
    record: RunRecord,
    source: Provenance,
    facts: RunFacts,
    places: Places,
    console: Console,
    stop_after_s: float | None,
    grace_s: float,
) -> Ended:
    options = record.options
    _check_job(plan.spec, source, console)
    _continue_tracking(record, facts)
    tracking = TrackingThread(
        options.tracking, store, record.tracking, patient=options.tracking_later
    )
    executor = make_executor(options.executor if _to_run(plan) else ExecutorName.LOCAL)
    try:
        demands = [
            (one.cell.name, one.cell.resources) for one in plan.cells if one.state is PlanState.RUN
        ]
        waits = executor.check(demands, may_grow=plan.spec.autoscaling)
        headline = (
            f"Run {record.run_id}: {_to_run(plan)} of {len(plan.cells)} cells to run, "
            f"on {options.executor}, into {options.tracking}"
        )
        for line in (*waits, headline, *plan.notes):
            console.print(line, soft_wrap=True)
        plan.commit(store, record.run_id)
        record.save_request(store)
        store.write_run(record.run_id, source)
        save_facts(store, facts, plan)
        tracking.open(
            facts, partial(close_orphans, store, options.tracking, places, mine=record.run_id)
        )
        view = LiveView(console)
        driver = Driver(plan, store, record, executor, tracking, view, stop_after_s, grace_s)
        driver.run()
    finally:
        executor.stop()
        tracking.finish(0)
    keys = {name: status.key for name, status in record.cells.items() if status.state.has_result}
    return Ended(
        spec=plan.spec,
        store=store,
        keys=keys,
        record=record,
        signal=driver.stop.signal,
        folder=facts.folder,
    )


def _check_job(spec: Spec, source: Provenance, console: Console) -> None:
    """Check the storage of a process that is the job of a cluster.

    Raises:
        BadInput: the job uses folders of another machine, which submitted it.
    """
    if source.submitted_from not in {None, socket.gethostname()}:
        raise BadInput(
            f"{source.submitted_from} submitted this job to an address of its own, but this is "
            f"{socket.gethostname()}, perhaps behind a tunnel: {spec.storage} is another folder "
            "here. Give `storage:` and MLflow as URLs that both machines reach, and submit to the "
            "head's own address."
        )
    note = other_versions(source)
    if note:
        console.print(note, soft_wrap=True)
    if RAY_JOB.read() and spec.storage_given != spec.storage:
        console.print(
            f"The storage {spec.storage} is a folder of this job, which Ray deletes after the job; "
            f"to keep the results, set {STORAGE.name} to a URL or an absolute path.",
            soft_wrap=True,
        )


def _lines_folder(spec: Spec, store: Store, options: RunOptions, console: Console) -> str:
    """Return the folder of JSON lines: for a cluster's job in the storage, if that is a folder."""
    if RAY_JOB.read() and isinstance(store.storage, LocalStorage):
        return str(store.storage.root / LINES)
    if RAY_JOB.read() and options.tracking is TrackerName.JSONL:
        console.print(
            "The JSON lines go into a folder of this job, which Ray deletes after the job; their "
            f"content is also in {store.url}, see `fls logs` and `fls results`.",
            soft_wrap=True,
        )
    return str(spec.tracking_folder / LINES)


def _facts(
    spec: Spec, record: RunRecord, source: Provenance, folder: str, recorded: str | None = None
) -> RunFacts:
    """Return the facts for tracking; a resumed run stays where it is `recorded`."""
    return RunFacts(
        run_id=record.run_id,
        name=spec.name,
        experiment=spec.mlflow.experiment,
        uri=spec.tracking_uri(recorded),
        spec_file=record.options.file,
        spec_text=record.spec_text,
        resolved=spec.resolved,
        overrides=record.options.overrides,
        selection=record.options.selection,
        environment=spec.environment,
        tags={**source.tags(), "mlflow.user": source.user},
        driver={
            "platform": platform.platform(),
            "python": source.python,
            "packages": dict(source.packages),
        },
        folder=folder,
        resumed=bool(record.cells),
    )


def _facts_again(
    spec: Spec, record: RunRecord, source: Provenance, store: Store, trust: Trust, console: Console
) -> RunFacts:
    """Return the facts for tracking of a resumed run, which stays where it was tracked.

    Raises:
        BadInput: the file does not name its tracking address.
    """
    tracker = record.options.tracking
    folder = trust.places.allowed(_lines_folder(spec, store, record.options, console))
    try:
        before = load_facts(store, record.run_id)
    except DamagedDocument:  # resumed without them
        before = None
    if before is None:
        facts = _facts(spec, record, source, folder)
    else:
        kept = trust.places.find(before.run, TrackerName.JSONL)
        folder = kept.folder if kept and os.path.isdir(kept.folder) else folder
        facts = _facts(spec, record, source, folder, before.run.uri)
        if before.run.environment == spec.environment:
            facts = replace(facts, resolved=before.run.resolved or facts.resolved)
    if tracker is TrackerName.JSONL or HIDDEN in facts.uri:
        return facts
    found = trust.places.find(facts, tracker)
    if found is None:
        raise BadInput(f"Run {record.run_id} {trust.stranger(facts, tracker)}")
    return found


def _continue_tracking(record: RunRecord, facts: RunFacts) -> None:
    """Continue tracking where the run is tracked.

    Raises:
        BadInput: that is another server, or its address has hidden credentials.
    """
    tracker = record.options.tracking
    here = destination(facts, tracker)
    if tracker is TrackerName.MLFLOW and HIDDEN in facts.uri:
        raise BadInput(f"Run {record.run_id} {HIDDEN_ADDRESS.format(facts.uri)}")
    if (why := record.why_not_at(here)) is not None:
        raise BadInput(f"Run {record.run_id} {why}")
    record.track_at(here)
