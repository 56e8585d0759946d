"""Plans of runs: the state of each cell (cached, run or blocked), with the reason."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from pipeline.base.errors import BadInput, Damaged
from pipeline.base.shapes import checked_as
from pipeline.base.states import PlanState
from pipeline.planning.acceptance import Acceptances, describe
from pipeline.planning.keys import CODE_CHANGED, Identity, Ingredients, explain, identify
from pipeline.spec.cells import Cell, resolve, shorten
from pipeline.spec.spec import Spec
from pipeline.stage import Estimate, Params
from pipeline.store.manifest import Manifest
from pipeline.store.store import Store

_MEMORY = 10  # number of earlier runs that `why` searches


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The requested part of a spec, as lists of addresses, see `pipeline.spec.cells.resolve`.

    Attributes:
        from_: these and all downstream cells may run; others come from the store.
        only: only these may run.
        until: these and all upstream cells may run.
        force: these run again, and so do all downstream cells.
    """

    from_: Sequence[str] = ()
    only: Sequence[str] = ()
    until: Sequence[str] = ()
    force: Sequence[str] = ()

    def __str__(self) -> str:
        options = {"--from": self.from_, "--only": self.only, "--until": self.until}
        return " ".join(f"{option} {one}" for option, given in options.items() for one in given)


@dataclass(frozen=True, kw_only=True)
class PlannedCell:
    """One cell of a plan.

    Attributes:
        cell: the cell.
        key: its key.
        ingredients: see `pipeline.planning.keys.Identity`.
        data: parameter -> digests of the data behind the result, its own or that of upstream cells.
        state: see `PlanState`.
        why: the reason of the state, for people.
        selected: whether the selection lets it run.
        manifest: of a cached cell.
        collected: whether it is cached without its files, which no cell needs.
        estimate: the stage's forecast, or None.
    """

    cell: Cell
    key: str
    ingredients: Mapping[str, Any]
    data: Mapping[str, Sequence[str]]
    state: PlanState
    why: str
    selected: bool
    manifest: Manifest | None
    collected: bool
    estimate: Estimate | None

    def row(self) -> dict[str, str]:
        """Return its row in `fls plan --json`."""
        return {
            "cell": self.cell.name,
            "stage": self.cell.stage,
            "key": self.key,
            "state": self.state,
            "why": self.why,
        }


@dataclass(frozen=True, kw_only=True)
class StoredCell:
    """A cell of a stored plan: its key, its ingredients (see `Identity`), and `keep:`."""

    key: str
    ingredients: Annotated[Mapping[str, Any], checked_as(Ingredients)]
    keep: str


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """The plan of a run: the name of its pipeline, and its cells."""

    DOCUMENT: ClassVar[str] = "plan"
    pipeline: str
    cells: Mapping[str, StoredCell]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The plan of a run. Two cells with equal ingredients have the same key, and run once.

    Attributes:
        spec: the spec.
        cells: all cells, in topological order.
        generations: base identity -> generation, of forced cells.
    """

    spec: Spec
    cells: Sequence[PlannedCell]
    generations: Mapping[str, int] = field(default_factory=dict)

    def require_runnable(self) -> None:
        """Check that no selected cell is blocked.

        Raises:
            BadInput: cells are blocked; names them and their absent inputs.
        """
        stuck = [one for one in self.cells if one.selected and one.state is PlanState.BLOCKED]
        if stuck:
            lines = [f"{one.cell.name} {one.why}" for one in stuck]
            raise BadInput("\n".join(["cannot run the selected cells:", *lines]))

    @property
    def notes(self) -> list[str]:
        """Return warnings and hints about the plan, a sentence or two each."""
        unchecked = dict.fromkeys(
            one.cell.stage for one in self.cells if one.ingredients["names"]["unchecked"]
        )
        ruled = sum(CODE_CHANGED[1] in one.why for one in self.cells)
        notes = []
        if unchecked:
            notes.append(
                f"Data not checked: {shorten(list(unchecked))}. No digest of it enters the key, "
                "so cached results stay valid when the data changes."
            )
        if ruled:
            notes.append(
                f"{ruled} cells run because a newer rule makes the digests of their code. "
                "`fls accept` keeps existing results, if their code is the same."
            )
        elif coded := sum(
            one.state is PlanState.RUN and _code_alone(one.why) for one in self.cells
        ):
            notes.append(
                f"{coded} cells run for changes of code alone, and others downstream of them. "
                "If the changes do not affect results, `fls accept --why REASON` keeps those of "
                "the run that `fls plan --why` names."
            )
        return notes

    def commit(self, store: Store, run_id: str) -> None:
        """Record this plan as that of a run, and its forced generations, before a cell runs."""
        for base, generation in self.generations.items():
            store.raise_generation(base, generation)
        cells = {
            one.cell.name: StoredCell(key=one.key, ingredients=one.ingredients, keep=one.cell.keep)
            for one in self.cells
        }
        store.write_run(run_id, RunPlan(pipeline=self.spec.name, cells=cells))


def _code_alone(why: str) -> bool:
    """Tell whether a cell's reason names only changes of code."""
    causes = why.partition(" (since run ")[0].split("; ")
    return all(cause.startswith(CODE_CHANGED) for cause in causes)


def make_plan(spec: Spec, store: Store, selection: Selection | None = None) -> Plan:
    """Plan a run of all or selected cells; writes nothing.

    A store with the layout of another version is a `StoreError`.

    Raises:
        BadInput: an address that no cell has, or a forced cell that is not selected.

    Cost: one read of each source, external file and manifest, and of the plans of earlier runs if
    cells are to run.
    """
    selection = selection or Selection()
    selected = _selected(spec.cells, selection)
    forced = _addressed(selection.force, spec.cells)
    if not forced <= selected:
        stray = [cell.name for cell in spec.cells if cell.name in forced - selected]
        raise BadInput(f"--force names cells that {selection} leaves out: {shorten(stray)}")
    store.exists()  # refuses another version's layout
    stored = store.generations()
    raised: dict[str, int] = {}

    def generation(cell: Cell, base: str) -> int:
        if cell.name in forced:
            raised[base] = stored.get(base, 0) + 1
        return raised.get(base, stored.get(base, 0))

    identities = identify(spec.cells, spec.plugins, generation, Acceptances(store).find)
    judge = _Judge(store, selection, selected, identities, _History(store, spec.name))
    judge.look(spec.cells, asked=_addressed([*selection.only, *selection.until], spec.cells))
    return Plan(spec=spec, cells=[judge.plan(cell) for cell in spec.cells], generations=raised)


def _addressed(addresses: Iterable[str], cells: Sequence[Cell]) -> set[str]:
    return {cell.name for address in addresses for cell in resolve(address, cells)}


def _selected(cells: Sequence[Cell], selection: Selection) -> set[str]:
    """Return the names of the cells that may run."""
    chosen = {cell.name for cell in cells}
    if selection.from_:
        after = _addressed(selection.from_, cells)
        for cell in cells:
            if not after.isdisjoint(cell.sources):
                after.add(cell.name)
        chosen &= after
    if selection.until:
        before = _addressed(selection.until, cells)
        for cell in reversed(cells):
            if cell.name in before:
                before.update(cell.sources)
        chosen &= before
    if selection.only:
        chosen &= _addressed(selection.only, cells)
    return chosen


class _Judge:
    """Decides the state of each cell, in topological order."""

    def __init__(
        self,
        store: Store,
        selection: Selection,
        selected: set[str],
        identities: Mapping[str, Identity],
        history: _History,
    ):
        self.store = store
        self.selection = selection
        self.selected = selected
        self.identities = identities
        self.history = history
        self.blocked: set[str] = set()
        self.found: dict[str, Manifest] = {}
        self.damaged: set[str] = set()
        self.collected: dict[str, Manifest] = {}
        self.needed: set[str] = set()  # cells whose files other cells need
        self.upstream: dict[str, dict[str, Params]] = {}
        self.data: dict[str, dict[str, list[str]]] = {}

    def look(self, cells: Sequence[Cell], asked: set[str]) -> None:
        """Look up results in the store, and find the cells whose files are needed.

        `cells` are in topological order; the files of those `asked` are needed.
        """
        for cell in cells:
            key = self.identities[cell.name].key
            try:
                manifest = self.store.manifest(key)
            except Damaged:
                self.damaged.add(cell.name)
                continue
            if manifest:
                self.found[cell.name] = manifest
            elif cell.keep == "results" and (collected := self.store.collected(key)):
                self.collected[cell.name] = collected
        self.needed = set(asked)
        for cell in reversed(cells):
            spared = cell.name in self.collected and cell.name not in self.needed
            if cell.name in self.selected and cell.name not in self.found and not spared:
                self.needed.update(cell.sources)

    def plan(self, cell: Cell) -> PlannedCell:
        """Return a cell with its state."""
        identity = self.identities[cell.name]
        state, why, manifest = self.state(cell, identity)
        if accepted := identity.ingredients.get("accepted"):
            why += f"; its code is {describe(accepted)}"
        if unchecked := identity.ingredients["names"]["unchecked"]:
            why += f"; data not checked: {shorten([f'params.{name}' for name in unchecked])}"
        if state is PlanState.BLOCKED:
            self.blocked.add(cell.name)
        return PlannedCell(
            cell=cell,
            key=identity.key,
            ingredients=identity.ingredients,
            data=self.data_behind(cell, identity),
            state=state,
            why=why,
            selected=cell.name in self.selected,
            manifest=manifest,
            collected=state is PlanState.CACHED and cell.name not in self.found,
            estimate=self.estimate(cell),
        )

    def data_behind(self, cell: Cell, identity: Identity) -> dict[str, list[str]]:
        """Return the digests of the data that a cell or its upstream cells read."""
        found: dict[str, set[str]] = {}
        for source in cell.sources:
            for name, digests in self.data[source].items():
                found.setdefault(name, set()).update(digests)
        found |= {name: {digest} for name, digest in identity.ingredients["data"].items()}
        self.data[cell.name] = {name: sorted(digests) for name, digests in found.items()}
        return self.data[cell.name]

    def estimate(self, cell: Cell) -> Estimate | None:
        """Return the stage's forecast from the parameters of the cell and all cells upstream."""
        upstream: dict[str, Params] = {}
        for source in cell.sources:
            upstream |= self.upstream[source]
        forecast = cell.declaration.estimate
        self.upstream[cell.name] = {cell.name: cell.params, **upstream}
        return forecast(cell.params, list(upstream.values())) if forecast else None

    def state(self, cell: Cell, identity: Identity) -> tuple[PlanState, str, Manifest | None]:
        """Return state, reason and, if there is one, the manifest."""
        name = cell.name
        if name in self.found:
            maker = self.found[name].making.get("run")
            made = f", made by run {maker}" if maker else ""
            return PlanState.CACHED, f"in the store{made}", self.found[name]
        if name in self.collected and name not in self.needed:
            return PlanState.CACHED, "complete; its files were collected", self.collected[name]
        if name not in self.selected:
            return (
                PlanState.BLOCKED,
                f"is not in the store, and {self.selection} leaves it out",
                None,
            )
        absent = [name for name in cell.sources if name in self.blocked]
        if absent:
            return PlanState.BLOCKED, f"needs {shorten(absent)}, which cannot be had", None
        if name in self.damaged:
            return PlanState.RUN, "stored result damaged", None
        if name in self.collected:
            return PlanState.RUN, "its files were collected, and are needed again", None
        return (
            PlanState.RUN,
            self.history.why(cell.name, identity, {*self.found, *self.collected}),
            None,
        )


class _History:
    """Ingredients of cells in earlier runs of the pipeline, read on demand."""

    def __init__(self, store: Store, pipeline: str):
        self.store = store
        self.pipeline = pipeline
        self.unread: list[str] | None = None  # run ids, the newest last
        self.forgotten = False  # whether earlier runs are not searched
        self.known: dict[str, tuple[str, Mapping[str, Any]]] = {}  # cell -> run, ingredients

    def why(self, name: str, identity: Identity, cached: Container[str]) -> str:
        """Return the reason why a cell runs, with the run of comparison."""
        found = self.find(name)
        if found is None:
            return f"in none of the last {_MEMORY} runs" if self.forgotten else "never ran"
        run, before = found
        changes = explain(before, identity.ingredients, cached)
        if changes:
            return f"{'; '.join(changes)} (since run {run})"
        if self.store.damaged(identity.key):
            return "stored result damaged"
        attempts = self.store.attempts(identity.key)
        if attempts and self.store.failure(identity.key, attempts[-1]):
            return f"failed in run {run}"
        return f"not finished in run {run}"

    def find(self, name: str) -> tuple[str, Mapping[str, Any]] | None:
        """Return the newest run that had a cell, and the cell's ingredients in it."""
        if self.unread is None:
            runs = self.store.list_runs()
            self.unread, self.forgotten = runs[-_MEMORY:], len(runs) > _MEMORY
        while name not in self.known and self.unread:
            run = self.unread.pop()
            plan = self.store.peek_run(run, RunPlan)
            if plan is not None and plan.pipeline == self.pipeline:
                for cell, stored in plan.cells.items():
                    self.known.setdefault(cell, (run, stored.ingredients))
        return self.known.get(name)
