"""The live view of a run: a table on a terminal, else a line now and then."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from datetime import datetime

from rich.console import Console
from rich.live import Live
from rich.text import Text

from pipeline.base.secrets import presentable
from pipeline.base.states import DRIVER_STATES, CellState
from pipeline.base.text import clock
from pipeline.running.activity import describe, stalled_since, unfinished
from pipeline.running.documents import CellStatus

_STYLES = {
    CellState.WAITING: "dim",
    CellState.RUNNING: "cyan",
    CellState.DONE: "green",
    CellState.CACHED: "blue",
    CellState.FAILED: "bold red",
    CellState.SKIPPED: "yellow",
}
_CELL = 9
_BARS = 8
_BAR = 24
_FRAME_S = 0.5
_LINE_S = 10.0


class LiveView:
    """Shows a run's cells; on a terminal it redraws in place, otherwise it prints sparsely."""

    def __init__(self, console: Console):
        self._console = console
        self._began = time.monotonic()
        self._next_s = 0.0
        self._shown = ""
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        if self._live is not None:
            self._live.start()

    def say(self, text: str) -> None:
        """Print a permanent line."""
        self._console.print(text, soft_wrap=True)

    def show(self, cells: Mapping[str, CellStatus], *, now: bool = False) -> None:
        """Show the cells' states, at most once a frame unless `now`."""
        elapsed = time.monotonic() - self._began
        if elapsed < self._next_s and not now:
            return
        if self._live is not None:
            self._next_s = elapsed + _FRAME_S
            self._live.update(_board(cells, elapsed, self._console.width), refresh=True)
            return
        self._next_s = elapsed + _LINE_S
        line = _line(cells)
        if line != self._shown:
            self._shown = line
            self.say(f"[{clock(elapsed):>6}] {line}")

    def close(self, cells: Mapping[str, CellStatus]) -> None:
        """Show the last state and leave the terminal as it was."""
        self.show(cells, now=True)
        if self._live is not None:
            self._live.stop()


def _board(cells: Mapping[str, CellStatus], elapsed_s: float, width: int) -> Text:
    """Draw a row for each stage, and below them a bar for each running cell.

    It is one text: Rich takes ten times as long for tables, many times a minute.
    """
    stages = _by_stage(cells)
    first = max(len(name) for name in ["stage  0:00:00", *stages]) + 2
    header = "".join(f"{state:>{_CELL}}" for state in DRIVER_STATES)
    lines = [Text(f"{'stage  ' + clock(elapsed_s):<{first}}" + header, "dim")]
    for stage, counts in stages.items():
        line = Text(f"{stage:<{first}}")
        for state in DRIVER_STATES:
            count = counts[state]
            line.append(f"{count or '·':>{_CELL}}", _STYLES[state] if count else "dim")
        lines.append(line)
    lines.append(Text())
    running = [status for status in cells.values() if status.state is CellState.RUNNING]
    name_width = min(max((len(status.cell) for status in running), default=0), width // 2)
    lines += [_bar(status, name_width) for status in running[:_BARS]]
    if len(running) > _BARS:
        lines.append(Text(f"and {len(running) - _BARS} more", "dim"))
    return Text("\n", no_wrap=True, overflow="crop").join(lines)


def _bar(status: CellStatus, name_width: int) -> Text:
    """Draw the progress of a running cell."""
    line = Text(f"{_shorten(status.cell, name_width):<{name_width}}  ")
    if progress := unfinished(status):
        filled = round(_BAR * max(0.0, progress[0] / progress[1]))
        line.append("━" * filled, "cyan").append("━" * (_BAR - filled) + "  ", "dim")
    style = "yellow" if stalled_since(status) is not None else ""
    line.append(presentable(describe(status)), style)
    if status.began is not None:
        line.append(f"  {clock(time.time() - status.began)}", "dim")
    return line


def _shorten(name: str, width: int) -> str:
    return name if len(name) <= width else name[: width - 1] + "…"


def _line(cells: Mapping[str, CellStatus]) -> str:
    """Summarise the run in one line."""
    counts = Counter(status.state for status in cells.values())
    parts = [f"{counts[state]} {state}" for state in DRIVER_STATES if counts[state]]
    running = []
    for status in cells.values():
        if status.state is CellState.RUNNING:
            running.append(status.cell + _standing(status))
    more = f", and {len(running) - 3} more" if len(running) > 3 else ""
    return ", ".join(parts) + (": " + ", ".join(running[:3]) + more if running else "")


def _standing(status: CellStatus) -> str:
    """Return a cell's progress in words that change only with it."""
    if status.progress is None:
        return ""
    done, total, unit = status.progress
    if not unfinished(status):
        return f" ({total:g} {unit} done)"
    since = stalled_since(status)
    stalled = f" (no progress since {datetime.fromtimestamp(since):%H:%M})" if since else ""
    return f" {done:g}/{total:g} {unit}{stalled}"


def _by_stage(cells: Mapping[str, CellStatus]) -> dict[str, Counter[CellState]]:
    stages: dict[str, Counter[CellState]] = {}
    for status in cells.values():
        stages.setdefault(status.stage, Counter())[status.state] += 1
    return stages
