"""Runs tasks in plain processes on this machine.

A worker is `python -m pipeline.worker.worker`: it reads one JSON task a line from its standard
input and answers with one JSON outcome a line. CPU workers stay warm, so that torch is imported
once in each and not once in each cell; a task with a GPU gets a process of its own, because that
is the only way to be sure that all GPU memory comes back. A worker whose input closes kills itself
and its children, so no worker outlives the driver, however the driver died.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import selectors
import shutil
import signal
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from pipeline.base.errors import PipelineError
from pipeline.base.search_path import python_command, search_variable
from pipeline.base.variables import CUDA_DEVICES
from pipeline.executors.base import (
    AbstractExecutor,
    available_cpus,
    available_memory_bytes,
    refuse_unsatisfiable,
)
from pipeline.executors.ranks import RankOutcomes
from pipeline.stage import Resources
from pipeline.worker.system import LEFT_BEHIND, ask, oom_kills
from pipeline.worker.worker import END, OTHERS_ENDED, TOLD, Outcome, Seat, Task, died, threads_of

_log = logging.getLogger(__name__)
_LOG_TAIL_BYTES = 2000
_DEATH_S = 5.0  # how long a process that was killed is waited for: a driver may hold it in a call
_GPU_TOOL_S = 30.0
_OUT_OF_MEMORY = (
    ": the kernel was out of memory and killed it. Lower what the stage needs, or how many run at "
    "once (--max-parallel, or `resources: {memory: ...}`)"
)


class LocalExecutor(AbstractExecutor):
    """Plain processes, with an account of this machine's CPUs, memory and GPUs."""

    def __init__(self) -> None:
        self._machine = _Machine()
        self._queue: deque[tuple[Task, Resources]] = deque()
        self._busy: dict[str, _Gang] = {}
        self._idle: list[_Worker] = []
        self._selector = selectors.DefaultSelector()

    def check(
        self, demands: Iterable[tuple[str, Resources]], *, may_grow: bool = False
    ) -> list[str]:
        """Refuse what this machine could not run even when it is otherwise idle; it cannot grow."""
        refuse_unsatisfiable(
            (
                f"{cell.partition('[')[0]} asks for {_each(resources)}{lack}"
                for cell, resources in demands
                if (lack := self._machine.lacks(resources))
            ),
            "Lower the stage's `resources:`, or run on a cluster with --executor ray.",
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
        """Return what has finished, waiting up to `timeout_s` for the first."""
        for ready, _ in self._selector.select(timeout_s):
            cell, rank = ready.data
            if self._busy[cell].read(rank):
                self._selector.unregister(ready.fileobj)
        finished = []
        for cell, gang in list(self._busy.items()):
            outcome = gang.outcomes.verdict()
            if outcome is None:
                continue
            if outcome["status"] == "outdated":  # those workers go, until one has no past
                self._queue.appendleft((gang.task, gang.resources))
            else:
                finished.append((cell, outcome))
            self._release(cell)
        self._start_fitting()
        return finished

    def cancel(self, cell: str) -> None:
        """Drop the cell's task and kill the workers that run it."""
        self._queue = deque(item for item in self._queue if item[0]["cell"] != cell)
        if cell in self._busy:
            end_all(self._busy[cell].workers)
            self._release(cell)

    def preempt(self) -> None:
        """Send SIGTERM to the workers that have a task."""
        self._queue.clear()
        for gang in self._busy.values():
            for worker in gang.workers:
                worker.preempt()

    def stop(self) -> None:
        """Kill all workers."""
        self._queue.clear()
        workers = [worker for gang in self._busy.values() for worker in gang.workers]
        end_all([*workers, *self._idle])
        for cell in list(self._busy):
            self.cancel(cell)
        while self._idle:
            self._idle.pop().kill()
        self._selector.close()

    def _start_fitting(self) -> None:
        """Start the queued tasks that fit; none overtakes an older one that it would starve."""
        waiting: deque[tuple[Task, Resources]] = deque()
        blocked_cpus = 0.0
        while self._queue:
            task, resources = self._queue.popleft()
            shares = self._machine.take_all(resources, keep_cpus=blocked_cpus)
            if shares is None:
                blocked_cpus += resources.num_cpus * resources.workers
                waiting.append((task, resources))
                continue
            workers = [self._worker_for(task, share) for share in shares]
            gang = self._busy[task["cell"]] = _Gang(task, resources, workers, shares)
            for rank, worker in enumerate(workers):
                place = task["cell"], rank
                self._selector.register(worker.replies, selectors.EVENT_READ, place)
            gang.send()
        self._queue = waiting

    def _worker_for(self, task: Task, share: _Share) -> _Worker:
        threads = threads_of(task)
        if not share.devices:
            for worker in self._idle:
                if worker.threads == threads:
                    self._idle.remove(worker)
                    return worker
        return _Worker(threads, [device for device, _ in share.devices])

    def _release(self, cell: str) -> None:
        gang = self._busy.pop(cell)
        for rank, (worker, share) in enumerate(zip(gang.workers, gang.shares, strict=True)):
            if rank not in gang.outcomes:
                self._selector.unregister(worker.replies)
            self._machine.give(share)
            if gang.reusable(rank) and not share.devices:
                self._idle.append(worker)
            else:
                worker.kill()
        gang.close()


class _Worker:
    """One worker process and the pipes to it.

    It leads a process group of its own: Ctrl-C in the terminal reaches the driver alone, and a
    kill takes the children of a stage along.
    """

    def __init__(self, threads: int, devices: list[str]):
        self.threads = threads
        self.alive = True
        self.told = False  # to end, by others than us, as one that only helps with its task
        self._buffer = b""
        self._left_behind = False  # it does not end, though it was shot
        self._log: IO[bytes] = tempfile.TemporaryFile()
        fcntl.fcntl(
            self._log, fcntl.F_SETFL, os.O_APPEND
        )  # the worker begins it again, see OutputFile
        self._oom_kills = oom_kills()
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "CUDA_VISIBLE_DEVICES": ",".join(devices),
            # The stage's modules are found where this process would find them.
            **search_variable(),
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
        """Hand over a task, or END. A worker that is already gone shows it at the next `read`."""
        try:
            self._requests.write(json.dumps(message).encode() + b"\n")
            self._requests.flush()
        except BrokenPipeError:
            self.alive = False

    def read(self) -> Outcome | None:
        """Read what has come; return the outcome once it is whole, or once the worker has died."""
        chunk = os.read(self.replies.fileno(), 1 << 16)
        if not chunk:
            end_all([self])
            return died(self._obituary())
        *lines, self._buffer = (self._buffer + chunk).split(b"\n")
        replies = [json.loads(line) for line in lines]
        self.told = TOLD in replies
        return next((reply for reply in replies if reply != TOLD), None)

    def preempt(self) -> None:
        """Tell the worker to end its task; its children, if any, are the stage's to tell."""
        if self.alive:
            self._process.terminate()

    def kill(self) -> None:
        """Kill the worker with its children, and free what it holds here."""
        end_all([self])
        try:
            self._requests.close()
        except BrokenPipeError:
            pass  # a task it never read
        self.replies.close()
        self._log.close()

    def shoot(self) -> None:
        """Send SIGKILL to the worker and its children, and do not wait."""
        self.alive = False
        if self._process.returncode is None:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass  # already gone, which is what is wanted

    def bury(self, limit_s: float) -> None:
        """Wait until a worker that was shot is gone, or for as long as is useful."""
        if self._left_behind:
            return
        try:
            self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self._left_behind = True
            LEFT_BEHIND.append(self._process)
            _log.warning(
                "Worker process %d does not end after SIGKILL: the kernel holds it, as for a "
                "file server or a GPU that hangs. The run goes on without it; what it holds of "
                "this machine stays taken until it ends.",
                self._process.pid,
            )

    def _obituary(self) -> str:
        code = self._process.returncode
        if code is None:
            return "The worker process hung up, and does not end after SIGKILL."
        how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        hint = ""
        if code == -signal.SIGKILL:
            starved = (oom_kills() or 0) > (self._oom_kills or 0)
            hint = _OUT_OF_MEMORY if starved else "; out of memory?"
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - _LOG_TAIL_BYTES))
        tail = self._log.read().decode(errors="replace").strip()
        return f"The worker process died {how}{hint}." + (f"\n{tail}" if tail else "")


def end_all(workers: Iterable[_Worker]) -> None:
    """Shoot all first, then wait for them together, for as long as for one."""
    shot = list(workers)
    for worker in shot:
        worker.shoot()
    end_s = time.monotonic() + _DEATH_S
    for worker in shot:
        worker.bury(max(0.0, end_s - time.monotonic()))


class _Gang:
    """The workers that run one task: one, or several that are the ranks of a group.

    Several meet through a file of their own, see `torch.distributed.FileStore`.
    """

    def __init__(
        self,
        task: Task,
        resources: Resources,
        workers: Sequence[_Worker],
        shares: Sequence[_Share],
    ):
        self.task = task
        self.resources = resources
        self.workers = workers
        self.shares = shares
        self.outcomes = RankOutcomes(len(workers))
        self._folder = tempfile.TemporaryDirectory(prefix="fls-") if len(workers) > 1 else None

    def send(self) -> None:
        """Hand the task to each worker, with its place."""
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
        """Read what has come from a worker; tell whether that was its outcome, or its end.

        If one that only helps was told to end, the first one is, who writes the checkpoint.
        """
        outcome = self.workers[rank].read()
        if self.workers[rank].told:
            self.workers[0].send(END)
        if outcome is not None:
            self.outcomes.add(rank, outcome)
            if rank > 0 and self.outcomes.others_ended_well:
                self.workers[0].send(OTHERS_ENDED)
        return outcome is not None

    def reusable(self, rank: int) -> bool:
        """Tell whether a worker may run another task.

        It does if it lives, has left its group in peace, and has not run code that others replaced.
        """
        if len(self.workers) > 1 and not self.outcomes.ended_well(rank):
            return False
        if self.outcomes.outdated:
            return False
        return self.workers[rank].alive

    def close(self) -> None:
        """Delete the meeting place."""
        if self._folder is not None:
            self._folder.cleanup()


@dataclass(frozen=True)
class _Share:
    """What one task holds: CPUs, bytes of memory, and (device, fraction) of GPUs."""

    cpus: float
    memory: int
    devices: tuple[tuple[str, float], ...]


@dataclass
class _Machine:
    """The account of what is free here."""

    cpus: float = field(default_factory=available_cpus)
    memory: int = field(default_factory=available_memory_bytes)
    gpus: dict[str, str] = field(default_factory=lambda: _list_gpus())

    def __post_init__(self) -> None:
        self._free_cpus = self.cpus
        self._free_memory = self.memory
        self._free_gpus = dict.fromkeys(self.gpus, 1.0)

    def lacks(self, wanted: Resources) -> str | None:
        """Say what `wanted` asks for that the whole machine has not, or None."""
        count = wanted.workers
        if wanted.num_cpus * count > self.cpus:
            return f"num_cpus: {wanted.num_cpus:g}; this machine has {self.cpus:g}."
        if (wanted.memory_bytes or 0) * count > self.memory:
            return f"memory: {wanted.memory_bytes} bytes; this machine has {self.memory}."
        if wanted.num_gpus > 1 and not float(wanted.num_gpus).is_integer():
            return f"num_gpus: {wanted.num_gpus:g}; above 1 it must be a whole number."
        fitting = self._devices_of(wanted.accelerator_type)
        if wanted.num_gpus * count > len(fitting):
            of_type = f" of type {wanted.accelerator_type}" if wanted.accelerator_type else ""
            return f"num_gpus: {wanted.num_gpus:g}{of_type}; this machine has {len(fitting)}."
        return None

    def take_all(self, wanted: Resources, keep_cpus: float) -> list[_Share] | None:
        """Take what all workers want, or nothing and return None; see `take`."""
        taken: list[_Share] = []
        for _ in range(wanted.workers):
            share = self.take(wanted, keep_cpus)
            if share is None:
                for one in taken:
                    self.give(one)
                return None
            taken.append(share)
        return taken

    def take(self, wanted: Resources, keep_cpus: float) -> _Share | None:
        """Take what is wanted, or return None when it is not free beside `keep_cpus` CPUs."""
        memory = wanted.memory_bytes or 0
        if wanted.num_cpus > self._free_cpus - keep_cpus or memory > self._free_memory:
            return None
        devices = self._pick_devices(wanted)
        if devices is None:
            return None
        self._free_cpus -= wanted.num_cpus
        self._free_memory -= memory
        for device, fraction in devices:
            self._free_gpus[device] -= fraction
        return _Share(wanted.num_cpus, memory, devices)

    def give(self, share: _Share) -> None:
        """Take back what a task held."""
        self._free_cpus += share.cpus
        self._free_memory += share.memory
        for device, fraction in share.devices:
            self._free_gpus[device] += fraction

    def _pick_devices(self, wanted: Resources) -> tuple[tuple[str, float], ...] | None:
        """Choose whole free GPUs, or the fullest one that still has room for a fraction."""
        if wanted.num_gpus == 0:
            return ()
        each = min(wanted.num_gpus, 1.0)
        count = max(1, int(wanted.num_gpus))
        fitting = [
            device
            for device in self._devices_of(wanted.accelerator_type)
            if self._free_gpus[device] >= each
        ]
        fitting.sort(key=lambda device: self._free_gpus[device])
        if len(fitting) < count:
            return None
        return tuple((device, each) for device in fitting[:count])

    def _devices_of(self, accelerator_type: str | None) -> list[str]:
        wanted = (accelerator_type or "").lower()
        return [device for device, name in self.gpus.items() if wanted in name.lower()]


def _each(wanted: Resources) -> str:
    return f"{wanted.workers} workers, each with " if wanted.workers > 1 else ""


def _list_gpus() -> dict[str, str]:
    """Return device -> name of the NVIDIA GPUs that this process may use, without torch.

    Raises:
        PipelineError: the driver's tool hangs.
    """
    program = shutil.which("nvidia-smi")
    visible = os.environ.get(CUDA_DEVICES.name)  # empty means none
    if program is None or visible == "":
        return {}
    try:
        _, listing = ask(
            [program, "--query-gpu=index,uuid,name", "--format=csv,noheader"], _GPU_TOOL_S
        )
    except subprocess.TimeoutExpired as error:
        raise PipelineError(
            f"{program} gave no answer within {_GPU_TOOL_S:g} s, so the GPUs of this machine are "
            f"not known: expected a list. Repair the driver, or set {CUDA_DEVICES.name} to an "
            "empty text to run without GPUs."
        ) from error
    rows = [[part.strip() for part in line.split(",", 2)] for line in listing.splitlines()]
    names = {key: name for index, uuid, name in rows for key in (index, uuid)}
    if visible is None:
        return {index: name for index, _, name in rows}
    chosen = [device.strip() for device in visible.split(",") if device.strip()]
    return {device: names[device] for device in chosen if device in names}
