"""How several processes that run one task end as one: the first rank's outcome, or a failure."""

from __future__ import annotations

import time
from collections.abc import Mapping

from pipeline.worker.worker import Outcome

# A rank that dies takes the connections of the others along, whose errors may be heard of first.
WAIT_FOR_THE_CAUSE_S = 2.0


class RankOutcomes:
    """Gathers the outcomes of the ranks of one task."""

    def __init__(self, size: int):
        self._size = size
        self._found: dict[int, Outcome] = {}
        self._failed_s: float | None = None

    def add(self, rank: int, outcome: Outcome) -> None:
        """Take note of how a rank ended."""
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
        """The outcome of a rank that is to run elsewhere, and all others with it; or None."""
        found = (one for one in self._found.values() if one["status"] == "outdated")
        return next(found, None)

    def verdict(self) -> Outcome | None:
        """Return how the task ended, once that is known; ranks without an outcome are to be killed.

        Rank 0 publishes, so when it has ended well, so has the task. A failure is one of all; until
        every rank has told, or had the time to, the cause may be another one's.
        """
        if self.outdated:
            return self.outdated
        if self.ended_well(0) or _preempted(self._found):
            return self._found[0]
        if self._failed_s is None:
            return None
        told = len(self._found) == self._size
        died = any(outcome["status"] == "died" for outcome in self._found.values())
        if told or died or time.monotonic() - self._failed_s > WAIT_FOR_THE_CAUSE_S:
            return cause(self._found, self._size)
        return None


def cause(outcomes: Mapping[int, Outcome], size: int) -> Outcome:
    """Return the outcome that explains why a task failed in `size` processes.

    Rank 0 alone writes the checkpoint behind which a task ends that is told to.

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
    message = f"worker {rank} of {size}: {outcome['error']['message']}"
    return {**outcome, "error": {**outcome["error"], "message": message}}


def _importance(outcome: Outcome) -> int:
    """Sort an outdated process first, then deaths, what the user can correct, damage, and bugs."""
    if outcome["status"] == "failed":
        return 2 if outcome["error"]["user"] else 4
    return {"outdated": 0, "died": 1}.get(outcome["status"], 3)


def _preempted(outcomes: Mapping[int, Outcome]) -> bool:
    return outcomes.get(0, {}).get("status") == "preempted"
