"""A real MLflow server, whose line is cut, and drivers that are killed."""

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import Proxy, mlflow_server
from toy_runs import fls, kill, last_run, start_fls, wait_for, write_spec

from pipeline.base.states import RunState
from pipeline.running.documents import RunTracking
from pipeline.store.store import Store
from pipeline.tracking.mlflow_names import fit_path

SLOW = "slow: {uses: slow, params: {steps: 60, delay_s: 0.1, checkpoint_every: 10}}"
RUN = ("run", "--executor", "local")


@pytest.fixture(scope="module")
def line(fresh_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """One server for all tests here (it takes seconds to start), behind a line that can be cut."""
    folder = tmp_path_factory.mktemp("mlflow")
    shutil.copy(fresh_database, folder / "mlflow.db")
    with mlflow_server(f"sqlite:///{folder}/mlflow.db", folder) as url:
        yield Proxy(url)


@pytest.fixture
def client(line: Proxy, toy: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", line.url)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    return MlflowClient(line.url)


def recorded(client: Any) -> dict[str, Any]:
    """Return name -> MLflow run of what the last run recorded."""
    run_id = last_run().run_id
    experiment = client.get_experiment_by_name("toy").experiment_id
    runs = client.search_runs([experiment], f"tags.`fls.run` = '{run_id}'")
    found = {run.info.run_name: run for run in runs}
    assert len(found) == len(runs), "recorded twice"
    return {name.partition(" ")[0]: run for name, run in found.items()}


def heard_of(cell: str) -> bool:
    """Tell whether the last run knows that some of what a cell said is recorded."""
    store = Store(".fls")
    runs = store.list_runs()
    tracking = store.peek_run(runs[-1], RunTracking) if runs else None
    return bool(tracking and cell in tracking.cursors and tracking.cursors[cell].segment)


def steps(client: Any, run: Any) -> list[int]:
    return [one.step for one in client.get_metric_history(run.info.run_id, "train/number")]


def test_a_line_that_is_cut_for_seconds_loses_and_doubles_nothing(client: Any, line: Proxy) -> None:
    write_spec(SLOW)
    process = start_fls(*RUN)
    try:
        wait_for(lambda: any("log-batch" in request for request in line.requests))
        line.cut()
        time.sleep(3)
        line.restore()
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, errors) == (0, "")
    assert output.count("Tracking is behind") == 1
    assert output.count("Tracking has caught up.") == 1
    assert "sends the rest" not in output
    runs = recorded(client)
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert steps(client, runs["slow"]) == list(range(1, 61))


def test_metrics_and_files_of_any_name_come_through(client: Any, line: Proxy, toy: Path) -> None:
    """A server takes what follows `#` or `?` in a file's name for no part of it, `%20` for ` `."""
    names = ["a#b.txt", "a?b.txt", "a%20b.txt", "a b.txt"]
    write_spec(
        f"""
        tell:
          uses: tell
          params:
            metrics: {{"acc@1": 0.5, loss: 1.5}}
            files: {json.dumps({name: name for name in names})}
        """
    )
    code, output, _ = fls(*RUN)
    assert (code, last_run().tracked) == (0, True), output
    run = recorded(client)["tell"]
    assert (run.info.status, run.data.metrics["loss"]) == ("FINISHED", 1.5)
    assert run.data.tags["fls.name.acc_1-71dfc1"] == "acc@1"
    for name in names:
        path = client.download_artifacts(run.info.run_id, f"told/{fit_path(name)}", str(toy))
        assert Path(path).read_text() == name


def test_a_killed_run_is_ended_by_the_next_start_and_goes_on_as_itself(
    client: Any, line: Proxy
) -> None:
    write_spec(SLOW)
    process = start_fls(*RUN)
    wait_for(lambda: heard_of("slow"))
    kill(process, signal.SIGKILL)
    killed = last_run()
    before = recorded(client)
    assert {run.info.status for run in before.values()} == {"RUNNING"}

    shutil.copy("pipeline.yaml", "other.yaml")
    code, _, errors = fls("run", "other.yaml", *RUN[1:], "--set", "slow.steps=1")
    assert (code, errors) == (0, "")
    after = {run.info.status for run in map(client.get_run, ids(before))}
    assert after == {"KILLED"}

    code, output, _ = fls("sync", killed.run_id)
    assert (code, output) == (0, f"{killed.run_id} is complete: 1 cells sent.\n")
    assert {run.info.status for run in map(client.get_run, ids(before))} == {"KILLED"}

    assert fls("resume", killed.run_id)[0] == 0
    again = {name: client.get_run(run.info.run_id) for name, run in before.items()}
    assert {run.info.status for run in again.values()} == {"FINISHED"}
    # The two attempts said some steps both; each is there once.
    assert steps(client, again["slow"]) == list(range(1, 61))
    seconds = client.get_metric_history(again["slow"].info.run_id, "seconds")
    assert len(seconds) == 1


def test_a_server_that_is_away_for_the_whole_run_gets_it_later(
    client: Any, line: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_spec("{start: {uses: start, params: {value: 1}}}")
    monkeypatch.setattr("pipeline.running.account._AWAY_S", 0.5)
    line.cut()
    try:
        code, output, _ = fls(*RUN)
        assert (code, last_run().observed_state()) == (0, RunState.DONE)
        assert f"`fls sync {last_run().run_id}` sends the rest" in output
    finally:
        line.restore()
    os.rename("toy", "gone")  # the storage is enough
    code, output, _ = fls("sync", "last", "--storage", ".fls")
    assert (code, output) == (0, f"{last_run().run_id} is complete: 1 cells sent.\n")
    runs = recorded(client)
    assert set(runs) == {"toy", "start"}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert runs["start"].data.metrics["number"] == 1.0


def ids(runs: dict[str, Any]) -> list[str]:
    return [run.info.run_id for run in runs.values()]
