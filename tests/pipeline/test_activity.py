"""What is said of a running cell: how far it is, and whether it gets on."""

import io
from typing import Any

import pytest

from pipeline.base.console import RedactingConsole
from pipeline.base.states import CellState
from pipeline.running.activity import Pace, describe, stalled_since
from pipeline.running.documents import CellStatus
from pipeline.running.live import LiveView, _line


def status(done: float, total: float = 500, **fields: Any) -> CellStatus:
    known = {"moved": 1000.0, "gap_s": 1.0, **fields}
    return CellStatus(
        cell="fit",
        stage="fit",
        key="",
        state=CellState.RUNNING,
        began=900.0,
        progress=(done, total, "fit step"),
        **known,
    )


def gaps(*times: float, began: float = 0.0) -> float:
    pace, gap_s = Pace(), 0.0
    pace.begin({"time": began})
    for done, time_s in enumerate(times):
        gap_s = pace.move({"time": time_s, "done": done, "total": 10.0, "unit": "epoch"})
    return gap_s


@pytest.mark.parametrize(
    ("gap_s", "silent_s", "stalled"),
    [
        (0.1, 119, False),  # at the earliest after two minutes
        (0.1, 121, True),
        (60, 599, False),  # ten times the usual gap
        (60, 601, True),
    ],
)
def test_a_silence_is_told_after_ten_usual_gaps_and_two_minutes(
    gap_s: float, silent_s: float, stalled: bool
) -> None:
    cell = status(12, gap_s=gap_s)
    assert (stalled_since(cell, 1000 + silent_s) == 1000.0) is stalled
    assert ("no progress for" in describe(cell, 1000 + silent_s)) is stalled


def test_a_cell_whose_progress_is_complete_or_unknown_is_not_said_to_stall() -> None:
    assert stalled_since(status(500), 1e6) is None
    assert stalled_since(CellStatus(cell="c", stage="c", key=""), 1e6) is None


def test_progress_is_shown_while_there_is_some_to_come_and_then_what_was_said() -> None:
    assert describe(status(12), 1001) == "12/500 fit step"
    assert describe(status(12), 1130) == "12/500 fit step, no progress for 2:10"
    assert describe(status(500), 1042) == "500 fit step done 0:42 ago"
    assert describe(status(500, said="pruning"), 1042) == "500 fit step done 0:42 ago; pruning"
    nothing = CellStatus(cell="c", stage="c", key="", said="reading data")
    assert describe(nothing, 1000) == "reading data"
    for shown in (describe(status(500), 1042), _line({"fit": status(500)})):
        assert "500/500" not in shown


def test_the_usual_gap_is_that_between_signs_of_one_series() -> None:
    assert gaps(100, 101, 102, 103, began=0) == 1  # preparations do not count
    assert gaps(30, began=10) == 20  # but as long as nothing else is known
    pace = Pace()
    pace.begin({"time": 0.0})
    for step in range(5):
        pace.move({"time": step, "done": step, "total": 5.0, "unit": "fit step"})
    assert pace.move({"time": 64.0, "done": 1, "total": 3.0, "unit": "epoch"}) == 60
    assert pace.move({"time": 94.0, "done": 2, "total": 3.0, "unit": "epoch"}) == 30


def test_the_live_table_draws_no_bar_that_is_full() -> None:
    for done, bar in ((250, True), (500, False)):
        console = RedactingConsole(width=120, force_terminal=True, record=True, file=io.StringIO())
        view = LiveView(console)
        view.show({"fit": status(done)}, now=True)
        view.close({"fit": status(done)})
        assert ("━" in console.export_text()) is bar
