import importlib
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.base.errors import BadInput
from pipeline.planning.planner import Plan, PlannedCell, Selection, make_plan
from pipeline.spec.load import load_spec
from pipeline.stage import Artifact, Context, StageError
from pipeline.store.store import Store

SPEC = """
name: toy
plugins: [toy]
storage: {storage}
stages:
  start: {{uses: start, matrix: {{seed: [0, 1]}}, params: {{value: 5}}}}
  add: {{uses: add, matrix: {{seed: [0, 1]}}, inputs: {{number: start}}}}
  side: {{uses: slow, params: {{steps: 2, delay_s: 0}}}}
  total: {{uses: total, inputs: {{numbers: [add, side]}}}}
  report: {{uses: report, inputs: {{results: total}}}}
"""
CELLS = [
    "start[seed=0]",
    "start[seed=1]",
    "add[seed=0]",
    "add[seed=1]",
    "side",
    "total",
    "report",
]
_counter = itertools.count()


@pytest.fixture(params=["folder", "memory"])
def storage(request: pytest.FixtureRequest, toy: Path) -> str:
    url = "results" if request.param == "folder" else f"memory://planner-{next(_counter)}"
    (toy / "p.yaml").write_text(SPEC.format(storage=url))
    return url


@pytest.fixture
def local(toy: Path) -> Path:
    (toy / "p.yaml").write_text(SPEC.format(storage="results"))
    return toy


def plan(*overrides: str, **selection: str) -> Plan:
    spec = load_spec(Path("p.yaml"), overrides)
    chosen = Selection(**{name: [address] for name, address in selection.items()})
    return make_plan(spec, Store(spec.storage), chosen)


def run(*overrides: str, **selection: str) -> list[str]:
    """Run a plan, one cell after the other in this process; return the names of those run."""
    planned = plan(*overrides, **selection)
    planned.require_runnable()
    store = Store(planned.spec.storage)
    planned.commit(store, f"run-{next(_counter):06d}")
    by_name = {one.cell.name: one for one in planned.cells}
    ran = []
    for one in planned.cells:
        if one.state == "run" and store.manifest(one.key) is None:
            ran.append(one.cell.name)
            attempt(store, one, by_name)
    return ran


def attempt(store: Store, planned: PlannedCell, by_name: dict[str, PlannedCell]) -> None:
    inputs = {
        name: [
            Artifact(
                cell=source.cell,
                stage=by_name[source.cell].cell.stage,
                key=by_name[source.cell].key,
                axes=by_name[source.cell].cell.axes,
                path=store.fetch(by_name[source.cell].key, source.output),
            )
            for source in sources
        ]
        for name, sources in planned.cell.inputs.items()
    }
    module, _, name = planned.cell.declaration.entry.partition(":")
    with store.begin_attempt(planned.key) as begun:
        context = Context(params=planned.cell.params, folder=begun.folder, inputs=inputs)
        try:
            getattr(importlib.import_module(module), name)(context)
        except StageError as error:
            begun.fail({"message": str(error)})
            return
        begun.publish(planned.ingredients, planned.cell.declaration.outputs, {})


def states(planned: Plan) -> dict[str, str]:
    return {one.cell.name: one.state for one in planned.cells}


def why(planned: Plan) -> dict[str, str]:
    """Return why cells are to run; the newest run is called R."""
    reasons = {one.cell.name: one.why for one in planned.cells if one.state == "run"}
    for run in Store(planned.spec.storage).list_runs()[-1:]:
        reasons = {name: one.replace(f"run {run}", "run R") for name, one in reasons.items()}
    return reasons


def test_everything_runs_once(storage: str) -> None:
    assert why(plan()) == dict.fromkeys(CELLS, "never ran")
    assert run() == CELLS
    assert states(plan()) == dict.fromkeys(CELLS, "cached")
    assert run() == []


def test_a_changed_parameter_reruns_what_follows_and_is_named(storage: str) -> None:
    run()
    planned = plan("add.amount=2")
    assert why(planned) == {
        "add[seed=0]": "params.amount: 1.0 -> 2.0 (since run R)",
        "add[seed=1]": "params.amount: 1.0 -> 2.0 (since run R)",
        "total": "upstream add[seed=0], add[seed=1] changed (since run R)",
        "report": "upstream total changed (since run R)",
    }
    assert run("add.amount=2") == ["add[seed=0]", "add[seed=1]", "total", "report"]
    assert run() == []  # the former results are still there


def test_a_forced_result_stays_in_force(storage: str) -> None:
    run()
    planned = plan(force="add[seed=0]")
    assert why(planned) == {
        "add[seed=0]": "forced (since run R)",
        "total": "upstream add[seed=0] changed (since run R)",
        "report": "upstream total changed (since run R)",
    }
    assert states(plan()) == dict.fromkeys(CELLS, "cached")  # a plan alone forces nothing
    assert run(force="add[seed=0]") == ["add[seed=0]", "total", "report"]
    assert run() == []
    assert run(force="add[seed=0]") == ["add[seed=0]", "total", "report"]


def test_an_interrupted_forced_run_goes_on_without_force(storage: str) -> None:
    run()
    planned = plan(force="total")
    planned.commit(Store(planned.spec.storage), f"run-{next(_counter):06d}")
    assert why(plan()) == {
        "total": "not finished in run R",
        "report": "not finished in run R",
    }


def test_a_reason_names_the_run_and_calls_nothing_changed_that_is_cached(storage: str) -> None:
    """With a value that an earlier run had, but for one cell whose result is gone."""
    run()
    first = Store(plan().spec.storage).list_runs()[-1]
    run("add.amount=2")
    Store(plan().spec.storage).storage.remove(f"stages/{plan().cells[-1].key}")
    reasons = {one.cell.name: one.why for one in plan().cells}
    newest = Store(plan().spec.storage).list_runs()[-1]
    assert reasons["report"] == f"another stored result of upstream total (since run {newest})"
    assert first != newest
    assert not [one for one in reasons.values() if "changed" in one]


def test_what_no_run_of_late_had_is_not_said_to_have_never_run(local: Path) -> None:
    run()
    path = local / "p.yaml"
    text = path.read_text()
    path.write_text(text.replace("name: toy", "name: other"))
    for number in range(10):
        plan().commit(Store(plan().spec.storage), f"run-z{number}")
    path.write_text(text)
    assert why(plan("start.value=8"))["report"] == "in none of the last 10 runs"


def test_a_failed_and_a_damaged_result_say_so(local: Path) -> None:
    text = (local / "p.yaml").read_text()
    (local / "p.yaml").write_text(text.replace("slow, params: {steps: 2, delay_s: 0}", "fail"))
    store = Store("results")
    planned = plan()
    planned.commit(store, "run-1")
    by_name = {one.cell.name: one for one in planned.cells}
    for name in ("start[seed=0]", "side"):
        attempt(store, by_name[name], by_name)
    assert why(plan())["side"] == "failed in run R"
    key = by_name["start[seed=0]"].key
    (local / "results/stages" / key / "manifest.json").write_text("{")
    assert why(plan())["start[seed=0]"] == "stored result damaged"
    assert store.set_aside(key)
    assert why(plan())["start[seed=0]"] == "stored result damaged"


def test_another_pipeline_in_the_same_storage_is_no_history(local: Path) -> None:
    run()
    path = local / "p.yaml"
    path.write_text(path.read_text().replace("name: toy", "name: other"))
    assert why(plan("start.value=6"))["report"] == "never ran"
    assert states(plan()) == dict.fromkeys(CELLS, "cached")


# ------------------------------------------------------------------------------- selections


def test_until_runs_the_stage_and_its_ancestors(storage: str) -> None:
    planned = plan(until="add[seed=1]")
    assert {name for name, state in states(planned).items() if state == "run"} == {
        "start[seed=1]",
        "add[seed=1]",
    }
    assert planned.cells[0].why == ("is not in the store, and --until add[seed=1] leaves it out")
    assert run(until="add[seed=1]") == ["start[seed=1]", "add[seed=1]"]


def test_only_takes_its_inputs_from_the_store(storage: str) -> None:
    planned = plan(only="add")
    assert states(planned)["add[seed=0]"] == "blocked"
    with pytest.raises(BadInput, match=r"add\[seed=0\] needs start\[seed=0\], which cannot be had"):
        planned.require_runnable()
    run(until="start")
    assert run(only="add[seed=0]") == ["add[seed=0]"]
    assert run(only="add") == ["add[seed=1]"]


def test_from_needs_all_before_it(storage: str) -> None:
    with pytest.raises(BadInput, match=r"add\[seed=0\] needs start\[seed=0\]"):
        plan(from_="add").require_runnable()
    run(until="start")
    with pytest.raises(BadInput, match="total needs side"):  # beside it, and not after it
        plan(from_="add").require_runnable()
    run(only="side")
    assert run(from_="add") == ["add[seed=0]", "add[seed=1]", "total", "report"]


def test_from_and_until_together_are_what_lies_between(storage: str) -> None:
    run()
    planned = plan("start.value=7", from_="start[seed=0]", until="add")
    assert [one.cell.name for one in planned.cells if one.selected] == [
        "start[seed=0]",
        "add[seed=0]",
    ]


def test_force_outside_the_selection_is_refused(storage: str) -> None:
    with pytest.raises(BadInput, match=r"--force names cells that --only add leaves out: total"):
        plan(only="add", force="total")


def test_unknown_addresses_are_refused(storage: str) -> None:
    with pytest.raises(BadInput, match=r"did you mean 'total'\?"):
        plan(force="totl")


# ------------------------------------------------------------------------------ what it costs


def test_rows_and_estimates(local: Path) -> None:
    planned = plan()
    first = planned.cells[0]
    assert first.estimate is not None
    assert (first.estimate.memory_bytes, first.estimate.disk_bytes) == (5, 64)
    assert planned.cells[2].estimate is None
    assert first.row() == {
        "cell": "start[seed=0]",
        "stage": "start",
        "key": first.key,
        "state": "run",
        "why": "never ran",
    }


def test_planning_writes_nothing(local: Path) -> None:
    plan(force="start")
    assert not (local / "results").exists()


def test_a_plan_of_many_cells_is_quick(local: Path) -> None:
    head = "name: toy\nplugins: [toy]\nstorage: results\nstages:\n"
    matrix = "{seed: [" + ", ".join(map(str, range(100))) + "]}"
    (local / "p.yaml").write_text(
        head + f"  s: {{uses: start, matrix: {matrix}, params: {{value: 1}}}}"
    )
    run()
    began = time.process_time()
    assert set(states(plan()).values()) == {"cached"}
    assert time.process_time() - began < 1  # 0.05 s on a quiet machine


def test_planning_imports_nothing_heavy(local: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from pipeline.spec.load import load_spec;"
        "from pipeline.planning.planner import make_plan; from pipeline.store.store import Store;"
        "s = load_spec(Path('p.yaml')); make_plan(s, Store(s.storage));"
        "print(sorted({'torch', 'ray', 'mlflow', 'fsspec', 'numpy'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{local}"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
