"""Tracking in MLflow: a parent run for the pipeline, a child for each cell and evaluated model.

Only this module, `mlflow_server.py` and `mlflow_writer.py` import MLflow. All children are directly
under the parent (one nesting level), which MLflow's own tables and comparison views handle well. A
child's tag `fls.kind` is its kind: `stage`, `cached` or `evaluation`. Metrics go through
`log_batch` alone: a thousand in one call take less time than a hundred calls of one.

Any call may be repeated without effect: runs are found again by their tags, existing parameters are
left out, and MLflow keeps one metric of equal step, time and value. A run with a metric that is no
longer true is deleted, because MLflow cannot delete a metric.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pipeline.tracking.mlflow_settings  # noqa: F401 - before MLflow, which reads them

# isort: split
from mlflow.exceptions import InvalidUrlException, MlflowException, RestException
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import ArgumentError, OperationalError  # of a wrong address, of an outage

from pipeline.base.errors import PipelineError
from pipeline.base.secrets import redact
from pipeline.base.states import CellState, RunState
from pipeline.store.events import Event
from pipeline.tracking.base import AbstractTracker, CellEnd, CellFacts, RunFacts
from pipeline.tracking.mlflow_names import (
    RUN_NAME_CHARACTERS,
    TAG_CHARACTERS,
    Fitting,
    fit_label,
    fit_text,
)
from pipeline.tracking.mlflow_server import connect, database_of, open_experiment, unusable
from pipeline.tracking.mlflow_tags import asked_tags, making_tags
from pipeline.tracking.mlflow_writer import RunWriter
from pipeline.tracking.model import pack
from pipeline.tracking.outage import PASSING_STATUS, may_pass
from pipeline.tracking.series import Point, Series

_PAGE = 25  # runs of a search that are held at once
_STATUS = {"done": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}  # by state
_PARENT = "mlflow.parentRunId"
_NOTE = "mlflow.note.content"
_SPEC_SENT = "fls.spec_sent"
_COSTS = ("seconds", "cpu_seconds", "peak_bytes", "gpu_peak_bytes", "output_bytes")
_SUMS = ("seconds", "cpu_seconds", "output_bytes")  # over cells, on the parent
_PEAKS = ("peak_bytes", "gpu_peak_bytes")
_SPENT = "spent_"  # of all attempts of this run at a cell
_CACHED = "cached_"  # of the making of a result that the store had
_IS_RUNNING = "attributes.status = 'RUNNING'"


class MLflowTracker(AbstractTracker):
    """Writes one pipeline run to an MLflow server or database."""

    def __init__(self) -> None:
        super().__init__()
        self._client: Any = None
        self._experiment = ""
        self._run: RunFacts
        self._parent: RunWriter
        self._writers: dict[str, RunWriter] = {}  # by MLflow's id
        self._said: set[str] = set()

    def open_run(self, run: RunFacts) -> None:
        """Make missing parts of database, experiment and parent run.

        Raises:
            PipelineError: the server or database cannot be used.
            ConnectionError: the server or database does not answer.
        """
        self._run = run
        try:
            self._client = connect(run.uri)
            self._experiment = open_experiment(self._client, run)
            found = self._find_parent(run) if run.resumed else None
        except MlflowException as error:
            if self.is_outage(error):
                raise ConnectionError(unusable(run.uri, error)) from error
            raise PipelineError(unusable(run.uri, error)) from error
        except (ImportError, ArgumentError) as error:
            raise PipelineError(unusable(run.uri, error)) from error
        self.ids = {"cells": {}, "records": {}, "series": self.ids.get("series", {})}
        self._writers = {}
        if found is None:
            about = {**making_tags(run.driver), **asked_tags(run)}
            tags = {**about, "fls.kind": "pipeline", "fls.run": run.run_id}
            self._parent = self._create(f"{run.name} {run.run_id}", tags)
        else:
            self._parent = self._found(found)
            self._parent.reopen()
            self._find_children()
        self._send_spec("" if found is None else found.data.tags.get(_SPEC_SENT, ""))
        self.ids["run"] = self._parent.run_id

    def open_cell(self, cell: CellFacts) -> None:
        """Create the cell's run, or set it running again."""
        run_id = self.ids["cells"].get(cell.cell)
        if run_id is None:
            writer = self._create_cell(cell, {"fls.kind": "stage"})
        else:
            writer = self._writers[run_id]
            writer.reopen()
        writer.send(params=cell.params, tags=cell.tags)

    def log(self, cell: str, events: list[Event]) -> None:
        """Send metrics in batches, and make a run of each record."""
        series = self._series(cell)
        hosts = [event.get("host") for event in events if event["type"] == "start"]
        tags = {"fls.host": hosts[-1]} if hosts and hosts[-1] else {}
        self._cell(cell).send(series.take(events), tags=tags)
        for event in events:
            if event["type"] == "record":
                self._record(cell, event)
        self.ids["series"][cell] = asdict(series)

    def close_cell(self, cell: str, end: CellEnd) -> None:
        """Upload the outputs, send final values and facts, and set the terminal status."""
        writer = self._cell(cell)
        for name, folder in end.outputs.items():
            writer.upload(folder, name)
        if end.state is CellState.DONE:
            points, about = self._series(cell).final_points(), making_tags(end.making)
            if end.output_bytes is not None and points:
                points.append(Point("output_bytes", end.output_bytes, points[-1].time_s, 0))
            cost = [point for point in points if point.name in _COSTS]
            for run_id in self.ids["records"].get(cell, {}).values():
                record = self._writers[run_id]
                record.send([p for p in cost if p.name not in record.metrics], tags=about)
            writer.send(points, tags=about)
        writer.send(self._series(cell).spent_points(_SPENT))
        writer.terminate(_STATUS[end.state])
        if end.state is CellState.DONE:
            self.ids["series"].pop(cell, None)

    def forget_cell(self, cell: str, *, records: bool = False) -> None:
        """Delete the cell's run: its metrics belong to a lost result."""
        gone = [self.ids["cells"].pop(cell, None)]
        if records:
            gone += self.ids["records"].pop(cell, {}).values()
        self.ids["series"].pop(cell, None)
        for run_id in gone:
            if run_id is not None:
                self._client.delete_run(run_id)

    def link_cached(self, cell: CellFacts, source: str | None, made: CellEnd) -> None:
        """Create a light run: parameters, what it had cost, and tags that lead to who made it."""
        tags = {"fls.kind": "cached", **making_tags(made.making)}
        tags |= {"fls.source_run": source} if source else {}
        tags |= {"fls.made_by": made.making["run"]} if "run" in made.making else {}
        sums = {**made.making, "output_bytes": made.output_bytes}
        points = [
            Point(_CACHED + name, sums[name], made.time_s, 0)
            for name in _SUMS
            if sums.get(name) is not None
        ]
        run_id = self.ids["cells"].get(cell.cell)
        if run_id is None:
            writer = self._create_cell(cell, tags)
            tags = {}
        elif (writer := self._writers[run_id]).status == "FINISHED":
            writer.send(tags=cell.tags)  # its code may have been accepted meanwhile
            return
        # An earlier life began the existing run; another run made the result.
        writer.send(points, params=cell.params, tags={**tags, **cell.tags})
        writer.terminate("FINISHED")

    def register(self, cell: CellFacts, folder: Path) -> None:
        """Make a version of the registered model, unless it has one of this key.

        Raises:
            MlflowException: the server refuses.
        """
        if (registration := cell.registration) is None:
            return
        name, run_id = registration.name, self.ids["cells"][cell.cell]
        tags = {"fls.key": cell.key, "fls.cell": cell.cell, "fls.run": self._run.run_id}
        for version in self._client.search_model_versions(f"name = '{name}'"):
            if version.tags.get("fls.key") == cell.key:
                return
        with tempfile.TemporaryDirectory() as packed:
            pack(registration.loader, cell.calls, folder, Path(packed) / "model")
            self._client.log_artifacts(run_id, f"{packed}/model", artifact_path="model")
        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        source = f"{self._client.get_run(run_id).info.artifact_uri}/model"
        self._client.create_model_version(name, source, run_id=run_id, tags=tags)

    def promote(self, output: str, folder: Path) -> None:
        """Upload to the parent, and show the table on its page."""
        self._parent.upload(folder, output)
        table = folder / "table.md"
        if table.is_file():
            text = fit_text(table.read_text(encoding="utf-8"))
            if len(text) > TAG_CHARACTERS:
                cut = text.rfind("\n", 0, TAG_CHARACTERS - 100)
                text = f"{text[:cut]}\n\nCut; the artifact {output}/table.md is complete.\n"
            self._parent.send(tags={_NOTE: text})

    def close_run(self, state: RunState) -> None:
        """Set the parent's sums and terminal status; no child of it may be left running.

        The cost of its own cells, in all attempts of all its lives, is separate from the cost of
        results that the store had.
        """
        sums = dict.fromkeys((*_SUMS, *(_CACHED + name for name in _SUMS)), 0.0)
        sums |= {"cells": 0.0, "cached_cells": 0.0}
        for run in self._children():
            metrics, kind = run.data.metrics, run.data.tags.get("fls.kind")
            if run.info.status == "RUNNING":
                self._client.set_terminated(run.info.run_id, "KILLED")
            if kind not in {"stage", "cached"}:  # an evaluation has the cost of its cell
                continue
            sums["cells" if kind == "stage" else "cached_cells"] += 1
            for name in _SUMS:
                sums[name] += metrics.get(_SPENT + name, metrics.get(name, 0.0))
                sums[_CACHED + name] += metrics.get(_CACHED + name, 0.0)
            for name in _PEAKS:
                if name in metrics:
                    sums[name] = max(metrics[name], sums.get(name, 0.0))
        known = self._client.get_run(self._parent.run_id).data.metrics
        now = time.time()
        self._parent.send(
            [Point(name, value, now, 0) for name, value in sums.items() if known.get(name) != value]
        )
        self._parent.terminate(_STATUS[state])

    def close_orphan(self, run: RunFacts, state: RunState, cells: Mapping[str, CellState]) -> bool:
        """Set the terminal status of the runs that a dead driver left running."""
        database = database_of(run.uri)
        if database is not None and not database.is_file():
            return False
        client = connect(run.uri)
        experiment = client.get_experiment_by_name(run.experiment)
        if experiment is None:
            return False
        mine = f"tags.`fls.run` = '{run.run_id}'"
        if not client.search_runs([experiment.experiment_id], mine, max_results=1):
            return False
        # All pages first: ending one run would move the others into pages that were read.
        for found in list(_search(client, experiment.experiment_id, f"{mine} and {_IS_RUNNING}")):
            kind, cell = (found.data.tags.get(f"fls.{name}", "") for name in ("kind", "cell"))
            ends = {"pipeline": state, "stage": cells.get(cell, CellState.STOPPED)}
            client.set_terminated(found.info.run_id, _STATUS[ends.get(kind, CellState.STOPPED)])
        return True

    def is_outage(self, error: Exception) -> bool:
        """Return whether the error is no refusal by the server."""
        if isinstance(error, InvalidUrlException):
            return False
        if may_pass(error):
            return True
        if not isinstance(error, MlflowException):
            return isinstance(error, OperationalError)
        if isinstance(error, RestException) or error.__cause__ is not None:
            return error.get_http_status_code() in PASSING_STATUS
        # Neither the server's own answer nor a wrapped error: a gateway's page.
        return error.get_http_status_code() >= 500 or error.get_http_status_code() in PASSING_STATUS

    # -- runs

    def _send_spec(self, sent: str) -> None:
        """Record spec and options on the parent; `sent` is the digest of those that it has."""
        run, name = self._run, Path(self._run.spec_file).name
        asked = {"file": run.spec_file, "set": run.overrides, **run.selection}
        options = json.dumps({**asked, "environment": run.environment}, indent=1)
        digest = hashlib.sha256("\0".join([run.spec_text, run.resolved, options]).encode())
        if digest.hexdigest() == sent:
            return
        texts = {name: run.spec_text, "options.json": options, "resolved.yaml": run.resolved}
        if name in {"options.json", "resolved.yaml"}:  # the user's own file comes first
            texts |= {f"fls-{name}": texts[name], name: run.spec_text}
        for file, text in texts.items():
            if text:
                self._parent.write_text(file, text)
        settings = [option.partition("=") for option in run.overrides]
        params = {target: value for target, _, value in settings}
        self._parent.send(params=params, tags={**asked_tags(run), _SPEC_SENT: digest.hexdigest()})

    def _record(self, cell: str, event: Event) -> None:
        """Make the run of one evaluated object, in place of one that contradicts it."""
        records = self.ids["records"].setdefault(cell, {})
        name = fit_label(event["name"], TAG_CHARACTERS)
        points = [Point(key, value, event["time"], 0) for key, value in event["metrics"].items()]
        run_id = records.get(name)
        if run_id is not None:
            writer = self._writers[run_id]
            if not _agree(writer.metrics, writer.fit(points)):
                self._client.delete_run(run_id)
                run_id = None
            elif writer.status == "FINISHED":
                return
        if run_id is None:
            tags = {"fls.kind": "evaluation", "fls.cell": cell, "fls.record": name}
            writer = self._create(name, self._child(tags))
            records[name] = writer.run_id
        writer.send(points, event["params"])
        writer.metrics = {point.name: point.value for point in writer.fit(points)}
        writer.terminate("FINISHED")

    def _create_cell(self, cell: CellFacts, tags: Mapping[str, str]) -> RunWriter:
        facts = {"fls.cell": cell.cell, "fls.stage": cell.stage, "fls.key": cell.key}
        digests = {f"fls.digest.{name}": digest for name, digest in cell.digests.items()}
        writer = self._create(cell.cell, self._child({**facts, **digests, **cell.tags, **tags}))
        self.ids["cells"][cell.cell] = writer.run_id
        return writer

    def _child(self, tags: Mapping[str, str]) -> dict[str, str]:
        return {_PARENT: self._parent.run_id, "fls.run": self._run.run_id, **tags}

    def _create(self, name: str, tags: Mapping[str, str]) -> RunWriter:
        source = {"mlflow.source.name": self._run.spec_file}
        fitting = Fitting()
        fit = fitting.tags(redact({**source, **self._run.tags, **tags}))
        label = fit_label(name, RUN_NAME_CHARACTERS) or "unnamed"  # MLflow would invent a name
        run = self._client.create_run(self._experiment, run_name=label, tags=fit)
        writer = RunWriter(self._client, run.info.run_id, self._say, fitting=fitting)
        self._writers[writer.run_id] = writer
        writer.send()
        return writer

    def _found(self, run: Any) -> RunWriter:
        """Return the writer of a run that an earlier life created."""
        data = run.data
        writer = self._writers[run.info.run_id] = RunWriter(
            self._client,
            run.info.run_id,
            self._say,
            fitting=Fitting(data.metrics, data.tags),
            params=data.params,
            metrics=data.metrics,
            status=run.info.status,
        )
        return writer

    def _cell(self, cell: str) -> RunWriter:
        return self._writers[self.ids["cells"][cell]]

    def _say(self, text: str) -> None:
        """Add a message for the user, once."""
        if text not in self._said:
            self._said.add(text)
            self.notices.append(text)

    def _series(self, cell: str) -> Series:
        return Series(**copy.deepcopy(self.ids["series"].get(cell, {})))

    def _find_parent(self, run: RunFacts) -> Any:
        """Find the parent of an earlier life, by its tag: an id may have been lost in a kill."""
        mine = f"tags.`fls.run` = '{run.run_id}' and tags.`fls.kind` = 'pipeline'"
        return next(_search(self._client, self._experiment, mine), None)

    def _find_children(self) -> None:
        """Find what an earlier life created, by its tags."""
        for run in self._children():
            tags, run_id = run.data.tags, self._found(run).run_id
            kind, cell, record = (tags.get(f"fls.{name}") for name in ("kind", "cell", "record"))
            if kind == "evaluation" and cell and record:
                self.ids["records"].setdefault(cell, {})[record] = run_id
            elif kind in {"stage", "cached"} and cell:  # a user's own run may be there, too
                self.ids["cells"][cell] = run_id

    def _children(self) -> Iterator[Any]:
        mine = f"tags.`{_PARENT}` = '{self._parent.run_id}'"
        return _search(self._client, self._experiment, mine)


def _search(client: MlflowClient, experiment: str, condition: str) -> Iterator[Any]:
    """Yield the runs that meet a condition, page by page."""
    token = None
    while True:
        page = client.search_runs([experiment], condition, max_results=_PAGE, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _agree(sent: Mapping[str, float], points: Iterable[Point]) -> bool:
    """Tell whether sent metrics (none, before a kill) do not contradict `points`."""
    return all(
        sent[point.name] == point.value or math.isnan(point.value)
        for point in points
        if point.name in sent
    )
