"""The cost of the driver of many cells: pipelines of 500 and of 5,000 empty cells.

The limit of a pipeline is 5,000 cells. The driver's time per cell, its memory and the regularity of
its heartbeat must not depend on the number of cells. Sixty-four cells are submitted at once, as on
a cluster; real workers run them, two on a folder and six on S3. The S3 is moto's on this machine;
each request of the driver is delayed by 30 ms, those of workers are not.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks._noop import Cluster, write_pipeline
from benchmarks._slow_s3 import SlowLink, serve_s3
from pipeline.base.console import RedactingConsole
from pipeline.base.states import RunState
from pipeline.executors import ExecutorName
from pipeline.planning.planner import make_plan
from pipeline.running.documents import RunOptions, RunProgress
from pipeline.running.driver import Driver
from pipeline.running.live import LiveView
from pipeline.running.record import HEARTBEAT_S, RunRecord
from pipeline.running.runs import new_run_id
from pipeline.spec.load import load_spec
from pipeline.store.runs import RunDocument
from pipeline.store.store import Store
from pipeline.tracking import RunFacts, TrackerName, TrackingThread
from pipeline.worker.cost import CostMeter

TITLE = "The driver of many cells"

_CELLS = (500, 5_000)
_FLIGHTS = 64
_DELAY_S = 0.03
_BUCKET = "cells"


def cells() -> dict[str, dict[str, Any]]:
    """Return cell -> parameters: the storage, and the number of cells."""
    return {
        f"{storage}[cells={count}]": {"storage": storage, "cells": count}
        for storage in ("folder", "s3")
        for count in _CELLS
    }


def run_cell(params: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Run the pipeline, and return the cost of its driver."""
    os.chdir(folder)
    write_pipeline(Path("pipeline.yaml"), params["cells"], _STORAGES[params["storage"]])
    if params["storage"] == "folder":
        return _drive(params["cells"], _Watched(".fls"), workers=2)
    with serve_s3() as port:
        _lead_to(port)
        import s3fs

        s3fs.S3FileSystem(skip_instance_cache=True).mkdir(_BUCKET)
        link = SlowLink(port, _DELAY_S)
        with _at(link.port):
            store = _Watched(_STORAGES["s3"])
            store.exists()  # it connects
        found = _drive(params["cells"], store, workers=6)
        return {**found, "requests_per_cell": link.close() / params["cells"]}


_STORAGES = {"folder": ".fls", "s3": f"s3://{_BUCKET}/store"}


class _Watched(Store):
    """A store that records the times of the driver's heartbeats."""

    def __init__(self, url: str):
        super().__init__(url)
        self.beats_s: list[float] = []

    def beat(self, run_id: str) -> None:
        """See `Store.beat`."""
        super().beat(run_id)
        self.beats_s.append(time.monotonic())

    def write_run(self, run_id: str, document: RunDocument) -> None:
        """See `Store.write_run`."""
        super().write_run(run_id, document)
        if isinstance(document, RunProgress):
            self.beats_s.append(time.monotonic())

    def longest_silence_s(self) -> float:
        """Return the longest time between two heartbeats, in seconds."""
        return max(
            later - sooner for sooner, later in zip(self.beats_s, self.beats_s[1:], strict=False)
        )


def _drive(count: int, store: _Watched, workers: int) -> dict[str, Any]:
    """Run the pipeline in this folder, and return its cost in this process.

    Raises:
        RuntimeError: the run failed.
    """
    spec = load_spec(Path("pipeline.yaml"))
    plan = make_plan(spec, Store(spec.storage))  # by the short way
    options = RunOptions(
        file="pipeline.yaml", executor=ExecutorName.LOCAL, tracking=TrackerName.JSONL
    )
    record = RunRecord(run_id=new_run_id(), options=options, spec_text=spec.text)
    executor = Cluster(workers, _FLIGHTS, dict(os.environ))
    output = io.StringIO()
    meter = CostMeter()
    try:
        record.save_request(store)
        plan.commit(store, record.run_id)
        tracking = TrackingThread(options.tracking, store, record.tracking)
        tracking.open(_facts(record), lambda tracker: None)
        view = LiveView(RedactingConsole(file=output))
        cpu_s, began_s = time.process_time(), time.monotonic()
        state = Driver(plan, store, record, executor, tracking, view).run()
        cpu_s, seconds = time.process_time() - cpu_s, time.monotonic() - began_s
    finally:
        executor.stop()
    if state is not RunState.DONE or not record.tracked:
        raise RuntimeError(
            f"the run is {state}, tracked: {record.tracked}: {output.getvalue()[-1000:]}"
        )
    stored = Store(spec.storage).storage.files("stages")
    return {
        "seconds": seconds,
        "driver_cpu_ms_per_cell": 1e3 * cpu_s / count,
        "driver_peak_bytes": meter.read()["peak_bytes"],
        "longest_silence_s": store.longest_silence_s(),
        "files_per_cell": len(stored) / count,
    }


def _facts(record: RunRecord) -> RunFacts:
    return RunFacts(
        run_id=record.run_id,
        name="noop",
        experiment="noop",
        uri="",
        spec_file="pipeline.yaml",
        spec_text=record.spec_text,
    )


def _lead_to(port: int) -> None:
    """Send the S3 connections of this process, and of its later children, to a port."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    os.environ.update(
        AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}",
        AWS_ACCESS_KEY_ID="testing",
        AWS_SECRET_ACCESS_KEY="testing",  # noqa: S106 - of a server that takes any
        AWS_DEFAULT_REGION="us-east-1",
    )


@contextmanager
def _at(port: int) -> Iterator[None]:
    """Send S3 connections to another port for the time of a `with` block."""
    before = int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2])
    _lead_to(port)
    try:
        yield
    finally:
        _lead_to(before)


_COLUMNS = {
    "storage": "storage",
    "cells": "cells",
    "driver_cpu_ms_per_cell": "driver CPU, ms a cell",
    "driver_peak_bytes": "driver's memory, MB",
    "longest_silence_s": "longest time between heartbeats, s",
    "requests_per_cell": "driver's requests a cell",
    "files_per_cell": "files a cell",
}


def report(documents: Mapping[str, Mapping[str, Any]], figures: Path) -> str:
    """Return the table."""
    rows = sorted(
        ({**one["params"], **one["result"]} for one in documents.values()),
        key=lambda row: (row["storage"], row["cells"]),
    )
    lines = [f"| {' | '.join(_COLUMNS.values())} |", f"|---|{'---:|' * (len(_COLUMNS) - 1)}"]
    for row in rows:
        shown = [row["storage"], f"{row['cells']:,}"]
        shown += [f"{row['driver_cpu_ms_per_cell']:.1f}", f"{row['driver_peak_bytes'] / 1e6:.0f}"]
        shown += [f"{row['longest_silence_s']:.1f}"]
        shown += [f"{row['requests_per_cell']:.1f}" if "requests_per_cell" in row else ""]
        shown += [f"{row['files_per_cell']:.1f}"]
        lines.append(f"| {' | '.join(shown)} |")
    return (
        "Empty cells on real workers, "
        f"{_FLIGHTS} at a time. A heartbeat is due every {HEARTBEAT_S:g} s. S3 is moto's on this "
        f"machine, {1e3 * _DELAY_S:g} ms away from the driver.\n\n" + "\n".join(lines)
    )
