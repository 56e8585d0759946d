"""Several workers on Ray, through Ray Train: they meet, and they end together, however they end."""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "pipeline"))

from test_local_executor import collect
from test_worker import events_of
from test_workers import (
    NUMBER,
    OTHER_CODE,
    check_file_changed_under_ranks,
    checkpoints,
    pid_of_rank,
    ranks_task,
)
from toy_runs import alive, ray_executor, wait_for

from pipeline.base.errors import BadInput
from pipeline.executors.base import AbstractExecutor
from pipeline.stage import Resources
from pipeline.store.store import Store

TWO_HALVES = Resources(num_cpus=0.5, workers=2)


@pytest.fixture(scope="module")
def instance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AbstractExecutor]:
    with ray_executor(tmp_path_factory.mktemp("plugin")) as executor:
        yield executor


@pytest.fixture
def executor(
    instance: AbstractExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AbstractExecutor:
    monkeypatch.chdir(tmp_path)
    return instance


def test_workers_meet_and_share_a_task(executor: AbstractExecutor) -> None:
    executor.submit(ranks_task(), TWO_HALVES)
    outcome = collect(executor, 1, 120)["cell"]
    assert outcome["status"] == "ok", outcome
    manifest = Store(".fls").manifest("a" * 64)
    assert manifest is not None
    assert manifest.making["workers"] == 2
    folder = Store(".fls").fetch("a" * 64, "number")
    assert str(NUMBER) in (folder / "number.json").read_text()


def test_a_rank_that_dies_takes_all_down(executor: AbstractExecutor) -> None:
    executor.submit(ranks_task(steps=10_000, delay_s=0.02), TWO_HALVES)
    wait_for(lambda: any(event["type"] == "checkpoint" for event in events_of()), 120)
    pids = [pid_of_rank(rank) for rank in (0, 1)]
    os.kill(pids[1], 9)
    outcome = collect(executor, 1, 30)["cell"]
    assert outcome["status"] == "died"
    assert outcome["error"]["message"].startswith("rank 1 of 2: ")
    wait_for(lambda: not any(map(alive, pids)))
    executor.submit(ranks_task(), TWO_HALVES)  # what the driver does next
    assert collect(executor, 1, 120)["cell"]["status"] == "ok"
    texts = [event["text"] for event in events_of(2) if event["type"] == "text"]
    assert any(text.endswith("with 2") for text in texts), texts


def test_an_error_of_any_rank_is_the_tasks(executor: AbstractExecutor) -> None:
    executor.submit(ranks_task(fails="user"), TWO_HALVES)
    outcome = collect(executor, 1, 120)["cell"]
    assert outcome["status"] == "failed"
    assert outcome["error"]["user"]
    assert outcome["error"]["message"] == "rank 1 of 2: rank 1 fails on purpose."


def test_other_code_of_any_rank_is_not_published(executor: AbstractExecutor) -> None:
    executor.submit(ranks_task(ingredients=OTHER_CODE, imports="toy.operations.times"), TWO_HALVES)
    outcome = collect(executor, 1, 120)["cell"]
    assert outcome["error"]["user"]
    assert outcome["error"]["message"].startswith("rank 1 of 2: Module toy.operations.times (")
    assert Store(".fls").manifest("a" * 64) is None


def test_a_file_changed_under_ranks_is_noticed(executor: AbstractExecutor) -> None:
    check_file_changed_under_ranks(executor)


def test_cancelled_workers_are_killed(executor: AbstractExecutor) -> None:
    executor.submit(ranks_task(steps=10_000, delay_s=0.02), TWO_HALVES)
    wait_for(lambda: Path("rank-1-of-2").exists(), 120)
    pids = [pid_of_rank(rank) for rank in (0, 1)]
    executor.cancel("cell")
    wait_for(lambda: not any(map(alive, pids)))
    assert executor.wait(0) == []


def test_told_to_end_the_first_rank_writes_a_checkpoint(executor: AbstractExecutor) -> None:
    executor.submit(ranks_task(steps=10_000, delay_s=0.02, checkpoint_every=10_000), TWO_HALVES)
    wait_for(lambda: Path("rank-1-of-2").exists(), 120)
    pids = [pid_of_rank(rank) for rank in (0, 1)]
    executor.preempt()
    assert collect(executor, 1, 60)["cell"]["status"] == "preempted"
    assert checkpoints()
    wait_for(lambda: not any(map(alive, pids)))


def test_workers_that_wait_for_room_are_dropped_when_told_to_end(
    executor: AbstractExecutor,
) -> None:
    executor.submit(ranks_task(steps=10_000, delay_s=0.02), Resources(num_cpus=50, workers=2))
    time.sleep(5)
    executor.preempt()
    outcome = collect(executor, 1, 60)["cell"]
    assert outcome["status"] == "preempted", outcome


def test_workers_that_no_cluster_has_room_for_are_refused(executor: AbstractExecutor) -> None:
    with pytest.raises(BadInput, match="train asks for 4096 workers, each with num_cpus: 1"):
        executor.check([("train", Resources(workers=4096))])
