"""A pipeline of empty cells, and a cluster for it: real workers behind a long queue.

It is a plugin like any other, so that what runs it is what runs everything.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import IO, cast

from pydantic import Field

from pipeline.executors.base import AbstractExecutor
from pipeline.stage import Catalogue, Context, Output, Params, Resources, Stage
from pipeline.worker.task import Outcome, Task

_AHEAD = 8  # tasks that a worker has been sent, so that it does not wait for the driver


class NoopParams(Params):
    """Parameters of `noop`."""

    number: int = Field(0, ge=0, description="number of the cell")


def noop(context: Context) -> None:
    """Write the smallest possible result."""
    (context.output("number") / "number.json").write_text("0", encoding="utf-8")


CATALOGUE = Catalogue(
    stages=[
        Stage(
            name="noop",
            entry="benchmarks._noop:noop",
            params=NoopParams,
            outputs={"number": Output(kind="number")},
            summary="does nothing",
        )
    ]
)


def write_pipeline(path: Path, cells: int, storage: str) -> None:
    """Write a pipeline of `count` independent cells."""
    text = f"""
name: noop
plugins: [benchmarks._noop]
storage: {storage}
stages:
  noop: {{uses: noop, matrix: {{number: {list(range(cells))}}}}}
"""
    path.write_text(text.lstrip(), encoding="utf-8")


class Cluster(AbstractExecutor):
    """Warm workers, with as many queued cells as on a larger cluster.

    The local executor submits few more tasks than there are CPUs, which is no load for a driver.

    Args:
        workers: their number.
        flights: maximum number of submitted tasks, running or queued.
        environment: of the workers.
    """

    def __init__(self, workers: int, flights: int, environment: dict[str, str]):
        self._flights = flights
        self._line: deque[Task] = deque()
        self._at: dict[int, deque[str]] = {index: deque() for index in range(workers)}
        self._selector = selectors.DefaultSelector()
        self._workers = [_Worker(environment) for _ in range(workers)]
        for index, worker in enumerate(self._workers):
            self._selector.register(worker.answers, selectors.EVENT_READ, index)

    def check(
        self, demands: Iterable[tuple[str, Resources]], *, may_grow: bool = False
    ) -> list[str]:
        """See `AbstractExecutor.check`; an empty cell always fits."""
        return []

    @property
    def window(self) -> int:
        """See `AbstractExecutor.window`."""
        return self._flights

    def submit(self, task: Task, resources: Resources) -> None:
        """See `AbstractExecutor.submit`."""
        self._line.append(task)
        self._hand_out()

    def wait(self, timeout_s: float) -> list[tuple[str, Outcome]]:
        """See `AbstractExecutor.wait`."""
        ended = []
        for ready, _ in self._selector.select(timeout_s):
            for outcome in self._workers[ready.data].read():
                ended.append((self._at[ready.data].popleft(), outcome))
        self._hand_out()
        return ended

    def cancel(self, cell: str) -> None:
        """See `AbstractExecutor.cancel`; an empty cell is never cancelled."""

    def preempt(self) -> None:
        """See `AbstractExecutor.preempt`."""
        self._line.clear()

    def stop(self) -> None:
        """See `AbstractExecutor.stop`; a worker whose input closes ends itself."""
        for worker in self._workers:
            worker.stop()
        self._workers = []

    def _hand_out(self) -> None:
        for index, worker in enumerate(self._workers):
            while len(self._at[index]) < _AHEAD and self._line:
                task = self._line.popleft()
                self._at[index].append(task["cell"])
                worker.send(task)


class _Worker:
    """A worker's process, as `pipeline.executors.local` has them."""

    def __init__(self, environment: dict[str, str]):
        self._process = subprocess.Popen(  # noqa: S603 - this interpreter, a fixed module
            [sys.executable, "-m", "pipeline.worker.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        self._tasks = cast(IO[bytes], self._process.stdin)
        self.answers = cast(IO[bytes], self._process.stdout)
        self._read = b""

    def send(self, task: Task) -> None:
        self._tasks.write(json.dumps(task).encode() + b"\n")
        self._tasks.flush()

    def read(self) -> list[Outcome]:
        """Return the outcomes that have arrived.

        Raises:
            EOFError: the worker has ended.
        """
        data = os.read(self.answers.fileno(), 1 << 16)
        if not data:
            raise EOFError("A worker has ended: expected an outcome.")
        *lines, self._read = (self._read + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def stop(self) -> None:
        with self._process:
            self._tasks.close()
