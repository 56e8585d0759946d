"""What is recorded of a run, in MLflow and as JSON lines."""

import copy
import hashlib
import json
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from toy_runs import DIAMOND, fls, last_run, resume_here, run_here, write_spec

from pipeline.base.errors import BadInput, PipelineError, StorageUnavailable
from pipeline.base.places import tracking_uri
from pipeline.base.states import CellState, RunState
from pipeline.planning.planner import Selection
from pipeline.running import account, sync
from pipeline.store.checksum import verified, with_checksum
from pipeline.store.events import Cursor
from pipeline.store.storage.local import LocalStorage
from pipeline.store.store import Store
from pipeline.tracking import (
    AbstractTracker,
    CellEnd,
    CellFacts,
    RunFacts,
    TrackerName,
    TrackingProgress,
    thread,
)

SLOW = """
    slow: {uses: slow, params: {steps: 20, delay_s: 0}}
    total: {uses: total, inputs: {numbers: slow}}
    report: {uses: report, inputs: {results: total}}
"""


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
        "options.json",
        "resolved.yaml",
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

    about = slow.data.tags
    assert (about["fls.device"], about["fls.threads"]) == ("cpu", "1")
    assert about["fls.host"] == socket.gethostname()
    assert json.loads(about["fls.packages"])["pydantic"]
    assert about["fls.python"].startswith("3.")
    made = {"seconds", "cpu_seconds", "peak_bytes", "output_bytes", "system/memory_bytes"}
    assert made <= set(slow.data.metrics)
    assert slow.data.metrics["output_bytes"] == (
        (Store(".fls").fetch(about["fls.key"], "number") / "number.json").stat().st_size
    )

    evaluation = runs["evaluation", "slow"]
    about = {"device", "threads", "workers", "platform", "python", "packages"}
    costs = {"seconds", "cpu_seconds", "peak_bytes", "output_bytes"}
    assert evaluation.data.metrics.keys() == {"number", *costs}
    maker = runs["stage", "total"].data
    for name in costs:
        assert evaluation.data.metrics[name] == maker.metrics[name]
    for name in about:
        assert evaluation.data.tags[f"fls.{name}"] == maker.tags[f"fls.{name}"]
    assert evaluation.data.metrics["number"] == slow.data.metrics["number"]
    assert parent.data.tags["fls.python"] == slow.data.tags["fls.python"]
    assert json.loads(parent.data.tags["fls.packages"])["mlflow"]
    for name in ("seconds", "output_bytes"):
        cells = [run.data.metrics[name] for (kind, _), run in runs.items() if kind == "stage"]
        assert parent.data.metrics[name] == pytest.approx(sum(cells))
    code, output, _ = fls("results", "--json")
    assert [row["run_id"] for row in json.loads(output)] == [evaluation.info.run_id]
    assert str(toy / "mlruns") in evaluation.info.artifact_uri


def test_data_files_and_source_are_known_by_their_digests(client: Any, toy: Path) -> None:
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "empty"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    Path("number.txt").write_text("7")
    write_spec(
        """
        read: {uses: read, params: {path: number.txt}}
        apply: {uses: apply, inputs: {number: read}, params: {operation: plus_table, seed: 3}}
        total: {uses: total, inputs: {numbers: [read, apply]}}
        """
    )
    run_mlflow()
    runs = recorded(client, last_run().run_id)
    read, apply = runs["stage", "read"].data, runs["stage", "apply"].data
    assert read.tags["fls.digest.path"] == hashlib.sha256(b"7").hexdigest()
    assert apply.tags["fls.digest.operation"] == "ab" * 32
    assert runs["stage", "total"].data.tags["fls.digest.operation"] == "ab" * 32
    assert apply.params["seed"] == "3"
    assert {run.data.tags["mlflow.source.git.commit"] for run in runs.values()} == {
        commit.stdout.strip()
    }


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


def test_what_was_asked_for_beside_the_file_is_recorded_and_can_be_repeated(
    client: Any, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_spec(
        """
        start: {uses: start, params: {value: "${env.START_VALUE}"}}
        add: {uses: add, inputs: {number: start}}
        """
    )
    monkeypatch.setenv("START_VALUE", "7")
    monkeypatch.setenv("LOGNAME", "ada")
    options = ["add.amount=3", "start.seed=1"]
    assert run_mlflow(overrides=options, selection=Selection(until=["add"]))[0] == 0
    runs = recorded(client, last_run().run_id)
    assert {run.data.tags["mlflow.user"] for run in runs.values()} == {"ada"}
    parent = runs["pipeline", "toy"]
    assert parent.data.params == {"add.amount": "3", "start.seed": "1"}
    assert parent.data.tags["fls.set"] == "add.amount=3\nstart.seed=1"
    assert parent.data.tags["fls.selection"] == "--until add"
    assert json.loads(parent.data.tags["fls.environment"]) == {"START_VALUE": "7"}
    assert files(parent) == {"pipeline.yaml", "options.json", "resolved.yaml"}
    root = Path(parent.info.artifact_uri.removeprefix("file://"))
    asked = json.loads((root / "options.json").read_text())
    assert (asked["set"], asked["--until"]) == (options, ["add"])
    monkeypatch.delenv("START_VALUE")
    code, output, _ = fls("run", str(root / "resolved.yaml"), "--executor", "local")
    assert (code, output) == (0, "Nothing to do: all 2 cells are in the store.\n")
    code, output, _ = fls("plan", str(root / "pipeline.yaml"))
    assert code == 2, "the file alone says less"


def test_a_user_s_file_may_have_the_name_of_the_resolved_one(client: Any, toy: Path) -> None:
    write_spec("start: {uses: start, params: {value: 1}}").rename("resolved.yaml")
    path = Path("resolved.yaml")
    assert run_mlflow(path=path, overrides=["start.value=2"])[0] == 0
    parent = recorded(client, last_run().run_id)["pipeline", "toy"]
    root = Path(parent.info.artifact_uri.removeprefix("file://"))
    assert (root / "resolved.yaml").read_text() == path.read_text()
    assert "value: 2" in (root / "fls-resolved.yaml").read_text()


def test_json_lines_say_what_was_asked_for_and_who_made_what_is_cached(toy: Path) -> None:
    write_spec(SLOW)
    run_here(overrides=["slow.steps=5"])
    first = last_run().run_id
    run_here(overrides=["slow.steps=5"], selection=Selection(force=["report"]))
    text = Path(f"tracking/{last_run().run_id}.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert lines[0]["set"] == ["slow.steps=5"]
    assert lines[0]["selection"] == {"--force": ["report"]}
    assert "steps: 5" in lines[0]["resolved"]
    cached = [line for line in lines if line.get("state") == "cached"]
    assert {line["made_by"] for line in cached} == {first}


def test_the_parent_sums_what_the_run_spent_apart_from_what_others_had(client: Any) -> None:
    write_spec(SLOW)
    run_mlflow()
    first = recorded(client, last_run().run_id)
    sums = first["pipeline", "toy"].data.metrics
    made = [run.data.metrics for (kind, _), run in first.items() if kind == "stage"]
    for name in ("seconds", "cpu_seconds", "output_bytes"):
        assert sums[name] == pytest.approx(sum(one[name] for one in made))
        assert sums[f"cached_{name}"] == 0
    assert sums["peak_bytes"] == max(one["peak_bytes"] for one in made)
    assert (sums["cells"], sums["cached_cells"]) == (3, 0)

    run_id = last_run().run_id
    run_mlflow(selection=Selection(force=["report"]))
    second = recorded(client, last_run().run_id)
    again = second["pipeline", "toy"].data.metrics
    report = second["stage", "report"].data.metrics
    assert (again["cells"], again["cached_cells"]) == (1, 2)
    assert again["cpu_seconds"] == pytest.approx(report["cpu_seconds"])
    for name in ("seconds", "cpu_seconds", "output_bytes"):
        there = [first["stage", cell].data.metrics[name] for cell in ("slow", "total")]
        assert again[f"cached_{name}"] == pytest.approx(sum(there))
    assert second["cached", "slow"].data.tags["fls.made_by"] == run_id
    assert second["cached", "slow"].data.tags["fls.device"] == "cpu"


def test_a_run_that_went_on_counts_what_its_earlier_attempts_spent(client: Any) -> None:
    write_spec(
        """
        good: {uses: slow, params: {steps: 5}}
        bad: {uses: fail, inputs: {number: good}, params: {counter: counter, until: 1}}
        """
    )
    assert run_mlflow()[0] == 1
    before = recorded(client, last_run().run_id)
    failed = before["stage", "bad"].data.metrics["spent_seconds"]
    assert failed > 0
    assert before["pipeline", "toy"].data.metrics["seconds"] == pytest.approx(
        failed + before["stage", "good"].data.metrics["seconds"]
    )
    assert resume_here(last_run())[0] == 0
    after = recorded(client, last_run().run_id)
    bad = after["stage", "bad"].data.metrics
    assert bad["spent_seconds"] == pytest.approx(failed + bad["seconds"])
    parent = after["pipeline", "toy"].data.metrics
    good = after["stage", "good"].data.metrics
    for name in ("seconds", "cpu_seconds"):
        assert parent[name] == pytest.approx(good[name] + bad[f"spent_{name}"])


@pytest.mark.parametrize("call", ["log_text", "log_batch", "log_artifacts"])
def test_a_call_that_fails_once_records_nothing_twice(
    client: Any, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Above all while the run begins, when its parent is there and the rest of it is not."""
    method, failures = getattr(type(client), call), iter([True])

    def failing(*arguments: Any, **options: Any) -> Any:
        if next(failures, False):
            raise ConnectionError("nobody there")
        return method(*arguments, **options)

    monkeypatch.setattr(f"mlflow.tracking.MlflowClient.{call}", failing)
    monkeypatch.setattr(thread, "_FIRST_PAUSE_S", 0.01)
    write_spec(
        "start: {uses: start, params: {value: 1}}\ntotal: {uses: total, inputs: {numbers: start}}"
    )
    assert run_mlflow(overrides=["start.value=2"])[0] == 0
    runs = recorded(client, last_run().run_id)
    assert Counter(kind for kind, _ in runs) == {"pipeline": 1, "stage": 2, "evaluation": 1}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert files(runs["pipeline", "toy"]) == {"pipeline.yaml", "options.json", "resolved.yaml"}


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
        # What was made of fewer inputs is another result, whose run has gone.
        same = after[key].info.run_id == run.info.run_id
        assert same is (key != ("stage", "total"))
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
    record.save_progress(store, leaving=True)
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


def test_a_result_that_another_run_made_meanwhile_replaces_what_was_recorded(
    client: Any, toy: Path
) -> None:
    write_spec(
        """
        good: {uses: start, params: {value: 1}}
        total: {uses: total, inputs: {numbers: good}}
        bad: {uses: fail, inputs: {number: good}, params: {counter: counter, until: 1}}
        """
    )
    run_mlflow()
    first = last_run()
    module = toy / "toy" / "stages.py"
    module.write_text(module.read_text() + "\nUNUSED = 1\n")
    assert run_mlflow()[0] == 0
    second = last_run()
    assert resume_here(first, replan=True)[0] == 0
    runs = recorded(client, first.run_id)
    assert Counter(kind for kind, _ in runs) == {"pipeline": 1, "cached": 3}
    for name in ("good", "bad", "total"):
        tags = runs["cached", name].data.tags
        assert tags["fls.key"] == second.cells[name].key
        assert tags["fls.source_run"] == second.tracking.ids["cells"][name]


def test_code_that_is_accepted_later_is_a_tag_of_what_was_recorded_before(
    client: Any, toy: Path
) -> None:
    write_spec(
        """
        good: {uses: start, params: {value: 1}}
        bad: {uses: fail, inputs: {number: good}, params: {counter: counter, until: 1}}
        """
    )
    run_mlflow()
    before = recorded(client, last_run().run_id)["stage", "good"]
    module = toy / "toy" / "stages.py"
    module.write_text(module.read_text() + "\nUNUSED = 1\n")
    assert fls("accept", "good", "bad", "--why", "nothing was used")[0] == 0
    assert resume_here(last_run())[0] == 0
    after = recorded(client, last_run().run_id)["stage", "good"]
    assert after.info.run_id == before.info.run_id
    assert after.info.end_time == before.info.end_time
    assert after.data.tags["fls.accepted"].endswith(": nothing was used")


def test_nothing_is_left_running_in_a_run_that_is_over(client: Any) -> None:
    """A kill may fall between a record's creation and its end, and a new life may lose track."""
    write_spec(SLOW)
    run_mlflow()
    record, store = last_run(), Store(".fls")
    runs = recorded(client, record.run_id)
    for run in (runs["pipeline", "toy"], runs["stage", "total"], runs["evaluation", "slow"]):
        client.update_run(run.info.run_id, status="RUNNING")
    record.tracked = record.tracking.ended = False  # as after a kill just before the last call
    record.save_progress(store, leaving=True)
    write_spec(SLOW, name="toy")
    run_mlflow(selection=Selection(force=["report"]))
    after = {key: run.info.status for key, run in recorded(client, record.run_id).items()}
    assert after == {
        ("pipeline", "toy"): "FINISHED",
        ("stage", "slow"): "FINISHED",
        ("stage", "total"): "FINISHED",
        ("stage", "report"): "FINISHED",
        ("evaluation", "slow"): "KILLED",
    }
    assert fls("sync", record.run_id)[0] == 0
    again = recorded(client, record.run_id)
    assert again["stage", "slow"].info.end_time == runs["stage", "slow"].info.end_time


def test_a_start_with_nothing_to_do_ends_what_a_dead_driver_left_running(client: Any) -> None:
    write_spec(SLOW)
    run_mlflow()
    first, store = last_run(), Store(".fls")
    for command in (lambda: fls("run", "--executor", "local"), lambda: fls("resume", "last")):
        run_mlflow(selection=Selection(force=["report"]))
        for run in recorded(client, first.run_id).values():
            client.update_run(run.info.run_id, status="RUNNING")
        first.state, first.cells["report"].state = RunState.RUNNING, CellState.RUNNING
        first.tracked = first.tracking.ended = False
        first.save_progress(store, leaving=True)
        assert command()[1].startswith("Nothing to do")
        after = {name: run.info.status for (_, name), run in recorded(client, first.run_id).items()}
        assert (after["toy"], after["total"], after["report"]) == ("KILLED", "FINISHED", "KILLED")


def test_what_a_library_warns_of_is_no_error(
    client: Any, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under `python -W error`, which is how this test runs."""
    log_batch = type(client).log_batch

    def deprecated(*arguments: Any) -> None:
        warnings.warn_explicit("noload", DeprecationWarning, "loading.py", 1, "sqlalchemy.orm")
        log_batch(*arguments)

    monkeypatch.setattr("mlflow.tracking.MlflowClient.log_batch", deprecated)
    write_spec(SLOW)
    code, output = run_mlflow()
    assert (code, "cannot be recorded" in output, last_run().tracked) == (0, False, True)
    with pytest.raises(UserWarning, match="ours"):
        warnings.warn_explicit("ours", UserWarning, "x.py", 1, "pipeline.tracking.mlflow")


def test_a_storage_that_stays_away_ends_a_run_which_resume_takes_up(
    client: Any, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_spec("slow: {uses: slow, params: {steps: 40, delay_s: 0.05}}")
    away = False

    def lose(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, path: str, *rest: Any, **options: Any) -> Any:
            nonlocal away
            away = away or bool(list(Path(".fls").rglob("000002.jsonl")))  # amid the second segment
            if away:
                raise StorageUnavailable(f"{self.root}: cannot {name} {path}: nobody there.")
            return method(self, path, *rest, **options)

        return call

    with monkeypatch.context() as patch:
        for name in ("read", "write", "create", "names", "files"):
            patch.setattr(LocalStorage, name, lose(name, getattr(LocalStorage, name)))
        with pytest.raises(StorageUnavailable, match="nobody there. The run has ended") as raised:
            run_mlflow()
    run_id = last_run().run_id
    assert raised.value.exit_code == 1
    assert f"`fls resume {run_id} --storage {toy}/.fls` resumes it" in str(raised.value)
    assert {run.info.status for run in recorded(client, run_id).values()} == {"KILLED"}
    assert not [path for path in Path(".fls").rglob("manifest.json")]
    record = last_run()
    record.pid = 0x7FFFFFFF  # this process lives, unlike a driver that has ended
    record.save_progress(Store(".fls"))
    code, output, errors = fls("resume", run_id, "--storage", f"{toy}/.fls")
    assert (code, errors) == (0, ""), output
    runs = recorded(client, run_id)
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    history = client.get_metric_history(runs["stage", "slow"].info.run_id, "train/number")
    assert [metric.step for metric in history] == list(range(1, 41))


@pytest.mark.parametrize("document", ["run", "facts", "tracking"])
def test_a_run_that_is_damaged_does_not_keep_another_one_from_its_tracking(
    client: Any, document: str
) -> None:
    write_spec(SLOW)
    run_mlflow()
    record = last_run()
    record.tracked = record.tracking.ended = False  # an orphan, as far as can be told
    record.save_progress(Store(".fls"), leaving=True)
    Path(f".fls/runs/{record.run_id}/{document}.json").write_text("{")
    run_mlflow(selection=Selection(force=["report"]))
    assert recorded(client, last_run().run_id)["pipeline", "toy"].info.status == "FINISHED"
    assert last_run().tracked


def test_all_runs_of_a_dead_driver_are_ended_however_many_there_are(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.tracking import mlflow as module

    monkeypatch.setattr(module, "_PAGE", 2)
    uri = client.tracking_uri
    facts = {"run_id": "r", "name": "toy", "experiment": "toy", "uri": uri}
    run = RunFacts(**facts, spec_file="f.yaml", spec_text="")
    tracker = module.MLflowTracker()
    tracker.open_run(run)
    for name in "abcde":
        tracker.open_cell(CellFacts(cell=name, stage=name, key="k"))
    assert module.MLflowTracker().close_orphan(run, "stopped", {})
    assert {one.info.status for one in recorded(client, "r").values()} == {"KILLED"}


def test_a_record_that_is_contradicted_is_replaced(client: Any) -> None:
    """As by an attempt that was killed before its result was published, and the one after it."""
    from pipeline.tracking.mlflow import MLflowTracker

    uri = client.tracking_uri
    facts = {"run_id": "r", "name": "toy", "experiment": "toy", "uri": uri}
    tracker = MLflowTracker()
    tracker.open_run(RunFacts(**facts, spec_file="f.yaml", spec_text=""))
    tracker.open_cell(CellFacts(cell="c", stage="c", key="k", params={"a": {"b": 1}}))
    event = {"type": "record", "time": 1.0, "name": "m", "params": {"p": 1}}
    for accuracy in (0.5, 0.5, 0.75):
        tracker.log("c", [{**event, "metrics": {"accuracy": accuracy}}])
    (record,) = (run for key, run in recorded(client, "r").items() if key == ("evaluation", "m"))
    history = client.get_metric_history(record.info.run_id, "accuracy")
    assert [point.value for point in history] == [0.75]
    assert record.data.params == {"p": "1"}


def test_a_deleted_experiment_is_an_error_with_a_remedy(client: Any) -> None:
    write_spec("start: {uses: slow, params: {steps: 1000}}")
    client.delete_experiment(client.create_experiment("toy"))
    with pytest.raises(PipelineError, match="'toy' was deleted; restore it with"):
        run_mlflow()
    assert last_run().observed_state() is RunState.FAILED


@pytest.mark.parametrize(
    "uri",
    [
        "ftp://127.0.0.1/x",
        "http://host:x",
        "sqlite:////proc/x.db",
        "postgresql+none://127.0.0.1/x",
    ],
)
def test_an_address_that_is_wrong_is_an_error(
    uri: str, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    write_spec("start: {uses: slow, params: {steps: 1000}}")
    with pytest.raises(PipelineError, match=f"(?s)MLflow at {re.escape(uri)}.*--tracking-later"):
        run_mlflow()


def test_json_lines_that_can_be_nowhere_are_an_error(toy: Path) -> None:
    Path("tracking").touch()
    write_spec("start: {uses: slow, params: {steps: 1000}}")
    with pytest.raises(PipelineError, match="JSON lines cannot go into tracking"):
        run_here()


@pytest.mark.parametrize("command", ["run", "resume"])
def test_a_server_that_is_away_at_the_end_is_waited_for_no_longer_than_was_asked(
    command: str, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    write_spec("start: {uses: start, params: {value: 1}}")
    arguments = ["run", "--executor", "local", "--tracking-later"]
    if command == "resume":
        assert fls(*arguments)[0] == 0
        arguments = ["resume", "last", "--stop-after", "1s"]
    began = time.monotonic()
    code, output, _ = fls(*arguments)
    assert time.monotonic() - began < account._AWAY_S / 2
    assert (code, output.count("Tracking is behind"), last_run().state) == (0, 1, RunState.DONE)
    assert f"`fls sync {last_run().run_id}` sends the rest" in output


def test_a_cluster_is_told_not_to_wait_for_tracking(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        "pipeline.cluster.submit.submit", lambda spec, what, *_, **__: asked.append(what)
    )
    write_spec(SLOW)
    assert fls("submit", "--tracking-later")[0] == 0
    assert asked[0].arguments == ["--tracking-later"]


def test_a_password_in_the_address_is_neither_shown_nor_stored(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hush@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(account, "_AWAY_S", 0.1)
    write_spec("start: {uses: start, params: {value: 1}}")
    code, output = run_mlflow()
    assert code == 0
    assert "Tracking is not complete" in output
    assert "hush" not in output
    assert fls("sync")[0] == 1
    assert "hush" not in fls("sync")[2]
    stored = [path.read_bytes() for path in Path(".fls").rglob("*") if path.is_file()]
    assert not [text for text in stored if b"hush" in text]
    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # with it, nobody knows the password
    code, output, _ = fls("sync", last_run().run_id)
    assert code == 1
    assert "was tracked at http://***@127.0.0.1:9, and the hidden part is not stored" in output


def begin_and_fail(toy: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Begin a run that fails and may go on, and leave its folder; return its storage."""
    write_spec(
        f"""
        good: {{uses: slow, params: {{steps: 20, delay_s: 0}}}}
        bad: {{uses: fail, inputs: {{number: good}}, params: {{counter: {toy}/count, until: 1}}}}
        """
    )
    assert run_mlflow()[0] == 1
    (toy / "elsewhere").mkdir()
    monkeypatch.chdir(toy / "elsewhere")
    monkeypatch.syspath_prepend(toy)
    return toy / ".fls"


def good_steps(client: Any, run_id: str) -> list[int]:
    run = recorded(client, run_id)["stage", "good"].info.run_id
    return [point.step for point in client.get_metric_history(run, "train/number")]


def test_a_run_that_goes_on_elsewhere_is_tracked_where_it_was(
    fresh_database: Path, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(fresh_database, toy / "mlflow.db")
    storage = str(begin_and_fail(toy, monkeypatch))
    first = last_run(storage)
    assert first.destination == f"sqlite:///{toy}/mlflow.db"
    assert resume_here(first, storage, file=toy / "pipeline.yaml")[0] == 0
    assert not Path("mlflow.db").exists()
    client = MlflowClient(f"sqlite:///{toy}/mlflow.db")
    runs = recorded(client, first.run_id)
    assert runs["pipeline", "toy"].info.run_id == first.tracking.ids["run"]
    assert {run.info.status for run in runs.values()} == {"FINISHED"}


def one_paragraph_about(text: str, *parts: str) -> bool:
    return "\n" not in text.strip() and all(part in text for part in parts)


def test_a_run_is_not_resumed_or_synced_under_another_tracking_address(
    client: Any, fresh_database: Path, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = str(begin_and_fail(toy, monkeypatch))
    first = last_run(storage)
    shutil.copy(fresh_database, "mlflow.db")
    fresh = Path("mlflow.db").read_bytes()
    other = f"sqlite:///{toy}/elsewhere/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", other)
    remedy = f"Set MLFLOW_TRACKING_URI to {client.tracking_uri} for this run"
    with pytest.raises(BadInput) as refused:
        resume_here(first, storage, file=toy / "pipeline.yaml")
    assert one_paragraph_about(str(refused.value), first.run_id, other, remedy, "`fls run`")
    path = toy / f".fls/runs/{first.run_id}/tracking.json"
    path.write_bytes(with_checksum({**verified(path.read_bytes()), "tracked": False}))
    code, output, _ = fls("sync", "last", "--storage", storage)
    assert code == 1
    assert one_paragraph_about(output, first.run_id, other, remedy, "`fls run`")
    assert Path("mlflow.db").read_bytes() == fresh

    monkeypatch.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)
    assert resume_here(first, storage, file=toy / "pipeline.yaml")[0] == 0
    assert good_steps(client, first.run_id) == list(range(1, 21))


def test_a_run_that_an_earlier_version_tracked_at_several_places_goes_on_at_the_present_one(
    client: Any, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = str(begin_and_fail(toy, monkeypatch))
    first = last_run(storage)
    path = toy / f".fls/runs/{first.run_id}/tracking.json"
    here = verified(path.read_bytes())
    there = {name: value for name, value in here.items() if name != "destination"}
    path.write_bytes(with_checksum({**here, "elsewhere": {"http://there": there}}))
    assert fls("status", "last", "--storage", storage)[0] == 0
    assert resume_here(first, storage, file=toy / "pipeline.yaml")[0] == 0
    assert {run.info.status for run in recorded(client, first.run_id).values()} == {"FINISHED"}


def test_a_run_that_was_tracked_with_a_password_asks_for_it(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hush@127.0.0.1:9/")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(account, "_AWAY_S", 0.1)
    write_spec("start: {uses: start, params: {value: 1}}")
    assert run_mlflow(tracking_later=True)[0] == 0
    assert last_run().destination == "http://127.0.0.1:9"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(BadInput, match=r"tracked at http://\*\*\*@127.* set MLFLOW_TRACKING_URI"):
        resume_here(last_run())


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
    assert tracking_uri(None, "sqlite:////begun/x.db") == "sqlite:////begun/x.db"
    assert tracking_uri("sqlite:///x.db", "sqlite:////begun/x.db") == "sqlite:////begun/x.db"
    assert tracking_uri("http://declared", "sqlite:////begun/x.db") == "http://declared"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://environment")
    assert tracking_uri("http://declared", "http://recorded") == "http://environment"


class Recording(AbstractTracker):
    """A tracker that notes what it is told; `trouble` may raise before it does."""

    def __init__(self, trouble: Callable[[str, str], None]) -> None:
        super().__init__()
        self.told: list[tuple[str, str]] = []
        self.steps: list[int] = []
        self._trouble = trouble

    def _tell(self, what: str, whom: str) -> None:
        self._trouble(what, whom)
        self.told.append((what, whom))

    def open_run(self, run: RunFacts) -> None:
        self._tell("open_run", run.run_id)
        self.ids = {"run": "1", "cells": {}, "records": {}}

    def open_cell(self, cell: CellFacts) -> None:
        self._tell("open_cell", cell.cell)

    def log(self, cell: str, events: list[dict[str, Any]]) -> None:
        self._tell("log", cell)
        self.steps += [one["step"] for one in events if one["type"] == "metrics" and one["step"]]

    def close_cell(self, cell: str, end: CellEnd) -> None:
        self._tell(end.state, cell)

    def forget_cell(self, cell: str, *, records: bool = False) -> None:
        self._tell("forget", cell)

    def link_cached(self, cell: CellFacts, source: str | None, made: CellEnd) -> None:
        self._tell("cached", cell.cell)

    def register(self, cell: CellFacts, folder: Path) -> None:
        self._tell("register", cell.cell)

    def promote(self, output: str, folder: Path) -> None:
        self._tell("promote", output)

    def close_run(self, state: str) -> None:
        self._tell("close_run", state)

    def close_orphan(self, run: RunFacts, state: str, cells: Mapping[str, str]) -> bool:
        return False

    def is_outage(self, error: Exception) -> bool:
        return isinstance(error, ConnectionError)


def use(tracker: AbstractTracker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread, "make_tracker", lambda name: tracker)
    monkeypatch.setattr(sync, "make_tracker", lambda name: tracker)
    monkeypatch.setattr(thread, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(account, "_AWAY_S", 0.2)


def test_a_server_that_is_away_for_a_while_misses_nothing(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = iter(range(3))

    def trouble(what: str, whom: str) -> None:
        if (what, whom) == ("log", "slow") and next(failures, None) is not None:
            raise ConnectionError("nobody there")

    write_spec(SLOW)
    tracker = Recording(trouble)
    use(tracker, monkeypatch)
    code, output = run_here()
    assert code == 0
    assert output.count("Tracking is behind (ConnectionError: nobody there)") == 1
    assert output.count("Tracking has caught up.") == 1
    assert "sends the rest" not in output
    assert tracker.steps == list(range(1, 21))
    ends = [whom for what, whom in tracker.told if what == "done"]
    assert ends == ["slow", "total", "report"]
    assert tracker.told[-2:] == [("promote", "report"), ("close_run", "done")]
    assert last_run().tracked


def test_a_server_that_stays_away_gets_it_all_later(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = False

    def trouble(what: str, whom: str) -> None:
        if what != "open_run" and whom != "slow" and not here:
            raise ConnectionError("nobody there")

    write_spec(SLOW)
    tracker = Recording(trouble)
    use(tracker, monkeypatch)
    code, output = run_here()
    record = last_run()
    assert code == 0
    assert f"Tracking is not complete; `fls sync {record.run_id}` sends the rest." in output
    assert (record.tracking.closed, record.tracked) == (["slow"], False)
    code, _, errors = fls("sync", "last")
    assert code == 1
    assert f"Nothing is lost: `fls sync {record.run_id}` sends the rest." in errors
    here, first = True, len(tracker.told)
    code, output, _ = fls("sync")
    assert (code, output) == (0, f"{record.run_id} is complete: 2 cells sent.\n")
    assert [whom for what, whom in tracker.told[first:] if what == "done"] == ["total", "report"]
    assert tracker.steps == list(range(1, 21))
    assert last_run().tracked
    assert fls("sync")[1] == f"{record.run_id} is complete.\n"


def test_one_process_at_a_time_records_a_run(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that is about to end, one that was killed then, and two that send what it missed."""
    said: list[str] = []
    away = False

    def trouble(what: str, whom: str) -> None:
        if what == "close_run":
            said.append(fls("sync", "last")[1])
            if away:
                raise ConnectionError("nobody there")

    write_spec(SLOW)
    tracker = Recording(trouble)
    use(tracker, monkeypatch)
    assert run_here()[0] == 0
    run_id, me = last_run().run_id, f"process {os.getpid()} on {socket.gethostname()}"
    assert said == [f"{run_id} is being recorded by {me}; try again later.\n"]
    assert Counter(what for what, _ in tracker.told)["open_run"] == 1
    assert fls("sync", "last")[:2] == (0, f"{run_id} is complete.\n")

    said.clear()
    away = True
    assert "Tracking is not complete" in run_here(selection=Selection(force=["slow"]))[1]
    away, run_id = False, last_run().run_id
    assert all(f"{run_id} is being recorded by {me}" in one for one in said)
    monkeypatch.setenv("FLS_LEASE_S", "30")
    store, record = Store(".fls"), last_run()
    record.save_progress(store)  # as if its driver had yet to give up
    assert fls("sync", "last")[:2] == (1, f"{run_id} is being recorded by {me}; try again later.\n")
    with subprocess.Popen(["true"]) as dead:
        pass
    record.pid = dead.pid  # as if it had been killed then
    record.save_progress(store)
    rival, late = last_run(), last_run()
    said.clear()
    assert fls("sync", "last")[:2] == (0, f"{run_id} is complete: 0 cells sent.\n")
    assert said == [f"{run_id} is being recorded by {me}; try again later.\n"]
    assert not rival.take_over(store)
    monkeypatch.setattr("pipeline.running.record.lease_s", lambda: 0.0)
    assert late.take_over(store), "as if who took it over had died before saying so"
    assert late.superseded(store) is False
    assert rival.superseded(store)


def test_what_a_server_does_not_take_keeps_nothing_else_waiting(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trouble(what: str, whom: str) -> None:
        if (what, whom) == ("open_cell", "slow"):
            raise ValueError("a name that it does not like")

    write_spec(SLOW)
    tracker = Recording(trouble)
    use(tracker, monkeypatch)
    _, output = run_here()
    assert "slow cannot be recorded: a name that it does not like" in output
    assert [whom for what, whom in tracker.told if what == "done"] == ["total", "report"]
    assert tracker.told[-1] == ("close_run", "done")
    assert not last_run().tracked


def test_a_server_that_never_answered_is_waited_for(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = iter(range(2))

    def trouble(what: str, whom: str) -> None:
        if what == "open_run" and next(failures, None) is not None:
            raise ConnectionError("nobody there")

    write_spec(SLOW)
    tracker = Recording(trouble)
    use(tracker, monkeypatch)
    code, output = run_here()
    assert code == 0
    assert "Tracking is behind (ConnectionError: nobody there)" in output
    assert "until `fls sync` sends them" in output
    assert "Tracking has caught up." in output
    assert last_run().tracked


def test_a_result_that_is_made_anew_is_recorded_anew(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_spec(SLOW)
    tracker = Recording(lambda what, whom: None)
    use(tracker, monkeypatch)
    run_here()
    record, store = last_run(), Store(".fls")
    (store.fetch(record.cells["slow"].key, "number") / "number.json").write_text("{}")
    manifest = store.manifest(record.cells["total"].key)
    assert manifest is not None
    shutil.rmtree(f".fls/stages/{record.cells['total'].key}")
    tracker.told.clear()
    assert resume_here(record)[0] == 0
    assert ("forget", "slow") in tracker.told
    assert tracker.told.index(("forget", "slow")) < tracker.told.index(("open_cell", "slow"))
    assert last_run().tracking.cursors["slow"].attempt == 2


def files(run: Any) -> set[str]:
    root = Path(run.info.artifact_uri.removeprefix("file://"))
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def test_a_kill_while_the_tables_are_made_breaks_no_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.tracking import mlflow_server as module

    class Killed(BaseException):
        pass

    def half(uri: str) -> None:
        with sqlite3.connect(uri.removeprefix("sqlite:///")) as database:
            database.execute("create table runs (half integer)")
        database.close()
        raise Killed

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, "MlflowClient", half)
        module.connect(uri)
    assert module.connect(uri).get_experiment_by_name("Default") is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mlflow.db.lock", "mlflow.db"]


def test_a_copy_of_the_progress_shares_nothing_that_changes() -> None:
    progress = TrackingProgress(
        cursors={"a": Cursor(1, 2)},
        keys={"a": "k"},
        closed=["a"],
        registered=["a"],
        ids={"run": "r", "cells": {"a": "i"}, "series": {"a": {"m": [1, {"n": 2}]}}},
        ended=True,
    )
    before = copy.deepcopy(progress)
    other = progress.copy()
    assert other == progress
    other.cursors["b"], other.keys["b"] = Cursor(), "l"
    other.closed.append("b")
    other.registered.append("b")
    other.ids["cells"]["b"] = "j"
    other.ids["series"]["a"]["m"][1]["n"] = 3
    other.ids["series"]["a"]["m"].append(4)
    assert progress == before
