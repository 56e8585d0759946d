"""Plain processes as workers."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from test_worker import fail_task, start_task, task_of
from toy_runs import alive, wait_for

from pipeline.base.errors import BadInput, PipelineError
from pipeline.executors import local_worker, machine
from pipeline.executors.base import AbstractExecutor
from pipeline.executors.local import LocalExecutor
from pipeline.executors.machine import Machine, list_gpus
from pipeline.stage import Resources
from pipeline.store.store import Store
from pipeline.worker import system
from pipeline.worker.task import Outcome, Task

ONE_CPU = Resources()


@pytest.fixture
def executor(toy: Path) -> Iterator[LocalExecutor]:
    executor = LocalExecutor()
    executor._machine = Machine(cpus=2, memory=1000, gpus={"0": "NVIDIA H100", "1": "NVIDIA A10"})
    yield executor
    executor.stop()


def named(task: Task, name: str) -> Task:
    return {**task, "cell": name, "key": name.ljust(64, "0")}


def slow_task(name: str = "slow", **params: Any) -> Task:
    fields = {"steps": 1000, "delay_s": 0.05, **params}
    return named(task_of("toy.slow:slow", "SlowParams", fields), name)


def collect(executor: AbstractExecutor, count: int, timeout_s: float = 30) -> dict[str, Outcome]:
    found: dict[str, Outcome] = {}
    end = time.monotonic() + timeout_s
    while len(found) < count:
        assert time.monotonic() < end, f"only {sorted(found)} ended"
        found.update(executor.wait(0.2))
    return found


def pid_of(name: str) -> int:
    store, key = Store(".fls"), name.ljust(64, "0")
    wait_for(lambda: store.attempts(key) and store.read_events(key, 1)[0])
    pid: int = store.read_events(key, 1)[0][0]["pid"]
    return pid


def test_cpu_workers_stay_warm_and_a_gpu_stage_gets_a_fresh_one(executor: LocalExecutor) -> None:
    for name in ("a", "b"):
        executor.submit(named(start_task(), name), ONE_CPU)
        assert collect(executor, 1)[name]["status"] == "ok"
    executor.submit(
        named(start_task(num_gpus=1), "c"), Resources(num_gpus=1, accelerator_type="A10")
    )
    assert collect(executor, 1)["c"]["status"] == "ok"
    assert pid_of("a") == pid_of("b") != pid_of("c")
    assert not alive(pid_of("c"))


def test_no_more_runs_than_there_is_room_for(executor: LocalExecutor) -> None:
    for name in ("a", "b", "c"):
        executor.submit(slow_task(name, steps=4), ONE_CPU)
    assert len(executor._busy) == 2
    assert set(collect(executor, 3)) == {"a", "b", "c"}


def test_a_large_task_is_not_starved_by_small_ones(executor: LocalExecutor) -> None:
    executor.submit(slow_task("a"), ONE_CPU)
    executor.submit(slow_task("large"), Resources(num_cpus=2))
    executor.submit(slow_task("b"), ONE_CPU)
    assert set(executor._busy) == {"a"}
    executor.cancel("a")
    executor.wait(0)
    assert set(executor._busy) == {"large"}


def test_the_death_of_a_worker_is_reported_and_leaves_room(executor: LocalExecutor) -> None:
    for _ in range(3):
        executor.submit(fail_task("exit"), ONE_CPU)
        outcome = collect(executor, 1)["cell"]
        assert outcome["status"] == "died"
        assert "exit code 3" in outcome["error"]["message"]
        assert not outcome["error"]["user"]
    executor.submit(slow_task(), ONE_CPU)
    os.kill(pid_of("slow"), 9)
    assert "SIGKILL; out of memory?" in collect(executor, 1)["slow"]["error"]["message"]


def test_a_cancelled_task_is_killed_and_not_reported(executor: LocalExecutor) -> None:
    executor.submit(slow_task("a"), ONE_CPU)
    pid = pid_of("a")
    executor.cancel("a")
    assert not alive(pid)
    assert executor.wait(0.1) == []


def test_stopping_kills_all(executor: LocalExecutor) -> None:
    for name in ("a", "b", "c"):
        executor.submit(slow_task(name), ONE_CPU)
    pids = [pid_of("a"), pid_of("b")]
    executor.stop()
    assert not any(map(alive, pids))


def test_what_no_machine_has_is_refused_by_name(executor: LocalExecutor) -> None:
    executor.check([("fine", Resources(num_cpus=2, num_gpus=2, memory_bytes=1000))])
    demands = [
        ("train[seed=0]", Resources(num_cpus=3)),
        ("train[seed=1]", Resources(num_cpus=3)),
        ("prune", Resources(num_gpus=1, accelerator_type="T4")),
        ("odd", Resources(num_gpus=0.5)),
        ("big", Resources(memory_bytes=2000)),
    ]
    with pytest.raises(BadInput) as caught:
        executor.check(demands)
    assert str(caught.value).splitlines() == [
        "train asks for num_cpus: 3; this machine has 2.",
        "prune asks for num_gpus: 1 of type T4; this machine has 0.",
        "odd asks for num_gpus: 0.5; the local executor gives whole GPUs: use a whole number, or "
        "share a GPU by --executor ray.",
        "big asks for memory: 2000 bytes; this machine has 1000.",
        "Change the stage's `resources:`, or run on a cluster with --executor ray.",
    ]


def test_a_gpu_is_one_workers_until_it_is_given_back() -> None:
    account = Machine(cpus=8, memory=0, gpus={"0": "H100", "1": "A10", "2": "H100"})
    shares = account.take(Resources(num_gpus=1, accelerator_type="H100", workers=2))
    assert shares is not None
    assert [share.devices for share in shares] == [("0",), ("2",)]
    assert account.take(Resources(num_gpus=2)) is None
    account.give(shares[1])
    (both,) = account.take(Resources(num_gpus=2)) or [None]
    assert both is not None
    assert both.devices == ("1", "2")


def test_gpus_are_listed_as_far_as_they_may_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '0, GPU-a, NVIDIA H100'\necho '1, GPU-b, NVIDIA A10'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert list_gpus() == {"0": "NVIDIA H100", "1": "NVIDIA A10"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-b")
    assert list_gpus() == {"GPU-b": "NVIDIA A10"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert list_gpus() == {}


def deaf(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let SIGKILL reach nobody, as if the kernel held them all in a call; return whom it met."""
    met: list[int] = []
    monkeypatch.setattr(os, "killpg", lambda pid, number: met.append(pid))
    monkeypatch.setattr(local_worker, "_DEATH_S", 0.3)
    return met


def test_a_worker_that_outlives_its_kill_holds_nobody_up(
    executor: LocalExecutor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("first", "second"):
        executor.submit(slow_task(name), ONE_CPU)
    pids = [pid_of(name) for name in ("first", "second")]
    try:
        with monkeypatch.context() as patch:
            met = deaf(patch)
            began = time.monotonic()
            executor.cancel("first")
            assert time.monotonic() - began < 2
            executor.stop()
            assert time.monotonic() - began < 4
        assert set(met) == set(pids)
        assert [record.message.split()[2] for record in caplog.records] == list(map(str, pids))
        assert "does not end after SIGKILL" in caplog.text
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        while system.LEFT_BEHIND:
            system.LEFT_BEHIND.pop().wait()


@pytest.mark.parametrize("killable", [True, False])
def test_a_tool_for_gpus_that_hangs_is_told_in_bounded_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killable: bool
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho $$ >> {tmp_path}/pids\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine, "_GPU_TOOL_S", 0.3)
    monkeypatch.setattr(system, "INTERVAL_S", 0.3)
    monkeypatch.setattr(system, "_DEATH_S", 0.1)
    try:
        with monkeypatch.context() as patch, pytest.raises(PipelineError) as raised:
            if not killable:
                patch.setattr(subprocess.Popen, "kill", lambda self: None)
            began = time.monotonic()
            list_gpus()
        assert time.monotonic() - began < 5
        assert "nvidia-smi gave no answer within 0.3 s" in str(raised.value)
        assert "set CUDA_VISIBLE_DEVICES to an empty text" in str(raised.value)
        emitted: list[dict[str, Any]] = []
        with system.SystemSampler(emitted.append, gpus=True):
            wait_for(lambda: len(emitted) >= 3)
        assert len((tmp_path / "pids").read_text().split()) == 2, "asked again though it hangs"
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert list_gpus() == {}
    finally:
        for pid in map(int, (tmp_path / "pids").read_text().split()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        while system.LEFT_BEHIND:
            system.LEFT_BEHIND.pop().communicate()
