"""The joint outcome of a rank group: that of rank 0, or the failure that explains the others."""

from __future__ import annotations

import time
from collections.abc import Mapping

from pipeline.worker.task import Outcome

# A dying rank closes its connections; the errors of other ranks may arrive first.
WAIT_FOR_THE_CAUSE_S = 2.0


class RankOutcomes:
    """The outcomes of the ranks of one task."""

    def __init__(self, size: int):
        self._size = size
        self._found: dict[int, Outcome] = {}
        self._failed_s: float | None = None

    def add(self, rank: int, outcome: Outcome) -> None:
        """Add a rank's outcome."""
        self._found[rank] = outcome
        if outcome["status"] not in {"ok", "lost"} and self._failed_s is None:
            self._failed_s = time.monotonic()

    def __contains__(self, rank: object) -> bool:
        return rank in self._found

    def ended_well(self, rank: int) -> bool:
        """Tell whether a rank has ended, and without an error."""
        return rank in self._found and self._found[rank]["status"] in {"ok", "lost"}

    @property
    def others_ended_well(self) -> bool:
        """Tell whether all ranks after the first have ended, and without an error."""
        return all(map(self.ended_well, range(1, self._size)))

    @property
    def outdated(self) -> Outcome | None:
        """An outdated rank's outcome, which sends all ranks to other processes; or None."""
        found = (one for one in self._found.values() if one["status"] == "outdated")
        return next(found, None)

    def verdict(self) -> Outcome | None:
        """Return the task's outcome once it is known; the caller kills ranks without one.

        Rank 0 publishes, so the task has ended well once rank 0 has. After a failure, the other
        ranks get a moment to report theirs, which may be the cause.
        """
        if self.outdated:
            return self.outdated
        if self.ended_well(0) or _preempted(self._found):
            return self._found[0]
        if self._failed_s is None:
            return None
        complete = len(self._found) == self._size
        died = any(outcome["status"] == "died" for outcome in self._found.values())
        if complete or died or time.monotonic() - self._failed_s > WAIT_FOR_THE_CAUSE_S:
            return cause(self._found, self._size)
        return None


def cause(outcomes: Mapping[int, Outcome], size: int) -> Outcome:
    """Return the outcome that explains why a task failed in `size` processes.

    A preempted task ends after the checkpoint that rank 0 writes, so rank 0's outcome decides.

    Args:
        outcomes: rank -> outcome, at least one of them a failure.
        size: number of ranks.
    """
    if _preempted(outcomes):
        return outcomes[0]
    rank = min(
        (rank for rank, outcome in outcomes.items() if outcome["status"] not in {"ok", "lost"}),
        key=lambda rank: (_importance(outcomes[rank]), rank),
    )
    outcome = outcomes[rank]
    if size == 1:
        return outcome
    message = f"rank {rank} of {size}: {outcome['error']['message']}"
    return {**outcome, "error": {**outcome["error"], "message": message}}


def _importance(outcome: Outcome) -> int:
    """Sort outdated processes first, then deaths, users' errors, damage, and other errors."""
    if outcome["status"] == "failed":
        return 2 if outcome["error"]["user"] else 4
    return {"outdated": 0, "died": 1}.get(outcome["status"], 3)


def _preempted(outcomes: Mapping[int, Outcome]) -> bool:
    return outcomes.get(0, {}).get("status") == "preempted"
