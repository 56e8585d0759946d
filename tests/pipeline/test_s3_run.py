"""Whole runs whose store is in S3."""

import os
import signal
from pathlib import Path

from s3_server import BUCKET, SECRET
from toy_runs import (
    DIAMOND,
    alive,
    fls,
    last_run,
    numbers,
    ran,
    run_here,
    start_fls,
    states,
    wait_for,
    write_spec,
)

from pipeline.base.states import CellState, RunState
from pipeline.running.runs import load_runs
from pipeline.store.store import Store

STORAGE = f"s3://{BUCKET}/runs"
SLOW = """
    start: {uses: start, params: {value: 10}}
    slow: {uses: slow, inputs: {number: start}, params: {steps: 30, delay_s: 0.05}}
    add: {uses: add, inputs: {number: slow}}
"""


def test_a_pipeline_runs_on_s3_and_is_found_there(toy: Path, s3: str) -> None:
    write_spec(DIAMOND, storage=f"{STORAGE}/diamond")
    code, output = run_here()
    assert code == 0, output
    assert sum(ran().values()) == 8
    assert numbers(f"{STORAGE}/diamond")["add[amount=2,seed=1]"] == 13
    code, output = run_here()
    assert (code, sum(ran().values())) == (0, 8)
    assert "Nothing to do" in output
    # All of it is in the bucket: nothing but the log of this test is here.
    assert {path.name for path in toy.iterdir()} == {"toy", "pipeline.yaml", "ran", "tracking"}
    code, output, errors = fls("status")
    assert (code, errors) == (0, "")
    assert "done" in output


def test_a_run_on_s3_goes_on_after_its_worker_and_its_driver_were_killed(
    toy: Path, s3: str
) -> None:
    storage = f"{STORAGE}/undisturbed"
    write_spec(SLOW, storage=storage)
    assert run_here(overrides=["slow.delay_s=0"])[0] == 0
    undisturbed = numbers(storage)["slow"]
    (toy / "ran").unlink()

    storage = f"{STORAGE}/killed"
    store = Store(storage)
    write_spec(SLOW, storage=storage)
    process = start_fls("run", "--executor", "local", "--tracking", "jsonl")

    def events(attempt: int) -> list[dict]:
        runs, _ = load_runs(store)  # without those that are about to begin
        return store.read_events(runs[-1].cells["slow"].key, attempt)[0] if runs else []

    def checkpoints(attempt: int) -> int:
        return sum(event["type"] == "checkpoint" for event in events(attempt))

    wait_for(lambda: checkpoints(1))
    os.kill(events(1)[0]["pid"], signal.SIGKILL)  # the worker
    wait_for(lambda: checkpoints(2))
    pid = events(2)[0]["pid"]
    process.kill()  # the driver
    output, errors = process.communicate(timeout=30)
    assert "slow: The worker process died by signal SIGKILL" in output
    wait_for(lambda: not alive(pid))
    assert last_run(storage).observed_state() is RunState.INTERRUPTED

    code, output, errors = fls("resume", "last")
    assert (code, errors) == (0, "")
    assert set(states(last_run(storage)).values()) == {CellState.DONE}
    assert ran() == {"start": 1, "slow": 1, "add": 1}
    assert numbers(storage)["slow"] == undisturbed
    texts = [event["text"] for event in events(3) if event["type"] == "text"]
    assert texts[0].startswith("goes on from step")
    # A month of checkpoints does not fill the bucket: two an attempt, and none in the end.
    assert not [
        name for name in store.storage.fs.find(f"{BUCKET}/runs/killed") if "/checkp" in name
    ]


def test_no_secret_of_the_environment_is_stored(toy: Path, s3: str) -> None:
    write_spec("start: {uses: start, params: {value: 1}}", storage=f"{STORAGE}/secret")
    assert run_here()[0] == 0
    fs = Store(STORAGE).storage.fs
    stored = fs.find(f"{BUCKET}/runs/secret")
    assert len(stored) > 5
    assert not [name for name in stored if SECRET.encode() in fs.cat_file(name)]


def test_a_store_that_is_gone_is_one_message(toy: Path, s3: str) -> None:
    write_spec("start: {uses: start, params: {value: 1}}", storage="s3://no-such-bucket/x")
    for command in (("run", "--executor", "local", "--tracking", "jsonl"), ("status",), ("plan",)):
        code, _, errors = fls(*command)
        assert code == 1
        assert "s3://no-such-bucket/x: cannot" in errors
        assert "there is no such bucket. Make it, or correct `storage:`." in errors
        assert "Traceback" not in errors
