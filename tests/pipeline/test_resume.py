"""Runs that are killed, stopped, and go on."""

import errno
import os
import re
import shlex
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from toy_runs import (
    alive,
    checkpoint_exists,
    fls,
    kill,
    last_run,
    log_lines,
    numbers,
    ran,
    resume_here,
    run_here,
    start_fls,
    states,
    wait_for,
    write_spec,
)

from pipeline.base.errors import BadInput
from pipeline.base.states import CellState, RunState
from pipeline.cli.options import read_duration
from pipeline.running.runs import find_run, new_run_id
from pipeline.stage import Context
from pipeline.store.store import Store

STAGES = """
    start: {uses: start, params: {value: 10}}
    slow: {uses: slow, inputs: {number: start}, params: {steps: 60, delay_s: 0.05}}
    add: {uses: add, inputs: {number: slow}}
"""
RUN = ("run", "--executor", "local", "--tracking", "jsonl")


def slow_events(attempt: int) -> list[dict[str, Any]]:
    return Store(".fls").read_events(last_run().cells["slow"].key, attempt)[0]


@pytest.fixture
def undisturbed(toy: Path) -> float:
    """Return what the slow stage gives when nobody interferes."""
    write_spec(STAGES, storage=".fls-undisturbed")
    assert run_here(overrides=["slow.delay_s=0"])[0] == 0
    (toy / "ran").unlink()
    write_spec(STAGES)
    return numbers(".fls-undisturbed")["slow"]


def test_a_killed_driver_takes_its_workers_along_and_its_run_goes_on(undisturbed: float) -> None:
    process = start_fls(*RUN)
    wait_for(checkpoint_exists)
    assert kill(process, signal.SIGKILL) == -signal.SIGKILL
    pid = slow_events(1)[0]["pid"]
    wait_for(lambda: not alive(pid))
    interrupted = last_run()
    assert interrupted.state is RunState.RUNNING
    assert interrupted.observed_state() is RunState.INTERRUPTED
    assert "interrupted" in fls("status")[1]

    code, _, errors = fls("resume", "last")
    assert (code, errors) == (0, "")
    assert len(Store(".fls").list_runs()) == 1
    assert last_run().observed_state() is RunState.DONE
    assert states(last_run()) == dict.fromkeys(("start", "slow", "add"), CellState.DONE)
    assert ran() == {"start": 1, "slow": 1, "add": 1}
    assert numbers()["slow"] == undisturbed
    texts = [event["text"] for event in slow_events(2) if event["type"] == "text"]
    assert texts[0].startswith("goes on from step")
    first = [event["step"] for event in slow_events(2) if event["type"] == "metrics"][0]
    assert first > 1
    # No step is missing in what was said before and after the kill.
    said = [event for attempt in (1, 2) for event in slow_events(attempt)]
    steps = {event["step"] for event in said if event["type"] == "metrics" and event["step"]}
    assert steps == set(range(1, 61))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_says_so_and_goes_on(undisturbed: float, number: int) -> None:
    process = start_fls(*RUN)
    wait_for(checkpoint_exists)
    assert kill(process, number) == 128 + number
    assert not alive(slow_events(1)[0]["pid"])
    assert last_run().observed_state() is RunState.STOPPED
    assert states(last_run())["slow"] is CellState.WAITING
    code, output = resume_here(last_run())
    assert code == 0
    assert last_run().pid == os.getpid()
    assert numbers()["slow"] == undisturbed
    assert ran() == {"start": 1, "slow": 1, "add": 1}
    assert resume_here(last_run()) == (
        0,
        f"Nothing to do: run {last_run().run_id} is complete.\n",
    )


UNHURRIED = """
    slow: {uses: slow, params: {steps: 100, delay_s: 0.05, checkpoint_every: 1000}}
"""


def steps_of(attempt: int) -> list[int]:
    said = slow_events(attempt)
    return [event["step"] for event in said if event["type"] == "metrics" and event["step"]]


def begun() -> bool:
    try:
        return last_run().cells["slow"].progress is not None
    except (IndexError, BadInput):  # no run yet, or none that is written down whole
        return False


@pytest.mark.parametrize("executor", ["local", "ray"])
def test_a_stopped_run_loses_no_step(toy: Path, executor: str) -> None:
    write_spec(UNHURRIED)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as of what a shell runs with `&`
    process = start_fls("run", "--executor", executor, "--tracking", "jsonl")
    signal.signal(signal.SIGINT, before)
    wait_for(begun, 60)
    assert kill(process, signal.SIGTERM) == 128 + signal.SIGTERM
    assert slow_events(1)[-1]["status"] == "preempted"
    assert last_run().observed_state() is RunState.STOPPED
    assert states(last_run())["slow"] is CellState.WAITING
    assert fls("run", *RUN[1:])[0] == 0
    assert steps_of(1) + steps_of(2) == list(range(1, 101))
    assert steps_of(1) and steps_of(2)


def test_a_worker_whose_machine_is_taken_away_ends_behind_a_checkpoint(toy: Path) -> None:
    write_spec(UNHURRIED.replace("params", "retries: 0, params"))
    process = start_fls(*RUN)
    for attempt in (1, 2):  # more often than it may fail
        wait_for(partial(has_begun, attempt))
        os.kill(slow_events(attempt)[0]["pid"], signal.SIGTERM)
        wait_for(partial(has_ended, attempt))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "slow: it was asked to stop, and ended after a checkpoint" in output
    assert sum(map(steps_of, slow_attempts()), []) == list(range(1, 101))


def has_begun(attempt: int) -> bool:
    try:
        return attempt in slow_attempts() and bool(steps_of(attempt))
    except (IndexError, BadInput):  # no run yet, or none that is written down whole
        return False


def has_ended(attempt: int) -> bool:
    return slow_events(attempt)[-1]["type"] == "end"


def slow_attempts() -> list[int]:
    return Store(".fls").attempts(last_run().cells["slow"].key)


def test_a_worker_that_is_killed_is_replaced(undisturbed: float) -> None:
    process = start_fls(*RUN)
    wait_for(checkpoint_exists)
    pid = slow_events(1)[0]["pid"]
    os.kill(pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "slow: The worker process died by signal SIGKILL" in output
    assert numbers()["slow"] == undisturbed
    assert slow_events(2)[0]["pid"] != pid


def test_a_run_that_is_running_is_not_resumed(toy: Path) -> None:
    write_spec(STAGES)
    process = start_fls(*RUN)
    try:
        wait_for(checkpoint_exists)
        code, _, errors = fls("resume", "last")
        assert code == 2
        assert f"is running: process {process.pid} on" in errors
        assert "running" in fls("status", "last")[1]
    finally:
        kill(process)


def test_a_failed_run_goes_on_where_it_failed(toy: Path) -> None:
    write_spec(
        """
        good: {uses: start, params: {value: 1}}
        bad: {uses: fail, inputs: {number: good}, params: {counter: counter, until: 1}}
        end: {uses: add, inputs: {number: bad}}
        """
    )
    assert run_here()[0] == 1
    assert states(last_run())["end"] is CellState.SKIPPED
    assert resume_here(last_run())[0] == 0
    assert ran() == {"good": 1, "bad": 1, "end": 1}
    assert set(states(last_run()).values()) == {CellState.DONE}


def test_a_run_goes_on_as_it_was_asked_for_whatever_the_file_says_now(toy: Path) -> None:
    path = write_spec(
        """
        bad: {uses: fail, params: {counter: counter, until: 1}}
        end: {uses: add, matrix: {amount: [1, 2]}, inputs: {number: bad}}
        """
    )
    run_here(overrides=["end.amount=[5]"])
    path.write_text(path.read_text().replace("[1, 2]", "[3, 4]"))
    assert resume_here(last_run())[0] == 0
    assert numbers()["end[amount=5]"] == 6.0
    assert "end[amount=1]" not in ran()


def test_a_run_is_found_by_the_beginning_of_its_id(toy: Path) -> None:
    write_spec("start: {uses: start, params: {value: 1}}")
    run_here()
    run_here(selection=None, overrides=["start.value=2"])
    store = Store(".fls")
    first, second = store.list_runs()
    assert find_run(store, "last").run_id == second
    assert find_run(store, first).run_id == first
    with pytest.raises(BadInput, match="matches several runs"):
        find_run(store, "20")
    with pytest.raises(BadInput, match="has no run 'x'"):
        find_run(store, "x")


def test_run_ids_of_one_driver_sort_by_time() -> None:
    ids = []
    for _ in range(20):
        ids.append(new_run_id())
        time.sleep(0.002)
    assert ids == sorted(ids)
    assert len({one[:15] for one in ids}) <= 2, "the seconds alone cannot have ordered them"


def test_a_run_that_is_out_of_time_stops_and_a_later_one_goes_on(undisturbed: float) -> None:
    code, output, _ = fls(*RUN, "--stop-after", "2s")
    assert code == 128 + signal.SIGTERM
    assert "resumes it" in output
    assert last_run().observed_state() is RunState.STOPPED
    assert (states(last_run())["start"], states(last_run())["add"]) == (
        CellState.DONE,
        CellState.WAITING,
    )
    assert checkpoint_exists()
    assert fls(*RUN, "--stop-after", "1h")[0] == 0
    assert numbers()["slow"] == undisturbed
    assert ran() == {"start": 1, "slow": 1, "add": 1}
    texts = [event["text"] for event in slow_events(2) if event["type"] == "text"]
    assert texts[0].startswith("goes on from step")


def test_a_stopped_run_names_the_command_that_goes_on_with_it(toy: Path) -> None:
    write_spec(STAGES, storage="elsewhere").rename("other file.yaml")
    _, output, _ = fls("run", "other file.yaml", *RUN[1:], "--stop-after", "2s")
    (hint,) = re.findall("`(fls resume .*)` resumes it", output)
    assert hint in fls("status", "last", "--file", "other file.yaml")[1]
    assert fls(*shlex.split(hint)[1:])[0] == 0
    assert ran() == {"start": 1, "slow": 1, "add": 1}


@pytest.mark.parametrize("text", ["9", "m", "-1s", "nans", "0m", "1w"])
def test_a_duration_needs_a_number_above_0_and_a_unit(text: str) -> None:
    with pytest.raises(ValueError):
        read_duration(text)


def test_durations_are_read_in_seconds() -> None:
    assert [read_duration(text) for text in ("90s", "9m", "1.5h", "30d")] == [
        90,
        540,
        5400,
        2592000,
    ]


def test_hints_say_where_a_run_was_looked_for(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_spec("bad: {uses: fail, params: {how: user}}").rename("p.yaml")
    assert fls("run", "p.yaml", *RUN[1:])[0] == 1
    run_id = last_run().run_id
    assert (
        f"`fls resume {run_id} --file p.yaml` resumes it"
        in fls("status", "last", "--file", "p.yaml")[1]
    )
    (toy / "elsewhere").mkdir()
    monkeypatch.chdir(toy / "elsewhere")
    where = ("--storage", "../.fls")
    resumed = fls("resume", "last", *where, "--trust")[1]
    for output in (fls("status", "last", *where)[1], resumed):
        assert f"fls logs bad --run {run_id} --storage ../.fls" in output
        assert "p.yaml`" not in output
    assert f"`fls resume {run_id} --storage ../.fls` resumes it" in fls("status", "last", *where)[1]


def test_what_ran_when_its_driver_died_is_interrupted(toy: Path) -> None:
    write_spec("slow: {uses: slow, params: {steps: 600, delay_s: 0.05}}")
    process = start_fls(*RUN)
    wait_for(checkpoint_exists)
    wait_for(lambda: states(last_run()).get("slow") is CellState.RUNNING)
    assert kill(process, signal.SIGKILL) == -signal.SIGKILL
    lines = [line.split() for line in fls("status", "last")[1].splitlines()]
    header, row = (next(line for line in lines if line[0] == name) for name in ("stage", "slow"))
    shown = dict(zip(header, row, strict=True))
    assert (shown["running"], shown["interrupted"]) == ("·", "1")
    assert fls("logs", "slow", "--follow")[1].endswith("slow: interrupted\n")


def test_a_checkpoint_that_is_damaged_is_said_to_be_passed_over(undisturbed: float) -> None:
    process = start_fls(*RUN)
    wait_for(checkpoint_exists)
    kill(process)
    for digests in Path(".fls").glob("stages/*/attempts/0001/checkpoints/*/.digests.json"):
        digests.write_text("{}")
    assert resume_here(last_run())[0] == 0
    assert numbers()["slow"] == undisturbed
    said = [event["text"] for event in slow_events(2) if event["type"] == "text"]
    assert "Not resumed from: checkpoint " in said[0]
    assert any(
        "Not resumed from: checkpoint " in line
        for line in log_lines(last_run().cells["slow"].key, 2)
    )


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM], ids=errno.errorcode.get)
def test_a_checkpoint_of_another_owner_or_device_is_said_to_be_passed_over(
    toy: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    store, key = Store(".fls"), "k" * 64
    first = store.begin_attempt(key)
    with Context(params=None, folder=first.folder).checkpoint() as folder:
        (folder / "state.txt").write_text("one")
    first.append_events([{"type": "checkpoint"}])
    real = os.link

    def link(source: Any, target: Any, **options: Any) -> None:
        if "/checkpoints/" in str(source):
            raise OSError(number, os.strerror(number))
        real(source, target, **options)

    monkeypatch.setattr(os, "link", link)
    (text,) = store.begin_attempt(key).passed_over
    assert text.startswith("checkpoint 1 of attempt 1 (")
    assert os.strerror(number) in text
