"""Runs tasks on Ray: on the cluster at RAY_ADDRESS, or on an own instance on this machine.

Only this module, `ray_connection.py`, `ray_ranks.py` and `ray_jobs.py` import Ray. A task's outcome
is plain data, never a pickled exception. Ray retries nothing; the driver does, because it knows
about checkpoints. CPU workers stay warm; a task with a GPU gets a fresh process (`max_calls=1`),
the only sure way to get all GPU memory back.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any

import pipeline.executors.ray_token  # noqa: F401 - both before Ray, which reads what they set

# isort: split
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.base.search_path import search_variable
from pipeline.base.variables import RAY_ADDRESS
from pipeline.executors.base import (
    AbstractExecutor,
    available_cpus,
    refuse_unsatisfiable,
)
from pipeline.executors.ray_connection import connect, searching_here_last
from pipeline.executors.ray_ranks import Notice, run_ranks
from pipeline.stage import Resources
from pipeline.worker.task import Outcome, Task, died, preempted
from pipeline.worker.worker import run_task

# Ray's object store holds only tasks and outcomes; this is about its minimum.
_OBJECT_STORE_BYTES = 100 << 20
_ACCELERATOR = "accelerator_type:"


@contextmanager
def _searching_as_here() -> Iterator[None]:
    """Let processes that start inside the context find modules where this process does."""
    before = os.environ.get("PYTHONPATH")
    named = [path for path in (before or "").split(os.pathsep) if path]
    os.environ["PYTHONPATH"] = os.pathsep.join([*named, *search_variable().values()])
    try:
        yield
    finally:
        os.environ.pop("PYTHONPATH")
        os.environ.update({} if before is None else {"PYTHONPATH": before})


class RayExecutor(AbstractExecutor):
    """Ray tasks, one a cell. Connects to `RAY_ADDRESS` when that names a cluster."""

    def __init__(self) -> None:
        address = RAY_ADDRESS.read()
        if address is not None:
            connect(address)
        else:
            with _searching_as_here():
                ray.init(
                    "local",
                    num_cpus=available_cpus(),
                    object_store_memory=_OBJECT_STORE_BYTES,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    job_config=searching_here_last(),
                )
        # Ray prints a paragraph for each dead worker over the live view. The driver reports the
        # death itself.
        ray._private.worker._worker_logs_enabled = False
        self._warm = ray.remote(max_retries=0)(run_task)
        self._fresh = ray.remote(max_retries=0, max_calls=1)(run_task)
        self._ranks = ray.remote(max_retries=0, num_cpus=0)(run_ranks)
        self._cells: dict[Any, str] = {}  # object reference -> cell
        self._given: dict[str, tuple[Task, Resources]] = {}
        self._grouped: set[str] = set()  # cells that a rank group runs
        # A submitted job's folder, which Ray unpacks on each node.
        self._ships = bool(ray.get_runtime_context().runtime_env.get("working_dir"))

    def check(
        self, demands: Iterable[tuple[str, Resources]], *, may_grow: bool = False
    ) -> list[str]:
        """Refuse cells that fit no node; Ray would let them wait for ever."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        lacking = dict.fromkeys(
            f"{cell.partition('[')[0]} asks for {_describe(resources)}"
            for cell, resources in demands
            if sum(_room(resources, node) for node in nodes) < resources.workers
        )
        if may_grow:
            return [f"{lack}; it waits for a node that has it." for lack in lacking]
        refuse_unsatisfiable(
            (f"{lack}; no node fits: {_describe_nodes(nodes)}." for lack in lacking),
            "Lower the stage's `resources:`, connect to a larger cluster through RAY_ADDRESS, or "
            "declare `cluster: {autoscaling: true}` if this one grows on demand.",
        )
        return []

    @property
    def window(self) -> int:
        """Twice the cluster's CPUs: tasks that wait in Ray's queue make its autoscaler grow."""
        return 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))

    def submit(self, task: Task, resources: Resources) -> None:
        """Hand the task to Ray."""
        self._submit(task, resources, fresh=resources.num_gpus > 0)

    def _submit(self, task: Task, resources: Resources, *, fresh: bool) -> None:
        """Hand the task over, to a process that ends with it if `fresh`."""
        if self._ships:
            task = {**task, "shipped": True}
        self._given[task["cell"]] = task, resources
        if resources.workers > 1:
            self._notice.forget.remote(task["cell"])
            ranks = self._ranks.options(name=task["cell"])
            self._cells[ranks.remote(task, resources, self._notice)] = task["cell"]
            self._grouped.add(task["cell"])
            return
        function = self._fresh if fresh else self._warm
        reference = function.options(
            name=task["cell"],
            num_cpus=resources.num_cpus,
            num_gpus=resources.num_gpus,
            memory=resources.memory_bytes,
            accelerator_type=resources.accelerator_type,
        ).remote(task)
        self._cells[reference] = task["cell"]

    def wait(self, timeout_s: float) -> list[tuple[str, Outcome]]:
        """Return finished tasks, waiting up to `timeout_s` for the first."""
        if not self._cells:
            time.sleep(timeout_s)
            return []
        ray.wait(list(self._cells), num_returns=1, timeout=timeout_s, fetch_local=False)
        ready, _ = ray.wait(list(self._cells), num_returns=len(self._cells), timeout=0)
        finished = []
        for reference in ready:
            cell, outcome = self._cells.pop(reference), _outcome(reference)
            if outcome["status"] == "outdated":  # a fresh process takes the task
                self._submit(*self._given[cell], fresh=True)
            else:
                finished.append((cell, outcome))
        return finished

    def cancel(self, cell: str) -> None:
        """Cancel the cell's task, killing the worker that runs it."""
        for reference in [item for item, name in self._cells.items() if name == cell]:
            del self._cells[reference]
            ray.cancel(reference, force=True)

    def preempt(self) -> None:
        """Cancel gently: Ray drops waiting tasks, and sends SIGINT to the workers of others.

        A rank group that has begun gets a notice.
        """
        asked: set[str] = set()
        if self._grouped:
            cells = [cell for cell in self._cells.values() if cell in self._grouped]
            with suppress(ray.exceptions.RayError):  # its node was lost: they end without notice
                asked = set(ray.get(self._notice.give.remote(cells)))
        for reference, cell in self._cells.items():
            if cell not in asked:
                ray.cancel(reference, force=False)

    @cached_property
    def _notice(self) -> Any:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        return ray.remote(num_cpus=0)(Notice).options(scheduling_strategy=here).remote()

    def stop(self) -> None:
        """Cancel the tasks in flight; an own instance of Ray stops as well."""
        if ray.is_initialized():
            for cell in list(self._cells.values()):
                self.cancel(cell)
            ray.shutdown()


def _outcome(reference: Any) -> Outcome:
    try:
        outcome: Outcome = ray.get(reference)
        return outcome
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ray.exceptions.TaskCancelledError):
            return preempted()  # outside of a stage
        # `run_task` returns errors as data, so this came before it, or is a defect of the runner.
        message = (
            f"the node could not run the task; is this project installed there?\n{error.cause}"
        )
        return {
            "status": "failed",
            "error": {"message": message, "traceback": str(error), "user": True},
        }
    except ray.exceptions.TaskCancelledError:
        return preempted()
    except ray.exceptions.RayError as error:
        # A crashed or preempted worker, a lost node, no memory: worth a retry.
        return died(f"{type(error).__name__}: {error}")


def _room(resources: Resources, node: dict[str, float]) -> int:
    """Return how many workers an idle node has room for, up to the number wanted."""
    wanted = {
        "CPU": resources.num_cpus,
        "GPU": resources.num_gpus,
        "memory": resources.memory_bytes or 0,
    }
    if resources.accelerator_type:
        wanted[_ACCELERATOR + resources.accelerator_type] = 0.001
    rooms = [node.get(name, 0) // amount for name, amount in wanted.items() if amount]
    return int(min([*rooms, resources.workers]))


def _describe(resources: Resources) -> str:
    each = f"{resources.workers} workers, each with " if resources.workers > 1 else ""
    parts = [f"{each}num_cpus: {resources.num_cpus:g}", f"num_gpus: {resources.num_gpus:g}"]
    if resources.memory_bytes:
        parts.append(f"memory: {resources.memory_bytes} bytes")
    if resources.accelerator_type:
        parts.append(f"accelerator_type: {resources.accelerator_type}")
    return ", ".join(parts)


def _describe_nodes(nodes: list[dict[str, float]]) -> str:
    """Return the resources of the nodes, equal nodes together."""
    counts = Counter(map(_describe_node, nodes))
    return (
        "; ".join(f"{count} x ({node})" for node, count in counts.items()) or "the cluster has none"
    )


def _describe_node(node: dict[str, float]) -> str:
    types = [name.partition(":")[2] for name in node if name.startswith(_ACCELERATOR)]
    kinds = f" of type {', '.join(types)}" if types else ""
    return (
        f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs{kinds}, "
        f"{node.get('memory', 0):.0f} bytes of memory"
    )
