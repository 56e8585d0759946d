"""Runs tasks on Ray: on a cluster that is there, else on one of our own on this machine.

The only file that imports Ray. A task's outcome comes back as plain data, never as a pickled
exception, and Ray retries nothing: the driver does, because it knows about checkpoints. CPU
workers stay warm; a task with a GPU gets a fresh process (`max_calls=1`), because that is the only
way to be sure that all GPU memory comes back.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable
from typing import Any

# Ray's switch for "no cluster beyond this machine": without it, a local instance listens on all
# network interfaces, and whoever reaches it may run code. Read when Ray is imported.
if "RAY_ADDRESS" not in os.environ:
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# `run_task` itself hides the GPUs from CPU tasks; Ray only warns that it will not any more.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray  # noqa: E402 - after the environment it reads

from pipeline.executors.base import (  # noqa: E402
    AbstractExecutor,
    available_cpus,
    refuse_unsatisfiable,
)
from pipeline.stage import Resources  # noqa: E402
from pipeline.worker import Outcome, Task, died, preempted, run_task  # noqa: E402

# No data goes through Ray's object store, only tasks and outcomes; this is about its minimum.
_OBJECT_STORE_BYTES = 100 << 20


class RayExecutor(AbstractExecutor):
    """Ray tasks, one a cell. Connects to `RAY_ADDRESS` when that is set."""

    def __init__(self) -> None:
        if "RAY_ADDRESS" in os.environ:
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
        else:
            ray.init(
                num_cpus=available_cpus(),
                object_store_memory=_OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        # Ray prints a paragraph for each worker that dies, into whatever is on the screen. A death
        # arrives as an outcome, and the driver tells of it.
        ray._private.worker._worker_logs_enabled = False
        self._warm = ray.remote(max_retries=0)(run_task)
        self._fresh = ray.remote(max_retries=0, max_calls=1)(run_task)
        self._cells: dict[Any, str] = {}  # object reference -> cell

    def check(self, demands: Iterable[tuple[str, Resources]]) -> None:
        """Refuse what no single node could run; Ray would let such a task wait for ever."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        refuse_unsatisfiable(
            (
                f"{cell.partition('[')[0]} asks for {_describe(resources)}; "
                f"the largest node has {_largest(nodes)}."
                for cell, resources in demands
                if not any(_fits(resources, node) for node in nodes)
            ),
            "Lower the stage's `resources:`, or connect to a larger cluster through RAY_ADDRESS.",
        )

    @property
    def window(self) -> int:
        """Twice the cluster's CPUs: what waits in Ray's queue tells its autoscaler to grow."""
        return 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))

    def submit(self, task: Task, resources: Resources) -> None:
        """Hand the task to Ray."""
        function = self._fresh if resources.num_gpus else self._warm
        reference = function.options(
            name=task["cell"],
            num_cpus=resources.num_cpus,
            num_gpus=resources.num_gpus,
            memory=resources.memory_bytes,
            accelerator_type=resources.accelerator_type,
        ).remote(task)
        self._cells[reference] = task["cell"]

    def wait(self, timeout_s: float) -> list[tuple[str, Outcome]]:
        """Return what has finished, waiting up to `timeout_s` for the first."""
        if not self._cells:
            time.sleep(timeout_s)
            return []
        ray.wait(list(self._cells), num_returns=1, timeout=timeout_s, fetch_local=False)
        ready, _ = ray.wait(list(self._cells), num_returns=len(self._cells), timeout=0)
        return [(self._cells.pop(reference), _outcome(reference)) for reference in ready]

    def cancel(self, cell: str) -> None:
        """Cancel the cell's task, killing the worker that runs it."""
        for reference in [item for item, name in self._cells.items() if name == cell]:
            del self._cells[reference]
            ray.cancel(reference, force=True)

    def preempt(self) -> None:
        """Cancel gently: Ray drops what waits, and interrupts what runs (SIGINT in its worker)."""
        for reference in self._cells:
            ray.cancel(reference, force=False)

    def stop(self) -> None:
        """Cancel what is in flight; a cluster of our own stops with us."""
        if ray.is_initialized():
            for cell in list(self._cells.values()):
                self.cancel(cell)
            ray.shutdown()


def _outcome(reference: Any) -> Outcome:
    try:
        outcome: Outcome = ray.get(reference)
        return outcome
    except ray.exceptions.RayTaskError as error:
        # `run_task` returns errors as data, so this came before it, or is a defect of ours.
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
        # A crashed or preempted worker, a lost node, no memory: nobody's fault, worth a retry.
        return died(f"{type(error).__name__}: {error}")


def _fits(resources: Resources, node: dict[str, float]) -> bool:
    wanted = {
        "CPU": resources.num_cpus,
        "GPU": resources.num_gpus,
        "memory": resources.memory_bytes or 0,
    }
    if resources.accelerator_type:
        wanted[f"accelerator_type:{resources.accelerator_type}"] = 0.001
    return all(node.get(name, 0) >= amount for name, amount in wanted.items())


def _describe(resources: Resources) -> str:
    parts = [f"num_cpus: {resources.num_cpus:g}", f"num_gpus: {resources.num_gpus:g}"]
    if resources.memory_bytes:
        parts.append(f"memory: {resources.memory_bytes} bytes")
    if resources.accelerator_type:
        parts.append(f"accelerator_type: {resources.accelerator_type}")
    return ", ".join(parts)


def _largest(nodes: list[dict[str, float]]) -> str:
    node = max(nodes, key=lambda item: (item.get("GPU", 0), item.get("CPU", 0)), default={})
    return (
        f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs, "
        f"{node.get('memory', 0):.0f} bytes of memory"
    )
