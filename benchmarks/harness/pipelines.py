"""Benchmarks that are a pipeline: the product runs them, and its results become documents."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from rich.console import Console

from benchmarks.harness.documents import (
    Document,
    cell_path,
    read_document,
    write_document,
    write_environment,
)
from benchmarks.harness.environment import environment_of
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
    only: str | None,
    console: Console,
    stop_after_s: float | None = None,
) -> int:
    """Run a pipeline, as `fls run` does, and keep its evaluated models, also of a failed run.

    Returns:
        The exit code of `fls run`.

    Raises:
        BadInput: the pipeline is not valid, or has no cell that fits `only`.
    """
    os.environ[STORE_VARIABLE] = str(store_folder().absolute())  # the pipeline file reads it
    spec = load_spec(benchmark.path)
    until = [cell.name for cell in spec.cells if only and matches(only, cell.name)]
    if only and not until:
        raise BadInput(f"{benchmark.path} has no cell {only!r}.")
    options = RunOptions(
        file=str(benchmark.path),
        until=until,
        executor=ExecutorName.LOCAL,
        tracking=TrackerName.JSONL,
    )
    try:
        read = partial(print_end, console=console)
        return run_and_read(spec, options, console, read, stop_after_s)
    finally:
        keep_results(spec, benchmark.name, results)


def keep_results(spec: Spec, benchmark: str, results: Path) -> None:
    """Write a document for each evaluated model, unless an equal one exists.

    Its environment is that of the slowest cell on the model's path.
    """
    store = Store(spec.storage)
    for row in result_rows(spec, store)[1]:
        cell, key = row.pop("model_cell"), row["key"]
        del row["run_id"]  # known to one tracking server only
        manifest = store.manifest(key)
        if manifest is None:
            continue
        path = cell_path(results, benchmark, cell)
        steps = path_to(store, key)
        document: Document = {**row, **cost_of(steps), **findings_of(store, steps), "cell": cell}
        before = read_document(path) or {}
        if document.items() <= before.items():
            continue
        made = max(steps, key=_seconds).manifest if steps else manifest
        environment = environment_of(made.making, made.time)
        document["environment"] = write_environment(results, environment)
        write_document(path, document)


def _seconds(step: Step) -> float:
    return step.cost["seconds"]
