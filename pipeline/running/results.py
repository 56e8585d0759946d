"""Results of a spec: the rows that its cells wrote, and copies of their outputs."""

from __future__ import annotations

import importlib
import json
import shlex
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.base.errors import BadInput, StoreError
from pipeline.base.states import PlanState
from pipeline.planning.planner import Plan, PlannedCell, RunPlan, make_plan
from pipeline.running.documents import RunProgress
from pipeline.running.runs import recorded_ids
from pipeline.spec.cells import Cell, resolve, shorten
from pipeline.spec.spec import Spec
from pipeline.stage import Results
from pipeline.store.storage.base import list_files
from pipeline.store.storage.local import sync
from pipeline.store.store import Store

Row = dict[str, Any]


def result_rows(spec: Spec, store: Store) -> tuple[list[str], list[Row], list[str]]:
    """Gather the rows of all cells with results, for the spec's present keys.

    Returns:
        The columns in order; the rows, each with `cell` and `run_id` (None without a tracked run);
        and the cells without results.

    Raises:
        BadInput: no plugin declares results.
    """
    declared = [
        plugin.catalogue.results for plugin in spec.plugins if plugin.catalogue.results is not None
    ]
    if not declared:
        raise BadInput(f"no plugin of {spec.path} declares results.")
    found = {
        cell.name: (cell, output, results)
        for results in declared
        for cell, output in _with_output(spec.cells, results.kind)
    }
    keys = _keys(make_plan(spec, store), store, list(found))
    ids = recorded_ids(store, keys.values())
    rows: list[Row] = []
    for name, key in keys.items():
        _, output, results = found[name]
        records = ids[key].records if key in ids else {}
        rows += [
            _row(results, name, records, row)
            for row in _read_rows(store.fetch(key, output) / "rows.json", name, key)
        ]
    columns = dict.fromkeys(column for results in declared for column in results.columns)
    return list(columns), rows, [name for name in found if name not in keys]


def _read_rows(path: Path, cell: str, key: str) -> list[Row]:
    """Return the rows in a result.

    Raises:
        StoreError: the file is missing or holds no rows.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        rows = None
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and isinstance(row.get("model_cell"), str) for row in rows
    ):
        raise StoreError(
            f"{cell}: rows.json of its result {key[:12]} is no list of objects that each name a "
            f"model_cell. `fls run --force {shlex.quote(cell)}` computes it again."
        )
    return rows


def _row(results: Results, cell: str, records: Mapping[str, str], row: Row) -> Row:
    earlier = {name: row[other] for name, other in results.before.items() if other in row}
    full = {**earlier, **row, "cell": cell, "run_id": records.get(row["model_cell"])}
    further = {name: row[name] for name in results.further if name in row}
    return {**{column: full.get(column) for column in results.columns}, **further}


def _keys(plan: Plan, store: Store, names: Sequence[str]) -> dict[str, str]:
    """Return cell -> key of its result, for the cells with one.

    A cell that ran with fewer inputs than planned, because other cells failed, has its result under
    another key, which its run records.
    """
    planned = {one.cell.name: one for one in plan.cells}
    keys = {name: planned[name].key for name in names if _has_files(planned[name])}
    absent = {name for name in names if name not in keys}
    for run_id in reversed(store.list_runs()):
        if not absent:
            break
        earlier, progress = store.peek_run(run_id, RunPlan), store.peek_run(run_id, RunProgress)
        before = earlier.cells if earlier else {}
        for status in progress.cells if progress else ():
            name = status.cell
            same = name in absent and name in before and before[name].key == planned[name].key
            if same and status.state.has_result and store.manifest(status.key):
                keys[name] = status.key
                absent.remove(name)
    return {name: keys[name] for name in names if name in keys}


def _has_files(planned: PlannedCell) -> bool:
    return planned.state is PlanState.CACHED and not planned.collected


def export(spec: Spec, store: Store, address: str, destination: Path) -> None:
    """Write a user's copy of one cell's output, by the exporter of its plugin.

    Raises:
        BadInput: the address is not one cell's, the cell has no output to export, or no result yet.
    """
    cells = resolve(address, spec.cells)
    if len(cells) != 1:
        names = shorten([cell.name for cell in cells])
        raise BadInput(f"{address!r} means {len(cells)} cells; choose one: {names}")
    for plugin in spec.plugins:
        catalogue = plugin.catalogue
        if catalogue.exporter is None or catalogue.exports is None:
            continue
        for cell, output in _with_output(cells, catalogue.exports):
            key = _keys(make_plan(spec, store), store, [cell.name]).get(cell.name)
            if key is None:
                command = spec.command("--until", cell.name)
                raise BadInput(f"{cell.name} is not in the store; `{command}` makes it.")
            module, _, attribute = catalogue.exporter.partition(":")
            exporter = getattr(importlib.import_module(module), attribute)
            with _beside(destination) as part:
                exporter(store.fetch(key, output), part)
            return
    kinds = {out.kind for cell in cells for out in cell.declaration.outputs.values()}
    raise BadInput(f"{address} has no output to export, only: {', '.join(sorted(kinds))}")


@contextmanager
def _beside(destination: Path) -> Iterator[Path]:
    """Yield a folder beside a destination; its files move there once all are whole.

    A kill or an error before that leaves the destination unchanged. A new destination appears as a
    whole; in an existing one each file replaces its namesake, and other files stay.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    part = destination.with_name(f".{destination.name}.{uuid.uuid4().hex}.part")
    part.mkdir()
    try:
        yield part
        files = list_files(part)
        for file in files:
            sync(file)
        if destination.exists():
            for file in files:
                target = destination / file.relative_to(part)
                target.parent.mkdir(parents=True, exist_ok=True)
                file.replace(target)
        else:
            part.rename(destination)
        sync(destination.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _with_output(cells: Sequence[Cell], kind: str) -> Iterator[tuple[Cell, str]]:
    """Yield the cells that have an output of `kind`, each with that output's name."""
    for cell in cells:
        for name, output in cell.declaration.outputs.items():
            if output.kind == kind:
                yield cell, name
