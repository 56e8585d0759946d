"""The runner from Python does what the command line does."""

import importlib
import json
import pkgutil
import threading
from pathlib import Path

import pytest
from toy_runs import DIAMOND, fls, ran, write_spec

import pipeline
from pipeline.base.errors import BadInput

LOCAL = {"executor": "local", "tracking": "jsonl"}


def test_a_run_a_plan_and_results_are_those_of_the_command_line(
    toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_spec(DIAMOND)
    planned = pipeline.plan()
    assert [one.state for one in planned.cells] == ["run"] * 8
    assert [one.row() for one in planned.cells] == json.loads(fls("plan", "--json")[1])
    run = pipeline.run(**LOCAL)
    assert run.state == "done" and set(run.cells.values()) == {"done"} and run.errors == {}
    assert run.run_id in capsys.readouterr().out
    found = pipeline.results()
    assert list(found) == list(run.results) == json.loads(fls("results", "--json")[1])
    assert len(found) == 6 and found.absent == []
    frame = found.frame()
    assert list(frame.columns) == list(found.columns) and len(frame) == 6
    again = pipeline.run(**LOCAL, quiet=True)
    assert (again.run_id, again.state, len(again.results)) == ("", "done", 6)
    assert capsys.readouterr().out == ""
    assert repr(again) == "Run(nothing to run: done, 0 cells)"
    assert repr(found) == "Results(6 rows, 0 cells absent)"


def test_values_are_set_as_they_are(toy: Path) -> None:
    write_spec(DIAMOND)
    run = pipeline.run(
        set={"start.value": 7, "add.amount": [5, 6]}, only="start", **LOCAL, quiet=True
    )
    assert run.state == "done"
    assert ran() == {"start[seed=0]": 1, "start[seed=1]": 1}
    states = {one.cell.name: one.state for one in pipeline.plan(set={"start.value": 7}).cells}
    assert states["start[seed=0]"] == "cached"


def test_a_failure_is_told_and_no_error(toy: Path) -> None:
    write_spec("a: {uses: fail}")
    run = pipeline.run(**LOCAL, quiet=True)
    assert run.state == "failed"
    assert set(run.errors) == {"a"} and run.errors["a"]


def test_a_run_in_a_thread_ends_as_elsewhere(toy: Path) -> None:
    write_spec("start: {uses: start, params: {value: 1}}")
    states: list[str] = []
    thread = threading.Thread(target=lambda: states.append(pipeline.run(**LOCAL, quiet=True).state))
    thread.start()
    thread.join()
    assert states == ["done"]


def test_bad_arguments_are_refused(toy: Path) -> None:
    write_spec("start: {uses: start, params: {value: 1}}")
    with pytest.raises(BadInput, match="executor: expected ray or local, got 'slurm'"):
        pipeline.run(executor="slurm")
    with pytest.raises(BadInput, match="valeu"):
        pipeline.plan(set={"start.valeu": 1})


def test_a_damaged_result_is_made_again_and_not_left_out(toy: Path) -> None:
    write_spec(DIAMOND)
    pipeline.run(**LOCAL, quiet=True)
    (rows,) = Path(".fls").glob("stages/*/attempts/*/outputs/results/rows.json")
    rows.write_text("[]")
    again = pipeline.run(**LOCAL, quiet=True)
    assert (again.state, len(again.results)) == ("done", 6)
    assert again.cells["total"] == "done"


def test_a_value_that_is_none_of_yaml_is_refused(toy: Path) -> None:
    write_spec("start: {uses: start, params: {value: 1}}")
    with pytest.raises(BadInput, match="set: expected values as in YAML"):
        pipeline.plan(set={"start.value": object()})


def test_no_module_hides_a_function_of_the_package() -> None:
    for module in pkgutil.walk_packages(pipeline.__path__, "pipeline."):
        if "ray" not in module.name and "__main__" not in module.name:
            importlib.import_module(module.name)
    assert all(callable(getattr(pipeline, name)) for name in pipeline.__all__)
