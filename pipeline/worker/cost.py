"""The cost of a stage: wall-clock time, processor time, and peak memory.

For a rank group this is the cost of rank 0; the other ranks do equal shares.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


class CostMeter:
    """Measures this process from construction on.

    On Linux it resets the memory's high-water mark, so that a warm worker does not report its
    largest stage; elsewhere the mark is that of the process.
    """

    def __init__(self) -> None:
        try:
            _CLEAR.write_text("5")
        except OSError:  # no /proc, or no permission
            pass
        gpu = _gpu()
        if gpu is not None:
            gpu.reset_peak_memory_stats()
        self._cpu_s = _cpu_s()
        self._began = time.monotonic()

    def read(self) -> dict[str, float]:
        """Return the cost so far.

        Returns:
            `seconds` of wall-clock time; `cpu_seconds` of user and system time, of this process and
            of its children that have ended; `peak_bytes` of resident memory, the interpreter and
            its libraries included; and, where torch uses a GPU, `gpu_peak_bytes` of tensors on it.
        """
        found = {
            "seconds": round(time.monotonic() - self._began, 3),
            "cpu_seconds": round(_cpu_s() - self._cpu_s, 3),
            "peak_bytes": _peak_bytes(),
        }
        gpu = _gpu()
        if gpu is not None:
            found["gpu_peak_bytes"] = gpu.max_memory_allocated()
        return found


def _cpu_s() -> float:
    return sum(os.times()[:4])


def _peak_bytes() -> int:
    """Return the high-water mark of resident memory since it was last reset."""
    try:
        lines = _STATUS.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _gpu() -> Any:
    """Return `torch.cuda` if this process computes with it, else None; torch is not imported."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None
