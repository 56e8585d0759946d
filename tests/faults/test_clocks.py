"""Runs whose clocks are wrong, or that live in a container: alive while they live, dead when dead.

The driver is a real process, with its workers: its clock is shifted against this one's, or it has
process numbers of its own, as in a container that shares the host's name and the store.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "pipeline"))

from toy_runs import ROOT, checkpoint_exists, fls, last_run, numbers, wait_for, write_spec

from pipeline.base.states import RunState
from pipeline.store.store import Store

LEASE_S = 2
CELLS = """
slow: {uses: slow, params: {steps: 60, delay_s: 0.1, checkpoint_every: 5}}
after: {uses: add, inputs: {number: slow}}
"""
CONTAINER = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
WHERE = {
    "a day behind": ([], -86_400.0),
    "60 s behind": ([], -60.0),
    "60 s ahead": ([], 60.0),
    "2 h ahead": ([], 7200.0),
    "in a container": (CONTAINER, 0.0),
    "in a container, 2 h ahead": (CONTAINER, 7200.0),
}


@pytest.fixture
def undisturbed(toy: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Return what the cells come to."""
    monkeypatch.setenv("FLS_LEASE_S", str(LEASE_S))
    write_spec(CELLS.replace("delay_s: 0.1", "delay_s: 0"), storage="undisturbed")
    assert fls("run", "--executor", "local", "--tracking", "jsonl")[0] == 0
    found = numbers("undisturbed")
    write_spec(CELLS)
    return found


@pytest.fixture(params=WHERE)
def driver(
    request: pytest.FixtureRequest, undisturbed: dict[str, float]
) -> Iterator[subprocess.Popen[str]]:
    """Start a run whose process has its own idea of the time, or of process numbers."""
    before, skew_s = WHERE[request.param]
    search = os.pathsep.join([str(Path(__file__).parent / "other_clock"), str(ROOT)])
    process = subprocess.Popen(
        [*before, sys.executable, "-m", "pipeline"]
        + ["run", "--executor", "local", "--tracking", "jsonl"],
        env={**os.environ, "PYTHONPATH": search, "SKEW_S": str(skew_s)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        wait_for(lambda: process.poll() is not None or checkpoint_exists(), 60)
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_a_live_run_is_left_alone_and_ends(
    driver: subprocess.Popen[str], undisturbed: dict[str, float]
) -> None:
    run_id = last_run().run_id
    end = last_run().silence_s() + 2 * LEASE_S  # longer than a lease
    for _ in range(4):
        assert last_run().observed_state() is RunState.RUNNING
        assert last_run().silence_s() < end
        code, _, errors = fls("resume", run_id)
        assert (code, "is running" in errors) == (2, True), errors
        fls("sync")
        fls("gc", "--keep-runs", "1", "--older-than", "1h", "--apply")
        with pytest.raises(subprocess.TimeoutExpired):
            driver.wait(LEASE_S / 3)
    output, _ = driver.communicate(timeout=120)
    assert driver.returncode == 0, output
    assert last_run().observed_state() is RunState.DONE
    for cell in last_run().cells.values():
        assert Store(".fls").attempts(cell.key) == [1]
    assert numbers() == undisturbed


def test_a_dead_run_is_interrupted_and_goes_on(
    driver: subprocess.Popen[str], undisturbed: dict[str, float]
) -> None:
    run_id = last_run().run_id
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    wait_for(lambda: last_run().observed_state() is RunState.INTERRUPTED, 5 * LEASE_S)
    code, output, errors = fls("resume", run_id)
    assert code == 0, output + errors
    assert "goes on from step" in fls("logs", "slow")[1]
    assert numbers() == undisturbed
