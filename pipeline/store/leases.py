"""Leases: detection of other runs at work on a cell, and of dead processes.

A run that finds another one at work on a cell waits for its result until that run has been silent
for the length of the lease. The watcher times changes by its own clock, so machines' clocks may
differ. Leases save work; publication once per key does not depend on them.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from pipeline.base.variables import LEASE_S

if TYPE_CHECKING:
    from pipeline.store.store import Store


def lease_s() -> float:
    """Return the silence in seconds after which a worker counts as dead."""
    return float(LEASE_S.read())


@cache
def this_machine() -> str:
    """Return an identifier of the scope of this machine's process ids.

    It is the kernel's boot id and the pid namespace (containers may share a host name); elsewhere
    than on Linux, the host name.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def has_died(machine: str, pid: int) -> bool:
    """Tell whether a process has certainly died; False for other machines.

    Args:
        machine: `this_machine` of the process.
        pid: its process id.
    """
    if machine != this_machine():
        return False
    try:
        state = psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:  # another user's, and alive
        return False
    return state in {
        psutil.STATUS_ZOMBIE,
        psutil.STATUS_DEAD,
    }  # zombies stay in a container without an init


@dataclass(frozen=True)
class Holder:
    """The run at work on a cell, its host, and its attempt."""

    run: str
    host: str
    attempt: int


@dataclass
class _Sight:
    """The last observation of a key's newest attempt, with its time by our clock."""

    attempt: int
    segment: int
    time_s: float
    first: dict[str, str | int] | None = None
    ended: bool = False


class LeaseWatch:
    """Detects other runs at work on cells of the run `run_id`."""

    def __init__(self, store: Store, run_id: str):
        self._store = store
        self._run_id = run_id
        self._sights: dict[str, _Sight] = {}

    def holder(self, key: str) -> Holder | None:
        """Return another run at work on a cell, or None.

        Cost: a listing, and a read for each new segment of events.
        """
        attempts = self._store.attempts(key)
        if not attempts:
            return None
        sight = self._sights.get(key)
        if sight is None or sight.attempt != attempts[-1]:
            sight = self._sights[key] = _Sight(attempts[-1], 0, time.monotonic())
        events, last = self._store.read_events(key, sight.attempt, sight.segment)
        if last > sight.segment:
            sight.first = sight.first or events[0]
            sight.segment, sight.time_s = last, time.monotonic()
            sight.ended = events[-1]["type"] == "end"
        first = sight.first or {}
        run, host, machine, pid = (
            str(first.get(name, "")) for name in ("run", "host", "machine", "pid")
        )
        silent = time.monotonic() - sight.time_s > lease_s()
        dead = pid.isdigit() and has_died(machine, int(pid))
        if sight.ended or silent or dead or run == self._run_id:
            return None
        return Holder(run, host, sight.attempt)
