"""The loop: order, failures, retries, repairs, races."""

import itertools
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from toy_runs import (
    DIAMOND,
    last_run,
    load_spec,
    numbers,
    ran,
    run_here,
    start_fls,
    states,
    write_spec,
)

from pipeline.base.errors import BadInput
from pipeline.base.states import CellState, RunState
from pipeline.executors.local import LocalExecutor
from pipeline.planning.planner import Selection, make_plan
from pipeline.running import driver, launch
from pipeline.running.ready import Schedule
from pipeline.stage import Resources
from pipeline.store.leases import LeaseWatch
from pipeline.store.storage.local import LocalStorage
from pipeline.store.store import Store
from pipeline.worker.task import Task

FAILING = """
    good: {uses: start, params: {value: 1}}
    bad: {uses: fail, params: {how: user, counter: counter, until: 1}}
    after: {uses: add, inputs: {number: bad}}
    other: {uses: add, inputs: {number: good}}
    total: {uses: total, inputs: {numbers: [other, after]}}
    report: {uses: report, inputs: {results: total}}
"""


def test_each_cell_runs_once_and_never_again(toy: Path) -> None:
    write_spec(DIAMOND)
    code, output = run_here()
    assert code == 0
    assert set(ran().values()) == {1}
    assert len(ran()) == 8
    assert "| add[amount=2,seed=1] | 13.0 |" in output
    assert "figure.png" in output
    code, output = run_here()
    assert (code, sum(ran().values())) == (0, 8)
    assert output.startswith("Nothing to do: all 8 cells are in the store.")
    assert "| add[amount=2,seed=1] | 13.0 |" in output
    assert len(Store(".fls").list_runs()) == 1


class Shrinking(LocalExecutor):
    """Loses the only machine that a cell could run on, and finds another one after a while."""

    looks = 0
    held: list[Any]

    def check(
        self, demands: Iterable[tuple[str, Resources]], *, may_grow: bool = False
    ) -> list[str]:
        if not may_grow:
            return super().check(demands)
        assert [cell for cell, _ in demands] == ["start"]
        self.looks += 1
        if self.looks == 3:
            super().submit(*self.held)
        return ["start asks for much; it waits for a node that has it."]

    def submit(self, task: Task, resources: Resources) -> None:
        self.held = [task, resources]


def test_a_cell_that_no_node_has_room_for_any_more_is_told_once(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "make_executor", lambda name: Shrinking())
    monkeypatch.setattr(driver, "_LOOK_EVERY_S", 0.1)
    write_spec("start: {uses: start, params: {value: 1}}")
    code, output = run_here()
    assert (code, output.count("start asks for much; it waits for a node that has it.")) == (0, 1)


def test_only_what_changed_runs_again(toy: Path) -> None:
    write_spec(DIAMOND)
    run_here()
    code, _ = run_here(overrides=["add.amount=[1, 3]"])
    assert code == 0
    again = {cell for cell, count in ran().items() if count > 1} | {"add[amount=3,seed=0]"}
    assert again == {"total", "report", "add[amount=3,seed=0]"}
    assert sum(ran().values()) == 8 + 4
    run_here(selection=Selection(force=["start[seed=0]"]))
    assert ran()["start[seed=0]"] == 2
    assert ran()["start[seed=1]"] == 1
    run_here()
    assert ran()["start[seed=0]"] == 2


def test_a_part_can_be_run_alone(toy: Path) -> None:
    write_spec(DIAMOND)
    with pytest.raises(BadInput, match=r"cannot run the selected cells(.|\n)*start"):
        run_here(selection=Selection(from_=["add"]))
    run_here(selection=Selection(until=["add[amount=1]"]))
    assert set(ran()) == {
        "start[seed=0]",
        "start[seed=1]",
        "add[amount=1,seed=0]",
        "add[amount=1,seed=1]",
    }
    run_here(selection=Selection(only=["add"]))
    assert sum(ran().values()) == 6


def test_a_failure_skips_what_needs_it_and_nothing_else(toy: Path) -> None:
    write_spec(FAILING)
    code, output = run_here()
    assert code == 1
    assert states(last_run()) == {
        "good": CellState.DONE,
        "bad": CellState.FAILED,
        "after": CellState.SKIPPED,
        "other": CellState.DONE,
        "total": CellState.DONE,
        "report": CellState.DONE,
    }
    assert "| after | None |" in output
    assert "bad failed: this stage fails on purpose" in output
    assert f"more: fls logs bad --run {last_run().run_id}" in output
    assert "1 cells were skipped" in output
    assert last_run().state is RunState.FAILED


def test_a_partial_result_does_not_stand_for_the_whole(toy: Path) -> None:
    write_spec(FAILING)
    run_here()
    plan = make_plan(load_spec(Path("pipeline.yaml")), Store(".fls"))
    assert {one.cell.name for one in plan.cells if one.state == "run"} == {
        "bad",
        "after",
        "total",
        "report",
    }
    code, output = run_here()
    assert code == 0
    assert "| after | 2.0 |" in output
    assert (ran()["good"], ran()["other"], ran()["total"]) == (1, 1, 2)


def test_outages_and_deaths_are_retried_but_neither_bugs_nor_a_users_error(toy: Path) -> None:
    write_spec(
        """
        outage: {uses: fail, params: {how: outage, counter: outages, until: 2}}
        death: {uses: fail, params: {how: exit, counter: deaths, until: 1}, retries: 1}
        bug: {uses: fail, params: {how: bug, counter: bugs}}
        user: {uses: fail, params: {how: user, counter: users}}
        """
    )
    code, output = run_here()
    assert code == 1
    assert states(last_run()) == {
        "outage": CellState.DONE,
        "death": CellState.DONE,
        "bug": CellState.FAILED,
        "user": CellState.FAILED,
    }
    assert (Path("users").read_text(), Path("bugs").read_text()) == ("1", "1")
    assert "outage: ConnectionError: an outage on purpose; retry 2 of 2 in 2 s" in output
    assert "bug failed: ZeroDivisionError: a bug on purpose" in output
    assert "death: The worker process died with exit code 3.; retry 1 of 1 in 1 s" in output


def test_a_stage_that_gets_on_may_die_more_often(toy: Path) -> None:
    Path("toy/extra.py").write_text(
        "import json, os\n"
        "from pipeline.stage import *\n"
        "from toy.common import save_number\n"
        "def mortal(ctx):\n"
        "    last = ctx.last_checkpoint()\n"
        "    if last is not None and last.name == '000004':\n"
        "        save_number(ctx, 4)\n"
        "        return\n"
        "    with ctx.checkpoint() as folder:\n"
        "        write_json(folder / 'state.json', 1)\n"
        "    os._exit(1)\n"
    )
    catalogue = Path("toy/catalogue.py")
    catalogue.write_text(catalogue.read_text().replace('"toy.slow:fail"', '"toy.extra:mortal"'))
    write_spec("mortal: {uses: fail, retries: 1}")
    code, output = run_here()
    assert code == 0
    assert output.count("retry 1 of 1 in 1 s") == 4


def test_retries_end(toy: Path) -> None:
    write_spec("bad: {uses: fail, params: {how: outage, counter: outages}, retries: 1}")
    code, output = run_here()
    assert (code, Path("outages").read_text()) == (1, "2")
    error = last_run().cells["bad"].error
    assert error is not None
    assert "toy/slow.py" in error["traceback"]


def test_a_stage_that_takes_too_long_is_stopped(toy: Path) -> None:
    write_spec(
        "slow: {uses: slow, params: {steps: 1000, delay_s: 0.1}, timeout_s: 0.5, retries: 0}"
    )
    code, output = run_here()
    assert code == 1
    assert "slow failed: timed out after 0.5 s (timeout_s)" in output


@pytest.mark.parametrize("damaged", ["start", "middle"])
def test_a_damaged_result_is_made_anew_and_the_run_goes_on(toy: Path, damaged: str) -> None:
    stages = """
        start: {uses: start, params: {value: 10}}
        middle: {uses: add, inputs: {number: start}}
        end: {uses: add, inputs: {number: middle}}
    """
    write_spec(stages)
    run_here()
    before = numbers()
    store = Store(".fls")
    key = last_run().cells["middle"].key
    (store.fetch(key, "number") / "number.json").write_text("{}")
    if damaged == "start":  # and what it is made of is damaged too, which only its rerun finds
        path = store.fetch(last_run().cells["start"].key, "number") / "number.json"
        path.unlink()
    code, output = run_here(selection=Selection(force=["end"]))
    assert code == 0
    assert "is damaged" in output
    assert numbers() == before
    assert ran()["middle"] == 2
    assert ran()["start"] == (2 if damaged == "start" else 1)
    assert list(Path(".fls/stages").glob(f"{key}.damaged-1"))


def test_a_damaged_report_is_made_anew(toy: Path) -> None:
    write_spec(DIAMOND)
    run_here()
    folder = Store(".fls").fetch(last_run().cells["report"].key, "report")
    (folder / "table.md").write_text("nonsense")
    code, output = run_here()
    assert code == 0
    assert "nonsense" not in output
    assert "| add[amount=2,seed=1] | 13.0 |" in output
    assert ran()["report"] == 2


def test_two_drivers_may_race(toy: Path) -> None:
    write_spec(DIAMOND)
    options = ("run", "--executor", "local", "--tracking", "jsonl")
    racers = [start_fls(*options) for _ in range(2)]
    outputs = [racer.communicate(timeout=60) for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0], outputs
    tables = ["".join(line for line in out.splitlines(True) if "|" in line) for out, _ in outputs]
    assert tables[0] == tables[1]
    assert numbers()["add[amount=2,seed=1]"] == 13.0
    assert len(list(Path(".fls/stages").glob("*/manifest.json"))) == 8
    assert all(last_run().cells[name].state in {"done", "cached"} for name in last_run().cells)


def test_cells_with_the_same_key_run_once(toy: Path) -> None:
    write_spec(
        """
        one: {uses: start, params: {value: 1}}
        same: {uses: start, params: {value: 1}}
        total: {uses: total, inputs: {numbers: [one, same]}}
        """
    )
    assert run_here()[0] == 0
    assert ran()["one"] + ran()["same"] == 1


def test_at_most_so_many_run_at_once(toy: Path) -> None:
    write_spec("slow: {uses: slow, matrix: {seed: [0, 1, 2]}, params: {steps: 4, delay_s: 0.02}}")
    assert run_here(max_parallel=1)[0] == 0
    intervals = []
    for status in last_run().cells.values():
        events, _ = Store(".fls").read_events(status.key, 1)
        intervals.append((events[0]["time"], events[-1]["time"]))
    intervals.sort()
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(intervals))


def test_what_no_machine_has_is_refused_before_anything_starts(toy: Path) -> None:
    write_spec(
        """
        start: {uses: start, params: {value: 1}}
        add: {uses: add, inputs: {number: start}, resources: {num_cpus: 4096}}
        """
    )
    with pytest.raises(BadInput, match="add asks for num_cpus: 4096"):
        run_here()
    assert (sum(ran().values()), Store(".fls").list_runs()) == (0, [])


def test_a_storage_that_workers_do_not_share_is_an_error(toy: Path) -> None:
    write_spec("start: {uses: start, params: {value: 1}}", storage="memory://unshared")
    code, output = run_here()
    assert code == 1
    assert "is not the driver's storage" in output


def test_a_storage_given_by_its_url_gives_the_same(toy: Path) -> None:
    write_spec(DIAMOND, storage=f"file://{toy}/elsewhere")
    assert run_here()[0] == 0
    assert numbers(f"{toy}/elsewhere")["add[amount=2,seed=1]"] == 13.0


def test_the_longest_way_goes_first(toy: Path) -> None:
    write_spec(
        """
        short: {uses: start, params: {value: 1}}
        long: {uses: start, params: {value: 2}}
        middle: {uses: add, inputs: {number: long}}
        end: {uses: total, inputs: {numbers: [short, middle]}}
        """
    )
    schedule = Schedule(make_plan(load_spec(Path("pipeline.yaml")), Store(".fls")))
    assert schedule.ready() == ["long", "short"]


def test_no_thread_is_left_behind(toy: Path) -> None:
    write_spec("start: {uses: start, params: {value: 1}}")
    run_here()
    assert {thread.name for thread in threading.enumerate()}.isdisjoint({"tracking", "events"})


@pytest.mark.parametrize(("owner", "name"), [(Store, "read_events"), (LeaseWatch, "holder")])
def test_cells_of_a_storage_that_is_slow_to_answer_are_asked_for_at_once(
    toy: Path, monkeypatch: pytest.MonkeyPatch, owner: type, name: str
) -> None:
    most, now, lock = 0, 0, threading.Lock()
    ask = getattr(owner, name)

    def slow_answer(asked: Any, *args: Any, **options: Any) -> Any:
        nonlocal most, now
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.03)
        with lock:
            now -= 1
        return ask(asked, *args, **options)

    monkeypatch.setattr(LocalStorage, "at_once", 16)
    monkeypatch.setattr(owner, name, slow_answer)
    write_spec(
        "    slow:\n      uses: slow\n      params: {steps: 15, delay_s: 0.1}\n"
        "      matrix: {seed: [0, 1, 2, 3]}\n      resources: {num_cpus: 0.25}\n"
    )
    code, output = run_here()
    assert code == 0, output
    assert most >= 3
    assert [status.state for status in last_run().cells.values()] == [CellState.DONE] * 4
