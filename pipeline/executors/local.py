"""Runs tasks in plain processes on this machine.

A worker is `python -m pipeline.worker.worker`: it reads JSON tasks from its standard input and
answers with JSON outcomes, one a line. CPU workers stay warm, so that each imports torch once and
not once a cell; a task with a GPU gets a process of its own, the only sure way to get all GPU
memory back. A worker whose input closes kills itself and its children, so no worker outlives the
driver, however the driver died.
"""

from __future__ import annotations

import selectors
import tempfile
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipeline.executors.base import AbstractExecutor, refuse_unsatisfiable
from pipeline.executors.local_worker import LocalWorker, kill_all
from pipeline.executors.machine import Machine, Share
from pipeline.executors.ranks import RankOutcomes
from pipeline.stage import Resources
from pipeline.worker.task import END, OTHERS_ENDED, Outcome, Seat, Task, threads_of


class LocalExecutor(AbstractExecutor):
    """Plain processes, with an account of this machine's CPUs, memory and GPUs."""

    def __init__(self) -> None:
        self._machine = Machine()
        self._queue: deque[tuple[Task, Resources]] = deque()
        self._busy: dict[str, _RankGroup] = {}
        self._idle: list[LocalWorker] = []
        self._selector = selectors.DefaultSelector()

    def check(
        self, demands: Iterable[tuple[str, Resources]], *, may_grow: bool = False
    ) -> list[str]:
        """Refuse demands that exceed this machine when it is idle; it cannot grow."""
        refuse_unsatisfiable(
            (
                f"{cell.partition('[')[0]} asks for {_each(resources)}{lack}"
                for cell, resources in demands
                if (lack := self._machine.lacks(resources))
            ),
            "Change the stage's `resources:`, or run on a cluster with --executor ray.",
        )
        return []

    @property
    def window(self) -> int:
        """Twice the CPUs: small shares of a CPU run side by side, the rest waits in line."""
        return 2 * max(1, int(self._machine.cpus))

    def submit(self, task: Task, resources: Resources) -> None:
        """Queue the task, and start it if its resources are free."""
        self._queue.append((task, resources))
        self._start_fitting()

    def wait(self, timeout_s: float) -> list[tuple[str, Outcome]]:
        """Return finished tasks, waiting up to `timeout_s` for the first."""
        for ready, _ in self._selector.select(timeout_s):
            cell, rank = ready.data
            if self._busy[cell].read(rank):
                self._selector.unregister(ready.fileobj)
        finished = []
        for cell, group in list(self._busy.items()):
            outcome = group.outcomes.verdict()
            if outcome is None:
                continue
            if outcome["status"] == "outdated":  # its workers end; in time a new one takes the task
                self._queue.appendleft((group.task, group.resources))
            else:
                finished.append((cell, outcome))
            self._release(cell)
        self._start_fitting()
        return finished

    def cancel(self, cell: str) -> None:
        """Drop the cell's task and kill the workers that run it."""
        self._queue = deque(item for item in self._queue if item[0]["cell"] != cell)
        if cell in self._busy:
            kill_all(self._busy[cell].workers)
            self._release(cell)

    def preempt(self) -> None:
        """Send SIGTERM to the workers that have a task."""
        self._queue.clear()
        for group in self._busy.values():
            for worker in group.workers:
                worker.preempt()

    def stop(self) -> None:
        """Kill all workers."""
        self._queue.clear()
        workers = [worker for group in self._busy.values() for worker in group.workers]
        kill_all([*workers, *self._idle])
        for cell in list(self._busy):
            self.cancel(cell)
        while self._idle:
            self._idle.pop().close()
        self._selector.close()

    def _start_fitting(self) -> None:
        """Start the queued tasks that fit; none starves an older one by overtaking it."""
        waiting: deque[tuple[Task, Resources]] = deque()
        blocked_cpus = 0.0
        while self._queue:
            task, resources = self._queue.popleft()
            shares = self._machine.take(resources, keep_cpus=blocked_cpus)
            if shares is None:
                blocked_cpus += resources.num_cpus * resources.workers
                waiting.append((task, resources))
                continue
            workers = [self._worker_for(task, share) for share in shares]
            group = self._busy[task["cell"]] = _RankGroup(task, resources, workers, shares)
            for rank, worker in enumerate(workers):
                place = task["cell"], rank
                self._selector.register(worker.replies, selectors.EVENT_READ, place)
            group.send()
        self._queue = waiting

    def _worker_for(self, task: Task, share: Share) -> LocalWorker:
        threads = threads_of(task)
        if not share.devices:
            for worker in self._idle:
                if worker.threads == threads:
                    self._idle.remove(worker)
                    return worker
        return LocalWorker(threads, share.devices)

    def _release(self, cell: str) -> None:
        group = self._busy.pop(cell)
        for rank, (worker, share) in enumerate(zip(group.workers, group.shares, strict=True)):
            if rank not in group.outcomes:
                self._selector.unregister(worker.replies)
            self._machine.give(share)
            if group.reusable(rank) and not share.devices:
                self._idle.append(worker)
            else:
                worker.close()
        group.close()


class _RankGroup:
    """The workers that run one task; several meet through a `torch.distributed.FileStore`."""

    def __init__(
        self,
        task: Task,
        resources: Resources,
        workers: Sequence[LocalWorker],
        shares: Sequence[Share],
    ):
        self.task = task
        self.resources = resources
        self.workers = workers
        self.shares = shares
        self.outcomes = RankOutcomes(len(workers))
        self._folder = tempfile.TemporaryDirectory(prefix="fls-") if len(workers) > 1 else None

    def send(self) -> None:
        """Send the task to each worker, with its rank."""
        if self._folder is None:
            self.workers[0].send(self.task)
            return
        rendezvous = Path(self._folder.name, "ranks").as_uri()
        for rank, worker in enumerate(self.workers):
            seat: Seat = {
                "rank": rank,
                "world_size": len(self.workers),
                "rendezvous": rendezvous,
            }
            worker.send({**self.task, "seat": seat})

    def read(self, rank: int) -> bool:
        """Read a worker's replies; tell whether its outcome, or its end, was among them.

        A rank after the first that was asked to stop passes that on to rank 0, which writes the
        checkpoint.
        """
        outcome = self.workers[rank].read()
        if self.workers[rank].stop_asked:
            self.workers[0].send(END)
        if outcome is not None:
            self.outcomes.add(rank, outcome)
            if rank > 0 and self.outcomes.others_ended_well:
                self.workers[0].send(OTHERS_ENDED)
        return outcome is not None

    def reusable(self, rank: int) -> bool:
        """Tell whether a worker is alive, left its rank group well, and runs current code."""
        if len(self.workers) > 1 and not self.outcomes.ended_well(rank):
            return False
        return self.outcomes.outdated is None and self.workers[rank].alive

    def close(self) -> None:
        """Delete the meeting place."""
        if self._folder is not None:
            self._folder.cleanup()


def _each(wanted: Resources) -> str:
    return f"{wanted.workers} workers, each with " if wanted.workers > 1 else ""
