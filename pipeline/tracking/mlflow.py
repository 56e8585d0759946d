"""Tracking in MLflow: a parent run for the pipeline, a child for each cell and evaluated model.

The only file that imports MLflow. All children hang directly under the parent (one nesting level),
because that is what MLflow's own tables and comparison views handle well. A child's tag `fls.kind`
tells what it is: `stage`, `cached` or `evaluation`. Metrics go through `log_batch` alone: a
thousand in one call take less time than a hundred calls of one.

Nothing is done twice, though any call may be: runs are found again by their tags, parameters that
are there are left out, and a metric with equal step, time and value is one to MLflow. What cannot
be taken back in a run (a metric) goes with the run when it is no longer true.
"""

from __future__ import annotations

import copy
import fcntl
import hashlib
import json
import logging
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
# The tracking thread tries again for as long as it takes; MLflow's own tries would only hide from
# it, for minutes, that the server is away.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")

from mlflow.entities import Metric, Param, RunTag  # noqa: E402 - after the environment it reads
from mlflow.exceptions import InvalidUrlException, MlflowException  # noqa: E402
from mlflow.tracking import MlflowClient  # noqa: E402
from sqlalchemy.exc import ArgumentError  # noqa: E402 - what its address of a database cannot be

from pipeline.errors import PipelineError  # noqa: E402
from pipeline.events import Event  # noqa: E402
from pipeline.secrets import redact  # noqa: E402
from pipeline.tracking.base import (  # noqa: E402
    AbstractTracker,
    CellEnd,
    CellFacts,
    CellState,
    RunFacts,
)
from pipeline.tracking.model import pack  # noqa: E402
from pipeline.tracking.series import Point, Series  # noqa: E402

_METRICS_PER_BATCH = 900  # with the other two, no more than MLflow's thousand
_PER_BATCH = 50
_PAGE = 100  # runs of a search that are held at once
_PARAM_CHARACTERS = 6000
_TAG_CHARACTERS = 8000
_STATUS = {"done": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
_PARENT = "mlflow.parentRunId"
_NOTE = "mlflow.note.content"
_SPEC_SENT = "fls.spec_sent"
_FACTS = ("device", "threads", "workers", "platform", "python", "packages")
_NOTHING: Mapping[str, Any] = {}
_COSTS = ("seconds", "cpu_seconds", "peak_bytes", "gpu_peak_bytes", "output_bytes")
_SUMS = ("seconds", "output_bytes")  # of a run's own cells, which the parent has as well
_IS_RUNNING = "attributes.status = 'RUNNING'"


@dataclass
class _Sent:
    """What is known to be in an MLflow run."""

    status: str = "RUNNING"
    params: set[str] = field(default_factory=set)
    metrics: Mapping[str, float] = field(default_factory=dict)


class MLflowTracker(AbstractTracker):
    """Writes one pipeline run to an MLflow server or database."""

    def __init__(self) -> None:
        self.ids: dict[str, Any] = {}
        self._client: Any = None
        self._experiment = ""
        self._parent = ""
        self._run: RunFacts
        self._sent: dict[str, _Sent] = {}  # by run id

    def open_run(self, run: RunFacts) -> None:
        """Make database, experiment and parent run as far as they are not there.

        Raises:
            PipelineError: the server or database cannot be used.
            ConnectionError: it does not answer.
        """
        self._run = run
        try:
            self._client = _connect(run.uri)
            self._experiment = _open_experiment(self._client, run)
            found = self._find_parent(run) if run.resumed else None
        except MlflowException as error:
            if self.is_outage(error):
                raise ConnectionError(_unusable(run.uri, error)) from error
            raise PipelineError(_unusable(run.uri, error)) from error
        except (ImportError, ArgumentError) as error:
            raise PipelineError(_unusable(run.uri, error)) from error
        self.ids = {"cells": {}, "records": {}, "series": self.ids.get("series", {})}
        self._sent = {}
        if found is None:
            about = _fact_tags(run.driver)
            tags = {**about, "fls.kind": "pipeline", "fls.run": run.run_id}
            self._parent = self._create(f"{run.name} {run.run_id}", tags)
        else:
            self._parent = found.info.run_id
            if found.info.status != "RUNNING":
                self._client.update_run(self._parent, status="RUNNING")
            self._find_children()
        if found is None or _SPEC_SENT not in found.data.tags:
            self._client.log_text(self._parent, run.spec_text, Path(run.spec_file).name)
            self._client.set_tag(self._parent, _SPEC_SENT, "true")
        self.ids["run"] = self._parent

    def open_cell(self, cell: CellFacts) -> None:
        """Create the cell's run, or set it running again."""
        run_id = self.ids["cells"].get(cell.cell)
        if run_id is None:
            run_id = self._create_cell(cell, {"fls.kind": "stage"})
        elif self._sent[run_id].status != "RUNNING":
            self._client.update_run(run_id, status="RUNNING")
            self._sent[run_id].status = "RUNNING"
        self._send(run_id, params=cell.params, tags=cell.tags)

    def log(self, cell: str, events: list[Event]) -> None:
        """Send metrics in batches, and make a run of each record."""
        series = self._series(cell)
        hosts = [event["host"] for event in events if event["type"] == "start"]
        tags = {"fls.host": hosts[-1]} if hosts else {}
        self._send(self.ids["cells"][cell], series.take(events), tags=tags)
        for event in events:
            if event["type"] == "record":
                self._record(cell, event)
        self.ids["series"][cell] = asdict(series)

    def close_cell(self, cell: str, end: CellEnd) -> None:
        """Upload the outputs, send final values and facts, and set the terminal status."""
        run_id = self.ids["cells"][cell]
        for name, folder in end.outputs.items():
            self._client.log_artifacts(run_id, str(folder), artifact_path=name)
        if end.state is CellState.DONE:
            points, about = self._series(cell).final_points(), _fact_tags(end.facts)
            if end.output_bytes is not None and points:
                points.append(Point("output_bytes", end.output_bytes, points[-1].time_s, 0))
            cost = [point for point in points if point.name in _COSTS]
            for record in self.ids["records"].get(cell, {}).values():
                mine = self._sent[record].metrics
                self._send(record, [p for p in cost if p.name not in mine], tags=about)
            self._send(run_id, points, tags=about)
        self._terminate(run_id, _STATUS[end.state])
        if end.state is CellState.DONE:
            self.ids["series"].pop(cell, None)

    def forget_cell(self, cell: str) -> None:
        """Delete the cell's run: its metrics are of a result that is no more."""
        run_id = self.ids["cells"].pop(cell, None)
        self.ids["series"].pop(cell, None)
        if run_id is not None:
            self._client.delete_run(run_id)

    def link_cached(self, cell: CellFacts, source: str | None) -> None:
        """Create a light run: parameters, and a tag that leads to the run with the rest."""
        tags = {"fls.kind": "cached", **({"fls.source_run": source} if source else {})}
        run_id = self.ids["cells"].get(cell.cell)
        if run_id is None:
            run_id = self._create_cell(cell, tags)
            tags = {}
        elif self._sent[run_id].status == "FINISHED":
            self._send(run_id, tags=cell.tags)  # its code may have been accepted since
            return
        # A run that is there already was begun in an earlier life; another made the result.
        self._send(run_id, params=cell.params, tags={**tags, **cell.tags})
        self._terminate(run_id, "FINISHED")

    def register(self, cell: CellFacts, folder: Path) -> None:
        """Make a version of the registered model, unless there is one of this key.

        Raises:
            MlflowException: the server says no.
        """
        registration = cell.registration or {}
        name, run_id = registration["name"], self.ids["cells"][cell.cell]
        tags = {"fls.key": cell.key, "fls.cell": cell.cell, "fls.run": self._run.run_id}
        for version in self._client.search_model_versions(f"name = '{name}'"):
            if version.tags.get("fls.key") == cell.key:
                return
        with tempfile.TemporaryDirectory() as packed:
            pack(registration["loader"], folder, Path(packed) / "model")
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
        self._client.log_artifacts(self._parent, str(folder), artifact_path=output)
        table = folder / "table.md"
        if table.is_file():
            text = table.read_text(encoding="utf-8")
            if len(text) > _TAG_CHARACTERS:
                cut = text.rfind("\n", 0, _TAG_CHARACTERS - 100)
                text = f"{text[:cut]}\n\nCut short; the whole is the artifact {output}/table.md.\n"
            self._client.set_tag(self._parent, _NOTE, text)

    def close_run(self, state: str) -> None:
        """Set the parent's sums and terminal status; no child of it may be left running."""
        sums = dict.fromkeys(_SUMS, 0.0)
        children = f"tags.`{_PARENT}` = '{self._parent}'"
        for run in _search(self._client, self._experiment, children):
            if run.info.status == "RUNNING":
                self._terminate(run.info.run_id, "KILLED")
            if run.data.tags["fls.kind"] == "stage":
                for name in _SUMS:
                    sums[name] += run.data.metrics.get(name, 0.0)
        known = self._client.get_run(self._parent).data.metrics
        for name, value in sums.items():
            if known.get(name) != value:
                self._client.log_metric(self._parent, name, value, step=0)
        self._client.set_terminated(self._parent, _STATUS[state])

    def close_orphan(self, run: RunFacts, state: str, cells: Mapping[str, str]) -> bool:
        """Set the terminal status of the runs that a dead driver left running."""
        database = _database(run.uri)
        if database is not None and not database.is_file():
            return False
        client = _connect(run.uri)
        experiment = client.get_experiment_by_name(run.experiment)
        if experiment is None:
            return False
        mine = f"tags.`fls.run` = '{run.run_id}'"
        if not client.search_runs([experiment.experiment_id], mine, max_results=1):
            return False
        # All pages first: ending one run would move the others into pages that were read.
        for found in list(_search(client, experiment.experiment_id, f"{mine} and {_IS_RUNNING}")):
            kind, cell = found.data.tags["fls.kind"], found.data.tags.get("fls.cell", "")
            ends = {"pipeline": state, "stage": cells.get(cell, "stopped")}
            client.set_terminated(found.info.run_id, _STATUS[ends.get(kind, "stopped")])
        return True

    def is_outage(self, error: Exception) -> bool:
        """Say no when the server answers that it does not take what it is told."""
        if isinstance(error, InvalidUrlException | PipelineError | ImportError | ArgumentError):
            return False
        if isinstance(error, MlflowException):
            return error.get_http_status_code() >= 500 or error.get_http_status_code() in {408, 429}
        return True

    # -- runs

    def _record(self, cell: str, event: Event) -> None:
        """Make the run of one evaluated object; one that says otherwise is replaced."""
        records = self.ids["records"].setdefault(cell, {})
        name, values = event["name"], event["metrics"]
        run_id = records.get(name)
        if run_id is not None and not _agree(self._sent[run_id].metrics, values):
            self._client.delete_run(run_id)
            run_id = None
        if run_id is None:
            tags = {"fls.kind": "evaluation", "fls.cell": cell, "fls.record": name}
            run_id = records[name] = self._create(name, self._child(tags))
        elif self._sent[run_id].status == "FINISHED":
            return
        points = [Point(metric, value, event["time"], 0) for metric, value in values.items()]
        self._send(run_id, points, event["params"])
        self._sent[run_id].metrics = values
        self._terminate(run_id, "FINISHED")

    def _create_cell(self, cell: CellFacts, tags: Mapping[str, str]) -> str:
        facts = {"fls.cell": cell.cell, "fls.stage": cell.stage, "fls.key": cell.key}
        digests = {f"fls.digest.{name}": digest for name, digest in cell.digests.items()}
        run_id = self._create(cell.cell, self._child({**facts, **digests, **cell.tags, **tags}))
        self.ids["cells"][cell.cell] = run_id
        return run_id

    def _child(self, tags: Mapping[str, str]) -> dict[str, str]:
        return {_PARENT: self._parent, "fls.run": self._run.run_id, **tags}

    def _create(self, name: str, tags: Mapping[str, str]) -> str:
        source = {"mlflow.source.name": self._run.spec_file}
        run = self._client.create_run(
            self._experiment, run_name=name, tags=redact({**source, **self._run.tags, **tags})
        )
        run_id: str = run.info.run_id
        self._sent[run_id] = _Sent()
        return run_id

    def _terminate(self, run_id: str, status: str) -> None:
        self._client.set_terminated(run_id, status)
        self._sent.setdefault(run_id, _Sent()).status = status

    def _send(
        self,
        run_id: str,
        points: Sequence[Point] = (),
        params: Mapping[str, Any] = _NOTHING,
        tags: Mapping[str, str] = _NOTHING,
    ) -> None:
        """Send all in as few calls as can be; parameters that are there cannot be set again."""
        sent = self._sent[run_id].params
        metrics = [Metric(p.name, p.value, int(p.time_s * 1000), p.step) for p in points]
        new = {name: value for name, value in _flatten(params, "") if name not in sent}
        batches = zip_longest(
            _batched(metrics, _METRICS_PER_BATCH),
            _batched([Param(k, str(v)[:_PARAM_CHARACTERS]) for k, v in new.items()], _PER_BATCH),
            _batched([RunTag(k, v[:_TAG_CHARACTERS]) for k, v in tags.items()], _PER_BATCH),
            fillvalue=(),
        )
        for some_metrics, some_params, some_tags in batches:
            self._client.log_batch(run_id, some_metrics, some_params, some_tags)
        sent.update(new)

    def _series(self, cell: str) -> Series:
        return Series(**copy.deepcopy(self.ids["series"].get(cell, {})))

    def _find_parent(self, run: RunFacts) -> Any:
        """Find the parent of an earlier life, by its tag: an id may have been lost in a kill."""
        mine = f"tags.`fls.run` = '{run.run_id}' and tags.`fls.kind` = 'pipeline'"
        return next(_search(self._client, self._experiment, mine), None)

    def _find_children(self) -> None:
        """Find what an earlier life created, by its tags."""
        for run in _search(self._client, self._experiment, f"tags.`{_PARENT}` = '{self._parent}'"):
            tags, run_id = run.data.tags, run.info.run_id
            self._sent[run_id] = _Sent(run.info.status, set(run.data.params), run.data.metrics)
            if tags["fls.kind"] == "evaluation":
                self.ids["records"].setdefault(tags["fls.cell"], {})[tags["fls.record"]] = run_id
            else:
                self.ids["cells"][tags["fls.cell"]] = run_id


def _search(client: MlflowClient, experiment: str, condition: str) -> Iterator[Any]:
    """Yield the runs that meet a condition, page by page."""
    token = None
    while True:
        page = client.search_runs([experiment], condition, max_results=_PAGE, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _agree(sent: Mapping[str, float], values: Mapping[str, float]) -> bool:
    """Tell whether what was sent (nothing, before a kill) is no contradiction to `values`."""
    return all(
        sent[name] == value or math.isnan(value) for name, value in values.items() if name in sent
    )


def _fact_tags(facts: Mapping[str, Any]) -> dict[str, str]:
    """Return where and with what a result was made, as tags."""
    found = {f"fls.{name}": facts[name] for name in _FACTS if name in facts}
    texts = {
        n: value if isinstance(value, str) else json.dumps(value) for n, value in found.items()
    }
    return {name: text[:_TAG_CHARACTERS] for name, text in texts.items()}


def _flatten(params: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of nested parameters."""
    for name, value in params.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _connect(uri: str) -> MlflowClient:
    """Return a client; makes an SQLite database that is not there yet.

    Raises:
        PipelineError: it cannot be there, which MLflow would take minutes to say.
    """
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)  # their INFO is about each migration
    database = _database(uri)
    if database is None:
        return MlflowClient(uri)
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        database.open("ab").close()
    except OSError as error:
        raise PipelineError(_unusable(uri, error)) from error
    with _only_one(database):
        if database.stat().st_size == 0:
            _make_tables(database)
        return MlflowClient(uri)


def _make_tables(database: Path) -> None:
    """Make them under another name: a kill in the middle would break the database for good."""
    with tempfile.TemporaryDirectory(prefix=".fls-mlflow-", dir=database.parent) as folder:
        part = Path(folder) / database.name
        MlflowClient(f"sqlite:///{part}")
        part.replace(database)


@contextmanager
def _only_one(database: Path) -> Iterator[None]:
    """Let one process at a time create tables: two at once break a fresh database for good."""
    digest = hashlib.sha256(str(database).encode()).hexdigest()[:16]
    with open(Path(tempfile.gettempdir()) / f"fls-{os.getuid()}-{digest}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _unusable(uri: str, error: Exception) -> str:
    text: str = redact(f"MLflow at {uri}: {error}")
    return text


def _database(uri: str) -> Path | None:
    """Return the file of an SQLite database, None for any other server."""
    prefix = "sqlite:///"
    return Path(uri.removeprefix(prefix)).resolve() if uri.startswith(prefix) else None


def _batched(entries: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [entries[first : first + size] for first in range(0, len(entries), size)]


def _open_experiment(client: MlflowClient, run: RunFacts) -> str:
    """Return the experiment's id; makes the experiment if need be.

    Raises:
        PipelineError: an experiment of this name was deleted.
        MlflowException: the server says no.
    """
    found = client.get_experiment_by_name(run.experiment)
    if found is None:
        database = _database(run.uri)
        # A server knows where artifacts go; a bare database would put them into the folder of
        # whoever happens to write, so they go beside it.
        location = None if database is None else (database.parent / "mlruns").as_uri()
        try:
            return client.create_experiment(run.experiment, artifact_location=location)
        except MlflowException:
            found = client.get_experiment_by_name(run.experiment)  # another driver was faster
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise PipelineError(
            f"The MLflow experiment {run.experiment!r} was deleted; restore it with "
            f"`mlflow experiments restore -x {found.experiment_id}`, or name another one under "
            "`mlflow: {experiment: ...}`."
        )
    experiment_id: str = found.experiment_id
    return experiment_id
