"""Advice that a command gives is run here as it stands: from its output into a shell's words."""

import os
import re
import shlex
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from toy_runs import fls, last_run, ran, run_here, start_fls, wait_for, write_spec

from pipeline.base.states import RunState
from pipeline.store.checksum import verified, with_checksum

LOCAL = ("--executor", "local", "--tracking", "jsonl")
STAGES = """
    start: {uses: start, params: {value: 10}}
    apply: {uses: apply, inputs: {number: start}, params: {operation: plus}}
    bad: {uses: fail, inputs: {number: apply}, params: {counter: COUNTER, until: 1}}
"""


def advice(text: str, begins: str) -> list[str]:
    """Return the words of the one command in a text that begins so, in backticks or at its end."""
    found = set(re.findall(rf"`(fls {begins}[^`]*)`", text))
    found |= set(re.findall(rf": (fls {begins}[^`\n]*)$", text, re.MULTILINE))
    (command,) = found
    return shlex.split(command)[1:]


def follow(text: str, begins: str, *options: str) -> str:
    """Run the command that a text advises, which has these options, and return its output."""
    words = advice(text, begins)
    assert {word for word in words if word.startswith("--")} == set(options)
    words += LOCAL if words[0] == "run" else ()
    code, output, errors = fls(*words)
    assert (code, errors) == (0, ""), errors
    return output


def broken_run(toy: Path) -> str:
    """Run a pipeline of another file's until a cell fails, and return what was printed."""
    write_spec(STAGES.replace("COUNTER", f"{toy}/counter")).rename("other.yaml")
    code, output, _ = fls("run", "other.yaml", *LOCAL)
    assert code == 1
    return output


def change_code(toy: Path) -> None:
    code = "def plus(value: int, operand: int) -> int:\n    return operand + value\n"
    (toy / "toy/operations/plus.py").write_text(code)


def go_elsewhere(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (toy / "elsewhere").mkdir()
    monkeypatch.chdir(toy / "elsewhere")


def test_the_log_of_what_failed_and_the_run_that_goes_on(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = broken_run(toy)
    assert "fails on purpose" in follow(output, "logs", "--run", "--file")
    status = fls("status", "last", "--file", "other.yaml")[1]
    assert "fails on purpose" in follow(status, "logs", "--run", "--file")
    follow(status, "resume", "--file")
    assert last_run().observed_state() is RunState.DONE


def test_hints_for_a_storage_hold_from_any_folder(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_run(toy)
    go_elsewhere(toy, monkeypatch)
    status = fls("status", "last", "--storage", str(toy / ".fls"))[1]
    assert "fails on purpose" in follow(status, "logs", "--run", "--storage")
    follow_resume = advice(status, "resume")
    assert fls(*follow_resume, "--trust")[::2] == (0, "")  # its plugin is named by nobody here


@pytest.mark.parametrize(
    "way",
    [
        ("resume", "--storage", "--trust", "--replan"),
        ("accept", "--why", "--run", "--storage", "--trust"),
        ("resume", "--storage", "--file", "--replan"),
        ("accept", "--why", "--run", "--storage", "--file"),
    ],
)
def test_what_to_do_about_changed_code(
    toy: Path, monkeypatch: pytest.MonkeyPatch, way: tuple[str, ...]
) -> None:
    broken_run(toy)
    change_code(toy)
    go_elsewhere(toy, monkeypatch)
    storage = str(toy / ".fls")
    trust = ["--file", str(toy / "other.yaml")] if "--file" in way else ["--trust"]
    code, _, errors = fls("resume", "last", "--storage", storage, *trust)
    assert code == 2
    follow(errors, *way)
    if "accept" in way:
        assert fls("resume", "last", "--storage", storage, *trust)[0] == 0
    assert ran() == {"start": 1, "apply": 2 if "resume" in way else 1, "bad": 1}
    assert last_run(storage).observed_state() is RunState.DONE


def test_a_comparison_with_earlier_code_says_how_to_accept_it(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_run(toy)
    change_code(toy)
    code, output, errors = fls("verify", "other.yaml", "--rerun", "apply")
    assert (code, errors) == (0, "")
    assert (
        follow(output, "accept", "--run", "--file", "--why") == "Accepted for 1 cells of apply.\n"
    )


def test_what_makes_a_model_that_is_to_be_exported(toy: Path) -> None:
    path = str(write_spec(STAGES).rename("other.yaml"))
    settings = ("--set", "start.value=11")
    code, _, errors = fls("export", path, "apply", "out", *settings)
    assert code == 2
    follow(errors, "run", "--set", "--until")
    assert fls("export", path, "apply", "out", *settings)[0] == 0


def test_what_makes_results_that_are_not_there(toy: Path) -> None:
    write_spec("a: {uses: start, params: {value: 1}}\ntotal: {uses: total, inputs: {numbers: a}}")
    settings = ("--set", "a.value=5")
    errors = fls("results", *settings)[2]
    follow(errors, "run", "--set")
    assert fls("results", *settings)[2] == ""


def test_what_brings_back_an_input_that_was_collected(toy: Path) -> None:
    write_spec(
        """
        a: {uses: start, params: {value: 1}, keep: results}
        b: {uses: add, inputs: {number: a}}
        """
    ).rename("other.yaml")
    settings = ("--set", "a.value=7")
    fls("run", "other.yaml", *settings, *LOCAL)
    run = last_run().run_id
    key = last_run().cells["a"].key
    shutil.rmtree(f".fls/stages/{key}")
    command = ("verify", "--storage", ".fls", "--run", run, "--rerun", "b", "--trust")
    code, _, errors = fls(*command)
    assert code == 2
    follow(errors, "run", "--set", "--until")
    assert fls(*command)[0] == 0


def test_a_run_that_is_stopped_by_its_file_goes_on_as_it_says(toy: Path) -> None:
    write_spec("slow: {uses: slow, params: {steps: 400, delay_s: 0.05}}").rename("other.yaml")
    process = start_fls("run", "other.yaml", *LOCAL, "--set", "slow.steps=60")
    try:
        wait_for(lambda: any(Path(".fls").glob("stages/*/attempts/*/checkpoints/*")))
        code, output, _ = fls("stop", "last", "--file", "other.yaml")
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert code == 0
    Path("other.yaml").write_text(Path("other.yaml").read_text().replace("400", "1"))
    follow(output, "resume", "--file")
    assert last_run().observed_state() is RunState.DONE
    assert ran() == {"slow": 1}


def test_a_run_of_the_same_id_says_how_it_goes_on(toy: Path) -> None:
    write_spec("a: {uses: start, params: {value: 1}}").rename("other.yaml")
    asked = ("run", "other.yaml", *LOCAL, "--run-id", "mine")
    assert fls(*asked)[0] == 0
    code, _, errors = fls(*asked)
    assert code == 2
    assert follow(errors, "resume", "--file") == "Nothing to do: run mine is complete.\n"


def test_what_was_not_sent_is_sent_as_it_says(
    toy: Path, fresh_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    write_spec("a: {uses: start, params: {value: 1}}").rename("other.yaml")
    code, output, _ = fls("run", "other.yaml", "--executor", "local", "--tracking-later")
    assert code == 0
    shutil.copy(fresh_database, "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{toy}/mlflow.db")
    complete = next(line for line in output.splitlines() if "sends the rest" in line)
    assert "is complete: 1 cells sent." in follow(complete, "sync", "--file")


def test_an_experiment_that_was_deleted_is_restored_as_it_says(
    toy: Path, fresh_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.experiments import commands  # takes seconds, which only this test needs
    from mlflow.tracking import MlflowClient

    shutil.copy(fresh_database, "mlflow.db")
    uri = f"sqlite:///{toy}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    client = MlflowClient(uri)
    client.delete_experiment(client.create_experiment("toy"))
    write_spec("a: {uses: start, params: {value: 1}}")
    errors = fls("run", "--executor", "local")[2]
    (identity,) = re.findall(r"`mlflow experiments restore -x (\S+)`", errors)
    done = CliRunner().invoke(commands, shlex.join(["restore", "-x", identity]))
    assert done.exit_code == 0, done.output
    assert fls("run", "--executor", "local")[0] == 0
    assert client.get_experiment_by_name("toy").lifecycle_stage == "active"


def test_the_garbage_that_is_shown_is_what_apply_deletes(toy: Path) -> None:
    write_spec("a: {uses: start, params: {value: 1}}")
    run_here()
    run_here(overrides=["a.value=2"])
    first = sorted(os.listdir(".fls/runs"))[0]
    then = time.time() - 40 * 86400
    for path in Path(".fls").rglob("*"):
        os.utime(path, (then, then))
    kept = ("gc", "--older-than", "30d")
    for run in os.listdir(".fls/runs"):
        document = Path(f".fls/runs/{run}/run.json")
        request: dict[str, Any] = verified(document.read_bytes())
        request["began"] -= 40 * 86400 if run == first else 0
        document.write_bytes(with_checksum(request))
    output = fls(*kept, "--grace", "1s")[1]
    assert "--apply deletes them" in output
    assert f"runs/{first}" in output
    assert f"runs/{first}" in fls(*kept, "--grace", "1s", "--apply")[1]
    assert first not in os.listdir(".fls/runs")


def test_what_a_cluster_is_to_have_and_not_to_have_is_handed_over(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        "pipeline.cluster.submit.submit", lambda spec, what, *_, **__: asked.append(what)
    )
    write_spec("a: {uses: start, params: {value: 1}}")
    fls("submit", "--env", "HF_TOKEN", "--exclude", "notebooks/", "--resume", "last")
    fls("submit", "--set", "a.value=2", "--until", "a", "--address", "http://h:8265")
    first, second = asked
    assert (first.env, first.excludes, first.resume) == (["HF_TOKEN"], ["notebooks/"], "last")
    assert second.arguments == ["--until", "a", "--set", "a.value=2"]
    assert second.address == "http://h:8265"
