"""Models in the MLflow registry, on request."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from toy_runs import fls, last_run, ran, resume_here, run_here, write_spec

from pipeline.base.errors import SpecError
from pipeline.planning.planner import Selection, make_plan
from pipeline.running.facts import unregistered
from pipeline.running.runs import load_run
from pipeline.spec.load import load_spec
from pipeline.store.store import Store
from pipeline.tracking import TrackerName

# Somebody else's process: it finds nothing of this project.
ELSEWHERE = """
import sys
sys.modules.update(dict.fromkeys(["fishleg", "stages", "pipeline", "toy"]))
import mlflow.pytorch, torch
model = mlflow.pytorch.load_model("models:/doubler/1")
print(model(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])).flatten().tolist())
"""


def test_a_model_is_registered_once_and_loads_elsewhere(
    toy: Path,
    fresh_database: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mlflow.tracking import MlflowClient

    shutil.copy(fresh_database, toy / "mlflow.db")
    uri = f"sqlite:///{toy}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    write_spec(
        """
        start: {uses: start, params: {value: 2}, register: doubler}
        wrong: {uses: start, params: {value: -1}, register: unlike}
        end: {uses: add, inputs: {number: start}}
        """
    )
    code, output = run_here(tracking=TrackerName.MLFLOW)
    assert code == 0
    assert "wrong cannot be recorded: the model cannot be exported for the registry:" in output
    assert "ValueError: a negative number is no network" in output
    assert not last_run().tracked
    assert "wrong cannot be recorded" in resume_here(last_run())[1]
    assert "wrong cannot be recorded" in fls("sync", "last")[1]
    code, output = run_here(tracking=TrackerName.MLFLOW, selection=Selection(force=["end"]))
    client = MlflowClient(uri)
    (version,) = client.search_model_versions("name = 'doubler'")
    assert "Registering 1 model ..." in output
    assert version.tags["fls.cell"] == "start"
    assert version.tags["fls.key"] == last_run().cells["start"].key
    assert client.get_run(version.run_id).info.status == "FINISHED"
    statuses = {run.info.status for run in all_runs(client)}
    assert statuses == {"FINISHED"}

    folder = tmp_path_factory.mktemp("elsewhere")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "[6.0, 14.0, 22.0, 30.0]\n", done.stderr
    assert list(folder.iterdir()) == []


def all_runs(client: Any) -> list[Any]:
    experiment = client.get_experiment_by_name("toy").experiment_id
    runs: list[Any] = client.search_runs([experiment])
    return runs


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("{uses: total, inputs: {numbers: a}, register: x}", "no 'number'"),
        ("{uses: add, inputs: {number: a}, register: 'a/b'}", "expected a name of letters"),
        ("{uses: add, inputs: {number: a}, register: 3}", "register: expected"),
    ],
)
def test_what_cannot_be_registered_is_a_mistake_in_the_file(
    toy: Path, stage: str, message: str
) -> None:
    path = write_spec(f"a: {{uses: start, params: {{value: 1}}}}\nb: {stage}")
    with pytest.raises(SpecError, match=message):
        load_spec(path)


def test_a_name_in_the_registry_is_no_part_of_a_result(toy: Path) -> None:
    write_spec("a: {uses: start, params: {value: 1}}")
    run_here()
    write_spec("a: {uses: start, params: {value: 1}, register: one}")
    assert "0 of 1 cells to run" in fls("plan")[1]


def test_what_is_in_the_store_is_registered_when_that_is_asked_for(toy: Path) -> None:
    stages = """
        a: {uses: start, params: {value: 1}}
        b: {uses: add, inputs: {number: a}}
        """
    write_spec(stages)
    run_here()
    write_spec(stages.replace("1}", "1}, register: one"))
    assert "Nothing to do" in run_here(selection=Selection(only=["b"]))[1]
    code, output = run_here()
    assert code == 0 and "0 of 2 cells to run" in output and "Nothing to do" not in output
    assert last_run().tracking.registered == ["a"]
    assert "Nothing to do" in run_here()[1]
    write_spec(stages.replace("1}", "1}, register: another"))
    run_here()
    assert last_run().tracking.registered == ["a"]
    assert "Nothing to do" in run_here()[1]
    assert ran() == {"a": 1, "b": 1}


def test_another_server_gets_what_is_registered_too(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_spec("a: {uses: start, params: {value: 1}, register: one}")
    spec = load_spec(Path("pipeline.yaml"))
    run_here()
    store = Store(".fls")
    run_id = last_run().run_id
    record = load_run(store, run_id)
    # As if there, which knows no toys.
    record.options = replace(record.options, tracking=TrackerName.MLFLOW)
    record.destination = "http://here:5000"
    record.save_request(store)
    record.save_tracking(store)
    plan = make_plan(spec, store)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:word@here:5000/")
    assert unregistered(store, plan, TrackerName.MLFLOW) == []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://there:5000")
    assert unregistered(store, plan, TrackerName.MLFLOW) == ["a"]
