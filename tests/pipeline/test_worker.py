"""What a worker makes of a task."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from toy_runs import ROOT, log_lines

from pipeline.store.events import EventTail
from pipeline.store.store import Store
from pipeline.worker.task import Task, threads_of
from pipeline.worker.worker import run_task

KEY = "a" * 64


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put back what a worker sets for its whole process."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")


def task_of(entry: str, params_model: str, params: dict[str, Any], **fields: Any) -> Task:
    store = Store(".fls")
    task: Task = {
        "run": "run-1",
        "cell": "cell",
        "key": KEY,
        "storage": store.url,
        "token": store.prepare(),
        "entry": entry,
        "params_model": f"toy.catalogue:{params_model}",
        "params": params,
        "calls": [],
        "inputs": {},
        "outputs": ["number"],
        "ingredients": {"stage": "toy"},
        "num_cpus": 1,
        "num_gpus": 0,
        "checkpoint_every_s": 30.0,
        "log_bytes": 2**20,
        "host": socket.gethostname(),
        "directory": str(Path.cwd()),
    }
    return {**task, **fields}  # type: ignore[typeddict-item]


def start_task(**fields: Any) -> Task:
    return task_of("toy.stages:start", "StartParams", {"value": 7}, **fields)


def fail_task(how: str) -> Task:
    return task_of("toy.slow:fail", "FailParams", {"how": how})


def plugin(body: str) -> Task:
    """Return a task for a stage with this body, in a module of its own."""
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    imports = "import sys, os\nfrom pipeline.stage import *\nfrom toy.common import save_number\n"
    Path("toy/extra.py").write_text(f"{imports}\ndef stage(ctx):\n{lines}\n")
    return task_of("toy.extra:stage", "NoParams", {})


def events_of(attempt: int = 1) -> list[dict[str, Any]]:
    return Store(".fls").read_events(KEY, attempt)[0]


def test_a_result_is_published_with_the_facts_of_its_making(toy: Path) -> None:
    outcome = run_task(start_task())
    assert outcome["status"] == "ok"
    manifest = Store(".fls").manifest(KEY)
    assert manifest is not None
    assert manifest.ingredients == {"stage": "toy"}
    assert manifest.making["run"] == "run-1"
    assert manifest.making["device"] == "cpu"
    assert manifest.making["threads"] == 1
    assert manifest.making["packages"]["pydantic"]
    assert [event["type"] for event in events_of()] == [
        "start",
        "metrics",
        "system",
        "metrics",
        "end",
    ]


def test_a_result_that_is_there_is_not_made_again(toy: Path) -> None:
    run_task(start_task())
    assert run_task(start_task()) == {"status": "ok", "seconds": 0.0}
    assert Store(".fls").attempts(KEY) == [1]


@pytest.mark.parametrize(
    ("raised", "lasting"),
    [
        ("TypeError('of')", True),
        ("ValueError('of')", True),
        ("KeyError('of')", True),
        ("ModuleNotFoundError('of')", True),
        ("MemoryError()", True),
        ("type('OutOfMemoryError', (RuntimeError,), {})('CUDA out of memory')", True),  # torch's
        ('RuntimeError("DefaultCPUAllocator: can\'t allocate memory: you tried")', True),
        ("ConnectionResetError('of')", False),
        ("type('Answer', (OSError, ValueError), {})('no JSON')", False),  # such as requests'
        ("RuntimeError('NCCL timed out')", False),
    ],
)
def test_what_would_come_again_is_not_tried_again(toy: Path, raised: str, lasting: bool) -> None:
    outcome = run_task(plugin(f"raise {raised}"))
    assert (outcome["status"], outcome["error"]["user"]) == ("failed", lasting)


def test_a_users_error_is_told_from_a_bug(toy: Path) -> None:
    user = run_task(fail_task("user"))
    assert user["status"] == "failed"
    assert user["error"]["user"]
    assert user["error"]["message"].startswith("this stage fails on purpose")
    bug = run_task(fail_task("bug"))
    assert bug["error"]["message"] == "ZeroDivisionError: a bug on purpose"
    assert "toy/slow.py" in bug["error"]["traceback"]
    assert Store(".fls").failure(KEY, 2) == bug["error"]


def test_an_output_left_out_is_the_stages_error(toy: Path) -> None:
    outcome = run_task(fail_task("nothing"))
    assert outcome["error"]["user"]
    assert "number" in outcome["error"]["message"]


def test_leaving_the_interpreter_is_a_failure_like_any_other(toy: Path) -> None:
    outcome = run_task(plugin("sys.exit(4)"))
    assert (outcome["status"], outcome["error"]["message"]) == ("failed", "SystemExit: 4")


def test_what_a_stage_prints_becomes_its_log(toy: Path) -> None:
    body = (
        "print('one\\ntwo')\n"
        "for done in range(3):\n"
        "    sys.stderr.write(f'\\r{done} of 2')\n"
        "sys.stderr.write('\\n')\n"
        "save_number(ctx, 1)\n"
        "print('no end', end='')"
    )
    assert run_task(plugin(body))["status"] == "ok"
    lines = [line for line in log_lines(KEY) if "seconds" not in line]
    assert lines == ["one", "two", "2 of 2", "number 1", "no end"]


def test_parameters_are_validated(toy: Path) -> None:
    outcome = run_task({**start_task(), "params": {"value": "seven"}})
    assert outcome["status"] == "failed"
    assert "valid integer" in outcome["error"]["message"]


def test_a_damaged_input_is_named_by_its_key(toy: Path) -> None:
    run_task(start_task())
    store = Store(".fls")
    (store.fetch(KEY, "number") / "number.json").write_text("{}")
    source = {"cell": "start", "stage": "start", "key": KEY, "axes": {}, "output": "number"}
    inputs = {"number": [{**source, "available": True}]}
    task = task_of("toy.stages:add", "AddParams", {}, key="b" * 64, inputs=inputs)
    outcome = run_task(task)
    assert (outcome["status"], outcome["key"]) == ("damaged", KEY)
    store.set_aside(KEY)
    outcome = run_task(task)
    assert (outcome["status"], outcome["key"]) == ("damaged", KEY)


def test_a_failed_input_has_no_path(toy: Path) -> None:
    source = {"cell": "start", "stage": "start", "key": KEY, "axes": {}, "output": "number"}
    inputs = {"numbers": [{**source, "available": False}]}
    fields = {"key": "b" * 64, "inputs": inputs, "outputs": ["results"]}
    outcome = run_task(task_of("toy.stages:total", "NoParams", {}, **fields))
    assert outcome["status"] == "ok"
    assert '"number": null' in (Store(".fls").fetch("b" * 64, "results") / "rows.json").read_text()


def test_the_loser_of_a_race_discards_its_work(toy: Path) -> None:
    winner = (
        "from pipeline.store.store import Store\n"
        "with Store('.fls').begin_attempt(ctx.key) as other:\n"
        "    folder = other.folder / 'outputs/number'\n"
        "    folder.mkdir(parents=True)\n"
        "    (folder / 'number.json').write_text('{\"number\": 1}')\n"
        "    other.publish({'stage': 'toy'}, ['number'], {})\n"
        "save_number(ctx, 2)"
    )
    assert run_task(plugin(winner))["status"] == "lost"
    folder = Store(".fls").fetch(KEY, "number")
    assert (folder / "number.json").read_text() == '{"number": 1}'


def test_a_storage_of_another_machine_is_refused(toy: Path) -> None:
    outcome = run_task({**start_task(), "token": "of another storage"})
    assert outcome["error"]["user"]
    assert "all nodes share" in outcome["error"]["message"]


def test_a_stage_without_gpu_sees_none_and_has_its_threads(toy: Path) -> None:
    body = (
        "assert os.environ['CUDA_VISIBLE_DEVICES'] == '', 'sees GPUs'\n"
        "assert os.environ['OMP_NUM_THREADS'] == str(ctx.threads) == '3', 'threads'\n"
        "assert ctx.device == 'cpu'\n"
        "save_number(ctx, 1)"
    )
    assert run_task({**plugin(body), "num_cpus": 3.5})["status"] == "ok"


def test_a_gpu_that_torch_cannot_use_is_an_error_and_no_fallback(toy: Path) -> None:
    class Cuda:
        is_available = is_initialized = staticmethod(lambda: False)

    class Torch:
        __version__ = "2.0+cpu"
        cuda = Cuda
        set_num_threads = staticmethod(lambda threads: None)

    before = sys.modules.get("torch")
    sys.modules["torch"] = Torch  # type: ignore[assignment]
    try:
        outcome = run_task({**start_task(), "num_gpus": 1})
    finally:
        del sys.modules["torch"]
        if before is not None:
            sys.modules["torch"] = before
    assert outcome["error"]["user"]
    assert "CUDA build of torch" in outcome["error"]["message"]


def test_a_share_of_a_cpu_is_one_thread() -> None:
    assert [threads_of({"num_cpus": share}) for share in (0, 0.5, 1, 2.5)] == [1, 1, 1, 2]  # type: ignore[typeddict-item]


def test_a_worker_does_not_import_torch_for_a_stage_without_it(toy: Path) -> None:
    code = (
        "import json, sys\nfrom pipeline.worker.worker import run_task\n"
        "run_task(json.loads(sys.argv[1]))\n"
        "assert not {'torch', 'ray', 'mlflow'} & set(sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(toy)])}
    command = [sys.executable, "-c", code, json.dumps(start_task())]
    subprocess.run(command, check=True, env=environment)
    assert Store(".fls").manifest(KEY) is not None


def test_a_tail_follows_the_attempts_of_its_own_run(toy: Path) -> None:
    store = Store(".fls")
    run_task(fail_task("user"))
    run_task({**start_task(), "run": "run-2"})
    first, second = (EventTail(store, run, {}) for run in ("run-1", "run-2"))
    assert [event["type"] for event in first.read("cell", KEY)[0]] == ["start", "system", "end"]
    events, _ = second.read("cell", KEY)
    assert [event["type"] for event in events] == ["start", "metrics", "system", "metrics", "end"]
    events, cursor = second.read("cell", KEY)
    assert events == []
    assert EventTail(store, "run-2", {"cell": cursor}).read("cell", KEY) == ([], cursor)


def test_what_the_stage_cost_is_in_the_manifest_and_among_the_metrics(toy: Path) -> None:
    run_task(start_task())
    manifest = Store(".fls").manifest(KEY)
    assert manifest is not None
    cost = {name: manifest.making[name] for name in ("seconds", "cpu_seconds", "peak_bytes")}
    assert cost["peak_bytes"] > 2**20
    metrics = [event["values"] for event in events_of() if event["type"] == "metrics"]
    assert metrics[-1] == cost


def test_a_checkpoint_says_what_the_attempt_has_cost_so_far(toy: Path) -> None:
    body = "with ctx.checkpoint():\n    pass\nsave_number(ctx, 1)"
    assert run_task(plugin(body))["status"] == "ok"
    (checkpoint,) = (event for event in events_of() if event["type"] == "checkpoint")
    manifest = Store(".fls").manifest(KEY)
    assert manifest is not None
    assert 0 <= checkpoint["seconds"] <= manifest.making["seconds"]
    assert 0 <= checkpoint["cpu_seconds"] <= manifest.making["cpu_seconds"]


def test_a_node_without_the_drivers_folder_refuses(toy: Path) -> None:
    outcome = run_task(start_task(directory="/nowhere/at/all", host="far"))
    assert outcome["status"] == "failed"
    assert outcome["error"]["user"]
    assert (
        "has no folder /nowhere/at/all, the working directory of the driver on far"
        in (outcome["error"]["message"])
    )
    assert Store(".fls").attempts(KEY) == []
    assert run_task(start_task(directory="/nowhere/at/all", shipped=True))["status"] == "ok"


def test_a_node_with_code_of_its_own_is_told_how_to_have_the_drivers(toy: Path) -> None:
    Path("toy/node_only.py").write_text("x = 1\n")
    ingredients = {"stage": "toy", "code": {"toy.node_only": "0" * 64}}
    task = plugin("import toy.node_only")
    message = run_task({**task, "ingredients": ingredients, "host": "far"})["error"]["message"]
    assert message.endswith("or ship the folder with the job: `fls submit`.")
    assert Store(".fls").manifest(KEY) is None
