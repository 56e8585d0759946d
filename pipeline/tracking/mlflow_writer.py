"""Writes into one MLflow run, under any names.

An entry that MLflow does not take is made to fit (see `pipeline.tracking.mlflow_names`), reported
once, and kept in a tag. If a server still refuses an entry, the rest of its batch is sent without.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pipeline.tracking.mlflow_settings  # noqa: F401 - before MLflow, which reads them

# isort: split
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from pipeline.store.storage.base import list_files
from pipeline.tracking.mlflow_names import TAG_CHARACTERS, Fitting, fit_path, fit_text
from pipeline.tracking.series import Point

_MOST: Mapping[type, int] = {Metric: 1000, Param: 100, RunTag: 100}  # of a batch in MLflow
_MOST_OF_ALL = 1000
_MOST_CHARACTERS = 150_000  # in one call: escaped, at most MLflow's limit of one megabyte
_REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST"}
_NOTHING: Mapping[str, Any] = {}

Entry = Metric | Param | RunTag


class RunWriter:
    """Writes into one MLflow run.

    Args:
        client: of its server.
        run_id: MLflow's id of it.
        say: takes messages for the user.
        fitting: makes entries fit; it knows the run's names.
        params: names of the run's parameters, which cannot be set again.
        metrics: the run's metrics, as far as they matter.
        status: the run's status.

    Attributes:
        run_id: see above.
        metrics: see above; name -> last value.
        status: see above.
    """

    def __init__(
        self,
        client: MlflowClient,
        run_id: str,
        say: Callable[[str], None],
        *,
        fitting: Fitting,
        params: Iterable[str] = (),
        metrics: Mapping[str, float] = _NOTHING,
        status: str = "RUNNING",
    ):
        self._client = client
        self._say = say
        self._fitting = fitting
        self._params = set(params)
        self.run_id = run_id
        self.metrics = metrics
        self.status = status

    def fit(self, points: Iterable[Point]) -> list[Point]:
        """Return points under this run's names."""
        return self._fitting.points(points)

    def send(
        self,
        points: Sequence[Point] = (),
        params: Mapping[str, Any] = _NOTHING,
        tags: Mapping[str, str] = _NOTHING,
    ) -> None:
        """Send all in as few calls as possible; existing parameters cannot be set again."""
        metrics = [Metric(p.name, p.value, int(p.time_s * 1000), p.step) for p in self.fit(points)]
        new = self._fitting.params(params, self._params)
        about = {**self._fitting.tags(tags), **self._originals()}
        entries: list[Entry] = [Param(name, value) for name, value in new.items()]
        entries += [RunTag(name, value) for name, value in about.items()]
        for batch in _batches([*entries, *metrics]):
            self._log(batch)
        self._params.update(new)

    def upload(self, folder: Path, output: str) -> None:
        """Upload the files of an output; names that servers cannot keep are changed."""
        names = {path: path.relative_to(folder).as_posix() for path in list_files(folder)}
        fit = {path: fit_path(name) for path, name in names.items()}
        target = fit_path(output)
        if list(fit.values()) == list(names.values()):
            self._client.log_artifacts(self.run_id, str(folder), artifact_path=target)
        else:
            with tempfile.TemporaryDirectory() as renamed:
                for path, name in fit.items():
                    copy = Path(renamed) / name
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, copy)
                self._client.log_artifacts(self.run_id, renamed, artifact_path=target)
        for path, name in fit.items():
            self._fitting.keep_path(f"{output}/{names[path]}", f"{target}/{name}")
        self.send()

    def write_text(self, name: str, text: str) -> None:
        """Upload a text as the file `name`."""
        fit = fit_path(name)
        self._client.log_text(self.run_id, text, fit)
        self._fitting.keep_path(name, fit)
        self.send()

    def terminate(self, status: str) -> None:
        """Set the run's terminal status."""
        self._client.set_terminated(self.run_id, status)
        self.status = status

    def reopen(self) -> None:
        """Set the run's status to running."""
        if self.status != "RUNNING":
            self._client.update_run(self.run_id, status="RUNNING")
            self.status = "RUNNING"

    def _originals(self) -> dict[str, str]:
        """Report changed entries; return the tags that keep the originals."""
        tags = {}
        for change in self._fitting.take_changes():
            text = change.original
            if fit_text(text) != text:
                text = json.dumps(text)
            if len(text) > TAG_CHARACTERS:
                path = f"whole/{hashlib.sha256(change.tag.encode()).hexdigest()[:12]}.txt"
                self._client.log_text(self.run_id, text, path)
                text = f"see the artifact {path}"
            tags[change.tag] = text
            self._say(change.message)
        return tags

    def _log(self, entries: Sequence[Entry]) -> None:
        """Send entries in one call or, if the server refuses one of them, the others in several.

        Raises:
            MlflowException: the server refuses them for another reason.
        """
        metrics = [entry for entry in entries if isinstance(entry, Metric)]
        params = [entry for entry in entries if isinstance(entry, Param)]
        tags = [entry for entry in entries if isinstance(entry, RunTag)]
        try:
            self._client.log_batch(self.run_id, metrics, params, tags)
        except MlflowException as error:
            if error.error_code not in _REFUSALS:
                raise
            if len(entries) == 1:
                self._note_refusal(entries[0], error)
                return
            middle = len(entries) // 2
            self._log(entries[:middle])
            self._log(entries[middle:])

    def _note_refusal(self, entry: Entry, error: MlflowException) -> None:
        kind = {Metric: "metric", Param: "parameter", RunTag: "tag"}[type(entry)]
        digest = hashlib.sha256(f"{kind} {entry.key}".encode()).hexdigest()[:12]
        tag = f"fls.refused.{digest}"
        self._say(
            f"MLflow refuses the {kind} {entry.key!r} ({error.message[:300]}); the rest is "
            f"recorded, and the run's tag {tag} keeps it."
        )
        text = f"{kind} {entry.key}: {entry.value}"[:TAG_CHARACTERS]
        self._client.set_tag(self.run_id, tag, text)


def _batches(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    """Yield batches of entries within MLflow's limits."""
    batch: list[Entry] = []
    counts: Counter[type] = Counter()
    size = 0
    for entry in entries:
        kind, weight = type(entry), len(entry.key) + len(str(entry.value))
        full = len(batch) == _MOST_OF_ALL or counts[kind] == _MOST[kind]
        if full or (batch and size + weight > _MOST_CHARACTERS):
            yield batch
            batch, counts, size = [], Counter(), 0
        batch.append(entry)
        counts[kind] += 1
        size += weight
    if batch:
        yield batch
