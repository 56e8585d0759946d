"""Connects to an MLflow server or database, and makes what is not there yet: tables, experiment."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pipeline.tracking.mlflow_settings  # noqa: F401 - before MLflow, which reads them

# isort: split
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from pipeline.errors import PipelineError
from pipeline.secrets import redact
from pipeline.tracking.base import RunFacts


def connect(uri: str) -> MlflowClient:
    """Return a client; makes an SQLite database that is not there yet.

    Raises:
        PipelineError: it cannot be there, which MLflow would take minutes to say.
    """
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)  # their INFO is about each migration
    database = database_of(uri)
    if database is None:
        return MlflowClient(uri)
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        database.open("ab").close()
    except OSError as error:
        raise PipelineError(unusable(uri, error)) from error
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


def unusable(uri: str, error: Exception) -> str:
    """Return why a server or database cannot be used, without its password."""
    text: str = redact(f"MLflow at {uri}: {error}")
    return text


def database_of(uri: str) -> Path | None:
    """Return the file of an SQLite database, None for any other server."""
    prefix = "sqlite:///"
    return Path(uri.removeprefix(prefix)).resolve() if uri.startswith(prefix) else None


def open_experiment(client: MlflowClient, run: RunFacts) -> str:
    """Return the experiment's id; makes the experiment if need be.

    Raises:
        PipelineError: an experiment of this name was deleted.
        MlflowException: the server says no.
    """
    found = client.get_experiment_by_name(run.experiment)
    if found is None:
        database = database_of(run.uri)
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
