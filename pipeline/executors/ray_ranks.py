"""Several workers on Ray that run one task: placed, connected and ended by Ray Train.

It places all of them or none, and when one fails it ends the others.
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
from pipeline.worker.worker import Outcome, Seat, Task, died, run_task


class Notice:
    """An actor that tells the first rank of a cell to end, and when the other ranks have ended."""

    def __init__(self) -> None:
        self._given: dict[str, asyncio.Event] = {}
        self._ended: defaultdict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(0))

    async def forget(self, cell: str) -> None:
        """Take it that the cell has not begun: another attempt at it follows."""
        self._given.pop(cell, None)
        self._ended.pop(cell, None)

    async def end(self, cell: str) -> None:
        """Take note that one of the ranks after the first has ended well."""
        self._ended[cell].release()

    async def wait_for_others(self, cell: str, count: int) -> None:
        """Return once `count` ranks after the first have ended well."""
        ended = self._ended[cell]
        for _ in range(count):
            await ended.acquire()

    async def wait(self, cell: str) -> None:
        """Return once the cell, whose first rank has begun, is told to end."""
        self._given[cell] = asyncio.Event()
        await self._given[cell].wait()

    async def give(self, cells: Iterable[str]) -> list[str]:
        """Tell cells to end; return those that have begun, which hear it."""
        begun = [cell for cell in cells if cell in self._given]
        for cell in begun:
            self._given[cell].set()
        return begun


def run_ranks(task: Task, resources: Resources, notice: Any) -> Outcome:
    """Run a task in several workers, and return how it ended: what `run_task` is for one.

    Ray Train keeps nothing for us: checkpoints go through the stage's context, results into the
    store, and its own folder is a temporary one.

    Args:
        task: what each of the workers is given, with its seat.
        resources: of each worker, and how many there are.
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

    It is not on the main thread, so signals do not reach it; the first rank waits for the notice.

    Raises:
        _RankFailed: the rank did not end well, so the others must end, too.
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
        time.sleep(WAIT_FOR_THE_CAUSE_S)  # another's death, perhaps, which Ray notices meanwhile
    raise _RankFailed(json.dumps(outcome))


def _await_notice(notice: Any, cell: str, preemption: Preemption) -> None:
    """Wait for the notice, and pass it on to the stage."""
    with suppress(ray.exceptions.RayError):  # the driver is gone, or the task has ended
        ray.get(notice.wait.remote(cell))
        preemption.asked = True


def _failure(error: Exception) -> Outcome:
    """Return the outcome behind what Ray Train says of a rank that failed."""
    inner = getattr(error, "_base_exc", error)
    if isinstance(inner, _RankFailed):
        outcome: Outcome = json.loads(str(inner))
        return outcome
    return died(f"{type(error).__name__}: {error}")
