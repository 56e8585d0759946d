"""Benchmarks that are Python modules: one process per cell; finished cells are kept."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.harness.documents import (
    cell_path,
    read_document,
    write_document,
    write_environment,
)
from benchmarks.harness.environment import describe_environment
from benchmarks.harness.suite import BENCHMARKS, Benchmark, load_script, matches, store_folder
from pipeline.worker.cost import CostMeter

_THREADS = "OMP_NUM_THREADS"


def run_script(
    benchmark: Benchmark,
    results: Path,
    only: Sequence[str],
    console: Console,
    stop_after_s: float | None = None,
) -> dict[str, str]:
    """Run the cells that are unfinished, or whose parameters have changed.

    Returns:
        Failed cell -> the last line of its output.

    Raises:
        subprocess.TimeoutExpired: after `stop_after_s`; the running cell is killed, and later
            resumes from its folder.
    """
    stop_s = math.inf if stop_after_s is None else time.monotonic() + stop_after_s
    wanted = {
        cell: params
        for cell, params in load_script(benchmark.path).cells().items()
        if matches(only, cell) and not _finished(results, benchmark, cell, params)
    }
    failed: dict[str, str] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bar = progress.add_task(benchmark.name, total=len(wanted))
        for cell, params in wanted.items():
            progress.update(bar, description=f"{benchmark.name}: {cell}")
            error = _run_apart(benchmark, results, cell, params, stop_s)
            if error:
                failed[cell] = error.strip().rpartition("\n")[2]
                console.print(f"{cell} failed:\n{error}", markup=False, soft_wrap=True)
            progress.advance(bar)
    return failed


def _finished(results: Path, benchmark: Benchmark, cell: str, params: Mapping[str, Any]) -> bool:
    document = read_document(cell_path(results, benchmark.name, cell))
    return document is not None and document["params"] == json.loads(json.dumps(params))


def _run_apart(
    benchmark: Benchmark, results: Path, cell: str, params: Mapping[str, Any], stop_s: float
) -> str | None:
    """Run a cell in its own process; return its error output, or None if it succeeded."""
    folder = store_folder() / "scripts" / cell_path(Path(), benchmark.name, cell).with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    _forget_other_params(folder, params)
    paths = [str(BENCHMARKS.parent), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        _THREADS: os.environ.get(_THREADS, "1"),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    task = {"path": str(benchmark.path), "cell": cell, "params": params}
    where = {"folder": str(folder), "results": str(results)}
    done = subprocess.run(  # noqa: S603 - this interpreter, this module
        [sys.executable, "-m", __name__, json.dumps({**task, **where})],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        timeout=None if stop_s == math.inf else max(0.0, stop_s - time.monotonic()),
    )
    if done.returncode == 0:
        shutil.rmtree(folder)
        return None
    return done.stderr or f"its process ended with code {done.returncode}"


def _forget_other_params(folder: Path, params: Mapping[str, Any]) -> None:
    """Empty the scratch folder of an earlier run of the cell with other parameters."""
    note = folder.with_name(f"{folder.name}.params.json")
    if read_document(note) != json.loads(json.dumps(params)):
        shutil.rmtree(folder)
        folder.mkdir()
        write_document(note, params)


def _run_here(task: Mapping[str, Any]) -> None:
    """Run a cell in this process, and write its document."""
    path, results = Path(task["path"]), Path(task["results"])
    module = load_script(path)
    meter = CostMeter()
    result = module.run_cell(task["params"], Path(task["folder"]))
    cost = meter.read()
    environment = describe_environment("cuda" if "gpu_peak_bytes" in cost else "cpu")
    document = {
        "cell": task["cell"],
        "params": task["params"],
        "result": result,
        **cost,
        "environment": write_environment(results, environment),
    }
    write_document(cell_path(results, path.stem, task["cell"]), document)


if __name__ == "__main__":
    _run_here(json.loads(sys.argv[1]))
