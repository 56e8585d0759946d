"""Connects to an MLflow server or database, and makes what is not there yet: tables, experiment."""

from __future__ import annotations

import fcntl
import logging
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pipeline.tracking.mlflow_settings  # noqa: F401 - before MLflow, which reads them

# isort: split
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from pipeline.base.errors import PipelineError
from pipeline.base.secrets import redact
from pipeline.tracking.base import RunFacts

ADVICE = (
    "Expected `tracking_uri:` or MLFLOW_TRACKING_URI to be a server or a database that can be "
    "used, such as sqlite:///mlflow.db in a folder that can be written."
)
_FILES = "mlruns"
_LOCK_S = 60.0  # making the tables takes seconds
_LOOK_S = 0.1


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
        os.close(
            os.open(database, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, _mode_in(database.parent))
        )
    except OSError as error:
        raise PipelineError(f"{unusable(uri, error)}. {ADVICE}") from error
    if database.stat().st_size == 0:
        with _only_one(database, uri):
            if database.stat().st_size == 0:
                _make_tables(database)
    return MlflowClient(uri)


def _make_tables(database: Path) -> None:
    """Make them under another name: a kill in the middle would break the database for good."""
    with tempfile.TemporaryDirectory(prefix=".fls-mlflow-", dir=database.parent) as folder:
        part = Path(folder) / database.name
        MlflowClient(f"sqlite:///{part}")
        part.chmod(stat.S_IMODE(database.stat().st_mode))
        part.replace(database)


@contextmanager
def _only_one(database: Path, uri: str) -> Iterator[None]:
    """Let one process at a time create tables: two at once break a fresh database for good.

    The lock lies beside the database, and only who may write to that may open it.

    Raises:
        PipelineError: it cannot be opened, or another process holds it for too long.
    """
    path = database.with_name(f".{database.name}.lock")
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        lock = os.open(path, flags, _mode_in(database.parent))
    except OSError as error:
        raise PipelineError(unusable(uri, error)) from error
    try:
        end_s = time.monotonic() + _LOCK_S
        while not _take(lock):
            if time.monotonic() > end_s:
                raise PipelineError(
                    f"{path} has been locked by another process for {_LOCK_S:.0f} s, which makes "
                    "the tables of the MLflow database beside it. Find it (lsof names it) and end "
                    "it; nothing is lost."
                )
            time.sleep(_LOOK_S)
        yield
    finally:
        os.close(lock)


def _mode_in(folder: Path) -> int:
    """Return the mode of files made in a folder: for their user alone, or for its group.

    Specs, uncommitted changes and networks are in them. A folder is shared where its group may
    write, and owns what is made in it (`chmod g+ws`).
    """
    shared = stat.S_IWGRP | stat.S_ISGID
    return 0o660 if folder.stat().st_mode & shared == shared else 0o600


def _take(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


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
    """Return the experiment's id; makes the experiment if need be.

    Raises:
        PipelineError: an experiment of this name was deleted.
        MlflowException: the server says no.
    """
    found = client.get_experiment_by_name(run.experiment)
    if found is None:
        database = database_of(run.uri)
        # A server knows where artifacts go; a bare database would put them into the folder of
        # the writers, so they go beside it.
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
