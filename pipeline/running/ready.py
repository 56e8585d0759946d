"""The schedule of a plan: which cells may run now, and which follow when one ends."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from bisect import bisect_left
from collections.abc import Callable, Sequence

from pipeline.base.states import CellState, PlanState
from pipeline.planning.keys import known_calls
from pipeline.planning.planner import Plan, PlannedCell
from pipeline.running.documents import CellStatus
from pipeline.spec.cells import Cell, Upstream, shorten
from pipeline.worker.task import Task, TaskInput


class Schedule:
    """The cells of a run, their statuses, and the order in which they may run.

    A cell that gathers many inputs runs without those that failed. Its result is then not the one
    of its planned key, so it gets a key of its own, and so do the cells downstream.

    Attributes:
        statuses: cell -> status, in topological order, without cells that the selection leaves out
            and the store lacks.
    """

    def __init__(self, plan: Plan):
        planned = [one for one in plan.cells if one.state is not PlanState.BLOCKED]
        self._planned = {one.cell.name: one for one in planned}
        self.statuses = {
            one.cell.name: CellStatus(
                cell=one.cell.name,
                stage=one.cell.stage,
                key=one.key,
                state=CellState.CACHED if one.state is PlanState.CACHED else CellState.WAITING,
            )
            for one in planned
        }
        self._calls = known_calls(plan.spec.cells)
        self._order = self._orders()
        self._downstream: dict[str, list[str]] = {}
        for one in planned:
            for source in one.cell.sources:
                self._downstream.setdefault(source, []).append(one.cell.name)
        self._unsettled = {
            name for name, status in self.statuses.items() if not status.state.is_settled
        }
        self._unsure = set(self._unsettled)  # cells to examine
        self._ready: list[tuple[tuple[int, int], str]] = []  # in order

    def cell(self, name: str) -> Cell:
        """Return the cell called `name`."""
        return self._planned[name].cell

    def planned(self, name: str) -> PlannedCell:
        """Return the planned cell called `name`."""
        return self._planned[name]

    def calls(self, name: str) -> Sequence[str]:
        """Return the calls that stored files may have a cell make, see `call_text`."""
        return sorted(self._calls[name])

    def task(self, name: str, *, run: str, storage: str, token: str) -> Task:
        """Return the task of an attempt at a cell.

        Args:
            name: the cell's name.
            run: the run's id.
            storage: the storage of its inputs and its result.
            token: the storage's token.
        """
        cell = self.cell(name)
        params = type(cell.params)
        return {
            "run": run,
            "cell": name,
            "key": self.statuses[name].key,
            "storage": storage,
            "token": token,
            "entry": cell.declaration.entry,
            "calls": list(self.calls(name)),
            "params_model": f"{params.__module__}:{params.__qualname__}",
            "params": cell.params.model_dump(mode="json"),
            "inputs": self._task_inputs(name),
            "outputs": list(cell.declaration.outputs),
            "ingredients": {
                **self._planned[name].ingredients,
                "inputs": self._input_keys(name),
            },
            "num_cpus": cell.resources.num_cpus,
            "num_gpus": cell.resources.num_gpus,
            "checkpoint_every_s": cell.checkpoint_every_s,
            "log_bytes": cell.log_bytes,
            "host": socket.gethostname(),
            "directory": os.getcwd(),
        }

    def _task_inputs(self, name: str) -> dict[str, list[TaskInput]]:
        """Return the inputs in the task of a cell."""
        return {
            key: [
                {
                    "cell": source.cell,
                    "stage": self.cell(source.cell).stage,
                    "key": self.statuses[source.cell].key,
                    "axes": dict(self.cell(source.cell).axes),
                    "output": source.output,
                    "available": self._available(source),
                }
                for source in sources
            ]
            for key, sources in self.cell(name).inputs.items()
        }

    @property
    def settled(self) -> bool:
        """Whether no cell waits or runs."""
        return not self._unsettled

    def change(self, name: str, state: CellState) -> None:
        """Change the state of a cell.

        Cost: O(number of cells directly downstream).
        """
        self.statuses[name].state = state
        if state.is_settled:
            self._unsettled.discard(name)
        else:
            self._unsettled.add(name)
        self._unsure.update([name, *self._downstream.get(name, ())])

    def ready(self) -> list[str]:
        """Return the waiting cells that may run now, those with the longest path to the end first.

        Cells that lost a required input become skipped.
        """
        while self._unsure:
            self._examine(self._unsure.pop())
        return [name for _, name in self._ready]

    def _examine(self, name: str) -> None:
        """Add a cell to the ready ones if it may run now, else remove it."""
        place = self._order[name], name
        at = bisect_left(self._ready, place)
        if self._ready[at : at + 1] == [place]:
            del self._ready[at]
        cell, status = self.cell(name), self.statuses[name]
        if status.state is not CellState.WAITING or not all(
            self._state(source).is_settled for source in cell.sources
        ):
            return
        lost = self._lost(cell)
        if lost:
            status.error = {"message": f"needs {shorten(lost)}, which failed"}
            self.change(name, CellState.SKIPPED)
            return
        status.key = self._key(name)
        self._ready.insert(at, place)

    def _available(self, source: Upstream) -> bool:
        """Tell whether a connected output can be fetched."""
        return self._state(source.cell).has_result

    def reset(self, key: str, exists: Callable[[str], bool]) -> list[str]:
        """Let the cells of `key`, whose result is damaged or gone, wait again.

        Args:
            key: of the result.
            exists: tells whether the store has the result of a key.

        Returns:
            The cells that wait again: those of the key, and the cells upstream whose results are
            gone too.
        """
        names = [name for name, status in self.statuses.items() if status.key == key]
        again = []
        while names:
            name = names.pop()
            status = self.statuses[name]
            if status.state.has_result:
                status.progress = None
                self.change(name, CellState.WAITING)
                again.append(name)
                names += [
                    source
                    for source in self.cell(name).sources
                    if source in self.statuses and not exists(self.statuses[source].key)
                ]
        return again

    def _state(self, name: str) -> CellState:
        """Return a cell's state; a cell outside the selection and the store counts as skipped."""
        return self.statuses[name].state if name in self.statuses else CellState.SKIPPED

    def _lost(self, cell: Cell) -> list[str]:
        """Return the failed cells that `cell` requires."""
        lost = []
        for name, sources in cell.inputs.items():
            missing = [source.cell for source in sources if not self._available(source)]
            partial = cell.declaration.inputs[name].many and len(missing) < len(sources)
            lost += [] if partial else missing
        return lost

    def _key(self, name: str) -> str:
        """Return the planned key, or another one for a result of fewer or other inputs."""
        planned = self._planned[name]
        inputs = self._input_keys(name)
        if inputs == planned.ingredients["inputs"]:
            return planned.key
        text = json.dumps({"planned": planned.key, "inputs": inputs}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _input_keys(self, name: str) -> dict[str, list[str]]:
        """Return the keys of the inputs; that of a failed cell is marked."""
        return {
            key: [
                ("" if self._available(source) else "failed:") + self.statuses[source.cell].key
                for source in sources
            ]
            for key, sources in self.cell(name).inputs.items()
        }

    def _orders(self) -> dict[str, tuple[int, int]]:
        """Return each cell's order: the negative length of its longest path to the end, in cells.

        The cell's place breaks ties.
        """
        depth = dict.fromkeys(self._planned, 1)
        for name in reversed(list(self._planned)):
            for source in self.cell(name).sources:
                if source in depth:
                    depth[source] = max(depth[source], depth[name] + 1)
        return {name: (-depth[name], place) for place, name in enumerate(depth)}
