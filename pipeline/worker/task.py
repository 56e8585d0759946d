"""A task and its outcome: the plain data between the driver, the executors and the workers."""

from __future__ import annotations

import signal
from typing import Any, NotRequired, TypedDict

from pipeline.store.attempt import Failure

END = "end"  # to a local worker: end the task after a checkpoint
OTHERS_ENDED = "others ended"  # to the worker of rank 0: all other ranks have ended well
STOP_ASKED = "stop asked"  # from the worker of another rank: a signal asked it to stop
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # signals that ask a process to stop


class TaskInput(TypedDict):
    """One connected upstream output; `available` is False when its cell failed."""

    cell: str
    stage: str
    key: str
    axes: dict[str, Any]
    output: str
    available: bool


class Seat(TypedDict):
    """The place of one rank in a rank group; see `Context` for the attributes."""

    rank: int
    world_size: int
    rendezvous: str


class Task(TypedDict):
    """One attempt at one cell, as plain data.

    `entry` and `params_model` are `module:attribute`. `calls` lists the further functions that
    stored files may have the stage import and call (see `pipeline.stage.call_text`). `token`
    identifies the storage. `host` is the driver's, and `directory` its working directory, where
    relative paths in parameters start. An executor adds a `seat` for each rank of a rank group, and
    `shipped` where each node has its own copy of the directory, in which its workers start.
    """

    run: str
    cell: str
    key: str
    storage: str
    token: str
    entry: str
    params_model: str
    params: dict[str, Any]
    calls: list[str]
    inputs: dict[str, list[TaskInput]]
    outputs: list[str]
    ingredients: dict[str, Any]
    num_cpus: float
    num_gpus: float
    checkpoint_every_s: float
    log_bytes: int
    host: str
    directory: str
    shipped: NotRequired[bool]
    seat: NotRequired[Seat]


class Outcome(TypedDict, total=False):
    """The end of an attempt.

    `status` is `ok`; `lost` (another attempt published first, which is as good); or, with an
    `error`, one of:

    - `failed`;
    - `damaged`: an input differs from its manifest; `key` is the input's;
    - `preempted`: the attempt was asked to stop, and ended after a checkpoint;
    - `outdated`: the process has run other code for an earlier task, or may hold other data, and
      did nothing; the executor gives the task to another process, unknown to the driver;
    - `died`: set by the executor for a worker that ended without an outcome.
    """

    status: str
    key: str
    seconds: float
    error: Failure


def unable(status: str, message: str, *, user: bool = False) -> Outcome:
    """Return the outcome of an attempt that ended without an exception to show."""
    return {"status": status, "error": {"message": message, "traceback": "", "user": user}}


def died(message: str) -> Outcome:
    """Return the outcome of a task whose process ended without one."""
    return unable("died", message)


def preempted() -> Outcome:
    """Return the outcome of a task that was asked to stop."""
    return unable("preempted", "it was asked to stop, and ended after a checkpoint")


def threads_of(task: Task) -> int:
    """Return how many threads the task may compute with: one for each whole CPU, at least one."""
    return max(1, int(task["num_cpus"]))


def seat_of(task: Task) -> Seat:
    """Return the place of a task in its rank group, that of the only rank without one."""
    return task.get("seat") or {"rank": 0, "world_size": 1, "rendezvous": ""}
