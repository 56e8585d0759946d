"""A worker process on this machine, and the pipes to it."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Sequence
from typing import IO

from pipeline.base.search_path import python_command, search_variable
from pipeline.worker.system import LEFT_BEHIND, oom_kills
from pipeline.worker.task import STOP_ASKED, Outcome, Task, died

_log = logging.getLogger(__name__)
_LOG_TAIL_BYTES = 2000
_DEATH_S = 5.0  # how long to wait for a killed process, which a device driver may hold in a call
_OUT_OF_MEMORY = (
    ": the kernel was out of memory and killed it. Lower the stage's demands, or the number of "
    "cells at once (--max-parallel, or `resources: {memory: ...}`)"
)


class LocalWorker:
    """A worker process that leads its own process group.

    So Ctrl-C in the terminal reaches the driver alone, and a kill takes a stage's children along.

    Attributes:
        threads: the number of threads that it computes with.
        alive: whether it can take another task.
        stop_asked: whether a signal asked it to stop while it ran as a rank after the first.
        replies: the pipe from it.
    """

    def __init__(self, threads: int, devices: Sequence[str]):
        self.threads = threads
        self.alive = True
        self.stop_asked = False
        self._buffer = b""
        self._left_behind = False  # killed, but it does not end
        self._log: IO[bytes] = tempfile.TemporaryFile()
        # The worker truncates it, see `OutputFile`.
        fcntl.fcntl(self._log, fcntl.F_SETFL, os.O_APPEND)
        self._oom_kills = oom_kills()
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "CUDA_VISIBLE_DEVICES": ",".join(devices),
            **search_variable(),  # a stage's modules are found where this process would find them
        }
        self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            python_command("pipeline.worker.worker"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            start_new_session=True,
        )
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("A worker was started without pipes.")
        self._requests: IO[bytes] = self._process.stdin
        self.replies: IO[bytes] = self._process.stdout

    def send(self, message: Task | str) -> None:
        """Send a task, END or OTHERS_ENDED; the next `read` shows a worker that is gone."""
        try:
            self._requests.write(json.dumps(message).encode() + b"\n")
            self._requests.flush()
        except BrokenPipeError:
            self.alive = False

    def read(self) -> Outcome | None:
        """Read available replies; return the outcome once it is whole, or the worker has died."""
        chunk = os.read(self.replies.fileno(), 1 << 16)
        if not chunk:
            kill_all([self])
            return died(self._obituary())
        *lines, self._buffer = (self._buffer + chunk).split(b"\n")
        replies = [json.loads(line) for line in lines]
        self.stop_asked = STOP_ASKED in replies
        return next((reply for reply in replies if reply != STOP_ASKED), None)

    def preempt(self) -> None:
        """Ask the worker to stop its task; the stage stops its own children."""
        if self.alive:
            self._process.terminate()

    def close(self) -> None:
        """Kill the worker with its children, and close the pipes."""
        kill_all([self])
        try:
            self._requests.close()
        except BrokenPipeError:
            pass  # it never read a task
        self.replies.close()
        self._log.close()

    def kill(self) -> None:
        """Send SIGKILL to the worker and its children, and do not wait."""
        self.alive = False
        if self._process.returncode is None:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass  # already gone

    def await_death(self, limit_s: float) -> None:
        """Wait until a killed worker is gone, for a bounded time."""
        if self._left_behind:
            return
        try:
            self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self._left_behind = True
            LEFT_BEHIND.append(self._process)
            _log.warning(
                "Worker process %d does not end after SIGKILL: the kernel holds it, as for a "
                "file server or a GPU that hangs. The run continues without it; its share of this "
                "machine stays taken until it ends.",
                self._process.pid,
            )

    def _obituary(self) -> str:
        code = self._process.returncode
        if code is None:
            return "The worker process closed its pipes, and does not end after SIGKILL."
        how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        hint = ""
        if code == -signal.SIGKILL:
            starved = (oom_kills() or 0) > (self._oom_kills or 0)
            hint = _OUT_OF_MEMORY if starved else "; out of memory?"
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - _LOG_TAIL_BYTES))
        tail = self._log.read().decode(errors="replace").strip()
        return f"The worker process died {how}{hint}." + (f"\n{tail}" if tail else "")


def kill_all(workers: Iterable[LocalWorker]) -> None:
    """Kill all workers first, then wait for them together, for as long as for one."""
    killed = list(workers)
    for worker in killed:
        worker.kill()
    end_s = time.monotonic() + _DEATH_S
    for worker in killed:
        worker.await_death(max(0.0, end_s - time.monotonic()))
