"""Ray as executor: the same outcomes, the same numbers. All tests share one Ray instance."""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_local_executor import named, pid_of, slow_task
from test_worker import fail_task, start_task
from toy_runs import DIAMOND, ROOT, alive, last_run, numbers, ray_executor, run_here, write_spec

from pipeline.base.errors import BadInput
from pipeline.code.syntax import parse_source
from pipeline.executors import ExecutorName
from pipeline.executors.base import AbstractExecutor
from pipeline.running import launch
from pipeline.stage import Resources
from pipeline.store.store import Store
from pipeline.worker.task import Outcome

ONE_CPU = Resources()
HALF_CPU = Resources(num_cpus=0.5)


@pytest.fixture(scope="module")
def instance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AbstractExecutor]:
    with ray_executor(tmp_path_factory.mktemp("plugin")) as executor:
        yield executor


@pytest.fixture
def executor(instance: AbstractExecutor, toy: Path) -> AbstractExecutor:
    return instance


def collect(executor: AbstractExecutor, count: int) -> dict[str, Outcome]:
    found: dict[str, Outcome] = {}
    end = time.monotonic() + 60
    while len(found) < count:
        assert time.monotonic() < end, f"only {sorted(found)} ended"
        found.update(executor.wait(0.2))
    return found


def test_ray_and_local_give_the_same_numbers(
    executor: AbstractExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = DIAMOND + "    slow: {uses: slow, params: {delay_s: 0}}\n"
    write_spec(stages, storage="local")
    assert run_here()[0] == 0
    monkeypatch.setattr(launch, "make_executor", lambda name: executor)
    monkeypatch.setattr(executor, "stop", lambda: None)
    write_spec(stages, storage="ray")
    assert run_here(executor=ExecutorName.RAY)[0] == 0
    assert numbers("ray") == numbers("local") != {}
    keys = [
        {name: status.key for name, status in last_run(storage).cells.items()}
        for storage in ("ray", "local")
    ]
    assert keys[0] == keys[1]


def test_outcomes_are_data_and_workers_stay_warm(executor: AbstractExecutor) -> None:
    for name in ("a", "b"):
        executor.submit(named(start_task(), name), ONE_CPU)
        assert collect(executor, 1)[name]["status"] == "ok"
    assert pid_of("a") == pid_of("b")
    executor.submit(fail_task("user"), ONE_CPU)
    outcome = collect(executor, 1)["cell"]
    assert outcome["error"]["user"]
    assert "on purpose" in outcome["error"]["message"]


def test_a_process_that_has_run_other_code_is_replaced(executor: AbstractExecutor) -> None:
    stages = Path(os.environ["PYTHONPATH"].split(os.pathsep)[-1], "toy/stages.py")
    text, pids = stages.read_text(), []
    for name, source in (("old", text + "\nOLD = 1\n"), ("new", text)):
        stages.write_text(source)
        digest = parse_source(source.encode(), stages, "toy.stages", False).digest
        ingredients = {"stage": "start", "code": {"toy.stages": digest}}
        # The processes that there are have run `text`, and `old` before it.
        executor.submit(named(start_task(ingredients=ingredients), name), ONE_CPU)
        assert collect(executor, 1)[name]["status"] == "ok"
        pids.append(pid_of(name))
        assert Store(".fls").attempts(name.ljust(64, "0")) == [1], "it costs no attempt"
    assert pids[0] != pids[1]


def test_the_death_of_a_worker_is_nobodys_fault(executor: AbstractExecutor) -> None:
    executor.submit(fail_task("exit"), ONE_CPU)
    outcome = collect(executor, 1)["cell"]
    assert outcome["status"] == "died"
    assert "WorkerCrashedError" in outcome["error"]["message"]
    assert not outcome["error"]["user"]


def test_a_cancelled_task_is_killed_and_not_reported(executor: AbstractExecutor) -> None:
    executor.submit(slow_task("a"), HALF_CPU)
    pid = pid_of("a")
    executor.cancel("a")
    end = time.monotonic() + 10
    while alive(pid):
        assert time.monotonic() < end, "still alive"
        time.sleep(0.05)
    assert executor.wait(0) == []


def test_what_no_node_has_is_refused_by_name(executor: AbstractExecutor) -> None:
    executor.check([("fine", ONE_CPU)])
    much, rare = Resources(num_cpus=4096), Resources(accelerator_type="H100")
    with pytest.raises(BadInput, match=r"train asks for num_cpus: 4096, .*; no node fits: 1 x \("):
        executor.check([("train[seed=0]", much), ("train[seed=1]", much)])
    with pytest.raises(BadInput, match="accelerator_type: H100"):
        executor.check([("train", rare)])


def test_what_no_node_has_is_waited_for_where_nodes_may_join(executor: AbstractExecutor) -> None:
    rare = Resources(accelerator_type="H100")
    assert executor.check(
        [("fine", ONE_CPU), ("a[x=1]", rare), ("a[x=2]", rare)], may_grow=True
    ) == [
        "a asks for num_cpus: 1, num_gpus: 0, accelerator_type: H100; it waits for a node that "
        "has it."
    ]


def test_ray_listens_to_this_machine_only(executor: AbstractExecutor) -> None:
    import ray

    assert [node["NodeManagerAddress"] for node in ray.nodes()] == ["127.0.0.1"]
    assert logging.getLogger("ray").level >= logging.ERROR


# -------------------------------------------------------------------- who gets in

KNOCK = """
import sys
from ray._raylet import GcsClient
from ray.exceptions import AuthenticationError
try:
    print(len(GcsClient(address=sys.argv[1]).get_all_node_info(timeout=10)))
except AuthenticationError:
    print("refused")
"""
LOCAL = """
import os, sys
import ray
from pipeline.executors import ExecutorName, make_executor
executor = make_executor(ExecutorName.RAY)
print(os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"], ray.get_runtime_context().gcs_address)
sys.stdout.flush()
sys.stdin.read()
executor.stop()
"""


def knock(address: str, home: Path, **more: str) -> str:
    """Return what a process learns that has only its own home and `more` to show."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", KNOCK, address],
        env={**mine, "HOME": str(home), **more},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout.strip() or done.stderr


def test_an_instance_of_our_own_lets_no_other_user_in(
    executor: AbstractExecutor, tmp_path: Path
) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    assert knock(address, tmp_path) == "refused"
    assert knock(address, tmp_path, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="f" * 32) == "refused"


@pytest.mark.parametrize("address", ["local", ""])
def test_a_local_address_is_none_and_leaves_no_token_in_a_file(
    tmp_path: Path, address: str
) -> None:
    mine = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    process = subprocess.Popen(
        [sys.executable, "-c", LOCAL],
        env={**mine, "HOME": str(tmp_path), "RAY_ADDRESS": address, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        several, _, head = line.strip().partition(" ")
        assert several == "0", line + process.communicate()[1]
        assert knock(head, tmp_path) == "refused"
        assert not (tmp_path / ".ray").exists()
        _, errors = process.communicate("", timeout=60)
        assert (process.returncode, errors) == (0, "")
    finally:
        process.kill()
        process.wait()
