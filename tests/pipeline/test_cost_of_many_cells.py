"""What a cell costs its driver does not depend on how many others there are: counted, not timed."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from toy_runs import last_run, run_here, states, write_spec

from pipeline.base.states import CellState
from pipeline.executors import AbstractExecutor
from pipeline.spec.cells import Cell
from pipeline.stage import Resources
from pipeline.store.storage.local import LocalStorage
from pipeline.tracking import TrackingProgress
from pipeline.worker.task import Outcome, Task
from pipeline.worker.worker import run_task

FEW, MANY = 10, 40
REQUESTS = ("read", "write", "create", "names", "files", "remove", "remove_files", "save")


class AtOnce(AbstractExecutor):
    """Runs each task in this process, as soon as it is submitted."""

    window = 4

    def __init__(self) -> None:
        self.ended: list[tuple[str, Outcome]] = []

    def check(
        self, demands: Iterable[tuple[str, Resources]], *, may_grow: bool = False
    ) -> list[str]:
        return []

    def submit(self, task: Task, resources: Resources) -> None:
        self.ended.append((task["cell"], run_task(task)))

    def wait(self, timeout_s: float) -> list[tuple[str, Outcome]]:
        ended, self.ended = self.ended, []
        return ended

    def cancel(self, cell: str) -> None:
        """Nothing is in flight."""

    def preempt(self) -> None:
        """Nothing is in flight."""

    def stop(self) -> None:
        """Nothing is in flight."""


def counting(counts: Counter[str], name: str, true: Callable[..., Any]) -> Callable[..., Any]:
    def counted(*arguments: Any, **options: Any) -> Any:
        counts[name] += 1
        return true(*arguments, **options)

    return counted


def test_a_cell_costs_its_driver_the_same_among_many(
    toy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: Counter[str] = Counter()
    for name in REQUESTS:
        true = getattr(LocalStorage, name)
        monkeypatch.setattr(LocalStorage, name, counting(counts, "requests", true))
    sources = Cell.sources.fget
    assert sources is not None
    monkeypatch.setattr(Cell, "sources", property(counting(counts, "looks", sources)))
    copy = counting(counts, "copies", TrackingProgress.copy)
    monkeypatch.setattr(TrackingProgress, "copy", copy)
    monkeypatch.setattr("pipeline.running.launch.make_executor", lambda name: AtOnce())
    for module in ("account", "heartbeat"):
        monkeypatch.setattr(f"pipeline.running.{module}.HEARTBEAT_S", 600)
    found = {}
    for cells in (FEW, MANY):
        half = list(range(cells // 2))
        write_spec(
            f"""
            start: {{uses: start, matrix: {{seed: {half}}}, params: {{value: {cells}}}}}
            add: {{uses: add, matrix: {{seed: {half}}}, inputs: {{number: start}}}}
            """,
            storage=f"fls-{cells}",
        )
        counts.clear()
        assert run_here()[0] == 0
        assert list(states(last_run(f"fls-{cells}")).values()) == [CellState.DONE] * cells
        found[cells] = dict(counts)
    for name in ("requests", "looks"):
        few, many = found[FEW][name] / FEW, found[MANY][name] / MANY
        assert many < 1.2 * few, (name, few, many)
    assert found[MANY]["copies"] <= found[FEW]["copies"] + 2
