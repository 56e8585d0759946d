"""A terminal that is closed stops a run as SIGTERM does: behind a checkpoint."""

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from toy_runs import ROOT, checkpoint_exists, fls, last_run, start_fls, wait_for, write_spec

from pipeline.base.states import RunState

SLOW = "slow: {uses: slow, params: {steps: 400, delay_s: 0.05, checkpoint_every: 5}}"
RUN = ("run", "--executor", "local", "--tracking", "jsonl")


def stopped_in_order(toy: Path) -> None:
    assert last_run().state is RunState.STOPPED
    events = "".join(path.read_text() for path in toy.glob(".fls/stages/*/attempts/0001/events/*"))
    assert '"status": "preempted"' in events


def test_sighup_is_as_sigterm(toy: Path) -> None:
    write_spec(SLOW)
    process = start_fls(*RUN)
    wait_for(checkpoint_exists)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGHUP)  # a shell and the kernel both send it
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (128 + signal.SIGTERM, "")
    assert "resumes it" in output
    stopped_in_order(toy)


def test_a_closed_terminal_stops_the_run_in_order(toy: Path) -> None:
    write_spec(SLOW.replace("400", "120"))
    pid, terminal = pty.fork()
    if pid == 0:  # a session of its own, led by the command
        os.environ["PYTHONPATH"] = str(ROOT)
        os.execv(sys.executable, [sys.executable, "-m", "pipeline", *RUN])  # noqa: S606
    shown = b""
    while not checkpoint_exists():
        shown += os.read(terminal, 1 << 16)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGTERM, shown.decode()
    stopped_in_order(toy)
    assert fls("resume", last_run().run_id)[0] == 0


def test_a_run_under_nohup_goes_on(toy: Path) -> None:
    write_spec(SLOW.replace("400", "40"))
    process = subprocess.Popen(
        ["nohup", sys.executable, "-m", "pipeline", *RUN],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    wait_for(checkpoint_exists)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 0
    assert last_run().state is RunState.DONE


@pytest.mark.parametrize("number", [signal.SIGHUP])
def test_a_worker_that_gets_sighup_ends_behind_a_checkpoint(toy: Path, number: Any) -> None:
    from test_resume import slow_events

    write_spec(SLOW.replace("400", "60"))
    process = start_fls(*RUN)
    wait_for(checkpoint_exists)
    os.kill(slow_events(1)[0]["pid"], number)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, ""), output
    assert slow_events(1)[-1]["status"] == "preempted"
