"""What has changed since a run began: its spec is in the store, the code is wherever it is resumed.

A cell is touched if its key is no longer what the run planned. It is so by itself, because its code
(or a file, or a default) has changed, or because a cell upstream is.
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

from pipeline.base.errors import BadInput, Damaged, nearest
from pipeline.base.states import RunState
from pipeline.planning.acceptance import Acceptances
from pipeline.planning.keys import CODE_CHANGED, explain
from pipeline.planning.planner import Plan, PlannedCell, RunPlan, Selection, StoredCell, make_plan
from pipeline.running.record import RunRecord
from pipeline.running.trust import Trust
from pipeline.spec.load import load_spec
from pipeline.spec.spec import Spec
from pipeline.store.store import Store


def spec_of(record: RunRecord, store: Store, trust: Trust) -> Spec:
    """Return the spec that a run began with, whatever the file says by now.

    One that names code which `trust` does not is `BadInput`.
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
    return replace(spec, path=file)  # where a hint says it is


def plan_of(record: RunRecord, store: Store, trust: Trust) -> Plan:
    """Return the plan of a run as it would be made now; its spec is that of `spec_of`."""
    options = record.options
    selection = Selection(from_=options.from_, only=options.only, until=options.until)
    return make_plan(spec_of(record, store, trust), store, selection)


def is_complete(record: RunRecord, store: Store) -> bool:
    """Tell whether a run is done and recorded, and all its results are still there."""
    done = record.state is RunState.DONE and record.tracked
    return done and all(_stored(store, status.key) for status in record.cells.values())


@dataclass(frozen=True, kw_only=True)
class Drift:
    """What a run would no longer find as it planned it.

    Attributes:
        causes: cell -> what has changed of it, one phrase each.
        touched: all cells under another key than planned, in topological order.
        done: those of them whose results under the planned keys are in the store.
        code: stages of which code has changed, in topological order.
    """

    causes: Mapping[str, Sequence[str]]
    touched: Sequence[str]
    done: Sequence[str]
    code: Sequence[str]

    def lines(self) -> list[str]:
        """Return the causes for people: one line for each, with its cells."""
        groups: dict[str, list[str]] = {}
        for cell, phrases in self.causes.items():
            for phrase in phrases:
                groups.setdefault(phrase, []).append(cell)
        found = [f"{phrase}: {_count(cells)}" for phrase, cells in groups.items()]
        follow = [cell for cell in self.touched if cell not in self.causes]
        return found + ([f"what depends on them: {_count(follow)}"] if follow else [])

    def refusal(self, record: RunRecord, storage: str) -> str:
        """Return why a run does not go on, and how it may."""
        where = record.where_in(storage)
        lines = [
            f"Run {record.run_id} began with other code or data. What has changed:",
            *(f"  {line}" for line in self.lines()),
            f"{len(self.touched)} of {len(record.cells)} cells are touched; the store has "
            f"{len(self.done)} of their results, as the run planned them.",
            f"To make what has changed again: `fls resume {record.run_id} {where} --replan`.",
        ]
        if self.code:
            stages = " ".join(map(shlex.quote, self.code))
            lines.append(
                "To keep the results, because the new code would give the same: "
                f"`fls accept {stages} --why '...' --run {record.run_id} {where}`, and resume."
            )
        return "\n".join(lines)


def find_drift(plan: Plan, record: RunRecord, store: Store) -> Drift:
    """Return what has changed between a run's plan in the store and the present one."""
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
        done=[one.cell.name for one in touched if _stored(store, before[one.cell.name].key)],
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
    """Let the present code of some stages, or of all, count as the code that a run began with.

    Args:
        store: the store.
        record: of the run.
        trust: names the code that may be imported.
        stages: the stages; none for all.
        why: the reason.

    Returns:
        The names of the cells whose code was other code.

    Raises:
        BadInput: the run has no such stage, or there is no reason.
    """
    if not why.strip():
        raise BadInput("--why needs a reason: it is what others will judge the results by.")
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
    """Return what has changed of a cell itself, and not upstream nor by `--force`."""
    after = planned.ingredients
    kind = planned.cell.declaration.name
    same = {name: after[name] for name in ("inputs", "names", "generation")}
    return explain({**before, "code": accepted.root(kind, before["code"]), **same}, after)


def _count(cells: Sequence[str]) -> str:
    """Return the stages of cells, each with the number of its cells."""
    stages = Counter(cell.partition("[")[0] for cell in cells)
    return ", ".join(
        stage if stage in cells else f"{stage} ({count} cells)" for stage, count in stages.items()
    )


def _stored(store: Store, key: str) -> bool:
    try:
        return (store.manifest(key) or store.collected(key)) is not None
    except Damaged:
        return False
