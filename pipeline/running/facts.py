"""The facts about a run and its cells that tracking records, kept in the store.

With them, `fls sync` can send the missing parts of a run from any folder that names the address.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from pipeline.base.errors import DamagedDocument
from pipeline.base.places import absolute_uri
from pipeline.base.states import PlanState
from pipeline.planning.acceptance import describe
from pipeline.planning.planner import Plan, PlannedCell
from pipeline.running.documents import RunRequest, RunTracking
from pipeline.store.layout import run_document
from pipeline.store.store import Store
from pipeline.tracking import CellFacts, RunFacts, TrackerName, place


@dataclass(frozen=True, kw_only=True)
class StoredFacts:
    """The stored facts of a run, and of each cell under the key that was planned."""

    DOCUMENT: ClassVar[str] = "facts"
    run: RunFacts
    cells: Sequence[CellFacts]

    @property
    def by_name(self) -> dict[str, CellFacts]:
        """The facts of cells, by their names."""
        return {cell.cell: cell for cell in self.cells}


def cell_facts(planned: PlannedCell) -> CellFacts:
    """Return the facts of a planned cell."""
    outputs, registration = planned.cell.declaration.outputs, planned.cell.registration
    accepted = planned.ingredients.get("accepted")
    data = {name: ", ".join(digests) for name, digests in planned.data.items()}
    return CellFacts(
        cell=planned.cell.name,
        stage=planned.cell.stage,
        key=planned.key,
        params=planned.cell.params.model_dump(mode="json"),
        digests={**data, **planned.ingredients["files"]},
        kept=[name for name, declared in outputs.items() if declared.track],
        promoted=[name for name, declared in outputs.items() if declared.promote],
        tags={"fls.accepted": describe(accepted)} if accepted else {},
        registration=registration,
    )


def save_facts(store: Store, run: RunFacts, plan: Plan) -> None:
    """Store the facts of a run; where it is tracked without credentials, like all documents."""
    stored = replace(run, uri=absolute_uri(run.uri), folder=os.path.abspath(run.folder))
    facts = StoredFacts(run=stored, cells=[cell_facts(planned) for planned in plan.cells])
    store.write_run(run.run_id, facts)


def unregistered(store: Store, plan: Plan, tracker: TrackerName) -> list[str]:
    """Return the selected cells with stored results whose models are still to be registered.

    Args:
        store: holds their results, and the registrations of earlier runs.
        plan: the plan.
        tracker: of the registry that a run from here would use.

    Cost: two or three small documents for each run, newest first, until all cells are found.
    """
    wanted = {
        (one.key, one.cell.registration.name): one.cell.name
        for one in plan.cells
        if one.cell.registration
        and one.selected
        and one.state is PlanState.CACHED
        and not one.collected
    }
    here = place(plan.spec.tracking_uri()) if tracker is TrackerName.MLFLOW else ""
    for run_id in reversed(store.list_runs()):
        if not wanted:
            break
        for found in _registered(store, run_id, tracker, here):
            wanted.pop(found, None)
    return list(wanted.values())


def _registered(
    store: Store, run_id: str, tracker: TrackerName, here: str
) -> Iterator[tuple[str, str]]:
    """Yield the key and the registered name of each model that a run has registered.

    `here` is the server; "" for any.
    """
    tracking = store.peek_run(run_id, RunTracking)
    if tracking is None or not tracking.registered:
        return
    if here and tracking.destination not in {"", here}:
        return
    request, facts = store.peek_run(run_id, RunRequest), store.peek_run(run_id, StoredFacts)
    if request and facts and request.options.tracking is tracker:
        registrations = {one.cell: one.registration for one in facts.cells}
        for cell in tracking.registered:
            key, registration = tracking.keys.get(cell), registrations.get(cell)
            if key and registration:
                yield key, registration.name


def load_facts(store: Store, run_id: str) -> StoredFacts | None:
    """Return the facts of a run, or None.

    Its tracking address and loaders come from the store: check them by `pipeline.running.trust`
    before use.

    Raises:
        DamagedDocument: the facts are damaged, or another run's.
    """
    facts = store.read_run(run_id, StoredFacts)
    if facts is None:
        return None
    if facts.run.run_id != run_id:
        path = run_document(run_id, StoredFacts.DOCUMENT)
        raise DamagedDocument(
            f"{store.url}/{path} is damaged: run.run_id: expected the folder's name, got "
            f"{facts.run.run_id[:100]!r}."
        )
    return replace(facts, run=replace(facts.run, resumed=True))
