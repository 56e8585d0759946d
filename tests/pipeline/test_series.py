"""What several attempts at a cell have said, as one series."""

import json
from dataclasses import asdict
from typing import Any

from pipeline.tracking.series import Series

START = {"type": "start", "time": 0.0}


def said(step: int | None, value: float, time: float = 0.0) -> dict[str, Any]:
    return {"type": "metrics", "time": time, "step": step, "values": {"loss": value}}


def sample(time: float) -> dict[str, Any]:
    return {"type": "system", "time": time, "values": {"system/cpu_percent": 50.0}}


def test_a_step_counts_as_the_first_attempt_said_it() -> None:
    series = Series()
    first = series.take([START, said(1, 0.9), said(2, 0.8), said(3, 0.7)])
    again = series.take([START, said(2, 0.81), said(3, 0.71), said(4, 0.6)])
    assert [(point.step, point.value) for point in first] == [(1, 0.9), (2, 0.8), (3, 0.7)]
    assert [(point.step, point.value) for point in again] == [(4, 0.6)]


def test_one_attempt_may_say_a_step_twice() -> None:
    assert len(Series().take([START, said(1, 0.9), said(1, 0.8), said(0, 0.7)])) == 3


def test_a_final_value_is_that_of_the_last_attempt() -> None:
    series = Series()
    assert series.take([START, said(None, 0.5, time=1.0)]) == []
    series.take([START, said(None, 0.4, time=2.0)])
    assert [(point.value, point.time_s) for point in series.final_points()] == [(0.4, 2.0)]
    series.take([START])
    assert series.final_points() == []


def test_samples_of_the_system_are_counted_over_all_attempts() -> None:
    series = Series()
    points = series.take([START, sample(5.0), sample(10.0), START, sample(31.0)])
    assert [(point.step, point.time_s) for point in points] == [(1, 5.0), (2, 10.0), (3, 31.0)]


def test_what_is_remembered_as_json_gives_the_same_points_again() -> None:
    events = [said(3, 0.7), sample(9.0), START, said(3, 0.75), said(4, 0.6), said(None, 0.4)]
    series = Series()
    series.take([START, said(1, 0.9), said(2, 0.8), sample(5.0)])
    again = Series(**json.loads(json.dumps(asdict(series))))
    points = series.take(events)
    assert again.take(events) == points
    assert [point.step for point in points] == [3, 2, 4]
    assert list(map(tuple, again.final_points())) == [("loss", 0.4, 0.0, 0)]


def cost(kind: str, seconds: float, time: float = 0.0) -> dict[str, Any]:
    return {"type": kind, "time": time, "seconds": seconds, "cpu_seconds": 2 * seconds}


def test_what_a_cell_has_cost_is_that_of_all_attempts() -> None:
    """One was killed after its second checkpoint, one failed, one gave the result."""
    series = Series()
    series.take([START, cost("checkpoint", 3.0), cost("checkpoint", 5.0)])
    series.take([START, cost("checkpoint", 1.0), cost("end", 2.0)])
    again = Series(**json.loads(json.dumps(asdict(series))))
    final = {"type": "metrics", "time": 9.0, "step": None}
    again.take([START, {**final, "values": {"seconds": 4.0, "cpu_seconds": 8.0, "loss": 0.5}}])
    again.take([{**final, "type": "end", "status": "ok"}])
    assert list(map(tuple, again.spent_points("spent_"))) == [
        ("spent_seconds", 11.0, 9.0, 0),
        ("spent_cpu_seconds", 22.0, 9.0, 0),
    ]


def test_a_metric_of_the_stage_that_is_called_seconds_is_no_cost() -> None:
    series = Series()
    series.take([START, {"type": "metrics", "time": 1.0, "step": None, "values": {"seconds": 7.0}}])
    assert series.spent_points("spent_") == []
