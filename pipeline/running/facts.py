"""The facts about a run and its cells that tracking records, kept in the store.

With them, `fls sync` can send the missing parts of a run from any folder that names the address.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace

from pipeline.base.errors import DamagedDocument
from pipeline.base.places import absolute_uri
from pipeline.planning.acceptance import describe
from pipeline.planning.planner import Plan, PlannedCell
from pipeline.store.store import Store
from pipeline.tracking import CellFacts, RunFacts, TrackerName, place

_DOCUMENT = "facts"


@dataclass(frozen=True, kw_only=True)
class StoredFacts:
    """The stored facts: about the run, and cell -> facts under its planned key."""

    run: RunFacts
    cells: Mapping[str, CellFacts]


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
        registration=asdict(registration) if registration else None,
    )


def save_facts(store: Store, run: RunFacts, plan: Plan) -> None:
    """Store the facts of a run; its tracking address is stored without credentials."""
    cells = [asdict(cell_facts(planned)) for planned in plan.cells]
    for cell in cells:
        del cell["calls"]
    stored = replace(run, uri=absolute_uri(run.uri), folder=os.path.abspath(run.folder))
    document = {"run": asdict(stored), "cells": cells}
    store.write_run(run.run_id, _DOCUMENT, document)


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
        if one.cell.registration and one.selected and one.state == "cached" and not one.collected
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
    tracking = store.peek_run(run_id, "tracking")
    if tracking and here and tracking.get("destination") not in {None, "", here}:
        return
    if not tracking or not tracking["registered"]:
        return
    request, facts = store.peek_run(run_id, "run"), store.peek_run(run_id, _DOCUMENT)
    if request and facts and request["options"]["tracking"] == tracker:
        names = {one["cell"]: one["registration"] for one in facts["cells"]}
        for cell in tracking["registered"]:
            if names.get(cell):
                yield tracking["keys"][cell], names[cell]["name"]


def load_facts(store: Store, run_id: str) -> StoredFacts | None:
    """Return the facts of a run, or None.

    Its tracking address and loaders come from the store: check them by `pipeline.running.trust`
    before use.

    Raises:
        DamagedDocument: the facts are damaged, or another run's.
    """
    document = store.read_run(run_id, _DOCUMENT)
    if document is None:
        return None
    run = RunFacts(**{**document["run"], "resumed": True})
    if run.run_id != run_id:
        raise DamagedDocument(
            f"{store.url}/runs/{run_id}/{_DOCUMENT}.json is damaged: run.run_id: expected the "
            f"folder's name, got {run.run_id[:100]!r}."
        )
    return StoredFacts(
        run=run,
        cells={fields["cell"]: CellFacts(**fields) for fields in document["cells"]},
    )
