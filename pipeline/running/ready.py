"""Which cells of a plan may run now, and what follows when one ends."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

from pipeline.base.states import CellState, PlanState
from pipeline.planning.keys import known_calls
from pipeline.planning.planner import Plan, PlannedCell
from pipeline.running.record import CellStatus
from pipeline.spec.cells import Cell, Upstream, shorten
from pipeline.worker.worker import Task, TaskInput


class Schedule:
    """The cells of a run, their statuses, and the order in which they may run.

    A cell that gathers many inputs runs on those there are when some failed. Its result is not
    what its planned key stands for, so it goes under a key of its own, and so do its descendants.

    Attributes:
        statuses: cell -> status, in topological order; cells that the selection leaves out and
            that are not in the store are absent.
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
        self._rank = self._ranks()
        self._takers: dict[str, list[str]] = {}
        for one in planned:
            for source in one.cell.sources:
                self._takers.setdefault(source, []).append(one.cell.name)
        self._unsettled = {
            name for name, status in self.statuses.items() if not status.state.is_settled
        }
        self._unsure = set(self._unsettled)  # whether they are ready
        self._ready: list[tuple[tuple[int, int], str]] = []  # by rank, which is each one's own

    def cell(self, name: str) -> Cell:
        """Return the cell called `name`."""
        return self._planned[name].cell

    def planned(self, name: str) -> PlannedCell:
        """Return the cell called `name`, as it was planned."""
        return self._planned[name]

    def ingredients(self, name: str) -> dict[str, Any]:
        """Return what the cell's result is made of, as it is: with the inputs that there are."""
        return {**self._planned[name].ingredients, "inputs": self._input_keys(name)}

    def calls(self, name: str) -> Sequence[str]:
        """Return what a cell may import and call by what is kept in a stored file."""
        return sorted(self._calls[name])

    def task(self, name: str, *, run: str, storage: str, token: str) -> Task:
        """Return an attempt at the cell as its worker needs to know it.

        Args:
            name: the cell's.
            run: whose attempt it is.
            storage: where its inputs are, and its result goes.
            token: the storage's.
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
            "inputs": self.task_inputs(name),
            "outputs": list(cell.declaration.outputs),
            "ingredients": self.ingredients(name),
            "num_cpus": cell.resources.num_cpus,
            "num_gpus": cell.resources.num_gpus,
            "checkpoint_every_s": cell.checkpoint_every_s,
            "log_bytes": cell.log_bytes,
            "host": socket.gethostname(),
            "directory": os.getcwd(),
        }

    def task_inputs(self, name: str) -> dict[str, list[TaskInput]]:
        """Return the cell's inputs as its worker needs to know them."""
        return {
            key: [
                {
                    "cell": source.cell,
                    "stage": self.cell(source.cell).stage,
                    "key": self.statuses[source.cell].key,
                    "axes": dict(self.cell(source.cell).axes),
                    "output": source.output,
                    "available": self.available(source),
                }
                for source in sources
            ]
            for key, sources in self.cell(name).inputs.items()
        }

    @property
    def settled(self) -> bool:
        """Whether nothing waits or runs."""
        return not self._unsettled

    def change(self, name: str, state: CellState) -> None:
        """Note how a cell stands from now on.

        Cost: of the cells that take from it, however many others there are.
        """
        self.statuses[name].state = state
        if state.is_settled:
            self._unsettled.discard(name)
        else:
            self._unsettled.add(name)
        self._unsure.update([name, *self._takers.get(name, ())])

    def ready(self) -> list[str]:
        """Return the waiting cells that may run now, those with the longest way to go first.

        Cells that lost an input they cannot do without are marked skipped on the way.
        """
        while self._unsure:
            self._look_at(self._unsure.pop())
        return [name for _, name in self._ready]

    def _look_at(self, name: str) -> None:
        """Find out whether a cell may run now."""
        place = self._rank[name], name
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

    def available(self, source: Upstream) -> bool:
        """Tell whether a connected output can be fetched."""
        return self._state(source.cell).has_result

    def reset(self, key: str, exists: Callable[[str], bool]) -> list[str]:
        """Make the cells of `key`, whose result is damaged or gone, wait again.

        Args:
            key: of the result.
            exists: tells of a key whether the store has its result.

        Returns:
            The cells that wait again: those of the key, and what they need that is gone too.
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
        """Return a cell's state; what the selection left out and is not there cannot be had."""
        return self.statuses[name].state if name in self.statuses else CellState.SKIPPED

    def _lost(self, cell: Cell) -> list[str]:
        """Return the failed cells that `cell` cannot do without."""
        lost = []
        for name, sources in cell.inputs.items():
            missing = [source.cell for source in sources if not self.available(source)]
            partial = cell.declaration.inputs[name].many and len(missing) < len(sources)
            lost += [] if partial else missing
        return lost

    def _key(self, name: str) -> str:
        """Return the planned key, or one for a result made of fewer or other inputs."""
        planned = self._planned[name]
        inputs = self._input_keys(name)
        if inputs == planned.ingredients["inputs"]:
            return planned.key
        text = json.dumps({"planned": planned.key, "inputs": inputs}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _input_keys(self, name: str) -> dict[str, list[str]]:
        """Return the keys of the inputs as they are; that of a failed cell is marked."""
        return {
            key: [
                ("" if self.available(source) else "failed:") + self.statuses[source.cell].key
                for source in sources
            ]
            for key, sources in self.cell(name).inputs.items()
        }

    def _ranks(self) -> dict[str, tuple[int, int]]:
        """Return for each cell what sorts it: how long the way from it to the end is, its place.

        The length is that of the longest way in cells, negative.
        """
        depth = dict.fromkeys(self._planned, 1)
        for name in reversed(list(self._planned)):
            for source in self.cell(name).sources:
                if source in depth:
                    depth[source] = max(depth[source], depth[name] + 1)
        return {name: (-depth[name], place) for place, name in enumerate(depth)}
