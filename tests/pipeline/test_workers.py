"""Stages that several processes run together: `workers: N`."""

import hashlib
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_local_executor import collect, named, slow_task
from test_worker import events_of, task_of
from toy_runs import TOY, alive, last_run, numbers, run_here, wait_for, write_spec

from pipeline.base.errors import BadInput, SpecError
from pipeline.executors.base import AbstractExecutor
from pipeline.executors.local import LocalExecutor
from pipeline.executors.machine import Machine
from pipeline.spec.load import load_spec
from pipeline.stage import Resources
from pipeline.store.store import Store
from pipeline.worker.task import Task

NUMBER = 241  # of six steps, whatever the number of workers
TWO = Resources(workers=2)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalExecutor]:
    """One executor for all tests: its workers, once they have imported torch, stay warm."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(TOY, folder / "toy")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        executor = LocalExecutor()
        executor._machine = Machine(cpus=2, memory=1000, gpus={})
        yield executor
        executor.stop()


@pytest.fixture
def executor(machine: LocalExecutor, toy: Path) -> Iterator[LocalExecutor]:
    yield machine
    for cell in list(machine._busy):
        machine.cancel(cell)


def ranks_task(*, ingredients: dict[str, Any] | None = None, **params: Any) -> Task:
    found = {"stage": "ranks", **(ingredients or {})}
    return task_of("toy.ranks:ranks", "RanksParams", params, ingredients=found)


OTHER_CODE = {"code": {"toy.operations.times": "0" * 64}}  # of what rank 1 alone imports


def check_file_changed_under_ranks(executor: AbstractExecutor) -> None:
    """Change a file back and forth while two ranks run; nothing is published."""
    file = Path("number.txt")
    file.write_text("3")
    files = {"files": {"path": hashlib.sha256(b"3").hexdigest()}}
    executor.submit(
        ranks_task(ingredients=files, steps=150, delay_s=0.02, path="number.txt"),
        Resources(num_cpus=0.5, workers=2),
    )
    wait_for(lambda: Path("rank-1-of-2").exists(), 120)
    file.write_text("4")
    file.write_text("3")
    outcome = collect(executor, 1, 120)["cell"]
    assert outcome["status"] == "failed", outcome
    assert outcome["error"]["user"]
    assert "File number.txt (params.path, on " in outcome["error"]["message"]
    assert "data that the stage has read are not known" in outcome["error"]["message"]
    assert Store(".fls").manifest("a" * 64) is None


def checkpoints(attempt: int = 1) -> list[dict[str, Any]]:
    return [event for event in events_of(attempt) if event["type"] == "checkpoint"]


def pid_of_rank(rank: int) -> int:
    path = Path(f"rank-{rank}-of-2")
    wait_for(lambda: path.exists() and path.read_text())
    return int(path.read_text())


def test_workers_are_no_part_of_the_key_and_stand_in_the_manifest(toy: Path) -> None:
    stages = "    ranks: {uses: ranks, params: {steps: 6}, workers: %d}\n"
    keys = []
    for workers in (1, 2):
        write_spec(stages % workers, storage=f"with-{workers}")
        code, output = run_here()
        assert code == 0, output
        (status,) = last_run(f"with-{workers}").cells.values()
        manifest = Store(f"with-{workers}").manifest(status.key)
        assert manifest is not None
        assert manifest.making["workers"] == workers
        assert numbers(f"with-{workers}") == {"ranks": NUMBER}
        keys.append(status.key)
    assert keys[0] == keys[1]
    assert sorted(path.name for path in Path().glob("rank-*")) == [
        "rank-0-of-1",
        "rank-0-of-2",
        "rank-1-of-2",
    ]


def test_only_a_stage_that_declares_it_takes_several_workers(toy: Path) -> None:
    write_spec("start: {uses: start, params: {value: 1}, workers: 2}")
    with pytest.raises(SpecError, match=r"'start' runs in one process; several .* are for ranks"):
        load_spec(Path("pipeline.yaml"))
    write_spec("ranks: {uses: ranks, workers: 2, resources: {num_gpus: 0.5}}")
    with pytest.raises(SpecError, match=r"workers cannot share a GPU.*got 0\.5"):
        load_spec(Path("pipeline.yaml"))
    write_spec("ranks: {uses: ranks, workers: 0}")
    with pytest.raises(SpecError, match="workers"):
        load_spec(Path("pipeline.yaml"))


def test_a_rank_that_dies_takes_all_down_and_the_next_attempt_goes_on(
    executor: LocalExecutor,
) -> None:
    executor.submit(ranks_task(steps=1000, delay_s=0.02), TWO)
    pids = [pid_of_rank(rank) for rank in (0, 1)]
    wait_for(checkpoints)
    os.kill(pids[1], 9)
    outcome = collect(executor, 1)["cell"]
    assert outcome["status"] == "died"
    assert "rank 1 of 2: The worker process died by signal SIGKILL" in outcome["error"]["message"]
    assert not any(map(alive, pids))
    assert executor._machine._free_cpus == 2  # nothing is held any more


def test_a_checkpoint_serves_any_number_of_workers(executor: LocalExecutor) -> None:
    for attempt, workers in enumerate((1, 2), start=1):
        executor.submit(ranks_task(delay_s=0.2), Resources(workers=workers))
        wait_for(lambda: checkpoints(attempt))  # noqa: B023 - it waits here
        executor.cancel("cell")
    executor.submit(ranks_task(), Resources(workers=1))
    assert collect(executor, 1)["cell"]["status"] == "ok"
    texts = [event["text"] for n in (2, 3) for event in events_of(n) if event["type"] == "text"]
    assert texts == ["goes on from step 2 with 2", "goes on from step 4 with 1"]
    folder = Store(".fls").fetch("a" * 64, "number")
    assert str(NUMBER) in (folder / "number.json").read_text()


def test_an_error_of_any_rank_is_the_tasks(executor: LocalExecutor) -> None:
    executor.submit(ranks_task(fails="user"), TWO)
    outcome = collect(executor, 1)["cell"]
    assert outcome["status"] == "failed"
    assert outcome["error"]["user"]
    assert outcome["error"]["message"] == "rank 1 of 2: rank 1 fails on purpose."
    assert not alive(pid_of_rank(0))


def test_other_code_of_rank_1_alone_is_not_published(executor: LocalExecutor) -> None:
    executor.submit(ranks_task(ingredients=OTHER_CODE, imports="toy.operations.times"), TWO)
    outcome = collect(executor, 1)["cell"]
    assert outcome["error"]["user"]
    assert outcome["error"]["message"].startswith("rank 1 of 2: Module toy.operations.times (")
    assert Store(".fls").manifest("a" * 64) is None


def test_a_file_changed_under_ranks_is_noticed(executor: LocalExecutor) -> None:
    check_file_changed_under_ranks(executor)


def test_workers_stay_warm_and_are_accounted_for_each(executor: LocalExecutor) -> None:
    executor.submit(named(slow_task(), "one"), Resources())
    executor.submit(ranks_task(), TWO)
    assert set(executor._busy) == {"one"}  # all workers or none
    executor.cancel("one")
    executor.wait(0)
    assert set(executor._busy) == {"cell"}
    assert collect(executor, 1)["cell"]["status"] == "ok"
    with pytest.raises(BadInput, match=r"train asks for 3 workers, each with num_cpus: 1; .* 2\."):
        executor.check([("train", Resources(workers=3))])


def test_told_to_end_the_first_rank_writes_a_checkpoint(executor: LocalExecutor) -> None:
    executor.submit(ranks_task(steps=1000, delay_s=0.02, checkpoint_every=1000), TWO)
    pids = [pid_of_rank(rank) for rank in (0, 1)]
    executor.preempt()
    assert collect(executor, 1)["cell"]["status"] == "preempted"
    assert checkpoints()
    assert not any(map(alive, pids))


def test_whichever_rank_is_told_to_end_the_first_one_writes_the_checkpoint(
    executor: LocalExecutor,
) -> None:
    executor.submit(ranks_task(steps=1000, delay_s=0.02, checkpoint_every=1000), TWO)
    pids = [pid_of_rank(rank) for rank in (0, 1)]
    os.kill(pids[1], signal.SIGTERM)
    assert collect(executor, 1)["cell"]["status"] == "preempted"
    assert len(checkpoints()) == 1
    assert not any(map(alive, pids))
    executor.submit(ranks_task(), TWO)  # another attempt knows nothing of that
    assert collect(executor, 1)["cell"]["status"] == "ok"
