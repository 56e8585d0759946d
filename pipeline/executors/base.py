"""The interface between the driver and the executors of its tasks."""

from __future__ import annotations

import importlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from enum import StrEnum

from pipeline.base.errors import BadInput
from pipeline.stage import Resources
from pipeline.worker.task import Outcome, Task


class ExecutorName(StrEnum):
    """The names of the executors."""

    RAY = "ray"
    LOCAL = "local"


# Imported by name: one of them imports Ray, which `fls plan` must not pay for.
_CLASSES = {
    ExecutorName.RAY: "pipeline.executors.ray:RayExecutor",
    ExecutorName.LOCAL: "pipeline.executors.local:LocalExecutor",
}


class AbstractExecutor(ABC):
    """Runs tasks in other processes and hands their outcomes back as plain data.

    A task is identified by its cell, so a cell is in flight at most once. Tasks that do not fit yet
    wait inside the executor, in order of submission. Used from one thread.
    """

    @abstractmethod
    def check(
        self, demands: Iterable[tuple[str, Resources]], *, may_grow: bool = False
    ) -> list[str]:
        """Refuse demands that no machine can ever meet.

        Args:
            demands: (cell, its demands) of every cell to run.
            may_grow: whether larger machines may join.

        Returns:
            A sentence for each stage that has to wait for such machines.

        Raises:
            BadInput: names each stage that asks for more than the machines have.
        """

    @property
    @abstractmethod
    def window(self) -> int:
        """The number of tasks in flight with which no worker waits for the driver."""

    @abstractmethod
    def submit(self, task: Task, resources: Resources) -> None:
        """Take a task; it starts as soon as its resources are free."""

    @abstractmethod
    def wait(self, timeout_s: float) -> list[tuple[str, Outcome]]:
        """Return (cell, outcome) of finished tasks; waits up to `timeout_s` for the first."""

    @abstractmethod
    def cancel(self, cell: str) -> None:
        """Drop the cell's task and kill the process that runs it; no outcome is reported."""

    @abstractmethod
    def preempt(self) -> None:
        """Ask all running tasks to end after a checkpoint, and drop the others.

        `wait` returns the outcomes of the running ones.
        """

    @abstractmethod
    def stop(self) -> None:
        """Kill all tasks in flight and free all resources; may be called twice.

        As after a kill -9, stages can resume from their last checkpoint.
        """


def make_executor(name: ExecutorName) -> AbstractExecutor:
    """Start the executor called `name`."""
    module, _, attribute = _CLASSES[name].partition(":")
    executor: AbstractExecutor = getattr(importlib.import_module(module), attribute)()
    return executor


def available_cpus() -> int:
    """Return how many CPUs this process may use; in a container, fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory_bytes() -> int:
    """Return the machine's physical memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def refuse_unsatisfiable(problems: Iterable[str], remedy: str) -> None:
    """Raise one error for all distinct `problems`, if any.

    Raises:
        BadInput: there is a problem.
    """
    lines = list(dict.fromkeys(problems))
    if lines:
        raise BadInput("\n".join([*lines, remedy]))
