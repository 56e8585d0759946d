"""A worker process: it runs tasks, from their plain data to their published outputs.

Executors call `run_task` alone. It takes and returns plain data, so that nothing depends on how a
task travelled; an exception of a stage becomes part of the outcome. `main` is the loop of a local
worker process: JSON tasks in and JSON outcomes out, one a line, with END, OTHERS_ENDED and
STOP_ASKED between them.
"""

from __future__ import annotations

import faulthandler
import json
import os
import platform
import queue
import signal
import socket
import stat
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import Any

from pipeline.base.errors import Damaged, PipelineError
from pipeline.base.search_path import look_here_too
from pipeline.base.secrets import redact
from pipeline.base.text import cut
from pipeline.base.variables import check_variables
from pipeline.stage import (
    Context,
    EventSink,
    Preempted,
    Preemption,
    StageError,
    only_calls,
)
from pipeline.store.attempt import Attempt, Failure
from pipeline.store.events import Event, EventWriter, words
from pipeline.store.leases import this_machine
from pipeline.store.logs import FOLDER as LOG_FOLDER
from pipeline.store.logs import LogStream, LogWriter, OutputFile
from pipeline.store.store import Store
from pipeline.worker.cost import CostMeter
from pipeline.worker.failures import is_lasting
from pipeline.worker.inputs import load, make_context
from pipeline.worker.promise import CodePromise, DataPromise
from pipeline.worker.system import SystemSampler
from pipeline.worker.task import (
    END,
    OTHERS_ENDED,
    STOP_ASKED,
    STOPPING,
    Outcome,
    Task,
    preempted,
    seat_of,
    threads_of,
    unable,
)

_TEXT_CHARACTERS = 500  # of a stage's text in its events; the log has all of it


def run_task(
    task: Task,
    preemption: Preemption | None = None,
    pass_on: Callable[[], None] = lambda: None,
    output: int | None = None,
    await_others: Callable[[], object] = lambda: None,
) -> Outcome:
    """Run one attempt at a cell and publish its result.

    Returns at once when the store has the cell's result. In a rank group, rank 0 makes the attempt;
    the other ranks compute with it and store nothing. Rank 0 publishes once they have ended well,
    because any rank may find that its code or data differ from the key's. A storage that fails
    while it records the failure gives an outcome as well.

    Args:
        task: the task.
        preemption: lets the caller ask the stage to stop; on the main thread, signals ask as well.
        pass_on: called when a signal asks a rank after the first to stop: rank 0 then writes a
            checkpoint, after which all ranks end.
        output: descriptor of the file that holds output written past Python, see `OutputFile`.
        await_others: returns, on rank 0, when all other ranks have ended well.
    """
    try:
        return _run_task(task, preemption or Preemption(), pass_on, output, await_others)
    except (PipelineError, OSError) as error:
        return {"status": "failed", "error": _error(str(error), user=is_lasting(error))}


def _run_task(
    task: Task,
    preemption: Preemption,
    pass_on: Callable[[], None],
    output: int | None,
    await_others: Callable[[], object],
) -> Outcome:
    check_variables()  # a node's may differ from the driver's
    _prepare_process(task)
    store = Store(task["storage"])
    if store.prepare() != task["token"]:
        return unable("failed", redact(_unshared(task)), user=True)
    if not task.get("shipped") and not os.path.isdir(task["directory"]):
        return unable("failed", redact(_without_directory(task)), user=True)
    if store.readable(task["key"]) is not None:
        return {"status": "ok", "seconds": 0.0}
    code = CodePromise(task["ingredients"], elsewhere=task["host"] != socket.gethostname())
    if why := code.outdated():
        return unable("outdated", why)
    if seat_of(task)["rank"] > 0:
        return _run_other_rank(task, store, code, pass_on)
    began = time.monotonic()
    with (
        _handling_signals(preemption.ask),
        store.begin_attempt(task["key"]) as attempt,
        LogWriter(attempt.folder / LOG_FOLDER, task["log_bytes"]) as log,
        OutputFile(output, log) as past_python,
        _event_writer(attempt, past_python) as events,
    ):
        events.emit({"type": "start", "time": time.time(), **_who(task)})
        events.flush()
        meter = CostMeter()
        outcome = _attempt(task, store, code, attempt, events, log, preemption, meter, await_others)
        past_python.close()
        outcome["seconds"] = round(time.monotonic() - began, 3)
        if outcome["status"] in {"failed", "damaged"}:
            attempt.fail(outcome["error"])
        cost = {} if outcome["status"] == "ok" else meter.read()  # a result has its own
        events.emit({"type": "end", "time": time.time(), "status": outcome["status"], **cost})
        return outcome


@contextmanager
def _handling_signals(handle: Callable[[], None]) -> Iterator[None]:
    """Handle the signals that ask a worker to stop, while a stage runs.

    SIGTERM comes from the driver, or, as SIGHUP does, from a scheduler that takes the machine away;
    Ray cancels gently by SIGINT. All are handled even where the process inherited "ignore", as from
    a shell that started it in the background.
    """

    def note(number: int, frame: FrameType | None) -> None:
        handle()

    before = {
        number: signal.getsignal(number) or signal.SIG_DFL
        for number in STOPPING
        if threading.current_thread() is threading.main_thread()
    }
    for number in before:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _attempt(
    task: Task,
    store: Store,
    code: CodePromise,
    attempt: Attempt,
    events: EventWriter,
    log: LogWriter,
    preemption: Preemption,
    meter: CostMeter,
    await_others: Callable[[], object],
) -> Outcome:
    emit = _sink(events, log, meter)
    if attempt.passed_over:
        text = f"Not resumed from: {'; '.join(attempt.passed_over)}."
        emit({"type": "text", "time": time.time(), "text": text})
    try:
        with (
            SystemSampler(events.emit, gpus=task["num_gpus"] > 0),
            LogStream(log) as lines,
            redirect_stdout(lines),
            redirect_stderr(lines),
        ):
            context = _perform(task, store, code, attempt.folder, emit, preemption)
            if context.world_size > 1:
                await_others()
        cost = meter.read()
        emit({"type": "metrics", "time": time.time(), "step": None, "values": cost})
        events.flush()
        making = {**_making(task, context), **cost}
        published = attempt.publish(task["ingredients"], task["outputs"], making)
        return {"status": "ok" if published else "lost"}
    except Preempted:
        return preempted()
    except (Exception, SystemExit) as error:  # a stage may raise anything
        return _failed(error)


def _run_other_rank(
    task: Task, store: Store, code: CodePromise, pass_on: Callable[[], None]
) -> Outcome:
    """Run the stage as a rank after the first, in a temporary folder.

    Asked to stop, it continues: rank 0 cannot write its checkpoint without it.
    """
    with tempfile.TemporaryDirectory(prefix="fls-", ignore_cleanup_errors=True) as folder:
        try:
            with _handling_signals(pass_on):
                _perform(task, store, code, Path(folder), lambda event: None, Preemption())
            return {"status": "ok"}
        except (Exception, SystemExit) as error:
            return _failed(error)


def _perform(
    task: Task,
    store: Store,
    code: CodePromise,
    folder: Path,
    emit: EventSink,
    preemption: Preemption,
) -> Context:
    """Run the stage, and check that its code and data are the key's.

    The check runs before, after, and before each checkpoint is stored; a difference raises
    `BrokenPromise`.
    """
    with code.watch(), only_calls(task["calls"]):
        stage = load(task["entry"])
        context = make_context(task, store, folder, emit, preemption)
        data = DataPromise(task["ingredients"], context.params)

        def emit_checked(event: dict[str, Any]) -> None:
            if event["type"] == "checkpoint":
                data.check_untouched()
            emit(event)

        context.emit = emit_checked
        code.check()
        with data.watch():
            stage(context)
        code.check()
    return context


def _failed(error: BaseException) -> Outcome:
    """Return the outcome of a stage that raised the error, which is being handled."""
    if isinstance(error, Damaged):
        return {"status": "damaged", "key": error.key, "error": _error(str(error), user=False)}
    own = isinstance(error, StageError | PipelineError)
    message = str(error) if own else f"{type(error).__name__}: {error}"
    return {"status": "failed", "error": _error(message, user=is_lasting(error))}


def _event_writer(attempt: Attempt, past_python: OutputFile) -> EventWriter:
    """Return the writer of an attempt's events, which also keeps its log up to date."""

    def append(events: list[Event]) -> None:
        attempt.append_events(redact(events))  # a stage may have printed its environment

    def keep() -> None:
        past_python.drain()
        attempt.save_log()

    return EventWriter(append, keep)


def _sink(events: EventWriter, log: LogWriter, meter: CostMeter) -> EventSink:
    """Return the sink of a stage's events; the log shows those that people read.

    A checkpoint's event has the attempt's cost so far, so that the cost of a checkpoint is known
    when a later attempt resumes from it.
    """

    def emit(event: dict[str, Any]) -> None:
        shown = words(event).splitlines()
        if shown:
            log.write(shown)
        if event["type"] == "text":  # redacted before it is cut: half a secret matches nothing
            event = {**event, "text": cut(redact(event["text"]), _TEXT_CHARACTERS)}
        events.emit({**event, **meter.read()} if event["type"] == "checkpoint" else event)

    return emit


def _prepare_process(task: Task) -> None:
    """Set folder, threads and GPUs before the stage's module, and perhaps torch, is imported."""
    if os.path.isdir(task["directory"]):
        os.chdir(task["directory"])
        look_here_too()
    os.environ["OMP_NUM_THREADS"] = str(threads_of(task))
    if task["num_gpus"] == 0:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _making(task: Task, context: Context) -> dict[str, Any]:
    """Describe where and how a result was made: kept in the manifest, not part of the key."""
    # Looked up in the dictionary: an attribute access may import, warn or fail.
    versions = {
        name: version
        for name, module in sorted(sys.modules.items())
        if "." not in name and name not in sys.stdlib_module_names
        if isinstance(version := getattr(module, "__dict__", {}).get("__version__"), str)
    }
    return {
        **_who(task),
        "cell": task["cell"],
        "device": context.device,
        "threads": context.threads,
        "workers": context.world_size,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": versions,
    }


def _who(task: Task) -> dict[str, Any]:
    return {
        "run": task["run"],
        "host": socket.gethostname(),
        "machine": this_machine(),
        "pid": os.getpid(),
    }


def _error(message: str, *, user: bool) -> Failure:
    """Describe the exception that is being handled."""
    return {
        "message": redact(message),
        "traceback": redact(traceback.format_exc()),
        "user": user,
    }


def _without_directory(task: Task) -> str:
    return (
        f"{socket.gethostname()} has no folder {task['directory']}, the working directory of the "
        f"driver on {task['host']}: relative paths and modules would differ here. Work in a folder "
        "that all nodes share, or ship it with the job: `fls submit`."
    )


def _unshared(task: Task) -> str:
    return (
        f"{task['storage']} on {socket.gethostname()} is not the driver's storage: put `storage:` "
        "on a file system that all nodes share, or into an object store."
    )


def main() -> None:
    """Serve tasks from standard input until it closes, when the driver ends or dies.

    A thread reads the input, so that a process in the middle of a stage ends as well. Replies go to
    a private copy of standard output; a stage's own output joins the worker's log.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver handles Ctrl-C
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    faulthandler.enable(all_threads=False)  # shows where a signal ended the process
    output = 2 if stat.S_ISREG(os.fstat(2).st_mode) else None
    tasks: queue.SimpleQueue[tuple[Task, Preemption, threading.Event]] = queue.SimpleQueue()

    def receive() -> None:
        preemption, others_ended = Preemption(), threading.Event()
        for line in sys.stdin.buffer:
            message = json.loads(line)
            if message == END:
                preemption.ask()  # without effect if the task has ended meanwhile
            elif message == OTHERS_ENDED:
                others_ended.set()
            else:
                preemption, others_ended = Preemption(), threading.Event()
                tasks.put((message, preemption, others_ended))
        os.killpg(0, signal.SIGKILL)  # this process and the children of its stage

    threading.Thread(target=receive, name="tasks", daemon=True).start()

    def pass_on() -> None:  # while a stage runs, the only writer
        os.write(replies.fileno(), json.dumps(STOP_ASKED).encode() + b"\n")

    while True:
        task, preemption, others_ended = tasks.get()
        outcome = run_task(task, preemption, pass_on, output, others_ended.wait)
        replies.write(json.dumps(outcome).encode() + b"\n")
        replies.flush()


if __name__ == "__main__":
    main()
