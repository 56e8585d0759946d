"""Where paths lead: `~` is home, and what a pipeline file says starts at the file."""

import os
from pathlib import Path

import pytest
from toy_runs import fls, ran, write_spec

from pipeline.base.places import tracking_uri
from pipeline.base.variables import STORAGE
from pipeline.spec.load import load_spec
from pipeline.store.store import Store

ONE = "start: {uses: start, params: {value: 1}}"
RUN = ("--executor", "local", "--tracking", "jsonl")


@pytest.fixture
def home(toy: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(toy / "home"))
    (toy / "home").mkdir()
    return toy / "home"


def spec_in(folder: str, storage: str = ".fls", stages: str = ONE) -> Path:
    Path(folder).mkdir(exist_ok=True)
    return write_spec(stages, storage=storage).rename(f"{folder}/pipeline.yaml")


def test_a_relative_storage_starts_at_the_pipeline_file(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = spec_in("deep")
    code, output, errors = fls("run", str(file), *RUN)
    assert (code, errors) == (0, "")
    assert Store("deep/.fls").exists() and not Path(".fls").exists()
    assert len(list(Path("deep/tracking").glob("*.jsonl"))) == 1
    assert "deep/tracking/" in output
    assert fls("status", "last", "--file", str(file))[0] == 0
    assert fls("logs", "start", "--file", str(file))[0] == 0
    monkeypatch.chdir("deep")
    code, output, _ = fls("run", *RUN)
    assert output.startswith("Nothing to do: all 1 cells are in the store.")
    assert ran() == {"start": 1}


def test_the_store_and_what_is_tracked_lie_together(toy: Path) -> None:
    assert load_spec(spec_in("deep", "../.fls")).tracking_uri() == "sqlite:///mlflow.db"
    assert load_spec(spec_in("deep", ".fls")).tracking_uri() == "sqlite:///deep/mlflow.db"
    assert load_spec(spec_in("deep", "s3://b/x")).tracking_uri() == "sqlite:///deep/mlflow.db"
    assert load_spec(write_spec(ONE)).tracking_uri() == "sqlite:///mlflow.db"


def test_what_stands_elsewhere_than_in_the_file_starts_here(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = spec_in("deep")
    monkeypatch.setenv(STORAGE.name, "here")
    assert load_spec(file).storage == f"{toy}/here"
    monkeypatch.delenv(STORAGE.name)
    assert fls("run", str(file), *RUN)[0] == 0
    assert fls("status", "--storage", "deep/.fls")[0] == 0


def test_a_run_goes_on_where_it_was_from_another_folder(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = spec_in("deep", stages="bad: {uses: fail, params: {until: 1, counter: counter}}")
    assert fls("run", str(file), *RUN)[0] == 1
    code, output, errors = fls("resume", "last", "--file", str(file))
    assert (code, errors) == (0, "")
    assert {path.name for path in Path("deep").iterdir()} == {"pipeline.yaml", ".fls", "tracking"}


def test_who_has_a_store_at_the_old_place_is_told(toy: Path) -> None:
    write_spec(ONE)
    assert fls("run", *RUN)[0] == 0
    Path("mlflow.db").touch()
    file = spec_in("deep")
    code, _, errors = fls("plan", str(file))
    assert code == 0
    assert f"version put them into {toy}/.fls: give that" in errors
    assert f"{toy}/mlflow.db" in errors
    assert fls("run", str(file), *RUN)[0] == 0
    assert fls("plan", str(file))[2] == ""


def test_a_tilde_is_the_home_folder_everywhere(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "number.txt").write_text("7")
    file = write_spec("read: {uses: read, params: {path: ~/number.txt}}", storage="~/store")
    code, _, errors = fls("run", *RUN)
    assert (code, errors) == (0, "")
    assert Store(f"{home}/store").exists() and not Path("~").exists()
    assert fls("status", "--storage", "~/store")[0] == 0
    assert load_spec(file).storage == f"{home}/store"
    monkeypatch.setenv(STORAGE.name, "~/other")
    assert load_spec(file).storage == f"{home}/other"
    assert tracking_uri("sqlite:///~/x.db") == f"sqlite:///{home}/x.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///~/y.db")
    assert tracking_uri(None) == f"sqlite:///{home}/y.db"


def test_the_experiments_share_the_projects_store() -> None:
    root = Path(__file__).parents[2]
    for file in (root / "experiments").glob("*.yaml"):
        assert "\nstorage: ../.fls\n" in file.read_text()
    for file in (root / "benchmarks").glob("*.yaml"):
        assert ":-../.fls-benchmarks}" in file.read_text()
    assert os.path.isfile(root / "pipeline.yaml")
