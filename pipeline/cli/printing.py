"""Printing of plans, stage types, runs, logs and results."""

from __future__ import annotations

import shlex
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.base.secrets import presentable
from pipeline.base.states import DRIVER_STATES, CellState, PlanState, RunState
from pipeline.base.text import clock
from pipeline.planning.planner import Plan, PlannedCell
from pipeline.running.activity import describe
from pipeline.running.documents import CellStatus
from pipeline.running.record import RunRecord
from pipeline.running.runs import load_run
from pipeline.spec.cells import shorten
from pipeline.spec.describe import example_of, names_of, parameters_of
from pipeline.spec.spec import Spec
from pipeline.stage import Catalogue, Stage
from pipeline.store.events import EVENTS_AT_ONCE, words
from pipeline.store.logs import last_lines, read_text
from pipeline.store.store import Store
from pipeline.tracking import TrackerName

_FOLLOW_EVERY_S = 1.0


def print_plan(plan: Plan, console: Console, *, why: bool) -> None:
    """Print a line for each stage and, with `why`, each cell's reason below it."""
    table = _table("stage", "cells", *PlanState, "memory", "disk")
    stages: dict[str, list[PlannedCell]] = {}
    for planned in plan.cells:
        stages.setdefault(planned.cell.stage, []).append(planned)
    for stage, group in stages.items():
        counts = [sum(one.state == state for one in group) for state in PlanState]
        todo = [one.estimate for one in group if one.state is PlanState.RUN and one.estimate]
        memory = max((one.memory_bytes for one in todo if one.memory_bytes), default=None)
        disk = sum(one.disk_bytes for one in todo if one.disk_bytes) or None
        numbers = [str(count or "·") for count in counts]
        table.add_row(stage, str(len(group)), *numbers, size(memory), size(disk))
    console.print(table)
    if why:
        for planned in plan.cells:
            _say(console, f"{planned.cell.name}: {planned.state}: {planned.why}")
    for note in plan.notes:
        _say(console, note)
    todo_count = sum(one.state is PlanState.RUN for one in plan.cells)
    _say(console, f"{todo_count} of {len(plan.cells)} cells to run.")


def print_inspections(found: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print the findings of inspectors, a table per object."""
    for one in found:
        _say(console, f"{one['title']} ({shorten(one['cells'])})")
        table = _table(*one["columns"])
        for row in one["rows"]:
            table.add_row(*(_number(row[column]) for column in one["columns"]))
        console.print(table)
        _say(console, "  ".join(f"{name} {_number(n)}" for name, n in one["totals"].items()) + "\n")


def print_names(module: str, catalogue: Catalogue, console: Console) -> None:
    """Print the names that a plugin declares, a paragraph for each kind."""
    for kind, names in names_of(catalogue).items():
        first = kind == "stage type"
        _say(console, f"{kind}s of {module}:" if first else f"\n{kind} names:")
        for name, summary in names.items():
            _say(console, f"  {name:<24}{summary}")


def print_stage(stage: Stage, console: Console) -> None:
    """Print a stage type's inputs, outputs and parameters, with an example."""
    _say(console, f"{stage.name}: {stage.summary}\n")
    for name, one in stage.inputs.items():
        more = ", several" * one.many + ", optional" * one.optional
        _say(console, f"input {name}: {one.kind}{more}{one.summary and f'; {one.summary}'}")
    for name, output in stage.outputs.items():
        _say(console, f"output {name}: {output.kind}")
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("parameter", "default", "type", "meaning"):
        table.add_column(column, no_wrap=column == "parameter", overflow="fold")
    for parameter in parameters_of(stage):
        given = "(required)" if parameter.default is None else parameter.default
        kind = ", ".join(filter(None, [parameter.type, parameter.range]))
        table.add_row(parameter.name, given, kind, parameter.meaning)
    console.print("", table)
    _say(console, f"\nexample: {example_of(stage)}")


def print_reports(spec: Spec, store: Store, keys: Mapping[str, str], console: Console) -> None:
    """Print the tables of promoted outputs, and the paths of their other files.

    Args:
        spec: declares the outputs.
        store: holds them.
        keys: cell -> key, of the cells with results.
        console: prints.
    """
    for cell in spec.cells:
        for output, declared in cell.declaration.outputs.items():
            if declared.promote and cell.name in keys:
                folder = store.fetch(keys[cell.name], output)
                table = folder / "table.md"
                if table.is_file():
                    _say(console, f"\n{table.read_text(encoding='utf-8')}")
                for path in sorted(folder.iterdir()):
                    if path != table:
                        _say(console, f"{cell.name}: {_shown(path)}")


def print_rows(columns: Sequence[str], rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print results as a table, without the columns for programs."""
    shown = [column for column in columns if column not in {"cell", "key", "run_id"}]
    table = _table(*shown)
    for row in rows:
        table.add_row(*("" if row[column] is None else _number(row[column]) for column in shown))
    console.print(table)


def print_failures(record: RunRecord, console: Console) -> None:
    """Print the failed cells, their errors, and the commands for their logs."""
    for name, status in record.cells.items():
        if status.state is CellState.FAILED and status.error:
            _say(console, f"\n{name} failed: {status.error['message']}")
            logs = f"fls logs {shlex.quote(name)} --run {record.run_id}{record.where}"
            _say(console, f"  more: {logs}")
    skipped = [name for name, status in record.cells.items() if status.state is CellState.SKIPPED]
    if skipped:
        _say(console, f"\n{len(skipped)} cells were skipped: their inputs are missing.")


def print_runs(records: Iterable[RunRecord], console: Console) -> None:
    """Print a line for each run."""
    table = _table("run", "file", "began", "state", "done", "cached", "failed", "of")
    for record in records:
        states = [status.state for status in record.cells.values()]
        table.add_row(
            record.run_id,
            record.options.file,
            f"{datetime.fromtimestamp(record.began):%Y-%m-%d %H:%M}",
            record.observed_state(),
            *(
                str(states.count(s) or "·")
                for s in (CellState.DONE, CellState.CACHED, CellState.FAILED)
            ),
            str(len(states)),
        )
    console.print(table)


def run_summary(record: RunRecord) -> dict[str, Any]:
    """Return the state of a run, for JSON."""
    counts = Counter(status.state for status in record.cells.values())
    return {
        "run": record.run_id,
        "file": record.options.file,
        "began": record.began,
        "state": record.observed_state(),
        "counts": {str(state): counts[state] for state in CellState if counts[state]},
    }


def print_run(record: RunRecord, console: Console) -> None:
    """Print one run: its state, its stages, and its running and failed cells."""
    state = record.observed_state()
    _say(console, f"Run {record.run_id} of {record.options.file}: {state}")
    for name in record.damaged:
        _say(console, f"Its document `{name}` is damaged; the content is unknown.")
    stages: dict[str, list[CellState]] = {}
    for status in record.cells.values():
        stages.setdefault(status.stage, []).append(record.observed_cell_state(status))
    found = {state for states in stages.values() for state in states}
    columns = [state for state in CellState if state in {*DRIVER_STATES, *found}]
    table = _table("stage", *columns)
    for stage, states in stages.items():
        table.add_row(stage, *(str(states.count(column) or "·") for column in columns))
    console.print(table)
    for name, status in record.cells.items():
        if record.observed_cell_state(status) is CellState.RUNNING and (at := describe(status)):
            _say(console, f"{name}: {at}")
    print_failures(record, console)
    if state not in {RunState.RUNNING, RunState.DONE}:
        _say(console, f"`{record.resume_command}` resumes it.")


def print_log(
    store: Store, status: CellStatus, console: Console, *, tail: int | None = None
) -> None:
    """Print the logs of a cell's attempts, with the tracebacks of failed ones.

    With `tail`, print at most that many last lines of the newest attempt.
    """
    attempts = store.attempts(status.key)
    for attempt in attempts if tail is None else attempts[-1:]:
        _say(console, _attempt_head(store, status.key, attempt))
        found = store.log_segments(status.key, attempt)
        if not found:
            _print_events(store, status.key, attempt, console)
        elif tail is None:
            for text, _ in read_text(store.storage, found):
                _stream(console, text)
        else:
            _stream(console, last_lines(store.storage, found, tail))
        failure = store.failure(status.key, attempt)
        if failure:
            _say(console, failure.get("traceback") or failure["message"])
    if status.error:
        _say(console, f"{status.state}: {status.error['message']}")


def follow_log(
    store: Store, run_id: str, cell: str, console: Console, *, tail: int | None = None
) -> None:
    """Print the log of a cell of a run as it grows, until the cell or the run has ended.

    With `tail`, start with at most that many of its last lines.
    """
    at: dict[int, int] = {}  # attempt -> number of printed bytes of its log
    while True:
        record = load_run(store, run_id)
        status = record.status(cell)
        for attempt in store.attempts(status.key):
            if at and attempt < max(at):
                continue
            first = _first_event(store, status.key, attempt)
            if first is None or first.get("run", run_id) != run_id:
                continue
            if attempt not in at:
                _say(console, _attempt_head(store, status.key, attempt))
            at[attempt] = _follow(store, status.key, attempt, at.get(attempt), tail, console)
        unsettled = status.state in {CellState.WAITING, CellState.RUNNING}
        if not (unsettled and record.is_at_work()):
            break
        time.sleep(_FOLLOW_EVERY_S)
    if status.error:
        _say(console, f"{status.state}: {status.error.get('traceback') or status.error['message']}")
    else:
        _say(console, f"{cell}: {record.observed_cell_state(status)}")


def _follow(
    store: Store, key: str, attempt: int, at: int | None, tail: int | None, console: Console
) -> int:
    """Print the complete lines of an attempt's log after byte `at`; return the new position."""
    found = store.log_segments(key, attempt)
    if at is None and tail is not None and found:
        whole, _, unfinished = last_lines(store.storage, found, tail).rpartition("\n")
        if whole:
            _stream(console, f"{whole}\n")
        return found[-1].end - len(unfinished.encode())
    at = at or 0
    for text, end in read_text(store.storage, found, at):
        if text.endswith("\n"):
            _stream(console, text)
            at = end
    return at


def _first_event(store: Store, key: str, attempt: int) -> Mapping[str, Any] | None:
    events, _ = store.read_events(key, attempt, limit=1)
    return events[0] if events else None


def _attempt_head(store: Store, key: str, attempt: int) -> str:
    host = (_first_event(store, key, attempt) or {}).get("host", "?")
    return f"attempt {attempt} on {host}"


def _print_events(store: Store, key: str, attempt: int, console: Console) -> None:
    """Print the output of an attempt that is older than logs: its lines are events."""
    began, last, more = None, 0, True
    while more:
        events, last = store.read_events(key, attempt, last, limit=EVENTS_AT_ONCE)
        for event in events:
            began = began or event
            text = _event_text(event)
            if text:
                _say(console, f"{_since(began, event):>8}  {text}")
        more = len(events) >= EVENTS_AT_ONCE


def _stream(console: Console, text: str) -> None:
    """Print a piece of a log without rich, which is a hundred times slower."""
    console.file.write(presentable(text))


def _since(began: Mapping[str, Any], event: Mapping[str, Any]) -> str:
    try:
        return clock(event["time"] - began["time"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return "?"


def _event_text(event: Mapping[str, Any]) -> str:
    """Return an event as text for people; an unknown event as it is."""
    try:
        return words(event)
    except (KeyError, TypeError, ValueError, AttributeError):
        return str(event)


def print_tracking(record: RunRecord, folder: str, console: Console) -> None:
    """Print the command or file that shows the whole run; `folder` holds the JSON lines."""
    if record.options.tracking is TrackerName.MLFLOW:
        file = record.options.file
        command = "fls ui" if file == "pipeline.yaml" else f"fls ui {shlex.quote(file)}"
        _say(console, f"\nAll runs side by side: {command}")
    else:
        _say(console, f"\nAll events: {folder}/{record.run_id}.jsonl")


def size(number: int | None) -> str:
    """Return a number of bytes for people.

    >>> size(None), size(512), size(3_500_000)
    ('', '512 B', '3.5 MB')
    """
    if number is None:
        return ""
    value = float(number)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _say(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True)


def _shown(path: Path) -> str:
    """Return a path, relative to the working directory if it lies below."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
