"""The command line, as a user meets it."""

import csv
import importlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from toy_runs import DIAMOND, ROOT, fls, ran, run_here, write_spec

from pipeline.cli.commands import app

LOCAL = ("--executor", "local", "--tracking", "jsonl")
COMMANDS = [
    "run",
    "submit",
    "plan",
    "inspect",
    "validate",
    "graph",
    "status",
    "sync",
    "resume",
    "stop",
    "logs",
    "results",
    "export",
    "list",
    "ui",
    "gc",
    "verify",
    "accept",
]
# Runs commands as `fls` does, one after the other, and fails if one imports what it must not.
WITHOUT_HEAVY_IMPORTS = """
import sys
from pipeline.__main__ import main
for arguments in [
    ["validate"], ["plan", "--why"], ["run"], ["results"], ["status"], ["list"], ["run", "--help"]
]:
    sys.argv[1:] = arguments
    try:
        main()
    except SystemExit as end:
        assert not end.code, arguments
    heavy = {"torch", "ray", "mlflow", "numpy", "fsspec"} & set(sys.modules)
    assert not heavy, (arguments, heavy)
"""


def three_mistakes() -> None:
    write_spec(
        """
        start: {uses: start, params: {valeu: 1, seed: one}}
        add: {uses: add, inputs: {number: strat}}
        """
    )


def test_every_command_shows_examples() -> None:
    assert sorted(COMMANDS) == sorted(
        command.name or command.callback.__name__ for command in app.registered_commands
    )
    for command in app.registered_commands:
        assert "fls " in (command.epilog or "")


@pytest.mark.parametrize("arguments", [[], ["run", "--help"]])
def test_help_is_readable(toy: Path, arguments: list[str]) -> None:
    _, output, errors = fls(*arguments)
    text = output + errors
    assert "Usage:" in text
    assert "Traceback" not in text
    if arguments:
        assert "\n    fls run pipeline.yaml --executor local --tracking jsonl\n" in text


def test_a_run_and_its_results(toy: Path) -> None:
    write_spec(DIAMOND)
    code, output, errors = fls("run", *LOCAL)
    assert (code, errors) == (0, "")
    assert "| start[seed=0] | 10 |" in output
    code, output, _ = fls("results", "--json")
    rows = json.loads(output)
    assert code == 0
    assert len(rows) == 6
    assert list(rows[0]) == ["cell", "model_cell", "key", "number", "run_id"]
    assert (rows[0]["cell"], rows[0]["model_cell"], rows[0]["number"]) == (
        "total",
        "start[seed=0]",
        10,
    )
    assert rows[0]["run_id"] is None
    code, output, _ = fls("results", "pipeline.yaml", "--csv")
    assert [row["number"] for row in csv.DictReader(io.StringIO(output))][:2] == ["10", "11"]
    assert "start[seed=1]" in fls("results")[1]


def test_results_of_what_failed_in_part(toy: Path) -> None:
    write_spec(
        """
        good: {uses: start, params: {value: 1}}
        bad: {uses: fail}
        total: {uses: total, inputs: {numbers: [good, bad]}}
        """
    )
    assert fls("run", *LOCAL)[0] == 1
    code, output, errors = fls("results", "--json")
    assert code == 0
    assert [row["number"] for row in json.loads(output)] == [1, None]


def test_results_that_are_not_there_yet(toy: Path) -> None:
    write_spec(DIAMOND)
    code, output, errors = fls("results", "--json")
    assert (code, json.loads(output)) == (0, [])
    assert "No results yet of: total; `fls run pipeline.yaml`." in errors


def test_a_plan_as_json_and_for_people(toy: Path) -> None:
    write_spec(DIAMOND)
    run_here()
    code, output, _ = fls("plan", "--json", "--set", "add.amount=[1, 3]")
    rows = json.loads(output)
    assert code == 0
    assert all(list(row) == ["cell", "stage", "key", "state", "why"] for row in rows)
    states = {row["cell"]: row["state"] for row in rows}
    assert states["add[amount=1,seed=0]"] == "cached"
    assert states["add[amount=3,seed=0]"] == "run"
    _, output, _ = fls("plan", "--why", "--force", "add[seed=1]")
    assert "add[amount=1,seed=1]: run: forced" in output
    assert "add[amount=1,seed=0]: cached: in the store" in output
    assert "4 of 8 cells to run." in output
    _, output, _ = fls("plan", "--set", "start.value=2000")
    assert output.splitlines()[1].split() == ["start", "2", "·", "2", "·", "2", "kB", "128", "B"]


def test_a_plan_takes_the_options_of_a_run_that_change_it_and_no_others() -> None:
    commands = typer.main.get_command(app).commands
    options = {
        name: {one for parameter in commands[name].params for one in parameter.opts}
        for name in ("run", "plan")
    }
    changing = {"--set", "--from", "--only", "--until", "--force"}
    assert changing <= options["run"]
    assert options["plan"] & options["run"] - {"file"} == changing


def test_a_dry_run_runs_nothing(toy: Path) -> None:
    write_spec(DIAMOND)
    code, output, _ = fls("run", "--dry-run")
    assert code == 0
    assert "8 of 8 cells to run." in output
    assert not ran()
    assert not Path(".fls").exists()


def test_a_users_mistakes_are_all_shown_without_a_traceback(toy: Path) -> None:
    three_mistakes()
    for command in ("validate", "run", "plan"):
        code, _, errors = fls(command)
        assert code == 2
        assert "Traceback" not in errors
        lines = errors.splitlines()
        assert len(lines) == 4
        assert all(line.startswith("pipeline.yaml:") for line in lines)
        assert "unknown key 'valeu' (did you mean 'value'?)" in errors
        assert "'strat' (did you mean 'start'?)" in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere.yaml"], "cannot read nowhere.yaml"),
        (["run", "--executor", "slurm"], "slurm"),
        (["run", "--only", "ad"], "did you mean 'add'?"),
        (["run", "--max-parallel", "0"], "max-parallel"),
        (["status", "x"], ".fls is no store"),
        (["export", "pipeline.yaml", "add", "out"], "means 4 cells"),
        (["export", "pipeline.yaml", "total", "out"], "no output to export, only: results"),
        (["export", "pipeline.yaml", "start[seed=0]", "out"], "is not in the store"),
        (["nonsense"], "nonsense"),
    ],
)
def test_bad_input_has_exit_code_2(toy: Path, arguments: list[str], message: str) -> None:
    write_spec(DIAMOND)
    code, output, errors = fls(*arguments)
    assert (code, "Traceback" in errors) == (2, False)
    assert message in errors


def test_a_failed_stage_has_exit_code_1_and_a_log(toy: Path) -> None:
    write_spec("bad: {uses: fail, params: {how: bug}, retries: 0}")
    code, output, errors = fls("run", *LOCAL)
    assert (code, errors) == (1, "")
    assert "ZeroDivisionError: a bug on purpose" in output
    assert "Traceback" not in output
    code, output, _ = fls("logs", "bad")
    assert code == 0
    assert 'raise ZeroDivisionError("a bug on purpose")' in output
    code, output, _ = fls("status", "last")
    assert "bad failed: ZeroDivisionError" in output
    code, _, errors = fls("logs", "bat")
    assert (code, "did you mean 'bad'?" in errors) == (2, True)


def test_what_runs_no_stage_imports_nothing_heavy(toy: Path) -> None:
    write_spec(DIAMOND)
    run_here()
    command = [sys.executable, "-c", WITHOUT_HEAVY_IMPORTS]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_export_is_what_the_plugin_makes_of_it(toy: Path) -> None:
    write_spec(DIAMOND)
    run_here()
    code, output, _ = fls("export", "pipeline.yaml", "add[amount=2,seed=1]", "deep/folder")
    assert (code, output) == (0, "deep/folder: number.json\n")
    assert json.loads(Path("deep/folder/number.json").read_text()) == {"number": 13.0}


@pytest.mark.parametrize("there", [False, True])
def test_an_export_that_fails_leaves_the_destination_as_it_was(
    toy: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    real = importlib.import_module("toy.exporter").export
    write_spec(DIAMOND)
    run_here()
    folder = Path("deep/folder")
    before = {}
    if there:
        folder.mkdir(parents=True)
        before = {"number.json": "earlier", "mine.txt": "mine"}
        for name, text in before.items():
            (folder / name).write_text(text)

    def half(source: Path, destination: Path) -> None:
        real(source, destination)
        (destination / "number.json").write_text("ha")
        raise OSError(28, "No space left on device")

    export = ("export", "pipeline.yaml", "add[amount=2,seed=1]", "deep/folder")
    monkeypatch.setattr("toy.exporter.export", half)
    assert fls(*export)[0] == 1
    assert folder.exists() == there
    assert {path.name: path.read_text() for path in folder.glob("*")} == before
    assert [path.name for path in Path("deep").iterdir()] == (["folder"] if there else [])
    monkeypatch.setattr("toy.exporter.export", real)
    assert fls(*export)[0] == 0
    assert json.loads((folder / "number.json").read_text()) == {"number": 13.0}
    assert (folder / "mine.txt").exists() == there
    assert [path.name for path in Path("deep").iterdir()] == ["folder"]


def test_a_graph_and_the_names(toy: Path) -> None:
    write_spec(DIAMOND)
    assert fls("graph")[1].startswith("flowchart")
    assert fls("graph", "--format", "dot", "--cells")[1].startswith("digraph")
    output = fls("list")[1]
    assert "gathers numbers into rows" in output
    assert "plus_table" in output


def test_a_file_can_be_run_by_its_first_line(toy: Path) -> None:
    path = write_spec("start: {uses: start, params: {value: 1}}")
    path.write_text("#!/usr/bin/env -S python -m pipeline run\n" + path.read_text())
    path.chmod(0o755)
    folder = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(["./pipeline.yaml", *LOCAL], env=environment, capture_output=True)
    assert (done.returncode, ran()) == (0, {"start": 1})


@pytest.mark.parametrize(
    "command",
    [
        ["status"],
        ["status", "last"],
        ["sync"],
        ["verify"],
        ["gc"],
        ["logs", "start"],
        ["resume", "last"],
        ["stop", "last"],
        ["accept", "start", "--why", "so"],
    ],
)
def test_a_storage_that_is_no_store_is_told(toy: Path, command: list[str]) -> None:
    write_spec("start: {uses: start, params: {value: 1}}")
    (toy / "other").mkdir()
    for place in ("nowhere", "other", "memory://nowhere"):
        code, output, errors = fls(*command, "--storage", place)
        assert (code, output) == (2, "")
        assert f"{place} is no store: it has no storage.json. Check the address" in errors
    assert not (toy / "nowhere").exists()


def test_a_fresh_project_has_no_runs_yet(toy: Path) -> None:
    write_spec("start: {uses: start, params: {value: 1}}")
    assert fls("status") == (0, f"{toy}/.fls: no runs yet; see `fls run`.\n", "")


def test_without_a_pipeline_the_built_in_stages_are_listed(toy: Path) -> None:
    code, output, errors = fls("list")
    assert (code, errors) == (0, "")
    assert "prune_oneshot" in output and "digits_resnet" in output
    assert fls("list", "--file", "nowhere.yaml")[0] == 2


def test_a_stage_type_is_told_whole(toy: Path) -> None:
    code, output, _ = fls("list", "prune_oneshot")
    assert code == 0
    assert "input curvature: curvature" in output
    assert re.search(
        r"min_kept +0.0 +number, at least 0, at most 1 +least fraction of each", output
    )
    assert re.search(r"selection +single +single, greedy, admm +\S+", output)
    assert "example: my_prune_oneshot: {uses: prune_oneshot, inputs: {" in output
    told = json.loads(fls("list", "pretrain", "--json")[1])
    assert told["outputs"] == {"model": "model"}
    (dataset,) = [one for one in told["parameters"] if one["name"] == "dataset"]
    assert (dataset["type"], dataset["default"]) == ("name of a data set", None)
    code, _, errors = fls("list", "pretain")
    assert (code, errors.split(";")[0]) == (
        2,
        "'pretain' is no stage type (did you mean 'pretrain'?)",
    )


def test_mistakes_are_json(toy: Path) -> None:
    write_spec("start: {uses: start, params: {valeu: 1}}")
    code, output, errors = fls("validate", "--json")
    assert (code, errors) == (2, "")
    first = json.loads(output)["mistakes"][0]
    assert (first["file"], first["line"]) == ("pipeline.yaml", 5)
    write_spec("start: {uses: start, params: {value: 1}}")
    code, output, _ = fls("validate", "--json")
    assert (code, json.loads(output)) == (0, {"mistakes": [], "stages": 1, "cells": 1})


def test_runs_and_garbage_are_json(toy: Path) -> None:
    write_spec("start: {uses: start, params: {value: 1}}")
    assert json.loads(fls("status", "--json")[1]) == []
    fls("run", *LOCAL)
    write_spec("start: {uses: start, params: {value: 2}}")
    (run,) = json.loads(fls("status", "--json")[1])
    assert (run["state"], run["counts"]) == ("done", {"done": 1})
    (cell,) = json.loads(fls("status", "last", "--json")[1])["cells"]
    assert (cell["cell"], cell["state"]) == ("start", "done")
    drop = ("--keep-runs", "0", "--grace", "0.001s", "--json")
    found = json.loads(fls("gc", *drop)[1])
    assert found and not any(one["deleted"] for one in found)
    deleted = json.loads(fls("gc", *drop, "--apply")[1])
    assert [one["path"] for one in deleted] == [one["path"] for one in found]
    assert all(one["deleted"] for one in deleted)
    assert json.loads(fls("gc", *drop)[1]) == []
