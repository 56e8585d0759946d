"""The states of cells and runs: one vocabulary, from the plan to the tracking server."""

from __future__ import annotations

from enum import StrEnum


class CellState(StrEnum):
    """The state of a cell in a run, in its tracking and in `fls status`."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    CACHED = "cached"  # its result was in the store already
    FAILED = "failed"
    SKIPPED = "skipped"  # a cell upstream failed
    STOPPED = "stopped"  # the run ended without it
    INTERRUPTED = "interrupted"  # it ran when its driver died

    @property
    def has_result(self) -> bool:
        """Whether its result is in the store."""
        return self in {CellState.DONE, CellState.CACHED}

    @property
    def is_settled(self) -> bool:
        """Whether a driver has nothing more to do for the cell."""
        return self.has_result or self in {CellState.FAILED, CellState.SKIPPED}


# The states that a driver gives to cells.
DRIVER_STATES = tuple(CellState)[:6]


class RunState(StrEnum):
    """The state of a run; a dead driver cannot write that its run was interrupted."""

    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    STOPPED = "stopped"
    INTERRUPTED = "interrupted"


class PlanState(StrEnum):
    """The state of a cell in a plan."""

    CACHED = "cached"  # its result is in the store
    RUN = "run"
    BLOCKED = "blocked"  # it has no result, and is not selected or needs a blocked cell
