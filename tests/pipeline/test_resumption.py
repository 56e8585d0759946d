"""Runs that go on from the storage's URL alone, and code that has changed since they began."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from toy_runs import fls, last_run, numbers, ran, resume_here, run_here, states, write_spec

from pipeline.base.errors import BadInput, StoreError
from pipeline.base.states import CellState, RunState
from pipeline.planning import acceptance
from pipeline.planning.acceptance import Acceptances
from pipeline.planning.planner import RunPlan, make_plan
from pipeline.spec.load import load_spec
from pipeline.store.checksum import verified, with_checksum
from pipeline.store.store import Store

STAGES = """
    start: {uses: start, params: {value: 10}}
    apply: {uses: apply, inputs: {number: start}, params: {operation: plus}}
    bad: {uses: fail, inputs: {number: apply}, params: {counter: counter, until: 1}}
    end: {uses: add, inputs: {number: bad}}
"""
RUN = ("run", "--executor", "local", "--tracking", "jsonl")


def broken_run() -> str:
    """Run until `bad` fails, and return the run's id."""
    write_spec(STAGES)
    assert run_here()[0] == 1
    assert states(last_run()) == {
        "start": CellState.DONE,
        "apply": CellState.DONE,
        "bad": CellState.FAILED,
        "end": CellState.SKIPPED,
    }
    return last_run().run_id


def change_plus(term: str = "0") -> None:
    """Change the code behind `operation: plus`."""
    code = f"def plus(value: int, operand: int) -> int:\n    return value + operand + {term}\n"
    Path("toy/operations/plus.py").write_text(code)


def lines() -> list[dict[str, Any]]:
    """Return what was tracked of the last run."""
    text = Path(f"tracking/{last_run().run_id}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


# ------------------------------------------------------------------------ the URL is enough


def test_a_run_goes_on_from_its_storage_alone(toy: Path, tmp_path: Path) -> None:
    run = broken_run()
    shutil.move(".fls", tmp_path / "elsewhere")
    Path("pipeline.yaml").unlink()
    storage = ("--storage", str(tmp_path / "elsewhere"))
    assert run in fls("status", *storage)[1]
    assert "bad failed" in fls("status", "last", *storage)[1]
    assert "on purpose" in fls("logs", "bad", *storage)[1]
    code, _, errors = fls("resume", "last", *storage, "--trust")
    assert (code, errors) == (0, "")
    assert ran() == {"start": 1, "apply": 1, "bad": 1, "end": 1}
    assert not Path(".fls").exists()
    assert last_run(str(tmp_path / "elsewhere")).observed_state() is RunState.DONE
    assert "is complete" in fls("resume", run, *storage)[1]


def test_a_run_knows_what_it_was_made_with(toy: Path) -> None:
    run = broken_run()
    environment = last_run().environment
    assert environment["packages"]["pydantic"]
    assert environment["python"].startswith("3.")
    plan = Store(".fls").read_run(run, RunPlan)
    assert plan is not None
    assert "toy.operations.plus" in plan.cells["apply"].ingredients["code"]
    path = Path(f".fls/runs/{run}/run.json")
    request = verified(path.read_bytes())
    request["environment"]["packages"]["pydantic"] = "0." + environment["packages"]["pydantic"]
    path.write_bytes(with_checksum(request))
    _, output = resume_here(last_run())
    assert "Library versions, which are not part of the keys: pydantic 0." in output


# ---------------------------------------------------------------------- code that has changed


def test_a_run_does_not_go_on_with_other_code_unasked(toy: Path) -> None:
    run = broken_run()
    change_plus()
    before = sorted(Path(".fls").rglob("*"))
    code, _, errors = fls("resume", "last")
    assert code == 2
    assert errors.splitlines()[:4] == [
        f"Run {run} began with other code or data. The changes:",
        "  code of toy.operations.plus changed: apply",
        "  cells downstream: bad, end",
        "3 of 4 cells are touched; the store has 1 of their planned results.",
    ]
    assert f"`fls resume {run} --storage {toy}/.fls --replan`" in errors
    assert f"`fls accept apply --why '...' --run {run} --storage {toy}/.fls`" in errors
    assert sorted(Path(".fls").rglob("*")) == before
    change_plus_back = "def plus(value: int, operand: int) -> int:\n    return value + operand\n"
    Path("toy/operations/plus.py").write_text(f'"""A comment is no code."""\n{change_plus_back}')
    assert fls("resume", "last")[0] == 0


def test_replanning_makes_anew_what_has_changed(toy: Path) -> None:
    run = broken_run()
    change_plus("100")
    code, output, errors = fls("resume", run, "--replan")
    assert (code, errors) == (0, "")
    assert "code of toy.operations.plus changed: apply" in output
    assert ran() == {"start": 1, "apply": 2, "bad": 1, "end": 1}
    assert numbers()["apply"] == 112
    assert last_run().run_id == run
    # What the new attempt said is recorded, though the old one had said as much.
    key = last_run().cells["apply"].key
    assert [line["key"] for line in lines() if line.get("cell") == "apply" and "key" in line][
        -1
    ] == key
    logged = [
        line["values"]["number"]
        for line in lines()
        if line.get("cell") == "apply" and "number" in line.get("values", {})
    ]
    assert logged == [12, 112]
    assert fls("resume", run)[1] == f"Nothing to do: run {run} is complete.\n"


def test_a_file_that_has_changed_is_no_less_a_change(toy: Path) -> None:
    Path("number.txt").write_text("1")
    write_spec(
        """
        read: {uses: read, params: {path: number.txt}}
        bad: {uses: fail, inputs: {number: read}, params: {counter: counter, until: 1}}
        """
    )
    run_here()
    Path("number.txt").write_text("2")
    with pytest.raises(BadInput, match=r"file of params\.path changed: read") as error:
        resume_here(last_run())
    assert "fls accept" not in str(error.value), "code alone can be accepted"


# ------------------------------------------------------------------------------- accepting


def test_accepted_code_keeps_the_results(toy: Path) -> None:
    run = broken_run()
    change_plus()
    code, output, errors = fls("accept", "apply", "--why", "adding nought changes nothing")
    assert (code, output, errors) == (0, "Accepted for 1 cells of apply.\n", "")
    assert "Nothing to accept" in fls("accept", "apply", "--why", "again")[1]
    _, output, _ = fls("plan", "--why")
    (line,) = [line for line in output.splitlines() if line.startswith("apply:")]
    start = (
        f"apply: cached: in the store, made by run {run}; its code is accepted as equivalent by "
    )
    assert line.startswith(start)
    assert line.endswith(": adding nought changes nothing")
    assert fls("resume", run)[0] == 0
    assert ran() == {"start": 1, "apply": 1, "bad": 1, "end": 1}
    fls(*RUN, "--force", "end")
    (cached,) = [line for line in lines() if line.get("cell") == "apply"]
    assert cached["fls.accepted"].endswith(": adding nought changes nothing")


def test_what_is_made_by_accepted_code_says_so(toy: Path) -> None:
    broken_run()
    change_plus()
    fls("accept", "apply", "--why", "the same")
    fls(*RUN, "--until", "apply", "--set", "start.value=20")
    manifest = Store(".fls").manifest(last_run().cells["apply"].key)
    assert manifest is not None
    accepted = manifest.ingredients["accepted"]
    assert accepted["why"] == "the same"
    module = "toy.operations.plus"
    assert accepted["code"][module] != manifest.ingredients["code"][module]


def test_other_code_still_is_other_code(toy: Path) -> None:
    broken_run()
    change_plus()
    fls("accept", "apply", "--why", "the same")
    change_plus("1")
    assert fls("resume", "last")[0] == 2
    # Accepted in turn, it counts as the first: what was accepted carries on.
    fls("accept", "apply", "--why", "on the safe side", "--run", "last")
    assert fls("resume", "last")[0] == 0
    assert ran()["apply"] == 1


def test_only_the_stages_that_are_named_are_accepted(toy: Path) -> None:
    broken_run()
    common = Path("toy/common.py")
    common.write_text(common.read_text() + "\nUNUSED = 1\n")
    fls("accept", "start", "--why", "unused")
    code, _, errors = fls("resume", "last")
    assert code == 2
    assert "code of toy.common changed: apply, bad, end" in errors
    assert "fls accept apply bad end --why" in errors
    assert fls("accept", "apply", "bad", "end", "--why", "unused")[0] == 0
    assert fls("resume", "last")[0] == 0
    assert ran()["start"] == ran()["apply"] == 1


def test_a_mistake_in_accepting(toy: Path) -> None:
    broken_run()
    change_plus()
    for arguments, message in (
        (("aply", "--why", "x"), "has no stage 'aply' (did you mean 'apply'?)"),
        (("apply", "--why", " "), "--why needs a reason"),
        (("apply",), "--why"),
    ):
        code, _, errors = fls("accept", *arguments)
        assert (code, message in errors) == (2, True), errors
    assert not os.path.exists(".fls/accepted")


def test_classes_of_equal_code_grow_together(toy: Path) -> None:
    store = Store("memory://accepted")
    first, second, third, fourth = ({"m": name} for name in "abcd")
    found = Acceptances(store)
    assert found.add("t", second, first, why="x", run="r")
    assert found.add("t", fourth, third, why="x", run="r")
    assert found.add("t", second, fourth, why="x", run="r")
    for acceptances in (found, Acceptances(store)):
        roots = [acceptances.root("t", code) for code in (first, second, third, fourth)]
        assert roots == [third] * 4
    assert not found.add("t", third, first, why="x", run="r")
    assert found.root("other", second) == second


@pytest.mark.parametrize("length", [1, 2, 3, 2000])
def test_acceptances_in_a_circle_are_told_with_their_files(toy: Path, length: int) -> None:
    broken_run()
    plan = make_plan(load_spec("pipeline.yaml"), Store(".fls"))
    (planned,) = (one for one in plan.cells if one.cell.name == "apply")
    stage, code = planned.ingredients["stage"], planned.ingredients["code"]
    codes = [code, *({**code, "m": str(number)} for number in range(1, length))]
    for one, other in zip(codes, [*codes[1:], codes[0]], strict=True):
        said = {"stage": stage, "code": one, "as": other, "who": "me", "why": "x", "time": 1.0}
        path = Path(".fls/accepted", acceptance._identify(stage, one))
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(with_checksum({**said, "run": "r"}))
    for command in (("plan",), RUN, ("resume", "last"), ("accept", "apply", "--why", "so")):
        exit_code, _, errors = fls(*command)
        assert (exit_code, "form a circle" in errors) == (1, True), errors
        assert acceptance._identify(stage, code) in errors
        assert "Delete the wrong one of these files." in errors
    if length > 1:
        path.unlink()
        assert fls("plan")[0] == 0


def test_two_who_accept_opposite_things_at_once_are_told(toy: Path) -> None:
    store = Store("memory://opposite")
    code, other = {"m": "a"}, {"m": "b"}
    mine, yours = Acceptances(store), Acceptances(store)
    for one in (mine, yours):
        assert one.root("t", code) == code and one.root("t", other) == other
    assert mine.add("t", code, other, why="x", run="r")
    with pytest.raises(StoreError, match="circle"):
        yours.add("t", other, code, why="x", run="r")
        yours.root("t", code)


def test_acceptance_holds_for_a_plan_of_another_file(toy: Path) -> None:
    broken_run()
    change_plus()
    fls("accept", "apply", "--why", "the same")
    path = write_spec(
        STAGES.replace("apply:", "renamed:").replace("number: apply", "number: renamed")
    )
    spec = load_spec(path)
    plan = {one.cell.name: one.state for one in make_plan(spec, Store(".fls")).cells}
    assert plan == {"start": "cached", "renamed": "cached", "bad": "run", "end": "run"}
