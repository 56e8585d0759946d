"""What is recorded of a run, in MLflow and as JSON lines."""

import itertools
import json
import shutil
import socket
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from toy_runs import DIAMOND, fls, last_run, resume_here, run_here, write_spec

from pipeline.errors import PipelineError
from pipeline.events import Cursor
from pipeline.planner import Selection
from pipeline.runs import RunState
from pipeline.store import Store
from pipeline.tracking import (
    AbstractTracker,
    CellFacts,
    RunFacts,
    TrackerName,
    TrackingProgress,
    TrackingThread,
    base,
    tracking_uri,
)

SLOW = """
    slow: {uses: slow, params: {steps: 20, delay_s: 0}}
    total: {uses: total, inputs: {numbers: slow}}
    report: {uses: report, inputs: {results: total}}
"""


@pytest.fixture(scope="module")
def fresh_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database without runs; making one takes MLflow seconds, so tests get copies."""
    from pipeline.tracking.mlflow import _connect  # imports MLflow

    path = tmp_path_factory.mktemp("fresh") / "mlflow.db"
    _connect(f"sqlite:///{path}")
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


def run_mlflow(**options: Any) -> tuple[int, str]:
    return run_here(tracking=TrackerName.MLFLOW, **options)


def recorded(client: Any, run_id: str) -> dict[tuple[str, str], Any]:
    """Return (kind, name) -> MLflow run of all that one run of ours recorded."""
    experiment = client.get_experiment_by_name("toy").experiment_id
    runs = client.search_runs([experiment], f"tags.`fls.run` = '{run_id}'")
    found = {}
    for run in runs:
        kind = run.data.tags["fls.kind"]
        name = "toy" if kind == "pipeline" else run.info.run_name
        assert (kind, name) not in found, "recorded twice"
        found[kind, name] = run
    return found


def test_a_run_its_cells_and_its_records_are_mlflow_runs(client: Any, toy: Path) -> None:
    write_spec(SLOW)
    code, output = run_mlflow()
    assert code == 0
    assert "All runs side by side: fls ui" in output
    runs = recorded(client, last_run().run_id)
    assert Counter(kind for kind, _ in runs) == {"pipeline": 1, "stage": 3, "evaluation": 1}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    parent = runs["pipeline", "toy"]
    children = [run for key, run in runs.items() if key != ("pipeline", "toy")]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}

    assert parent.data.tags["mlflow.note.content"].startswith("| cell | number |")
    assert files(parent) == {
        "pipeline.yaml",
        "report/table.md",
        "report/table.csv",
        "report/figure.png",
    }
    assert files(runs["stage", "total"]) == {"results/rows.json"}

    slow = runs["stage", "slow"]
    assert slow.data.params == {
        "steps": "20",
        "delay_s": "0.0",
        "checkpoint_every": "5",
        "seed": "0",
    }
    history = client.get_metric_history(slow.info.run_id, "train/number")
    assert [metric.step for metric in history] == list(range(1, 21))
    assert slow.data.metrics["number"] == history[-1].value

    evaluation = runs["evaluation", "slow"]
    assert evaluation.data.metrics == {"number": slow.data.metrics["number"]}
    code, output, _ = fls("results", "--json")
    assert [row["run_id"] for row in json.loads(output)] == [evaluation.info.run_id]
    assert str(toy / "mlruns") in evaluation.info.artifact_uri


def test_what_was_cached_is_a_light_run_that_names_its_source(client: Any) -> None:
    write_spec(SLOW)
    run_mlflow()
    first = recorded(client, last_run().run_id)
    run_mlflow(selection=Selection(force=["report"]))
    second = recorded(client, last_run().run_id)
    assert Counter(kind for kind, _ in second) == {"pipeline": 1, "stage": 1, "cached": 2}
    cached = second["cached", "slow"]
    assert cached.data.tags["fls.source_run"] == first["stage", "slow"].info.run_id
    assert cached.data.params == first["stage", "slow"].data.params
    assert cached.info.status == "FINISHED"
    assert second["pipeline", "toy"].data.tags["mlflow.note.content"].startswith("| cell |")


def test_failures_show_and_a_resumed_run_is_the_same_run(client: Any) -> None:
    write_spec(
        """
        good: {uses: start, params: {value: 1}}
        bad: {uses: fail, inputs: {number: good}, params: {counter: counter, until: 1}}
        total: {uses: total, inputs: {numbers: [good, bad]}}
        """
    )
    assert run_mlflow()[0] == 1
    before = recorded(client, last_run().run_id)
    assert before["pipeline", "toy"].info.status == "FAILED"
    assert before["stage", "bad"].info.status == "FAILED"
    assert before["stage", "good"].info.status == "FINISHED"
    assert resume_here(last_run())[0] == 0
    after = recorded(client, last_run().run_id)
    assert {run.info.status for run in after.values()} == {"FINISHED"}
    for key, run in before.items():
        assert after[key].info.run_id == run.info.run_id
    assert after["stage", "good"].info.end_time == before["stage", "good"].info.end_time
    # The second result of `total`, under another key than that of fewer inputs, is heard as well.
    assert ("evaluation", "bad") in after
    assert ("evaluation", "bad") not in before


def test_what_a_kill_kept_from_being_recorded_is_recorded_later(client: Any) -> None:
    """Make the store look as after a kill between a cell's end and its recording."""
    write_spec(SLOW)
    run_mlflow()
    record, store = last_run(), Store(".fls")
    runs = recorded(client, record.run_id)
    for kind, name in (("evaluation", "slow"), ("stage", "total")):
        client.delete_run(runs[kind, name].info.run_id)
    client.update_run(runs["stage", "slow"].info.run_id, status="RUNNING")
    record.tracking = TrackingProgress(cursors={"slow": Cursor(1, 1)}, closed=["report"])
    record.tracked, record.state = False, RunState.RUNNING
    record.pid = 2**22 + 1  # no process has such a number
    record.save_progress(store)
    assert last_run().observed_state() is RunState.INTERRUPTED

    assert resume_here(last_run())[0] == 0
    again = recorded(client, record.run_id)
    assert set(again) == set(runs)
    assert {run.info.status for run in again.values()} == {"FINISHED"}
    assert again["evaluation", "slow"].data.metrics == runs["evaluation", "slow"].data.metrics
    history = client.get_metric_history(again["stage", "slow"].info.run_id, "train/number")
    assert [metric.step for metric in history] == list(range(1, 21))


def test_accepted_code_is_a_tag_and_a_new_key_replaces_the_old_one(client: Any, toy: Path) -> None:
    write_spec(
        """
        good: {uses: start, params: {value: 1}}
        bad: {uses: fail, inputs: {number: good}, params: {counter: counter, until: 1}}
        """
    )
    run_mlflow()
    before = recorded(client, last_run().run_id)
    assert "fls.accepted" not in before["stage", "bad"].data.tags
    for module in ("slow", "stages"):
        path = toy / "toy" / f"{module}.py"
        path.write_text(path.read_text() + "\nUNUSED = 1\n")
    fls("accept", "bad", "--why", "nothing was used")
    assert resume_here(last_run(), replan=True)[0] == 0
    after = recorded(client, last_run().run_id)
    assert after["stage", "bad"].data.tags["fls.accepted"].endswith(": nothing was used")
    for name in ("good", "bad"):
        tags = after["stage", name].data.tags
        assert tags["fls.key"] == last_run().cells[name].key
        assert tags["fls.key"] != before["stage", name].data.tags["fls.key"]


def test_a_deleted_experiment_is_an_error_with_a_remedy(client: Any) -> None:
    write_spec("start: {uses: slow, params: {steps: 1000}}")
    client.delete_experiment(client.create_experiment("toy"))
    with pytest.raises(PipelineError, match="'toy' was deleted; restore it with"):
        run_mlflow()
    assert last_run().observed_state() is RunState.FAILED


def test_a_server_that_does_not_answer_is_an_error(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    write_spec("start: {uses: slow, params: {steps: 1000}}")
    with pytest.raises(PipelineError, match="MLflow at http://127.0.0.1:9"):
        run_mlflow()


def test_json_lines_tell_the_whole_run(toy: Path) -> None:
    write_spec(DIAMOND)
    run_here()
    run_id = last_run().run_id
    lines = [json.loads(line) for line in Path(f"tracking/{run_id}.jsonl").read_text().splitlines()]
    assert lines[0]["run"] == run_id
    assert (lines[0]["state"], lines[-1]["state"]) == ("running", "done")
    ends = {line["cell"] for line in lines if line["type"] == "cell" and line["state"] == "done"}
    assert len(ends) == 8
    records = [line for line in lines if line["type"] == "record"]
    assert {line["cell"] for line in records} == {"total"}
    assert len(records) == 6
    assert not Path("mlflow.db").exists()


def test_where_mlflow_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(None) == "sqlite:///mlflow.db"
    assert tracking_uri("http://declared") == "http://declared"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://environment")
    assert tracking_uri("http://declared") == "http://environment"


def test_the_pages_are_served_to_this_machine_on_a_free_port(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_spec(SLOW)
    started: list[list[str]] = []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///some.db")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    monkeypatch.setattr("os.execv", lambda program, command: started.append(command))
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        code, output, _ = fls("ui", "--port", str(taken))
    options = dict(itertools.pairwise(started[0]))
    assert code == 0
    assert options["--backend-store-uri"] == "sqlite:///some.db"
    assert options["--host"] == "127.0.0.1"
    assert int(options["--port"]) != taken
    assert output == f"http://127.0.0.1:{options['--port']}  (Ctrl-C closes it)\n"


def test_the_pages_of_a_server_are_its_own(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_spec(SLOW)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example")
    assert fls("ui") == (0, "https://mlflow.example\n", "")


class Breaking(AbstractTracker):
    """A tracker whose server goes away after the first cell."""

    def __init__(self) -> None:
        self.ids: dict[str, Any] = {"run": "1", "cells": {}, "records": {}}

    def open_run(self, run: RunFacts) -> None: ...

    def open_cell(self, cell: CellFacts) -> None: ...

    def log(self, cell: str, events: list[dict[str, Any]]) -> None:
        if cell == "add":
            raise ConnectionError("the server has gone")

    def close_cell(self, cell: str, state: str, outputs: Mapping[str, Path]) -> None: ...

    def link_cached(self, cell: CellFacts, source: str | None) -> None: ...

    def promote(self, output: str, folder: Path) -> None: ...

    def close_run(self, state: str) -> None: ...


def test_tracking_that_breaks_is_reported_and_does_not_end_the_run(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_spec(
        "{start: {uses: start, params: {value: 1}}, add: {uses: add, inputs: {number: start}}}"
    )
    monkeypatch.setattr(base, "make_tracker", lambda name: Breaking())
    code, output = run_here()
    assert code == 0
    assert "Tracking is not complete (ConnectionError: the server has gone)" in output
    assert last_run().tracking.closed == ["start"]
    assert not last_run().tracked
    monkeypatch.undo()
    monkeypatch.chdir(toy)
    assert resume_here(last_run())[0] == 0
    assert last_run().tracked
    text = Path(f"tracking/{last_run().run_id}.jsonl").read_text()
    assert '"cell": "add", "state": "done"' in text


def test_a_cursor_moves_only_when_events_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "make_tracker", lambda name: Breaking())
    thread = TrackingThread(TrackerName.JSONL, TrackingProgress())
    thread.log("start", [], Cursor(1, 3))
    thread.log("add", [], Cursor(1, 5))
    thread.log("late", [], Cursor(1, 1))
    assert not thread.finish(10)
    assert thread.progress().cursors == {"start": Cursor(1, 3)}


def files(run: Any) -> set[str]:
    root = Path(run.info.artifact_uri.removeprefix("file://"))
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
