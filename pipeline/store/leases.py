"""Leases: how long a silent process counts as alive, and whether another run works at a cell.

A lease is nothing but signs of life: a run that finds another one at work on a cell waits for its
result, until it has been silent for as long as the lease lasts. Only changes count, timed by the
watcher's own clock, so the clocks of two machines need not agree. It saves work; that each result
is published once never rests on it.
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
    """Return the silence in seconds after which a worker is given up."""
    return float(LEASE_S.read())


@cache
def this_machine() -> str:
    """Return what tells where process numbers mean what they mean here.

    It is the boot of the kernel and the namespace of process numbers: two containers may share a
    host name. Without Linux it is the host name.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def has_died(machine: str, pid: int) -> bool:
    """Tell whether a process is certainly gone; of other machines nothing is certain.

    Args:
        machine: what `this_machine` returned there.
        pid: the process.
    """
    if machine != this_machine():
        return False
    try:
        state = psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:  # another user's, and alive
        return False
    return state in {psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD}  # as in a container without an init


@dataclass(frozen=True)
class Holder:
    """Who works at a cell: the run, its host, and the attempt."""

    run: str
    host: str
    attempt: int


@dataclass
class _Sight:
    """What was last seen of a key's newest attempt, and when by our clock."""

    attempt: int
    segment: int
    time_s: float
    first: dict[str, str | int] | None = None
    ended: bool = False


class LeaseWatch:
    """Sees whether other runs work at cells.

    Args:
        store: where their attempts are.
        run_id: the run that watches; its own attempts are not another's.
    """

    def __init__(self, store: Store, run_id: str):
        self._store = store
        self._run_id = run_id
        self._sights: dict[str, _Sight] = {}

    def holder(self, key: str) -> Holder | None:
        """Return who else works at a cell, or None.

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
