"""The metrics of all attempts at one cell, as one series a metric without contradictions.

An attempt that dies may have reported more steps than its checkpoint holds; the next one resumes
from the checkpoint and reports the last steps again, perhaps with other values. A tracking server
keeps both. So the first report of a step counts; and final values, which later attempts may
contradict, are held back until the attempt with the result is known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pipeline.store.events import Event

_COSTS = ("seconds", "cpu_seconds")  # those that add up


class Point(NamedTuple):
    """One value of a metric."""

    name: str
    value: float
    time_s: float
    step: int


@dataclass(kw_only=True)
class Series:
    """The state of the series; JSON, small, and equal after a replay from a saved state.

    Attributes:
        before: metric -> last step of earlier attempts.
        now: metric -> last step so far.
        finals: metric -> (value, time) of the running attempt.
        samples: number of system samples of all attempts.
        spent: reported cost of earlier attempts.
        cost: last reported cost of the running attempt.
        heard_s: Unix time of that report.
    """

    before: dict[str, int] = field(default_factory=dict)
    now: dict[str, int] = field(default_factory=dict)
    finals: dict[str, tuple[float, float]] = field(default_factory=dict)
    samples: int = 0
    spent: dict[str, float] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)
    heard_s: float = 0.0

    def take(self, events: Iterable[Event]) -> list[Point]:
        """Return the new points in the events of one or several attempts."""
        points: list[Point] = []
        for event in events:
            if event["type"] == "start":
                self.before, self.finals = dict(self.now), {}
                self.spent, self.cost = self._all_spent(), {}
            elif event["type"] == "system":
                self.samples += 1
                points += _points(event, self.samples)
            elif event["type"] in {"checkpoint", "end"}:
                self._note_cost(event, event["time"])
            elif event["type"] == "metrics" and event["step"] is None:
                for name, value in event["values"].items():
                    self.finals[name] = value, event["time"]
                self._note_cost(event["values"], event["time"])
            elif event["type"] == "metrics":
                for point in _points(event, event["step"]):
                    if point.step > self.before.get(point.name, point.step - 1):
                        self.now[point.name] = max(point.step, self.now.get(point.name, point.step))
                        points.append(point)
        return points

    def final_points(self) -> list[Point]:
        """Return the final values, at step 0."""
        return [Point(name, value, time_s, 0) for name, (value, time_s) in self.finals.items()]

    def spent_points(self, prefix: str) -> list[Point]:
        """Return the total cost of all attempts, at step 0, under names with a prefix."""
        return [
            Point(prefix + name, value, self.heard_s, 0)
            for name, value in self._all_spent().items()
        ]

    def _note_cost(self, said: Mapping[str, Any], time_s: float) -> None:
        cost = {name: said[name] for name in _COSTS if name in said}
        if len(cost) == len(_COSTS):  # a stage's own metric may have the name of one
            self.cost, self.heard_s = cost, time_s

    def _all_spent(self) -> dict[str, float]:
        return {
            name: self.spent.get(name, 0.0) + self.cost.get(name, 0.0)
            for name in _COSTS
            if name in self.spent or name in self.cost
        }


def _points(event: Event, step: int) -> list[Point]:
    return [Point(name, value, event["time"], step) for name, value in event["values"].items()]
