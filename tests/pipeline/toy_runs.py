"""Helpers that run pipelines of the plugin `toy`, in this process or as the real command."""

import io
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from rich.console import Console

from pipeline.__main__ import main
from pipeline.base.console import RedactingConsole
from pipeline.base.states import CellState
from pipeline.cli.run_commands import print_end
from pipeline.executors import ExecutorName, make_executor
from pipeline.executors.base import AbstractExecutor
from pipeline.planning.planner import Selection
from pipeline.running.documents import RunOptions
from pipeline.running.launch import resume_run, run_and_read
from pipeline.running.record import RunRecord
from pipeline.running.runs import load_run
from pipeline.running.trust import read_trust
from pipeline.spec.load import load_spec
from pipeline.store.logs import read_text
from pipeline.store.store import Store
from pipeline.tracking import TrackerName

ROOT = Path(__file__).parents[2]
TOY = Path(__file__).parent / "toy"

DIAMOND = """
    start: {uses: start, matrix: {seed: [0, 1]}, params: {value: 10}}
    add: {uses: add, matrix: {seed: [0, 1], amount: [1, 2]}, inputs: {number: start}}
    total: {uses: total, inputs: {numbers: [start, add]}}
    report: {uses: report, inputs: {results: total}}
"""


def write_spec(stages: str, *, name: str = "toy", storage: str = ".fls") -> Path:
    """Write `pipeline.yaml` with these stages into the working directory."""
    path = Path("pipeline.yaml")
    head = f"name: {name}\nplugins: [toy]\nstorage: {storage}\nstages:\n"
    path.write_text(head + textwrap.indent(textwrap.dedent(stages).strip("\n"), "  ") + "\n")
    return path


def run_here(
    path: Path = Path("pipeline.yaml"),
    *,
    overrides: list[str] | None = None,
    selection: Selection | None = None,
    **options: Any,
) -> tuple[int, str]:
    """Run a spec in this process, by default with local workers; return exit code and output."""
    selection = selection or Selection()
    fields: dict[str, Any] = {
        "executor": ExecutorName.LOCAL,
        "tracking": TrackerName.JSONL,
        **options,
    }
    spec = load_spec(path, overrides or [])
    run_options = RunOptions(
        file=str(path),
        overrides=overrides or [],
        **vars(selection),
        **fields,
    )
    output = io.StringIO()
    console = _console(output)
    code = run_and_read(spec, run_options, console, partial(print_end, console=console))
    return code, output.getvalue()


def resume_here(
    record: RunRecord,
    storage: str = ".fls",
    *,
    replan: bool = False,
    file: Path = Path("pipeline.yaml"),
) -> tuple[int, str]:
    """Resume a run in this process, with a pipeline file; return exit code and output."""
    output = io.StringIO()
    store = Store(storage)
    trust = read_trust(file, store)
    console = _console(output)
    ended = resume_run(store, record, trust, console, replan=replan)
    return print_end(ended, console), output.getvalue()


def last_run(storage: str = ".fls") -> RunRecord:
    store = Store(storage)
    return load_run(store, store.list_runs()[-1])


def states(record: RunRecord) -> dict[str, CellState]:
    return {name: status.state for name, status in record.cells.items()}


def log_lines(key: str, attempt: int = 1, storage: str = ".fls") -> list[str]:
    """Return the lines of an attempt's log, without the times before them."""
    store = Store(storage)
    pieces = read_text(store.storage, store.log_segments(key, attempt))
    return [line[10:] for text, _ in pieces for line in text.splitlines()]


def ran() -> Counter[str]:
    """Return how often each cell's stage was executed."""
    log = Path(os.environ["TOY_LOG"])
    return Counter(log.read_text().split()) if log.exists() else Counter()


def numbers(storage: str = ".fls") -> dict[str, float]:
    """Return the numbers of the last run's cells."""
    record, store = last_run(storage), Store(storage)
    found = {}
    for name, status in record.cells.items():
        manifest = store.manifest(status.key)
        if manifest and "number" in manifest.outputs:
            text = (store.fetch(status.key, "number") / "number.json").read_text()
            found[name] = float(text.split(":")[1].strip(" }\n"))
    return found


def start_fls(*arguments: str) -> subprocess.Popen[str]:
    """Start the real command."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "pipeline", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def fls(*arguments: str) -> tuple[int, str, str]:
    """Run the command in this process; return exit code, standard output and standard error."""
    output, errors = io.StringIO(), io.StringIO()
    with (
        patch.object(sys, "argv", ["fls", *arguments]),
        redirect_stdout(output),
        redirect_stderr(errors),
    ):
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
    return code, output.getvalue(), errors.getvalue()


def wait_for(condition: Any, timeout_s: float = 30.0) -> None:
    """Wait until `condition()` is true."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def checkpoint_exists() -> bool:
    return any(Path(".fls").glob("stages/*/attempts/*/checkpoints/00*[0-9]/.digests.json"))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def kill(process: subprocess.Popen[str], number: int = signal.SIGKILL) -> int:
    """Send a signal to a started command and return its exit code."""
    process.send_signal(number)
    process.communicate(timeout=30)
    return process.returncode


def _console(output: io.StringIO) -> Console:
    return RedactingConsole(file=output, width=200)


@contextmanager
def ray_executor(folder: Path) -> Iterator[AbstractExecutor]:
    """Yield a Ray executor whose workers find the plugin, copied into a folder."""
    shutil.copytree(TOY, folder / "toy")
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("RAY_ADDRESS", raising=False)
        environment.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{folder}")
        executor = make_executor(ExecutorName.RAY)
        try:
            yield executor
        finally:
            executor.stop()
            executor.stop()  # twice does no harm
