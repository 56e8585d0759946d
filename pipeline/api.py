"""The runner from Python: `pipeline.run`, `pipeline.plan` and `pipeline.results`.

They are the commands of the same names with objects as results, also for notebooks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from pipeline.base.console import RedactingConsole
from pipeline.base.errors import BadInput
from pipeline.base.states import CellState, RunState
from pipeline.base.variables import check_variables
from pipeline.executors import ExecutorName
from pipeline.planning.planner import Plan, Selection, make_plan
from pipeline.running.documents import RunOptions
from pipeline.running.launch import Ended, run_and_read
from pipeline.running.results import result_rows
from pipeline.spec.load import load_spec
from pipeline.spec.spec import Spec
from pipeline.store.store import Store
from pipeline.tracking import TrackerName

if TYPE_CHECKING:
    import pandas

_WIDTH = 120


@dataclass(frozen=True, kw_only=True)
class Results(Sequence[Mapping[str, Any]]):
    """Rows of evaluated models.

    Attributes:
        columns: the order of columns in tables.
        rows: mappings of columns, and perhaps further fields, to values.
        absent: cells without results.
    """

    columns: Sequence[str] = ()
    rows: Sequence[Mapping[str, Any]] = ()
    absent: Sequence[str] = ()

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return iter(self.rows)

    def __repr__(self) -> str:
        return f"Results({len(self.rows)} rows, {len(self.absent)} cells absent)"

    def frame(self) -> pandas.DataFrame:
        """Return the rows as a pandas frame.

        Raises:
            BadInput: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise BadInput("A frame needs pandas: `pip install pandas`.") from error
        return pandas.DataFrame([dict(row) for row in self.rows], columns=list(self.columns))


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that has ended.

    Attributes:
        run_id: its id; "" if all results were in the store.
        state: "done", "failed" or "stopped".
        cells: cell -> state.
        errors: cell -> message, of failed cells.
        results: rows of the evaluated models.
    """

    run_id: str
    state: str
    cells: Mapping[str, str] = field(default_factory=dict)
    errors: Mapping[str, str] = field(default_factory=dict)
    results: Results = field(default_factory=Results)

    def __repr__(self) -> str:
        return f"Run({self.run_id or 'nothing to run'}: {self.state}, {len(self.cells)} cells)"


def run(
    file: str | Path = "pipeline.yaml",
    *,
    set: Mapping[str, Any] | None = None,
    executor: str = "ray",
    tracking: str = "mlflow",
    from_: Sequence[str] = (),
    only: Sequence[str] = (),
    until: Sequence[str] = (),
    force: Sequence[str] = (),
    max_parallel: int | None = None,
    stop_after_s: float | None = None,
    quiet: bool = False,
) -> Run:
    """Run a pipeline, or selected cells of it, as `fls run` does.

    Ctrl-C stops it after checkpoints. Bad input is an error of `pipeline.base.errors`, and so is a
    result of this run that is damaged: another run replaces it.

    Args:
        file: the pipeline.
        set: parameter -> value, such as {"vars.sparsities": [0.5, 0.9]}.
        executor: "ray" or "local".
        tracking: "mlflow" or "jsonl".
        from_: cells or stages; they run with all downstream cells.
        only: the only cells or stages that run.
        until: cells or stages; they run with all upstream cells.
        force: cells or stages that run again.
        max_parallel: number of concurrent cells, >= 1; None for no limit.
        stop_after_s: seconds after which the run is stopped, to be resumed later; None for never.
        quiet: print nothing.
    """
    spec, selection = _load(file, set), _selection(from_, only, until, force)
    options = RunOptions(
        file=str(file),
        overrides=_overrides(set),
        **vars(selection),
        executor=_name(ExecutorName, "executor", executor),
        tracking=_name(TrackerName, "tracking", tracking),
        max_parallel=max_parallel,
    )
    console = Console(quiet=True) if quiet else RedactingConsole(width=_WIDTH)
    return run_and_read(spec, options, console, _run_of, stop_after_s)


def plan(
    file: str | Path = "pipeline.yaml",
    *,
    set: Mapping[str, Any] | None = None,
    from_: Sequence[str] = (),
    only: Sequence[str] = (),
    until: Sequence[str] = (),
    force: Sequence[str] = (),
) -> Plan:
    """Return the plan of `run` with the same arguments: `plan.cells`, each with state and why."""
    spec = _load(file, set)
    return make_plan(spec, Store(spec.storage), _selection(from_, only, until, force))


def results(file: str | Path = "pipeline.yaml", *, set: Mapping[str, Any] | None = None) -> Results:
    """Return the stored results of a pipeline: one row per evaluated model."""
    return _results_of(_load(file, set))


def _results_of(spec: Spec) -> Results:
    columns, rows, absent = result_rows(spec, Store(spec.storage))
    return Results(columns=columns, rows=rows, absent=absent)


def _run_of(ended: Ended) -> Run:
    record, found = ended.record, Results()
    if ended.spec is not None and any(one.catalogue.results for one in ended.spec.plugins):
        found = _results_of(ended.spec)
    if record is None:
        return Run(run_id="", state=str(RunState.DONE), results=found)
    failed = {name: one for name, one in record.cells.items() if one.state is CellState.FAILED}
    return Run(
        run_id=record.run_id,
        state=str(record.state),
        cells={name: str(status.state) for name, status in record.cells.items()},
        errors={name: one.error["message"] for name, one in failed.items() if one.error},
        results=found,
    )


def _load(file: str | Path, given: Mapping[str, Any] | None) -> Spec:
    check_variables()
    return load_spec(Path(file), _overrides(given))


def _overrides(given: Mapping[str, Any] | None) -> list[str]:
    try:
        return [f"{name}={json.dumps(value)}" for name, value in (given or {}).items()]
    except (TypeError, ValueError) as error:
        raise BadInput(f"set: expected values as in YAML, {error}.") from error


def _selection(
    from_: Sequence[str], only: Sequence[str], until: Sequence[str], force: Sequence[str]
) -> Selection:
    """Return a selection; a single name counts as a list."""
    lists = [[one] if isinstance(one, str) else list(one) for one in (from_, only, until, force)]
    return Selection(from_=lists[0], only=lists[1], until=lists[2], force=lists[3])


def _name(kind: Any, what: str, given: str) -> Any:
    try:
        return kind(given)
    except ValueError:
        raise BadInput(f"{what}: expected {' or '.join(kind)}, got {given!r}.") from None
