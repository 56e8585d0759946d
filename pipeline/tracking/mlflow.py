"""Tracking in MLflow: a parent run for the pipeline, a child for each cell and evaluated model.

The only file that imports MLflow. All children hang directly under the parent (one nesting level),
because that is what MLflow's own tables and comparison views handle well. A child's tag `fls.kind`
tells what it is: `stage`, `cached` or `evaluation`. Metrics go through `log_batch` alone: a
thousand in one call take less time than a hundred calls of one.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")

from mlflow.entities import Metric, Param  # noqa: E402 - after the environment it reads
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.tracking import MlflowClient  # noqa: E402

from pipeline.errors import PipelineError  # noqa: E402
from pipeline.events import Event  # noqa: E402
from pipeline.tracking.base import AbstractTracker, CellFacts, RunFacts  # noqa: E402

_METRICS_PER_BATCH = 1000
_PARAMS_PER_BATCH = 100
_PARAM_CHARACTERS = 6000
_TAG_CHARACTERS = 8000
_STATUS = {"done": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
_PARENT = "mlflow.parentRunId"
_NOTE = "mlflow.note.content"


class MLflowTracker(AbstractTracker):
    """Writes one pipeline run to an MLflow server or database."""

    def __init__(self) -> None:
        self.ids: dict[str, Any] = {}
        self._client: Any = None
        self._experiment = ""
        self._parent = ""
        self._run: RunFacts

    def open_run(self, run: RunFacts) -> None:
        """Make database, experiment and parent run as far as they are not there.

        Raises:
            PipelineError: the server or database does not answer, or cannot be used.
        """
        self._run = run
        try:
            self._client = _connect(run.uri)
            self._experiment = _open_experiment(self._client, run)
            found = self._find_run(run)
        except MlflowException as error:
            raise PipelineError(f"MLflow at {run.uri}: {error}") from error
        self.ids = {"cells": {}, "records": {}}
        if found is None:
            self._parent = self._create(
                f"{run.name} {run.run_id}", {"fls.kind": "pipeline", "fls.run": run.run_id}
            )
            self._client.log_text(self._parent, run.spec_text, Path(run.spec_file).name)
        else:
            self._parent = found
            self._client.update_run(found, status="RUNNING")
            self._find_children()
        self.ids["run"] = self._parent

    def open_cell(self, cell: CellFacts) -> None:
        """Create the cell's run, or set it running again, perhaps under another key."""
        known = self.ids["cells"].get(cell.cell)
        if known is None:
            self.ids["cells"][cell.cell] = self._create_cell(cell, "stage", {})
        else:
            self._client.update_run(known, status="RUNNING")
            for name, value in {"fls.key": cell.key, **cell.tags}.items():
                self._client.set_tag(known, name, value)

    def log(self, cell: str, events: list[Event]) -> None:
        """Send metrics in batches, and make a run of each record."""
        metrics: list[Metric] = []
        for event in events:
            if event["type"] == "metrics":
                metrics += _metrics(event["values"], event["time"], event["step"])
            elif event["type"] == "record":
                self._record(cell, event)
        self._log_metrics(self.ids["cells"][cell], metrics)

    def close_cell(self, cell: str, state: str, outputs: Mapping[str, Path]) -> None:
        """Upload the outputs and set the terminal status; nothing for a cell never opened."""
        run_id = self.ids["cells"].get(cell)
        if run_id is None:
            return
        for name, folder in outputs.items():
            self._client.log_artifacts(run_id, str(folder), artifact_path=name)
        self._client.set_terminated(run_id, _STATUS[state])

    def link_cached(self, cell: CellFacts, source: str | None) -> None:
        """Create a light run: parameters, and a tag that leads to the run with the rest."""
        if cell.cell in self.ids["cells"]:
            return
        run_id = self._create_cell(cell, "cached", {"fls.source_run": source} if source else {})
        self._client.set_terminated(run_id, "FINISHED")
        self.ids["cells"][cell.cell] = run_id

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
        """Set the parent's terminal status."""
        self._client.set_terminated(self._parent, _STATUS[state])

    def _record(self, cell: str, event: Event) -> None:
        """Make, or complete, the run of one evaluated object."""
        records = self.ids["records"].setdefault(cell, {})
        run_id = records.get(event["name"])
        if run_id is None:
            tags = {"fls.kind": "evaluation", "fls.cell": cell, "fls.record": event["name"]}
            run_id = records[event["name"]] = self._create(event["name"], self._child(tags))
            self._log_params(run_id, event["params"])
        self._log_metrics(run_id, _metrics(event["metrics"], event["time"], None))
        self._client.set_terminated(run_id, "FINISHED")

    def _create_cell(self, cell: CellFacts, kind: str, tags: Mapping[str, str]) -> str:
        facts = {"fls.kind": kind, "fls.cell": cell.cell, "fls.stage": cell.stage}
        tags = {**facts, "fls.key": cell.key, **cell.tags, **tags}
        run_id = self._create(cell.cell, self._child(tags))
        self._log_params(run_id, cell.params)
        return run_id

    def _child(self, tags: Mapping[str, str]) -> dict[str, str]:
        return {_PARENT: self._parent, "fls.run": self._run.run_id, **tags}

    def _create(self, name: str, tags: Mapping[str, str]) -> str:
        source = {"mlflow.source.name": self._run.spec_file}
        run = self._client.create_run(
            self._experiment, run_name=name, tags={**source, **self._run.tags, **tags}
        )
        run_id: str = run.info.run_id
        return run_id

    def _log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        entries = [
            Param(name, str(value)[:_PARAM_CHARACTERS]) for name, value in _flatten(params, "")
        ]
        for first in range(0, len(entries), _PARAMS_PER_BATCH):
            self._client.log_batch(run_id, params=entries[first : first + _PARAMS_PER_BATCH])

    def _log_metrics(self, run_id: str, metrics: Sequence[Metric]) -> None:
        for first in range(0, len(metrics), _METRICS_PER_BATCH):
            self._client.log_batch(run_id, metrics=metrics[first : first + _METRICS_PER_BATCH])

    def _find_run(self, run: RunFacts) -> str | None:
        """Find the parent of an earlier life, by its tag: an id may have been lost in a kill."""
        if not run.resumed:
            return None
        found = self._client.search_runs(
            [self._experiment],
            f"tags.`fls.run` = '{run.run_id}' and tags.`fls.kind` = 'pipeline'",
            max_results=1,
        )
        return found[0].info.run_id if found else None

    def _find_children(self) -> None:
        """Find what an earlier life created, by its tags."""
        token = None
        while True:
            page = self._client.search_runs(
                [self._experiment], f"tags.`{_PARENT}` = '{self._parent}'", page_token=token
            )
            for run in page:
                tags = run.data.tags
                if tags["fls.kind"] == "evaluation":
                    names = self.ids["records"].setdefault(tags["fls.cell"], {})
                    names[tags["fls.record"]] = run.info.run_id
                else:
                    self.ids["cells"][tags["fls.cell"]] = run.info.run_id
            token = page.token
            if not token:
                return


def _metrics(values: Mapping[str, float], time_s: float, step: int | None) -> list[Metric]:
    return [Metric(name, value, int(time_s * 1000), step or 0) for name, value in values.items()]


def _flatten(params: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of nested parameters."""
    for name, value in params.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _connect(uri: str) -> MlflowClient:
    """Return a client; makes an SQLite database that is not there yet."""
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)  # their INFO is about each migration
    database = _database(uri)
    if database is None:
        return MlflowClient(uri)
    with _only_one(database):
        return MlflowClient(uri)


@contextmanager
def _only_one(database: Path) -> Iterator[None]:
    """Let one process at a time create tables: two at once break a fresh database for good."""
    digest = hashlib.sha256(str(database).encode()).hexdigest()[:16]
    with open(Path(tempfile.gettempdir()) / f"fls-{os.getuid()}-{digest}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _database(uri: str) -> Path | None:
    """Return the file of an SQLite database, None for any other server."""
    prefix = "sqlite:///"
    return Path(uri.removeprefix(prefix)).resolve() if uri.startswith(prefix) else None


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
