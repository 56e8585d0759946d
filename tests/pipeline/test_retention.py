"""`keep: results`: files that only serve what follows go when that is there, and come back."""

import os
import time
from pathlib import Path

from toy_runs import fls, last_run, numbers, ran, run_here, write_spec

from pipeline.planning.planner import Selection, make_plan
from pipeline.spec.load import load_spec
from pipeline.store.store import Store

STAGES = """
    start: {uses: start, matrix: {seed: [0, 1]}, params: {value: 10}, keep: results}
    add: {uses: add, matrix: {seed: [0, 1]}, inputs: {number: start}, keep: results}
    twice: {uses: apply, inputs: {number: add}, matrix: {seed: [0, 1]}, params: {operation: times}}
    total: {uses: total, inputs: {numbers: [twice, add]}, keep: results}
    report: {uses: report, inputs: {results: total}}
"""
COLLECTED = ["start[seed=0]", "start[seed=1]", "add[seed=0]", "add[seed=1]"]


def collect(*arguments: str) -> str:
    """Let all be old, collect, and return what was printed."""
    then = time.time() - 7200
    for path in Path(".fls").rglob("*"):
        os.utime(path, (then, then))
    code, output, errors = fls("gc", *arguments, "--apply")
    assert (code, errors) == (0, "")
    return output


def with_files() -> set[str]:
    """Return the names of the last run's cells whose files are in the store."""
    found = set()
    for name, status in last_run().cells.items():
        manifest = Store(".fls").manifest(status.key)
        outputs = Path(f".fls/stages/{status.key}/attempts").glob("*/outputs")
        assert (manifest is not None) == any(outputs)
        found |= {name} if manifest else set()
    return found


def plan(*overrides: str, **selection: str) -> dict[str, tuple[str, str]]:
    spec = load_spec(Path("pipeline.yaml"), overrides)
    chosen = Selection(**{name: [address] for name, address in selection.items()})
    planned = make_plan(spec, Store(".fls"), chosen)
    return {one.cell.name: (one.state, one.why) for one in planned.cells}


def test_a_cell_whose_input_was_collected_is_computed_again_once_that_is_back(toy: Path) -> None:
    write_spec(STAGES)
    run_here()
    collect()
    code, _, errors = fls("verify", "--rerun", "twice[seed=0]")
    assert code == 2
    assert (
        "twice[seed=0] needs add[seed=0], whose files fls gc collected (keep: results); " in errors
    )
    assert "`fls run pipeline.yaml --until 'add[seed=0]'` makes it." in errors
    run_here(selection=Selection(until=["add[seed=0]"]))
    assert fls("verify", "--rerun", "twice[seed=0]")[0] == 0


def test_files_that_have_served_go_and_their_cells_stay_complete(toy: Path) -> None:
    write_spec(STAGES)
    run_here()
    output = collect()
    assert output.count("all downstream cells are complete (keep: results)") == 4
    # What is tracked is a result, whatever the spec says; what nobody marked is kept.
    assert with_files() == last_run().cells.keys() - set(COLLECTED)
    for cell in COLLECTED:
        assert plan()[cell] == ("cached", "complete; its files were collected")
    before = ran()
    assert "Nothing to do: all 8 cells are in the store." in run_here()[1]
    assert f"run {last_run().run_id} is complete" in fls("resume", "last")[1]
    assert ran() == before
    assert fls("results")[0] == 0
    assert "attempt 1" in fls("logs", "start[seed=0]")[1]
    assert fls("verify")[0] == 0
    assert "0 unneeded items" in fls("gc")[1]


def test_they_come_back_when_something_is_to_be_made_of_them(toy: Path) -> None:
    write_spec(STAGES)
    run_here()
    first = numbers()
    collect()
    assert plan("twice.operand=5", "twice.seed=[1]", "add.seed=[1]")["start[seed=1]"] == (
        "run",
        "its files were collected, and are needed again",
    )
    # Only `twice` is new; `add` is needed for it, and `start` for that.
    write_spec(STAGES.replace("operation: times}", "operation: times, operand: 5}"))
    assert run_here(overrides=[])[0] == 0
    assert ran()["start[seed=0]"] == ran()["add[seed=0]"] == ran()["twice[seed=0]"] == 2
    assert numbers()["add[seed=1]"] == first["add[seed=1]"]
    assert numbers()["twice[seed=1]"] == 60
    collect()
    assert with_files().isdisjoint(COLLECTED)


def test_one_cell_brings_back_only_what_it_needs(toy: Path) -> None:
    write_spec(STAGES)
    run_here()
    collect()
    run_here(selection=Selection(force=["twice[seed=1]"], until=["twice[seed=1]"]))
    assert (ran()["start[seed=0]"], ran()["start[seed=1]"]) == (1, 2)


def test_files_stay_while_something_is_to_be_made_of_them(toy: Path) -> None:
    write_spec(
        """
        start: {uses: start, params: {value: 10}, keep: results}
        add: {uses: add, inputs: {number: start}, keep: results}
        bad: {uses: fail, inputs: {number: add}}
        """
    )
    assert run_here()[0] == 1
    collect()
    assert with_files() == {"start", "add"}


def test_files_stay_for_a_pipeline_that_keeps_them_all(toy: Path) -> None:
    write_spec(STAGES.replace(", keep: results", ""), name="other")
    run_here()
    write_spec(STAGES)
    run_here(selection=Selection(force=["report"]))
    collect()
    assert set(COLLECTED) <= with_files()
    collect("--keep-runs", "1")
    assert with_files().isdisjoint(COLLECTED)
    # Whoever wants all files has them made again.
    write_spec(STAGES.replace(", keep: results", ""), name="other")
    assert plan()["start[seed=0]"][0] == "run"


def test_files_are_made_again_on_request(toy: Path) -> None:
    write_spec(STAGES)
    run_here()
    collect()
    code, _, errors = fls("export", "pipeline.yaml", "add[seed=1]", "out")
    assert code == 2
    assert "`fls run pipeline.yaml --until 'add[seed=1]'` makes it." in errors
    assert plan(only="add[seed=1]")["add[seed=1]"][0] == "blocked"
    assert run_here(selection=Selection(until=["add[seed=1]"]))[0] == 0
    assert ran()["add[seed=0]"] == 1
    assert fls("export", "pipeline.yaml", "add[seed=1]", "out")[0] == 0


def test_what_nothing_takes_from_is_a_result(toy: Path) -> None:
    write_spec("start: {uses: start, params: {value: 1}, keep: results}")
    code, _, errors = fls("validate")
    assert code == 2
    assert "keep: results: no stage takes anything from 'start'" in errors
    write_spec("start: {uses: start, params: {value: 1}, keep: some}")
    assert "'all' or 'results'" in fls("validate")[2]


def test_a_collection_that_was_killed_is_finished_by_the_next(toy: Path) -> None:
    write_spec(STAGES)
    run_here()
    store = Store(".fls")
    key = last_run().cells["start[seed=0]"].key
    manifest = store.manifest(key)
    assert manifest is not None
    store.collect(manifest)
    outputs = Path(f".fls/stages/{key}/attempts/0001/outputs/number")
    outputs.mkdir(parents=True)
    (outputs / "number.json").write_text("{")
    assert plan()["start[seed=0]"][0] == "cached"
    collect()
    assert not outputs.exists()
