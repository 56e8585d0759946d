"""Several processes at one store: drivers that meet, one that is silent, and one that is told."""

import os
import signal
import subprocess
from functools import partial
from pathlib import Path

import pytest
from toy_runs import (
    alive,
    fls,
    kill,
    last_run,
    numbers,
    ran,
    start_fls,
    states,
    wait_for,
    write_spec,
)

from pipeline.base.errors import BadInput
from pipeline.base.states import CellState, RunState
from pipeline.running.runs import load_run
from pipeline.store.store import Store

SLOW = """
    slow: {uses: slow, params: {steps: 60, delay_s: 0.05}}
    add: {uses: add, inputs: {number: slow}}
"""
RUN = ("run", "--executor", "local", "--tracking", "jsonl")
LEASE_S = 1.0


@pytest.fixture(autouse=True)
def short_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLS_LEASE_S", str(LEASE_S))


def runs() -> list[str]:
    return Store(".fls").list_runs()


def state_of(run_id: str) -> RunState:
    return load_run(Store(".fls"), run_id).observed_state()


def working(run_id: str) -> bool:
    try:
        return load_run(Store(".fls"), run_id).cells["slow"].progress is not None
    except BadInput:  # not written down whole
        return False


def start_working() -> tuple[subprocess.Popen[str], str]:
    process = start_fls(*RUN)
    wait_for(lambda: runs() and working(runs()[-1]))
    return process, runs()[-1]


def worker_of(run_id: str) -> int:
    """Return the process of the slow cell's newest attempt."""
    store, key = Store(".fls"), load_run(Store(".fls"), run_id).cells["slow"].key
    return store.read_events(key, store.attempts(key)[-1])[0][0]["pid"]


def manifests() -> int:
    return len(list(Path(".fls/stages").glob("*/manifest.json")))


def test_a_cell_that_another_run_works_at_is_waited_for(toy: Path) -> None:
    write_spec(SLOW.replace("steps: 60", "steps: 240"))  # a busy machine starts a run in seconds
    first, run_id = start_working()
    second = start_fls(*RUN)
    outputs = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), outputs
    assert f"slow: run {run_id} on" in outputs[1]
    assert "is running it; waiting for its result" in outputs[1]
    assert (ran(), manifests()) == ({"slow": 1, "add": 1}, 2)
    assert states(last_run())["slow"] is CellState.CACHED


def test_the_cell_of_a_run_that_was_killed_is_not_waited_for(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLS_LEASE_S", "600")
    write_spec(SLOW)
    first, run_id = start_working()
    kill(first)
    wait_for(lambda: not alive(worker_of(run_id)))
    code, output, errors = fls(*RUN)
    assert (code, errors) == (0, "")
    assert "is running it" not in output
    assert ran() == {"slow": 1, "add": 1}


def test_a_silent_run_is_overtaken_and_its_work_discarded(toy: Path) -> None:
    write_spec(SLOW)
    first, run_id = start_working()
    sleepers = (first.pid, worker_of(run_id))
    for pid in sleepers:
        os.kill(pid, signal.SIGSTOP)
    code, output, errors = fls(*RUN)
    assert (code, errors) == (0, "")
    assert "is running it" in output
    number = numbers()["slow"]
    for pid in sleepers:
        os.kill(pid, signal.SIGCONT)
    output, errors = first.communicate(timeout=60)
    assert first.returncode == 0, errors
    assert state_of(run_id) is RunState.DONE
    assert (numbers()["slow"], manifests()) == (number, 2)
    assert ran()["add"] == 1


def test_a_driver_whose_run_was_taken_over_writes_no_more(toy: Path) -> None:
    write_spec(SLOW)
    first, run_id = start_working()
    sleepers = (first.pid, worker_of(run_id))
    for pid in sleepers:
        os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: state_of(run_id) is RunState.INTERRUPTED)
    assert fls("resume", "last")[0] == 0
    before = load_run(Store(".fls"), run_id)
    assert (before.state, before.life) == (RunState.DONE, 2)
    for pid in reversed(sleepers):
        os.kill(pid, signal.SIGCONT)
    _, errors = first.communicate(timeout=60)
    assert first.returncode != 0
    assert "was taken over by another process" in errors
    assert load_run(Store(".fls"), run_id) == before


def test_a_run_is_stopped_through_its_store(toy: Path) -> None:
    write_spec(SLOW.replace("60", "150"))
    process, run_id = start_working()
    code, output, errors = fls("stop", "last")
    assert (code, errors) == (0, "")
    assert f"Run {run_id}: stopped." in output
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert states(last_run())["slow"] is CellState.WAITING
    code, _, errors = fls("stop", "last")
    assert (code, "is not running: stopped" in errors) == (2, True)
    assert fls("resume", "last")[0] == 0  # it was another life that was to stop
    assert ran() == {"slow": 1, "add": 1}


def test_a_log_is_followed_to_its_end(toy: Path) -> None:
    write_spec(SLOW)
    process, _ = start_working()
    follower = start_fls("logs", "slow", "--follow")
    wait_for(partial(last_state_is, CellState.DONE))
    output, errors = follower.communicate(timeout=30)
    process.communicate(timeout=30)
    assert (follower.returncode, errors) == (0, "")
    assert "step 1: train/number" in output
    assert "step 60: train/number" in output
    assert output.splitlines()[-1] == "slow: done"


def last_state_is(state: CellState) -> bool:
    return states(last_run())["slow"] is state
