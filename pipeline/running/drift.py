"""Changes since a run began: the store has its spec, but its code is that of the present folder.

A cell is touched if its key differs from the run's plan: because its own code (or a file, or a
default) has changed, or because a cell upstream is touched.
"""

from __future__ import annotations

import shlex
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.base.errors import BadInput, nearest
from pipeline.base.states import RunState
from pipeline.planning.acceptance import Acceptances
from pipeline.planning.keys import CODE_CHANGED, explain
from pipeline.planning.planner import Plan, PlannedCell, RunPlan, StoredCell, make_plan
from pipeline.running.record import RunRecord
from pipeline.running.trust import Trust
from pipeline.spec.load import load_spec
from pipeline.spec.spec import Spec
from pipeline.store.store import Store


def spec_of(record: RunRecord, store: Store, trust: Trust) -> Spec:
    """Return the spec that a run began with, even if the file has changed.

    A spec with code that `trust` does not name raises `BadInput`.
    """
    at = f" on {record.host}" if record.host else ""
    file = Path(record.options.file)
    whose = f"The spec of run {record.run_id} in {store.url}, which says that it is {file}{at},"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / file.name
        path.write_text(record.spec_text, encoding="utf-8")
        spec = load_spec(
            path, record.options.overrides, file.parent, partial(trust.require_plugins, whose)
        )
    trust.require_calls(whose, spec.cells)
    return replace(spec, path=file)  # the path that hints name


def plan_of(record: RunRecord, store: Store, trust: Trust) -> Plan:
    """Return the present plan of a run's spec, see `spec_of`."""
    return make_plan(spec_of(record, store, trust), store, replace(record.options, force=()))


def is_complete(record: RunRecord, store: Store) -> bool:
    """Tell whether a run is done and recorded, and the store has all of its results."""
    done = record.state is RunState.DONE and record.tracked
    return done and all(store.made(status.key) for status in record.cells.values())


@dataclass(frozen=True, kw_only=True)
class Drift:
    """The differences between a run's plan and the present one.

    Attributes:
        causes: cell -> its own changes, one phrase each.
        touched: all cells with another key than planned, in topological order.
        done: the touched cells whose planned results are in the store.
        code: stages whose code has changed, in topological order.
    """

    causes: Mapping[str, Sequence[str]]
    touched: Sequence[str]
    done: Sequence[str]
    code: Sequence[str]

    def lines(self) -> list[str]:
        """Return one line for each cause, with its cells."""
        groups: dict[str, list[str]] = {}
        for cell, phrases in self.causes.items():
            for phrase in phrases:
                groups.setdefault(phrase, []).append(cell)
        found = [f"{phrase}: {_count(cells)}" for phrase, cells in groups.items()]
        follow = [cell for cell in self.touched if cell not in self.causes]
        return found + ([f"cells downstream: {_count(follow)}"] if follow else [])

    def refusal(self, record: RunRecord, storage: str) -> str:
        """Return why a run is not resumed, and the commands that resume it."""
        where = record.where_in(storage)
        lines = [
            f"Run {record.run_id} began with other code or data. The changes:",
            *(f"  {line}" for line in self.lines()),
            f"{len(self.touched)} of {len(record.cells)} cells are touched; the store has "
            f"{len(self.done)} of their planned results.",
            f"To make the touched cells again: `fls resume {record.run_id} {where} --replan`.",
        ]
        if self.code:
            stages = " ".join(map(shlex.quote, self.code))
            lines.append(
                "To keep the results, if the new code would give the same ones: "
                f"`fls accept {stages} --why '...' --run {record.run_id} {where}`, and resume."
            )
        return "\n".join(lines)


def find_drift(plan: Plan, record: RunRecord, store: Store) -> Drift:
    """Return the changes between a run's stored plan and the present one."""
    before = _planned(record, store)
    accepted = Acceptances(store)
    causes: dict[str, list[str]] = {}
    touched: list[PlannedCell] = []
    for one in plan.cells:
        entry = before.get(one.cell.name)
        if entry is not None and entry.key != one.key:
            touched.append(one)
            own = _own_changes(entry.ingredients, one, accepted)
            if own:
                causes[one.cell.name] = own
    return Drift(
        causes=causes,
        touched=[one.cell.name for one in touched],
        done=[
            one.cell.name for one in touched if store.made(before[one.cell.name].key) is not None
        ],
        code=list(
            dict.fromkeys(
                one.cell.stage
                for one in touched
                if any(cause.startswith(CODE_CHANGED) for cause in causes.get(one.cell.name, ()))
            )
        ),
    )


def accept(
    store: Store, record: RunRecord, trust: Trust, stages: Sequence[str], why: str
) -> list[str]:
    """Accept the present code of some stages, or of all, as the code that a run began with.

    Args:
        store: the store.
        record: of the run.
        trust: names the code that may be imported.
        stages: the stages; empty for all.
        why: the reason.

    Returns the names of the cells whose code had changed.

    Raises:
        BadInput: the run has no such stage, or the reason is empty.
    """
    if not why.strip():
        raise BadInput("--why needs a reason, by which others can judge the results.")
    plan, before = plan_of(record, store, trust), _planned(record, store)
    stages = stages or list(plan.spec.stages)
    for stage in stages:
        if stage not in plan.spec.stages:
            known = plan.spec.stages
            raise BadInput(
                f"run {record.run_id} has no stage {stage!r}{nearest(stage, known)}; "
                f"stages: {', '.join(known)}"
            )
    acceptances = Acceptances(store)
    found = []
    for one in plan.cells:
        entry = before.get(one.cell.name)
        if one.cell.stage not in stages or entry is None:
            continue
        kind, old = one.cell.declaration.name, entry.ingredients["code"]
        if acceptances.root(kind, one.ingredients["code"]) != acceptances.root(kind, old):
            acceptances.add(kind, one.ingredients["code"], old, why=why, run=record.run_id)
            found.append(one.cell.name)
        elif found:
            found.append(one.cell.name)
    return found


def _planned(record: RunRecord, store: Store) -> Mapping[str, StoredCell]:
    """Return the cells as the run planned them."""
    plan = store.read_run(record.run_id, RunPlan)
    return plan.cells if plan else {}


def _own_changes(
    before: Mapping[str, Any], planned: PlannedCell, accepted: Acceptances
) -> list[str]:
    """Return a cell's own changes, without those upstream and those by `--force`."""
    after = planned.ingredients
    kind = planned.cell.declaration.name
    same = {name: after[name] for name in ("inputs", "names", "generation")}
    return explain({**before, "code": accepted.root(kind, before["code"]), **same}, after)


def _count(cells: Sequence[str]) -> str:
    """Return the stages of cells, each with its number of cells."""
    stages = Counter(cell.partition("[")[0] for cell in cells)
    return ", ".join(
        stage if stage in cells else f"{stage} ({count} cells)" for stage, count in stages.items()
    )
