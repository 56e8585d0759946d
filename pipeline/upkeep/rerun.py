"""Reruns a cell from its stored inputs to compare the bytes; publishes nothing."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.base.errors import BadInput, PipelineError
from pipeline.base.shapes import to_json
from pipeline.code.provenance import changes
from pipeline.executors import ExecutorName, make_executor
from pipeline.planning.keys import explain
from pipeline.planning.planner import Plan, PlannedCell, RunPlan
from pipeline.running.ready import Schedule
from pipeline.running.runs import load_run
from pipeline.spec.cells import resolve, shorten
from pipeline.spec.spec import Spec
from pipeline.store.checksum import with_checksum
from pipeline.store.layout import manifest_path, output_folder
from pipeline.store.manifest import Manifest
from pipeline.store.store import Store
from pipeline.worker.task import Outcome, Task

_CIRCUMSTANCES = ("device", "threads", "workers", "platform", "python")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """The comparison of a recomputed result with the stored one.

    Attributes:
        cell: the cell's name.
        files: number of files in the stored result.
        differences: one phrase for each file that differs.
        circumstances: one phrase for each difference in device, threads and versions.
        earlier: for a result of earlier code, the command that accepts the code; else "".
    """

    cell: str
    files: int
    differences: Sequence[str]
    circumstances: Sequence[str]
    earlier: str = ""


def rerun(plan: Plan, store: Store, address: str, where: str = "") -> Comparison:
    """Compute a stored cell again in a temporary folder, with the original number of threads.

    If only its code has changed, the stored result of the earlier code is compared, to decide
    whether the code is equivalent. `BadInput` if the address does not name one cell, or the cell or
    an input is not in the store.

    Args:
        plan: a plan with the cell.
        store: contains its result and its inputs; read only.
        address: the cell's.
        where: options of `fls accept` in the hint, with a leading space; "" for the run's own.

    Raises:
        PipelineError: the computation failed.
    """
    planned = _find(plan, address)
    stored, earlier = planned.manifest or _complete(store, planned.key), ""
    if stored is None:
        stored, run = _find_earlier(plan, store, planned)
        found_by = where or load_run(store, run).where
        earlier = f"fls accept {planned.cell.stage} --run {run}{found_by} --why '...'"
    schedule, name = Schedule(plan), planned.cell.name
    with tempfile.TemporaryDirectory(prefix="fls-rerun-") as folder:
        copy = Store(folder)
        task = schedule.task(name, run="rerun", storage=copy.url, token=copy.prepare())
        for source in [one for found in task["inputs"].values() for one in found]:
            _require_files(plan.spec, store, name, source["cell"], source["key"])
            _copy_result(store, copy, source["key"], source["output"])
        making = stored.making
        outcome = _run(task, planned, threads=making["threads"], workers=making["workers"])
        if outcome["status"] != "ok":
            raise PipelineError(f"{name}, computed again, failed: {outcome['error']['message']}")
        made = copy.manifest(planned.key)
        assert made is not None  # noqa: S101 - the outcome says that it was published there
    return Comparison(
        cell=name,
        files=sum(map(len, stored.outputs.values())),
        differences=_differences(stored, made),
        circumstances=_circumstances(stored.making, made.making),
        earlier=earlier,
    )


def _find(plan: Plan, address: str) -> PlannedCell:
    names = [cell.name for cell in resolve(address, plan.spec.cells)]
    if len(names) != 1:
        raise BadInput(f"{address!r} names {len(names)} cells; choose one: {shorten(names)}")
    return next(one for one in plan.cells if one.cell.name == names[0])


def _complete(store: Store, key: str) -> Manifest | None:
    """Return a result's manifest, also if its files were collected; a damaged one is an error."""
    return store.manifest(key) or store.collected(key)


def _find_earlier(plan: Plan, store: Store, planned: PlannedCell) -> tuple[Manifest, str]:
    # Returns the newest result of a cell that differs in its code alone, and its run.
    name, now = planned.cell.name, planned.ingredients
    changes: list[str] = []
    for run in reversed(store.list_runs()):
        document = store.peek_run(run, RunPlan)
        if document is None or document.pipeline != plan.spec.name or name not in document.cells:
            continue
        before = document.cells[name]
        stored = _complete(store, before.key)
        if stored is not None:
            same = {part: now[part] for part in ("code", "generation")}
            others = explain({**before.ingredients, **same}, now)
            if not others:
                return stored, run
            changes = changes or others
    why = f" as it is now ({'; '.join(changes)})" if changes else ""
    raise BadInput(f"{name} is not in the store{why}, so there is nothing to compare.")


def _require_files(spec: Spec, store: Store, name: str, source: str, key: str) -> None:
    if store.manifest(key) is None:
        collected = store.collected(key) is not None
        why = "whose files fls gc collected (keep: results)" if collected else "which is missing"
        command = spec.command("--until", source)
        raise BadInput(f"{name} needs {source}, {why}; `{command}` makes it.")


def _copy_result(store: Store, copy: Store, key: str, output: str) -> None:
    folder = store.fetch(key, output)
    manifest = store.manifest(key)
    if manifest is None:
        raise BadInput(f"the store has lost {key[:12]} meanwhile; try again.")
    copy.storage.create(manifest_path(key), with_checksum(to_json(manifest)))
    target = copy.storage.local(output_folder(key, manifest.attempt, output))
    if not target.exists():
        shutil.copytree(folder, target)


def _run(task: Task, planned: PlannedCell, *, threads: int, workers: int) -> Outcome:
    """Run a task in new processes on this machine."""
    resources = dataclasses.replace(
        planned.cell.resources, num_cpus=float(threads), workers=workers
    )
    task["num_cpus"] = resources.num_cpus
    executor = make_executor(ExecutorName.LOCAL)
    try:
        executor.check([(planned.cell.name, resources)])
        executor.submit(task, resources)
        while True:
            for _, outcome in executor.wait(1.0):
                return outcome
    finally:
        executor.stop()


def _differences(stored: Manifest, made: Manifest) -> list[str]:
    found = []
    for output in sorted({*stored.outputs, *made.outputs}):
        before, after = stored.outputs.get(output, {}), made.outputs.get(output, {})
        for name in sorted({*before, *after}):
            if name not in after:
                found.append(f"{output}/{name} was not written again")
            elif name not in before:
                found.append(f"{output}/{name} is new")
            elif before[name] != after[name]:
                sizes = before[name]["bytes"], after[name]["bytes"]
                how = "" if sizes[0] == sizes[1] else f" ({sizes[0]} -> {sizes[1]} bytes)"
                found.append(f"{output}/{name} differs{how}")
    return found


def _circumstances(stored: Mapping[str, Any], made: Mapping[str, Any]) -> list[str]:
    """Return the differences in device, threads and versions: only equal ones give equal bits."""
    before, after = (
        {**{name: one.get(name) for name in _CIRCUMSTANCES}, **one.get("packages", {})}
        for one in (stored, made)
    )
    return changes(before, after)
