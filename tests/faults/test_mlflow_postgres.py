"""Twelve stages at once into a real MLflow server over PostgreSQL, with proxied artifacts."""

import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "pipeline"))

from servers import Proxy, mlflow_server, postgres
from toy_runs import TOY, kill, last_run, start_fls, wait_for, write_spec

WIDTH = 12
STAGES = f"""
    slow:
      uses: slow
      matrix: {{seed: [{", ".join(map(str, range(WIDTH)))}]}}
      params: {{steps: 40, delay_s: 0.1, checkpoint_every: 10}}
      resources: {{num_cpus: 0.1}}
    total: {{uses: total, inputs: {{numbers: slow}}}}
    report: {{uses: report, inputs: {{results: total}}}}
"""


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    folder = tmp_path_factory.mktemp("mlflow")
    with postgres(folder) as database, mlflow_server(database, folder) as url:
        yield Proxy(url)


@pytest.fixture
def client(line: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of the server; the working directory is a fresh one with the plugin `toy`."""
    from mlflow.tracking import MlflowClient

    shutil.copytree(TOY, tmp_path / "toy", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", line.url)
    line.requests.clear()
    return MlflowClient(line.url)


def recorded(client: Any) -> list[Any]:
    experiment = client.get_experiment_by_name("toy").experiment_id
    return client.search_runs([experiment], f"tags.`fls.run` = '{last_run().run_id}'")


def check_complete(client: Any) -> None:
    runs = recorded(client)
    kinds = Counter(run.data.tags["fls.kind"] for run in runs)
    assert kinds == {"pipeline": 1, "stage": WIDTH + 2, "evaluation": WIDTH}
    assert {run.info.status for run in runs} == {"FINISHED"}
    for run in runs:
        run_id, tags = run.info.run_id, run.data.tags
        if tags.get("fls.stage") == "slow":
            history = client.get_metric_history(run_id, "train/number")
            assert [point.step for point in history] == list(range(1, 41))
            assert len(client.get_metric_history(run_id, "number")) == 1
        if tags.get("fls.stage") == "total":
            assert run.info.artifact_uri.startswith("mlflow-artifacts:")
            (rows,) = client.list_artifacts(run_id, "results")
            assert rows.path == "results/rows.json"


def test_twelve_stages_at_once_are_recorded_by_few_calls(client: Any, line: Proxy) -> None:
    write_spec(STAGES)
    process = start_fls("run", "--executor", "local", "--max-parallel", str(WIDTH))
    output, errors = process.communicate(timeout=240)
    assert (process.returncode, errors) == (0, ""), output
    calls = len(line.requests)
    check_complete(client)
    cells, records = WIDTH + 2, WIDTH
    seconds = max(status.seconds or 0 for status in last_run().cells.values())
    # Create, parameters, end: three calls a record, and a cell one more with its final values;
    # then a call a second while a cell runs, and some for run, artifacts and opening.
    assert calls <= 4 * cells + 3 * records + WIDTH * (seconds + 2) + 40, calls


def test_a_cut_line_and_a_killed_driver_lose_and_double_nothing(client: Any, line: Proxy) -> None:
    write_spec(STAGES)
    process = start_fls("run", "--executor", "local", "--max-parallel", str(WIDTH))
    wait_for(lambda: sum("log-batch" in request for request in line.requests) > 2 * WIDTH, 120)
    line.cut()
    time.sleep(2)
    kill(process)
    line.restore()
    assert "RUNNING" in {run.info.status for run in recorded(client)}
    process = start_fls("resume", "last")
    output, errors = process.communicate(timeout=240)
    assert (process.returncode, errors) == (0, ""), output
    check_complete(client)
