"""Fixtures of the runner's tests, for the `conftest.py` of each folder that uses them."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from s3_server import s3_environment, serve_s3

TOY = Path(__file__).parent / "toy"


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A fresh working directory with its own copy of the plugin `toy`; runs are logged in `ran`."""
    shutil.copytree(TOY, tmp_path / "toy", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("TOY_LOG", str(tmp_path / "ran"))
    _forget_toy()
    yield tmp_path
    _forget_toy()


@pytest.fixture(scope="session")
def fresh_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without runs; making one takes MLflow seconds, so tests get copies."""
    from pipeline.tracking.mlflow_server import connect  # imports MLflow

    path = tmp_path_factory.mktemp("fresh") / "mlflow.db"
    connect(f"sqlite:///{path}")
    return path


@pytest.fixture
def client(fresh_database: Path, toy: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of a fresh database, which the test's runs write to."""
    from mlflow.tracking import MlflowClient  # takes seconds, which only some tests need

    shutil.copy(fresh_database, toy / "mlflow.db")
    # Absolute, because MLflow keeps one connection per URI for the life of a process.
    uri = f"sqlite:///{toy}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return MlflowClient(uri)


def _forget_toy() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "toy"]:
        del sys.modules[name]


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """The URL of an S3 server that runs as long as the tests do."""
    with serve_s3() as endpoint:
        yield endpoint


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """An S3 server that this process and its children find by the environment; its URL."""
    for name, value in s3_environment(s3_endpoint).items():
        monkeypatch.setenv(name, value)
    return s3_endpoint
