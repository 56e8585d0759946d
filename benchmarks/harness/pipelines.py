"""Benchmarks that are a pipeline: the product runs them, and its results become documents."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.harness.documents import (
    Document,
    cell_path,
    read_document,
    write_document,
    write_environment,
)
from benchmarks.harness.environment import environment_of
from benchmarks.harness.extension import Grids, extended_grids, with_grids
from benchmarks.harness.lineage import Step, cost_of, findings_of, path_to
from benchmarks.harness.suite import STORE_VARIABLE, Benchmark, matches, store_folder
from pipeline.base.errors import BadInput
from pipeline.cli.run_commands import print_end
from pipeline.executors import ExecutorName
from pipeline.running.documents import RunOptions
from pipeline.running.launch import run_and_read
from pipeline.running.results import result_rows
from pipeline.spec.load import load_spec
from pipeline.spec.spec import Spec
from pipeline.store.store import Store
from pipeline.tracking import TrackerName


def run_pipeline(
    benchmark: Benchmark,
    results: Path,
    only: Sequence[str],
    console: Console,
    stop_after_s: float | None = None,
) -> int:
    """Run a pipeline, as `fls run` does, and keep its evaluated models, also of a failed run.

    A model whose `select` chose a value at an end of its grid is no result yet: the cells that
    measure it run again with an extended grid, see `benchmarks.harness.sweeps`.

    Returns:
        The exit code of `fls run`, the first one that is not 0.

    Raises:
        BadInput: the pipeline is not valid, or has no cell that fits `only`.
    """
    os.environ[STORE_VARIABLE] = str(store_folder().absolute())  # the pipeline file reads it
    spec = load_spec(benchmark.path)
    until = [cell.name for cell in spec.cells if only and matches(only, cell.name)]
    if only and not until:
        raise BadInput(f"{benchmark.path} has no cell {' or '.join(map(repr, only))}.")
    stop_s = math.inf if stop_after_s is None else time.monotonic() + stop_after_s
    code = 0
    while code < 128:  # not stopped by a signal, or out of time
        left_s = None if stop_s == math.inf else max(0.0, stop_s - time.monotonic())
        grids: Grids = {}
        try:
            ended = _run(spec, until, console, left_s)
            code = max(ended, code) if ended >= 128 else code or ended
        finally:
            grids, until = keep_results(spec, benchmark.name, results)
        if not until:
            break
        spec = load_spec(benchmark.path, with_grids(spec.overrides, grids))
    return code


def _run(spec: Spec, until: list[str], console: Console, stop_after_s: float | None) -> int:
    """Run cells of a pipeline and all before them; all cells if none is named."""
    options = RunOptions(
        file=str(spec.path),
        overrides=list(spec.overrides),
        until=until,
        executor=ExecutorName.LOCAL,
        tracking=TrackerName.JSONL,
    )
    read = partial(print_end, console=console)
    return run_and_read(spec, options, console, read, stop_after_s)


def keep_results(spec: Spec, benchmark: str, results: Path) -> tuple[Grids, list[str]]:
    """Write a document for each evaluated model, unless an equal one exists.

    Its environment is that of the slowest cell on the model's path. A model whose grid has to be
    extended has no document.

    Returns:
        The extended grids, and the cells that measure such models.
    """
    store = Store(spec.storage)
    grids: Grids = {}
    until = []
    for row in result_rows(spec, store)[1]:
        extended = extended_grids(spec, row)
        if not extended:
            _keep_row(store, row, benchmark, results)
            continue
        until.append(row["cell"])
        for axis, values in extended.items():
            grids[axis] = sorted({*grids.get(axis, []), *values})
    return grids, list(dict.fromkeys(until))


def _keep_row(store: Store, row: dict[str, Any], benchmark: str, results: Path) -> None:
    """Write the document of an evaluated model, unless an equal one exists."""
    cell, key = row.pop("model_cell"), row["key"]
    del row["run_id"]  # known to one tracking server only
    manifest = store.manifest(key)
    if manifest is None:
        return
    path = cell_path(results, benchmark, cell)
    steps = path_to(store, key)
    document: Document = {**row, **cost_of(steps), **findings_of(store, steps), "cell": cell}
    before = read_document(path) or {}
    if document.items() <= before.items():
        return
    made = max(steps, key=_seconds).manifest if steps else manifest
    environment = environment_of(made.making, made.time)
    document["environment"] = write_environment(results, environment)
    write_document(path, document)


def _seconds(step: Step) -> float:
    return step.cost["seconds"]
