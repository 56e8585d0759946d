"""Fixtures of the runner's tests."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

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
    from pipeline.tracking.mlflow import _connect  # imports MLflow

    path = tmp_path_factory.mktemp("fresh") / "mlflow.db"
    _connect(f"sqlite:///{path}")
    return path


def _forget_toy() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "toy"]:
        del sys.modules[name]
