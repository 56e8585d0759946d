"""A rank group on Ray: Ray Train places, connects and ends the workers of one task.

It places all workers or none, and ends the others when one fails.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from typing import Any

import pipeline.executors.ray_settings  # noqa: F401 - before Ray, which reads them

# isort: split
import ray

from pipeline.executors.ranks import WAIT_FOR_THE_CAUSE_S, cause
from pipeline.stage import Preemption, Resources
from pipeline.worker.task import Outcome, Seat, Task, died
from pipeline.worker.worker import run_task


class Notice:
    """An actor that asks rank 0 of a cell to stop, and reports the end of the other ranks."""

    def __init__(self) -> None:
        self._given: dict[str, asyncio.Event] = {}
        self._ended: defaultdict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(0))

    async def forget(self, cell: str) -> None:
        """Forget an earlier attempt at the cell."""
        self._given.pop(cell, None)
        self._ended.pop(cell, None)

    async def end(self, cell: str) -> None:
        """Note that a rank after the first has ended well."""
        self._ended[cell].release()

    async def wait_for_others(self, cell: str, count: int) -> None:
        """Return once `count` ranks after the first have ended well."""
        ended = self._ended[cell]
        for _ in range(count):
            await ended.acquire()

    async def wait(self, cell: str) -> None:
        """Note that rank 0 of the cell has begun; return once the cell is asked to stop."""
        self._given[cell] = asyncio.Event()
        await self._given[cell].wait()

    async def give(self, cells: Iterable[str]) -> list[str]:
        """Ask cells to stop; return those that have begun, which get the notice."""
        begun = [cell for cell in cells if cell in self._given]
        for cell in begun:
            self._given[cell].set()
        return begun


def run_ranks(task: Task, resources: Resources, notice: Any) -> Outcome:
    """Run a task in a rank group, and return its outcome, as `run_task` does for one worker.

    Ray Train's folder is temporary: checkpoints go through the stage's context, results into the
    store.

    Args:
        task: the task; each worker gets it with its seat.
        resources: the resources of each worker, and their number.
        notice: handle of the actor `Notice`.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

    each = {"CPU": resources.num_cpus, "GPU": resources.num_gpus}
    if resources.memory_bytes:
        each["memory"] = resources.memory_bytes
    with tempfile.TemporaryDirectory(prefix="fls-") as folder:
        trainer = TorchTrainer(
            _run_rank,
            train_loop_config={"task": task, "notice": notice},
            torch_config=TorchConfig(
                backend="cpu:gloo,cuda:nccl" if resources.num_gpus else "gloo"
            ),
            scaling_config=ScalingConfig(
                num_workers=resources.workers,
                use_gpu=resources.num_gpus > 0,
                resources_per_worker=each,
                accelerator_type=resources.accelerator_type,
            ),
            run_config=RunConfig(
                name="ranks", storage_path=folder, failure_config=FailureConfig(max_failures=0)
            ),
        )
        try:
            outcome: Outcome = getattr(trainer.fit(), "return_value")  # noqa: B009 - since 2.5x
            return outcome
        except WorkerGroupError as error:
            ranks = error.worker_failures.items()
            outcomes = {rank: _failure(one) for rank, one in ranks}
            return cause(outcomes, resources.workers) if outcomes else died(str(error))
        except (TrainingFailedError, ray.exceptions.RayError) as error:
            return died(f"{type(error).__name__}: {error}")


class _RankFailed(Exception):
    """Carries a rank's outcome, as JSON, to where Ray Train was started."""


def _run_rank(given: Any) -> Any:
    """Run a task as one of the ranks that Ray Train has connected.

    This is not the main thread, so signals do not reach it; rank 0 waits for the notice instead.

    Raises:
        _RankFailed: the rank failed, so Ray Train ends the others.
    """
    context = ray.train.get_context()
    task: Task = given["task"]
    seat: Seat = {
        "rank": context.get_world_rank(),
        "world_size": context.get_world_size(),
        "rendezvous": "",
    }
    notice, cell = given["notice"], task["cell"]
    preemption = Preemption()
    if seat["rank"] == 0:
        wait = partial(_await_notice, notice, cell, preemption)
        threading.Thread(target=wait, name="notice", daemon=True).start()

    def await_others() -> None:
        ray.get(notice.wait_for_others.remote(cell, seat["world_size"] - 1))

    outcome = run_task({**task, "seat": seat}, preemption, await_others=await_others)
    if outcome["status"] in {"ok", "lost"}:
        if seat["rank"] > 0:
            ray.get(notice.end.remote(cell))
        return outcome
    if outcome["status"] not in {"preempted", "outdated"} and not outcome["error"]["user"]:
        time.sleep(WAIT_FOR_THE_CAUSE_S)  # Ray may notice the death that caused it
    raise _RankFailed(json.dumps(outcome))


def _await_notice(notice: Any, cell: str, preemption: Preemption) -> None:
    """Wait for the notice, and pass it to the stage."""
    with suppress(ray.exceptions.RayError):  # the driver is gone, or the task has ended
        ray.get(notice.wait.remote(cell))
        preemption.asked = True


def _failure(error: Exception) -> Outcome:
    """Return the outcome inside Ray Train's error for a failed rank."""
    inner = getattr(error, "_base_exc", error)
    if isinstance(inner, _RankFailed):
        outcome: Outcome = json.loads(str(inner))
        return outcome
    return died(f"{type(error).__name__}: {error}")
