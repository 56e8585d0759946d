"""The connection to an MLflow server or database; makes missing tables and experiments."""

from __future__ import annotations

import logging
import os
import stat
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path

import pipeline.tracking.mlflow_settings  # noqa: F401 - before MLflow, which reads them

# isort: split
from filelock import FileLock, Timeout
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from pipeline.base.errors import PipelineError
from pipeline.base.secrets import redact
from pipeline.tracking.base import RunFacts

ADVICE = (
    "Expected `tracking_uri:` or MLFLOW_TRACKING_URI to be a usable server or database, such as "
    "sqlite:///mlflow.db in a writable folder."
)
_FILES = "mlruns"
_LOCK_S = 60.0  # making the tables takes seconds


def connect(uri: str) -> MlflowClient:
    """Return a client; makes a missing SQLite database.

    Raises:
        PipelineError: the database cannot be made; MLflow would retry for minutes.
    """
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)  # INFO reports each migration
    database = database_of(uri)
    if database is None:
        return MlflowClient(uri)
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        os.close(
            os.open(database, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, _mode_in(database.parent))
        )
    except OSError as error:
        raise PipelineError(f"{unusable(uri, error)}. {ADVICE}") from error
    if database.stat().st_size == 0:
        with _lock(database, uri):
            if database.stat().st_size == 0:
                _make_tables(database)
    return MlflowClient(uri)


def _make_tables(database: Path) -> None:
    """Make tables under another name: a kill in the middle would break the database for good."""
    with tempfile.TemporaryDirectory(prefix=".fls-mlflow-", dir=database.parent) as folder:
        part = Path(folder) / database.name
        MlflowClient(f"sqlite:///{part}")
        part.chmod(stat.S_IMODE(database.stat().st_mode))
        part.replace(database)


def _lock(database: Path, uri: str) -> AbstractContextManager[object]:
    """Take the lock beside a database, which guards the making of its tables.

    Two processes that make them at once break a fresh database for good. Only the users who may
    write to the database may open the lock; the death of its holder releases it.

    Raises:
        PipelineError: the lock cannot be opened, or another process holds it for too long.
    """
    path = database.with_name(f".{database.name}.lock")
    mode = _mode_in(database.parent)
    try:
        return FileLock(path, _LOCK_S, mode=mode, fallback_to_soft=False).acquire()
    except Timeout:
        raise PipelineError(
            f"{path} has been locked by another process for {_LOCK_S:.0f} s, which makes the "
            "tables of the MLflow database beside it. Find the process (lsof names it) and end it; "
            "nothing is lost."
        ) from None
    except OSError as error:
        raise PipelineError(unusable(uri, error)) from error


def _mode_in(folder: Path) -> int:
    """Return the mode of new files in a folder: for their user alone, or for its group.

    The files hold specs, uncommitted changes and networks. A folder is shared if its group may
    write to it and owns its new files (`chmod g+ws`).
    """
    shared = stat.S_IWGRP | stat.S_ISGID
    return 0o660 if folder.stat().st_mode & shared == shared else 0o600


def unusable(uri: str, error: Exception) -> str:
    """Return why a server or database cannot be used, without its password."""
    text: str = redact(f"MLflow at {uri}: {error}")
    return text


def database_of(uri: str) -> Path | None:
    """Return the file of an SQLite database, None for any other server."""
    prefix = "sqlite:///"
    return Path(uri.removeprefix(prefix)).resolve() if uri.startswith(prefix) else None


def artifacts_beside(database: Path) -> str:
    """Return the URI of the folder for the files of an SQLite database's runs."""
    return (database.parent / _FILES).as_uri()


def open_experiment(client: MlflowClient, run: RunFacts) -> str:
    """Return the experiment's id; makes a missing experiment.

    Raises:
        PipelineError: an experiment of this name was deleted.
        MlflowException: the server says no.
    """
    found = client.get_experiment_by_name(run.experiment)
    if found is None:
        database = database_of(run.uri)
        # A server has a place for artifacts. A bare database would put them into the working
        # directory of each writer, so they go beside the database.
        location = None
        if database is not None:
            location = artifacts_beside(database)
            mode = _mode_in(database.parent)
            (database.parent / _FILES).mkdir(
                exist_ok=True, mode=mode | (mode & 0o440) >> 2
            )  # x for r
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
