"""The interface between the driver and whatever runs its tasks."""

from __future__ import annotations

import importlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from enum import StrEnum

from pipeline.base.errors import BadInput
from pipeline.stage import Resources
from pipeline.worker.worker import Outcome, Task


class ExecutorName(StrEnum):
    """The executors there are."""

    RAY = "ray"
    LOCAL = "local"


# Imported by name, because one of them needs Ray and `fls plan` must not pay for that.
_CLASSES = {
    ExecutorName.RAY: "pipeline.executors.ray:RayExecutor",
    ExecutorName.LOCAL: "pipeline.executors.local:LocalExecutor",
}


class AbstractExecutor(ABC):
    """Runs tasks in other processes and hands their outcomes back as plain data.

    A task is known by its cell, so a cell is in flight at most once. Tasks that do not fit yet
    wait inside the executor, in the order in which they came. Used from one thread.
    """

    @abstractmethod
    def check(
        self, demands: Iterable[tuple[str, Resources]], *, may_grow: bool = False
    ) -> list[str]:
        """Refuse demands that could never be met.

        Args:
            demands: (cell, what it needs) of every cell that is to run.
            may_grow: whether machines may join that have what there is not now.

        Returns:
            What will have to wait for such machines, a sentence for each stage.

        Raises:
            BadInput: names each stage that asks for more than there is.
        """

    @property
    @abstractmethod
    def window(self) -> int:
        """How many tasks are worth having in flight: enough that no worker waits for the driver."""

    @abstractmethod
    def submit(self, task: Task, resources: Resources) -> None:
        """Take a task; it starts as soon as its resources are free."""

    @abstractmethod
    def wait(self, timeout_s: float) -> list[tuple[str, Outcome]]:
        """Return (cell, outcome) of what has finished; waits up to `timeout_s` for the first."""

    @abstractmethod
    def cancel(self, cell: str) -> None:
        """Drop the cell's task, killing the process that runs it; no outcome will be reported."""

    @abstractmethod
    def preempt(self) -> None:
        """Tell everything in flight to end behind a checkpoint; what has not begun is dropped.

        Outcomes of what had begun come through `wait`.
        """

    @abstractmethod
    def stop(self) -> None:
        """Kill everything in flight and free what the executor holds; may be called twice.

        Nothing is lost that a kill -9 would not lose as well: stages are written to be resumed
        from their last checkpoint.
        """


def make_executor(name: ExecutorName) -> AbstractExecutor:
    """Start the executor called `name`."""
    module, _, attribute = _CLASSES[name].partition(":")
    executor: AbstractExecutor = getattr(importlib.import_module(module), attribute)()
    return executor


def available_cpus() -> int:
    """Return how many CPUs this process may use, which in a container is fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory_bytes() -> int:
    """Return the machine's physical memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def refuse_unsatisfiable(problems: Iterable[str], remedy: str) -> None:
    """Raise one error for all distinct `problems`, or do nothing when there are none.

    Raises:
        BadInput: there is a problem.
    """
    lines = list(dict.fromkeys(problems))
    if lines:
        raise BadInput("\n".join([*lines, remedy]))
