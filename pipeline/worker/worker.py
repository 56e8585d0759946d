"""What happens in a worker process: one task, from its plain data to its published outputs.

`run_task` is the only thing that executors call. It takes plain data and returns plain data, so
that nothing depends on how a task travelled; whatever a stage raises becomes part of the outcome.
`main` is the loop of a local worker process: JSON tasks in, JSON outcomes out, a line each, and in
between END, OTHERS_ENDED and TOLD.
"""

from __future__ import annotations

import faulthandler
import importlib
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import Any, NotRequired, TypedDict

from pipeline.base.errors import Damaged, PipelineError
from pipeline.base.search_path import look_here_too
from pipeline.base.secrets import redact
from pipeline.base.text import cut
from pipeline.base.variables import check_variables
from pipeline.stage import (
    Artifact,
    Context,
    EventSink,
    Params,
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
from pipeline.worker.promise import CodePromise, DataPromise
from pipeline.worker.system import SystemSampler

END = "end"  # to a local worker: its task is to end behind a checkpoint
OTHERS_ENDED = "others ended"  # to the first rank's: all others have done their part, and well
TOLD = "told"  # from one that only helps: it was told to end, and the first rank should
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # a process that gets one is to end
_TEXT_CHARACTERS = 500  # of what a stage says, as far as it is not for the log


class TaskInput(TypedDict):
    """One connected upstream output; `available` is False when its cell failed."""

    cell: str
    stage: str
    key: str
    axes: dict[str, Any]
    output: str
    available: bool


class Seat(TypedDict):
    """The place of one of several processes that run a task; see `Context` for the last two."""

    rank: int
    world_size: int
    rendezvous: str


class Task(TypedDict):
    """One attempt at one cell, as plain data.

    `entry` and `params_model` are `module:attribute`, and `calls` lists what else the stage may
    import and call by what is kept in a stored file (see `pipeline.stage.call_text`); `token` tells
    the storage from others; `host` is the driver's; `directory` is its working directory, where
    relative paths in parameters start. An executor adds a `seat` when it runs the task in several
    processes, and `shipped` where each node has a copy of that directory of its own, in which its
    workers begin.
    """

    run: str
    cell: str
    key: str
    storage: str
    token: str
    entry: str
    params_model: str
    params: dict[str, Any]
    calls: list[str]
    inputs: dict[str, list[TaskInput]]
    outputs: list[str]
    ingredients: dict[str, Any]
    num_cpus: float
    num_gpus: float
    checkpoint_every_s: float
    log_bytes: int
    host: str
    directory: str
    shipped: NotRequired[bool]
    seat: NotRequired[Seat]


_NO_ERROR: Failure = {"message": "", "traceback": "", "user": False}


class Outcome(TypedDict, total=False):
    """How an attempt ended.

    `status` is `ok`; `lost` (another attempt published first, which is as good); `failed`;
    `damaged` (an input is not what its manifest says; `key` is the input's); `preempted` (told to
    end, it did so behind a checkpoint); `outdated` (the process has run other code for an earlier
    task, or may keep other data, and did nothing; the executor gives the task to another one, and
    the driver never hears of it); or `died` (the executor says so in place of a worker that no
    longer can). The last five come with an `error`.
    """

    status: str
    key: str
    seconds: float
    error: Failure


def died(message: str) -> Outcome:
    """Return the outcome of a task whose process ended without one."""
    return {"status": "died", "error": {**_NO_ERROR, "message": message}}


def preempted() -> Outcome:
    """Return the outcome of a task that ended because it was told to."""
    message = "it was told to end, and did so behind a checkpoint"
    return {"status": "preempted", "error": {**_NO_ERROR, "message": message}}


def threads_of(task: Task) -> int:
    """Return how many threads the task may compute with: one for each whole CPU, at least one."""
    return max(1, int(task["num_cpus"]))


def run_task(
    task: Task,
    preemption: Preemption | None = None,
    pass_on: Callable[[], None] = lambda: None,
    output: int | None = None,
    await_others: Callable[[], object] = lambda: None,
) -> Outcome:
    """Run one attempt at a cell and publish what it made.

    Returns at once when the cell's result is there already. Of several processes that run the task
    rank 0 makes the attempt; the others help it, and leave nothing. It publishes when they have
    ended well: one of them may find that it used something else than the key says. A storage that
    fails even when it is to take down the failure is an outcome as well.

    Args:
        task: as plain data.
        preemption: how the caller tells the stage to end; signals do, too, on the main thread.
        pass_on: called, by a signal, when a rank after the first is told to end: the first one is
            to write a checkpoint, behind which all end.
        output: descriptor of the file where output lands that goes past Python, see `OutputFile`.
        await_others: returns to the first of several ranks when all others have ended well.
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
    check_variables()  # a node may have others than the driver
    _prepare_process(task)
    store = Store(task["storage"])
    if store.prepare() != task["token"]:
        return {"status": "failed", "error": _unshared(task)}
    if not task.get("shipped") and not os.path.isdir(task["directory"]):
        return {"status": "failed", "error": _without_directory(task)}
    if _published(store, task["key"]):
        return {"status": "ok", "seconds": 0.0}
    code = CodePromise(task["ingredients"], elsewhere=task["host"] != socket.gethostname())
    if why := code.outdated():
        return {"status": "outdated", "error": {**_NO_ERROR, "message": why}}
    if _seat(task)["rank"] > 0:
        return _help(task, store, code, pass_on)
    began = time.monotonic()
    with (
        _handling_signals(preemption.ask),
        store.begin_attempt(task["key"]) as attempt,
        LogWriter(attempt.folder / LOG_FOLDER, task["log_bytes"]) as log,
        OutputFile(output, log) as past_python,
        EventWriter(_redacted(attempt), _keeping(attempt, past_python)) as events,
    ):
        events.emit({"type": "start", "time": time.time(), **_who(task)})
        events.flush()
        meter = CostMeter()
        outcome = _attempt(task, store, code, attempt, events, log, preemption, meter, await_others)
        past_python.close()
        outcome["seconds"] = round(time.monotonic() - began, 3)
        if outcome["status"] in {"failed", "damaged"}:
            attempt.fail(outcome["error"])
        cost = {} if outcome["status"] == "ok" else meter.read()  # a result has said its own
        events.emit({"type": "end", "time": time.time(), "status": outcome["status"], **cost})
        return outcome


@contextmanager
def _handling_signals(handle: Callable[[], None]) -> Iterator[None]:
    """Handle the signals that tell a worker to end, for as long as a stage runs.

    SIGTERM comes from our driver, or, as SIGHUP does, from a scheduler that takes the machine away;
    SIGINT is what becomes of Ray's gentle cancelling. All are handled also where the process
    ignores them, as one does that a shell has started in the background.
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
        text = f"Not gone on from: {'; '.join(attempt.passed_over)}."
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
    except (Exception, SystemExit) as error:  # a stage is anyone's code and may raise anything
        return _failed(error)


def _help(task: Task, store: Store, code: CodePromise, pass_on: Callable[[], None]) -> Outcome:
    """Run the stage as one of the ranks after the first, in a folder that is deleted.

    Told to end it goes on: rank 0 cannot write its checkpoint without it.
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
    """Run the stage, and check that what it uses is what the key says.

    That is checked at both ends, and before it keeps something to go on from: what is not what the
    key says raises `BrokenPromise`.
    """
    with code.watch(), only_calls(task["calls"]):
        stage = _load(task["entry"])
        context = _make_context(task, store, folder, emit)
        context.preemption = preemption
        data = DataPromise(task["ingredients"], context.params)

        def emit_checked(event: dict[str, Any]) -> None:
            if event["type"] == "checkpoint":
                data.check_untouched()  # before it is stored
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


def _seat(task: Task) -> Seat:
    return task.get("seat") or {"rank": 0, "world_size": 1, "rendezvous": ""}


def _redacted(attempt: Attempt) -> Callable[[list[Event]], None]:
    """Return what stores an attempt's events: a stage may have printed its environment."""

    def append(events: list[Event]) -> None:
        attempt.append_events(redact(events))

    return append


def _keeping(attempt: Attempt, past_python: OutputFile) -> Callable[[], None]:
    """Return what brings the log up to date: here, and where the attempt is stored."""

    def keep() -> None:
        past_python.drain()
        attempt.save_log()

    return keep


def _sink(events: EventWriter, log: LogWriter, meter: CostMeter) -> EventSink:
    """Return what takes a stage's events, of which the log shows those that people read.

    A checkpoint says what the attempt has cost so far. So the work behind a checkpoint is known
    when a later attempt goes on from it.
    """

    def emit(event: dict[str, Any]) -> None:
        shown = words(event).splitlines()
        if shown:
            log.write(shown)
        if event["type"] == "text":  # a secret is hidden before it could be cut in two
            event = {**event, "text": cut(redact(event["text"]), _TEXT_CHARACTERS)}
        events.emit({**event, **meter.read()} if event["type"] == "checkpoint" else event)

    return emit


def _prepare_process(task: Task) -> None:
    """Set what must be set before the stage's module, and with it perhaps torch, is imported."""
    if os.path.isdir(task["directory"]):
        os.chdir(task["directory"])
        look_here_too()
    os.environ["OMP_NUM_THREADS"] = str(threads_of(task))
    if task["num_gpus"] == 0:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _make_context(task: Task, store: Store, folder: Path, emit: EventSink) -> Context:
    # A warm process may have imported torch under another thread count. Torch is looked up and
    # not imported: a stage that does without it should not pay for it.
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads_of(task))
    params_model: type[Params] = _load(task["params_model"])
    return Context(
        params=params_model.model_validate_json(json.dumps(task["params"])),
        folder=folder,
        inputs=_fetch_inputs(task["inputs"], store),
        device=_device(task, torch),
        threads=threads_of(task),
        **_seat(task),
        emit=emit,
        checkpoint_every_s=task["checkpoint_every_s"],
        cell=task["cell"],
        key=task["key"],
    )


def _fetch_inputs(
    inputs: Mapping[str, Sequence[TaskInput]], store: Store
) -> dict[str, list[Artifact]]:
    return {
        name: [
            Artifact(
                cell=source["cell"],
                stage=source["stage"],
                key=source["key"],
                axes=source["axes"],
                path=_fetch(source, store) if source["available"] else None,
            )
            for source in sources
        ]
        for name, sources in inputs.items()
    }


def _fetch(source: TaskInput, store: Store) -> Path:
    """Return the folder of an upstream output.

    Raises:
        Damaged: it is not what it should be; or it is gone, because another run found it damaged.
    """
    if not _published(store, source["key"]):
        raise Damaged(source["key"], "it was there, and is no more")
    return store.fetch(source["key"], source["output"])


def _published(store: Store, key: str) -> bool:
    """Tell whether the store has a readable manifest of `key`; fetching checks the rest."""
    try:
        return store.manifest(key) is not None
    except Damaged:
        return False


def _device(task: Task, torch: Any) -> str:
    """Return "cuda" for a task that was given a GPU.

    Raises:
        StageError: torch cannot use the GPU; falling back to the CPU would change the result.
    """
    if task["num_gpus"] == 0:
        return "cpu"
    if torch is not None and not torch.cuda.is_available():
        raise StageError(
            f"num_gpus: {task['num_gpus']:g} was asked for and given, but torch "
            f"{torch.__version__} cannot use it. Install a CUDA build of torch, or set num_gpus: 0."
        )
    return "cuda"


def _making(task: Task, context: Context) -> dict[str, Any]:
    """Describe where and how a result was made: recorded in the manifest, not part of the key."""
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


def _without_directory(task: Task) -> Failure:
    message = (
        f"{socket.gethostname()} has no folder {task['directory']}, which the driver on "
        f"{task['host']} works in: relative paths and the user's modules would be other ones here. "
        "Work in a folder that all nodes share, or ship it with the job: `fls submit`."
    )
    return {"message": redact(message), "traceback": "", "user": True}


def _unshared(task: Task) -> Failure:
    message = (
        f"{task['storage']} on {socket.gethostname()} is not the driver's storage: put `storage:` "
        "on a file system that all nodes share, or into an object store."
    )
    return {"message": redact(message), "traceback": "", "user": True}


def _load(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def main() -> None:
    """Serve tasks from standard input until it closes, which is when the driver ends or dies.

    A thread watches the input, so that a process in the middle of a stage ends as well. Replies go
    to a private copy of standard output; what a stage prints there joins the worker's log.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    faulthandler.enable(all_threads=False)  # tells where the process was when a signal ends it
    output = 2 if stat.S_ISREG(os.fstat(2).st_mode) else None
    tasks: queue.SimpleQueue[tuple[Task, Preemption, threading.Event]] = queue.SimpleQueue()

    def receive() -> None:
        preemption, others_ended = Preemption(), threading.Event()
        for line in sys.stdin.buffer:
            message = json.loads(line)
            if message == END:
                preemption.ask()  # if the task has ended meanwhile, it has no effect
            elif message == OTHERS_ENDED:
                others_ended.set()
            else:
                preemption, others_ended = Preemption(), threading.Event()
                tasks.put((message, preemption, others_ended))
        os.killpg(0, signal.SIGKILL)  # this process and whatever its stage has started

    threading.Thread(target=receive, name="tasks", daemon=True).start()

    def pass_on() -> None:  # while a stage runs, when nothing else is written there
        os.write(replies.fileno(), json.dumps(TOLD).encode() + b"\n")

    while True:
        task, preemption, others_ended = tasks.get()
        outcome = run_task(task, preemption, pass_on, output, others_ended.wait)
        replies.write(json.dumps(outcome).encode() + b"\n")
        replies.flush()


if __name__ == "__main__":
    main()
