"""Five hundred cells: planned at once, run in flat memory, and all of them in MLflow."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
from toy_runs import ROOT, last_run, states, write_spec

from pipeline.base.states import CellState
from pipeline.planning.planner import make_plan
from pipeline.spec.load import load_spec
from pipeline.store.store import Store

CELLS = 500
PLANNING_S = 1.0
GROWTH = 10e6  # bytes of the driver, once half of the cells are done and MLflow is loaded
STAGES = f"""
    start: {{uses: start, matrix: {{seed: {list(range(CELLS // 2))}}}, params: {{value: 1}}}}
    add: {{uses: add, matrix: {{seed: {list(range(CELLS // 2))}}}, inputs: {{number: start}}}}
"""


def done() -> int:
    return sum(1 for _ in Path(".fls/stages").glob("*/manifest.json"))


def test_five_hundred_cells(toy: Path, monkeypatch, fresh_database: Path) -> None:
    from mlflow.tracking import MlflowClient

    Path("mlflow.db").write_bytes(fresh_database.read_bytes())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    write_spec(STAGES)
    began_s = time.process_time()
    plan = make_plan(load_spec(Path("pipeline.yaml")), Store(".fls"))
    assert len(plan.cells) == CELLS
    assert time.process_time() - began_s < PLANNING_S

    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "run", "--executor", "local"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    driver, memory = psutil.Process(process.pid), []
    while process.poll() is None:
        if done() >= CELLS // 2 and driver.status() != psutil.STATUS_ZOMBIE:
            memory.append(driver.memory_info().rss)
        time.sleep(0.1)
    output, errors = process.communicate()
    assert (process.returncode, errors) == (0, ""), output
    assert set(states(last_run()).values()) == {CellState.DONE}
    assert memory[-1] - memory[0] < GROWTH, memory

    client = MlflowClient("sqlite:///mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'toy'")
    found, token = [], None
    while token is not None or not found:
        page = client.search_runs([experiment.experiment_id], max_results=200, page_token=token)
        found, token = found + list(page), page.token
        if not token:
            break
    assert len(found) == CELLS + 1
    assert {run.info.status for run in found} == {"FINISHED"}
    numbers = [run.data.metrics["number"] for run in found if "number" in run.data.metrics]
    assert len(numbers) == CELLS
    print(f"driver: {memory[0] / 1e6:.0f} MB, then {memory[-1] / 1e6:.0f} MB")
