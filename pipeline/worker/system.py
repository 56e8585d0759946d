"""What a worker uses while a stage runs, sampled every few seconds into its events.

    system/cpu_percent        processor time of this process and its children, 100 for one CPU
    system/memory_bytes       resident memory of this process and its children
    system/load_percent       processor time of the whole machine, 100 for all its CPUs
    system/gpu_percent        the busiest of the GPUs that this process may use
    system/gpu_memory_bytes   in use on all of them, by anyone

GPUs are asked for by `nvidia-smi`, and only where the stage was given one. It is a process, which a
bound can end; a call of NVML that hangs would keep the thread.
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

LEFT_BEHIND: list[subprocess.Popen[Any]] = []  # children that do not end, though they were killed
_DEATH_S = 1.0  # how long a process that was killed is waited for
INTERVAL_S = 5.0
_PROC = Path("/proc")
_QUERY = "--query-gpu=utilization.gpu,memory.used"


class SystemSampler:
    """Samples in a thread from entering to leaving; on leaving once more, so that none is without.

    Args:
        emit: takes the events.
        gpus: whether the process was given GPUs.
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
            except OSError:  # events cannot be written, which the stage itself will be told
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
            except subprocess.TimeoutExpired:  # another one would hang beside it, every few seconds
                self._gpus = False
        rounded = {name: round(value, 1) for name, value in values.items()}
        self._emit({"type": "system", "time": time.time(), "values": rounded})

    def _spent(self) -> tuple[float, float, float]:
        """Return the clock, and the processor time of this family of processes and of all."""
        ours = sum(os.times()[:4]) + sum(seconds for seconds, _ in _family(children_only=True))
        return time.monotonic(), ours, _machine_s()


def ask(command: Sequence[str], limit_s: float) -> tuple[int, str]:
    """Return the exit code and the output of a command that takes no input.

    One that does not end in time is killed, and a `subprocess.TimeoutExpired`. Unlike
    `subprocess.run` this does not wait for a process that outlives its SIGKILL, as one does that a
    driver holds in a call.
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
    """Return how many processes the kernel has killed here for want of memory; None if unknown.

    Of this process's control group where it has one, as in a container; else of the machine.
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
        except psutil.Error:  # it has ended meanwhile
            continue
        yield times.user + times.system, memory.rss


def _machine_s() -> float:
    """Return the processor time that was spent on this machine since it started."""
    times = psutil.cpu_times()._asdict()
    idle = {"idle", "iowait", "guest", "guest_nice"}  # a guest's time is in the user's as well
    return sum(seconds for name, seconds in times.items() if name not in idle)


def _gpu_values() -> dict[str, float]:
    """Return what `nvidia-smi` says of the GPUs that this process may use; nothing without it."""
    command = ["nvidia-smi", _QUERY, "--format=csv,noheader,nounits"]
    devices = CUDA_DEVICES.read()
    try:
        code, text = ask([*command, *([f"--id={devices}"] if devices else [])], INTERVAL_S)
        rows = [list(map(float, line.split(","))) for line in text.splitlines()]
    except (OSError, ValueError):  # no such tool, or it has no answer
        return {}
    if code or not rows:
        return {}
    return {
        "system/gpu_percent": max(busy for busy, _ in rows),
        "system/gpu_memory_bytes": sum(mebibytes for _, mebibytes in rows) * 2**20,
    }
