"""Samples of a worker's use of the system, every few seconds, into its events.

    system/cpu_percent        processor time of this process and its children, 100 for one CPU
    system/memory_bytes       resident memory of this process and its children
    system/load_percent       processor time of the whole machine, 100 for all its CPUs
    system/gpu_percent        the busiest of the GPUs that this process may use
    system/gpu_memory_bytes   in use on all of them, by any process

`nvidia-smi` reports the GPUs, and runs only for a stage with one. It is a process, which a time
limit can end; a hanging call of NVML would block the thread.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from pipeline.base.variables import CUDA_DEVICES

LEFT_BEHIND: list[subprocess.Popen[Any]] = []  # killed children that do not end
_DEATH_S = 1.0  # how long to wait for a killed process
INTERVAL_S = 5.0
_PROC = Path("/proc")
_QUERY = "--query-gpu=utilization.gpu,memory.used"


class SystemSampler:
    """Samples in a thread inside its context, and once on leaving, so that each stage has one.

    Args:
        emit: the sink of the events.
        gpus: whether the process has GPUs.
    """

    def __init__(self, emit: Callable[[dict[str, Any]], None], *, gpus: bool = False):
        self._emit = emit
        self._gpus = gpus
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="system", daemon=True)
        self._last = self._spent()

    def __enter__(self) -> SystemSampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()
        self._sample()

    def _work(self) -> None:
        while not self._stopping.wait(INTERVAL_S):
            try:
                self._sample()
            except OSError:  # events cannot be written; the stage gets the same error
                return

    def _sample(self) -> None:
        before, self._last = self._last, self._spent()
        seconds = max(self._last[0] - before[0], 1e-3)
        ours_s = max(0.0, self._last[1] - before[1])  # a child may end between two looks
        values = {"system/cpu_percent": 100 * ours_s / seconds}
        spent_s = self._last[2] - before[2]
        values["system/load_percent"] = 100 * spent_s / seconds / (os.cpu_count() or 1)
        values["system/memory_bytes"] = sum(bytes_ for _, bytes_ in _family())
        if self._gpus:
            try:
                values |= _gpu_values()
            except subprocess.TimeoutExpired:  # every later one would hang as well
                self._gpus = False
        rounded = {name: round(value, 1) for name, value in values.items()}
        self._emit({"type": "system", "time": time.time(), "values": rounded})

    def _spent(self) -> tuple[float, float, float]:
        """Return the clock, and the processor time of this family of processes and of all."""
        ours = sum(os.times()[:4]) + sum(seconds for seconds, _ in _family(children_only=True))
        return time.monotonic(), ours, _machine_s()


def ask(command: Sequence[str], limit_s: float) -> tuple[int, str]:
    """Return the exit code and the output of a command that takes no input.

    A command that does not end in time is killed, and raises `subprocess.TimeoutExpired`. Unlike
    `subprocess.run`, this does not wait for a process that outlives its SIGKILL because a device
    driver holds it in a call.
    """
    process = subprocess.Popen(  # noqa: S603 - the callers' fixed commands
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        try:
            process.communicate(timeout=_DEATH_S)
        except subprocess.TimeoutExpired:
            LEFT_BEHIND.append(process)
        raise
    return process.returncode, output


def oom_kills() -> int | None:
    """Return how many processes the kernel has killed for lack of memory; None if unknown.

    The count is of this process's control group, as in a container, or else of the machine.
    """
    try:
        group = (_PROC / "self/cgroup").read_text().rpartition("::")[2].strip()
    except OSError:
        group = "/"
    groups = Path("/sys/fs/cgroup")
    places = [
        groups / group.lstrip("/") / "memory.events",
        groups / "memory.events",
        groups / "memory/memory.oom_control",
        _PROC / "vmstat",
    ]
    for place in places:
        try:
            counts = dict(line.split()[:2] for line in place.read_text().splitlines())
            return int(counts["oom_kill"])
        except (OSError, KeyError, ValueError):
            continue
    return None


def _family(*, children_only: bool = False) -> Iterator[tuple[float, int]]:
    """Yield (processor seconds, bytes of resident memory) of this process and its descendants."""
    me = psutil.Process()
    for process in [*([] if children_only else [me]), *me.children(recursive=True)]:
        try:
            with process.oneshot():
                times, memory = process.cpu_times(), process.memory_info()
        except psutil.Error:  # it has ended
            continue
        yield times.user + times.system, memory.rss


def _machine_s() -> float:
    """Return the processor time that this machine has spent since its start."""
    times = psutil.cpu_times()._asdict()
    idle = {"idle", "iowait", "guest", "guest_nice"}  # a guest's time is in the user's as well
    return sum(seconds for name, seconds in times.items() if name not in idle)


def _gpu_values() -> dict[str, float]:
    """Return the report of `nvidia-smi` on the GPUs that this process may use, if it has one."""
    command = ["nvidia-smi", _QUERY, "--format=csv,noheader,nounits"]
    devices = CUDA_DEVICES.read()
    try:
        code, text = ask([*command, *([f"--id={devices}"] if devices else [])], INTERVAL_S)
        rows = [list(map(float, line.split(","))) for line in text.splitlines()]
    except (OSError, ValueError):  # no such tool, or no usable answer
        return {}
    if code or not rows:
        return {}
    return {
        "system/gpu_percent": max(busy for busy, _ in rows),
        "system/gpu_memory_bytes": sum(mebibytes for _, mebibytes in rows) * 2**20,
    }
