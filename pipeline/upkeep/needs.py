"""The results that kept runs and current plans of pipelines need."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from pipeline.base.errors import BadInput, DamagedDocument, StoreError
from pipeline.base.states import PlanState, RunState
from pipeline.planning.keys import base_of
from pipeline.planning.planner import Plan, RunPlan
from pipeline.running.documents import DOCUMENTS, CellStatus, RunProgress
from pipeline.running.record import RunRecord
from pipeline.running.runs import load_run
from pipeline.store.layout import RUNS, run_folder
from pipeline.store.manifest import Manifest
from pipeline.upkeep.survey import Survey


class Needs:
    """The needs of the runs and plans added so far.

    Attributes:
        keys: needed keys.
        busy: keys in work by live runs.
        bases: needed base identities.
        served: keys whose files no downstream cell needs any more -> manifest.
        whole: keys whose files another pipeline or an unfinished run needs nevertheless.
        names: key -> cell.
        dropped: run -> reason.
        kept: run that a limit would drop -> the reason why it is kept.
    """

    def __init__(self, survey: Survey):
        self.survey = survey
        self.keys: set[str] = set()
        self.busy: set[str] = set()
        self.bases: set[str] = set()
        self.served: dict[str, Manifest] = {}
        self.whole: set[str] = set()
        self.names: dict[str, str] = {}
        self.dropped: dict[str, str] = {}
        self.kept: dict[str, str] = {}

    def judge_runs(self, pipelines: Collection[str]) -> None:
        """Decide which runs are kept, and add their needs.

        Args:
            pipelines: names of the pipelines with current plans, see `need_plan`.

        Raises:
            StoreError: the documents of a run cannot be read.
        """
        records = []
        for run_id in [name for top, name in self.survey.folders if top == RUNS]:
            files = self.survey.folders[RUNS, run_id]
            names = {file.path.rpartition("/")[2] for file in files}
            begun = names.issuperset(f"{one.DOCUMENT}.json" for one in DOCUMENTS)
            if not begun and self.survey.is_old(files):
                self.dropped[run_id] = "a run that was killed before it began"
                continue
            try:
                plan, cells = self.documents(run_id)
                if begun:
                    records.append((load_run(self.survey.store, run_id), plan, cells))
                else:
                    self.need_documents(plan, cells, live=True)
            except (BadInput, DamagedDocument) as error:
                raise StoreError(
                    f"{error}\nSo the needs of run {run_id} are unknown. Delete the folder "
                    f"{run_folder(run_id)} of {self.survey.store.url} if you can do without it."
                ) from error
        records.sort(key=lambda found: found[0].run_id, reverse=True)
        for place, (record, plan, cells) in enumerate(records):
            live = self.is_live(record)
            reason = None if live else self.why_drop(record, place)
            if reason and (why := _why_keep(record)):
                self.kept[record.run_id] = why
                reason = None
            if reason:
                self.dropped[record.run_id] = reason
                self.names |= {stored.key: cell for cell, stored in plan.cells.items()}
            else:
                self.need_documents(plan, cells, live=live)
                done = record.state is RunState.DONE
                self.whole |= {
                    stored.key
                    for stored in plan.cells.values()
                    if not done or (plan.pipeline not in pipelines and stored.keep == "all")
                }

    def documents(self, run_id: str) -> tuple[RunPlan, Sequence[CellStatus]]:
        """Return the plan of a run and the statuses of its cells; empty ones without."""
        plan = self.survey.store.read_run(run_id, RunPlan) or RunPlan(pipeline="", cells={})
        progress = self.survey.store.read_run(run_id, RunProgress)
        return plan, progress.cells if progress else ()

    def is_live(self, record: RunRecord) -> bool:
        """Tell whether a run works, or was heard of within the grace period."""
        recent = record.silence_s() < self.survey.retention.grace_s
        return record.observed_state() is RunState.RUNNING or (
            record.state is RunState.RUNNING and recent
        )

    def why_drop(self, record: RunRecord, place: int) -> str | None:
        """Return why a run, the `place`-th newest from 0, is dropped; None if it is kept."""
        keep, age_s = self.survey.retention.keep_runs, self.survey.retention.older_than_s
        reasons = []
        if keep is not None:
            reasons.append(f"a run before the newest {keep}" if place >= keep else "")
        if age_s is not None:
            days = (self.survey.now - record.began) / 86400
            reasons.append(f"a run of {days:.1f} days ago" if days * 86400 > age_s else "")
        return reasons[0] if reasons and all(reasons) else None

    def need_documents(self, plan: RunPlan, cells: Iterable[CellStatus], *, live: bool) -> None:
        """Add the needs of a run: its planned keys, and those of cells with fewer inputs."""
        keys = {stored.key: cell for cell, stored in plan.cells.items()}
        keys |= {status.key: status.cell for status in cells}
        self.names |= keys
        self.keys |= keys.keys()
        if live:
            self.busy |= keys.keys()
        self.bases |= {base_of(stored.ingredients) for stored in plan.cells.values()}

    def need_plan(self, plan: Plan) -> None:
        """Add the needs of a pipeline's current plan."""
        served = _served(plan)
        self.served |= served
        for one in plan.cells:
            self.names[one.key] = one.cell.name
            self.keys.add(one.key)
            self.bases.add(base_of(one.ingredients))
            if one.key not in served:
                self.whole.add(one.key)


def _why_keep(record: RunRecord) -> str | None:
    """Return why an ended run must not be dropped, or None."""
    if record.is_attended():
        return f"is kept: process {record.pid} on {record.host} is recording it"
    if not record.tracked and record.destination:
        return f"is kept: {record.destination} lacks part of it; `{record.sync_command}` sends it"
    return None


def _served(plan: Plan) -> dict[str, Manifest]:
    """Return key -> manifest of results whose files no downstream cell needs any more.

    All cells with the key must agree.
    """
    waiting: set[str] = set()  # cells that are incomplete, or upstream of such a cell
    taken: set[str] = set()
    found: dict[str, Manifest] = {}
    kept: set[str] = set()
    for one in reversed(plan.cells):
        outputs = one.cell.declaration.outputs.values()
        result = any(output.track or output.promote for output in outputs)
        name = one.cell.name
        if one.state is not PlanState.CACHED or name in waiting:
            waiting.update([name, *one.cell.sources])
        taken.update(one.cell.sources)
        served = one.cell.keep == "results" and name in taken and name not in waiting
        if served and one.manifest and not one.collected and not result:
            found[one.key] = one.manifest
        else:
            kept.add(one.key)
    return {key: manifest for key, manifest in found.items() if key not in kept}
